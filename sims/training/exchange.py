"""What the routed experts of a layer cost an expert-parallel group: tokens for every GPU, and the seconds of its all-to-alls."""

from dataclasses import dataclass

import numpy as np

from research.config import MoEConfig
from research.errors import ConfigError
from research.routing_trace import RoutingTrace
from sims.cluster import Cluster
from sims.collective import Speed, collective_seconds, gpu_seconds, streams
from sims.constants import Constants
from sims.placement import Placement, place
from sims.routing import reroute, synthetic_trace
from sims.traffic import Traffic, needed_devices, payload_bytes, traffic_of
from sims.training.layout import group_per_node
from sims.training.spec import TrainingStep

POOL = 4096
"""Tokens whose routing is made up for one sample; GPUs with more tokens see them as often as it takes."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One layer of one microbatch.

    pairs: (token, expert) pairs that each GPU computes, float64 (G,), after dropping.  touched: experts with a token, int (G,).
    seconds, bytes: by `dispatch`, `combine`, `combine backward` (gradients on dispatch's ways), `dispatch backward`;
    isolated seconds (draws,), and NVLink and InfiniBand bytes that the average GPU sends.
    """

    pairs: np.ndarray
    touched: np.ndarray
    seconds: dict[str, np.ndarray]
    bytes: dict[str, tuple[int, int]]
    distinct_devices: float
    """GPUs that a token goes to, its own included."""
    traffic: dict[str, Traffic]
    """Byte matrices of the same four."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """The samples that microbatches and layers take turns in."""

    samples: tuple[Sample, ...]


def exchange(spec: TrainingStep, cluster: Cluster, constants: Constants, trace: RoutingTrace | None = None) -> Exchange | None:
    """None for a dense model.  ConfigError for a trace of another shape than the model's.

    A trace that was routed under another device limit than the model's is routed anew, from its affinities.
    """
    moe = spec.model.moe
    if moe is None:
        return None
    where = place(
        "packed",
        None,
        devices=spec.experts_over,
        nodes=-(-spec.experts_over // group_per_node(spec)),
        gpus_per_node=group_per_node(spec),
        n_routed_experts=moe.n_routed_experts,
    )
    return Exchange(tuple(_sample(spec, moe, cluster, constants, where, ids) for ids in _routings(spec, moe, trace)))


def _routings(spec: TrainingStep, moe: MoEConfig, trace: RoutingTrace | None) -> list[np.ndarray]:
    """Chosen experts, int (tokens, K), of each sample."""
    if trace is None:
        return _made_up(spec, moe)
    found = (trace.n_routed_experts, trace.num_experts_per_tok, trace.expert_devices)
    wanted = (moe.n_routed_experts, moe.num_experts_per_tok, moe.expert_devices)
    if found != wanted:
        raise ConfigError(f"trace: has (n_routed_experts, num_experts_per_tok, expert_devices) = {found}, the model has {wanted}")
    if trace.device_limit != moe.device_limit:
        trace = reroute(trace, moe.device_limit)
    last = trace.expert_ids[-1]
    return [last[i % len(last)] for i in range(max(spec.routing_samples, len(last)))]


def _made_up(spec: TrainingStep, moe: MoEConfig) -> list[np.ndarray]:
    """`balanced` once, a family that moves from step to step as its snapshots, any other with a seed for each sample."""
    tokens = POOL if spec.routing != "balanced" else max(POOL // moe.n_routed_experts, 16) * moe.n_routed_experts
    moving = spec.routing in ("rotating", "burst")
    seeds = [spec.seed] if moving or spec.routing == "balanced" else range(spec.seed, spec.seed + spec.routing_samples)
    made = [
        synthetic_trace(
            spec.routing,
            tokens=tokens,
            n_routed_experts=moe.n_routed_experts,
            num_experts_per_tok=moe.num_experts_per_tok,
            expert_devices=moe.expert_devices,
            device_limit=moe.device_limit,
            seed=seed,
            steps=spec.routing_samples if moving else 1,
        )
        for seed in seeds
    ]
    return [ids[0] for trace in made for ids in trace.expert_ids]


def _sample(spec: TrainingStep, moe: MoEConfig, cluster: Cluster, constants: Constants, where: Placement, ids: np.ndarray) -> Sample:
    group, pool = spec.experts_over, len(ids)
    # Every GPU has the same number of tokens, spread over the pool from a place of its own.
    counts = np.zeros((group, pool), np.float32)
    for gpu in range(group):
        tokens = (np.arange(spec.tokens) + gpu * spec.tokens) % pool
        counts[gpu] = np.bincount(tokens, minlength=pool)
    needed = needed_devices(ids, where.expert_device, group)
    load = np.bincount(ids.ravel(), np.repeat(counts.sum(0), ids.shape[1]), minlength=moe.n_routed_experts)
    if spec.routing == "balanced":
        load = np.full(moe.n_routed_experts, load.mean())
    there = traffic_of(counts, needed, where, payload_bytes(spec.model.hidden_size, spec.dispatch_bits))
    gradients = payload_bytes(spec.model.hidden_size, 16)
    back = there.reverse(payload_bytes(spec.model.hidden_size, spec.combine_bits))
    ways = {
        "dispatch": there,
        "combine": back,
        "combine backward": there.resized(gradients),
        "dispatch backward": back.resized(gradients),
    }
    pairs = np.bincount(where.expert_device, load, minlength=group)
    touched = np.bincount(where.expert_device, load > 0, minlength=group)
    return Sample(
        _kept(pairs, moe),
        touched,
        {name: way_seconds(name, way, spec, cluster, constants) for name, way in ways.items()},
        {name: (int(way.nvlink.sum() / group), int(way.infiniband.sum() / group)) for name, way in ways.items()},
        float(needed.sum(1).mean()),
        ways,
    )


def way_seconds(name: str, way: Traffic, spec: TrainingStep, cluster: Cluster, constants: Constants, speed: Speed | None = None) -> np.ndarray:
    """Isolated seconds of an all-to-all, float64 (draws,), over links of which `speed` is left."""
    # Counts are exchanged once per layer and microbatch, before the first dispatch.
    return collective_seconds(way, cluster, constants, sms=spec.communication_sms, notify=name == "dispatch", speed=speed)


def slow_link(way: Traffic, spec: TrainingStep, cluster: Cluster, constants: Constants, speed: Speed) -> tuple[int, str]:
    """The device that an all-to-all is done with last, and its busiest stream, at the point estimate."""
    found = streams(way, cluster, constants, sms=spec.communication_sms, speed=speed)
    device = int(gpu_seconds(found, constants)[0].argmax())
    return device, max(found, key=lambda stream: float(found[stream][0, device]))


def _kept(pairs: np.ndarray, moe: MoEConfig) -> np.ndarray:
    """Pairs left on each GPU when those above its budget are dropped, but for the share of the sequences that is spared."""
    if moe.capacity_factor is None:
        return pairs
    over = np.maximum(pairs - moe.capacity_factor * pairs.mean(), 0.0)
    spared = moe.undropped_sequences if moe.capacity_of == "device" else 0.0
    return pairs - np.minimum(over, (1.0 - spared) * pairs)
