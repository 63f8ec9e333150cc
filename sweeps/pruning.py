"""Pruners: which drawn trials are given up before their end.

Curves are compared as Optuna's pruners do, those of the first seed alone: with common random numbers it saw the same text in
every trial, so that like is compared with like, and a trial is given up before its other seeds have cost anything.  The
Wilcoxon pruner compares finished seeds with the same seeds of the best trial instead.  Cells of a design and the baseline are
confirmatory: they are never pruned.
"""

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from optuna import pruners
from optuna.exceptions import ExperimentalWarning

from sweeps import schema

_CURVES = {"startup_trials": 5, "warmup_steps": 0, "interval_steps": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "median": _CURVES,
    "percentile": {"percentile": 25.0, **_CURVES},
    "successive-halving": {"min_resource": None, "reduction_factor": 4, "early_stopping_rate": 0},
    "hyperband": {"min_resource": None, "max_resource": None, "reduction_factor": 3},
    "patient": {"patience": 2, "min_delta": 0.0, "wrapped": "median", **_CURVES},
    "wilcoxon": {"p_threshold": 0.1, "startup_seeds": 2},
}
"""What each kind may be told, and its default; a resource of null is the first or the last record of the objective."""
FINAL = ("simulation/", "model/", "reference/", "cache/")
"""Metrics that a run has at its end alone."""
BOUNDS = {
    "startup_trials": (1, math.inf),
    "warmup_steps": (0, math.inf),
    "interval_steps": (1, math.inf),
    "percentile": (0, 100),
    "min_resource": (1, math.inf),
    "max_resource": (1, math.inf),
    "reduction_factor": (2, math.inf),
    "early_stopping_rate": (0, math.inf),
    "patience": (0, math.inf),
    "min_delta": (0, math.inf),
    "p_threshold": (0, 1),
    "startup_seeds": (2, math.inf),
}
Kind = Literal["none", "median", "percentile", "successive-halving", "hyperband", "patient", "wilcoxon"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruner:
    """Steps are optimizer steps; a value that is null is the default of OPTIONS."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "allow_inf_nan": False}

    kind: Kind = "none"
    startup_trials: int | None = None
    """Trials that must have finished before any is pruned."""
    warmup_steps: int | None = None
    """Steps in which no trial is pruned."""
    interval_steps: int | None = None
    percentile: float | None = None
    """Per cent of the trials that are kept."""
    min_resource: int | None = None
    max_resource: int | None = None
    reduction_factor: int | None = None
    early_stopping_rate: int | None = None
    patience: int | None = None
    """Records without improvement that are waited for before the wrapped pruner is asked."""
    min_delta: float | None = None
    wrapped: Literal["median", "none"] | None = None
    p_threshold: float | None = None
    startup_seeds: int | None = None

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "kind" and getattr(self, f.name) is not None}
        allowed = OPTIONS[self.kind]
        if extra := {name: value for name, value in given.items() if name not in allowed}:
            raise ValueError(f"{extra} with kind={self.kind}: it takes {', '.join(allowed) or 'no options'}")
        for name in given.keys() & BOUNDS.keys():
            low, high = BOUNDS[name]
            if not low <= given[name] <= high:
                raise ValueError(f"{name}={given[name]} must be >= {low:g}" + (f" and <= {high:g}" if high < math.inf else ""))
        if self.min_resource and self.max_resource and self.min_resource >= self.max_resource:
            raise ValueError(f"min_resource={self.min_resource} must be < max_resource={self.max_resource}")

    @property
    def options(self) -> dict[str, Any]:
        """Every option of the kind, defaults filled in."""
        chosen = {name: getattr(self, name) for name in OPTIONS[self.kind]}
        return {name: default if chosen[name] is None else chosen[name] for name, default in OPTIONS[self.kind].items()}


def build(pruner: Pruner, first_step: int, last_step: int) -> pruners.BasePruner:
    """Optuna's pruner; the objective is recorded from `first_step` to `last_step`."""
    o = pruner.options

    def median() -> pruners.BasePruner:
        return pruners.MedianPruner(o["startup_trials"], o["warmup_steps"], o["interval_steps"])

    makers: dict[str, Callable[[], pruners.BasePruner]] = {
        "none": pruners.NopPruner,
        "median": median,
        "percentile": lambda: pruners.PercentilePruner(o["percentile"], o["startup_trials"], o["warmup_steps"], o["interval_steps"]),
        "successive-halving": lambda: pruners.SuccessiveHalvingPruner(
            o["min_resource"] or first_step, o["reduction_factor"], o["early_stopping_rate"]
        ),
        "hyperband": lambda: pruners.HyperbandPruner(o["min_resource"] or first_step, o["max_resource"] or last_step, o["reduction_factor"]),
        "patient": lambda: pruners.PatientPruner(median() if o["wrapped"] == "median" else None, o["patience"], o["min_delta"]),
        "wilcoxon": lambda: pruners.WilcoxonPruner(p_threshold=o["p_threshold"], n_startup_steps=o["startup_seeds"]),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return makers[pruner.kind]()


def least_seeds(pruner: Pruner) -> int:
    """Seeds from which on the Wilcoxon pruner can save any: n seeds reach p = 2^-n at best."""
    threshold, startup = pruner.options["p_threshold"], pruner.options["startup_seeds"]
    enough = next(n for n in range(1, 64) if 2.0**-n < threshold) if threshold > 2.0**-62 else 64
    return int(max(enough, startup)) + 1


class Curve:
    """The values of one metric in a run's metrics.jsonl, read on from where the last look ended."""

    def __init__(self, path: Path, metric: str) -> None:
        self._path, self._metric, self._offset = path, metric, 0

    def news(self) -> list[tuple[int, float]]:
        """(step, value) of the whole lines that are new; values that are not finite are left out."""
        if not self._path.exists() or self._path.stat().st_size <= self._offset:
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        records = [json.loads(line) for line in whole.splitlines()]
        return [(int(r["step"]), float(r[self._metric])) for r in records if self._metric in r and math.isfinite(r[self._metric])]


def record_steps(metric: str, record_every: int, validate_every: int, steps: int) -> tuple[int, int]:
    """The first and the last step at which a run records a metric over steps."""
    every = validate_every if metric.startswith(schema.BITS_PER_BYTE) else min(record_every, validate_every)
    return min(every, steps), steps
