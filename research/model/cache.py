"""What generation keeps per token: for MLA the normalised latent and the shared rotary key, nothing else.

Rows are allocated once, for all positions that there will be.  Each sequence of the batch fills its own rows
from the first on, so the row is the position, whatever the others do: prompts of unequal length are
padded behind, the padding is never written, and a query sees the rows up to its own position.
"""

from dataclasses import dataclass
from typing import Protocol

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


@dataclass(frozen=True, slots=True)
class Place:
    """Where the T new positions of one forward pass go, the same for every layer.

    positions: int64 (B, T), position (and row) of each new token.
    visible: bool (B, 1, T, S), which of the first S rows a new position may see; None for a cache that was
    empty, where all rows are new and plain causality says the same.
    end: S, rows that are filled afterwards in the fullest sequence, padding included.
    sequence, token, row: int64 (N,), the N new vectors that are no padding: x[sequence, token] goes to [sequence, row].
    start: the row of the first new position where it is the same in all sequences and none has padding, else None.
    """

    positions: Tensor
    visible: Tensor | None
    end: int
    sequence: Tensor
    token: Tensor
    row: Tensor
    start: int | None


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
            self.rows[place.sequence, ..., place.row, :] = x[place.sequence, ..., place.token, :].to(self.rows.dtype)

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
        codes, grid = quantise(x[place.sequence, ..., place.token, :], self.bits)
        self.packed[place.sequence, ..., place.row, :] = pack(codes, self.bits)
        self.grids[place.sequence, ..., place.row, :] = grid

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
        offset = torch.arange(tokens)
        real = offset < (torch.full_like(self.lengths, tokens) if new is None else new.cpu())[:, None]
        sequence, token = real.nonzero(as_tuple=True)
        positions = self.lengths[:, None] + offset
        row = positions[sequence, token]
        if row.numel() and (last := int(row.max())) >= self.positions:
            raise ValueError(f"cache of {self.positions} positions cannot take {last + 1}")
        visible = None
        end = min(int(self.lengths.max()) + tokens, self.positions)
        if end != tokens or self.lengths.any():
            visible = (torch.arange(end) <= positions[..., None])[:, None].to(device)
        together = len(row) == positions.numel() and bool((self.lengths == self.lengths[0]).all())
        start = int(self.lengths[0]) if together else None
        return Place(positions.to(device), visible, end, sequence.to(device), token.to(device), row.to(device), start)

    def advance(self, tokens: int, new: Tensor | None) -> None:
        """The positions that `place` gave rows to are filled."""
        self.lengths = self.lengths + (tokens if new is None else new.cpu())
