"""The routing trace of a run: how the same held-out tokens are routed as the model learns."""

from collections.abc import Mapping

import numpy as np
import torch

from research.config import RunConfig
from research.data.batches import heldout_batches
from research.data.packing import documents
from research.data.prepare import PreparedData
from research.model.router import Routing
from research.model.transformer import Transformer
from research.parallel.world import ALONE, World
from research.routing_trace import RoutingTrace

TRACE_TOKENS = 2048


def snapshot(model: Transformer, config: RunConfig, data: PreparedData, world: World = ALONE) -> np.ndarray:
    """int16 (L, M, K): the experts of the held-out tokens now; empty for a model without any."""
    routings = _held_out_routings(model, config, data, world)
    if not routings:
        return np.zeros((0, 0, 0), np.int16)
    return np.stack([r.expert_ids_MK.cpu().numpy() for r in routings.values()]).astype(np.int16)


def routing_trace(
    model: Transformer, config: RunConfig, data: PreparedData, snapshots: Mapping[int, np.ndarray], world: World = ALONE
) -> RoutingTrace:
    """All snapshots (step -> experts), and the affinities that the model has now."""
    assert config.model.moe is not None
    scores = np.stack([r.scores_ME.cpu().numpy() for r in _held_out_routings(model, config, data, world).values()])
    return RoutingTrace(
        expert_ids=np.stack([snapshots[s] for s in sorted(snapshots)]),
        steps=np.array(sorted(snapshots)),
        layers=np.array(config.model.moe_layers),
        scores=scores.astype(np.float16),
        n_routed_experts=config.model.moe.n_routed_experts,
        expert_devices=config.model.moe.expert_devices,
        device_limit=config.model.moe.device_limit,
    )


@torch.no_grad()
def _held_out_routings(model: Transformer, config: RunConfig, data: PreparedData, world: World) -> dict[int, Routing]:
    """Routing of the same TRACE_TOKENS held-out tokens, taken from every domain alike."""
    per_domain = max(TRACE_TOKENS // len(data.domains), config.data.sequence_length)
    windows = [w for d in data.domains for w in heldout_batches(data, config.data, domain=d, max_tokens=per_domain)]
    ids = torch.from_numpy(np.concatenate(windows)[:, :-1].copy()).to(model.lm_head.weight.device)
    own = world.padded_share(ids)
    routings = model(own, documents=documents(data, config.data, own)).routings
    return {layer: Routing(*(world.gather(t)[: ids.numel()] for t in routing)) for layer, routing in routings.items()}
