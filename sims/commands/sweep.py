"""`sweep`: the same question over M, K, nodes and whatever else."""

import csv
import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from rich.progress import track
from rich.table import Table

from research.atomic import write_text
from research.configfile import validate
from research.errors import ConfigError
from research.routing_trace import RoutingTrace
from research.terminal import console
from sims.all_to_all import DEVICES, AllToAll
from sims.commands import app, question
from sims.commands.all_to_all import microseconds
from sims.commands.outputs import FigureOut, Outputs, say
from sims.commands.question import AsJson, Overrides, Trace
from sims.formulas import FORMULAS
from sims.outputs.files import check_target
from sims.result import Result
from sims.routing import reroute
from sims.simulation import simulate

LIMITS = "device_limit"
SHOWN = (LIMITS, "num_experts_per_tok", "nodes")
"""What the figure has axes for."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One point: the fields that were varied, and its answer."""

    point: dict[str, Any]
    result: Result

    def row(self) -> dict[str, Any]:
        """Flat values for a table: the point, times with their quantiles, bytes, the baselines."""
        found = self.result
        times = {
            f"{name}_seconds_{q}": value
            for name, time in (("dispatch", found.dispatch_seconds), ("combine", found.combine_seconds), ("notify", found.dispatch.notify_seconds))
            for q, value in asdict(time).items()
        }
        theirs = {f"{name}_{key}": value for name, formula in found.formulas.items() for key, value in formula.items()}
        return self.point | times | {
            "binds": found.dispatch.binds, "nvlink_bytes": found.nvlink_bytes, "infiniband_bytes": found.infiniband_bytes,
            "distinct_devices_per_token": found.distinct_devices_per_token, "distinct_nodes_per_token": found.distinct_nodes_per_token,
            "expert_load_violation": found.expert_load_violation,
        } | theirs  # fmt: skip


def values(text: str, field: str) -> list[Any]:
    """`1,2,4`, `1-8`, `1-8:2` (steps of 2) or `null` among them; ConfigError with the field and the text."""
    found: list[Any] = []
    for part in text.split(","):
        bounds, _, step = part.partition(":")
        low, dash, high = bounds.strip().partition("-")
        try:
            if dash and low.isdigit():
                found += list(range(int(low), int(high) + 1, int(step or 1)))
            else:
                found.append(yaml.safe_load(part) if part.strip() else part)
        except (ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"{field} = {text!r}: expected values such as 1,2,4 or 1-8 or 512-4096:512, with null for no limit") from error
    if not found or any((isinstance(value, str) and not value.strip()) or (value is not None and type(value) not in (int, str)) for value in found):
        raise ConfigError(f"{field} = {text!r}: expected values such as 1,2,4 or 1-8 or 512-4096:512, with null for no limit")
    return list(dict.fromkeys(found))


def grid(spec: AllToAll, axes: dict[str, list[Any]], trace: RoutingTrace | None = None) -> tuple[list[dict[str, Any]], list[AllToAll], int]:
    """The points that can be routed, their specs, and how many cannot (M devices do not hold K experts).

    Every other impossible value is a ConfigError that names it.
    """
    points: list[dict[str, Any]] = []
    specs: list[AllToAll] = []
    impossible, base = 0, asdict(spec)
    for combination in itertools.product(*axes.values()):
        point = dict(zip(axes, combination, strict=True))
        if _too_few(spec, point):
            impossible += 1
            continue
        varied = point if trace is None else {name: value for name, value in point.items() if name != LIMITS}
        specs.append(validate(AllToAll, base | varied, f"sweep at {', '.join(f'{name} = {value}' for name, value in point.items())}"))
        points.append(point)
    return points, specs, impossible


def _too_few(spec: AllToAll, point: dict[str, Any]) -> bool:
    """Whether the M devices of a point hold fewer experts than its K, both being possible by themselves."""
    limit, chosen = point.get(LIMITS, spec.device_limit), point.get("num_experts_per_tok", spec.num_experts_per_tok)
    devices, experts = spec.expert_devices or DEVICES, spec.n_routed_experts
    if type(limit) is not int or type(chosen) is not int or not 1 <= limit <= devices:
        return False
    return limit * (experts // devices) < chosen <= experts


def cells(spec: AllToAll, axes: dict[str, list[Any]], trace: RoutingTrace | None = None, *, progress: bool = False) -> Iterator[Cell]:
    """The answers in the order of the axes, the last running fastest."""
    points, specs, _ = grid(spec, axes, trace)
    for point, one in track(list(zip(points, specs, strict=True)), "all-to-all", disable=not progress, transient=True):
        routed = reroute(trace, point[LIMITS]) if trace is not None and LIMITS in point else trace
        yield Cell(point, simulate(one, routed))


@app.command()
def sweep(
    cluster: question.Cluster = None,
    nodes: Annotated[str | None, typer.Option(help="Such as 1,2,4 or 1-8 (2)")] = None,
    gpus_per_node: question.GpusPerNode = None,
    device_limit: Annotated[str | None, typer.Option("--device-limit", "-m", help="M, such as 1-8,null (every M, and unrestricted)")] = None,
    top_k: Annotated[str | None, typer.Option("--top-k", "-k", "--num-experts-per-tok", help="K, such as 4-8 (the model's)")] = None,
    tokens_per_device: Annotated[str | None, typer.Option("--tokens-per-device", "--tokens", help="Such as 512,1024,4096 (4096)")] = None,
    hidden_size: Annotated[str | None, typer.Option("--hidden-size", "--hidden", help="Such as 2048-7168:1024 (5120)")] = None,
    sms: Annotated[str | None, typer.Option(help="Such as 12-32:4 (the cluster's)")] = None,
    node_limit: Annotated[str | None, typer.Option("--node-limit", help="Such as 1-4,null")] = None,
    routing: Annotated[str | None, typer.Option(help="Such as random,gaussian")] = None,
    model: question.Model = None,
    experts: question.Experts = None,
    expert_devices: question.ExpertDevices = None,
    expert_parallel: question.ExpertParallel = None,
    placement: question.PlacementOption = None,
    dispatch_bits: question.DispatchBits = None,
    combine_bits: question.CombineBits = None,
    seed: question.Seed = None,
    trace: Trace = None,
    overrides: Overrides = None,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="Write the points, with the formulas of other tools, as a table")] = None,
    figure: FigureOut = None,
    as_json: AsJson = False,
) -> None:
    """The same tokens under every M, K, number of nodes, ...  Example: python -m sims sweep --nodes 1,2,4 --top-k 4,6,8 --device-limit 1-8,null

    Each option takes a list or a range; points where M devices do not hold K experts are left out and counted.
    """
    fixed = {
        "cluster": cluster, "gpus_per_node": gpus_per_node, "n_routed_experts": experts, "expert_devices": expert_devices,
        "expert_parallel": expert_parallel, "dispatch_bits": dispatch_bits, "combine_bits": combine_bits, "seed": seed,
    }  # fmt: skip
    swept = {
        "nodes": nodes, "num_experts_per_tok": top_k, "tokens_per_device": tokens_per_device, "hidden_size": hidden_size, "sms": sms,
        "node_limit": node_limit, "routing": routing, LIMITS: device_limit,
    }  # fmt: skip
    if trace is not None and top_k is not None:
        raise ConfigError(f"--top-k {top_k}: comes from the trace {trace} of a trained model; leave it out")
    if csv_path is not None:
        check_target(csv_path, "--csv")  # Before the work, as the other outputs.
    outputs = Outputs(figure=figure)
    axes = {name: values(text, name) for name, text in swept.items() if text is not None}
    if figure is not None and (others := [name for name in axes if name not in SHOWN and len(axes[name]) > 1]):
        raise ConfigError(f"--figure {figure}: shows M x K x nodes; give one value of {', '.join(others)}")
    # The question that is varied must itself be one: what depends on nodes and K is checked at the first of them.
    first = {name: axes[name][0] for name in ("nodes", "num_experts_per_tok") if name in axes}
    spec, _ = question.question({"nodes": 2} | fixed | first, model, placement, overrides)
    said = {question.field_of(override.partition("=")[0]) for override in overrides or []}
    if twice := sorted(said & set(axes)):
        raise ConfigError(f"--set {twice[0]}: the option of that name varies it; leave one of the two out")
    spec, found = question.routed(spec, trace, said | {name for name, value in fixed.items() if value is not None}, model)
    if "nodes" not in axes and "nodes" not in said:
        axes = {"nodes": [2]} | axes
    if LIMITS not in axes and LIMITS not in said:
        spec = replace(spec, expert_devices=spec.routing_devices)
        axes[LIMITS] = [*range(1, spec.routing_devices + 1), None]
    left_out = grid(spec, axes, found)[2]
    if int(np.prod([len(axis) for axis in axes.values()])) == left_out:
        raise ConfigError(f"sweep: no point can be routed: {LIMITS} = {axes.get(LIMITS)} devices hold too few experts for K")
    answers = list(cells(spec, axes, found, progress=not as_json and console().is_terminal))
    if csv_path is not None:
        write_csv(csv_path, answers)
    written = outputs.write([cell.result for cell in answers], {"spec": asdict(spec), "over": axes}, spec.seed)
    if as_json:
        print(json.dumps([cell.result.to_dict() | {"point": cell.point} for cell in answers]))
        return
    _print(answers, left_out)
    say(written)


def write_csv(path: Path, answers: list[Cell]) -> None:
    """A row for each point, atomically."""
    text = io.StringIO()
    rows = [cell.row() for cell in answers]
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _print(answers: list[Cell], left_out: int) -> None:
    names = {"device_limit": "M", "num_experts_per_tok": "K"}
    table = Table(*(names.get(name, name) for name in answers[0].point), "GPUs/token", "nodes/token", "dispatch P50 (P10 to P90)", "combine",
                  "binds", "NVLink MB", "InfiniBand MB", *(f"{name}, both us" for name in FORMULAS), title=answers[0].result.cluster)  # fmt: skip
    for cell in answers:
        found = cell.result
        table.add_row(
            *("unrestricted" if value is None else str(value) for value in cell.point.values()),
            f"{found.distinct_devices_per_token:.3f}",
            f"{found.distinct_nodes_per_token:.3f}",
            microseconds(found.dispatch_seconds),
            microseconds(found.combine_seconds),
            found.dispatch.binds,
            f"{found.nvlink_bytes / 1e6:,.1f}",
            f"{found.infiniband_bytes / 1e6:,.1f}",
            *(f"{sum(found.formulas[name].values()) * 1e6:,.0f}" for name in FORMULAS),
        )
    console().print(table)
    if left_out:
        print(f"{left_out} points left out: M devices do not hold K experts there")
    for warning in dict.fromkeys(w for cell in answers for w in cell.result.warnings):
        print(f"note: {warning}")
