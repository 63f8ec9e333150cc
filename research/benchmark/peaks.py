"""What the machine can do at best: products of matrices, and bytes moved.  Rates are measured, not read off a data sheet."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from research.benchmark.timing import median_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Peaks:
    """`product_flops_per_second` by precision (square matrices of `product_size`, values drawn at random: a card is faster on
    zeros); `bytes_per_second` read and written by a copy of `copy_bytes`, and read by a sum over them."""

    product_size: int
    product_flops_per_second: dict[str, float]
    copy_bytes: int
    copy_bytes_per_second: float
    read_bytes_per_second: float

    @property
    def bytes_per_second(self) -> float:
        """The better of the two: what a floor is drawn with."""
        return max(self.copy_bytes_per_second, self.read_bytes_per_second)


def measure_peaks(device: torch.device, *, size: int, copy_bytes: int, repeats: int) -> Peaks:
    """float32 without TF32 unless torch was told otherwise."""
    products = {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        products[name] = 2 * size**3 / median_seconds(partial(torch.mm, a, b, out=out), device, repeats=repeats)
    source = torch.ones(copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, repeats=repeats)
    read = source.nbytes / median_seconds(source.sum, device, repeats=repeats)
    return Peaks(
        product_size=size,
        product_flops_per_second=products,
        copy_bytes=source.nbytes,
        copy_bytes_per_second=moved,
        read_bytes_per_second=read,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedRate:
    """One grouped product, (tokens, inputs) by (experts, outputs, inputs), tokens evenly spread; FLOPs per second and shares of the peak."""

    precision: str
    experts: int
    tokens_per_expert: int
    inputs: int
    outputs: int
    forward_flops_per_second: float
    both_flops_per_second: float
    """Forward and backward together: three times the FLOPs."""
    forward_of_peak: float
    both_of_peak: float


def measure_grouped(device: torch.device, peaks: Peaks, sizes: tuple[int, int, int], tokens_per_expert: int, *, repeats: int) -> GroupedRate:
    """`torch.nn.functional.grouped_mm` in the precision of the experts (bfloat16 on CUDA, float32 on a CPU); sizes: experts, inputs, outputs."""
    experts, inputs, outputs = sizes
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    precision = str(dtype).removeprefix("torch.")
    tokens = experts * tokens_per_expert
    rows = torch.randn(tokens, inputs, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(experts, outputs, inputs, device=device, dtype=dtype, requires_grad=True)
    ends = torch.arange(1, experts + 1, device=device, dtype=torch.int32) * tokens_per_expert
    along = torch.randn(tokens, outputs, device=device, dtype=dtype)

    def forward() -> Tensor:
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), (rows, weight), along)

    with torch.no_grad():
        alone = median_seconds(forward, device, repeats=repeats)
    together = median_seconds(both, device, repeats=repeats)
    flops, peak = 2.0 * tokens * inputs * outputs, peaks.product_flops_per_second[precision]
    return GroupedRate(
        precision=precision,
        experts=experts,
        tokens_per_expert=tokens_per_expert,
        inputs=inputs,
        outputs=outputs,
        forward_flops_per_second=flops / alone,
        both_flops_per_second=3 * flops / together,
        forward_of_peak=flops / alone / peak,
        both_of_peak=3 * flops / together / peak,
    )
