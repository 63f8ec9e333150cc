"""The cluster model's answer for the page: M x K x nodes, routed as the trained models route."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from research.errors import UserError
from research.routing_trace import RoutingTrace, select_experts

NODES = (1, 2, 4, 8)
MOST_LIMITS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Seconds of dispatch and combine of one layer over device limits; `trained`: a model was trained with this K, else re-routed."""

    nodes: int
    chosen: int
    trained: bool
    limits: tuple[int, ...]
    seconds: tuple[float, ...]


def seconds(cluster: dict[str, Any], nodes: int, trace: RoutingTrace, device_limit: int | None) -> float:
    """Dispatch and combine of one layer under a device limit (None: unrestricted).  The one place that asks `sims`.

    UserError or ValueError if the experts do not fit on the GPUs.
    """
    from sims import AllToAll, reroute, simulate  # noqa: PLC0415  (simpy, which only a built page needs)

    spec = AllToAll(
        cluster=str(cluster.get("file", "h800")),
        nodes=nodes,
        gpus_per_node=int(cluster["gpus_per_node"]),
        tokens_per_device=int(cluster["tokens_per_device"]),
        hidden_size=int(cluster["hidden_size"]),
        n_routed_experts=trace.n_routed_experts,
        num_experts_per_tok=trace.num_experts_per_tok,
        expert_devices=trace.expert_devices,
        device_limit=device_limit,
        dispatch_bits=int(cluster.get("dispatch_bits", 16)),
        combine_bits=int(cluster.get("combine_bits", 16)),
    )
    return float(simulate(spec, reroute(trace, device_limit)).seconds)


def curves(cluster: dict[str, Any], traces: Sequence[RoutingTrace]) -> list[Curve]:
    """One curve per number of nodes that the experts divide over and per K; the first trace (the baseline's) gives untrained K too.

    Of several traces with the same K the first is taken.
    """
    by_chosen: dict[int, tuple[RoutingTrace, bool]] = {}
    for trace in traces:
        by_chosen.setdefault(trace.num_experts_per_tok, (trace, True))
    first = traces[0]
    if len(by_chosen) == 1:
        for chosen in (first.num_experts_per_tok // 2, first.num_experts_per_tok * 2):
            if 1 <= chosen <= first.n_routed_experts // 2:
                by_chosen.setdefault(chosen, (_with_chosen(first, chosen), False))
    found = []
    for nodes in sorted({*NODES, int(cluster["nodes"])}):
        for chosen, (trace, trained) in sorted(by_chosen.items()):
            curve = _curve(cluster, nodes, chosen, trace, trained=trained)
            if curve is not None:
                found.append(curve)
    return found


def _curve(cluster: dict[str, Any], nodes: int, chosen: int, trace: RoutingTrace, *, trained: bool) -> Curve | None:
    """None where the experts cannot be spread over so many nodes."""
    fewest = -(-chosen // (trace.n_routed_experts // trace.expert_devices))
    steps = np.unique(np.linspace(fewest, trace.expert_devices, min(MOST_LIMITS, trace.expert_devices - fewest + 1)).round().astype(int))
    limits = tuple(int(m) for m in steps)
    try:
        values = tuple(seconds(cluster, nodes, trace, limit) for limit in limits)
    except (UserError, ValueError):
        return None
    return Curve(nodes=nodes, chosen=chosen, trained=trained, limits=limits, seconds=values)


def _with_chosen(trace: RoutingTrace, chosen: int) -> RoutingTrace:
    ids = select_experts(trace.scores, chosen, trace.expert_devices, None)
    return replace(trace, expert_ids=ids[None].astype(np.int16), steps=trace.steps[-1:], device_limit=None)


def bytes_that_leave(trace: RoutingTrace, workers: int, hidden_size: int, precision: str) -> float:
    """Bytes of a token that one dispatch in every layer sends to other workers, as the trace's text is routed at the end: by the function
    that predicts the bytes of a run on real workers.  ValueError if the workers do not divide the trace's tokens."""
    from sims.measured import ITEM_BYTES, predicted_traffic  # noqa: PLC0415  (as above)

    ids = trace.expert_ids[-1]
    _, tokens, chosen = ids.shape
    if tokens % workers:
        raise ValueError(f"{tokens} tokens of the trace: must be a multiple of {workers} workers")
    width = hidden_size * ITEM_BYTES[precision]
    found = [predicted_traffic(layer.reshape(workers, tokens // workers, chosen), workers, trace.n_routed_experts, width).logical for layer in ids]
    return float(sum(matrix.sum() - matrix.trace() for matrix in found)) / tokens
