"""The kernels as differentiable functions; each says what its plain PyTorch twin is, and `native.usable` says when to call it."""

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from research.model.kernels.native import library

QUERIES = 64
"""Queries that attend at a time: their scores against all keys are what is held at once."""
ROWS = 256
"""As in kernels.c."""


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous and the others collapsible to rows of one stride, copied only where it is not so."""
    if x.stride(-1) == 1 and all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.ndim - 2)):
        return x
    return x.contiguous()


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = _rows(x)
        size, rows = x.shape[-1], x.numel() // x.shape[-1]
        y, inverse = x.new_empty(x.shape), x.new_empty(rows)
        stride = x.stride(-2) if x.ndim > 1 else size
        _c().rms_norm(_pointer(x), _i(stride), _pointer(weight), ctypes.c_float(eps), _pointer(y), _pointer(inverse), _i(rows), _i(size))
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        gradient = gradient.contiguous()
        dx, dweight = x.new_empty(x.shape), torch.empty_like(weight)
        stride, size = x.stride(-2) if x.ndim > 1 else x.shape[-1], x.shape[-1]
        _c().rms_norm_backward(
            *map(_pointer, (gradient, x)), _i(stride), *map(_pointer, (weight, inverse, dx, dweight)), _i(inverse.numel()), _i(size)
        )
        return dx, dweight, None


def normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (`layers.RMSNorm`)."""
    return _Normalise.apply(x, weight, eps)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        _c().swiglu(_pointer(gate), _pointer(up), _pointer(out), _i(gate.numel()))
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        gradient, dgate, dup = gradient.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        _c().swiglu_backward(*map(_pointer, (gradient, gate, up, dgate, dup)), _i(gate.numel()))
        return dgate, dup


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element by element."""
    return _SwiGLU.apply(gate, up)


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, ids: Tensor, kept: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        x, gates, ids, kept = x.contiguous(), gates.contiguous(), ids.contiguous(), kept.contiguous()
        (experts, size, width), chosen = down.shape, ids.shape[1]
        slot, ends = ids.new_empty(ids.numel()), ids.new_empty(experts)
        slots = _c().sort_by_expert(*map(_pointer, (ids, kept, slot, ends)), _i(ids.numel()), _i(experts))
        hidden, out = x.new_empty(slots, 2 * width), torch.zeros_like(x)
        scratch = x.new_empty(ROWS * (2 * size + width))
        _c().experts_forward(*map(_pointer, (x, gates, slot, ends, gate_up, down, hidden, out, scratch)), *map(_i, (chosen, experts, size, width)))
        ctx.save_for_backward(x, gates, slot, ends, gate_up, down, hidden)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, slot, ends, gate_up, down, hidden = ctx.saved_tensors
        (experts, size, width), chosen = down.shape, gates.shape[1]
        gradient = gradient.contiguous()
        dx, dgates = torch.zeros_like(x), torch.zeros_like(gates)
        dgate_up, ddown = torch.empty_like(gate_up), torch.empty_like(down)
        scratch = x.new_empty(ROWS * (2 * size + 4 * width))
        _c().experts_backward(
            *map(_pointer, (gradient, x, gates, slot, ends, gate_up, down, hidden, dx, dgates, dgate_up, ddown, scratch)),
            *map(_i, (chosen, experts, size, width)),
        )
        return dx, dgates, None, None, dgate_up, ddown


def routed_experts(x_MD: Tensor, gates_MK: Tensor, ids_MK: Tensor, kept_MK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU experts (`experts.grouped_experts`): gate_up (E, 2F, D), down (E, D, F) -> (M, D).

    Kept for the way back: the hidden activations of the kept assignments, (A, 2F); no product is done twice.
    """
    return _RoutedExperts.apply(x_MD, gates_MK, ids_MK, kept_MK, gate_up, down)


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
    )


class Sizes(NamedTuple):
    """Head counts and widths of an attention: H query heads, `groups` key and value heads; N + R per key, R of it rotary; V per value."""

    heads: int
    groups: int
    nope: int
    rope: int
    value: int


def _operand(array: Tensor, width: int, offset: int = 0, *, shared: bool = False) -> Any:
    """Heads of `width` one after the other in the rows of array (B, T, ...); one for all heads if `shared`."""
    data = ctypes.c_void_p(array.data_ptr() + 4 * offset)
    return ctypes.byref(_Operand(data, array.stride(0), array.stride(1), 0 if shared else width))


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key_value: Tensor, key_rope: Tensor | None, value: Tensor | None, table: Tensor, first: Tensor | None,
                sizes: Sizes, scale: float) -> Tensor:  # fmt: skip
        query, key_value = query.contiguous(), key_value.contiguous()
        key_rope = None if key_rope is None else key_rope.contiguous()
        value = None if value is None else value.contiguous()
        table = torch.view_as_real(table.resolve_conj()).contiguous()
        batch, length = query.shape[:2]
        out = query.new_empty(batch, length, sizes.heads * sizes.value)
        lse = query.new_empty(batch, sizes.heads, length)
        block, width = min(QUERIES, length), sizes.nope + sizes.rope
        scratch = query.new_empty(length * (2 * width + block))
        shape = _shape(query, table, first, sizes, scale, block, turn_keys=value is not None)
        operands = (*_inputs(query, key_value, key_rope, value, sizes), _operand(out, sizes.value))
        _c().attention_forward(ctypes.byref(shape), *operands, _pointer(lse), _pointer(scratch))
        ctx.save_for_backward(query, key_value, key_rope, value, table, first, out, lse)
        ctx.sizes, ctx.scale = sizes, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key_value, key_rope, value, table, first, out, lse = ctx.saved_tensors
        sizes: Sizes = ctx.sizes
        gradient, length = gradient.contiguous(), query.shape[1]
        grads = tuple(None if x is None else torch.empty_like(x) for x in (query, key_value, key_rope, value))
        block, width = min(QUERIES, length), sizes.nope + sizes.rope
        scratch = query.new_empty(length * (4 * width + sizes.value + 2 * block))
        shape = _shape(query, table, first, sizes, ctx.scale, block, turn_keys=value is not None)
        _c().attention_backward(
            ctypes.byref(shape), *_inputs(query, key_value, key_rope, value, sizes), _operand(out, sizes.value), _pointer(lse),
            _operand(gradient, sizes.value), *_inputs(grads[0], grads[1], grads[2], grads[3], sizes), _pointer(scratch),
        )  # fmt: skip
        return *grads, None, None, None, None


def latent_attention(
    query: Tensor, key_value: Tensor, key_rope: Tensor, table: Tensor, sizes: Sizes, scale: float, first: Tensor | None = None
) -> Tensor:
    """Causal attention of MLA in its expanded form, from the projections as they come.

    query (B, T, H (N + R)), its rotary parts not yet turned; key_value (B, T, H (N + V)) rebuilt from the latent;
    key_rope (B, T, R), turned, one for all heads; table complex (T, R / 2) or (B, 1, T, R / 2);
    first (int32, B, T): the first position that each position may see, never decreasing -> (B, T, H V).
    """
    return _CausalAttention.apply(query, key_value, key_rope, None, table, first, sizes, scale)


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, table: Tensor, sizes: Sizes, scale: float, first: Tensor | None = None) -> Tensor:
    """Causal attention with `groups` key and value heads: query (B, T, H (N + R)) and key (B, T, groups (N + R)), neither
    turned yet, value (B, T, groups V) -> (B, T, H V); the rest as in `latent_attention`."""
    return _CausalAttention.apply(query, key, None, value, table, first, sizes, scale)


def _inputs(query: Tensor | None, key_value: Tensor | None, key_rope: Tensor | None, value: Tensor | None, sizes: Sizes) -> tuple[Any, ...]:
    """Operands: query and key, both without and with rotation, and value."""
    assert query is not None
    assert key_value is not None
    width = sizes.nope + sizes.rope
    queries = (_operand(query, width), _operand(query, width, sizes.nope))
    if value is not None:
        return *queries, _operand(key_value, width), _operand(key_value, width, sizes.nope), _operand(value, sizes.value)
    assert key_rope is not None
    rebuilt = sizes.nope + sizes.value
    return *queries, _operand(key_value, rebuilt), _operand(key_rope, 0, shared=True), _operand(key_value, rebuilt, sizes.nope)


def _shape(query: Tensor, table: Tensor, first: Tensor | None, sizes: Sizes, scale: float, block: int, *, turn_keys: bool) -> _Shape:
    per_batch = 0 if table.shape[0] != query.shape[0] or table.ndim == 3 else table.stride(0)
    first_at = None if first is None else first.data_ptr()
    return _Shape(
        query.shape[0], sizes.heads, sizes.groups, query.shape[1], sizes.nope, sizes.rope, sizes.value,
        scale, table.data_ptr(), per_batch, turn_keys, first_at, block,
    )  # fmt: skip


def _i(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def _c() -> ctypes.CDLL:
    found = library()
    assert found is not None
    return found
