"""The decoder: what is unusual about it

* attention keeps one latent per position instead of keys and values (`attention.py`),
* FFNs after the first layers are a few of many small experts and some shared ones (`moe.py`),
* the routing of every layer is returned, never left on a module.
"""

import hashlib
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from research.config import ModelConfig
from research.model import decoding
from research.model.attention import GroupedAttention, MultiHeadLatentAttention, first_of_document
from research.model.cache import Cache, LayerCache, Place
from research.model.layers import FeedForward, Linear, RMSNorm, at_least_float32, rotary_table
from research.model.moe import MoE
from research.model.recomputation import recomputed
from research.model.router import Decided, Routing


class Output(NamedTuple):
    """logits (B, T, vocabulary); routings by layer index, one for each MoE layer."""

    logits: Tensor
    routings: dict[int, Routing]


def _ffn(config: ModelConfig, layer: int) -> MoE | FeedForward:
    if config.is_moe_layer(layer):
        return MoE(config, layer)
    return FeedForward(config.hidden_size, config.intermediate_size, config.activation, gated=config.gated_ffn)


class Block(nn.Module):
    """h = x + attention(norm(x)); h + ffn(norm(h))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        eps, d = config.rms_norm_eps, config.hidden_size
        self.input_layernorm = RMSNorm(d, eps)
        self.self_attn = MultiHeadLatentAttention(config) if config.attention.kind == "mla" else GroupedAttention(config)
        self.post_attention_layernorm = RMSNorm(d, eps)
        self.mlp = _ffn(config, layer)

    def forward(
        self,
        x: Tensor,
        ids: Tensor,
        table: Tensor,
        cache: LayerCache | None,
        place: Place | None,
        protected_B: Tensor | Decided | None,
        chance: torch.Generator | None,
        first: Tensor | None,
    ) -> tuple[Tensor, Routing | None]:
        x, normed = self.input_layernorm.beside(x)
        x = self.self_attn(normed, table, cache, place, first, onto=x)
        x, normed = self.post_attention_layernorm.beside(x)
        if isinstance(self.mlp, MoE):
            out: tuple[Tensor, Routing] = self.mlp(normed, ids, protected_B, chance, onto=x)
            return out
        return self.mlp(normed, onto=x), None


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
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        ids: Tensor,
        cache: Cache | None = None,
        protected_B: Tensor | Decided | None = None,
        chance: torch.Generator | None = None,
        new_B: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Output:
        """The head of `hidden`, whose arguments these are; for a loss, `loss.chunked_language_loss` of `hidden` needs no logits."""
        hidden, routings = self.hidden(ids, cache, protected_B, chance, new_B, documents)
        return Output(self.lm_head(hidden), routings)

    def hidden(
        self,
        ids: Tensor,
        cache: Cache | None = None,
        protected_B: Tensor | Decided | None = None,
        chance: torch.Generator | None = None,
        new_B: Tensor | None = None,
        documents: Tensor | None = None,
        *,
        checkpointed: bool = False,
    ) -> tuple[Tensor, dict[int, Routing]]:
        """What the head is applied to, (B, T, D), and the routings by layer index.

        With a cache, `ids` are the positions after those that each sequence has there, of which the first `new_B`
        (int64, B; None: all) are real and the rest padding, whose logits and routing mean nothing.  Such batches of
        unequal lengths are for evaluation: padding would take its share of a device's budget.

        `protected_B` (bool, B) turns token dropping on and marks the sequences spared by it, `chance` is what second
        experts are drawn with (both for training); None drops nothing, and `Decided` what was dropped when all were seen.
        `checkpointed` (without a cache): of each block only the input is kept, and its activations are computed again for the
        backward pass.  ValueError for more positions than the cache has.

        `documents` (int, B x T, never decreasing; None: one document) are document indices: a position sees those of its own document
        only.  ValueError with a cache that holds positions already, whose documents are not known."""
        a = self.config.attention
        place = None if cache is None else cache.place(ids.shape[1], new_B, ids.device)
        positions = torch.arange(ids.shape[1], device=ids.device) if place is None else place.positions
        table = rotary_table(positions.flatten(), a.qk_rope_head_dim, a.rope_theta, self.lm_head.weight.dtype, a.yarn)
        if place is not None:
            table = table.unflatten(0, positions.shape)[:, None]  # beside the heads of (B, H, T, R / 2)
        if documents is not None and place is not None and place.behind:
            raise ValueError("documents go with a cache that is empty: those of its positions are not known")
        first = None if documents is None else first_of_document(documents)
        x = self.embed_tokens(ids)
        plain = protected_B is None and chance is None
        if cache is not None and place is not None and plain and (blocks := decoding.prepared(self.layers, x, cache, place)) is not None:
            x, routings = blocks.step(x, table, place)
            cache.advance(ids.shape[1], new_B)
            return self.norm(x), routings
        routings = {}
        for index, block in enumerate(self.layers):
            run = partial(recomputed, partial(block, first=first)) if checkpointed and cache is None else partial(block, first=first)
            x, routing = run(x, ids, table, cache.layers[index] if cache is not None else None, place, protected_B, chance=chance)
            if routing is not None:
                routings[index] = routing
        if cache is not None:
            cache.advance(ids.shape[1], new_B)
        return self.norm(x), routings

    def initialise(self, seed: int) -> "Transformer":
        """All matrices from N(0, initializer_range), gains at 1 (V2 section 3.1.2); the same on every device.

        Each has random numbers of its own, by `seed` and its name: models that differ in one part begin alike in all others, so
        that variants of an ablation share more of a seed than its text.
        """
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim > 1:
                    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7]))
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * self.config.initializer_range)
                else:
                    parameter.fill_(1.0)
        return self


def language_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token of logits (B, T, vocabulary) for targets (B, T), in float32 at least.

    The slow twin of `loss.chunked_language_loss`, which needs no logits.
    """
    return F.cross_entropy(at_least_float32(logits.flatten(0, 1)), targets.flatten())
