"""A training step in closed form: the longest path through the pipeline's graph, over all draws of the constants at once."""

from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations

import numpy as np

from research.routing_trace import RoutingTrace
from sims.cluster import Cluster
from sims.constants import Constants
from sims.roofline import KINDS
from sims.training.exchange import Exchange, exchange
from sims.training.health import Stages, units_alike, worst_links
from sims.training.layout import gpu_index, group_per_node, stage_layers, stage_parameters
from sims.training.passes import Layers, Segment, side_by_side
from sims.training.schedules import Job, graph, longest_path, orders, stages_of
from sims.training.spec import TrainingStep

CATEGORIES = (*KINDS, "exposed_communication", "waiting", "uneven_stages", "bubble", "pipeline_sends", "gradients", "optimizer")
"""What the seconds of a step are spent on: they sum to it."""
ADAM_BYTES = 30.0
"""Read and written per parameter of a ZeRO-1 shard: float32 weight, two moments, and the gradient read, the bfloat16 weight written."""
GRADIENT_BYTES, WEIGHT_BYTES = 4.0, 2.0
"""Of a reduced gradient (accumulated and reduced in float32) and of a gathered weight."""


@dataclass(slots=True)
class Unit:
    """The pipelines of one expert-parallel group, and `copies` of them that are alike.

    ends: when each position is done with its jobs.  tails: reduction of gradients that is left, optimizer, all-gather.
    """

    index: int
    copies: int
    work: "Work"
    ends: list[np.ndarray]
    ends_without_sends: list[np.ndarray]
    gradients: list[np.ndarray]
    optimizer: list[np.ndarray]
    sends: dict[tuple[int, int], np.ndarray]
    """From position to position, where a link is degraded; all others are the step's `send`."""

    def seconds(self) -> np.ndarray:
        return np.maximum.reduce([e + g + o for e, g, o in zip(self.ends, self.gradients, self.optimizer, strict=True)])

    def seconds_without_sends(self) -> np.ndarray:
        return np.maximum.reduce([e + g + o for e, g, o in zip(self.ends_without_sends, self.gradients, self.optimizer, strict=True)])


class Work:
    """Segments and seconds of every job of a unit."""

    def __init__(self, spec: TrainingStep, layers: Layers, stages: Stages) -> None:
        self.spec, self.layers, self.health = spec, layers, stages
        self.samples = len(layers.exchange.samples) if layers.exchange else 1
        self.stages = stage_layers(spec)
        self.segments = cache(self._segments)
        self.total = cache(self._total)

    def of(self, job: Job) -> list[Segment]:
        """What the job does, phase by phase."""
        if job.kind == "FB":
            return [self._together(job.stage, job.microbatch % self.samples, job.back_stage, job.back_microbatch % self.samples)]
        return self.segments(job.kind, job.stage, job.microbatch % self.samples)

    def seconds(self, job: Job) -> np.ndarray:
        """float64 (draws,)."""
        if job.kind == "FB":
            return self.of(job)[0].seconds
        return self.total(job.kind, job.stage, job.microbatch % self.samples)

    def _total(self, kind: str, stage: int, sample: int) -> np.ndarray:
        return np.sum([segment.seconds for segment in self.segments(kind, stage, sample)], axis=0)

    def _segments(self, kind: str, stage: int, sample: int) -> list[Segment]:
        if kind == "BW":
            return [*self.segments("B", stage, sample), *self.segments("W", stage, sample)]
        phase = {"F": "forward", "B": "backward-input", "W": "backward-weights"}[kind]
        layers, model = self.stages[stage], self.spec.model
        ends = self.layers.ends(phase, self.health[stage], first=stage == 0, last=stage == len(self.stages) - 1)
        first, last = [s for s in ends if s.name == "embedding"], [s for s in ends if s.name == "head"]
        inner: list[Segment] = []
        for layer in layers if kind == "F" else reversed(layers):
            # Any layer of the same kind stands for it, so that each kind is computed once.
            alike = next(i for i in range(model.num_hidden_layers) if model.is_moe_layer(i) == model.is_moe_layer(layer))
            routing = (sample + layer) % self.samples if model.is_moe_layer(layer) else 0
            inner += [replace(segment, layer=layer) for segment in self.layers.layer(alike, phase, routing, self.health[stage])]
        return [*first, *inner, *last] if kind == "F" else [*last, *inner, *first]

    @cache  # noqa: B019 - a Work lives as long as the simulation
    def _together(self, stage: int, sample: int, back_stage: int, back_sample: int) -> Segment:
        """A forward and a whole backward pass whose communication hides behind each other's products."""
        parts = [*self.segments("F", stage, sample), *self.segments("BW", back_stage, back_sample)]
        zero = np.zeros_like(self.layers.bandwidth)
        waiting = zero + sum(p.waiting for p in parts)
        kinds: dict[str, np.ndarray] = {kind: sum((p.compute[kind] for p in parts if kind in p.compute), zero) for kind in KINDS}
        busy = sum(kinds.values(), zero) + waiting
        alone = zero + sum(p.communication for p in parts)
        seconds = side_by_side(busy, alone, self.layers.bandwidth, self.layers.sms) if np.any(alone) else busy
        return Segment(
            "forward and backward",
            "compute",
            seconds,
            kinds,
            waiting,
            seconds - busy,
            alone,
            zero + sum(p.again for p in parts),
            next((p.slowest for p in parts if p.slowest >= 0), -1),
            sum(p.nvlink_bytes for p in parts),
            sum(p.infiniband_bytes for p in parts),
        )


@dataclass(slots=True)
class Step:
    """All units, the seconds of the step, float64 (draws,), and what they are spent on: a mean over GPUs that sums to them.

    communication: of all-to-alls and tensor parallelism of the average GPU, isolated, hidden or not.  send: from one stage to the next.
    """

    units: list[Unit]
    seconds: np.ndarray
    breakdown: dict[str, np.ndarray]
    communication: np.ndarray
    recomputation: np.ndarray
    send: np.ndarray
    exchange: Exchange | None


def closed_form(spec: TrainingStep, cluster: Cluster, constants: Constants, trace: RoutingTrace | None = None) -> Step:
    """The whole step.  ConfigError for a trace that does not fit the model."""
    found = exchange(spec, cluster, constants, trace)
    layers = Layers(spec, cluster, constants, found)
    send = send_seconds(spec, cluster, constants)
    alike = units_alike(spec)
    common = worst_links(alike)
    units = [_unit(spec, cluster, constants, Work(spec, layers, stages), index, copies, common, send) for index, copies, stages in alike]
    seconds = np.maximum.reduce([unit.seconds() for unit in units])
    return _accounted(spec, units, seconds, send, found)


def _unit(
    spec: TrainingStep,
    cluster: Cluster,
    constants: Constants,
    work: Work,
    index: int,
    copies: int,
    common: list[tuple[float, float]],
    send: np.ndarray,
) -> Unit:
    steps, zero = graph(spec.schedule, spec.stages, spec.microbatches), np.zeros_like(send)
    sends = _slow_sends(spec, cluster, constants, work.health)
    ends = [zero + e for e in longest_path(steps, spec.stages, work.seconds, send, sends)]
    without = [zero + e for e in longest_path(steps, spec.stages, work.seconds)] if spec.stages > 1 else ends
    tails = [_tail(spec, cluster, constants, work, position, common) for position in range(spec.stages)]
    return Unit(index, copies, work, ends, without, [t[0] for t in tails], [t[1] for t in tails], sends)


def _slow_sends(spec: TrainingStep, cluster: Cluster, constants: Constants, stages: Stages) -> dict[tuple[int, int], np.ndarray]:
    """Seconds of sends between positions of which one has a degraded link; all others take `send_seconds`."""
    worst = [health.worst for health in stages]
    pairs = [(a, b) for a, b in permutations(range(spec.stages), 2) if min(*worst[a], *worst[b]) < 1]
    return {(a, b): send_seconds(spec, cluster, constants, min(worst[a][0], worst[b][0]), min(worst[a][1], worst[b][1])) for a, b in pairs}


def _tail(
    spec: TrainingStep, cluster: Cluster, constants: Constants, work: Work, position: int, common: list[tuple[float, float]]
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of reducing gradients and gathering weights that stand free, and of the optimizer.

    ZeRO-1: gradients are reduced to the rank that holds their optimizer state, which sends the new weights back.  The
    reduction runs beside the backward pass of the last microbatch, at the bandwidth that overlapped communication has.
    """
    held = stages_of(spec.schedule, spec.stages, position)
    copies = len(held)  # DualPipe keeps each stage at two positions, whose gradients are added up, too
    alike, experts = np.sum([parameters(spec, stage) for stage in held], axis=0)
    groups = ((alike, spec.data_parallel * copies, _per_node(spec, experts=False)), (experts, spec.units * copies, _per_node(spec, experts=True)))
    zero, left = np.zeros(constants.draws), (min(common[stage][0] for stage in held), min(common[stage][1] for stage in held))
    reduce = sum((_ring(GRADIENT_BYTES * count, n, near, cluster, constants, *left) for count, n, near in groups), zero)
    gather = sum((_ring(WEIGHT_BYTES * count, n, near, cluster, constants, *left) for count, n, near in groups), zero)
    if spec.gradient_overlap:
        window = np.sum([work.total("BW", stage, (spec.microbatches - 1) % work.samples) for stage in held], axis=0) / copies
        reduce = np.maximum(reduce - work.layers.bandwidth * window, 0.0)
    state = alike / (spec.data_parallel * copies) + experts / (spec.units * copies)
    slowest = max(max(work.health[stage].speeds) for stage in held)
    optimizer = slowest * ADAM_BYTES * state / (cluster.hbm_bytes_per_second.value * constants["memory_efficiency"])
    return reduce + gather, optimizer


def parameters(spec: TrainingStep, stage: int) -> tuple[float, float]:
    """Parameters of one GPU of a stage: alike on all data-parallel ranks, and of its own routed experts."""
    layers = stage_layers(spec)[stage]
    alike, experts = stage_parameters(spec.model, layers, first=stage == 0, last=stage == spec.stages - 1, expert_parallel=spec.experts_over)
    return alike / spec.tensor_parallel, experts / spec.tensor_parallel


def _per_node(spec: TrainingStep, *, experts: bool) -> int:
    """GPUs of one gradient-reduction group that share a node."""
    slots = spec.gpus_per_node // spec.tensor_parallel
    if experts:
        return min(spec.units, max(slots // group_per_node(spec), 1))
    return min(spec.data_parallel, slots if spec.placement != "spread" else min(spec.units, slots))


def _ring(moved: float, ranks: int, near: int, cluster: Cluster, constants: Constants, nic: float, nvlink: float) -> np.ndarray:
    """Reduce-scatter or all-gather of `moved` bytes over `ranks` GPUs, `near` of them in a node: first inside, then, each GPU
    with its share, over its own NIC.  It goes at the pace of the link of which least is left, the shares `nic` and `nvlink`."""
    zero = np.zeros(constants.draws)
    near = max(min(near, ranks), 1)
    nodes = -(-ranks // near)
    if ranks == 1 or not moved:
        return zero
    inside = (near - 1) / near * moved / (cluster.nvlink_bytes_per_second.value * constants["nvlink_efficiency"] * nvlink)
    between = (nodes - 1) / nodes * moved / near / (cluster.nic_bytes_per_second.value * constants["nic_efficiency"] * nic)
    latency = (near - 1) * cluster.nvlink_latency_seconds.value + (nodes - 1) * cluster.network_latency_seconds.value
    return inside + between + latency


def send_seconds(spec: TrainingStep, cluster: Cluster, constants: Constants, nic: float = 1.0, nvlink: float = 1.0) -> np.ndarray:
    """A microbatch's residual stream from one stage to the next, float64 (draws,): over NICs where any two stages are on different nodes.

    nic, nvlink: shares that are left of the worse of the two ends' links.
    """
    if spec.stages == 1:
        return np.zeros(constants.draws)
    moved = spec.tokens * spec.model.hidden_size * WEIGHT_BYTES / spec.tensor_parallel
    homes = [gpu_index(spec, stage, 0, 0) // spec.gpus_per_node for stage in range(spec.stages)]
    if len(set(homes)) > 1:
        return cluster.network_latency_seconds.value + moved / (cluster.nic_bytes_per_second.value * constants["nic_efficiency"] * nic)
    return cluster.nvlink_latency_seconds.value + moved / (cluster.nvlink_bytes_per_second.value * constants["nvlink_efficiency"] * nvlink)


def _accounted(spec: TrainingStep, units: list[Unit], seconds: np.ndarray, send: np.ndarray, found: Exchange | None) -> Step:
    """The breakdown: for each GPU what it did, and the rest as uneven stages (what the busiest position has more), time that
    sending costs the whole, and bubble."""
    zero = np.zeros_like(seconds)
    sums, communication, again = dict.fromkeys(CATEGORIES, zero), zero, zero
    occupied: list[tuple[float, np.ndarray]] = []
    for unit in units:
        weight = unit.copies / (spec.units * spec.stages)
        for position, jobs in enumerate(orders(spec.schedule, spec.stages, spec.microbatches)):
            total = unit.gradients[position] + unit.optimizer[position]
            sums["gradients"] = sums["gradients"] + weight * unit.gradients[position]
            sums["optimizer"] = sums["optimizer"] + weight * unit.optimizer[position]
            for job, count in _counted(jobs, unit.work.samples).items():
                for segment in unit.work.of(job):
                    share = weight * count
                    for kind, value in segment.compute.items():
                        sums[kind] = sums[kind] + share * value
                    sums["waiting"] = sums["waiting"] + share * segment.waiting
                    sums["exposed_communication"] = sums["exposed_communication"] + share * segment.exposed
                    communication = communication + share * segment.communication
                    again = again + share * segment.again
                    total = total + count * segment.seconds
            occupied.append((weight, total))
    busiest = np.maximum.reduce([total for _, total in occupied])
    mean = sum((weight * total for weight, total in occupied), zero)
    without = np.maximum.reduce([unit.seconds_without_sends() for unit in units])
    sums |= {"uneven_stages": busiest - mean, "pipeline_sends": seconds - without, "bubble": without - busiest}
    return Step(units, seconds, sums, communication, again, send, found)


def _counted(jobs: list[Job], samples: int) -> dict[Job, int]:
    """Jobs that take the same time, with their number."""
    counts: dict[Job, int] = {}
    for job in jobs:
        alike = job._replace(microbatch=job.microbatch % samples, back_microbatch=job.back_microbatch % samples if job.kind == "FB" else -1)
        counts[alike] = counts.get(alike, 0) + 1
    return counts
