"""Which file each simulator's result becomes.

Every result has `timeline()`; a result without byte matrices has no heat map, and says so.
"""

from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any

import numpy as np

from research.errors import ConfigError
from sims.outputs.figures import LimitPoint, bars_figure, curve_figure, formula_figure, limit_csv, limit_png, png_bytes
from sims.outputs.heatmap import heatmap_png
from sims.outputs.parquet import parquet_bytes
from sims.outputs.perfetto import trace_bytes
from sims.quantiles import Quantiles
from sims.result import Result
from sims.serving.result import ServingResult
from sims.training.result import StepResult

Files = dict[str, bytes]
"""By suffix of the path that was asked for."""


def parquet_of(result: Any, about: Mapping[str, str]) -> bytes:
    return parquet_bytes(result.timeline(), about)


def trace_of(result: Any, about: Mapping[str, str], *, compress: bool) -> bytes:
    return trace_bytes(result.timeline(), about, compress=compress)


@singledispatch
def heatmap_of(result: Any) -> bytes:
    raise ConfigError(f"--heatmap: {type(result).__name__} has no bytes from GPU to GPU; all-to-all and training-step have")


@heatmap_of.register
def _(result: Result) -> bytes:
    title = f"{result.cluster}: dispatch and combine of one layer, {result.expert_parallel} GPUs"
    return heatmap_png(result.nvlink_matrix, result.infiniband_matrix, _block(result.nvlink_matrix, result.gpus_per_node), title)


@heatmap_of.register
def _(result: StepResult) -> bytes:
    exchange = result.step.exchange
    if exchange is None:
        raise ConfigError("--heatmap: the model has no routed experts (model.moe), so nothing goes from GPU to GPU in an all-to-all")
    spec, moves = result.spec, exchange.samples[0].traffic
    nvlink = moves["dispatch"].nvlink + moves["combine"].nvlink
    infiniband = moves["dispatch"].infiniband + moves["combine"].infiniband
    title = f"{result.cluster.name}: dispatch and combine of one layer and microbatch, {spec.experts_over} GPUs"
    return heatmap_png(nvlink, infiniband, _block(nvlink, spec.gpus_per_node), title)


def _block(nvlink: np.ndarray, gpus_per_node: int) -> int:
    """GPUs of a node that stand next to each other in the matrix; where NVLink leaves such blocks (spread placements), no lines are drawn."""
    node = np.arange(len(nvlink)) // gpus_per_node
    return gpus_per_node if not nvlink[node[:, None] != node].any() else len(nvlink)


@singledispatch
def figure_files(result: Any) -> Files:
    raise ConfigError(f"--figure: there is no figure of {type(result).__name__}")


@figure_files.register
def _(result: Result) -> Files:
    ours = {"dispatch": result.dispatch_seconds, "combine": result.combine_seconds}
    theirs = {name: {key.removesuffix("_seconds"): value for key, value in formula.items()} for name, formula in result.formulas.items()}
    title = f"{result.cluster}, {result.expert_parallel} GPUs"
    words = "; ".join(f"{name} {seconds.p50 * 1e6:,.0f} us ({seconds.p10 * 1e6:,.0f} to {seconds.p90 * 1e6:,.0f})" for name, seconds in ours.items())
    return {".png": png_bytes(formula_figure(ours, theirs, title), f"{title}: {words}, beside the formulas {', '.join(theirs)}.")}


@figure_files.register
def _(result: StepResult) -> Files:
    parts = {name: seconds for name, seconds in result.typical().items() if seconds > 0}
    title = f"A step of {Quantiles.of(result.seconds).p50:,.2f} s on {result.spec.gpus} GPUs of {result.cluster.name}"
    words = "; ".join(f"{name} {seconds:.3g} s" for name, seconds in parts.items())
    return {".png": png_bytes(bars_figure(parts, title, unit="s", scale=1.0), f"{title}: {words}.")}


@figure_files.register
def _(result: ServingResult) -> Files:
    points = result.curve
    title = f"{result.model} on {result.nodes} x {result.gpus_per_node} GPUs of {result.cluster}"
    canvas = curve_figure(
        [p.batch for p in points], [p.generated_tokens_per_second for p in points],
        xlabel="sequences at a time", ylabel="generated tokens/s", title=title, log_x=True, marked=("fits in memory", result.saturated_residents),
    )  # fmt: skip
    words = "; ".join(f"{p.batch:,.0f} sequences {p.generated_tokens_per_second.p50:,.0f} tokens/s, bound by {p.bound_by}" for p in points)
    return {".png": png_bytes(canvas, f"{title}: {words}.")}


@figure_files.register(list)
def _(results: Sequence[Result]) -> Files:
    """The M x K x nodes figure of a sweep, with its data."""
    points = [limit_point(result) for result in results]
    keys = [(p.nodes, p.num_experts_per_tok, p.device_limit) for p in points]
    if len(set(keys)) < len(keys):
        raise ConfigError("--figure: shows M x K x nodes; give every other swept field one value")
    return {".png": limit_png(points), ".csv": limit_csv(points).encode()}


def limit_point(result: Result) -> LimitPoint:
    """Dispatch and combine together: they share their constants, so they rise and fall together and their quantiles add up."""
    both = [sum(pair) for pair in zip(result.dispatch_seconds, result.combine_seconds, strict=True)]
    return LimitPoint(
        nodes=result.nodes,
        num_experts_per_tok=result.num_experts_per_tok,
        device_limit=result.device_limit,
        seconds=Quantiles(p10=both[0], p50=both[1], p90=both[2]),
        formulas={name: sum(formula.values()) for name, formula in result.formulas.items()},
        distinct_devices_per_token=result.distinct_devices_per_token,
    )
