"""Seconds on a device whose work runs behind the caller's back."""

import gc
import statistics
import time
from collections.abc import Callable

import torch


def synchronise(device: torch.device) -> None:
    """Wait until everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(work: Callable[[], object], device: torch.device, *, repeats: int, warmup: int = 2) -> float:
    """Median time of `work` over `repeats` calls, after `warmup` calls that do not count; on CUDA between two events on its stream."""
    for _ in range(warmup):
        work()
    synchronise(device)
    return statistics.median(_once(work, device) for _ in range(repeats))


def _once(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3


def forget_peak(device: torch.device) -> None:
    """Free what nobody holds, and count the peak of allocated memory from here."""
    gc.collect()  # a model and its optimizer refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes that tensors held since `forget_peak`; None where the device does not count them."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
