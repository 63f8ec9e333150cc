"""The words of a page: names that people use for settings and metrics, and numbers in sentences."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from reports.document import safe
from reports.statistics import Effect, Estimate
from reports.store import Run
from sweeps import schema
from sweeps.variants import VARIANT

SETTINGS = {
    "model.moe.device_limit": "M",
    "model.moe.num_experts_per_tok": "K",
    "model.moe.n_routed_experts": "routed experts",
    "model.moe.n_shared_experts": "shared experts",
    "model.moe.moe_intermediate_size": "expert width",
    "model.moe.expert_devices": "D",
    "model.moe.capacity_factor": "capacity factor",
    "model.moe.balance.expert": "α1",
    "model.moe.balance.device": "α2",
    "model.moe.balance.communication": "α3",
    "model.attention.kv_lora_rank": "KV latent",
    "model.attention.q_lora_rank": "query latent",
    "model.attention.kind": "attention",
    "model.num_hidden_layers": "layers",
    "model.hidden_size": "width",
    "training.train_tokens": "tokens",
    "training.optimizer.learning_rate": "learning rate",
}
"""The paper's symbols and plain names; another path goes by its last part."""

NAMES = {schema.BITS_PER_BYTE: "bits per byte", schema.ALL_TO_ALL_SECONDS: "simulated all-to-all time", schema.KV_BYTES_PER_TOKEN: "KV cache"}
UNITS = {
    schema.BITS_PER_BYTE: "bits per byte",
    schema.LOSS: "nats per token",
    schema.KV_BYTES_PER_TOKEN: "bytes per token",
    schema.ALL_TO_ALL_SECONDS: "seconds",
    schema.DISPATCH_SECONDS: "seconds",
    schema.COMBINE_SECONDS: "seconds",
    schema.TOKENS_PER_SECOND: "tokens per second",
}
QUANTITIES = (
    (schema.DISTINCT_DEVICES, "sends", "sends"),
    (schema.KV_BYTES_PER_TOKEN, "KV cache", "KV cache"),
    (schema.ACTIVATED_PARAMETERS, "activated parameters", "activated parameters"),
    (schema.TRAIN_FLOPS_PER_TOKEN, "training FLOPs", "training FLOPs"),
    (schema.ALL_TO_ALL_SECONDS, "simulated all-to-all time", "simulated all-to-all time"),
)
"""What a variant may save; `sends` are the distinct devices that a token is sent to."""
EXACT = 1e-9
"""Half an interval relative to its mean, below which a value is one without a spread, as closed forms have."""
WORTH_SAYING = 0.02
"""Relative change of a saving from which on a verdict names it; the tables hold all of them."""


def setting(path: str) -> str:
    if path in SETTINGS:
        return SETTINGS[path]
    return path.rsplit(".", maxsplit=1)[-1].replace("_", " ")


def metric_name(metric: str) -> str:
    """`bits per byte (en)` for validation/bits_per_byte/en; else the last part of the name."""
    if metric.startswith(f"{schema.BITS_PER_BYTE}/"):
        return f"bits per byte ({metric.rsplit('/', maxsplit=1)[-1]})"
    return NAMES.get(metric, metric.split("/", maxsplit=1)[-1].replace("_", " "))


def unit(metric: str) -> str:
    """The metric's unit, or its name where it has none."""
    return UNITS.get(_whole(metric), metric_name(metric))


def has_unit(metric: str) -> bool:
    return _whole(metric) in UNITS


def _whole(metric: str) -> str:
    """Without the domain of bits per byte."""
    return schema.BITS_PER_BYTE if metric.startswith(schema.BITS_PER_BYTE) else metric


def setting_value(path: str, value: Any, config: Mapping[str, Any]) -> str:
    """`M = 2`; no limit, and a limit of all devices, are both `unrestricted`."""
    moe = (config.get("model") or {}).get("moe") or {}
    if path == VARIANT:
        return safe(str(value))
    if path == "model.moe.device_limit" and (value is None or value == moe.get("expert_devices")):
        return "unrestricted (M = D)" if value is None else f"unrestricted (M = {value})"
    text = (
        {None: "none", True: "on", False: "off"}.get(value)
        if value is None or isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
    return f"{safe(setting(path))} = {safe(str(text))}"


def variant_words(run: Run, baseline: Run | None) -> tuple[str, str]:
    """What differs from the baseline, and what the baseline has there; `baseline` and nothing for itself."""
    if run.baseline or baseline is None:
        return ("baseline", "") if run.baseline else (safe(run.variant), "the baseline")
    changed = [path for path, value in run.parameters.items() if baseline.parameters.get(path) != value]
    if not changed:
        return safe(run.variant), "the baseline"
    ours = ", ".join(setting_value(path, run.parameters[path], run.config) for path in changed)
    theirs = ", ".join(setting_value(path, baseline.parameters.get(path), baseline.config) for path in changed)
    return ours, theirs


def digits(scale: float) -> int:
    """Decimals that show two figures of a number of this size, at least four for a loss."""
    if not scale or not math.isfinite(scale):
        return 4
    return min(max(4, 1 - int(f"{abs(scale):e}".split("e")[1])), 9)


def number(value: float) -> str:
    """One number alone: whole from a thousand on, else with its first figures."""
    return f"{value:,.0f}" if abs(value) >= 1000 or not value else f"{value:.{digits(value)}f}"


def stated(value: float) -> str:
    """A size as somebody states it: three figures, whole from a thousand on."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def amount(text: str, metric: str) -> str:
    """`0.01 bits per byte`; of a metric without a unit `0.01 in expert violation`."""
    return f"{text} {unit(metric)}" if has_unit(metric) else f"{text} in {metric_name(metric)}"


def plus_minus(mean: float, low: float | None, high: float | None, *, sign: bool = False) -> str:
    """`0.004 ± 0.006`; an interval that is not symmetrical is given by its ends."""
    half = None if low is None or high is None else (high - low) / 2
    form = f"{{:{'+' if sign else ''}.{digits(mean / 10 if half is None else max(half, abs(mean) / 100))}f}}"
    if abs(mean) >= 1000:
        form = "{:+,.0f}" if sign else "{:,.0f}"
    if low is None or high is None or half is None or half <= EXACT * abs(mean):
        return form.format(mean)
    if abs((high - mean) - (mean - low)) > 0.01 * (high - low):
        return f"{form.format(mean)} ({form.format(low)} to {form.format(high)})"
    return f"{form.format(mean)} ± {form.replace('+', '').format((high - low) / 2)}"


def estimate_words(value: Estimate | None) -> str:
    if value is None:
        return "not recorded"
    return plus_minus(value.mean, value.low, value.high) + (" (one seed)" if value.low is None else "")


def effect_words(effect: Effect | None) -> str:
    if effect is None:
        return "none"
    return plus_minus(effect.mean, effect.low, effect.high, sign=True) + (" (one seed: no interval)" if effect.low is None else "")


def seeds_words(count: int) -> str:
    return f"{count} seed{'' if count == 1 else 's'}"


def join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def cost(effect: Effect, against: str, metric: str, *, lower_is_better: bool) -> str:
    """`costs 0.004 ± 0.006 bits per byte against M = 3: no difference that 5 seeds can show`."""
    if effect.mean == 0 and not effect.bootstrap_low and not effect.bootstrap_high:
        return f"has exactly the {metric_name(metric)} of {against}" + (f" on {seeds_words(effect.seeds)}" if effect.spread != 0 else "")
    worse = (effect.mean > 0) == lower_is_better
    if metric.startswith(schema.BITS_PER_BYTE):
        word = "costs" if worse else "gains"
    else:
        word = "raises" if effect.mean > 0 else "lowers"
    sign = 1 if effect.mean >= 0 else -1
    low, high = (
        (effect.low, effect.high) if sign > 0 else (None if effect.high is None else -effect.high, None if effect.low is None else -effect.low)
    )
    size = plus_minus(abs(effect.mean), low, high)
    of = UNITS.get(metric, "")
    what = (
        f"{size} {unit(metric)}"
        if word in ("costs", "gains")
        else f"{metric_name(metric)} by {size} {'' if of == metric_name(metric) else of}".rstrip()
    )
    text = f"{word} {what} against {against}"
    if effect.low is None:
        return f"{text} on one seed, which gives no interval"
    seeds = "one seed, with the spread of the other variants," if effect.seeds == 1 else f"{effect.seeds} seeds"
    if effect.shown:
        kind = "" if word in ("costs", "gains") else (", for the worse" if worse else ", for the better")
        return text + kind
    if effect.excludes_zero:
        return f"{text}: its own interval leaves zero out, but not after Holm's correction for {effect.comparisons} comparisons"
    return f"{text}: no difference that {seeds} can show"


def savings(ours: Mapping[str, Estimate], theirs: Mapping[str, Estimate], skip: str, *, dense: bool = False, dense_baseline: bool = False) -> str:
    """`saves 33 % of the sends, but takes 12 % more KV cache`; which quantities stay, where none changes by WORTH_SAYING.

    Empty where nothing but `skip` was recorded on both sides.  A model that is `dense` has no sends, and none are recorded.
    """
    less, more, equal = [], [], []
    largest = 0.0
    for metric, of, extra in QUANTITIES:
        if metric == skip or metric not in theirs or not theirs[metric].mean:
            continue
        if metric not in ours:
            if dense and metric in (schema.DISTINCT_DEVICES, schema.ALL_TO_ALL_SECONDS):
                less.append(f"all of the {of}")
            continue
        change = ours[metric].mean / theirs[metric].mean - 1
        if change <= -WORTH_SAYING:
            less.append(f"{_percent(-change)} of the {of}")
        elif change >= 1:
            more.append(f"{1 + change:.3g} times the {of}")
        elif change >= WORTH_SAYING:
            more.append(f"{_percent(change)} more {extra}")
        else:
            equal.append(of)
            largest = max(largest, abs(change))
    # Experts that all lie on one device are sent nowhere.
    if dense_baseline and schema.DISTINCT_DEVICES in ours and skip != schema.DISTINCT_DEVICES and ours[schema.DISTINCT_DEVICES].mean > 1:
        more.append(f"{ours[schema.DISTINCT_DEVICES].mean:.2g} sends per token, where the baseline has none")
    if less or more:
        return (f"saves {join(less)}" if less else "") + (", but " if less and more else "") + (f"takes {join(more)}" if more else "")
    if not equal:
        return ""
    return f"{join(equal)} {'stays as it is' if len(equal) == 1 else 'stay as they are'}" if largest < EXACT else f"{join(equal)} within 2 %"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share < 0.995 else f"{100 * share:.2f} %"
