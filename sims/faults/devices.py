"""How fast the GPUs of a cluster really compute, by a distribution."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

SLOWEST = 100.0


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
