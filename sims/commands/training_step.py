"""`training-step`."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from research.routing_trace import RoutingTrace
from research.terminal import console
from sims.commands import app
from sims.commands.outputs import FigureOut, Heatmap, Outputs, Parquet, TraceOut, say
from sims.quantiles import Quantiles
from sims.training import StepResult, TrainingStep, training_step
from sims.training.door import training_step_spec

FIELDS = ", ".join(field.name for field in fields(TrainingStep) if field.name != "model")

OPTIONS = (
    "model",
    "cluster",
    "nodes",
    "gpus_per_node",
    "pipeline_parallel",
    "expert_parallel",
    "tensor_parallel",
    "schedule",
    "placement",
    "batch_size",
    "micro_batch_size",
    "sequence_length",
    "recompute",
    "routing",
    "tier",
    "seed",
)
"""Parameters of the command that are fields of the question, by the same name."""


@app.command(
    "training-step",
    help=f"""Seconds of an optimizer step, where they go, and the memory that it takes.

    Example: python -m sims training-step --model deepseek-v2 --cluster h800 --nodes 16 --set pipeline_parallel=16 --placement spread
    / python -m sims training-step --model deepseek-67b --nodes 128 --tensor-parallel 4 --pipeline-parallel 8 --schedule 1f1b
    --batch-size 4608 --recompute none --json / python -m sims training-step --set device_limit=2 --set speed.3=1.2

    Fields for --set: {FIELDS}; the model's own, such as model.num_hidden_layers=30 or device_limit=2 (model.moe.device_limit).""",
)
def training_step_command(
    model: Annotated[str, typer.Option(help="A preset (python -m research presets) or a YAML file of a model or run")] = "deepseek-v2",
    cluster: Annotated[str, typer.Option(help="h800, h100, h200, a100, b200, or a YAML file of your own")] = "h800",
    nodes: int = 128,
    gpus_per_node: int = 8,
    pipeline_parallel: Annotated[int | None, typer.Option(help="Stages; left out: as many as fit, 16 at most")] = None,
    expert_parallel: Annotated[int | None, typer.Option(help="GPUs that share a layer's experts; left out: the model's devices")] = None,
    tensor_parallel: Annotated[int, typer.Option(help="GPUs that share heads and FFN widths")] = 1,
    schedule: Annotated[str, typer.Option(help="1f1b, zero-bubble or dualpipe")] = "zero-bubble",
    placement: Annotated[str, typer.Option(help="Expert-parallel groups: packed into nodes, spread (a GPU of each), or either")] = "either",
    batch_size: Annotated[int, typer.Option(help="Sequences of a step")] = 9216,
    micro_batch_size: Annotated[int, typer.Option(help="Sequences of a forward pass")] = 1,
    sequence_length: int = 4096,
    recompute: Annotated[str, typer.Option(help="none, partial or full")] = "partial",
    routing: Annotated[str, typer.Option(help="How tokens choose experts: balanced, or a family of all-to-all")] = "balanced",
    trace: Annotated[Path | None, typer.Option(help="routing.npz of a trained model, instead of a family")] = None,
    tier: Annotated[str, typer.Option(help="closed, or event: also in SimPy, an event for each phase")] = "closed",
    seed: int = 0,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="field=value; wins over the options")] = None,
    parquet: Parquet = None,
    trace_out: TraceOut = None,
    heatmap: Heatmap = None,
    figure: FigureOut = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables")] = False,
) -> None:
    outputs = Outputs(parquet=parquet, trace_out=trace_out, heatmap=heatmap, figure=figure)
    spec, found = question_of(locals())
    result = training_step(spec, found)
    written = outputs.write(result, spec)
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    _print(result)
    say(written)


def question_of(given: Mapping[str, Any]) -> tuple[TrainingStep, RoutingTrace | None]:
    """The question of the command's parameters, by their names, and the trace to route by."""
    spec = training_step_spec({name: given[name] for name in OPTIONS}, given["overrides"] or [])
    return spec, RoutingTrace.load(given["trace"]) if given["trace"] is not None else None


def _print(result: StepResult) -> None:
    spec = result.spec
    placement = " or ".join(result.by_placement) or spec.placement
    parts = f"pipeline {spec.stages} x data {spec.data_parallel} x tensor {spec.tensor_parallel}, experts over {spec.experts_over} ({placement})"
    table = Table(
        "", "P10", "P50", "P90", title=f"{result.cluster.name}\n{spec.gpus} GPUs: {parts}; {spec.schedule}, {spec.microbatches} microbatches"
    )
    rows: tuple[tuple[str, np.ndarray, str], ...] = (
        ("step, s", result.seconds, "{:,.3f}"),
        ("tokens/s per GPU", result.tokens_per_second_per_gpu, "{:,.0f}"),
        ("MFU, %", 100 * result.mfu, "{:.1f}"),
        ("GPU-hours per 1e12 tokens", result.gpu_hours_per_trillion_tokens, "{:,.0f}"),
        ("exposed communication, %", 100 * result.breakdown["exposed_communication"] / result.seconds, "{:.1f}"),
        ("bubble, %", 100 * result.bubble_share, "{:.1f}"),
    )
    rows += tuple((f"  {name}: tokens/s per GPU", draws, "{:,.0f}") for name, draws in result.by_placement.items())
    for name, draws, form in rows:
        table.add_row(name, *(form.format(value) for value in Quantiles.of(draws)))
    console().print(table)
    typical = result.typical()
    whole = sum(typical.values())
    spent = Table("where a step goes", "s", "%", title="mean over GPUs; sums to the P50 of the step")
    for name, seconds in typical.items():
        if seconds > 1e-6 * whole:
            spent.add_row(name.replace("_", " "), f"{seconds:,.4f}", f"{100 * seconds / whole:.1f}")
    console().print(spent)
    held = result.memory
    print(
        f"memory of the fullest GPU: {held.total / 1e9:.1f} of {held.available / 1e9:.0f} GB"
        f" (weights {held.weights / 1e9:.1f}, gradients {held.gradients / 1e9:.1f}, optimizer {held.optimizer / 1e9:.1f},"
        f" activations {held.activations / 1e9:.1f})"
    )
    if result.event_seconds is not None:
        print(f"event by event: {result.event_seconds:,.3f} s at the constants' point estimate, {result.events:,} events")
    for wait in result.waits[:3]:
        print(f"waiting: stage {wait.stage}, {wait.phase}: {wait.seconds:,.3f} s for GPU {wait.culprit}")
    for warning in result.warnings:
        print(f"warning: {warning}")
