"""Who goes where: the gate's decision as a pure function.  Its slow twin is `research.routing_trace.select_experts`."""

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from research.config import MoEConfig
from research.model.kernels import functions, native
from research.model.layers import at_least_float32


class Routing(NamedTuple):
    """The decision for M tokens in one MoE layer.

    expert_ids_MK: chosen routed experts, best first.
    gates_MK: their weights, affinities (scaled to a sum of 1 with `norm_topk_prob`; 1 / K of hashed experts) times
    `routed_scaling_factor`, 0 where dropped.
    scores_ME: affinities s (V2 equation 22), softmax over all routed experts (of hashed ones 1 / K where chosen), float32 or wider.
    kept_MK: False where the capacity of a device or an expert, or chance, took the assignment away.
    """

    expert_ids_MK: Tensor
    gates_MK: Tensor
    scores_ME: Tensor
    kept_MK: Tensor


class Decided(NamedTuple):
    """What dropping and chance have taken already, by layer: kept (M, K) of the tokens of a pass, as found on the whole batch of
    which they are a part.  Stands for the sequences to protect where a batch goes through the model in smaller parts."""

    kept: dict[int, Tensor]

    def part(self, start: int, stop: int) -> "Decided":
        """Of the tokens from `start` to `stop`."""
        return Decided({layer: kept_MK[start:stop] for layer, kept_MK in self.kept.items()})

    def apply(self, routing: Routing, layer: int) -> Routing:
        kept_MK = self.kept[layer]
        return routing._replace(gates_MK=routing.gates_MK * kept_MK, kept_MK=kept_MK)


def choose(scores_ME: Tensor, config: MoEConfig) -> Tensor:
    """Device-limited top-K (V2 section 2.2.2): ids (M, K) of scores (M, E), best first.

    The device_limit devices with the highest single affinity are kept, then the top K inside them.
    """
    devices, limit = config.expert_devices, config.device_limit
    if native.usable(scores_ME):
        return functions.choose_experts(scores_ME, devices, min(limit or devices, devices), config.num_experts_per_tok)
    if limit is not None and limit < devices:
        grouped = scores_ME.unflatten(-1, (devices, -1))
        reachable = grouped.amax(-1).topk(limit, -1).indices
        unreachable = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=scores_ME.device).scatter_(-1, reachable, False)
        scores_ME = grouped.masked_fill(unreachable[..., None], -math.inf).flatten(-2)
    return scores_ME.topk(config.num_experts_per_tok, -1).indices


def route(logits_ME: Tensor, config: MoEConfig, chance: torch.Generator | None = None) -> Routing:
    """The gate (V2 equations 21 and 22), in float32 at least; weights sum to 1 only with `norm_topk_prob`.

    With `chance` (training) and `second_expert: by_chance`, a token's second expert is kept with probability
    min(1, 2 g_2) (GShard, algorithm 1); without it, always.
    """
    scores = at_least_float32(logits_ME).softmax(-1)
    ids = choose(scores.detach(), config)
    gates = scores.gather(-1, ids)
    if config.norm_topk_prob:
        gates = gates / gates.sum(-1, keepdim=True)
    kept = torch.ones_like(ids, dtype=torch.bool)
    if config.second_expert == "by_chance" and chance is not None:
        kept[:, 1] = torch.rand(len(ids), generator=chance, device=ids.device) < 2 * gates[:, 1].detach()
        gates = gates * kept
    return Routing(ids, gates * config.routed_scaling_factor, scores, kept)


def hash_table(vocab_size: int, config: MoEConfig, layer: int) -> Tensor:
    """int64 (vocabulary, K): the experts of every token id, distinct, equally many ids for each expert (Roller et al. 2021)."""
    first = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(layer), device="cpu") % config.n_routed_experts
    return (first[:, None] + torch.arange(config.num_experts_per_tok, device="cpu")) % config.n_routed_experts


def route_by_hash(token_ids_M: Tensor, table: Tensor, config: MoEConfig, dtype: torch.dtype) -> Routing:
    """The experts that `table` holds for each token, with equal weights; as affinities, those weights."""
    ids = table.to(token_ids_M.device)[token_ids_M]
    gates = torch.full(ids.shape, 1 / config.num_experts_per_tok, dtype=dtype, device=ids.device)
    scores = torch.zeros(len(ids), config.n_routed_experts, dtype=dtype, device=ids.device).scatter_(-1, ids, gates)
    return Routing(ids, gates * config.routed_scaling_factor, scores, torch.ones_like(ids, dtype=torch.bool))


def _capacity(factor: float, assignments: int, places: int) -> int:
    """Assignments that one of `places` takes: factor times the average, rounded up (and 1.1 is eleven tenths, not a little more)."""
    return math.ceil(Fraction(str(factor)) * assignments / places)


def drop(routing: Routing, config: MoEConfig, protected_M: Tensor) -> Routing:
    """What training drops under `capacity_of`; nothing without a capacity factor."""
    if config.capacity_factor is None:
        return routing
    return drop_over_capacity(routing, config, protected_M) if config.capacity_of == "device" else drop_latecomers(routing, config)


def drop_latecomers(routing: Routing, config: MoEConfig) -> Routing:
    """Expert capacity as in Switch and GShard: each expert takes its first assignments up to capacity_factor M K / E.

    All first choices come before all second ones, each in the order of the tokens; assignments that
    chance has dropped already take no place.
    """
    assert config.capacity_factor is not None
    tokens, chosen = routing.expert_ids_MK.shape
    capacity = _capacity(config.capacity_factor, tokens * chosen, config.n_routed_experts)
    expert = torch.where(routing.kept_MK, routing.expert_ids_MK, config.n_routed_experts).T.flatten()
    order = expert.argsort(stable=True)
    load = torch.bincount(expert, minlength=config.n_routed_experts + 1)
    start = load.cumsum(0) - load
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device) - start[expert[order]]
    kept = routing.kept_MK & (rank < capacity).view(chosen, tokens).T
    return routing._replace(gates_MK=routing.gates_MK * kept, kept_MK=kept)


def drop_over_capacity(routing: Routing, config: MoEConfig, protected_M: Tensor) -> Routing:
    """Device-level token dropping (V2 section 2.2.4).

    A device's budget is capacity_factor times the average load, in (token, expert) assignments.  Where
    more arrive, those of lowest affinity are dropped until the budget is met.  Tokens of protected
    sequences (`protected_M` true) are never dropped, though they take their share of the budget.
    """
    assert config.capacity_factor is not None
    tokens, chosen = routing.expert_ids_MK.shape
    budget = _capacity(config.capacity_factor, tokens * chosen, config.expert_devices)
    device = (routing.expert_ids_MK // config.experts_per_device).flatten()
    affinity = routing.scores_ME.detach().gather(-1, routing.expert_ids_MK)
    affinity = affinity.masked_fill(protected_M[:, None], math.inf).flatten()
    by_affinity = affinity.argsort(descending=True, stable=True)
    order = by_affinity[device[by_affinity].argsort(stable=True)]
    load = torch.bincount(device, minlength=config.expert_devices)
    start = load.cumsum(0) - load
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device) - start[device[order]]
    kept = (rank < budget).view(tokens, chosen) | protected_M[:, None]
    return routing._replace(gates_MK=routing.gates_MK * kept, kept_MK=kept)
