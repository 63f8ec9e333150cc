"""Routing for the cluster model: made up, or a trained model's under another device limit.

Both go through `select_experts`, the model's own rule.
"""

from dataclasses import replace
from typing import Literal

import numpy as np

from research.routing_trace import RoutingTrace, select_experts

Family = Literal["random", "gaussian", "power-law", "hot-device"]


def synthetic_trace(
    family: Family, *, tokens: int, n_routed_experts: int, num_experts_per_tok: int, expert_devices: int, device_limit: int | None, seed: int = 0
) -> RoutingTrace:
    """One layer, one step.  Affinities are the softmax of unit Gaussian logits plus a bias per expert.

    random: no bias.  gaussian: bias of standard deviation 1.  power-law: log popularity -ln(rank) in a
    random order.  hot-device: the first device's experts gain 2.
    """
    random = np.random.default_rng(seed)
    logits = random.standard_normal((tokens, n_routed_experts))
    if family == "gaussian":
        logits += random.standard_normal(n_routed_experts)
    elif family == "power-law":
        logits -= np.log(random.permutation(n_routed_experts) + 1.0)
    elif family == "hot-device":
        logits[:, : n_routed_experts // expert_devices] += 2.0
    scores = np.exp(logits - logits.max(-1, keepdims=True))
    scores = (scores / scores.sum(-1, keepdims=True)).astype(np.float32)
    ids = select_experts(scores, num_experts_per_tok, expert_devices, device_limit)
    return RoutingTrace(
        expert_ids=ids[None, None].astype(np.int16),
        steps=np.array([0]),
        layers=np.array([0]),
        scores=scores[None],
        n_routed_experts=n_routed_experts,
        expert_devices=expert_devices,
        device_limit=device_limit,
    )


def reroute(trace: RoutingTrace, device_limit: int | None) -> RoutingTrace:
    """The last snapshot's affinities, routed under another device limit (None: unrestricted)."""
    ids = select_experts(trace.scores, trace.num_experts_per_tok, trace.expert_devices, device_limit)
    return replace(trace, expert_ids=ids[None].astype(np.int16), steps=trace.steps[-1:], device_limit=device_limit)
