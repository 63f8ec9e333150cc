"""The small parts: normalisation, the gated FFN, rotary position embedding."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from research.config import Activation, YarnConfig
from research.model.kernels import functions, native


def at_least_float32(x: Tensor) -> Tensor:
    """x, or x in float32 where it is narrower: what normalisation, gate and softmax are computed in."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def autocast_on(x: Tensor) -> bool:
    """Whether an enclosing autocast narrows products of x; the meta device, where nothing is computed, knows none."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def few_rows(x: Tensor) -> bool:
    """Whether x (..., D) are few tokens at a time, as in decoding, that need no gradients: a matter of reading the weights."""
    return x.numel() <= functions.FEW_ROWS * x.shape[-1] and not torch.is_grad_enabled()


def linear(x: Tensor, weight: Tensor, onto: Tensor | None = None) -> Tensor:
    """x W^T, added to `onto`; few rows on a CPU by a kernel that reads W as fast as memory gives it."""
    few = few_rows(x)
    if few and native.usable(x, weight):
        out = functions.few_rows_product(x, weight)
    elif onto is not None and not few and native.usable(x, weight, onto):
        return torch.addmm(onto.flatten(0, -2), x.flatten(0, -2), weight.T).view(onto.shape)
    else:
        out = F.linear(x, weight)
    return out if onto is None else onto + out


class Linear(nn.Linear):
    """`linear` without a bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        return linear(x, self.weight, onto)


class _Normalise(torch.autograd.Function):
    """x / rms(x) * weight with its gradient by hand: half the time of the composed form on a CPU, where no fused kernel exists."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        unit = x * inverse
        ctx.save_for_backward(unit, weight, inverse)
        return unit * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, weight, inverse = ctx.saved_tensors
        along = gradient * unit
        weight_gradient = along.flatten(0, -2).sum(0)
        mean = (along @ weight).div_(weight.shape[0])[..., None]
        return torch.addcmul(gradient * weight, unit, mean, value=-1).mul_(inverse), weight_gradient, None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 at least."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if native.usable(x, self.weight):
            return functions.normalise(x, self.weight, self.eps)
        wide = at_least_float32(x)
        weight = self.weight.to(wide.dtype)
        if x.device.type == "cpu":
            return _Normalise.apply(wide, weight, self.eps).to(x.dtype)
        return F.rms_norm(wide, weight.shape, weight, self.eps).to(x.dtype)

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x for a residual connection, and what is normalised."""
        return functions.normalise_beside(x, self.weight, self.eps) if native.usable(x, self.weight) else (x, self(x))


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


class FeedForward(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) where it is not gated.

    The dense FFN, and the shared experts as one FFN of their summed width.  Gated with `silu` it is SwiGLU.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, activation: Activation = "silu", *, gated: bool = True) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate_proj = Linear(hidden_size, intermediate_size) if gated else None
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """Added to `onto`."""
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)), onto)
        swiglu = self.activation is F.silu and native.usable(x, *self.weights())
        if swiglu and not few_rows(x):
            return functions.feed_forward(x, *self.weights(), onto)
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(functions.swiglu(gate, up) if swiglu else self.activation(gate) * up, onto)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of gate, up and down of a gated one."""
        assert self.gate_proj is not None
        return self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight


def rotary_frequencies(
    width: int, theta: float, yarn: YarnConfig | None = None, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> Tensor:
    """Radians per position of each rotary pair, (R / 2,): theta^(-2i / R), each step in `dtype` and in the released code's order.

    YaRN (V2 section 3.1.4) divides those of slow pairs by its factor.  Pair i turns L theta^(-2i / R) / (2 pi)
    times over the original length L: up to the last whole i that turns beta_fast times it is left alone, from the
    first that turns beta_slow times it is divided wholly, and in between the two are mixed along a straight line.
    """
    pair_periods = theta ** (torch.arange(0, width, 2, dtype=dtype, device=device) / width)
    if yarn is None:
        return 1.0 / pair_periods

    def pair_turning(times: float) -> float:
        return width * math.log(yarn.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    # The bound is R - 1, although there are only R / 2 pairs: so it is in the released code.
    high = min(math.ceil(pair_turning(yarn.beta_slow)), width - 1)
    pairs = torch.arange(width // 2, dtype=dtype, device=device)
    kept = 1 - ((pairs - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return 1.0 / (yarn.factor * pair_periods) * (1 - kept) + 1.0 / pair_periods * kept


def rotary_table(positions: Tensor, width: int, theta: float, dtype: torch.dtype = torch.float32, yarn: YarnConfig | None = None) -> Tensor:
    """e^(i angle), complex (T, R / 2), of `positions` (T,): pair i turns by position * its frequency, and is
    lengthened by YaRN's `rotary_scale`, 1 as published.

    Angles are taken in float32 (float64 for a `dtype` of float64), as the released models were trained with them:
    at position 2,048 a more precise angle already moves the logits by 2e-5.  The table is complex64 or complex128.
    """
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    angles = positions.to(dtype)[:, None] * rotary_frequencies(width, theta, yarn, dtype, positions.device)
    return torch.polar(torch.ones_like(angles), angles) * (yarn.rotary_scale if yarn is not None else 1.0)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """RoPE on x (..., T, R): each adjacent pair (x_2i, x_2i+1) is turned as one complex number."""
    pairs = at_least_float32(x).unflatten(-1, (-1, 2)).contiguous()
    if pairs.storage_offset() % 2:
        # A single row behind an odd width is contiguous as it is, but a complex number cannot begin there.
        pairs = pairs.clone()
    return torch.view_as_real(torch.view_as_complex(pairs) * table).flatten(-2).to(x.dtype)
