"""Causal attention as differentiable functions of the compiled kernels (`attention.c`): MLA in both its forms, and grouped queries."""

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from research.model.kernels.functions import pointer
from research.model.kernels.native import loaded

QUERIES, SCORES = 64, 2**20
"""Queries that attend at a time, of all heads that share their keys, and how many scores these make: what is held at once.
A product of fewer rows than QUERIES is a slow one, however many keys there are."""


def strided(x: Tensor) -> Tensor:
    """x (B, S, W) with vectors in one piece, copied only where they are not: a part of a cache is read where it lies."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Operand(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("row", ctypes.c_int64), ("head", ctypes.c_int64))


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("B", "H", "groups", "T", "N", "R", "V")),
        ("scale", ctypes.c_float),
        ("table", ctypes.c_void_p),
        ("table_batch", ctypes.c_int64),
        ("turn_keys", ctypes.c_int64),
        ("first", ctypes.c_void_p),
        ("block", ctypes.c_int64),
        ("S", ctypes.c_int64),
        ("before", ctypes.c_void_p),
    )


class Sizes(NamedTuple):
    """Head counts and widths of an attention: H query heads, `groups` key and value heads; N + R per key, R of it rotary; V per value."""

    heads: int
    groups: int
    nope: int
    rope: int
    value: int

    @property
    def key(self) -> int:
        return self.nope + self.rope


def _operand(array: Tensor, width: int, offset: int = 0) -> Any:
    """Heads of `width` one after the other in the rows of array (B, T, ...), from element `offset` on; width 0: one for all heads."""
    return ctypes.byref(_Operand(array.data_ptr() + 4 * offset, array.stride(0), array.stride(1), width))


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key_value: Tensor, key_rope: Tensor | None, value: Tensor | None, table: Tensor, first: Tensor | None,
                before: Tensor | None, sizes: Sizes, scale: float) -> Tensor:  # fmt: skip
        query, key_value, table = query.contiguous(), key_value.contiguous(), turns(table)
        key_rope = None if key_rope is None else strided(key_rope)
        value = None if value is None else value.contiguous()
        out = query.new_empty(*query.shape[:2], sizes.heads * sizes.value)
        operands = (*_inputs(query, key_value, key_rope, value, sizes), _operand(out, sizes.value))
        shape = _shape(query, key_value, table, first, before, sizes, scale, turn_keys=value is not None)
        lse = _attend(shape, operands, query)
        ctx.save_for_backward(query, key_value, key_rope, value, table, first, out, lse)
        ctx.sizes, ctx.scale = sizes, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key_value, key_rope, value, table, first, out, lse = ctx.saved_tensors
        sizes: Sizes = ctx.sizes
        gradient = gradient.contiguous()  # under a name: the kernel gets its address alone
        dquery, dkey_value = torch.empty_like(query), torch.empty_like(key_value)
        dkey_rope = None if key_rope is None else key_rope.new_empty(key_rope.shape)
        dvalue = None if value is None else torch.empty_like(value)
        operands = (*_inputs(query, key_value, key_rope, value, sizes), _operand(out, sizes.value))
        shape = _shape(query, key_value, table, first, None, sizes, ctx.scale, turn_keys=value is not None)
        grads = _inputs(dquery, dkey_value, dkey_rope, dvalue, sizes)
        _attend_backward(shape, operands, lse, _operand(gradient, sizes.value), grads, query)
        return dquery, dkey_value, dkey_rope, dvalue, None, None, None, None, None


class _LatentAttention(torch.autograd.Function):
    """Multi-query attention to the latents themselves, each of them key and value of all heads."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, latent: Tensor, key_rope: Tensor, table: Tensor, first: Tensor | None, before: Tensor | None,
                sizes: Sizes, scale: float) -> Tensor:  # fmt: skip
        query, latent, key_rope, table = query.contiguous(), strided(latent), strided(key_rope), turns(table)
        out = query.new_empty(*query.shape[:2], sizes.heads * sizes.value)
        operands = (*_latent_inputs(query, latent, key_rope, sizes), _operand(latent, 0), _operand(out, sizes.value))
        lse = _attend(_shape(query, latent, table, first, before, sizes, scale, turn_keys=False), operands, query)
        ctx.save_for_backward(query, latent, key_rope, table, first, out, lse)
        ctx.sizes, ctx.scale = sizes, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, latent, key_rope, table, first, out, lse = ctx.saved_tensors
        sizes: Sizes = ctx.sizes
        gradient = gradient.contiguous()
        dquery, dlatent, dkey_rope = torch.empty_like(query), latent.new_empty(latent.shape), key_rope.new_empty(key_rope.shape)
        operands = (*_latent_inputs(query, latent, key_rope, sizes), _operand(latent, 0), _operand(out, sizes.value))
        shape = _shape(query, latent, table, first, None, sizes, ctx.scale, turn_keys=False)
        grads = (*_latent_inputs(dquery, dlatent, dkey_rope, sizes), None)
        _attend_backward(shape, operands, lse, _operand(gradient, sizes.value), grads, query)
        return dquery, dlatent, dkey_rope, None, None, None, None, None


def latent_attention(
    query: Tensor,
    key_value: Tensor,
    key_rope: Tensor,
    table: Tensor,
    sizes: Sizes,
    scale: float,
    first: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """Causal attention of MLA in its expanded form, from the projections as they come.

    query (B, T, H (N + R)), its rotary parts not yet turned; key_value (B, S, H (N + V)) rebuilt from the latent;
    key_rope (B, S, R), turned, one for all heads; table complex (T, R / 2) or (B, 1, T, R / 2);
    first (int32, B, T): the first position that each position may see, never decreasing;
    before (int64, B): keys before the first query, where S is more than T (without gradients only) -> (B, T, H V).
    """
    return _CausalAttention.apply(query, key_value, key_rope, None, table, first, before, sizes, scale)


def attention_to_latents(
    query: Tensor,
    latent: Tensor,
    key_rope: Tensor,
    table: Tensor,
    heads: int,
    scale: float,
    first: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """The attention of MLA's absorbed form: query (B, T, H (C + R)), W^UK absorbed, latent (B, S, C) -> (B, T, H C), to which W^UV has yet to
    be applied; the rest as in `latent_attention`."""
    rank, rope = latent.shape[-1], key_rope.shape[-1]
    return _LatentAttention.apply(query, latent, key_rope, table, first, before, Sizes(heads, 1, rank, rope, rank), scale)


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, table: Tensor, sizes: Sizes, scale: float, first: Tensor | None = None) -> Tensor:
    """Causal attention with `groups` key and value heads: query (B, T, H (N + R)) and key (B, T, groups (N + R)), neither
    turned yet, value (B, T, groups V) -> (B, T, H V); the rest as in `latent_attention`."""
    return _CausalAttention.apply(query, key, None, value, table, first, None, sizes, scale)


def _inputs(query: Tensor, key_value: Tensor, key_rope: Tensor | None, value: Tensor | None, sizes: Sizes) -> tuple[Any, ...]:
    """Operands of the expanded form: query and key, both without and with rotation, and value."""
    queries = (_operand(query, sizes.key), _operand(query, sizes.key, sizes.nope))
    if value is not None:
        return *queries, _operand(key_value, sizes.key), _operand(key_value, sizes.key, sizes.nope), _operand(value, sizes.value)
    assert key_rope is not None
    rebuilt = sizes.nope + sizes.value
    return *queries, _operand(key_value, rebuilt), _operand(key_rope, 0), _operand(key_value, rebuilt, sizes.nope)


def _latent_inputs(query: Tensor, latent: Tensor, key_rope: Tensor, sizes: Sizes) -> tuple[Any, ...]:
    """The same of attention to latents but for the values."""
    return _operand(query, sizes.key), _operand(query, sizes.key, sizes.nope), _operand(latent, 0), _operand(key_rope, 0)


def _shape(query: Tensor, keys: Tensor, table: Tensor, first: Tensor | None, before: Tensor | None, sizes: Sizes, scale: float, *,
           turn_keys: bool) -> _Shape:  # fmt: skip
    batch, length = query.shape[:2]
    return _Shape(
        batch, sizes.heads, sizes.groups, length, sizes.nope, sizes.rope, sizes.value, scale, table.data_ptr(), per_batch(table, query), turn_keys,
        pointer(first), min(_queries(keys.shape[1], sizes), length), keys.shape[1], pointer(before),
    )  # fmt: skip


def _queries(keys: int, sizes: Sizes) -> int:
    """Positions that attend at a time: where heads share their keys, so few that their rows make one product of good size."""
    rows = max(QUERIES, min(4 * QUERIES, SCORES // keys))
    return max(1, min(QUERIES, rows * sizes.groups // sizes.heads))


def _scored(shape: _Shape) -> int:
    """Rows of scores at a time."""
    rows: int = shape.block * (shape.H // shape.groups)
    return rows


def _apart(keys: int) -> int:
    """Floats from one row of scores to the next: an odd multiple of 16."""
    return (-(-keys // 16) | 1) * 16


def _attend(shape: _Shape, operands: tuple[Any, ...], like: Tensor) -> Tensor:
    lse = like.new_empty(shape.B, shape.H, shape.T)
    rows, width = _scored(shape), shape.N + shape.R
    scratch = like.new_empty(rows * (_apart(shape.S) + width + shape.V + 1) + shape.S * width)
    loaded().attention_forward(ctypes.byref(shape), *operands, pointer(lse), pointer(scratch))
    return lse


def _attend_backward(shape: _Shape, operands: tuple[Any, ...], lse: Tensor, gradient: Any, grads: tuple[Any, ...], like: Tensor) -> None:
    assert shape.S == shape.T
    rows, width = _scored(shape), shape.N + shape.R
    scratch = like.new_empty(rows * (2 * _apart(shape.S) + 2 * width + shape.V + 1) + shape.T * (2 * width + shape.V))
    loaded().attention_backward(ctypes.byref(shape), *operands, pointer(lse), gradient, *grads, pointer(scratch))


def turns(table: Tensor) -> Tensor:
    """Complex (..., T, R / 2) as real (..., T, R / 2, 2)."""
    return torch.view_as_real(table).contiguous()


def per_batch(table: Tensor, query: Tensor) -> int:
    """Floats between one sequence's table and the next one's, of real table (T, R / 2, 2) or (B or 1, 1, T, R / 2, 2)."""
    return table.stride(0) if table.ndim == 5 and table.shape[0] == query.shape[0] else 0
