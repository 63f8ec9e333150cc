"""The decoder: what is unusual about it

* attention keeps one latent per position instead of keys and values (`attention.py`),
* FFNs after the first layers are a few of many small experts and some shared ones (`moe.py`),
* the routing of every layer is returned, never left on a module.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from research.config import ModelConfig
from research.model.attention import GroupedAttention, MultiHeadLatentAttention
from research.model.cache import Cache, LayerCache
from research.model.layers import RMSNorm, SwiGLU, at_least_float32, rotary_table
from research.model.moe import MoE
from research.model.router import Routing


class Output(NamedTuple):
    """logits (B, T, vocabulary); routings by layer index, one for each MoE layer."""

    logits: Tensor
    routings: dict[int, Routing]


class Block(nn.Module):
    """h = x + attention(norm(x)); h + ffn(norm(h))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        eps, d = config.rms_norm_eps, config.hidden_size
        self.input_layernorm = RMSNorm(d, eps)
        self.self_attn = MultiHeadLatentAttention(config) if config.attention.kind == "mla" else GroupedAttention(config)
        self.post_attention_layernorm = RMSNorm(d, eps)
        self.mlp = MoE(config) if config.is_moe_layer(layer) else SwiGLU(d, config.intermediate_size)

    def forward(self, x: Tensor, table: Tensor, cache: LayerCache | None, protected_B: Tensor | None) -> tuple[Tensor, Routing | None]:
        x = x + self.self_attn(self.input_layernorm(x), table, cache)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            out, routing = self.mlp(normed, protected_B)
            return x + out, routing
        return x + self.mlp(normed), None


class Transformer(nn.Module):
    """`Transformer(config)(ids)`: ids int64 (B, T) -> Output.

    On the meta device nothing is allocated, so that the largest models can be counted.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: Tensor, cache: Cache | None = None, protected_B: Tensor | None = None) -> Output:
        """With a cache, `ids` are the positions after the cached ones.  `protected_B` (bool, B) turns token
        dropping on and marks the sequences spared by it (training); None drops nothing."""
        start = cache.length if cache is not None else 0
        a = self.config.attention
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        table = rotary_table(positions, a.qk_rope_head_dim, a.rope_theta, self.lm_head.weight.dtype, a.yarn)
        x = self.embed_tokens(ids)
        routings: dict[int, Routing] = {}
        for index, block in enumerate(self.layers):
            x, routing = block(x, table, cache.layers[index] if cache is not None else None, protected_B)
            if routing is not None:
                routings[index] = routing
        return Output(self.lm_head(self.norm(x)), routings)

    def initialise(self, seed: int) -> "Transformer":
        """All matrices from N(0, initializer_range), gains at 1 (V2 section 3.1.2); the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * self.config.initializer_range)
                else:
                    parameter.fill_(1.0)
        return self


def language_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token of logits (B, T, vocabulary) for targets (B, T), in float32 at least."""
    return F.cross_entropy(at_least_float32(logits.flatten(0, 1)), targets.flatten())
