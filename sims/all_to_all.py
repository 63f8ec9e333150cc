"""One MoE layer's all-to-all over a described cluster: the question, and its answer by the closed form (T0).

T1, the same in events, is `sims.events`; T2, several collectives on shared links, is `sims.sharing`.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import gcd
from typing import Any, ClassVar

import numpy as np

from research.errors import ConfigError
from research.routing_trace import RoutingTrace
from sims.cluster import Cluster, Network, load_cluster
from sims.collective import Speed, collective_seconds, gpu_seconds, latency_seconds, notify_seconds, streams
from sims.constants import Constants, load_constants, outside
from sims.events import play, step
from sims.formulas import formulas
from sims.links import check_links, link_speed
from sims.placement import NAMES, Placement, place
from sims.pool import dealt, routed, step_of, tokens_of
from sims.quantiles import Quantiles
from sims.result import Move, Result
from sims.routing import FAMILIES, NodeScore
from sims.simulation import simulate
from sims.timeline import Timeline
from sims.traffic import Dedup, Traffic, needed_devices, payload_bytes, traffic_of

__all__ = ["AllToAll", "Plan", "collective_seconds", "plan", "simulate", "streams"]

BITS = (8, 16, 32)
DEVICES = 8
"""D of a question that does not say it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AllToAll:
    """The question: this much work, on these nodes.  Without a trace the routing is made up (`routing`)."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "allow_inf_nan": False}

    cluster: str = "h800"
    nodes: int = 1
    gpus_per_node: int = 8
    expert_parallel: int | None = None
    """GPUs of one expert-parallel group; None: all, or where there are more GPUs than experts the largest equal groups that fit."""
    placement: str | list[list[int]] = "packed"
    """Where the group's devices stand: packed, spread (one per node as far as it goes), or [node, gpu] for each."""
    expert_placement: list[int] | None = None
    """The group's device of each expert; None: equal runs in order."""
    tokens_per_device: int = 4096
    hidden_size: int = 5120
    n_routed_experts: int = 160
    num_experts_per_tok: int = 6
    expert_devices: int | None = None
    """The model's D groups of experts, which `device_limit` counts; not the GPUs, unless there are as many.  None: 8, or as many of them
    as divide the experts evenly, where no limit counts them."""
    device_limit: int | None = None
    """M: a token's experts lie on at most so many of the D devices, those of the highest affinities."""
    node_limit: int | None = None
    """A token reaches at most so many of the group's nodes, chosen by `node_score`."""
    node_score: NodeScore = "sum"
    """A node's worth: the sum of its K / node_limit highest affinities (DeepSeek-V3), or the highest (max)."""
    dispatch_bits: int = 16
    combine_bits: int = 16
    dedup: Dedup = "node"
    """Copies of a token: one per node and device (node), one per device (device), one per expert (none)."""
    sms: int | None = None
    """SMs that work on communication; None: the cluster's."""
    network: Network | None = None
    oversubscription: float | None = None
    nic: dict[int, float] = field(default_factory=dict)
    """Device of the group -> share of its NIC's bandwidth that is left; where there are several groups, of the first."""
    nvlink: dict[int, float] = field(default_factory=dict)
    """Device of the group -> share of its NVLink bandwidth that is left."""
    constants: dict[str, float] = field(default_factory=dict)
    """Calibrated constant -> value that it has in every draw: a what-if."""
    routing: str = "random"
    step: int = -1
    """The snapshot of a trace."""
    seed: int = 0
    draws: int = 64

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "tokens_per_device", "hidden_size", "n_routed_experts", "num_experts_per_tok", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
        for name in ("sms", "expert_parallel", "expert_devices", "node_limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be >= 1, or null")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be >= 0")
        for name in ("dispatch_bits", "combine_bits"):
            if getattr(self, name) not in BITS:
                raise ValueError(f"{name}={getattr(self, name)} must be 8 (with scales), 16 or 32")
        if self.routing not in FAMILIES:
            raise ValueError(f"routing={self.routing!r} must be one of {', '.join(FAMILIES)}")
        if isinstance(self.placement, str) and self.placement not in NAMES:
            raise ValueError(f"placement={self.placement!r} must be packed, spread or a list of [node, gpu] for each device")
        if self.oversubscription is not None and not 1 <= self.oversubscription < float("inf"):
            raise ValueError(f"oversubscription={self.oversubscription} must be >= 1")
        self._check_routing()

    @property
    def routing_devices(self) -> int:
        """D, as given or as it follows from the experts."""
        if self.expert_devices is not None:
            return self.expert_devices
        return gcd(self.n_routed_experts, DEVICES) if self.device_limit is None else DEVICES

    def _check_routing(self) -> None:
        experts, devices, chosen, limit = self.n_routed_experts, self.routing_devices, self.num_experts_per_tok, self.device_limit
        if experts % devices:
            raise ValueError(f"expert_devices={devices} must divide n_routed_experts={experts}")
        if chosen > experts:
            raise ValueError(f"num_experts_per_tok={chosen} must lie in 1..{experts} (n_routed_experts)")
        if limit is not None and not 1 <= limit <= devices:
            raise ValueError(f"device_limit={limit} must lie in 1..{devices} (expert_devices), or be null for unrestricted")
        if chosen > (limit or devices) * (experts // devices):
            raise ValueError(
                f"num_experts_per_tok={chosen} does not fit on device_limit={limit} of {devices} devices of {experts // devices} experts"
            )
        if self.expert_parallel is not None and (self.nodes * self.gpus_per_node) % self.expert_parallel:
            raise ValueError(
                f"expert_parallel={self.expert_parallel} must divide nodes={self.nodes} x gpus_per_node={self.gpus_per_node} = "
                f"{self.nodes * self.gpus_per_node} GPUs"
            )

    def described_cluster(self) -> Cluster:
        """The cluster with what this question says otherwise of its network; ConfigError for more GPUs than a node has."""
        cluster = load_cluster(self.cluster)
        if self.gpus_per_node > cluster.gpus_per_node.value:
            raise ConfigError(f"gpus_per_node = {self.gpus_per_node}: a node of {cluster.name} has {cluster.gpus_per_node.value:.0f}")
        if self.sms is not None and self.sms > cluster.sms.value:
            raise ConfigError(f"sms = {self.sms}: a GPU of {cluster.name} has {cluster.sms.value:.0f}")
        changes: dict[str, Any] = {}
        if self.network is not None:
            changes |= {"network": self.network, "oversubscription": 1.0 if self.network != "plain" else cluster.oversubscription}
        if self.oversubscription is not None:
            changes["oversubscription"] = self.oversubscription
        try:
            return replace(cluster, **changes) if changes else cluster
        except ValueError as error:
            raise ConfigError(f"all-to-all: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The bytes of a question, before any time: what other simulators build on."""

    spec: AllToAll
    cluster: Cluster
    placement: Placement
    groups: int
    trace: RoutingTrace
    needed: np.ndarray
    """bool (P, G), of the pool's tokens."""
    counts: np.ndarray
    """float32 (G, P): how often each GPU has each token of the pool."""
    dispatch: Traffic
    expert_load: np.ndarray
    """int64 (E,): token-expert pairs of the group."""
    warnings: list[str]
    links: Speed | None = None
    """What is left of the links of the group's GPUs, where some are degraded."""

    def load_constants(self, draws: int | None = None) -> Constants:
        """Of the question; `draws` in place of its own."""
        return load_constants(self.cluster, self.spec.draws if draws is None else draws, self.spec.constants)

    @cached_property
    def combine(self) -> Traffic:
        return self.dispatch.reverse(payload_bytes(self.spec.hidden_size, self.spec.combine_bits))

    @cached_property
    def backward_combine(self) -> Traffic:
        """Gradients of what combine brought back, out to the experts: a dispatch in combine's bits."""
        return self.combine.reverse(self.combine.bytes_per_token)

    @property
    def backward_dispatch(self) -> Traffic:
        """Gradients of what dispatch sent out, summed on the way back: a combine in combine's bits."""
        return self.combine

    @property
    def copies(self) -> np.ndarray:
        """int64 (G,): tokens that each device works on (with `dedup: none`, token-expert pairs)."""
        return self.dispatch.logical.sum(0) // self.dispatch.bytes_per_token


def plan(spec: AllToAll, trace: RoutingTrace | None = None) -> Plan:
    """Place, route and count.

    A trace's layers (its snapshot `step`) are dealt over the GPUs, as often as it takes to give each `tokens_per_device` tokens.
    ConfigError if a trace, a placement and the sizes do not fit together.
    """
    cluster = spec.described_cluster()
    experts = trace.n_routed_experts if trace is not None else spec.n_routed_experts
    devices, warnings = _group(spec, experts)
    where = place(
        spec.placement,
        spec.expert_placement,
        devices=devices,
        nodes=spec.nodes if spec.placement != "packed" else max(1, -(-devices // spec.gpus_per_node)),
        gpus_per_node=spec.gpus_per_node,
        n_routed_experts=experts,
    )
    if spec.expert_placement is None and experts % devices:
        warnings.append(f"n_routed_experts = {experts} over {devices} devices: does not come out even, some hold one expert more")
    if trace is not None:
        asked = {"n_routed_experts": spec.n_routed_experts, "num_experts_per_tok": spec.num_experts_per_tok, "expert_devices": spec.routing_devices}
        warnings += [f"{name} = {value}: the trace's {getattr(trace, name)} hold" for name, value in asked.items() if getattr(trace, name) != value]
    trace = routed(spec, where, trace)
    ids = trace.expert_ids[step_of(spec, trace)].reshape(-1, trace.num_experts_per_tok)
    counts, used = dealt(tokens_of(spec, devices), len(ids), spec.routing == "balanced")
    ids = ids[used] if len(used) < len(ids) else ids
    needed = needed_devices(ids, where.expert_device, devices)
    chosen = None
    if spec.dedup == "none":
        chosen = np.zeros(needed.shape, np.float32)
        np.add.at(chosen, (np.arange(len(ids))[:, None], where.expert_device[ids]), 1)
    down = payload_bytes(spec.hidden_size, spec.dispatch_bits)
    load = np.bincount(ids.ravel(), weights=np.repeat(counts.sum(0, dtype=np.float64), ids.shape[1]), minlength=experts)
    return Plan(
        spec=spec,
        cluster=cluster,
        placement=where,
        groups=spec.nodes * spec.gpus_per_node // devices,
        trace=trace,
        needed=needed,
        counts=counts,
        dispatch=traffic_of(counts, needed, where, down, dedup=spec.dedup, chosen=chosen),
        expert_load=np.rint(load).astype(np.int64),
        warnings=warnings,
        links=_links(spec, devices),
    )


def _links(spec: AllToAll, devices: int) -> Speed | None:
    """None where all links are healthy."""
    try:
        check_links(spec.nic, spec.nvlink, devices)
    except ValueError as error:
        raise ConfigError(f"all-to-all: {error}") from error
    return link_speed(devices, spec.nic, spec.nvlink) if spec.nic or spec.nvlink else None


@simulate.register
def _(spec: AllToAll, trace: RoutingTrace | None = None) -> Result:
    """Seconds, bytes and straggler of one layer's all-to-all, forward and backward (`sims.simulate`)."""
    planned = plan(spec, trace)
    return answer(planned, planned.load_constants())


def answer(planned: Plan, constants: Constants) -> Result:
    """The plan in time."""
    spec, cluster, trace = planned.spec, planned.cluster, planned.trace
    sms = float(spec.sms if spec.sms is not None else cluster.communication_sms.value)
    forward = {"dispatch": planned.dispatch, "combine": planned.combine}
    moves = {
        name: move(traffic, cluster, constants, sms=sms, experts=trace.n_routed_experts, notify=name == "dispatch", speed=planned.links)
        for name, traffic in (*forward.items(), ("backward_combine", planned.backward_combine), ("backward_dispatch", planned.backward_dispatch))
    }
    load, tokens, size = planned.copies, float(planned.counts.sum(dtype=np.float64)), planned.dispatch.bytes_per_token
    per_device = trace.n_routed_experts // trace.expert_devices
    ids = trace.expert_ids[step_of(spec, trace)].reshape(-1, trace.num_experts_per_tok)
    return Result(
        cluster=cluster.name,
        nodes=spec.nodes,
        gpus_per_node=spec.gpus_per_node,
        expert_parallel=planned.placement.devices,
        groups=planned.groups,
        device_limit=trace.device_limit,
        node_limit=spec.node_limit,
        num_experts_per_tok=trace.num_experts_per_tok,
        sms=sms,
        seed=spec.seed,
        routing=spec.routing,
        **moves,
        distinct_devices_per_token=float(planned.counts.sum(0, dtype=np.float64) @ planned.needed.sum(1)) / tokens
        if spec.dedup == "none"
        else int(planned.dispatch.logical.sum()) / size / tokens,
        distinct_routing_devices_per_token=float(needed_devices(ids // per_device, trace.expert_devices, trace.expert_devices).sum() / len(ids)),
        distinct_nodes_per_token=int(planned.dispatch.node_logical.sum()) / size / tokens,
        expert_load_violation=float(load.max() / load.mean() - 1),
        nvlink_matrix=planned.dispatch.nvlink + planned.combine.nvlink,
        infiniband_matrix=planned.dispatch.infiniband + planned.combine.infiniband,
        formulas=formulas(
            cluster,
            nodes=planned.placement.nodes,
            gpus_per_node=max(1, planned.placement.devices // planned.placement.nodes),
            tokens=tokens / planned.placement.devices,
            chosen=trace.num_experts_per_tok,
            dispatch_bytes=planned.dispatch.bytes_per_token,
            combine_bytes=planned.combine.bytes_per_token,
        ),
        warnings=[*planned.warnings, *outside(query(planned, sms))],
        constants=constants.to_dict(),
        phases=partial(timeline, planned, constants, sms),
    )


def query(planned: Plan, sms: float) -> dict[str, Any]:
    """What of the question the calibration has a range for."""
    spec = planned.spec
    return {
        "cluster": planned.cluster.key,
        "nodes": planned.placement.nodes,
        "sms": sms,
        "tokens_per_device": spec.tokens_per_device,
        "hidden_size": spec.hidden_size,
        "num_experts_per_tok": planned.trace.num_experts_per_tok,
    }


def move(traffic: Traffic, cluster: Cluster, constants: Constants, *, sms: float, experts: int, notify: bool, speed: Speed | None = None) -> Move:
    """One direction in time, by the closed form."""
    found = streams(traffic, cluster, constants, sms=sms, speed=speed)
    by_gpu = gpu_seconds(found, constants)
    seconds = latency_seconds(traffic, cluster, constants) + by_gpu.max(1)
    straggler = int(by_gpu[0].argmax())
    gpus, time = len(by_gpu[0]), Quantiles.of(seconds)
    node_logical = int(traffic.node_logical.sum()) if traffic.nodes > 1 else 0
    totals = {
        "nvlink_physical": int(traffic.nvlink.sum()),
        "nvlink_logical": int(traffic.logical.sum()),
        "infiniband_physical": int(traffic.infiniband.sum()),
        "infiniband_logical": node_logical,
    }
    return Move(
        seconds=time,
        notify_seconds=Quantiles.of(notify_seconds(traffic, cluster, constants) if notify else np.zeros(1)),
        straggler=straggler,
        binds=max(found, key=lambda name: found[name][0, straggler]) if traffic.moves else "nothing",
        waiting_seconds=float(by_gpu[0].max() - by_gpu[0].mean()),
        stream_seconds={name: values[0].tolist() for name, values in found.items()},
        bytes_per_token=traffic.bytes_per_token,
        nvlink_bytes=totals["nvlink_physical"],
        infiniband_bytes=totals["infiniband_physical"],
        nvlink_logical_bytes=totals["nvlink_logical"],
        infiniband_logical_bytes=totals["infiniband_logical"],
        count_bytes=4 * (gpus - 1) * (experts + gpus) if notify and gpus > 1 else 0,
        gigabytes_per_second={name: total / gpus / time.p50 / 1e9 if time.p50 else 0.0 for name, total in totals.items()},
    )


def _group(spec: AllToAll, experts: int) -> tuple[int, list[str]]:
    """GPUs of one expert-parallel group, and what must be said of it."""
    gpus = spec.nodes * spec.gpus_per_node
    if spec.expert_parallel is not None:
        return spec.expert_parallel, []
    if not isinstance(spec.placement, str):
        return len(spec.placement), []
    if spec.expert_placement is not None:
        return min(gpus, max(spec.expert_placement, default=0) + 1) if gpus > experts else gpus, []
    if gpus <= experts:
        return gpus, []
    sizes = [size for size in range(1, experts + 1) if gpus % size == 0 and (size % spec.gpus_per_node == 0 or size < spec.gpus_per_node)]
    even = [size for size in sizes if experts % size == 0]
    size = max(even or sizes)
    return size, [f"nodes = {spec.nodes} x gpus_per_node = {spec.gpus_per_node}: {gpus} GPUs for {experts} experts are {gpus // size} "
                  f"expert-parallel groups of {size} GPUs; set expert_parallel to choose otherwise"]  # fmt: skip


def timeline(planned: Plan, constants: Constants, sms: float) -> Timeline:
    """Notify, dispatch and combine of the forward pass in events (T1), the experts' own time left out."""
    moves = (("dispatch", planned.dispatch, True), ("combine", planned.combine, False))
    steps = [
        step(name, traffic, planned.cluster, constants, sms=sms, notify=notify, speed=planned.links)
        for name, traffic, notify in moves
        if traffic.moves
    ]
    return play(steps, planned.placement, gpus_per_node=planned.spec.gpus_per_node, copies=planned.groups).timeline
