"""How fast a model trains, and how fast it decodes out of its cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from research import accounting
from research.benchmark.peaks import Peaks
from research.benchmark.step import Trainer, random_model, random_tokens
from research.benchmark.timing import forget_peak, median_seconds, peak_bytes
from research.config import ModelConfig
from research.model.cache import Cache


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRate:
    """`mfu`: model FLOPs (`accounting.train_flops_per_token`, nothing recomputed counted) per second over the measured peak of `precision`."""

    model: str
    parameters: int
    precision: str
    batch_size: int
    sequence_length: int
    seconds_per_step: float
    tokens_per_second: float
    train_flops_per_token: float
    mfu: float
    peak_memory_bytes: int | None


def measure_training(
    name: str, config: ModelConfig, device: torch.device, peaks: Peaks, batch_size: int, length: int, *, repeats: int
) -> TrainingRate:
    """Whole steps: forward, balance losses, backward, clipping and AdamW.  Where `batch_size` sequences do not fit, half as many are
    tried, down to one; OutOfMemoryError when that does not fit either."""
    while True:
        forget_peak(device)
        try:
            seconds = _step_seconds(config, device, batch_size, length, repeats)
            break
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
        batch_size //= 2
    precision = "bfloat16" if device.type == "cuda" else "float32"
    flops, rate = accounting.train_flops_per_token(config, length), batch_size * length / seconds
    return TrainingRate(
        model=name,
        parameters=accounting.total_parameters(config),
        precision=precision,
        batch_size=batch_size,
        sequence_length=length,
        seconds_per_step=seconds,
        tokens_per_second=rate,
        train_flops_per_token=flops,
        mfu=rate * flops / peaks.product_flops_per_second[precision],
        peak_memory_bytes=peak_bytes(device),
    )


def _step_seconds(config: ModelConfig, device: torch.device, batch_size: int, length: int, repeats: int) -> float:
    trainer = Trainer(random_model(config, device))
    ids = random_tokens(config, (batch_size, length + 1), device)
    return median_seconds(lambda: trainer.step(ids), device, repeats=repeats)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeRate:
    """One sequence, one token at a time behind `context` cached positions.

    `floor_seconds`: bytes that a step must read, the activated weights (`accounting.activated_parameters`) and the cached
    vectors in `precision`, over the measured memory bandwidth.
    """

    model: str
    precision: str
    context: int
    seconds_per_token: float
    tokens_per_second: float
    floor_seconds: float
    times_floor: float
    cache_bytes: int
    peak_memory_bytes: int | None


@torch.no_grad()
def measure_decode(
    name: str, config: ModelConfig, device: torch.device, peaks: Peaks, contexts: Sequence[int], steps: int, *, repeats: int
) -> list[DecodeRate]:
    """Greedy steps on a cache that one prefill of random tokens filled; a time is that of `steps` steps over `steps`, the median of `repeats`."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model(config, device, dtype).eval()
    rates = []
    for context in contexts:
        forget_peak(device)
        cache = Cache.allocate(config, 1, context + steps * (repeats + 1), dtype=dtype, device=device)
        token = model(random_tokens(config, (1, context), device), cache).logits[:, -1:].argmax(-1)

        def decode(token: torch.Tensor = token, cache: Cache = cache) -> None:
            for _ in range(steps):
                token = model(token, cache).logits.argmax(-1)

        seconds = median_seconds(decode, device, repeats=repeats, warmup=1) / steps
        size = torch.finfo(dtype).bits
        cached = int(context * accounting.kv_cache_bytes_per_token(config, size))
        floor = (accounting.activated_parameters(config) * size / 8 + cached) / peaks.bytes_per_second
        rates.append(
            DecodeRate(
                model=name,
                precision=str(dtype).removeprefix("torch."),
                context=context,
                seconds_per_token=seconds,
                tokens_per_second=1 / seconds,
                floor_seconds=floor,
                times_floor=seconds / floor,
                cache_bytes=cached,
                peak_memory_bytes=peak_bytes(device),
            )
        )
    return rates
