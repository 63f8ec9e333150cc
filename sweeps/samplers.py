"""Samplers: how the next cell is drawn.

A sampler is made anew for every trial out of (seed of the search, number of the trial), and whatever else it goes by stands
in Optuna's storage.  A search that was killed therefore goes on as it would have: `random` and `quasi-random` draw the same
cells in any case; `tpe`, `gp` and `nsga2` draw the same cells if the same results were known at that moment, which with
several workers depends on who finished first.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

optuna.logging.set_verbosity(optuna.logging.ERROR)
DESIGNED = ("one-factor", "grid")
ADAPTIVE = ("tpe", "gp", "nsga2")
DRAWN = ("random", "quasi-random", *ADAPTIVE)
STARTUP_TRIALS = 8
"""Drawn at random before `tpe` and `gp` have a model."""


def make_sampler(kind: str, *, seed: int, number: int, paths: Sequence[str], conditional: bool, population: int) -> BaseSampler:
    """The sampler of one trial.  `gp` imports torch, which takes seconds, when the first trials have ended."""
    own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if kind == "tpe":
            # Grouped: dimensions that exist together are drawn together.
            return TPESampler(seed=own, multivariate=True, group=conditional, constant_liar=True, n_startup_trials=STARTUP_TRIALS)
        if kind == "gp":
            # A dimension that does not exist in every trial is outside the Gaussian process and drawn at random.
            return optuna.samplers.GPSampler(seed=own, n_startup_trials=STARTUP_TRIALS, warn_independent_sampling=False)
        if kind == "nsga2":
            return NSGAIISampler(seed=own, population_size=population)
    if kind == "quasi-random":
        return QuasiRandomSampler(paths, seed)
    return RandomSampler(seed=own)


class QuasiRandomSampler(BaseSampler):
    """Scrambled Sobol points (scipy.stats.qmc): trial n takes point n - 1, since trial 0 is the baseline.

    Optuna's own QMCSampler counts its points in the storage, also for trials that are taken up again, and leaves conditional
    dimensions to chance; here each path has a coordinate of its own.
    """

    def __init__(self, paths: Sequence[str], seed: int) -> None:
        self._paths, self._seed = list(paths), seed
        self._points: dict[int, list[float]] = {}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        if trial.number not in self._points:
            self._points[trial.number] = self._point(max(trial.number - 1, 0))
        return spread(self._points[trial.number][self._paths.index(param_name)], param_distribution)

    def _point(self, index: int) -> list[float]:
        from scipy.stats import qmc  # noqa: PLC0415  (most of a second, and only this sampler needs it)

        sequence = qmc.Sobol(len(self._paths), scramble=True, seed=self._seed)
        if index:
            sequence.fast_forward(index)
        point: list[float] = sequence.random(1)[0].tolist()
        return point


def spread(share: float, distribution: BaseDistribution) -> Any:
    """The value that lies at `share` (0 <= share < 1) of a distribution: every choice has an equal part, every decade too."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(share * len(distribution.choices))]
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high, step = distribution.low, distribution.high, distribution.step
    if distribution.log and isinstance(distribution, IntDistribution):
        drawn = math.exp(math.log(low - 0.5) + share * (math.log(high + 0.5) - math.log(low - 0.5)))
        return min(max(round(drawn), low), high)
    if distribution.log:
        return min(low * math.exp(share * math.log(high / low)), high)
    if step:
        value = low + step * int(share * (math.floor((high - low) / step + 1e-9) + 1))
        return int(value) if isinstance(distribution, IntDistribution) else float(value)
    return low + share * (high - low)
