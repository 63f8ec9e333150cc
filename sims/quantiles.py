"""What a prediction is made of: draws of the calibrated constants, and the P10, P50 and P90 that come out."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantiles:
    """P10, P50 and P90 of a predicted quantity, in its own unit."""

    p10: float
    p50: float
    p90: float

    @classmethod
    def of(cls, draws: np.ndarray) -> "Quantiles":
        """Of one value per draw of the constants, float64 (draws,)."""
        p10, p50, p90 = np.quantile(np.atleast_1d(draws), (0.1, 0.5, 0.9))
        return cls(p10=float(p10), p50=float(p50), p90=float(p90))

    def __iter__(self) -> Iterator[float]:
        return iter((self.p10, self.p50, self.p90))
