"""Ours by simulation: training hours, generation throughput, and what a device limit saves.  Some ten seconds; the same numbers each time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from reports.claims.closed import Ours, expected_devices, saved
from reports.claims.published import figure
from sims import AllToAll, Result, generation_ratio, simulate
from sims.quantiles import Quantiles
from sims.training.prediction import PLACEMENTS, predicted

LIMIT = 3
Say = Callable[[str], None]


def simulate_all(say: Say) -> dict[str, Ours]:
    """A value for each claim by simulation, in the claim's unit; `say` is told what is being done."""
    say("simulating DeepSeek-V2's training step on 32 to 256 nodes")
    found = _training()
    say("simulating generation on 8 H800")
    found |= _generation()
    say("simulating dispatch and combine with and without a device limit")
    return found | _limit()


def _quantiles(draws: np.ndarray | Quantiles, note: str = "", scale: float = 1.0) -> Ours:
    q = draws if isinstance(draws, Quantiles) else Quantiles.of(draws)
    return Ours(value=q.p50 / scale, low=q.p10 / scale, high=q.p90 / scale, note=note)


def _training() -> dict[str, Ours]:
    dense = figure("hours_67b")
    rates = {name: each["tokens_per_second_per_gpu"] for name, each in predicted().items()}
    hours = {name: 1e12 / 3600 / rate / 1e3 for name, rate in rates.items()}
    cuts = {name: Quantiles.of(100 * (1 - value / dense)) for name, value in hours.items()}
    by = ", ".join(f"{PLACEMENTS[name]} {cuts[name].p50:.1f} %" for name in PLACEMENTS)
    by_hours = ", ".join(f"{PLACEMENTS[name]} {np.median(hours[name]):.1f}K" for name in PLACEMENTS)
    note = f"the dense model's {dense}K are fitted, so that they are no prediction"
    return {
        "cost-simulated": _quantiles(cuts["unknown"], f"{note}; on 1,024 GPUs with {by}"),
        "hours-simulated": _quantiles(hours["unknown"], f"on 1,024 GPUs with {by_hours}"),
    }


def _generation() -> dict[str, Ours]:
    at = (found := generation_ratio()).at
    lengths = f"{at.lengths.kind} lengths of {at.lengths.prompt:g} prompt and {at.lengths.output:g} generated tokens; {at.reading}"
    spread = [each.ratio.p50 for each in found.sensitivity]
    resident = f"{at.ours.residents:,.0f} sequences against {at.baseline.residents:,.0f}; {lengths}"
    over = f"{lengths}; over other lengths and bfloat16 products {min(spread):.2f} to {max(spread):.2f}"
    return {
        "residents": Ours(value=at.residents_ratio, note=resident),
        "step-ratio": _quantiles(at.step_ratio, lengths),
        "generation": _quantiles(at.ratio, over),
        "generation-with-prompts": _quantiles(at.ratio_with_prompts, lengths),
        "generated": _quantiles(at.ours.generated_tokens_per_second, lengths, 1e3),
        "generated-bar": _quantiles(at.ours.generated_tokens_per_second, lengths, 1e3),
        "generated-67b": _quantiles(at.baseline.generated_tokens_per_second, lengths, 1e3),
        "prompts": _quantiles(at.ours.prompt_tokens_per_second, lengths, 1e3),
    }


def _limit() -> dict[str, Ours]:
    every, limited = (_exchange(device_limit=limit) for limit in (None, LIMIT))
    cut: Callable[[Callable[[Result], Any]], float] = partial(_cut, every, limited)
    reached = f"{limited.distinct_routing_devices_per_token:.3f} devices per token instead of {every.distinct_routing_devices_per_token:.3f}"
    expected = expected_devices()
    return {
        "sends-saved": Ours(value=cut(lambda r: r.distinct_routing_devices_per_token), note=f"{reached}; {expected:.3f} unrestricted in closed form"),
        "bytes-saved": Ours(
            value=cut(lambda r: r.nvlink_bytes), note=f"{limited.nvlink_bytes / 1e9:.2f} GB instead of {every.nvlink_bytes / 1e9:.2f}"
        ),
        "time-saved": Ours(value=cut(lambda r: r.seconds), note=f"{1e3 * limited.seconds:.2f} ms instead of {1e3 * every.seconds:.2f}"),
    }


def _exchange(*, device_limit: int | None) -> Result:
    """DeepSeek-V2's layer on one node of 8 H800, a group of experts on each GPU, 4,096 tokens per GPU."""
    result = simulate(AllToAll(cluster="h800", nodes=1, gpus_per_node=8, device_limit=device_limit))
    assert isinstance(result, Result)
    return result


def _cut(every: Result, limited: Result, quantity: Callable[[Result], Any]) -> float:
    return saved(float(quantity(limited)), float(quantity(every)))
