"""`all-to-all`, `sweep` and `clusters`."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from research.configfile import apply_overrides, validate
from research.errors import ConfigError
from research.routing_trace import RoutingTrace
from research.terminal import console
from sims.all_to_all import AllToAll, simulate
from sims.cluster import cluster_names, figures, load_cluster
from sims.commands import app
from sims.result import Result
from sims.routing import reroute

Overrides = Annotated[list[str] | None, typer.Option("--set", help="field=value of the question, such as device_limit=2; see --help of all-to-all")]
Trace = Annotated[Path | None, typer.Option(help="routing.npz of a trained model; without it random logits are routed")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of a table")]
ClusterOption = Annotated[str, typer.Option(help="h800, h100, h200, a100, or a YAML file of your own")]


@app.command("all-to-all")
def all_to_all(
    cluster: ClusterOption = "h800",
    nodes: int = 1,
    gpus_per_node: int = 8,
    trace: Trace = None,
    overrides: Overrides = None,
    formula: Annotated[bool, typer.Option(help="Show the formulas of other tools beside ours")] = False,
    as_json: AsJson = False,
) -> None:
    """Dispatch and combine of one MoE layer.  Example: python -m sims all-to-all --nodes 2 --gpus-per-node 4 --set device_limit=3 --formula

    Fields for --set: tokens_per_device, hidden_size, n_routed_experts, num_experts_per_tok, expert_devices,
    device_limit, dispatch_bits, combine_bits, seed.
    """
    spec = _spec(cluster, nodes, gpus_per_node, overrides)
    result = simulate(spec, _routing(spec, trace, overrides))
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    table = Table(
        "",
        "seconds",
        "binds",
        "straggler",
        "mean wait",
        "NVLink bytes",
        "InfiniBand bytes",
        title=f"{result.cluster}, {nodes} x {gpus_per_node} GPUs",
    )
    for name, phase in (("dispatch", result.dispatch), ("combine", result.combine)):
        cells = (f"{phase.seconds * 1e6:,.0f} us", phase.binds, f"GPU {phase.straggler}", f"{phase.waiting_seconds * 1e6:,.0f} us")
        table.add_row(name, *cells, f"{phase.nvlink_bytes:,}", f"{phase.infiniband_bytes:,}")
    if formula:
        for name, seconds in result.formulas.items():
            table.add_row(f"both, {name}", f"{seconds * 1e6:,.0f} us", "(formula of other tools)")
    console().print(table)
    print(f"{result.distinct_devices_per_token:.3f} distinct devices and {result.distinct_nodes_per_token:.3f} nodes per token; bytes are physical")


@app.command()
def sweep(
    cluster: ClusterOption = "h800",
    nodes: int = 2,
    gpus_per_node: int = 4,
    trace: Trace = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """The same tokens under every device limit M.  Example: python -m sims sweep --nodes 2 --gpus-per-node 4"""
    spec = _spec(cluster, nodes, gpus_per_node, overrides)
    given = _trace(trace)
    devices = given.expert_devices if given else spec.expert_devices
    results: list[Result] = []
    for limit in [*range(1, devices + 1), None]:
        if given is not None:
            if limit is None or limit * (given.n_routed_experts // devices) >= given.num_experts_per_tok:
                results.append(simulate(spec, reroute(given, limit)))
        elif limit is None or limit * (spec.n_routed_experts // devices) >= spec.num_experts_per_tok:
            results.append(simulate(replace(spec, device_limit=limit)))
    if as_json:
        print(json.dumps([result.to_dict() for result in results]))
        return
    table = Table(
        "M",
        "devices/token",
        "dispatch us",
        "combine us",
        "binds",
        "NVLink bytes",
        "InfiniBand bytes",
        title=results[0].cluster,
    )
    for result in results:
        table.add_row(
            str(result.device_limit or "unrestricted"),
            f"{result.distinct_devices_per_token:.3f}",
            f"{result.dispatch.seconds * 1e6:,.0f}",
            f"{result.combine.seconds * 1e6:,.0f}",
            result.dispatch.binds,
            f"{result.dispatch.nvlink_bytes + result.combine.nvlink_bytes:,}",
            f"{result.dispatch.infiniband_bytes + result.combine.infiniband_bytes:,}",
        )
    console().print(table)


@app.command()
def clusters(name: Annotated[str | None, typer.Argument(help="One preset or file; all presets if left out")] = None, as_json: AsJson = False) -> None:
    """Hardware figures with unit, basis and source.  Example: python -m sims clusters h800"""
    loaded = {key: load_cluster(key) for key in ([name] if name else cluster_names())}
    if as_json:
        print(json.dumps({key: asdict(value) for key, value in loaded.items()}, indent=1))
        return
    for key, cluster in loaded.items():
        table = Table("figure", "value", "unit", "basis", "source", title=f"{key}: {cluster.name}")
        for figure_name, figure in figures(cluster).items():
            table.add_row(figure_name, f"{figure.value:g}", figure.unit, figure.basis, figure.source)
        console().print(table)


def _spec(cluster: str, nodes: int, gpus_per_node: int, overrides: list[str] | None) -> AllToAll:
    mapping = {"cluster": cluster, "nodes": nodes, "gpus_per_node": gpus_per_node}
    return validate(AllToAll, apply_overrides(mapping, overrides or []), "all-to-all")


FROM_TRACE = ("n_routed_experts", "num_experts_per_tok", "expert_devices", "seed")


def _routing(spec: AllToAll, path: Path | None, overrides: list[str] | None) -> RoutingTrace | None:
    """The trace, re-routed where a device limit was asked for; ConfigError for what only the trained model can say."""
    trace, asked = _trace(path), {override.partition("=")[0].strip() for override in overrides or []}
    if trace is None:
        return None
    if fixed := sorted(asked & set(FROM_TRACE)):
        raise ConfigError(*(f"--set {name}: comes from the trace {path} of a trained model; leave it out" for name in fixed))
    if "device_limit" not in asked:
        return trace
    limit, devices, chosen = spec.device_limit, trace.expert_devices, trace.num_experts_per_tok
    if limit is not None and (limit > devices or limit * (trace.n_routed_experts // devices) < chosen):
        least = -(-chosen * devices // trace.n_routed_experts)
        raise ConfigError(
            f"--set device_limit={limit}: the trace {path} has {chosen} experts per token on {devices} devices; valid: {least} to {devices}, or null"
        )
    return reroute(trace, limit)


def _trace(path: Path | None) -> RoutingTrace | None:
    return RoutingTrace.load(path) if path is not None else None
