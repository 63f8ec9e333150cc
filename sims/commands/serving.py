"""`serving`: continuous batching on a described cluster."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from research.routing_trace import RoutingTrace
from research.terminal import console
from sims.commands import app
from sims.commands.outputs import FigureOut, Outputs, Parquet, TraceOut, say
from sims.quantiles import Quantiles
from sims.serving import Serving, ServingResult, generation_ratio, serving, simulate_serving
from sims.serving.comparison import Comparison
from sims.serving.spec import model_mapping, overridden

FIELDS = ", ".join(field.name for field in fields(Serving) if field.name not in ("model", "lengths"))

OPTIONS = (
    "cluster",
    "nodes",
    "gpus_per_node",
    "tensor_parallel",
    "weight_bits",
    "kv_bits",
    "compute_bits",
    "rate",
    "clients",
    "requests",
    "max_batch",
    "routing",
    "seed",
)
"""Parameters of the command that are fields of the question, by the same name."""


@app.command(
    "serving",
    help=f"""Throughput, residents and latencies of continuous batching.

    Example: python -m sims serving --model deepseek-v2 --cluster h800 --weight-bits 8 --kv-bits 6
    / python -m sims serving --model deepseek-67b --rate 5 --requests 500 --json / python -m sims serving --ratio

    Fields for --set: {FIELDS}; lengths.kind, .prompt, .output, .prompt_sigma, .output_sigma, .maximum, .path; and the model's own,
    such as model.num_hidden_layers=30 or n_routed_experts=64 (model.moe.n_routed_experts).""",
)
def serving_command(
    model: Annotated[str, typer.Option(help="A preset (python -m research presets) or a YAML file of a model or run")] = "deepseek-v2",
    cluster: Annotated[str, typer.Option(help="h800, h100, h200, a100, b200, or a YAML file of your own")] = "h800",
    nodes: int = 1,
    gpus_per_node: int = 8,
    tensor_parallel: Annotated[int | None, typer.Option(help="GPUs that share a sequence; left out: what leaves most room for cache")] = None,
    weight_bits: Annotated[int, typer.Option(help="16, 8 or 4")] = 16,
    kv_bits: Annotated[int, typer.Option(help="16, 8, 6 or 4")] = 16,
    compute_bits: Annotated[int, typer.Option(help="Of matrix products: 16, or 8 at the FP8 peak")] = 16,
    lengths: Annotated[str, typer.Option(help="fixed, log-normal, or a CSV file with the columns prompt and output")] = "log-normal",
    prompt: Annotated[float, typer.Option(help="Mean prompt tokens")] = 1024,
    output: Annotated[float, typer.Option(help="Mean generated tokens")] = 512,
    rate: Annotated[float | None, typer.Option(help="Poisson arrivals per second; left out: saturation")] = None,
    clients: Annotated[int | None, typer.Option(help="So many clients with one request at a time (closed loop)")] = None,
    requests: Annotated[int | None, typer.Option(help="Simulated requests; left out: six times what is resident")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Sequences at a time; left out: what the cache holds")] = None,
    routing: Annotated[str, typer.Option(help="How tokens choose experts: a family of sims.routing")] = "random",
    trace: Annotated[Path | None, typer.Option(help="routing.npz of a trained model")] = None,
    seed: int = 0,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="field=value, such as lengths.maximum=8192; wins over the options")] = None,
    ratio: Annotated[bool, typer.Option("--ratio", help="The published 5.76 times of DeepSeek-V2 over DeepSeek 67B, predicted")] = False,
    parquet: Parquet = None,
    trace_out: TraceOut = None,
    figure: FigureOut = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables")] = False,
) -> None:
    if ratio:
        _print_ratio(generation_ratio(), as_json)
        return
    outputs = Outputs(parquet=parquet, trace_out=trace_out, figure=figure)
    spec, found = question_of(locals())
    result = simulate_serving(spec, found)
    written = outputs.write(result, spec)
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    _print(result)
    say(written)


def question_of(given: Mapping[str, Any]) -> tuple[Serving, RoutingTrace | None]:
    """The question of the command's parameters, by their names, and the trace to route by."""
    lengths = given["lengths"]
    kind: dict[str, Any] = {"kind": lengths} if lengths in ("fixed", "log-normal") else {"kind": "file", "path": lengths}
    mapping = {name: given[name] for name in OPTIONS} | {
        "model": model_mapping(given["model"]),
        "lengths": {**kind, "prompt": given["prompt"], "output": given["output"]},
    }
    spec = serving(overridden(mapping, given["overrides"] or [], Serving))
    return spec, RoutingTrace.load(given["trace"]) if given["trace"] is not None else None


def _of(value: Quantiles, scale: float = 1.0, digits: int = 0) -> str:
    return f"{value.p50 * scale:,.{digits}f} ({value.p10 * scale:,.{digits}f} to {value.p90 * scale:,.{digits}f})"


def _print(result: ServingResult) -> None:
    served, room = result.served, result.capacity
    title = f"{result.model} on {result.nodes} x {result.gpus_per_node} GPUs of {result.cluster}, tensor parallel {result.tensor_parallel}"
    table = Table("", "P50 (P10 to P90)", title=f"{title}, {result.replicas} replica{'s' if result.replicas > 1 else ''}")
    table.add_row("generated tokens/s", _of(served.generated_tokens_per_second))
    table.add_row("prompt tokens/s", _of(served.prompt_tokens_per_second))
    table.add_row("requests/s", _of(served.requests_per_second, digits=2))
    for name, title in (
        ("ttft_seconds", "time to first token"),
        ("time_per_output_token_seconds", "time per output token"),
        ("latency_seconds", "latency"),
    ):
        for share, value in getattr(served, name).items():
            table.add_row(f"{title}, {share} of requests, ms", _of(value, 1e3, 1))
    table.add_row("saturated, closed form, tokens/s", _of(result.saturated_tokens_per_second))
    table.add_row("generating alone, tokens/s", _of(result.decode_only_tokens_per_second))
    table.add_row("prompts alone, tokens/s", _of(result.prompt_only_tokens_per_second))
    console().print(table)
    points = Table("sequences", "step ms", "generated tokens/s", "generating alone", "bound by", "fits", title="Throughput over batch")
    for point in result.curve:
        cells = (_of(point.step_seconds, 1e3, 1), _of(point.generated_tokens_per_second), _of(point.decode_only_tokens_per_second))
        points.add_row(f"{point.batch:,.0f}", *cells, point.bound_by, "yes" if point.fits else "no")
    console().print(points)
    gains = sorted(result.elasticities.items(), key=lambda item: -item[1])
    print(f"{result.binds} binds (per cent of throughput for one per cent more: {', '.join(f'{name} {gain:.2f}' for name, gain in gains)})")
    print(
        f"residents {served.residents:,.1f} of {result.saturated_residents:,.1f} at saturation, limited by {result.residents_limited_by}; "
        f"KV cache {room.kv_bytes_per_token:,.0f} bytes per token, room for {room.tokens:,} tokens; weights {room.weights_bytes / 1e9:.1f} GB per GPU"
    )
    print(f"{served.requests:,} requests, {served.steps:,} steps, {served.preemptions:,} preemptions; rates are of {served.window}")
    if result.cost.split.ranks > 1:
        print(f"a rank waits {served.rank_waiting_share:.0%} of a step's own work for the slowest of them")
    for warning in result.warnings:
        print(f"warning: {warning}")


def _print_ratio(found: Comparison, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    table = Table(
        "FP8 means",
        "prompt, output",
        "(a) residents",
        "(b) step time",
        "ratio (a) x (b)",
        "ratio with prompts",
        "V2 tokens/s",
        "67B tokens/s",
        "V2 prompt tokens/s",
        title="Generation throughput of DeepSeek-V2 over DeepSeek 67B on one node: predicted, P50 (P10 to P90)",
    )
    for each in found.sensitivity:
        lengths = f"{each.lengths.prompt:.0f}, {each.lengths.output:.0f} {each.lengths.kind}"
        rates = (_of(each.ours.generated_tokens_per_second), _of(each.baseline.generated_tokens_per_second), _of(each.ours.prompt_tokens_per_second))
        ratios = (_of(each.step_ratio, digits=2), _of(each.ratio, digits=2), _of(each.ratio_with_prompts, digits=2))
        table.add_row(each.reading, lengths, f"{each.residents_ratio:.2f}", *ratios, *rates)
    console().print(table)
    at, ideal = found.at, found.ideal_cached_tokens
    print(f"Cached tokens beside one copy of the weights and nothing else: {ideal[0]:,.0f} and {ideal[1]:,.0f}, {ideal[0] / ideal[1]:.1f} times")
    print(
        f"Taken as the prediction: {at.reading}, prompts of {at.lengths.prompt:.0f} and outputs of {at.lengths.output:.0f} tokens ({at.lengths.kind})"
    )
    for name, value in found.published.items():
        print(f"published {name} {value:,.2f}, predicted {value * (1 + found.errors[name]):,.2f}: {found.errors[name]:+.1%}")
