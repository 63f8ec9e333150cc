"""Routing statistics of a batch, from the routings that the model returned."""

from collections.abc import Mapping

import torch
from torch import Tensor

from research.config import MoEConfig
from research.model.balance import BalanceLosses, devices_reached
from research.model.router import Routing
from research.training import records


def violation(load: Tensor) -> Tensor:
    """Maximal violation, (largest load - mean load) / mean load."""
    load = load.float()
    return (load.max() - load.mean()) / load.mean()


@torch.no_grad()
def routing_metrics(routings: Mapping[int, Routing], losses: Mapping[int, BalanceLosses], config: MoEConfig) -> dict[str, float]:
    """Means over the MoE layers, and the maximal violation of each layer under its own name."""
    metrics: dict[str, float] = {}
    columns: dict[str, list[float]] = {}
    for layer, routing in routings.items():
        expert = torch.bincount(routing.expert_ids_MK.flatten(), minlength=config.n_routed_experts)
        device = expert.view(config.expert_devices, -1).sum(1)
        values = {
            records.BALANCE_EXPERT: losses[layer].expert,
            records.BALANCE_DEVICE: losses[layer].device,
            records.BALANCE_COMMUNICATION: losses[layer].communication,
            records.DISTINCT_DEVICES: devices_reached(routing.expert_ids_MK, config).sum(-1).mean(),
            records.EXPERT_VIOLATION: violation(expert),
            records.DEVICE_VIOLATION: violation(device),
            records.DROPPED_SHARE: 1 - routing.kept_MK.float().mean(),
        }
        for name, value in values.items():
            columns.setdefault(name, []).append(float(value))
        metrics[f"{records.EXPERT_VIOLATION}/layer_{layer}"] = float(values[records.EXPERT_VIOLATION])
    return {name: sum(column) / len(column) for name, column in columns.items()} | metrics
