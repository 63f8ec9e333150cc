"""How fast the GPUs of a cluster really are: their computing by a distribution or one by one, and their links."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from sims.collective import Speed

SLOWEST = 100.0
LINKS = {"nic": ("nic out", "nic in"), "nvlink": ("nvlink out", "nvlink in")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Speeds:
    """Time of a GPU's computing over that of a healthy one, as a distribution over GPUs.

    `constant`: all alike.  `normal`: 1 and a standard deviation of `spread`, not below 0.5.  `stragglers`: `count` GPUs, drawn
    without replacement, take `factor` times as long.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "allow_inf_nan": False}

    kind: Literal["constant", "normal", "stragglers"] = "constant"
    spread: float = 0.03
    count: int = 1
    factor: float = 1.25

    def __post_init__(self) -> None:
        if not 0 <= self.spread <= 1:
            raise ValueError(f"spread={self.spread} must lie in 0..1")
        if self.count < 0:
            raise ValueError(f"count={self.count} must be >= 0")
        if not 0 < self.factor <= SLOWEST:
            raise ValueError(f"factor={self.factor} must lie in 0..{SLOWEST:g}, without 0 (1.25: a quarter slower)")

    def factors(self, gpus: int, seed: int) -> np.ndarray:
        """float64 (gpus,)."""
        random, found = np.random.default_rng(seed), np.ones(gpus)
        if self.kind == "normal":
            found = np.maximum(random.normal(1.0, self.spread, gpus), 0.5)
        elif self.kind == "stragglers":
            found[random.permutation(gpus)[: self.count]] = self.factor
        return found


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
