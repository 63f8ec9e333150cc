"""Vectors in few bits: a grid of its own for each vector, codes packed into bytes without a gap.

DeepSeek-V2 keeps its cache in 6 bits per element on average (V2 section 3.2.3) and does not print how.
Here a vector x becomes codes q = round((x - o) / s) in 0 .. 2^bits - 1, with the offset o = min x and the
step s = (max x - o) / (2^bits - 1), both bfloat16, which has the range of float32: nothing over- or
underflows.  The offset is rounded down and the step up, so that no element lies outside the grid and each
comes back within half a step.  On latents (width 64) and rotary keys (width 16) of trained scaled models the
offset takes 10 to 25 % off the error that one symmetric step leaves, for two bytes more per vector.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from research.model.layers import at_least_float32

GROUPS = {8: (1, 1), 6: (4, 3), 4: (2, 1)}
"""bits: (values, bytes) of the smallest group of values that fills whole bytes."""


def quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x (..., W), finite -> codes uint8 (..., W) in 0 .. 2^bits - 1, and grids bfloat16 (..., 2): step and offset."""
    x, top = at_least_float32(x), 2**bits - 1
    offset = _towards(x.amin(-1, keepdim=True), -math.inf)
    step = _towards((x.amax(-1, keepdim=True) - offset.to(x.dtype)) / top, math.inf)
    # A vector of equal elements may have the step 0; what it is divided by does not matter then.
    divisor = step.to(x.dtype).where(step > 0, torch.ones((), dtype=x.dtype, device=x.device))
    codes = ((x - offset.to(x.dtype)) / divisor).round().clamp(0, top)
    return codes.to(torch.uint8), torch.cat((step, offset), -1)


def dequantise(codes: Tensor, grid: Tensor, dtype: torch.dtype) -> Tensor:
    """codes (..., W), grid (..., 2) -> s q + o, (..., W) in `dtype`, computed in float32 at least."""
    wide = dtype if dtype == torch.float64 else torch.float32
    step, offset = grid.to(wide).split(1, -1)
    return (codes.to(wide) * step + offset).to(dtype)


def packed_bytes(width: int, bits: int) -> int:
    """Bytes of `width` codes, the last group filled up."""
    values, size = GROUPS[bits]
    return -(-width // values) * size


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes uint8 (..., W) below 2^bits -> uint8 (..., packed_bytes(W)), lowest bits first; the last group is filled with zeros."""
    values, _ = GROUPS[bits]
    if bits == 8:
        return codes
    group = F.pad(codes, (0, -codes.shape[-1] % values)).unflatten(-1, (-1, values))
    if bits == 4:
        return group[..., 0] | group[..., 1] << 4
    a, b, c, d = group.unbind(-1)
    return torch.stack((a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2), -1).flatten(-2)


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """The `width` codes that `pack` wrote: uint8 (..., bytes) -> uint8 (..., W)."""
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :width]
    a, b, c = packed.unflatten(-1, (-1, 3)).unbind(-1)
    return torch.stack((a & 63, a >> 6 | (b & 15) << 2, b >> 4 | (c & 3) << 4, c >> 2), -1).flatten(-2)[..., :width]


def _towards(x: Tensor, limit: float) -> Tensor:
    """x in bfloat16, rounded towards `limit` (plus or minus infinity)."""
    near = x.to(torch.bfloat16)
    passed = near.to(x.dtype) < x if limit > 0 else near.to(x.dtype) > x
    return near.where(~passed, near.nextafter(torch.full_like(near, limit)))
