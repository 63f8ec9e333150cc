"""The tokens of a question: which trace is routed, and how its tokens are dealt over the GPUs."""

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from research.errors import ConfigError
from research.routing_trace import RoutingTrace
from sims.placement import Placement
from sims.routing import reroute, synthetic_trace

if TYPE_CHECKING:
    from sims.all_to_all import AllToAll

POOL = 16384
"""Tokens that are routed; a larger group draws its tokens from these."""
STRIDE = 7919
"""A prime: it walks through all layers and domains of a trace, so that every GPU sees the same kind of text."""


def routed(spec: "AllToAll", where: Placement, trace: RoutingTrace | None) -> RoutingTrace:
    """The trace as it is, re-routed where a limit in nodes is asked for, or one made up."""
    groups = where.nodes if spec.node_limit is not None and spec.node_limit < where.nodes else 1
    experts = trace.n_routed_experts if trace is not None else spec.n_routed_experts
    chosen = trace.num_experts_per_tok if trace is not None else spec.num_experts_per_tok
    if groups > 1:
        _check_node_limit(spec, where, experts, chosen)
    if trace is not None:
        if groups == 1:
            return trace
        return reroute(trace, trace.device_limit, node_groups=groups, node_limit=spec.node_limit, node_score=spec.node_score)
    tokens = min(POOL, where.devices * spec.tokens_per_device)
    if spec.routing == "balanced":
        tokens = _whole_orbits(spec.tokens_per_device, where.devices, experts, spec.routing_devices)
    return synthetic_trace(
        spec.routing,
        tokens=tokens,
        n_routed_experts=experts,
        num_experts_per_tok=chosen,
        expert_devices=spec.routing_devices,
        device_limit=spec.device_limit,
        seed=spec.seed,
        node_groups=groups,
        node_limit=spec.node_limit if groups > 1 else None,
        node_score=spec.node_score,
    )


def _whole_orbits(each: int, devices: int, experts: int, expert_devices: int) -> int:
    """Tokens of a balanced pool: whole orbits, which the group's tokens go through a whole number of times where that can be,
    and of which each GPU's own tokens hold as many images on each of the model's devices."""
    most, total = max(1, 2 * POOL // experts), each * devices
    fitting = [heads for heads in range(most, 0, -1) if total % (heads * experts) == 0]
    even = [heads for heads in fitting if each % (heads * expert_devices) == 0 and heads >= FEWEST_HEADS]
    heads = (even or fitting or [most])[0]
    return experts * (heads if heads >= FEWEST_HEADS or total < FEWEST_HEADS * experts else most)


FEWEST_HEADS = 32
"""Orbits of a balanced pool; with fewer, chance in the tokens that head them shows."""


def _check_node_limit(spec: "AllToAll", where: Placement, experts: int, chosen: int) -> None:
    """The rule's groups must be the nodes: equal runs of experts, each on one node."""
    node = where.node_index()[where.expert_device]
    if experts % where.nodes or (node != np.arange(experts) // (experts // where.nodes)).any():
        raise ConfigError(
            f"node_limit = {spec.node_limit}: needs the experts in equal runs on the {where.nodes} nodes of the group, which this placement does "
            "not give; use placement = packed, or limit devices (device_limit)"
        )
    limit = spec.node_limit or where.nodes
    if chosen > limit * (experts // where.nodes):
        raise ConfigError(f"node_limit = {limit}: {chosen} experts per token do not fit on {limit} nodes of {experts // where.nodes} experts")


def step_of(spec: "AllToAll", trace: RoutingTrace) -> int:
    steps = len(trace.steps)
    if not -steps <= spec.step < steps:
        raise ConfigError(f"step = {spec.step}: the trace has {steps} snapshots; valid: {-steps} to {steps - 1}")
    return spec.step


@lru_cache(maxsize=8)
def dealt(each: tuple[int, ...], pool: int, contiguous: bool) -> tuple[np.ndarray, np.ndarray]:
    """GPU s has each[s] tokens: float32 (G, U), how often it has each used token of the pool, and int64 (U,), which ones those are."""
    total = sum(each)
    drawn = (np.arange(total) if contiguous else np.arange(total) * STRIDE) % pool
    seen = np.zeros(pool, bool)
    seen[drawn] = True
    used = np.flatnonzero(seen)
    index = drawn if len(used) == pool else (np.cumsum(seen) - 1)[drawn]
    counts = np.bincount(np.repeat(np.arange(len(each)) * len(used), each) + index, minlength=len(each) * len(used))
    return counts.reshape(len(each), len(used)).astype(np.float32), used


def tokens_of(spec: "AllToAll", devices: int) -> tuple[int, ...]:
    """Tokens of each GPU: as many on all, or for `ragged` from half to one and a half times as many."""
    if spec.routing != "ragged" or devices == 1:
        return (spec.tokens_per_device,) * devices
    return tuple(int(n) for n in np.maximum(1, np.rint(spec.tokens_per_device * np.linspace(0.5, 1.5, devices))))
