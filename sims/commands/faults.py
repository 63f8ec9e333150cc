"""`faults`: slow GPUs and links, and lost nodes."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from research.configfile import validate
from research.routing_trace import RoutingTrace
from research.terminal import console
from sims.commands import app
from sims.commands.outputs import Outputs, Parquet, TraceOut, say
from sims.commands.question import Nic, Nvlink, factors
from sims.faults import (
    Goodput,
    GoodputResult,
    SlowLayers,
    SlowResult,
    SlowStepResult,
    Speeds,
    Wait,
    simulate_goodput,
    simulate_layers,
    slow_step,
)
from sims.faults.attribution import culprits
from sims.serving.spec import model_config, model_mapping, overridden
from sims.training.door import training_step_spec

faults_app = typer.Typer(no_args_is_help=True, add_completion=False, help="""Slow GPUs, degraded links, lost nodes: what they cost and who waits.

    Example: python -m sims faults waits --nodes 2 --slow 3=1.25 --nic 9=0.5 / python -m sims faults goodput --nodes 256""")  # fmt: skip
app.add_typer(faults_app, name="faults")

Overrides = Annotated[list[str] | None, typer.Option("--set", help="field=value; wins over the options")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of tables")]
ClusterName = Annotated[str, typer.Option(help="h800, h100, h200, a100, b200, or a YAML file of your own")]
Slow = Annotated[list[str] | None, typer.Option(help="GPU=factor: its computing takes so many times as long; may be repeated")]
SHOWN = 12


@faults_app.command("goodput", help=f"""Share of the time that is work, against the time between checkpoints.

    Example: python -m sims faults goodput --nodes 256 --model deepseek-v2 --spare-nodes 2

    Fields for --set: {", ".join(field.name for field in fields(Goodput))}.""")  # fmt: skip
def goodput_command(
    nodes: int = 128,
    model: Annotated[str, typer.Option(help="Preset whose weights and optimizer state a checkpoint holds")] = "deepseek-v2",
    node_mtbf_hours: Annotated[float | None, typer.Option(help="Between failures of one node; left out: Llama 3's")] = None,
    checkpoint_seconds: Annotated[float | None, typer.Option(help="Left out: bytes over the storage's bandwidth")] = None,
    stall_seconds: Annotated[float | None, typer.Option(help="That training stands still for one; left out: all of it")] = None,
    restart_seconds: Annotated[float | None, typer.Option(help="From a failure until training goes on")] = None,
    spare_nodes: Annotated[int | None, typer.Option(help="Left out: there is always one")] = None,
    interval: Annotated[list[float] | None, typer.Option(help="Seconds of work between checkpoints; may be repeated")] = None,
    seed: int = 0,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    mapping = {
        "nodes": nodes,
        "model": model,
        "node_mtbf_hours": node_mtbf_hours,
        "checkpoint_seconds": checkpoint_seconds,
        "stall_seconds": stall_seconds,
        "restart_seconds": restart_seconds,
        "spare_nodes": spare_nodes,
        "intervals": interval or [],
        "seed": seed,
    }
    result = simulate_goodput(validate(Goodput, overridden(mapping, overrides or [], Goodput, "faults goodput"), "faults goodput"))
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    _print_goodput(result)


@faults_app.command("waits", help=f"""Who waits for whom, on which link, in the MoE layers of a forward pass.

    Example: python -m sims faults waits --nodes 2 --slow 3=1.25 --nic 9=0.5

    Fields for --set: {", ".join(field.name for field in fields(SlowLayers))}; speeds.kind (normal, stragglers), .spread ...""")  # fmt: skip
def waits_command(
    model: Annotated[str, typer.Option(help="A preset with experts, or a YAML file of a model or run")] = "deepseek-v2",
    cluster: ClusterName = "h800",
    nodes: int = 1,
    gpus_per_node: int = 8,
    tokens_per_device: int = 4096,
    layers: int = 1,
    slow: Slow = None,
    nic: Nic = None,
    nvlink: Nvlink = None,
    trace: Annotated[Path | None, typer.Option(help="routing.npz of a trained model")] = None,
    seed: int = 0,
    overrides: Overrides = None,
    parquet: Parquet = None,
    trace_out: TraceOut = None,
    as_json: AsJson = False,
) -> None:
    outputs = Outputs(parquet=parquet, trace_out=trace_out)
    mapping = {
        "model": model_mapping(model, "faults waits"),
        "cluster": cluster,
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "tokens_per_device": tokens_per_device,
        "layers": layers,
        "speed": factors("--slow", slow),
        "nic": factors("--nic", nic),
        "nvlink": factors("--nvlink", nvlink),
        "seed": seed,
    }
    values = overridden(mapping, overrides or [], SlowLayers, "faults waits")
    spec = validate(SlowLayers, {**values, "model": model_config(values["model"], "faults waits")}, "faults waits")
    result = simulate_layers(spec, RoutingTrace.load(trace) if trace else None)
    written = outputs.write(result, spec)
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    _print_waits(result)
    say(written)


@faults_app.command("step", help="""A training step with slow GPUs or degraded links beside a healthy one, and who waits for whom.

    Example: python -m sims faults step --nodes 16 --slow 3=1.25 --nic 9=0.5 --set placement=spread

    --set takes the fields of training-step.""")  # fmt: skip
def step_command(
    model: Annotated[str, typer.Option(help="A preset, or a YAML file of a model or run")] = "deepseek-v2",
    cluster: ClusterName = "h800",
    nodes: int = 16,
    gpus_per_node: int = 8,
    batch_size: Annotated[int, typer.Option(help="Sequences of a step")] = 1152,
    slow: Slow = None,
    nic: Nic = None,
    nvlink: Nvlink = None,
    speeds: Annotated[str, typer.Option(help="Of all others: constant, normal or stragglers")] = "constant",
    spread: Annotated[float, typer.Option(help="Standard deviation of normal")] = 0.03,
    count: Annotated[int, typer.Option(help="Stragglers, drawn by the seed")] = 1,
    factor: Annotated[float, typer.Option(help="Times as long as others that a straggler takes")] = 1.25,
    trace: Annotated[Path | None, typer.Option(help="routing.npz of a trained model")] = None,
    seed: int = 0,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    drawn = validate(Speeds, {"kind": speeds, "spread": spread, "count": count, "factor": factor}, "faults step")
    mapping = {
        "model": model,
        "cluster": cluster,
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "batch_size": batch_size,
        "speed": factors("--slow", slow),
        "nic": factors("--nic", nic),
        "nvlink": factors("--nvlink", nvlink),
        "seed": seed,
    }
    result = slow_step(training_step_spec(mapping, overrides or []), drawn, RoutingTrace.load(trace) if trace else None)
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    _print_step(result)


def _print_step(result: SlowStepResult) -> None:
    whole, healthy, slowdown = result.seconds, result.healthy_seconds, result.slowdown
    print(f"{result.gpus} GPUs: a step of {whole.p50:.3f} s ({whole.p10:.3f} to {whole.p90:.3f}), healthy {healthy.p50:.3f}")
    print(f"slowdown {slowdown.p50:.3f} ({slowdown.p10:.3f} to {slowdown.p90:.3f})")
    table = Table("stage", "phase", "waits for", "on", "seconds of the average GPU", title="Within expert-parallel groups")
    for each in result.groups[:SHOWN]:
        table.add_row(str(each.stage), each.phase, f"GPU {each.culprit}", each.link, f"{each.seconds:.4f}")
    console().print(table)
    table = Table("waiter", "culprit", "link", "seconds", "times", title="Stages of the pipeline for each other")
    for wait in result.pipeline[:SHOWN]:
        table.add_row(*_cells(wait, f"{wait.seconds:.4f}"))
    console().print(table)
    for warning in result.warnings:
        print(f"warning: {warning}")


def _print_goodput(result: GoodputResult) -> None:
    table = Table(
        "seconds between checkpoints",
        "goodput P50 (P10 to P90)",
        "mean",
        "closed form",
        "checkpointing",
        "lost",
        "restarting",
        "waiting for a node",
        "failures",
        title=f"{result.nodes} nodes, a failure every {result.mtbf_hours:.2f} h, a checkpoint in {result.checkpoint_seconds:.1f} s",
    )
    for point in result.points:
        goodput = f"{point.goodput.p50:.4f} ({point.goodput.p10:.4f} to {point.goodput.p90:.4f})"
        shares = [f"{value:.2%}" for value in (point.checkpointing, point.lost, point.restarting, point.waiting)]
        closed = "" if point.closed_form is None else f"{point.closed_form:.4f}"
        mark = " *" if point.interval_seconds == result.best_seconds else ""
        table.add_row(f"{point.interval_seconds:,.0f}{mark}", goodput, f"{point.mean:.4f}", closed, *shares, f"{point.failures:.1f}")
    console().print(table)
    low, high = result.best_range_seconds
    print(f"best {result.best_seconds:,.0f} s; the runs do not tell {low:,.0f} to {high:,.0f} s apart")
    print(f"Young {result.young_seconds:,.0f} s, Daly {result.daly_seconds:,.0f} s")
    for warning in result.warnings:
        print(f"warning: {warning}")


def _print_waits(result: SlowResult) -> None:
    def micro(seconds: float) -> str:
        return f"{seconds * 1e6:,.0f} us"

    quantiles = f"{micro(result.seconds.p50)} ({micro(result.seconds.p10)} to {micro(result.seconds.p90)})"
    print(f"{result.model} on {result.gpus} GPUs of {result.cluster}: {quantiles}, healthy {micro(result.healthy_seconds.p50)}")
    slowdown = result.slowdown
    print(f"slowdown {slowdown.p50:.3f} ({slowdown.p10:.3f} to {slowdown.p90:.3f}); the average GPU waits {micro(result.waiting_seconds)}")
    table = Table("waits for", "on", "seconds of all others", title="Culprits")
    for gpu, link, seconds in culprits(result.waits)[:SHOWN]:
        table.add_row(f"GPU {gpu}", link, micro(seconds))
    console().print(table)
    table = Table("waiter", "culprit", "link", "waits", "times", title=f"Longest waits ({min(SHOWN, len(result.waits))} of {len(result.waits)})")
    for wait in result.waits[:SHOWN]:
        table.add_row(*_cells(wait, micro(wait.seconds)))
    console().print(table)
    for warning in result.warnings:
        print(f"warning: {warning}")


def _cells(wait: Wait, seconds: str) -> tuple[str, ...]:
    return f"GPU {wait.waiter}", f"GPU {wait.culprit}", wait.link, seconds, str(wait.times)
