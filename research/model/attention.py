"""Multi-head Latent Attention, and multi-head, grouped-query and multi-query attention beside it.

MLA (V2 section 2.1, equations 37 to 47) has two forms that compute the same function:

* expanded: keys and values of every head are rebuilt from the latent; cheapest per pair of positions where
  the latent is wider than their mean, 2 C > N + V, so training and prefill use it there;
* absorbed: W^UK is folded into the query and W^UV into the output, and every head attends to the same
  latent, as in multi-query attention; nothing is rebuilt, so decoding uses it.  Where the latent is
  narrow, as in the scaled family but for nano, training and prefill use it too, with both matrices
  multiplied into the projections themselves (`MultiHeadLatentAttention._to_latents`).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from research.config import AttentionConfig, ModelConfig
from research.model.cache import LayerCache, Place
from research.model.kernels import attending, functions, native, steps
from research.model.layers import Linear, RMSNorm, at_least_float32, linear, rotate


def softmax_scale(config: AttentionConfig) -> float:
    """1 / sqrt(N + R), and with YaRN t times as much (V2 section 3.1.4).

    As in the released code t multiplies the whole logit, not its rotary half alone.
    """
    return (config.yarn.logit_scale if config.yarn is not None else 1.0) / math.sqrt(config.qk_head_dim)


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None, *, scale: float) -> Tensor:
    """Causal attention: query (B, H, T, a), key (B, H or groups, S, a), value (B, H or groups, S, V) -> (B, H, T, V).

    visible: bool, broadcast to (B, H, T, S), what each query may see; None: T = S and every query sees the
    positions up to its own.  Values narrower than keys are padded with zeros: the fused CPU kernel exists
    for equal widths only and the fallback builds the T x S matrix.
    """
    width = value.shape[-1]
    grouped = key.shape[1] != query.shape[1]
    if width < key.shape[-1]:
        value = F.pad(value, (0, key.shape[-1] - width))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, is_causal=visible is None, scale=scale, enable_gqa=grouped)
    return out[..., :width]


FEW = 8
"""New positions up to which the decoding kernel is taken, which stacks them and the heads into one product."""


def expansion_pays(config: AttentionConfig) -> float:
    """New positions m from which rebuilding keys and values costs no more multiplications than attending to the latents.

    Of S positions, m of them new, the expanded form rebuilds S (N + V) C H and takes m S (N + R + V) H for scores and
    values; the absorbed one takes m S (2 C + R) H.  171 for V2 and V2-Lite; never where the latent is narrow (2 C <= N + V), as
    in the scaled family but for nano: there the absorbed form is the cheaper one in training too.
    """
    surplus = 2 * config.kv_lora_rank - config.qk_nope_head_dim - config.v_head_dim
    return config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim) / surplus if surplus > 0 else math.inf


def head_sizes(config: AttentionConfig) -> attending.Sizes:
    """Heads and widths as the kernels want them."""
    groups = config.num_attention_heads if config.kind == "mla" else config.key_value_heads
    return attending.Sizes(config.num_attention_heads, groups, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim)


def first_of_document(documents: Tensor) -> Tensor:
    """Document indices (B, T), never decreasing, -> int32 (B, T): the position at which each position's document begins."""
    position = torch.arange(documents.shape[1], device=documents.device)
    begins = torch.cat((torch.ones_like(documents[:, :1], dtype=torch.bool), documents[:, 1:] != documents[:, :-1]), 1)
    return (begins * position).cummax(1).values.to(torch.int32)


def _visible(first: Tensor) -> Tensor:
    """bool (B, 1, T, T): each query sees the positions from `first` (B, T) up to its own."""
    position = torch.arange(first.shape[1], device=first.device)
    return ((position >= first[..., None]) & (position <= position[:, None]))[:, None]


def _projected(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """x (B, T, D) by each of the weights (n, D)."""
    if torch.is_grad_enabled() and native.usable(x, *weights):
        return functions.products(x, *weights)
    return tuple(linear(x, weight) for weight in weights)


class MultiHeadLatentAttention(nn.Module):
    """u_t = W^O [o_t1; ...; o_tH], with keys and values rebuilt from one latent c^KV per position.

    Scores are scaled by `softmax_scale`.  Both latents pass an RMSNorm (V2 section 3.1.2).  One
    rotary key k^R is shared by all heads.  Parameter names are those of the published checkpoints.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        a, d = config.attention, config.hidden_size
        self.config: AttentionConfig = a
        heads = a.num_attention_heads
        if a.q_lora_rank is None:
            self.q_proj = Linear(d, heads * a.qk_head_dim)
        else:
            self.q_a_proj = Linear(d, a.q_lora_rank)
            self.q_a_layernorm = RMSNorm(a.q_lora_rank)
            self.q_b_proj = Linear(a.q_lora_rank, heads * a.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(d, a.kv_lora_rank + a.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(a.kv_lora_rank)
        self.kv_b_proj = Linear(a.kv_lora_rank, heads * (a.qk_nope_head_dim + a.v_head_dim))
        self.o_proj = Linear(heads * a.v_head_dim, d)
        self.scale = softmax_scale(a)

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        cache: LayerCache | None = None,
        place: Place | None = None,
        first: Tensor | None = None,
        onto: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D), added to `onto`; with a cache, x holds the positions of `place` and attends to what the cache gives back.

        first: int32 (B, T), never decreasing, the first position that each may see, for sequences that are new as a whole; None: 0.
        """
        pays = expansion_pays(self.config)
        kernels = native.usable(x, self.kv_b_proj.weight) and (place is None or not torch.is_grad_enabled())  # behind a cache they give no gradients
        if kernels and pays == math.inf and (place is None or x.shape[1] > FEW):
            return self._to_latents(x, table, cache, place, first, onto)
        down = self.q_proj if self.config.q_lora_rank is None else self.q_a_proj
        query, compressed = _projected(x, down.weight, self.kv_a_proj_with_mqa.weight)
        if self.config.q_lora_rank is not None:
            query = self.q_b_proj(self.q_a_layernorm(query))
        latent, key_rope = self._latent(compressed, table)
        visible = None
        if cache is not None and place is not None:
            latent, key_rope = cache.append(place, latent, key_rope)
            visible = place.visible
        if kernels:
            return self.o_proj(self._by_kernels(query, latent, key_rope, table, place, first), onto)
        query_nope, query_rope = self._split(query, table)
        # In plain PyTorch only the expanded form has a fused kernel that holds no (T, T) matrix.
        attend = self.absorbed if visible is not None and x.shape[1] < pays else self.expanded
        visible = _visible(first) if first is not None else visible
        heads = attend(query_nope, query_rope, latent, key_rope, visible)
        return self.o_proj(heads.transpose(1, 2).flatten(2), onto)

    def _to_latents(
        self, x: Tensor, table: Tensor, cache: LayerCache | None, place: Place | None, first: Tensor | None, onto: Tensor | None
    ) -> Tensor:
        """`forward` where the latent is narrow: W^UK is multiplied into the projection of the query and W^UV into that of the output (V2
        section 2.1.2), once for all tokens, so that no vector of N or V is ever made; with gradients, through these products."""
        a, (up_key, up_value) = self.config, self._up()
        last = self.q_proj if a.q_lora_rank is None else self.q_b_proj
        to_nope, to_rope = last.weight.unflatten(0, (a.num_attention_heads, -1)).split((a.qk_nope_head_dim, a.qk_rope_head_dim), 1)
        to_query = torch.cat((up_key.transpose(1, 2) @ to_nope, to_rope), 1).flatten(0, 1)
        down = to_query if a.q_lora_rank is None else self.q_a_proj.weight
        query, compressed = _projected(x, down, self.kv_a_proj_with_mqa.weight)
        if a.q_lora_rank is not None:
            query = linear(self.q_a_layernorm(query), to_query)
        latent, key_rope = self._latent(compressed, table)
        before = None
        if cache is not None and place is not None:
            latent, key_rope = cache.append(place, latent, key_rope)
            before = place.positions[:, 0].contiguous()
        context = attending.attention_to_latents(query, latent, key_rope, table, a.num_attention_heads, self.scale, first, before)
        from_heads = self.o_proj.weight.unflatten(1, (a.num_attention_heads, -1)).transpose(0, 1) @ up_value
        return linear(context, from_heads.transpose(0, 1).flatten(1), onto)

    def _up(self) -> tuple[Tensor, Tensor]:
        """W^UK (H, N, C) and W^UV (H, V, C)."""
        a = self.config
        up_key, up_value = self.kv_b_proj.weight.unflatten(0, (a.num_attention_heads, -1)).split((a.qk_nope_head_dim, a.v_head_dim), 1)
        return up_key, up_value

    def expanded(self, query_nope: Tensor, query_rope: Tensor, latent: Tensor, key_rope: Tensor, visible: Tensor | None = None) -> Tensor:
        """Queries (B, H, T, N) and (B, H, T, R), latent (B, S, C), rotary key (B, S, R) -> (B, H, T, V).

        visible: bool, broadcast to (B, H, T, S); None: T = S, causal.
        """
        a = self.config
        rebuilt = self.kv_b_proj(latent).unflatten(-1, (a.num_attention_heads, -1)).transpose(1, 2)
        key_nope, value = rebuilt.split((a.qk_nope_head_dim, a.v_head_dim), -1)
        key = torch.cat((key_nope, key_rope[:, None].expand(-1, a.num_attention_heads, -1, -1)), -1)
        return softmax_attention(torch.cat((query_nope, query_rope), -1), key, value, visible, scale=self.scale)

    def absorbed(self, query_nope: Tensor, query_rope: Tensor, latent: Tensor, key_rope: Tensor, visible: Tensor | None = None) -> Tensor:
        """The same values as `expanded`; keys and values are never rebuilt."""
        up_key, up_value = self._up()
        query = torch.einsum("bhtn,hnc->bhtc", query_nope, up_key)
        scores = torch.einsum("bhtc,bsc->bhts", query, latent) + torch.einsum("bhtr,bsr->bhts", query_rope, key_rope)
        if visible is None:
            visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        probability = (scores * self.scale).masked_fill(~visible, -math.inf).softmax(-1, dtype=at_least_float32(scores).dtype).to(latent.dtype)
        return torch.einsum("bhtc,hvc->bhtv", torch.einsum("bhts,bsc->bhtc", probability, latent), up_value)

    def _by_kernels(self, query: Tensor, latent: Tensor, key_rope: Tensor, table: Tensor, place: Place | None, first: Tensor | None) -> Tensor:
        """(B, T, H V) of query (B, T, H (N + R)), not yet turned, latent (B, S, C) and rotary key (B, S, R)."""
        a, sizes, length = self.config, head_sizes(self.config), query.shape[1]
        before = None if place is None else place.positions[:, 0].contiguous()
        if place is not None and length <= FEW:
            return steps.latent_decode(query, latent, key_rope, self.kv_b_proj.weight, table, place.positions, sizes, self.scale)
        if place is None or length >= expansion_pays(a):
            return attending.latent_attention(query, self.kv_b_proj(latent), key_rope, table, sizes, self.scale, first, before)
        up_key, up_value = self._up()
        nope, rope = query.unflatten(-1, (sizes.heads, -1)).split((sizes.nope, sizes.rope), -1)
        query = torch.cat((torch.einsum("bthn,hnc->bthc", nope, up_key), rope), -1).flatten(2)
        context = attending.attention_to_latents(query, latent, key_rope, table, sizes.heads, self.scale, first, before)
        return torch.einsum("bthc,hvc->bthv", context.unflatten(-1, (sizes.heads, -1)), up_value).flatten(2)

    def _split(self, query: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        a = self.config
        query = query.unflatten(-1, (a.num_attention_heads, a.qk_head_dim)).transpose(1, 2)
        nope, rope = query.split((a.qk_nope_head_dim, a.qk_rope_head_dim), -1)
        return nope, rotate(rope, table)

    def _latent(self, compressed: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        a = self.config
        latent, key_rope = compressed.split((a.kv_lora_rank, a.qk_rope_head_dim), -1)
        return self.kv_a_layernorm(latent), rotate(key_rope[:, None], table)[:, 0]


class GroupedAttention(nn.Module):
    """Multi-head, grouped-query and multi-query attention: n_h, n_g or 1 heads of keys and values (V2 Table 1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        a, d = config.attention, config.hidden_size
        self.config: AttentionConfig = a
        groups = a.key_value_heads
        self.q_proj = Linear(d, a.num_attention_heads * a.qk_head_dim)
        self.k_proj = Linear(d, groups * a.qk_head_dim)
        self.v_proj = Linear(d, groups * a.v_head_dim)
        self.o_proj = Linear(a.num_attention_heads * a.v_head_dim, d)
        self.scale = softmax_scale(a)

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        cache: LayerCache | None = None,
        place: Place | None = None,
        first: Tensor | None = None,
        onto: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D), added to `onto`; the rest as in `MultiHeadLatentAttention`."""
        a = self.config
        query, key, value = _projected(x, self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        if cache is None and native.usable(query, key, value):
            return self.o_proj(attending.grouped_attention(query, key, value, table, head_sizes(a), self.scale, first), onto)
        visible = None if first is None else _visible(first)
        query = self._rotated(query, a.num_attention_heads, table)
        key = self._rotated(key, a.key_value_heads, table)
        value = value.unflatten(-1, (a.key_value_heads, -1)).transpose(1, 2)
        if cache is not None and place is not None:
            key, value = cache.append(place, key, value)
            visible = place.visible if place.visible is not None else visible
        return self.o_proj(softmax_attention(query, key, value, visible, scale=self.scale).transpose(1, 2).flatten(2), onto)

    def _rotated(self, x: Tensor, heads: int, table: Tensor) -> Tensor:
        a = self.config
        nope, rope = x.unflatten(-1, (heads, a.qk_head_dim)).transpose(1, 2).split((a.qk_nope_head_dim, a.qk_rope_head_dim), -1)
        return torch.cat((nope, rotate(rope, table)), -1)
