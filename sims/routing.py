"""Routing for the cluster model: made up, or a trained model's under another limit.

Both go through `select_experts`, the model's own rule: a family only makes the affinities.
"""

from dataclasses import replace
from functools import lru_cache
from typing import Literal, get_args

import numpy as np

from research.configfile import nearest
from research.errors import ConfigError
from research.routing_trace import RoutingTrace, select_experts

Family = Literal[
    "random",
    "forced-balanced",
    "balanced",
    "gaussian",
    "power-law",
    "log-normal",
    "hot-expert",
    "hot-device",
    "spread",
    "ragged",
    "unused-expert",
    "rotating",
    "burst",
]
FAMILIES: tuple[str, ...] = get_args(Family)
NodeScore = Literal["max", "sum"]

HOT = 2.0
"""Logits that a hot device gains: its experts are e^2 = 7 times as probable as others."""
CANDIDATES = 16
"""Random tokens of which `balanced` keeps one."""
TWINS = 8
"""Relabelled copies of each token of the families whose experts are alike."""


def synthetic_trace(
    family: str,
    *,
    tokens: int,
    n_routed_experts: int,
    num_experts_per_tok: int,
    expert_devices: int,
    device_limit: int | None,
    seed: int = 0,
    node_groups: int = 1,
    node_limit: int | None = None,
    node_score: NodeScore = "max",
    steps: int = 1,
) -> RoutingTrace:
    """One layer, `steps` snapshots.  Affinities are the softmax of unit Gaussian logits plus what the family adds.

    random (forced-balanced): nothing, as benchmark harnesses route.
    balanced: random tokens, each beside its images under all relabellings of experts that keep devices and nodes whole: every
    expert gets the same load to the token (`tokens` a multiple of E), and each token reaches as many devices as a random one.
    gaussian: a bias per expert of standard deviation 1.
    log-normal, power-law: experts drawn without replacement by popularities of log-standard-deviation 1, or 1 / rank.
    hot-expert: the first expert is every second token's favourite.  hot-device: the first device's experts gain 2.
    spread: every token wants experts on as many devices as it may.  unused-expert: the last expert is never wanted.
    rotating: the hot device is another one each step.  burst: in the last snapshot a fourth of the tokens want the same K experts.
    ragged: as random; the sources are unequal, which is what `AllToAll` makes of it.
    """
    if family not in FAMILIES:
        raise ConfigError(f"routing = {family!r}: no such family{nearest(family, FAMILIES)}")
    shape = (tokens, n_routed_experts, num_experts_per_tok, expert_devices, node_groups)
    limits = (device_limit, node_limit, node_score)
    snapshots = (
        [_affinities(family, *shape, step, steps, seed) for step in range(steps)]
        if family in ("rotating", "burst")
        else [_affinities(family, *shape, steps - 1, steps, seed)] * steps
    )
    chosen = [_choose(scores, shape, limits) for scores in snapshots]
    return RoutingTrace(
        expert_ids=np.stack(chosen)[:, None].astype(np.int16),
        steps=np.arange(steps),
        layers=np.array([0]),
        scores=snapshots[-1][None],
        n_routed_experts=n_routed_experts,
        expert_devices=expert_devices,
        device_limit=device_limit,
    )


def reroute(
    trace: RoutingTrace, device_limit: int | None, *, node_groups: int = 1, node_limit: int | None = None, node_score: NodeScore = "max"
) -> RoutingTrace:
    """The last snapshot's affinities, routed under another limit (None: unrestricted)."""
    shape = (0, trace.n_routed_experts, trace.num_experts_per_tok, trace.expert_devices, node_groups)
    ids = _choose(trace.scores, shape, (device_limit, node_limit, node_score))
    return replace(trace, expert_ids=ids[None].astype(np.int16), steps=trace.steps[-1:], device_limit=device_limit)


def _choose(scores: np.ndarray, shape: tuple[int, int, int, int, int], limits: tuple[int | None, int | None, NodeScore]) -> np.ndarray:
    _, _, chosen, devices, node_groups = shape
    device_limit, node_limit, node_score = limits
    top = -(-chosen // node_limit) if node_limit and node_score == "sum" else 1
    return select_experts(scores, chosen, devices, device_limit, node_groups=node_groups, node_limit=node_limit, node_top=top)


@lru_cache(maxsize=8)
def _affinities(
    family: str, tokens: int, n_routed_experts: int, num_experts_per_tok: int, expert_devices: int, node_groups: int, step: int, steps: int, seed: int
) -> np.ndarray:
    """float32 (tokens, E); kept, since a sweep asks for the same ones under every limit."""
    random = np.random.default_rng(seed)
    levels = _levels(n_routed_experts, expert_devices, node_groups)
    if family == "balanced":
        logits = _orbits(random, tokens, n_routed_experts, num_experts_per_tok, expert_devices, levels)
    elif family in ("random", "forced-balanced", "ragged", "burst") and tokens >= TWINS * n_routed_experts:
        logits = _twins(random, tokens, n_routed_experts, levels)
    else:
        logits = random.standard_normal((tokens, n_routed_experts), dtype=np.float32)
    _bias(family, logits, random, num_experts_per_tok, expert_devices, step, steps)
    scores = np.exp(logits - logits.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    scores.setflags(write=False)
    return scores


def _bias(family: str, logits: np.ndarray, random: np.random.Generator, chosen: int, devices: int, step: int, steps: int) -> None:
    """What the family adds, in place."""
    tokens, experts = logits.shape
    per_device = experts // devices
    if family == "gaussian":
        logits += random.standard_normal(size=experts, dtype=np.float32)
    elif family == "log-normal":
        _drawn(logits, random, random.standard_normal((experts,)))
    elif family == "power-law":
        ranks: np.ndarray = random.permutation(experts) + 1
        _drawn(logits, random, -np.log(ranks))
    elif family == "hot-expert":
        logits[: tokens // 2, 0] += 100.0
        random.shuffle(logits[:, 0])
    elif family in ("hot-device", "rotating"):
        hot = step % devices if family == "rotating" else 0
        logits[:, hot * per_device : (hot + 1) * per_device] += HOT
    elif family == "spread":
        # One expert of every device is wanted above all others: the K best lie on K devices, or on all that are allowed.
        favourite = random.integers(0, per_device, (tokens, devices)) + np.arange(devices) * per_device
        logits[np.arange(tokens)[:, None], favourite] += 10.0
    elif family == "unused-expert":
        logits[:, -1] = -100.0
    elif family == "burst" and step == steps - 1:
        logits[: tokens // 4, random.permutation(experts)[:chosen]] += 100.0


def _drawn(logits: np.ndarray, random: np.random.Generator, log_popularity: np.ndarray) -> None:
    """Gumbel noise around log popularities: the K largest are K draws without replacement by popularity (Plackett-Luce)."""
    logits[:] = random.gumbel(size=logits.shape) + log_popularity


def _levels(experts: int, devices: int, node_groups: int) -> list[int]:
    """Sizes of nested groups, outermost first: nodes, devices in a node, experts of a device; their product is E."""
    few, many = sorted((devices, node_groups))
    if many % few:
        few = 1  # Neither is nested in the other: experts are relabelled inside the finer groups only where that keeps both.
        many = int(np.gcd(devices, node_groups))
    return [few, many // few, experts // many]


def _relabelled(labels: np.ndarray, levels: list[int]) -> np.ndarray:
    """int64 (R, E): where each expert goes under relabelling r of 0..E-1: r's digits are added to the expert's, level by level."""
    outer, middle, inner = levels
    e, r = np.arange(outer * middle * inner), labels[:, None]
    # The outermost digit of r runs fastest, so that few relabellings already reach all nodes, then all devices.
    a = (e // (middle * inner) + r) % outer
    b = (e // inner % middle + r // outer) % middle
    c = (e % inner + r // (outer * middle)) % inner
    return (a * middle + b) * inner + c


def _moved(base: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """float32 (B R, E): each row of base (B, E) under each relabelling (R, E), a row's images in a run."""
    found = np.empty((len(base), len(targets), base.shape[1]), np.float32)
    for r, target in enumerate(targets):
        found[:, r, target] = base
    return found.reshape(-1, base.shape[1])


def _orbits(random: np.random.Generator, tokens: int, experts: int, chosen: int, devices: int, levels: list[int]) -> np.ndarray:
    """Logits of whole orbits; the tokens that head them are evenly spaced among random ones sorted by the devices that they reach,
    so that few of them already route as many do."""
    heads = -(-tokens // experts)
    logits = random.standard_normal((heads * CANDIDATES, experts), dtype=np.float32)
    ids = select_experts(logits, chosen)
    reach = [_distinct(ids // width) for width in {experts // devices, max(experts // devices // 2, 1), levels[2] * levels[1]}]
    order = np.lexsort(reach[::-1])
    picked = order[CANDIDATES // 2 :: CANDIDATES]
    images = _moved(logits[np.sort(picked)], _relabelled(np.arange(experts), levels)).reshape(heads, experts, experts)
    # All heads under the first relabelling, then under the next: every GPU's run of tokens holds all heads.
    return np.ascontiguousarray(images.swapaxes(0, 1)).reshape(-1, experts)[:tokens]


def _distinct(groups: np.ndarray) -> np.ndarray:
    """int64 (N,): distinct values in each row."""
    ordered = np.sort(groups, axis=-1)
    return 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(-1)


def _twins(random: np.random.Generator, tokens: int, experts: int, levels: list[int]) -> np.ndarray:
    """Random logits, each token with TWINS relabelled images (an antithetic sample: a pool of thousands stands for many more tokens,
    whose load is much more even than that of independent ones)."""
    base = random.standard_normal((-(-tokens // TWINS), experts), dtype=np.float32)
    labels = np.arange(TWINS) * experts // TWINS + np.arange(TWINS) % (levels[0] * levels[1])
    return _moved(base, _relabelled(labels % experts, levels))[:tokens]
