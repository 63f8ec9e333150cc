"""Decoding over a cache (`decoding.c`): absorbed attention, and all blocks of a model for a few new tokens, each one call.

The twins of the blocks are the modules' own `forward`.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from research.model.kernels.attending import Sizes, per_batch, strided, turns
from research.model.kernels.functions import pointer
from research.model.kernels.native import loaded


def _fields(pointers: str, floats: str, integers: str) -> list[tuple[str, type]]:
    kinds = ((pointers, ctypes.c_void_p), (floats, ctypes.c_float), (integers, ctypes.c_int64))
    return [(name, kind) for names, kind in kinds for name in names.split()]


class _Latent(ctypes.Structure):
    _fields_ = _fields(
        "norm q_a q_norm q kv_a kv_norm kv_b o latent rope", "eps q_eps kv_eps scale", "D H N R V C Q latent_batch latent_row rope_batch rope_row"
    )


class _FeedForward(ctypes.Structure):
    _fields_ = _fields("norm centroids gate_up down gate up out", "eps scaling", "D E F K S devices limit sum_to_one")


class _Block(ctypes.Structure):
    _fields_ = (("attention", _Latent), ("ffn", _FeedForward))


class _Tokens(ctypes.Structure):
    _fields_ = _fields("table position last ids places gates scores scratch", "", "B T S chunk table_batch")


CHUNK_BYTES = 3 * 2**13
"""Of cached rows that decoding looks at at a time: they stay in the first-level cache from the scores to the values."""


def decode_room(rows: int, cached: int, rank: int, rope: int) -> tuple[int, int, int]:
    """Of `latent_decode` with `rows` queries: cached rows at a time, floats of scratch, and lanes."""
    chunk, lanes = max(16, min(cached, CHUNK_BYTES // (4 * (rank + rope)))), -(-rows // 16) * 16
    return chunk, rows * (rank + rope) + lanes * (2 * rank + rope + 2) + 32 * chunk + 16, lanes


def latent_decode(
    query: Tensor, latent: Tensor, key_rope: Tensor, weight: Tensor, table: Tensor, positions: Tensor, sizes: Sizes, scale: float
) -> Tensor:
    """MLA's absorbed form for a few new positions (int64, B, T) over a cache, each of which sees the rows up to its own; no gradients."""
    query, latent, key_rope, table, positions = query.contiguous(), strided(latent), strided(key_rope), turns(table), positions.contiguous()
    (batch, length), (heads, _, nope, rope, value), rank = query.shape[:2], sizes, latent.shape[-1]
    chunk, floats, lanes = decode_room(length * heads, latent.shape[1], rank, rope)
    out, scratch, last = query.new_empty(batch, length, heads * value), query.new_empty(floats), positions.new_empty(lanes)
    loaded().latent_decode(
        pointer(query), pointer(table), per_batch(table, query),
        pointer(latent), latent.stride(0), latent.stride(1), pointer(key_rope), key_rope.stride(0), key_rope.stride(1),
        *map(pointer, (positions, weight, out, scratch, last)), scale, latent.shape[1],
        *((batch, length, heads, nope, rope, value, rank, chunk)),
    )  # fmt: skip
    return out


class Norm(NamedTuple):
    """An RMSNorm's gain and epsilon."""

    weight: Tensor
    eps: float


class Query(NamedTuple):
    """How queries are made: `q` (H (N + R), D) of x, or (H (N + R), Q) of the normalised latent that `q_a` (Q, D) makes."""

    q: Tensor
    q_a: Tensor | None = None
    norm: Norm | None = None


class Latent(NamedTuple):
    """A block's MLA: kv_a (C + R, D), kv_b (H (N + V), C), o (D, H V); latent (B, rows, C) and rope (B, rows, R) of the cache."""

    norm: Norm
    query: Query
    kv_a: Tensor
    kv_norm: Norm
    kv_b: Tensor
    o: Tensor
    latent: Tensor
    rope: Tensor
    sizes: Sizes
    scale: float


class Experts(NamedTuple):
    """The routed experts and their gate: centroids (E, D), gate_up (E, 2F, D), down (E, D, F); `limit` of `devices` devices."""

    centroids: Tensor
    gate_up: Tensor
    down: Tensor
    chosen: int
    devices: int
    limit: int
    scaling: float
    sum_to_one: bool


class Gated(NamedTuple):
    """A SwiGLU FFN: gate and up (S, D), down (D, S)."""

    gate: Tensor
    up: Tensor
    down: Tensor


class FeedForward(NamedTuple):
    """A block's FFN: the experts that a gate chooses and what every token passes."""

    norm: Norm
    experts: Experts | None
    always: Gated | None


class Steps:
    """Blocks one after the other for a few new tokens, in one call; no gradients.

    They are given by address: whoever keeps them sees to it that no tensor moves.  All with experts have the same number of them.
    """

    def __init__(self, blocks: Sequence[tuple[Latent, FeedForward]]) -> None:
        self._held = blocks
        self._blocks = (_Block * len(blocks))(*(_Block(_latent(attention), _feed_forward(ffn)) for attention, ffn in blocks))
        self._first = first = self._blocks[0].attention
        self._own = first.D + first.H * (first.N + first.R) + 2 * first.Q + first.C + first.R + first.H * first.V + 1
        ffns = [block.ffn for block in self._blocks]
        self._ffn = max(4 * f.D + 3 * f.S + f.F + 2 * f.F * f.K for f in ffns)
        self._routed = [f for f in ffns if f.E]

    def __call__(self, x: Tensor, table: Tensor, positions: Tensor, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) becomes what it is behind the last block; back come ids (L, M, K), gates (L, M, K) and scores (L, M, E), as in
        `router.Routing`, of the M = B T tokens in the L blocks with experts.

        table: of `attending.turns`.  The cache's rows `positions` (int64, B, T) are written; `end` are filled afterwards in the fullest
        sequence.  x and positions contiguous.
        """
        (batch, length, _), a = x.shape, self._first
        tokens, routed = batch * length, self._routed[0] if self._routed else _FeedForward()
        chunk, floats, lanes = decode_room(length * a.H, end, a.C, a.R)
        scratch = x.new_empty(max(tokens * self._own + floats, tokens * self._ffn + max(routed.K, routed.devices)))
        last, places = positions.new_empty(lanes), positions.new_empty(tokens * routed.K + routed.E + routed.devices)
        ids = positions.new_empty(len(self._routed), tokens, routed.K)
        gates, scores = x.new_empty(ids.shape), x.new_empty(len(self._routed), tokens, routed.E)
        given = _Tokens(*map(pointer, (table, positions, last, ids, places, gates, scores, scratch)), batch, length, end, chunk, per_batch(table, x))
        loaded().decode_blocks(ctypes.addressof(self._blocks), len(self._blocks), ctypes.addressof(given), pointer(x))
        return ids, gates, scores


def _latent(of: Latent) -> _Latent:
    low, q = 0 if of.query.q_a is None else of.query.q_a.shape[0], of.query
    (heads, _, nope, rotary, value), hidden = of.sizes, of.o.shape[0]
    return _Latent(
        *map(pointer, (of.norm.weight, q.q_a, None if q.norm is None else q.norm.weight, q.q, of.kv_a, of.kv_norm.weight, of.kv_b, of.o,
                     of.latent, of.rope)),
        of.norm.eps, q.norm.eps if q.norm else 0.0, of.kv_norm.eps, of.scale,
        hidden, heads, nope, rotary, value, of.latent.shape[-1], low,
        of.latent.stride(0), of.latent.stride(1), of.rope.stride(0), of.rope.stride(1),
    )  # fmt: skip


def _feed_forward(of: FeedForward) -> _FeedForward:
    experts, always = of.experts, of.always
    count, hidden, width = experts.down.shape if experts else (0, of.norm.weight.shape[0], 0)
    chosen, devices, limit = (experts.chosen, experts.devices, experts.limit) if experts else (0, 0, 0)
    return _FeedForward(
        *map(pointer, (of.norm.weight, *((experts.centroids, experts.gate_up, experts.down) if experts else (None,) * 3), *(always or (None,) * 3))),
        of.norm.eps, experts.scaling if experts else 1.0,
        hidden, count, width, chosen, 0 if always is None else always.gate.shape[0], devices, limit, experts is not None and experts.sum_to_one,
    )  # fmt: skip
