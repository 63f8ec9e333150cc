"""`all-to-all` and `clusters`."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from research.routing_trace import RoutingTrace
from research.terminal import console
from sims.all_to_all import AllToAll
from sims.cluster import cluster_names, figures, load_cluster
from sims.commands import app, question
from sims.commands.outputs import FigureOut, Heatmap, Outputs, Parquet, TraceOut, say
from sims.commands.question import AsJson, Overrides, Trace
from sims.formulas import FORMULAS
from sims.quantiles import Quantiles
from sims.result import Result
from sims.simulation import simulate

OPTIONS = (
    "cluster",
    "nodes",
    "gpus_per_node",
    "expert_parallel",
    "tokens_per_device",
    "hidden_size",
    "device_limit",
    "expert_devices",
    "node_limit",
    "node_score",
    "dispatch_bits",
    "combine_bits",
    "sms",
    "routing",
    "dedup",
    "network",
    "oversubscription",
    "seed",
)
"""Parameters of the command that are fields of the question, by the same name."""


@app.command("all-to-all")
def all_to_all(
    cluster: question.Cluster = None,
    nodes: Annotated[int | None, typer.Option(help="1 to 512 (1)")] = None,
    gpus_per_node: question.GpusPerNode = None,
    expert_parallel: question.ExpertParallel = None,
    placement: question.PlacementOption = None,
    tokens_per_device: Annotated[int | None, typer.Option("--tokens-per-device", "--tokens", help="Tokens of each GPU (4096)")] = None,
    model: question.Model = None,
    hidden_size: Annotated[int | None, typer.Option("--hidden-size", "--hidden", help="Elements of a token (5120)")] = None,
    experts: question.Experts = None,
    top_k: Annotated[int | None, typer.Option("--top-k", "-k", "--num-experts-per-tok", help="K: routed experts of a token (6)")] = None,
    device_limit: Annotated[int | None, typer.Option("--device-limit", "-m", help="M: of the D devices (unrestricted)")] = None,
    expert_devices: question.ExpertDevices = None,
    node_limit: question.NodeLimit = None,
    node_score: question.NodeScore = None,
    dispatch_bits: question.DispatchBits = None,
    combine_bits: question.CombineBits = None,
    sms: Annotated[int | None, typer.Option(help="SMs that communicate (the cluster's)")] = None,
    routing: question.Routing = None,
    trace: Trace = None,
    dedup: question.Dedup = None,
    network: question.Network = None,
    oversubscription: question.Oversubscription = None,
    nic: question.Nic = None,
    nvlink: question.Nvlink = None,
    seed: question.Seed = None,
    overrides: Overrides = None,
    formula: Annotated[bool, typer.Option(help="Show the formulas of other tools beside ours")] = False,
    parquet: Parquet = None,
    trace_out: TraceOut = None,
    heatmap: Heatmap = None,
    figure: FigureOut = None,
    as_json: AsJson = False,
) -> None:
    """Dispatch and combine of one MoE layer.  Example: python -m sims all-to-all --nodes 2 --model deepseek-v2 --device-limit 2 --formula

    Times are P10, P50 and P90 of isolated transmit time with its latency; notify, the exchange of counts, stands beside them.
    Every option is also a field for --set (n_routed_experts, num_experts_per_tok, ... as in a model's configuration); --set nic.3=0.5 degrades
    a link, --set constants.nic_efficiency=0.9 holds a calibrated constant (python -m sims calibrate --dry-run lists them) at a value.
    """
    outputs = Outputs(parquet=parquet, trace_out=trace_out, heatmap=heatmap, figure=figure)
    spec, found = question_of(locals())
    result: Result = simulate(spec, found)
    written = outputs.write(result, spec)
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    _print(result, formula=formula)
    say(written)


def question_of(given: Mapping[str, Any]) -> tuple[AllToAll, RoutingTrace | None]:
    """The question of the command's parameters, by their names, and the trace to route by."""
    options = {name: given[name] for name in OPTIONS} | {"n_routed_experts": given["experts"], "num_experts_per_tok": given["top_k"]}
    options |= {name: question.factors(f"--{name}", given[name]) or None for name in ("nic", "nvlink")}
    spec, asked = question.question(options, given["model"], given["placement"], given["overrides"])
    return question.routed(spec, given["trace"], asked, given["model"])


def microseconds(time: Quantiles) -> str:
    """P50 and, in brackets, P10 to P90."""
    p10, p50, p90 = (f"{value * 1e6:,.0f}" for value in time)
    return f"{p50} us ({p10} to {p90})"


def _print(result: Result, *, formula: bool) -> None:
    table = Table("", "P50 (P10 to P90)", "binds", "straggler", "mean wait", "NVLink MB", "logical", "InfiniBand MB", "logical",
                  "NVLink GB/s", "logical", "InfiniBand GB/s", "logical",
                  title=f"{result.cluster}: {result.groups} x {result.expert_parallel} GPUs, {result.sms:g} SMs")  # fmt: skip
    table.add_row("notify", microseconds(result.dispatch.notify_seconds))
    for name in ("dispatch", "combine", "backward_combine", "backward_dispatch"):
        found = getattr(result, name)
        cells = (microseconds(found.seconds), found.binds, f"GPU {found.straggler}", f"{found.waiting_seconds * 1e6:,.0f} us")
        moved = (found.nvlink_bytes, found.nvlink_logical_bytes, found.infiniband_bytes, found.infiniband_logical_bytes)
        rates = (found.gigabytes_per_second[key] for key in ("nvlink_physical", "nvlink_logical", "infiniband_physical", "infiniband_logical"))
        table.add_row(
            name.replace("backward_", "backward of "), *cells, *(f"{value / 1e6:,.1f}" for value in moved), *(f"{rate:.1f}" for rate in rates)
        )
    console().print(table)
    if formula:
        theirs = Table("formula", "dispatch us", "combine us", "what it counts", title="other tools' formulas on the same figures")
        for name, seconds in result.formulas.items():
            theirs.add_row(name, *(f"{seconds[f'{direction}_seconds'] * 1e6:,.0f}" for direction in ("dispatch", "combine")), FORMULAS[name])
        console().print(theirs)
    print(
        f"{result.distinct_devices_per_token:.3f} GPUs, {result.distinct_nodes_per_token:.3f} nodes and "
        f"{result.distinct_routing_devices_per_token:.3f} of the model's devices per token; the busiest GPU has "
        f"{1 + result.expert_load_violation:.2f} times the mean load; GB/s are per GPU, logical ones count the own GPU or node"
    )
    for warning in result.warnings:
        print(f"note: {warning}")


@app.command()
def clusters(name: Annotated[str | None, typer.Argument(help="One preset or file; all presets if left out")] = None, as_json: AsJson = False) -> None:
    """Hardware figures with unit, basis and source.  Example: python -m sims clusters h800"""
    loaded = {key: load_cluster(Path(key) if "/" in key else key) for key in ([name] if name else cluster_names())}
    if as_json:
        print(json.dumps({key: asdict(value) for key, value in loaded.items()}, indent=1))
        return
    for key, cluster in loaded.items():
        table = Table("figure", "value", "unit", "basis", "source", "read", title=f"{key}: {cluster.name}, network {cluster.network}")
        for figure_name, figure in figures(cluster).items():
            table.add_row(figure_name, f"{figure.value:g}", figure.unit, figure.basis, figure.source, figure.date)
        console().print(table)
