"""What one GPU does in one layer, as segments: computing, or an all-to-all with the shared experts computing beside it.

All GPUs of an expert-parallel group meet at every all-to-all, so a segment takes as long as on the slowest of them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import numpy as np

from sims.cluster import Cluster
from sims.constants import Constants
from sims.roofline import (
    KINDS,
    Operation,
    Work,
    attention_operations,
    embedding_operations,
    ffn_operations,
    gate_operations,
    head_operations,
    norm,
    operation_seconds,
    routed_operations,
    shared_operations,
)
from sims.training.exchange import Exchange, Sample, slow_link, way_seconds
from sims.training.health import Health
from sims.training.spec import TrainingStep

REBUILT = {
    "attention norm",
    "FFN norm",
    "query norm",
    "latent norm",
    "queries from latent",
    "keys and values",
    "rotary and keys of two parts",
    "FFN activation",
    "shared experts activation",
    "routed experts activation",
}
"""What `recompute: partial` computes again: norms, MLA's up-projections, activations between products."""


@dataclass(slots=True)
class Segment:
    """One phase of all GPUs of a group.

    seconds: until the slowest is done, float64 (draws,).  compute: by kind of operation, of the average GPU, at full SMs.
    waiting: what the average GPU waits for the slowest.  exposed: what of `seconds` is neither (communication, and the SMs
    that it takes from products).  communication: of the all-to-all alone, isolated.  again: what of `compute` is recomputed.
    """

    name: str
    stream: str
    seconds: np.ndarray
    compute: dict[str, np.ndarray] = field(default_factory=dict)
    waiting: np.ndarray | float = 0.0
    exposed: np.ndarray | float = 0.0
    communication: np.ndarray | float = 0.0
    again: np.ndarray | float = 0.0
    slowest: int = -1
    nvlink_bytes: int = 0
    infiniband_bytes: int = 0
    layer: int = -1
    held_up: np.ndarray | float = 0.0
    """By degraded links, a part of `exposed`."""
    slow_link: tuple[int, str] = (-1, "")
    """Device and stream that hold the others up so."""


def side_by_side(compute: np.ndarray, communication: np.ndarray, bandwidth: np.ndarray | float, sms: float) -> np.ndarray:
    """Seconds of both together, each given alone: while both run, communication has `bandwidth` of its rate and products `sms` of theirs."""
    slow_compute, slow_communication = compute / sms, communication / bandwidth
    together = np.minimum(slow_compute, slow_communication)
    return together + np.maximum(compute - sms * together, 0.0) + np.maximum(communication - bandwidth * together, 0.0)


def left_over(compute: np.ndarray, communication: np.ndarray, bandwidth: np.ndarray | float, sms: float) -> np.ndarray:
    """Of `compute`, at full SMs, what is not done when the communication beside it is."""
    return np.maximum(compute - sms * communication / bandwidth, 0.0)


class Layers:
    """Segments of every kind of layer and pass; layers that are alike are computed once.

    health: of the GPUs of the group.
    """

    def __init__(self, spec: TrainingStep, cluster: Cluster, constants: Constants, exchange: Exchange | None) -> None:
        self.spec, self.cluster, self.constants, self.exchange = spec, cluster, constants, exchange
        sms = spec.communication_sms or cluster.communication_sms.value
        self.sms = max(1.0 - sms / cluster.sms.value, 1e-3)
        self.bandwidth = constants["overlapped_bandwidth"]
        self.layer = lru_cache(maxsize=None)(self._layer)
        self.alone = lru_cache(maxsize=None)(self._isolated)

    def work(self, phase: str, sample: Sample | None = None, device: int = 0) -> Work:
        spec = self.spec
        return Work(
            tokens=spec.tokens,
            context=spec.sequence_length / 2,
            phase=phase,  # type: ignore[arg-type]
            expert_parallel=spec.experts_over,
            routed_tokens=float(sample.pairs[device]) if sample is not None else None,
            experts_read=float(sample.touched[device]) if sample is not None else None,
            shards=spec.tensor_parallel,
        )

    def ends(self, phase: str, health: Health, *, first: bool, last: bool) -> list[Segment]:
        """Embedding and head of a stage, one segment each."""
        work = self.work(phase)
        found: list[tuple[str, list[Operation]]] = []
        if first:
            found.append(("embedding", embedding_operations(self.spec.model, work)))
        if last:
            found.append(("head", head_operations(self.spec.model, work)))
        return [self._compute(name, operations, health) for name, operations in found if operations]

    def _layer(self, layer_kind: int, phase: str, index: int, health: Health) -> tuple[Segment, ...]:
        """`layer_kind`: any layer of the same kind.  `index`: of the routing sample."""
        model, spec = self.spec.model, self.spec
        if phase == "backward-input" and spec.recompute == "full":
            again = [_as_recomputed(segment) for segment in self._forward(layer_kind, index, health)]
            return (*again, *self._backward(layer_kind, index, health))
        if phase == "forward":
            return tuple(self._forward(layer_kind, index, health))
        if phase == "backward-input":
            return tuple(self._backward(layer_kind, index, health))
        work = self.work(phase)
        if not model.is_moe_layer(layer_kind):
            return (self._compute("weights", [*attention_operations(model, work), *ffn_operations(model, layer_kind, work)], health),)
        alike = [*attention_operations(model, work), *self._gate(work), *shared_operations(model, work)]
        return (self._compute("weights", alike, health), self._routed("experts' weights", phase, index, health))

    def _forward(self, layer: int, index: int, health: Health) -> list[Segment]:
        model, work = self.spec.model, self.work("forward")
        attention = attention_operations(model, work)
        if not model.is_moe_layer(layer):
            segment = self._compute("attention", attention, health), self._compute("FFN", ffn_operations(model, layer, work), health)
            return [*segment, *self._tensor(4, health)]
        first = self._compute("attention", [*attention, *self._gate(work)], health)
        moved = self._experts(index, "forward", shared_operations(model, work), health, ("dispatch", "combine"))
        return [first, *moved, *self._tensor(4, health)]

    def _backward(self, layer: int, index: int, health: Health) -> list[Segment]:
        model, work = self.spec.model, self.work("backward-input")
        attention = [*self._rebuilt(attention_operations(model, self.work("forward"))), *attention_operations(model, work)]
        if not model.is_moe_layer(layer):
            before = self._rebuilt(ffn_operations(model, layer, self.work("forward")))
            ffn = self._compute("FFN", [*before, *ffn_operations(model, layer, work)], health)
            return [ffn, self._compute("attention", attention, health), *self._tensor(6, health)]
        shared = [*self._rebuilt(shared_operations(model, self.work("forward"))), *shared_operations(model, work)]
        moved = self._experts(index, "backward-input", shared, health, ("combine backward", "dispatch backward"))
        last = self._compute("attention", [*self._rebuilt(self._gate(self.work("forward"))), *self._gate(work), *attention], health)
        return [*moved, last, *self._tensor(6, health)]

    def _gate(self, work: Work) -> list[Operation]:
        return [*norm("FFN norm", self.spec.model.hidden_size, work, residual=True), *gate_operations(self.spec.model, work)]

    def _rebuilt(self, operations: Iterable[Operation]) -> list[Operation]:
        if self.spec.recompute != "partial":
            return []
        return [replace(operation, recomputed=True) for operation in operations if operation.name in REBUILT]

    def _experts(self, index: int, phase: str, shared: Sequence[Operation], health: Health, names: tuple[str, str]) -> list[Segment]:
        """Tokens out, routed experts, tokens back, the shared experts beside the two ways as far as they fit."""
        routed = self._routed("experts", phase, index, health)
        beside = self._compute("shared experts", shared, health)
        if self.exchange is None:
            return [*([beside] if shared else []), routed]
        if not self.spec.shared_expert_overlap:
            alone = self._compute("nothing", [], health)
            ways = [self._way(name, index, alone, 0.0, health) for name in names]
            return [*([beside] if shared else []), ways[0], routed, ways[1]]
        there = self._way(names[0], index, beside, 1.0, health)
        rest = left_over(beside.seconds, self.alone(names[0], index, health), self.bandwidth, self.sms)
        share = np.divide(rest, beside.seconds, out=np.zeros_like(rest), where=beside.seconds > 0)
        there = self._way(names[0], index, beside, 1.0 - share, health)
        return [there, routed, self._way(names[1], index, beside, share, health)]

    def _isolated(self, name: str, index: int, health: Health) -> np.ndarray:
        """Seconds of an all-to-all by itself, float64 (draws,)."""
        assert self.exchange is not None
        sample, links = self.exchange.samples[index], health.links
        if links is None:
            return sample.seconds[name]
        return way_seconds(name, sample.traffic[name], self.spec, self.cluster, self.constants, links)

    def _way(self, name: str, index: int, beside: Segment, share: np.ndarray | float, health: Health) -> Segment:
        """One all-to-all, and `share` of the computing beside it."""
        assert self.exchange is not None
        sample, alone, links = self.exchange.samples[index], self.alone(name, index, health), health.links
        seconds = side_by_side(beside.seconds * share, alone, self.bandwidth, self.sms)
        held_up, culprit = np.zeros_like(seconds), (-1, "")
        if links is not None:
            held_up = seconds - side_by_side(beside.seconds * share, sample.seconds[name], self.bandwidth, self.sms)
            culprit = slow_link(sample.traffic[name], self.spec, self.cluster, self.constants, links)
        compute = {kind: value * share for kind, value in beside.compute.items()}
        waiting = beside.waiting * share
        nvlink, infiniband = sample.bytes[name]
        return Segment(
            name,
            "all-to-all",
            seconds,
            compute,
            waiting,
            seconds - sum(compute.values(), np.zeros_like(seconds)) - waiting,
            alone,
            beside.again * share,
            beside.slowest,
            nvlink,
            infiniband,
            held_up=held_up,
            slow_link=culprit,
        )

    def _compute(self, name: str, operations: Sequence[Operation], health: Health) -> Segment:
        """The same work on every GPU of the group."""
        kinds, again = self._by_kind(operations)
        total = sum(kinds.values(), np.zeros_like(self.bandwidth))
        mean, worst = float(np.mean(health.speeds)), max(health.speeds)
        compute = {kind: value * mean for kind, value in kinds.items()}
        slowest = int(np.argmax(health.speeds)) if worst > min(health.speeds) else -1
        return Segment(name, "compute", total * worst, compute, total * (worst - mean), again=again * mean, slowest=slowest)

    def _routed(self, name: str, phase: str, index: int, health: Health) -> Segment:
        """The routed experts, of which every GPU has its own share of the tokens.

        Seconds are linear in pairs and experts with tokens where products bind, so the mean over GPUs is that of their means.
        """
        model = self.spec.model
        sample = self.exchange.samples[index] if self.exchange is not None else None
        if sample is None:
            operations = self._with_rebuilt(phase, lambda p: routed_operations(model, self.work(p)))
            return self._compute(name, operations, health)
        devices, inverse = np.unique(np.stack([sample.pairs, sample.touched]), axis=1, return_inverse=True)
        each: list[tuple[dict[str, np.ndarray], np.ndarray]] = []
        for column in range(devices.shape[1]):
            device = int(np.flatnonzero(inverse.ravel() == column)[0])
            each.append(self._by_kind(self._with_rebuilt(phase, partial(self._share, sample, device))))
        which = inverse.ravel()
        totals = np.stack([sum(each[c][0].values(), np.zeros_like(self.bandwidth)) * speed for c, speed in zip(which, health.speeds, strict=True)])
        worst, mean = totals.max(0), totals.mean(0)
        share = np.array(health.speeds) / len(health.speeds)
        compute: dict[str, np.ndarray] = {kind: np.stack([each[c][0][kind] for c in which], 1) @ share for kind in KINDS}
        again = np.stack([each[c][1] for c in which], 1) @ share
        slowest = int(np.argmax(totals[:, 0]))
        return Segment(name, "compute", worst, compute, worst - mean, again=again, slowest=slowest if totals[:, 0].min() < worst[0] else -1)

    def _share(self, sample: Sample, device: int, phase: str) -> list[Operation]:
        return routed_operations(self.spec.model, self.work(phase, sample, device))

    def _with_rebuilt(self, phase: str, operations: Callable[[str], list[Operation]]) -> list[Operation]:
        return [*(self._rebuilt(operations("forward")) if phase == "backward-input" else []), *operations(phase)]

    def _by_kind(self, operations: Iterable[Operation]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Seconds by kind, and those of recomputed operations."""
        zero = np.zeros_like(self.bandwidth)
        kinds: dict[str, np.ndarray] = dict.fromkeys(KINDS, zero)
        again = zero
        for operation in operations:
            seconds = operation_seconds(operation, self.cluster, self.constants)
            kinds[operation.kind] = kinds[operation.kind] + seconds
            if operation.recomputed:
                again = again + seconds
        return kinds, again

    def _tensor(self, count: int, health: Health) -> list[Segment]:
        """All-gathers and reduce-scatters of tensor parallelism, less what products hide."""
        if self.spec.tensor_parallel == 1:
            return []
        alone = count * _tensor_seconds(self.spec, self.cluster, health.worst[1]) * np.ones_like(self.bandwidth)
        exposed = alone * (1.0 - self.constants["hidden_tensor_parallel"])
        return [Segment("tensor parallel", "compute", exposed, {}, 0.0, exposed, alone)]


def _as_recomputed(segment: Segment) -> Segment:
    return replace(segment, name=f"{segment.name} again", again=sum(segment.compute.values(), np.zeros_like(segment.seconds)))


def _tensor_seconds(spec: TrainingStep, cluster: Cluster, left: float) -> float:
    """One all-gather or reduce-scatter of a microbatch's residual stream over the tensor-parallel GPUs of a node, `left` of whose NVLink
    is there."""
    shards = spec.tensor_parallel
    moved = spec.tokens * spec.model.hidden_size * 2 * (shards - 1) / shards
    return cluster.nvlink_latency_seconds.value + moved / (cluster.nvlink_bytes_per_second.value * left) if shards > 1 else 0.0
