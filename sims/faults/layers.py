"""Slow GPUs and degraded links in the MoE layers of a forward pass: who waits for whom.

Each layer is attention and what needs no other GPU, a barrier with the exchange of counts, dispatch, the GPU's experts, and combine.  All
GPUs wait for the last at each barrier; a collective is over when its last GPU is.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from research.config import ModelConfig
from research.errors import ConfigError
from research.routing_trace import RoutingTrace
from sims.cluster import Cluster, load_cluster
from sims.collective import gpu_seconds, latency_seconds, notify_seconds, streams
from sims.constants import Constants, load_constants, outside
from sims.faults.attribution import Wait, culprits, waits
from sims.faults.devices import SLOWEST, Speeds
from sims.links import check_gpus, check_links, link_speed, with_exceptions
from sims.quantiles import Quantiles
from sims.roofline import Operation, Work, attention_operations, gate_operations, norm, operation_seconds, routed_operations, shared_operations
from sims.routing import Family
from sims.serving.experts import model_trace
from sims.serving.spec import model_config, model_name
from sims.simulation import simulate
from sims.timeline import Phase, Timeline
from sims.traffic import Traffic, dispatch, needed_devices, payload_bytes

TOKENS = 4096
"""Of a synthetic trace."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlowLayers:
    """Forward through `layers` MoE layers, experts over all GPUs."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "allow_inf_nan": False}

    model: str | ModelConfig = "deepseek-v2"
    cluster: str = "h800"
    nodes: int = 1
    gpus_per_node: int = 8
    tokens_per_device: int = 4096
    sequence_length: int = 4096
    layers: int = 1
    speeds: Speeds = field(default_factory=Speeds)
    speed: dict[int, float] = field(default_factory=dict)
    """GPU -> time of its computing over that of a healthy one (1.25: a quarter slower); overrules `speeds`."""
    nic: dict[int, float] = field(default_factory=dict)
    """GPU -> share of its NIC's bandwidth that is left."""
    nvlink: dict[int, float] = field(default_factory=dict)
    """GPU -> share of its NVLink bandwidth that is left."""
    routing: Family = "random"
    device_limit: int | Literal["model"] | None = "model"
    dispatch_bits: Literal[16, 8] = 16
    combine_bits: Literal[16, 8] = 16
    sms: int | None = None
    draws: int = 64
    constants: dict[str, float] = field(default_factory=dict)
    """Calibrated constant -> value that it has in every draw: a what-if."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "tokens_per_device", "sequence_length", "layers", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be >= 0")
        check_gpus("speed", self.speed, self.gpus, SLOWEST, "1.25: a quarter slower")
        check_links(self.nic, self.nvlink, self.gpus)

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, kw_only=True, slots=True)
class SlowResult:
    """Seconds of all layers, beside those of a healthy cluster with the same tokens."""

    cluster: str
    model: str
    gpus: int
    seconds: Quantiles
    healthy_seconds: Quantiles
    slowdown: Quantiles
    """Ratio of the two."""
    waiting_seconds: float
    """That the average GPU waits, at the best estimate."""
    speed: list[float]
    """Time of each GPU's computing over that of a healthy one."""
    waits: list[Wait]
    healthy_waits: list[Wait]
    """Without slow GPUs or links: what uneven routing alone makes them wait."""
    warnings: list[str]
    constants: dict[str, Any]
    seed: int
    phases: Timeline

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        names = [name for name in self.__dataclass_fields__ if name not in ("phases", "waits", "healthy_waits")]
        plain = {name: asdict(v) if isinstance(v := getattr(self, name), Quantiles) else v for name in names}
        held = [{"gpu": gpu, "link": link, "seconds": seconds} for gpu, link, seconds in culprits(self.waits)]
        return {**plain, "waits": [asdict(w) for w in self.waits], "healthy_waits": [asdict(w) for w in self.healthy_waits], "culprits": held}

    def timeline(self) -> Timeline:
        return self.phases


@simulate.register
def _(spec: SlowLayers, trace: RoutingTrace | None = None) -> SlowResult:
    return simulate_layers(spec, trace)


def simulate_layers(spec: SlowLayers, trace: RoutingTrace | None = None) -> SlowResult:
    """ConfigError for a dense model, for GPUs that do not divide its experts, or for a trace of other experts."""
    cluster, model = load_cluster(spec.cluster), model_config(spec.model, "faults layers")
    if spec.gpus_per_node > cluster.gpus_per_node.value:
        raise ConfigError(f"gpus_per_node = {spec.gpus_per_node}: a node of {cluster.name} has {cluster.gpus_per_node.value:.0f}")
    constants = load_constants(cluster, spec.draws, spec.constants)
    work = _work(spec, model, cluster, constants, _trace(spec, model, trace))
    speed = with_exceptions(spec.speeds.factors(spec.gpus, spec.seed), spec.speed)
    slow = _play(spec, work, cluster, constants, speed, spec.nic, spec.nvlink)
    healthy = _play(spec, work, cluster, constants, np.ones(spec.gpus), {}, {})
    found = waits(slow[1])
    return SlowResult(
        cluster=cluster.name,
        model=model_name(spec.model),
        gpus=spec.gpus,
        seconds=Quantiles.of(slow[0]),
        healthy_seconds=Quantiles.of(healthy[0]),
        slowdown=Quantiles.of(slow[0] / healthy[0]),
        waiting_seconds=sum(wait.seconds for wait in found) / spec.gpus,
        speed=[float(each) for each in speed],
        waits=found,
        healthy_waits=waits(healthy[1]),
        warnings=_warnings(spec, model, cluster),
        constants=constants.to_dict(),
        seed=spec.seed,
        phases=slow[1],
    )


def _warnings(spec: SlowLayers, model: ModelConfig, cluster: Cluster) -> list[str]:
    if spec.gpus == 1 or model.moe is None:
        return []
    query = {"cluster": cluster.key, "nodes": spec.nodes, "tokens_per_device": spec.tokens_per_device, "hidden_size": model.hidden_size}
    return outside(query | {"num_experts_per_tok": model.moe.num_experts_per_tok} | ({"sms": spec.sms} if spec.sms is not None else {}))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """Of one layer, healthy: seconds (draws,) of what a GPU does alone, (draws, G) of its experts, and what is sent."""

    alone: np.ndarray
    experts: np.ndarray
    dispatch: Traffic
    combine: Traffic


def _trace(spec: SlowLayers, model: ModelConfig, trace: RoutingTrace | None) -> RoutingTrace:
    moe = model.moe
    if moe is None:
        raise ConfigError(f"model = {model_name(spec.model)}: is dense and has no all-to-all; valid: a model with experts")
    if moe.n_routed_experts % spec.gpus:
        raise ConfigError(
            f"nodes = {spec.nodes} x gpus_per_node = {spec.gpus_per_node} = {spec.gpus} GPUs must divide the model's {moe.n_routed_experts} experts"
        )
    return model_trace(model, trace, routing=spec.routing, device_limit=spec.device_limit, tokens=TOKENS, seed=spec.seed)


def _work(spec: SlowLayers, model: ModelConfig, cluster: Cluster, constants: Constants, trace: RoutingTrace) -> _Work:
    moe, gpus = model.moe, spec.gpus
    assert moe is not None
    flat = trace.expert_ids[-1].reshape(-1, trace.num_experts_per_tok).astype(np.int64)
    tokens = np.arange(gpus * spec.tokens_per_device)
    # A prime stride walks through all layers and domains of the trace.
    ids = flat[tokens // gpus * 7919 % len(flat)]
    counts = np.bincount(ids.ravel(), minlength=moe.n_routed_experts).reshape(gpus, -1)
    base = Work(tokens=float(spec.tokens_per_device), context=spec.sequence_length / 2, phase="forward", expert_parallel=gpus)

    def seconds(operations: list[Operation]) -> np.ndarray:
        return np.sum([operation_seconds(operation, cluster, constants) for operation in operations], axis=0)

    alone = [*attention_operations(model, base), *norm("FFN norm", model.hidden_size, base, residual=True)]
    alone += [*gate_operations(model, base), *shared_operations(model, base)]
    of_gpu = [Work(**{**asdict(base), "routed_tokens": float(each.sum()), "experts_read": float(max((each > 0).sum(), 1e-9))}) for each in counts]
    there = dispatch(
        needed_devices(ids, moe.n_routed_experts, gpus), tokens % gpus, spec.gpus_per_node, payload_bytes(model.hidden_size, spec.dispatch_bits)
    )
    return _Work(
        alone=seconds(alone),
        experts=np.stack([seconds(routed_operations(model, work)) for work in of_gpu], axis=1),
        dispatch=there,
        combine=there.reverse(payload_bytes(model.hidden_size, spec.combine_bits)),
    )


def _play(
    spec: SlowLayers, work: _Work, cluster: Cluster, constants: Constants, speed: np.ndarray, nic: dict[int, float], nvlink: dict[int, float]
) -> tuple[np.ndarray, Timeline]:
    """Seconds (draws,) of all layers, and the phases at the best estimate."""
    links = link_speed(spec.gpus, nic, nvlink)
    clock, timeline = _Clock(constants.draws, spec), Timeline()
    for layer in range(spec.layers):
        clock.compute("attention", work.alone[:, None] * speed, layer, timeline)
        for name, traffic, between in (("dispatch", work.dispatch, work.experts * speed), ("combine", work.combine, None)):
            found = streams(traffic, cluster, constants, sms=spec.sms, speed=links)
            fixed = latency_seconds(traffic, cluster, constants)
            if name == "dispatch":
                fixed = fixed + notify_seconds(traffic, cluster, constants)
            clock.collective(name, traffic, found, gpu_seconds(found, constants), fixed, layer, timeline)
            if between is not None:
                clock.compute("experts", between, layer, timeline)
    # The last collective ends for all at once.
    return clock.now.max(1), timeline


class _Clock:
    """When each GPU is where, float64 (draws, G); phases are written at draw 0."""

    def __init__(self, draws: int, spec: SlowLayers) -> None:
        self.now, self.spec = np.zeros((draws, spec.gpus)), spec

    def compute(self, name: str, seconds: np.ndarray, layer: int, timeline: Timeline) -> None:
        start = self.now[0].copy()
        self.now = self.now + seconds
        for gpu in range(self.spec.gpus):
            timeline.phases.append(self._phase(name, gpu, "compute", start[gpu], self.now[0, gpu], layer))

    def collective(
        self, name: str, traffic: Traffic, found: dict[str, np.ndarray], busy: np.ndarray, fixed: np.ndarray, layer: int, timeline: Timeline
    ) -> None:
        """A barrier, and the transfer, which is over for all when it is for the last.

        Two rows for each GPU: `notify` from its arrival, which waits for the last to arrive, and the transfer, at whose end it waits
        for the GPU with the busiest link.
        """
        arrived, last = self.now[0], int(np.argmax(self.now[0]))
        start = self.now.max(1) + fixed
        self.now = np.repeat((start + busy.max(1))[:, None], self.spec.gpus, axis=1)
        slowest = int(np.argmax(busy[0]))
        link = max(found, key=lambda stream: found[stream][0, slowest])
        for gpu in range(self.spec.gpus):
            row = self._phase("notify" if name == "dispatch" else "start", gpu, "all-to-all", arrived[last], start[0], layer)
            _blame(row, float(arrived[last] - arrived[gpu]), last, "compute")
            own = self._phase(name, gpu, "all-to-all", start[0], start[0] + busy[0, gpu], layer)
            own.nvlink_bytes, own.infiniband_bytes = int(traffic.nvlink[gpu].sum()), int(traffic.infiniband[gpu].sum())
            _blame(own, float(busy[0, slowest] - busy[0, gpu]), slowest, link)
            timeline.phases += [row, own]

    def _phase(self, name: str, gpu: int, stream: str, start: float, end: float, layer: int) -> Phase:
        node = gpu // self.spec.gpus_per_node
        return Phase(
            name=name, node=node, gpu=gpu, stream=stream, start_seconds=float(start), end_seconds=float(end), layer=layer, direction="forward"
        )


def _blame(phase: Phase, seconds: float, culprit: int, link: str) -> None:
    if seconds > 0 and culprit != phase.gpu:
        phase.waits_for, phase.wait_seconds, phase.wait_link = culprit, seconds, link
