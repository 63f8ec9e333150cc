"""The kernels as differentiable functions; each says what its plain PyTorch twin is, and `native.usable` says when to call it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from research.model.kernels.native import loaded

ROWS = 256
"""Assignments of one expert that are taken at a time."""


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous and the others collapsible to rows of one stride, copied only where it is not so."""
    if x.stride(-1) == 1 and all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.ndim - 2)):
        return x
    return x.contiguous()


FEW_ROWS = 8
"""Rows up to which a product is a matter of reading the weight."""


def few_rows_product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., k) of FEW_ROWS rows at most and weight (n, k) -> (..., n); no gradients."""
    x, (outputs, inputs) = x.contiguous(), weight.shape
    out = x.new_empty(*x.shape[:-1], outputs)
    loaded().few_rows_product(pointer(x), pointer(weight), pointer(out), x.numel() // inputs, outputs, inputs)
    return out


def _row_stride(x: Tensor) -> int:
    """Between the rows of x as `_rows` gives it; the strides of dimensions of size 1 say nothing."""
    return x.shape[-1] if x.is_contiguous() else x.stride(-2)


def _normalised(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y and 1 / rms(x) of each row; x with equidistant rows."""
    size = x.shape[-1]
    y, inverse = x.new_empty(x.shape), x.new_empty(x.numel() // size)
    loaded().rms_norm(pointer(x), _row_stride(x), pointer(weight), eps, pointer(y), pointer(inverse), len(inverse), size)
    return y, inverse


def _normalise_backward(gradient: Tensor, beside: Tensor | None, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    gradient, beside = gradient.contiguous(), None if beside is None else beside.contiguous()
    dx, dweight = x.new_empty(x.shape), torch.empty_like(weight)
    rows, size = inverse.numel(), x.shape[-1]
    loaded().rms_norm_backward(*map(pointer, (gradient, beside, x)), _row_stride(x), *map(pointer, (weight, inverse, dx, dweight)), rows, size)
    return dx, dweight


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = _rows(x)
        y, inverse = _normalised(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_normalise_backward(gradient, None, *ctx.saved_tensors), None


class _NormaliseBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, inverse = _normalised(_rows(x), weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return x, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, beside: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        return *_normalise_backward(gradient, beside, _rows(x), weight, inverse), None


def normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (`layers.RMSNorm`)."""
    # An autograd function costs 10 us where it has nothing to do, several times what a token's norm takes.
    return _Normalise.apply(x, weight, eps) if torch.is_grad_enabled() else _normalised(_rows(x), weight, eps)[0]


def normalise_beside(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, and `normalise` of it: where both are used, their gradients are added in the pass that makes the second one."""
    return _NormaliseBeside.apply(x, weight, eps) if torch.is_grad_enabled() else (x, normalise(x, weight, eps))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element by element; no gradients."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    loaded().swiglu(pointer(gate), pointer(up), pointer(out), gate.numel())
    return out


class _Ffn(NamedTuple):
    """The weights of a SwiGLU FFN: gate and up (F, D), down (D, F)."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def forward(self, x: Tensor, onto: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of x (M, D): gate and up (M, F), which the way back needs, and what it makes, added to `onto` (M, D)."""
        gate, up = x @ self.gate.T, x @ self.up.T
        active = swiglu(gate, up)
        return gate, up, active @ self.down.T if onto is None else torch.addmm(onto, active, self.down.T)

    def backward(self, gradient: Tensor, x: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, "_Ffn"]:
        """Gradients of x, in a tensor of its own, and of the weights."""
        dgate, active, dup = gradient @ self.down, torch.empty_like(gate), torch.empty_like(up)
        loaded().swiglu_backward(*map(pointer, (dgate, gate, up, active, dup)), gate.numel())
        ddown = gradient.T @ active
        del active
        return (dgate @ self.gate).addmm_(dup, self.up), _Ffn(dgate.T @ x, dup.T @ x, ddown)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, onto: Tensor | None, *weights: Tensor) -> Tensor:
        gate, up, out = _Ffn(*weights).forward(x, onto)
        ctx.save_for_backward(x, gate, up, *weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, *weights = ctx.saved_tensors
        dx, grads = _Ffn(*weights).backward(gradient, x, gate, up)
        return dx, gradient if ctx.needs_input_grad[1] else None, *grads


def feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, onto: Tensor | None = None) -> Tensor:
    """down(silu(gate(x)) * up(x)) of x (..., D), gate and up (F, D), down (D, F); added to `onto` (..., D).

    One function, so that no sum of gradients passes through memory on its own.
    """
    flat = None if onto is None else onto.flatten(0, -2)
    return _FeedForward.apply(x.flatten(0, -2), flat, gate, up, down).view(*x.shape[:-1], len(down))


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return tuple(x @ weight.T for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, *weights = ctx.saved_tensors
        dx = gradients[0] @ weights[0]
        for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
            dx.addmm_(gradient, weight)
        return dx, *(gradient.T @ x for gradient in gradients)


def products(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """x (..., D) times the transpose of each weight (n, D): (..., n).  One function, so that the gradients of x add up in the products."""
    return tuple(out.view(*x.shape[:-1], -1) for out in _Products.apply(x.flatten(0, -2), *weights))


def exponentials(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous logits (c, V) become e^(logit - largest) in place; the largest and the sum of each row, (c, 1) both; no gradients."""
    most, sums = logits.new_empty(len(logits), 1), logits.new_empty(len(logits), 1)
    loaded().exponentials(pointer(logits), *logits.shape, pointer(most), pointer(sums))
    return most, sums


def choose_experts(scores: Tensor, devices: int, limit: int, chosen: int) -> Tensor:
    """int64 (M, K) of scores (M, E), as `router.choose`; the lower expert first among equals."""
    scores = scores.contiguous()
    tokens, experts = scores.shape
    ids = torch.empty(tokens, chosen, dtype=torch.int64)
    best, reachable = scores.new_empty(max(chosen, devices)), ids.new_empty(devices)
    loaded().choose_experts(*map(pointer, (scores, ids)), *((tokens, experts, devices, limit, chosen)), pointer(best), pointer(reachable))
    return ids


class _Experts(NamedTuple):
    """Routed SwiGLU experts: gate_up (E, 2F, D), down (E, D, F)."""

    gate_up: Tensor
    down: Tensor

    def forward(self, x: Tensor, gates: Tensor, ids: Tensor, kept: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of x (M, D), added to `out` (M, D); slots, ends and the hidden activations (A, 2F) of the kept assignments, which the way back needs."""
        ids, kept = ids.contiguous(), kept.contiguous()
        (experts, size, width), chosen = self.down.shape, ids.shape[1]
        slot, ends = ids.new_empty(ids.numel()), ids.new_empty(experts)
        slots = loaded().sort_by_expert(*map(pointer, (ids, kept, slot, ends)), ids.numel(), experts)
        hidden, scratch = x.new_empty(slots, 2 * width), x.new_empty(ROWS * (2 * size + width))
        tensors = (x, gates, slot, ends, *self, hidden, out, scratch)
        loaded().experts_forward(*map(pointer, tensors), chosen, experts, size, width, ROWS)
        return slot, ends, hidden

    def backward(
        self, gradient: Tensor, x: Tensor, gates: Tensor, slot: Tensor, ends: Tensor, hidden: Tensor, dx: Tensor
    ) -> tuple[Tensor, "_Experts"]:
        """Gradients of the gates and of the weights; that of x is added to `dx`.  No product is done twice."""
        (experts, size, width), chosen = self.down.shape, gates.shape[1]
        dgates, grads = torch.zeros_like(gates), _Experts(torch.empty_like(self.gate_up), torch.empty_like(self.down))
        scratch = x.new_empty(ROWS * (2 * size + 4 * width))
        tensors = (gradient, x, gates, slot, ends, *self, hidden, dx, dgates, *grads, scratch)
        loaded().experts_backward(*map(pointer, tensors), *((chosen, experts, size, width, ROWS)))
        return dgates, grads


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, ids: Tensor, kept: Tensor, *weights: Tensor) -> Tensor:
        x, gates, out = x.contiguous(), gates.contiguous(), torch.zeros_like(x, memory_format=torch.contiguous_format)
        ctx.save_for_backward(x, gates, *_Experts(*weights).forward(x, gates, ids, kept, out), *weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, slot, ends, hidden, *weights = ctx.saved_tensors
        dx = torch.zeros_like(x)
        dgates, grads = _Experts(*weights).backward(gradient.contiguous(), x, gates, slot, ends, hidden, dx)
        return dx, dgates, None, None, *grads


def routed_experts(x_MD: Tensor, gates_MK: Tensor, ids_MK: Tensor, kept_MK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU experts (`experts.grouped_experts`): gate_up (E, 2F, D), down (E, D, F) -> (M, D)."""
    return _RoutedExperts.apply(x_MD, gates_MK, ids_MK, kept_MK, gate_up, down)


class _SparseFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, onto: Tensor | None, gates: Tensor, ids: Tensor, kept: Tensor, *weights: Tensor) -> Tensor:
        x, gates = x.contiguous(), gates.contiguous()
        gate, up, out = _Ffn(*weights[:3]).forward(x, onto)
        ctx.save_for_backward(x, gates, gate, up, *_Experts(*weights[3:]).forward(x, gates, ids, kept, out), *weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, gate, up, slot, ends, hidden, *weights = ctx.saved_tensors
        gradient = gradient.contiguous()
        dx, shared = _Ffn(*weights[:3]).backward(gradient, x, gate, up)
        dgates, routed = _Experts(*weights[3:]).backward(gradient, x, gates, slot, ends, hidden, dx)
        return dx, gradient if ctx.needs_input_grad[1] else None, dgates, None, None, *shared, *routed


def sparse_feed_forward(
    x_MD: Tensor, gates_MK: Tensor, ids_MK: Tensor, kept_MK: Tensor, shared: tuple[Tensor, Tensor, Tensor], routed: tuple[Tensor, Tensor],
    onto: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`feed_forward` with the weights `shared`, plus `routed_experts` with the weights `routed`, added to `onto` (M, D): one function, so
    that their sums and those of their gradients cost no passes through memory of their own."""
    return _SparseFeedForward.apply(x_MD, onto, gates_MK, ids_MK, kept_MK, *shared, *routed)
