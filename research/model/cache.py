"""What generation keeps per token: for MLA the normalised latent and the shared rotary key, nothing else."""

from dataclasses import dataclass

import torch
from torch import Tensor

from research.config import ModelConfig


@dataclass(slots=True)
class LayerCache:
    """Pre-allocated rows of one layer.

    first, second: for MLA the latent c^KV (B, S, C) and the rotary key k^R (B, S, R); for the other
    kinds keys (B, groups, S, N + R) and values (B, groups, S, V).  `length` positions are filled.
    """

    first: Tensor
    second: Tensor
    length: int = 0

    def append(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Write the rows of new positions behind the filled ones; views of all filled rows come back."""
        end = self.length + first.shape[-2]
        if end > self.first.shape[-2]:
            raise ValueError(f"cache of {self.first.shape[-2]} positions cannot take {end}")
        self.first[..., self.length : end, :] = first
        self.second[..., self.length : end, :] = second
        self.length = end
        return self.first[..., :end, :], self.second[..., :end, :]


@dataclass(slots=True)
class Cache:
    """One LayerCache per layer, all of the same length."""

    layers: list[LayerCache]

    @classmethod
    def allocate(cls, config: ModelConfig, batch: int, positions: int, *, dtype: torch.dtype, device: torch.device | str) -> "Cache":
        a = config.attention
        shapes: tuple[tuple[int, ...], tuple[int, ...]]
        if a.kind == "mla":
            shapes = (batch, positions, a.kv_lora_rank), (batch, positions, a.qk_rope_head_dim)
        else:
            groups = a.key_value_heads
            shapes = (batch, groups, positions, a.qk_head_dim), (batch, groups, positions, a.v_head_dim)
        first, second = shapes
        layers = range(config.num_hidden_layers)
        return cls([LayerCache(torch.empty(first, dtype=dtype, device=device), torch.empty(second, dtype=dtype, device=device)) for _ in layers])

    @property
    def length(self) -> int:
        return self.layers[0].length

    @property
    def allocated_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.layers for t in (layer.first, layer.second))
