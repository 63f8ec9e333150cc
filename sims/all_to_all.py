"""One MoE layer's all-to-all over a described cluster.

Time has two tiers that must agree: `closed_form` (the largest stream of any GPU) and `event_driven`
(SimPy: a process per GPU, an event per stream).  The event-driven tier is where contention and faults
will come in; with one collective alone it equals the closed form, and a test holds it to that.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import simpy

from research.errors import ConfigError
from research.routing_trace import RoutingTrace
from sims.cluster import Cluster, load_cluster
from sims.collective import collective_seconds, streams
from sims.formulas import formulas
from sims.result import Phase, Result
from sims.routing import synthetic_trace
from sims.simulation import simulate
from sims.traffic import Traffic, dispatch, needed_devices, payload_bytes

__all__ = ["AllToAll", "collective_seconds", "simulate", "streams"]

STREAMS = ("nic out", "nic in", "nvlink out", "nvlink in", "sm")


@dataclass(frozen=True, kw_only=True, slots=True)
class AllToAll:
    """The question: this much work, on these nodes.  Without a trace the routing is random logits."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    cluster: str = "h800"
    nodes: int = 1
    gpus_per_node: int = 8
    tokens_per_device: int = 4096
    hidden_size: int = 5120
    n_routed_experts: int = 160
    num_experts_per_tok: int = 6
    expert_devices: int = 8
    device_limit: int | None = 3
    dispatch_bits: int = 16
    combine_bits: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "tokens_per_device", "hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
        for name in ("dispatch_bits", "combine_bits"):
            if getattr(self, name) not in (8, 16):
                raise ValueError(f"{name}={getattr(self, name)} must be 8 (with scales) or 16")
        experts, devices, chosen, limit = self.n_routed_experts, self.expert_devices, self.num_experts_per_tok, self.device_limit
        if min(experts, devices, chosen) < 1 or experts % devices:
            raise ValueError(f"expert_devices={devices} must divide n_routed_experts={experts}, and num_experts_per_tok={chosen} be >= 1")
        if limit is not None and not 1 <= limit <= devices:
            raise ValueError(f"device_limit={limit} must lie in 1..{devices} (expert_devices), or be null for unrestricted")
        if chosen > (limit or devices) * (experts // devices):
            raise ValueError(
                f"num_experts_per_tok={chosen} does not fit on device_limit={limit} of {devices} devices of {experts // devices} experts"
            )
        gpus = self.nodes * self.gpus_per_node
        if self.n_routed_experts % gpus:
            raise ValueError(
                f"nodes={self.nodes} x gpus_per_node={self.gpus_per_node} = {gpus} GPUs must divide n_routed_experts={self.n_routed_experts}"
            )


@simulate.register
def _(spec: AllToAll, trace: RoutingTrace | None = None) -> Result:
    """Seconds, bytes and straggler; each of the nodes x gpus_per_node GPUs holds an equal run of the experts.

    All layers of the trace's last snapshot are dealt round-robin over the GPUs, as often as it takes to
    give each `tokens_per_device` tokens.  ConfigError if the trace's experts do not fit on the GPUs.
    """
    cluster = load_cluster(spec.cluster)
    if spec.gpus_per_node > cluster.gpus_per_node.value:
        raise ConfigError(f"gpus_per_node = {spec.gpus_per_node}: a node of {cluster.name} has {cluster.gpus_per_node.value:.0f}")
    trace = trace if trace is not None else _synthetic(spec)
    gpus = spec.nodes * spec.gpus_per_node
    if trace.n_routed_experts % gpus:
        raise ConfigError(
            f"{trace.n_routed_experts} experts cannot be spread evenly over nodes = {spec.nodes} x gpus_per_node = {spec.gpus_per_node} GPUs"
        )
    ids = trace.expert_ids[-1].reshape(-1, trace.num_experts_per_tok)
    tokens = np.arange(gpus * spec.tokens_per_device)
    # A prime stride walks through all layers and domains, so that every GPU sees the same kind of text.
    needed = needed_devices(ids, trace.n_routed_experts, gpus)[tokens // gpus * 7919 % len(ids)]
    source = tokens % gpus
    down, up = payload_bytes(spec.hidden_size, spec.dispatch_bits), payload_bytes(spec.hidden_size, spec.combine_bits)
    there = dispatch(needed, source, spec.gpus_per_node, down)
    back = there.reverse(up, of=down)
    load = needed.sum(0)
    return Result(
        cluster=cluster.name,
        nodes=spec.nodes,
        gpus_per_node=spec.gpus_per_node,
        device_limit=trace.device_limit,
        num_experts_per_tok=trace.num_experts_per_tok,
        dispatch=phase(there, cluster, spec.nodes, notify=True),
        combine=phase(back, cluster, spec.nodes, notify=False),
        distinct_devices_per_token=float(needed.sum(1).mean()),
        distinct_nodes_per_token=float(needed.reshape(len(needed), spec.nodes, -1).any(2).sum(1).mean()),
        expert_load_violation=float(load.max() / load.mean() - 1),
        nvlink_matrix=there.nvlink + back.nvlink,
        infiniband_matrix=there.infiniband + back.infiniband,
        formulas=formulas(
            cluster,
            nodes=spec.nodes,
            gpus_per_node=spec.gpus_per_node,
            tokens=spec.tokens_per_device,
            chosen=trace.num_experts_per_tok,
            dispatch_bytes=down,
            combine_bytes=up,
        ),
    )


def phase(traffic: Traffic, cluster: Cluster, nodes: int, *, notify: bool) -> Phase:
    """One direction in time, by the event-driven tier."""
    streams = stream_seconds(traffic, cluster)
    fixed = _fixed_seconds(traffic, cluster, nodes, notify=notify)
    seconds, finished = event_driven(streams, fixed)
    straggler = int(np.argmax(finished))
    return Phase(
        seconds=seconds,
        straggler=straggler,
        binds=max(STREAMS, key=lambda name: streams[name][straggler]),
        waiting_seconds=float(seconds - finished.mean()),
        stream_seconds={name: values.tolist() for name, values in streams.items()},
        nvlink_bytes=int(traffic.nvlink.sum()),
        infiniband_bytes=int(traffic.infiniband.sum()),
        logical_bytes=int(traffic.logical.sum()),
    )


def stream_seconds(traffic: Traffic, cluster: Cluster) -> dict[str, np.ndarray]:
    """Busy seconds of each stream of each GPU, float64 (G,); SMs copy what goes out over either link."""
    nvlink, nic = cluster.nvlink_bytes_per_second.value, cluster.nic_bytes_per_second.value
    sm = cluster.communication_sms.value * cluster.sm_bytes_per_second.value
    out_nvlink, out_nic = traffic.nvlink.sum(1), traffic.infiniband.sum(1)
    return {
        "nic out": out_nic / nic,
        "nic in": traffic.infiniband.sum(0) / nic,
        "nvlink out": out_nvlink / nvlink,
        "nvlink in": traffic.nvlink.sum(0) / nvlink,
        "sm": (out_nvlink + out_nic) / sm,
    }


def _fixed_seconds(traffic: Traffic, cluster: Cluster, nodes: int, *, notify: bool) -> float:
    if not traffic.nvlink.any() and not traffic.infiniband.any():
        return 0.0
    network = cluster.network_latency_seconds.value if nodes > 1 else 0.0
    return cluster.nvlink_latency_seconds.value + network + (cluster.notify_seconds.value if notify else 0.0)


def closed_form(streams: dict[str, np.ndarray], fixed: float) -> float:
    """Latency, then the slowest stream of the slowest GPU: streams of a GPU run side by side."""
    return fixed + float(max(values.max() for values in streams.values()))


def event_driven(streams: dict[str, np.ndarray], fixed: float) -> tuple[float, np.ndarray]:
    """The same in SimPy: seconds, and when each GPU was done, float64 (G,)."""
    environment = simpy.Environment()
    gpus = len(streams[STREAMS[0]])
    finished = np.zeros(gpus)

    def gpu(index: int) -> Any:
        yield environment.timeout(fixed)
        yield environment.all_of([environment.timeout(float(streams[name][index])) for name in STREAMS])
        finished[index] = environment.now

    environment.run(environment.all_of([environment.process(gpu(i)) for i in range(gpus)]))
    return float(environment.now), finished


def _synthetic(spec: AllToAll) -> RoutingTrace:
    return synthetic_trace(
        "random",
        tokens=4096,
        n_routed_experts=spec.n_routed_experts,
        num_experts_per_tok=spec.num_experts_per_tok,
        expert_devices=spec.expert_devices,
        device_limit=spec.device_limit,
        seed=spec.seed,
    )
