"""Which trained models answer which claim, and what they say.

A rule names two kinds of variant (by their resolved model, not by a study's labels), what else has to be equal, and the metric.  Every
study in which such a pair was trained gives a row of its own, so that studies that disagree are both seen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reports.claims.studies import Model, Study, Trained, pairs
from reports.statistics import Effect
from sweeps import schema

NEAR = 0.1
"""Relative difference up to which two widths count as equal."""
ALPHAS = ("expert", "device", "communication")


@dataclass(frozen=True, slots=True)
class Measured:
    """`ours` minus `theirs` in one study; `relative` (with its interval) over the mean of `theirs`, None where that is 0."""

    study: Study
    metric: str
    ours: Trained
    theirs: Trained
    effect: Effect
    reference: float

    @property
    def relative(self) -> tuple[float, float | None, float | None] | None:
        if not self.reference:
            return None
        low, high = (None if end is None else end / self.reference for end in (self.effect.low, self.effect.high))
        return self.effect.mean / self.reference, low, high


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """`said` is the rule in words; `each`: every pair, not only the first of a study."""

    left: Callable[[Model], bool]
    right: Callable[[Model], bool]
    alike: Callable[[Trained, Trained], bool]
    said: str
    metric: str = schema.BITS_PER_BYTE
    each: bool = False
    rank: Callable[[Trained, Trained], float] | None = None
    """Of several pairs the one with the least."""


def measure(rule: Rule, studies: Sequence[Study]) -> list[Measured]:
    """One for each study that holds a pair with a seed in common (of several with the same left side the first)."""
    found = []
    for study in studies:
        seen: list[int | None] = []
        candidates = pairs(study, rule.left, rule.right, rule.alike)
        if rule.rank is not None:
            rank = rule.rank
            candidates.sort(key=lambda pair: rank(*pair))
        for ours, theirs in candidates:
            effect = study.effect(rule.metric, ours, theirs)
            limit = (ours.model.get("moe") or {}).get("device_limit")
            if effect is None or limit in seen or (seen and not rule.each):
                continue
            seen.append(limit)
            common = [value for seed, value in theirs.values(rule.metric).items() if seed in ours.values(rule.metric)]
            found.append(Measured(study, rule.metric, ours, theirs, effect, sum(common) / len(common)))
    return found


def family(model: Model) -> str:
    """dense, hash, switch, gshard, glam, mixtral, deepseekmoe, or other."""
    moe = model.get("moe")
    if not moe:
        return "dense"
    if moe["selection"] == "hash":
        return "hash"
    if moe["second_expert"] == "by_chance":
        return "gshard" if moe["moe_layer_freq"] == 1 else "glam"
    if moe["n_shared_experts"]:
        return "deepseekmoe"
    if moe["num_experts_per_tok"] == 1:
        return "switch"
    return "mixtral" if moe["norm_topk_prob"] and moe["num_experts_per_tok"] == 2 else "other"


def _kind(name: str) -> Callable[[Model], bool]:
    def is_kind(model: Model) -> bool:
        attention = model["attention"]
        groups = attention["num_key_value_heads"] or attention["num_attention_heads"]
        kind = attention["kind"]
        if kind == "gqa":
            kind = "mqa" if groups == 1 else "mha" if groups == attention["num_attention_heads"] else "gqa"
        return bool(kind == name)

    return is_kind


def _is(name: str) -> Callable[[Model], bool]:
    return lambda model: family(model) == name


def _alphas(model: Model) -> dict[str, float]:
    moe = model.get("moe")
    return {name: float(moe["balance"][name]) for name in ALPHAS} if moe else {}


def _unrestricted(model: Model) -> bool:
    moe = model.get("moe") or {"expert_devices": 1}
    return moe["expert_devices"] > 1 and moe["device_limit"] in (None, moe["expert_devices"])


def _limited(model: Model) -> bool:
    moe = model.get("moe") or {"device_limit": None}
    return moe["device_limit"] is not None and 3 <= moe["device_limit"] < moe["expert_devices"]


def _others_equal(*free: str) -> Callable[[Trained, Trained], bool]:
    """All searched settings but those under the `free` paths."""

    def alike(a: Trained, b: Trained) -> bool:
        paths = [path for path in {*a.settings, *b.settings} if not path.startswith(free)]
        return all(a.settings.get(path) == b.settings.get(path) for path in paths)

    return alike


def _same_ffn(a: Trained, b: Trained) -> bool:
    return family(a.model) == family(b.model)


def _same_attention(a: Trained, b: Trained) -> bool:
    return bool(a.model["attention"]["kind"] == b.model["attention"]["kind"])


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= NEAR * max(abs(a), abs(b))


def _widths(model: Model) -> tuple[int, int, int]:
    """Of all routed, activated routed and shared experts of a layer together."""
    moe = model["moe"]
    width = moe["moe_intermediate_size"]
    return moe["n_routed_experts"] * width, moe["num_experts_per_tok"] * width, moe["n_shared_experts"] * width


def _routed(model: Model) -> bool:
    return bool(model.get("moe")) and model["moe"]["selection"] == "affinity"


def _finer(a: Trained, b: Trained) -> bool:
    same = all(_near(x, y) for x, y in zip(_widths(a.model), _widths(b.model), strict=True))
    return (
        same
        and family(a.model) == family(b.model)
        and a.model["moe"]["moe_intermediate_size"] < 0.6 * b.model["moe"]["moe_intermediate_size"]
        and _same_attention(a, b)
    )


def _coarseness(a: Trained, b: Trained) -> float:
    return float(a.model["moe"]["moe_intermediate_size"] / b.model["moe"]["moe_intermediate_size"])


def _as_many_activated(a: Trained, b: Trained) -> bool:
    ours, theirs = (v.model["moe"] for v in (a, b))
    widths = [moe["moe_intermediate_size"] * (moe["num_experts_per_tok"] + moe["n_shared_experts"]) for moe in (ours, theirs)]
    return bool(ours["moe_intermediate_size"] == theirs["moe_intermediate_size"]) and _near(*widths) and _same_attention(a, b)


def _balance(metric: str) -> Rule:
    return Rule(
        left=lambda model: bool(found := _alphas(model)) and all(found.values()),
        right=lambda model: bool(found := _alphas(model)) and not any(found.values()),
        alike=_others_equal("model.moe.balance"),
        said="all three weights above 0 against all at 0, other searched settings equal",
        metric=metric,
    )


def _alone(alpha: str, metric: str) -> Rule:
    return Rule(
        left=lambda model: _alphas(model).get(alpha, 0.0) > 0,
        right=lambda model: _alphas(model).get(alpha) == 0.0,
        alike=_others_equal(f"model.moe.balance.{alpha}"),
        said=f"its weight above 0 against 0, the other two weights and searched settings equal ({metric})",
        metric=metric,
    )


def _attention(ours: str, theirs: str) -> Rule:
    said = f"{ours.upper()} against {theirs.upper()} with the same kind of FFN; what was held equal is the study's choice"
    return Rule(left=_kind(ours), right=_kind(theirs), alike=_same_ffn, said=said)


def _families(ours: str, theirs: str) -> Rule:
    said = f"{ours} against {theirs} with the same kind of attention; what was held equal is the study's choice"
    return Rule(left=_is(ours), right=_is(theirs), alike=_same_attention, said=said)


RULES: dict[str, Rule] = {
    "limit-quality": Rule(
        left=_limited,
        right=_unrestricted,
        alike=_others_equal("model.moe.device_limit"),
        said="3 <= M < D against M = D or no limit, other searched settings equal",
        each=True,
    ),
    "balance-experts": _balance(schema.EXPERT_VIOLATION),
    "balance-devices": _balance(schema.DEVICE_VIOLATION),
    "balance-drops": _balance(schema.DROPPED_SHARE),
    "balance-loss": _balance(schema.BITS_PER_BYTE),
    "balance-expert-alone": _alone("expert", schema.EXPERT_VIOLATION),
    "balance-device-alone": _alone("device", schema.DEVICE_VIOLATION),
    "balance-communication-alone": _alone("communication", schema.BALANCE_COMMUNICATION),
    "balance-communication-received": _alone("communication", schema.RECEIVED_VIOLATION),
    "mla-mha": _attention("mla", "mha"),
    "mla-gqa": _attention("mla", "gqa"),
    "mla-mqa": _attention("mla", "mqa"),
    "mha-gqa": _attention("mha", "gqa"),
    "gqa-mqa": _attention("gqa", "mqa"),
    "hash-dense": _families("hash", "dense"),
    "switch-hash": _families("switch", "hash"),
    "gshard-switch": _families("gshard", "switch"),
    "deepseekmoe-gshard": _families("deepseekmoe", "gshard"),
    "fine-grained": Rule(
        left=_routed,
        right=_routed,
        alike=_finer,
        said="more and narrower experts with equal total, activated and shared width, the widest gap of a study",
        rank=_coarseness,
    ),
    "shared-experts": Rule(
        left=lambda model: _routed(model) and model["moe"]["n_shared_experts"] > 0,
        right=lambda model: _routed(model) and model["moe"]["n_shared_experts"] == 0,
        alike=_as_many_activated,
        said="shared experts against none, experts as wide and as many activated",
    ),
}
"""How each measured claim is read."""
