"""95 % intervals: of ratios of sums over texts (bootstrap), and of a share of items (Wilson)."""

import math

import numpy as np

RESAMPLES = 2000
_AT_ONCE = 1_000_000
_Z = 1.959964  # the normal distribution's 97.5 % point


def resampled_sums(units: np.ndarray, seed: int | tuple[int, ...] = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """float64 (resamples, K): column sums of `units` (N, K) when N units are drawn from them with replacement.

    Columns are drawn together, so ratios and differences of them are paired.  The same seed draws the same.
    """
    random = np.random.default_rng(seed)
    n = len(units)
    share = np.full(n, 1 / n)
    step = max(1, _AT_ONCE // n)
    parts = [random.multinomial(n, share, size=min(step, resamples - first)) @ units for first in range(0, resamples, step)]
    return np.concatenate(parts)


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled values (Efron's percentile interval)."""
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """Wilson's score interval of a binomial share (Wilson 1927); it does not collapse at 0 or `trials` successes.

    ValueError without trials.
    """
    if trials < 1:
        raise ValueError(f"trials={trials}: an interval needs at least one")
    share, z2 = successes / trials, _Z**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)
