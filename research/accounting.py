"""Closed forms: parameters, cached elements, FLOPs and bytes of a model that need not be built.

They are checked against the module itself on torch's meta device, to the last parameter.
"""

import math

from research.config import KV_BITS, AttentionConfig, ModelConfig


def attention_parameters(attention: AttentionConfig, hidden_size: int) -> int:
    """Parameters of one attention layer, the RMSNorm gains of its latents included."""
    d, a, heads = hidden_size, attention, attention.num_attention_heads
    out = heads * a.v_head_dim * d
    if a.kind != "mla":
        groups = a.key_value_heads
        return d * heads * a.qk_head_dim + d * groups * (a.qk_head_dim + a.v_head_dim) + out
    if a.q_lora_rank is None:
        query = d * heads * a.qk_head_dim
    else:
        query = d * a.q_lora_rank + a.q_lora_rank + a.q_lora_rank * heads * a.qk_head_dim
    latent = d * (a.kv_lora_rank + a.qk_rope_head_dim) + a.kv_lora_rank
    return query + latent + a.kv_lora_rank * heads * (a.qk_nope_head_dim + a.v_head_dim) + out


def ffn_parameters(model: ModelConfig, layer: int, *, activated: bool = False) -> int:
    """Parameters of the FFN of a layer, without its norm: all, or those that one token passes through."""
    d = model.hidden_size
    if model.moe is None or not model.is_moe_layer(layer):
        return (3 if model.gated_ffn else 2) * d * model.intermediate_size
    moe = model.moe
    routed = moe.num_experts_per_tok if activated else moe.n_routed_experts
    gate = moe.n_routed_experts * d if moe.selection == "affinity" else 0
    return gate + (3 if moe.gated_experts else 2) * d * moe.moe_intermediate_size * (routed + moe.n_shared_experts)


def _parameters(model: ModelConfig, *, activated: bool) -> int:
    d = model.hidden_size
    per_layer = attention_parameters(model.attention, d) + 2 * d
    layers = sum(per_layer + ffn_parameters(model, i, activated=activated) for i in range(model.num_hidden_layers))
    embedding = model.vocab_size * d
    head = 0 if model.tie_word_embeddings and not activated else embedding
    return layers + d + head + (0 if activated else embedding)


def total_parameters(model: ModelConfig) -> int:
    """All parameters, both embeddings included."""
    return _parameters(model, activated=False)


def activated_parameters(model: ModelConfig) -> int:
    """Parameters that one token passes through, without the input embedding, with the head (as the paper counts)."""
    return _parameters(model, activated=True)


def kv_cache_elements_per_token(model: ModelConfig) -> int:
    """Cached elements per token over all layers (V2 Table 1): (d_c + d_h^R) l for MLA, n_g (d_k + d_v) l otherwise."""
    a = model.attention
    per_layer = a.kv_lora_rank + a.qk_rope_head_dim if a.kind == "mla" else a.key_value_heads * (a.qk_head_dim + a.v_head_dim)
    return per_layer * model.num_hidden_layers


def kv_cache_bytes_per_token(model: ModelConfig, bits: float = 16) -> float:
    """Bytes of cache per token at `bits` per element, without scales."""
    return kv_cache_elements_per_token(model) * bits / 8


def kv_cache_bytes_per_token_stored(model: ModelConfig, bits: int) -> int:
    """Bytes of cache per token as it is allocated, for `bits` of KV_BITS: below 16, each vector is filled up to whole bytes
    and to a whole group of codes (4 codes of 6 bits are 3 bytes), and has a step and an offset of 16 bits.

    A layer keeps two vectors for MLA (widths d_c and d_h^R) and two per head group otherwise (d_k and d_v).
    ValueError for other `bits`.
    """
    if bits not in KV_BITS:
        raise ValueError(f"bits={bits}: no cache has this width; valid: {', '.join(map(str, KV_BITS))}")
    a = model.attention
    groups, widths = (1, (a.kv_lora_rank, a.qk_rope_head_dim)) if a.kind == "mla" else (a.key_value_heads, (a.qk_head_dim, a.v_head_dim))
    unit = math.lcm(bits, 8)
    codes = sum(-(-width * bits // unit) * unit // 8 for width in widths)
    return model.num_hidden_layers * groups * (codes + (0 if bits == 16 else 2 * 4))


def forward_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations of a forward pass: two per activated parameter, and causal attention over half the sequence."""
    a = model.attention
    attention = a.num_attention_heads * (a.qk_head_dim + a.v_head_dim) * sequence_length * model.num_hidden_layers
    return 2.0 * activated_parameters(model) + attention


def train_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Forward and backward: three times the forward pass, no recomputation counted."""
    return 3.0 * forward_flops_per_token(model, sequence_length)


def weights_bytes(model: ModelConfig, bits: float = 16) -> float:
    """Bytes of all weights at `bits` per parameter."""
    return total_parameters(model) * bits / 8
