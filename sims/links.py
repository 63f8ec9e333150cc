"""What is left of the GPUs' links, and which GPUs a question may name: slow hardware is a number per GPU."""

from collections.abc import Mapping

import numpy as np

from sims.collective import Speed

LINKS = {"nic": ("nic out", "nic in"), "nvlink": ("nvlink out", "nvlink in")}


def with_exceptions(factors: np.ndarray, exceptions: Mapping[int, float]) -> np.ndarray:
    """The same with some GPUs' factors replaced."""
    found = factors.copy()
    for gpu, factor in exceptions.items():
        found[gpu] = factor
    return found


def link_speed(gpus: int, nic: Mapping[int, float], nvlink: Mapping[int, float]) -> Speed:
    """By stream, the share of its bandwidth that each GPU's link still has, float64 (gpus,)."""
    shares = {name: with_exceptions(np.ones(gpus), left) for name, left in (("nic", nic), ("nvlink", nvlink))}
    return {stream: shares[name] for name, streams in LINKS.items() for stream in streams}


def check_gpus(name: str, values: Mapping[int, float], gpus: int, most: float, meaning: str) -> None:
    """ValueError for a GPU that is not there, and for a factor that makes no sense."""
    for gpu, factor in values.items():
        if not 0 <= gpu < gpus:
            raise ValueError(f"{name}.{gpu}={factor}: there is no such GPU; valid: 0 to {gpus - 1}")
        if not 0 < factor <= most:
            raise ValueError(f"{name}.{gpu}={factor}: must lie in 0..{most:g}, without 0 ({meaning})")


def check_links(nic: Mapping[int, float], nvlink: Mapping[int, float], gpus: int) -> None:
    """ValueError as `check_gpus`, for both kinds of link."""
    for name, values in (("nic", nic), ("nvlink", nvlink)):
        check_gpus(name, values, gpus, 1.0, "share of the bandwidth that is left")
