"""What generation keeps per token: for MLA the normalised latent and the shared rotary key, nothing else.

Rows are allocated once, for all positions that there will be.  Each sequence of the batch fills its own rows
from the first on, so the row is the position, whatever the others do: prompts of unequal length are
padded behind, the padding is never written, and a query sees the rows up to its own position.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from research.accounting import KV_BITS
from research.config import ModelConfig
from research.model.quantise import dequantise, pack, packed_bytes, quantise, unpack


class Rows(Protocol):
    """One vector of `width` elements for each sequence (B), each head group where there are some, and each position (S)."""

    @property
    def allocated_bytes(self) -> int: ...

    def write(self, place: "Place", x: Tensor) -> None:
        """Keep the new vectors of x (B, [groups,] T, width) that are no padding."""
        ...

    def read(self, end: int) -> Tensor:
        """The first `end` rows, (B, [groups,] end, width), in the model's precision; rows not written are zero."""
        ...


@dataclass(frozen=True)
class Place:
    """Where the T new positions of one forward pass go, the same for every layer.

    positions: int64 (B, T), position (and row) of each new token.
    end: S, rows that are filled afterwards in the fullest sequence, padding included.
    behind: whether a sequence had rows before, which new positions see too; if not, plain causality says all.
    start: the row of the first new position where it is the same in all sequences and none has padding, else None.
    real: bool (B, T), what is no padding; None where there is none.

    The rest is computed by whoever asks: in decoding nobody does.
    """

    positions: Tensor
    end: int
    behind: bool
    start: int | None
    real: Tensor | None

    @cached_property
    def visible(self) -> Tensor | None:
        """bool (B, 1, T, S), which of the first S rows a new position may see; None where none was filled before."""
        if not self.behind:
            return None
        return (torch.arange(self.end, device=self.positions.device) <= self.positions[..., None])[:, None]

    @cached_property
    def scattered(self) -> tuple[Tensor, Tensor, Tensor]:
        """sequence, token and row, int64 (N,) each, of the N new vectors that are no padding: x[sequence, token] goes to [sequence, row]."""
        real = torch.ones_like(self.positions, dtype=torch.bool) if self.real is None else self.real
        sequence, token = real.nonzero(as_tuple=True)
        return sequence, token, self.positions[sequence, token]


@dataclass(frozen=True, slots=True)
class PlainRows:
    """Rows as they are, in the precision of `rows` (B, [groups,] S, W); read in `dtype`."""

    rows: Tensor
    dtype: torch.dtype

    @property
    def allocated_bytes(self) -> int:
        return self.rows.nbytes

    def write(self, place: Place, x: Tensor) -> None:
        if place.start is not None:  # as in decoding: one copy, where scattered rows take four operations
            self.rows[..., place.start : place.start + x.shape[-2], :] = x
        else:
            sequence, token, row = place.scattered
            self.rows[sequence, ..., row, :] = x[sequence, ..., token, :].to(self.rows.dtype)

    def read(self, end: int) -> Tensor:
        return self.rows[..., :end, :].to(self.dtype)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows in `bits` bits: packed uint8 (B, [groups,] S, bytes) and grids bfloat16 (B, [groups,] S, 2)."""

    packed: Tensor
    grids: Tensor
    bits: int
    width: int
    dtype: torch.dtype

    @property
    def allocated_bytes(self) -> int:
        return self.packed.nbytes + self.grids.nbytes

    def write(self, place: Place, x: Tensor) -> None:
        sequence, token, row = place.scattered
        codes, grid = quantise(x[sequence, ..., token, :], self.bits)
        self.packed[sequence, ..., row, :] = pack(codes, self.bits)
        self.grids[sequence, ..., row, :] = grid

    def read(self, end: int) -> Tensor:
        return dequantise(unpack(self.packed[..., :end, :], self.bits, self.width), self.grids[..., :end, :], self.dtype)


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Rows of one layer: for MLA the latent c^KV (C) and the rotary key k^R (R), for the other kinds the keys
    (N + R) and the values (V) of each head group."""

    first: Rows
    second: Rows

    def append(self, place: Place, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new vectors; all rows come back as they are kept, the new ones too."""
        self.first.write(place, first)
        self.second.write(place, second)
        return self.first.read(place.end), self.second.read(place.end)


@dataclass(slots=True)
class Cache:
    """One LayerCache per layer for `positions` positions of each sequence; `lengths` (int64, B, on the CPU) of them are filled."""

    layers: list[LayerCache]
    positions: int
    lengths: Tensor
    prepared: Any = field(default=None, repr=False, compare=False)
    """What `decoding` keeps from one token to the next."""

    @classmethod
    def allocate(
        cls, config: ModelConfig, batch: int, positions: int, *, dtype: torch.dtype, device: torch.device | str, bits: int | None = None
    ) -> "Cache":
        """An empty cache for a model that computes in `dtype`.

        bits: None keeps the vectors in `dtype`, 16 in bfloat16 (float16 would overflow beyond 65504), and 8, 6 or 4
        pack them on a grid of their own each.  ValueError for another number.
        """
        if bits is not None and bits not in KV_BITS:
            raise ValueError(f"bits={bits}: a cache has {', '.join(map(str, KV_BITS))} bits, or None for the model's own precision")

        def rows(*shape: int) -> Rows:
            # Zeros, since a row that a shorter sequence never wrote is multiplied by a probability of 0 and must not be NaN.
            if bits is None or bits == 16:
                kept = dtype if bits is None else torch.bfloat16
                return PlainRows(torch.zeros(shape, dtype=kept, device=device), dtype)
            packed = torch.zeros(*shape[:-1], packed_bytes(shape[-1], bits), dtype=torch.uint8, device=device)
            return PackedRows(packed, torch.zeros(*shape[:-1], 2, dtype=torch.bfloat16, device=device), bits, shape[-1], dtype)

        a = config.attention
        groups, widths = ((), (a.kv_lora_rank, a.qk_rope_head_dim)) if a.kind == "mla" else ((a.key_value_heads,), (a.qk_head_dim, a.v_head_dim))
        layers = [LayerCache(*(rows(batch, *groups, positions, width) for width in widths)) for _ in range(config.num_hidden_layers)]
        return cls(layers, positions, torch.zeros(batch, dtype=torch.int64))

    @property
    def allocated_bytes(self) -> int:
        """Everything that was allocated, grids included."""
        return sum(rows.allocated_bytes for layer in self.layers for rows in (layer.first, layer.second))

    def place(self, tokens: int, new: Tensor | None, device: torch.device) -> Place:
        """Rows for `tokens` further positions of each sequence, of which the first new_b are real and the others padding (None: all).

        ValueError if there are not so many rows.
        """
        lengths = self.lengths.tolist()
        real = [tokens] * len(lengths) if new is None else [min(count, tokens) for count in new.tolist()]
        if (last := max((length + count for length, count in zip(lengths, real, strict=True) if count > 0), default=0)) > self.positions:
            raise ValueError(f"cache of {self.positions} positions cannot take {last}")
        longest, offset = max(lengths), torch.arange(tokens)
        end, whole = min(longest + tokens, self.positions), min(real) == tokens
        return Place(
            (self.lengths[:, None] + offset).to(device),
            end,
            behind=end != tokens or longest > 0,
            start=longest if whole and min(lengths) == longest else None,
            real=None if whole else (offset < torch.tensor(real)[:, None]).to(device),
        )

    def advance(self, tokens: int, new: Tensor | None) -> None:
        """The positions that `place` gave rows to are filled."""
        self.lengths = self.lengths + (tokens if new is None else new.cpu())
