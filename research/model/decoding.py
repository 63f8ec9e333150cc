"""All blocks of a model in one call while it decodes, where the calls between their operations would take longer than the operations.

Same values as `transformer.Block` up to rounding (`tests/research/test_decoding_steps.py`); whatever is not known here goes that way.
"""

import operator
from typing import Any

import torch
from torch import Tensor, nn

from research.model.attention import FEW, MultiHeadLatentAttention, head_sizes
from research.model.cache import Cache, LayerCache, Place, PlainRows
from research.model.experts import RoutedExperts
from research.model.kernels import attending, functions, native, steps
from research.model.layers import FeedForward, RMSNorm
from research.model.moe import MoE
from research.model.router import Routing


def prepared(layers: nn.ModuleList, x: Tensor, cache: Cache, place: Place) -> "Blocks | None":
    """These blocks over this cache, if they and the new tokens x (B, T, D) are known here: MLA over rows that are kept as they are,
    SwiGLU, a gate, one worker, few tokens and no padding, which must not be written, no gradients.

    They are prepared once and kept in the cache, until a part of the model is another or lies elsewhere.
    """
    few = x.shape[1] <= FEW and x.shape[0] * x.shape[1] <= functions.FEW_ROWS
    if not (few and place.behind and place.real is None) or torch.is_grad_enabled() or not native.usable(x):
        return None
    if isinstance(cache.prepared, Blocks) and cache.prepared.stand(layers, cache):
        return cache.prepared
    cache.prepared = Blocks(layers, cache) if all(map(_known, layers, cache.layers)) else None
    return cache.prepared


def _known(block: Any, cache: LayerCache) -> bool:
    attention, ffn, rows = block.self_attn, block.mlp, (cache.first, cache.second)
    if type(attention) is not MultiHeadLatentAttention or not native.usable(attention.o_proj.weight):
        return False
    if not all(isinstance(kept, PlainRows) and kept.rows.dtype == torch.float32 == kept.dtype for kept in rows):
        return False
    if type(ffn) is not MoE:
        return type(ffn) is FeedForward and ffn.gate_proj is not None and ffn.activation is nn.functional.silu
    experts = ffn.experts
    return ffn.gate is not None and type(experts) is RoutedExperts and ffn.config.gated_experts and experts.activation is nn.functional.silu


class Blocks:
    """Blocks that are known, by the addresses of their weights and rows."""

    def __init__(self, layers: nn.ModuleList, cache: Cache) -> None:
        self._layers, self._kept = layers, list(cache.layers)
        self._routed = [index for index, block in enumerate(layers) if isinstance(block.mlp, MoE)]
        places = [where for module in layers.modules() for where in (module._parameters, module._modules)]
        self._parts = [(where, name, part) for where in places for name, part in where.items()]
        self._addresses = [(part.data_ptr, part.data_ptr()) for _, _, part in self._parts if isinstance(part, Tensor)]
        self._steps = steps.Steps([(_attention(block, kept), _ffn(block)) for block, kept in zip(layers, cache.layers, strict=True)])

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of a cache prepares its own: these addresses are of the first one's rows."""
        return type(None), ()

    def stand(self, layers: nn.ModuleList, cache: Cache) -> bool:
        """Whether these are the blocks, part by part, where they were, and the cache's layers."""
        same = layers is self._layers and all(map(operator.is_, cache.layers, self._kept))
        same = same and all(where.get(name) is part for where, name, part in self._parts)
        return same and all(address() == was for address, was in self._addresses)

    def step(self, x: Tensor, table: Tensor, place: Place) -> tuple[Tensor, dict[int, Routing]]:
        """x (B, T, D) behind the last block, and the routings by layer index."""
        x = x.clone(memory_format=torch.contiguous_format)
        ids, gates, scores = self._steps(x, attending.turns(table), place.positions.contiguous(), place.end)
        kept = torch.ones_like(ids, dtype=torch.bool)
        return x, dict(zip(self._routed, map(Routing, ids.unbind(), gates.unbind(), scores.unbind(), kept.unbind()), strict=True))


def _norm(norm: RMSNorm) -> steps.Norm:
    return steps.Norm(norm.weight, norm.eps)


def _attention(block: Any, cache: LayerCache) -> steps.Latent:
    latent, rope, a = cache.first, cache.second, block.self_attn
    assert isinstance(latent, PlainRows)
    assert isinstance(rope, PlainRows)
    if a.config.q_lora_rank is None:
        query = steps.Query(a.q_proj.weight)
    else:
        query = steps.Query(a.q_b_proj.weight, a.q_a_proj.weight, _norm(a.q_a_layernorm))
    return steps.Latent(
        _norm(block.input_layernorm), query, a.kv_a_proj_with_mqa.weight, _norm(a.kv_a_layernorm), a.kv_b_proj.weight, a.o_proj.weight,
        latent.rows, rope.rows, head_sizes(a.config), a.scale,
    )  # fmt: skip


def _ffn(block: Any) -> steps.FeedForward:
    ffn, norm = block.mlp, _norm(block.post_attention_layernorm)
    if isinstance(ffn, FeedForward):
        return steps.FeedForward(norm, None, _gated(ffn))
    moe, devices = ffn.config, ffn.config.expert_devices
    experts = steps.Experts(
        ffn.gate.weight, ffn.experts.gate_up_proj, ffn.experts.down_proj,
        moe.num_experts_per_tok, devices, min(moe.device_limit or devices, devices), moe.routed_scaling_factor, moe.norm_topk_prob,
    )  # fmt: skip
    return steps.FeedForward(norm, experts, None if ffn.shared_experts is None else _gated(ffn.shared_experts))


def _gated(ffn: FeedForward) -> steps.Gated:
    assert ffn.gate_proj is not None
    return steps.Gated(ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight)
