"""A block's step in decoding, where the calls between its operations would take longer than the operations: two kernels instead.

Same values as `transformer.Block` up to rounding (`tests/research/test_decoding_steps.py`); whatever they do not know goes that way.
"""

import torch
from torch import Tensor, nn

from research.model.attention import FEW, MultiHeadLatentAttention, head_sizes
from research.model.cache import LayerCache, Place, PlainRows
from research.model.experts import RoutedExperts
from research.model.kernels import functions, native, steps
from research.model.layers import FeedForward, RMSNorm
from research.model.moe import MoE
from research.model.router import Routing


def usable(x: Tensor, attention: nn.Module, ffn: nn.Module, cache: LayerCache, place: Place) -> bool:
    """Whether `step` knows this block and these new tokens: MLA over rows that are kept as they are, SwiGLU, a gate, one worker."""
    if place.visible is None or x.shape[1] > FEW or x.shape[0] * x.shape[1] > functions.FEW_ROWS or torch.is_grad_enabled():
        return False
    if len(place.row) != place.positions.numel() or type(attention) is not MultiHeadLatentAttention:
        return False  # padding, which must not be written
    rows = (cache.first, cache.second)
    if not all(isinstance(kept, PlainRows) and kept.rows.dtype == torch.float32 == kept.dtype for kept in rows):
        return False
    if type(ffn) is MoE:
        known = ffn.gate is not None and type(ffn.experts) is RoutedExperts and ffn.config.gated_experts
        known = known and ffn.experts.activation is nn.functional.silu
    else:
        known = type(ffn) is FeedForward and _gated(ffn)
    return known and native.usable(x, attention.o_proj.weight)


def _gated(ffn: FeedForward) -> bool:
    return ffn.gate_proj is not None and ffn.activation is nn.functional.silu


def step(
    x: Tensor,
    norms: tuple[RMSNorm, RMSNorm],
    attention: nn.Module,
    ffn: MoE | FeedForward,
    table: Tensor,
    cache: LayerCache,
    place: Place,
) -> tuple[Tensor, Routing | None]:
    """x (B, T, D) behind the block, and the routing of an MoE layer."""
    x = x.clone(memory_format=torch.contiguous_format)
    before, behind = (steps.Norm(norm.weight, norm.eps) for norm in norms)
    latent, rope = cache.first, cache.second
    assert isinstance(latent, PlainRows)
    assert isinstance(rope, PlainRows)
    assert isinstance(attention, MultiHeadLatentAttention)
    a = attention
    if a.config.q_lora_rank is None:
        query = steps.Query(a.q_proj.weight)
    else:
        query = steps.Query(a.q_b_proj.weight, a.q_a_proj.weight, steps.Norm(a.q_a_layernorm.weight, a.q_a_layernorm.eps))
    kv_norm = steps.Norm(a.kv_a_layernorm.weight, a.kv_a_layernorm.eps)
    steps.latent_step(
        x, before, query, a.kv_a_proj_with_mqa.weight, kv_norm, a.kv_b_proj.weight, a.o_proj.weight,
        functions.turns(table), latent.rows, rope.rows, place.positions.contiguous(), place.end, head_sizes(a.config), a.scale,
    )  # fmt: skip
    if isinstance(ffn, FeedForward):
        steps.feed_forward_step(x, behind, None, _weights(ffn))
        return x, None
    assert ffn.gate is not None
    moe, devices = ffn.config, ffn.config.expert_devices
    experts = steps.Experts(
        ffn.gate.weight, ffn.experts.gate_up_proj, ffn.experts.down_proj,
        moe.num_experts_per_tok, devices, min(moe.device_limit or devices, devices), moe.routed_scaling_factor, moe.norm_topk_prob,
    )  # fmt: skip
    found = steps.feed_forward_step(x, behind, experts, None if ffn.shared_experts is None else _weights(ffn.shared_experts))
    assert found is not None
    ids, gates, scores = found
    return x, Routing(ids, gates, scores, torch.ones_like(ids, dtype=torch.bool))


def _weights(ffn: FeedForward) -> steps.Gated:
    assert ffn.gate_proj is not None
    return steps.Gated(ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight)
