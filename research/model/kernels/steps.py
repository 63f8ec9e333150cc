"""Decoding over a cache (`decoding.c`): absorbed attention, and a block's two halves for a few new tokens, each one call.

The twins of the halves are the modules' own `forward`.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from research.model.kernels.functions import Sizes, per_batch, pointer, strided, turns
from research.model.kernels.native import loaded


def _fields(pointers: str, floats: str, integers: str) -> list[tuple[str, type]]:
    kinds = ((pointers, ctypes.c_void_p), (floats, ctypes.c_float), (integers, ctypes.c_int64))
    return [(name, kind) for names, kind in kinds for name in names.split()]


class _LatentStep(ctypes.Structure):
    _fields_ = _fields(
        "norm q_a q_norm q kv_a kv_norm kv_b o table latent rope position last scratch",
        "eps q_eps kv_eps scale",
        "B T D H N R V C Q S chunk table_batch latent_batch latent_row rope_batch rope_row",
    )


class _FeedForwardStep(ctypes.Structure):
    _fields_ = _fields(
        "norm centroids gate_up down gate up out ids places gates scores scratch", "eps scaling", "M D E F K S devices limit sum_to_one"
    )


CHUNK_BYTES = 3 * 2**13
"""Of cached rows that decoding looks at at a time: they stay in the first-level cache from the scores to the values."""


def decode_room(rows: int, cached: int, rank: int, rope: int) -> tuple[int, int, int]:
    """Of `latent_decode` with `rows` queries: cached rows at a time, floats of scratch, and lanes."""
    chunk, lanes = max(16, min(cached, CHUNK_BYTES // (4 * (rank + rope)))), -(-rows // 8) * 8
    return chunk, rows * (rank + rope) + lanes * (2 * rank + rope + 2) + 32 * chunk + 16, lanes


def latent_decode(
    query: Tensor, latent: Tensor, key_rope: Tensor, weight: Tensor, table: Tensor, positions: Tensor, sizes: Sizes, scale: float
) -> Tensor:
    """`absorbed_attention` for a few new positions (int64, B, T) over a cache, each of which sees the rows up to its own; no gradients."""
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


def latent_step(x: Tensor, norm: Norm, query: Query, kv_a: Tensor, kv_norm: Norm, kv_b: Tensor, o: Tensor, table: Tensor,
                latent: Tensor, rope: Tensor, positions: Tensor, end: int, sizes: Sizes, scale: float) -> None:  # fmt: skip
    """x (B, T, D) += MLA of its norm (`attention.MultiHeadLatentAttention`, absorbed), in place; no gradients.

    table: of `functions.turns`.  latent (B, rows, C) and rope (B, rows, R): the cache, to whose rows `positions` (int64, B, T) the new ones are
    written; `end` rows are filled afterwards in the fullest sequence.  x and positions contiguous.
    """
    (batch, length, hidden), (heads, _, nope, rotary, value), rank = x.shape, sizes, latent.shape[-1]
    low = 0 if query.q_a is None else query.q_a.shape[0]
    chunk, floats, lanes = decode_room(length * heads, end, rank, rotary)
    tokens, width = batch * length, heads * sizes.key
    own = tokens * (hidden + width + 2 * low + rank + rotary + heads * value + 1)
    scratch, last = x.new_empty(own + floats), positions.new_empty(lanes)
    step = _LatentStep(
        *map(pointer, (norm.weight, query.q_a, None if query.norm is None else query.norm.weight, query.q, kv_a, kv_norm.weight, kv_b, o,
                     table, latent, rope, positions, last, scratch)),
        norm.eps, query.norm.eps if query.norm else 0.0, kv_norm.eps, scale,
        batch, length, hidden, heads, nope, rotary, value, rank, low, end, chunk, per_batch(table, x),
        latent.stride(0), latent.stride(1), rope.stride(0), rope.stride(1),
    )  # fmt: skip
    loaded().latent_step(ctypes.addressof(step), x.data_ptr())


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


def feed_forward_step(x: Tensor, norm: Norm, experts: Experts | None, always: Gated | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """x (..., D) += the FFN of its norm, in place: the experts that its gate chooses and the FFN that every token passes; no gradients.

    Back come ids (M, K), gates (M, K) and scores (M, E) as in `router.Routing`; None without routed experts.
    """
    hidden = x.shape[-1]
    tokens, shared = x.numel() // hidden, 0 if always is None else always.gate.shape[0]
    ids = places = gates = scores = None
    count = width = chosen = devices = limit = 0
    if experts is not None:
        count, _, width = experts.down.shape
        chosen, devices, limit = experts.chosen, experts.devices, experts.limit
        ids, places = torch.empty(tokens, chosen, dtype=torch.int64), torch.empty(tokens * chosen + count + devices, dtype=torch.int64)
        gates, scores = x.new_empty(tokens, chosen), x.new_empty(tokens, count)
    scratch = x.new_empty(tokens * (4 * hidden + 3 * shared + width + 2 * width * chosen) + max(chosen, devices))
    step = _FeedForwardStep(
        *map(pointer, (norm.weight, *((experts.centroids, experts.gate_up, experts.down) if experts else (None,) * 3), *(always or (None,) * 3),
                     ids, places, gates, scores, scratch)),
        norm.eps, experts.scaling if experts else 1.0,
        tokens, hidden, count, width, chosen, shared, devices, limit, experts is not None and experts.sum_to_one,
    )  # fmt: skip
    loaded().feed_forward_step(ctypes.addressof(step), x.data_ptr())
    return None if ids is None or gates is None or scores is None else (ids, gates, scores)
