"""Paired comparisons of few seeds: intervals, Holm's correction, and what a study could have shown.

Every variant is compared with the baseline seed by seed, since the same seed sees the same tokens.  A
bootstrap of n seeds alone cannot be honest: whatever its kind, its ends lie between the smallest and the
largest difference, which hold the truth in at most 1 - 2^(1-n) of all studies (50 % of those with 2 seeds, 75 %
with 3, 94 % with 5).  The interval that decides is therefore the hull of two:

* scipy's percentile bootstrap over the seeds, and
* Student's t on the paired differences.  Its spread is the variant's own from OWN_SPREAD seeds on, but never less than
  the median of all variants' (few seeds lie close together by luck); with fewer seeds it is that of all variants
  together, read as a block design (value = variant + seed + noise of one size: where one variant is ten times as noisy
  as the rest, two seeds raise up to three times as many false alarms as stated).

The p-values are of the same t; Holm (1979) corrects them over the study's comparisons.  An effect counts as shown if its
corrected p is at most 1 - LEVEL and its interval leaves zero out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

LEVEL = 0.95
POWER = 0.8
OWN_SPREAD = 3
RESAMPLES = 2000
ROUNDING = 1e-13
MOST_SEEDS = 1000
Values = Mapping[int, float]
"""A variant's value by seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over seeds with a 95 % t-interval; `low` and `high` are None where one seed gives none."""

    mean: float
    low: float | None
    high: float | None
    seeds: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """Variant minus baseline over the seeds that both finished.

    `low` and `high`: the 95 % interval that decides; None where nothing gives a spread. `p` is two-sided, `p_holm` corrected
    over the study's comparisons. `spread`: standard deviation of a paired difference as it was used, with `freedom` degrees
    of freedom; `pooled`: it is that of all variants together.
    """

    mean: float
    low: float | None
    high: float | None
    bootstrap_low: float | None
    bootstrap_high: float | None
    p: float | None
    p_holm: float | None
    seeds: int
    spread: float | None
    freedom: int
    pooled: bool
    comparisons: int

    @property
    def shown(self) -> bool:
        """The study tells this variant from the baseline."""
        return self.excludes_zero and self.p_holm is not None and self.p_holm <= 1 - LEVEL

    @property
    def excludes_zero(self) -> bool:
        """The interval of this comparison alone leaves zero out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def half(self) -> float | None:
        """Half the interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def estimate(values: Sequence[float]) -> Estimate | None:
    """None where there is no value."""
    if not len(values):
        return None
    mean = float(np.mean(values))
    if len(values) == 1:
        return Estimate(mean=mean, low=None, high=None, seeds=1)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Estimate(mean=mean, low=mean - half, high=mean + half, seeds=len(values))


def compare(baseline: Values, variants: Mapping[str, Values]) -> dict[str, Effect]:
    """Each variant minus the baseline; variants that share no seed with it are left out."""
    pairs = {name: np.array([values[s] - baseline[s] for s in sorted(values) if s in baseline]) for name, values in variants.items()}
    # What is left of equal numbers after rounding is no difference.
    scale = ROUNDING * max((abs(value) for value in baseline.values()), default=0.0)
    pairs = {name: np.where(abs(differences) <= scale, 0.0, differences) for name, differences in pairs.items() if len(differences)}
    pairs = {name: _without_rounding(d, scale) for name, d in pairs.items()}
    block = _block_design(baseline, {name: variants[name] for name in pairs}) if any(len(d) < OWN_SPREAD for d in pairs.values()) else None
    floor = _typical([d for d in pairs.values() if len(d) >= OWN_SPREAD])
    resampled = _bootstrap(pairs)
    rows = {name: _row(name, d, floor, block) for name, d in pairs.items()}
    tested = [name for name, row in rows.items() if row.p is not None]
    corrected = dict(zip(tested, holm([rows[name].p or 0.0 for name in tested]), strict=True))
    return {name: _effect(row, pairs[name], resampled.get(name), corrected.get(name), len(tested)) for name, row in rows.items()}


def _without_rounding(differences: np.ndarray, scale: float) -> np.ndarray:
    """Differences that lie together within `scale` are equal: no spread is made of what rounding left."""
    return np.full(len(differences), differences.mean()) if np.ptp(differences) <= scale else differences


@dataclass(frozen=True, slots=True)
class _Row:
    mean: float
    error: float | None
    freedom: int
    spread: float | None
    pooled: bool

    @property
    def p(self) -> float | None:
        if self.error is None:
            return None
        if self.error == 0:
            return 0.0 if self.mean else 1.0
        return float(2 * special.stdtr(self.freedom, -abs(self.mean) / self.error))


def _typical(pairs: Sequence[np.ndarray]) -> tuple[float, int]:
    """The median spread, and its degrees of freedom: a third of all, for a median is less sure than a mean and one baseline is in all of them."""
    if not pairs:
        return 0.0, 0
    return float(np.median([d.std(ddof=1) for d in pairs])), sum(len(d) - 1 for d in pairs) // 3


def _row(name: str, differences: np.ndarray, typical: tuple[float, int], block: "_Block | None") -> _Row:
    seeds, mean = len(differences), float(differences.mean())
    if seeds >= OWN_SPREAD:
        own, (floor, freedom) = float(differences.std(ddof=1)), typical
        if own >= floor:
            return _Row(mean, own / math.sqrt(seeds), seeds - 1, own, pooled=False)
        return _Row(mean, floor / math.sqrt(seeds), max(seeds - 1, freedom), floor, pooled=False)
    if block is not None and block.freedom:
        if not block.noise:
            return _Row(mean, 0.0, block.freedom, 0.0, pooled=True)
        return _Row(block.means[name], block.errors[name], block.freedom, block.noise * math.sqrt(2), pooled=True)
    if seeds > 1:
        spread = float(differences.std(ddof=1))
        return _Row(mean, spread / math.sqrt(seeds), seeds - 1, spread, pooled=False)
    return _Row(mean, None, 0, None, pooled=False)


def _effect(row: _Row, differences: np.ndarray, resampled: tuple[float, float] | None, p_holm: float | None, comparisons: int) -> Effect:
    low = high = None
    if row.error is not None:
        half = float(special.stdtrit(row.freedom, (1 + LEVEL) / 2)) * row.error
        low, high = row.mean - half, row.mean + half
        if resampled is not None:
            low, high = min(low, resampled[0]), max(high, resampled[1])
    return Effect(
        mean=row.mean,
        low=low,
        high=high,
        bootstrap_low=resampled[0] if resampled else None,
        bootstrap_high=resampled[1] if resampled else None,
        p=row.p,
        p_holm=p_holm,
        seeds=len(differences),
        spread=row.spread,
        freedom=row.freedom,
        pooled=row.pooled,
        comparisons=comparisons,
    )


def _bootstrap(pairs: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """scipy's percentile bootstrap of the mean, all variants with equally many seeds at once; the same numbers each time."""
    found: dict[str, tuple[float, float]] = {}
    for seeds in sorted({len(d) for d in pairs.values()} - {1}):
        names = [name for name, d in pairs.items() if len(d) == seeds]
        data = np.array([pairs[name] for name in names])
        interval = stats.bootstrap(
            (data,), np.mean, n_resamples=RESAMPLES, axis=-1, confidence_level=LEVEL, method="percentile", rng=np.random.default_rng(0)
        ).confidence_interval
        found |= {name: (float(low), float(high)) for name, low, high in zip(names, interval.low, interval.high, strict=True)}
    return found


@dataclass(frozen=True, slots=True)
class _Block:
    means: dict[str, float]
    errors: dict[str, float]
    noise: float
    freedom: int


def _block_design(baseline: Values, variants: Mapping[str, Values]) -> _Block:
    """Least squares of value = variant + seed + noise over all cells that are there."""
    cells = [(index, seed, value) for index, values in enumerate([baseline, *variants.values()]) for seed, value in values.items()]
    seeds = sorted({seed for _, seed, _ in cells})
    design = np.zeros((len(cells), len(variants) + len(seeds)))
    for row, (index, seed, _) in enumerate(cells):
        design[row, len(variants) + seeds.index(seed)] = 1.0
        if index:
            design[row, index - 1] = 1.0
    values = np.array([value for _, _, value in cells])
    inverse = np.linalg.pinv(design.T @ design)
    solution = inverse @ design.T @ values
    freedom = len(cells) - int(np.linalg.matrix_rank(design))
    noise = math.sqrt(float(((values - design @ solution) ** 2).sum()) / freedom) if freedom else 0.0
    noise = 0.0 if noise <= ROUNDING * float(abs(values).max()) else noise
    errors = noise * np.sqrt(np.diag(inverse)[: len(variants)])
    return _Block(dict(zip(variants, map(float, solution), strict=False)), dict(zip(variants, map(float, errors), strict=True)), noise, freedom)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): family-wise, whatever the dependence."""
    order = np.argsort(p, kind="stable")
    steps = np.array(p)[order] * (len(p) - np.arange(len(p)))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(p) else steps
    return [float(value) for value in corrected]


def noise_floor(baseline: Values) -> float | None:
    """Standard deviation of the baseline over its seeds; None with fewer than two."""
    return float(np.std(list(baseline.values()), ddof=1)) if len(baseline) > 1 else None


def power(effect: float, spread: float, seeds: int, freedom: int, comparisons: int) -> float:
    """How often an effect of this size is shown at the level of Holm's first step (noncentral t, both sides)."""
    bound = stats.t.isf((1 - LEVEL) / comparisons / 2, freedom)
    shift = abs(effect) / (spread / math.sqrt(seeds))
    value = stats.nct.sf(bound, freedom, shift) + stats.nct.cdf(-bound, freedom, shift)
    # scipy's noncentral t gives nan far out, where nothing is left to doubt.
    return float(value) if math.isfinite(value) else 1.0


def smallest_effect(spread: float, seeds: int, freedom: int, comparisons: int) -> float:
    """The effect that is shown with a probability of POWER, in the units of `spread` (a paired difference's deviation)."""
    bound = float(stats.t.isf((1 - LEVEL) / comparisons / 2, freedom)) * spread / math.sqrt(seeds)
    if not spread:
        return 0.0
    return float(optimize.brentq(lambda effect: power(effect, spread, seeds, freedom, comparisons) - POWER, 0.0, 8 * bound, xtol=bound * 1e-6))


def seeds_needed(effect: float, spread: float, comparisons: int) -> int | None:
    """Seeds, at least 2, from which an effect is shown with a probability of POWER on its own spread; None beyond MOST_SEEDS."""
    if not spread:
        return 2
    enough = [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, MOST_SEEDS]
    upper = next((n for n in enough if power(effect, spread, n, n - 1, comparisons) >= POWER), None)
    if upper is None:
        return None
    lower = max((n for n in enough if n < upper), default=1)
    return next(n for n in range(lower + 1, upper + 1) if power(effect, spread, n, n - 1, comparisons) >= POWER)
