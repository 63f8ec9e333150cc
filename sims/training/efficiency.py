"""The efficiency of dense products, fitted on one published cost, together with what that cost leaves open.

DeepSeek 67B's GPU-hours are one number; how well attention computes, how much of tensor parallelism is hidden and which layout
was used are not known.  So constants are drawn from their priors, for each draw the efficiency is solved that gives the
published hours, draws are kept in proportion to how likely that efficiency was beforehand, and all constants of a draw are
stored together.  A draw that hides little communication has efficient products, and the other way round.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from research.atomic import atomic_write
from research.configfile import read_yaml
from research.presets import preset
from sims.cluster import load_cluster
from sims.constants import CALIBRATION, Constants, Prior, priors
from sims.training.spec import TrainingStep
from sims.training.step import closed_form

DATA, FITTED = CALIBRATION / "compute.yaml", CALIBRATION / "compute-fitted.json"
SOLVED, NO_SHARE = "dense_gemm_efficiency", "grouped_gemm_half_tokens"
PROPOSALS, DRAWS, SEED = 1024, 64, 0


@dataclass(frozen=True, slots=True)
class Fit:
    """draws: of each constant, float64 (DRAWS,), kept together; residual: of the point estimate's hours, relative.

    effective: how many equally weighted proposals the weighted ones are worth.  alone: the efficiency per layout, everything else at its best value.
    """

    draws: dict[str, np.ndarray]
    residual: float
    effective: float
    alone: dict[str, float]
    hours: float

    def to_dict(self) -> dict[str, Any]:
        """As the committed file holds it."""
        drawn = "DeepSeek 67B's published GPU-hours (calibration/compute.yaml)"
        sources = {name: f"prior, drawn together with the fit on {drawn}: {priors()[name].why}" for name in self.draws}
        sources[SOLVED] = f"fitted on {drawn}"
        return {"constants": {name: {"draws": [float(f"{x:.8g}") for x in v], "source": sources[name]} for name, v in self.draws.items()}}

    def report(self) -> dict[str, Any]:
        """What `calibrate` says: one point identifies one constant, and the spread of each before and after."""
        constants = {}
        for name, values in self.draws.items():
            spread = float(np.std(np.log(values)))
            before = priors()[name].log_spread
            constants[name] = {
                "best": float(values[0]),
                "prior_best": priors()[name].best,
                "log_spread": spread,
                "prior_log_spread": before,
                "identified": name == SOLVED,
            }
        return {
            "point": "DeepSeek 67B, GPU-hours per 1e12 tokens",
            "published": self.hours,
            "residual": self.residual,
            "effective_draws": self.effective,
            "efficiency_by_assumed_layout": self.alone,
            "constants": constants,
        }


def fit() -> Fit:
    """Solve, weigh and keep, deterministically; some seconds."""
    data = read_yaml(DATA)
    names = list(data["priors"])
    hours, layouts = float(data["point"]["value"]), data["set_up"]["layouts"]
    specs = [layout_step(data["set_up"], layout) for layout in layouts]
    random = np.random.default_rng(SEED)
    start = Constants(
        {name: prior.draws(name, PROPOSALS) if name in names else np.full(PROPOSALS, prior.best) for name, prior in priors().items()}, {}
    )
    chosen = random.integers(0, len(specs), PROPOSALS)
    chosen[0] = 0
    solved, slope = np.ones(PROPOSALS), np.ones(PROPOSALS)
    alone: dict[str, float] = {}
    for index, spec in enumerate(specs):
        rows = np.flatnonzero((chosen == index) | (np.arange(PROPOSALS) == 0))
        found, slopes = solve(spec, _rows(start, rows), hours)
        alone[", ".join(f"{key}={value}" for key, value in layouts[index].items())] = float(found[0])
        mine = chosen[rows] == index
        solved[rows[mine]], slope[rows[mine]] = found[mine], slopes[mine]
    shares = [solved, *(start[name] for name in names if name not in (SOLVED, NO_SHARE))]
    weights = np.where(np.max(shares, axis=0) < 1.0, density(priors()[SOLVED], solved) / slope, 0.0)
    order = np.argsort(solved)
    kept = order[_resampled(weights[order] / weights.sum(), DRAWS, random)]
    kept[0] = 0
    drawn = {name: (solved if name == SOLVED else start[name])[kept] for name in names}
    best = Constants({name: v[:1] for name, v in {**start.values, **drawn}.items()}, {})
    residual = float(gpu_hours(specs[0], closed_form(specs[0], load_cluster(specs[0].cluster), best).seconds)[0]) / hours - 1
    return Fit(drawn, residual, float(weights.sum() ** 2 / (weights**2).sum()), alone, hours)


def layout_step(set_up: dict[str, Any], layout: dict[str, Any]) -> TrainingStep:
    """The dense model's step: 1F1B, ZeRO-1, nothing recomputed."""
    return TrainingStep(
        model=preset(set_up["model"]),
        cluster=set_up["cluster"],
        sequence_length=set_up["sequence_length"],
        batch_size=set_up["batch_size"],
        schedule="1f1b",
        recompute="none",
        **layout,
    )


def solve(spec: TrainingStep, constants: Constants, hours: float) -> tuple[np.ndarray, np.ndarray]:
    """The efficiency of dense products at which the step costs `hours` per 1e12 tokens, and |d log hours / d log efficiency| there.

    Seconds are very nearly a + b / efficiency, so the secant in 1 / efficiency is there in a few rounds.
    """
    cluster = load_cluster(spec.cluster)

    def cost(inverse: np.ndarray) -> np.ndarray:
        return gpu_hours(spec, closed_form(spec, cluster, constants.replaced(**{SOLVED: 1.0 / inverse})).seconds)

    before, inverse = np.full(constants.draws, 1 / 0.4), np.full(constants.draws, 1 / 0.6)
    old, new = cost(before), cost(inverse)
    slope = (new - old) / (inverse - before)
    for _ in range(12):
        done = np.abs(new / hours - 1) < 1e-10
        if done.all():
            break
        before, old = inverse, new
        inverse = np.where(done, inverse, np.maximum(inverse + (hours - new) / slope, 0.5))
        new = cost(inverse)
        moved = inverse != before
        slope = np.where(moved, (new - old) / np.where(moved, inverse - before, 1.0), slope)
    return 1.0 / inverse, np.abs(slope * inverse / new)


def gpu_hours(spec: TrainingStep, seconds: np.ndarray) -> np.ndarray:
    """Per 1e12 tokens, float64 (draws,)."""
    return seconds * spec.gpus / (spec.batch_size * spec.sequence_length) * 1e12 / 3600


def density(prior: Prior, values: np.ndarray) -> np.ndarray:
    """Of the logarithm, up to a factor: normal with a spread of its own on either side of the best value."""
    below, above = (math.log(wide) / 1.2816 for wide in (prior.best / prior.low, prior.high / prior.best))
    logs = np.log(values / prior.best)
    return np.exp(-0.5 * (logs / np.where(logs < 0, below, above)) ** 2)


def _rows(constants: Constants, rows: np.ndarray) -> Constants:
    return Constants({name: value[rows] for name, value in constants.values.items()}, constants.sources)


def _resampled(weights: np.ndarray, number: int, random: np.random.Generator) -> np.ndarray:
    """Systematic resampling: each index as often as its weight says, give or take one; in random order."""
    positions = np.linspace(0.0, 1.0, number, endpoint=False) + random.random() / number
    found = np.searchsorted(np.cumsum(weights), positions)
    return random.permutation(np.minimum(found, len(weights) - 1))


def write(found: Fit, path: Path = FITTED) -> None:
    """The draws, atomically; the same bytes whenever it is repeated."""
    with atomic_write(path) as file:
        file.write((json.dumps(found.to_dict(), indent=1) + "\n").encode())
