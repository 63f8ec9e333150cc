"""Which settings explain the objective, by two evaluators of Optuna, where a search makes the question meaningful."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from reports.store import StudyRecord

optuna.logging.set_verbosity(optuna.logging.WARNING)
FEWEST_VARIANTS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Importances:
    """Share of the objective's variation that each searched setting explains, by two evaluators; or why there are none."""

    fanova: dict[str, float]
    ped_anova: dict[str, float]
    missing: str | None

    @property
    def agree(self) -> bool:
        """Both name the same setting first."""
        return len({max(v, key=v.__getitem__) for v in (self.fanova, self.ped_anova) if v}) == 1


def importances(record: StudyRecord, rows: Sequence[tuple[dict[str, Any], float]], *, lower_is_better: bool) -> Importances:
    """Over the table of variants (parameters, mean over seeds), not over the journal: the store alone decides."""
    sampler = str((record.study.get("search") or {}).get("sampler", "one-factor"))
    if sampler == "one-factor":
        return _none("a one-factor design changes each setting alone, so that the table of effects is the answer already")
    names = sorted({path for parameters, _ in rows for path in parameters})
    varied = [path for path in names if len({repr(p.get(path)) for p, _ in rows}) > 1]
    if len(rows) < FEWEST_VARIANTS or len(varied) < 2:
        return _none(f"{len(rows)} finished variants of {len(varied)} varied settings are too few ({FEWEST_VARIANTS} and 2 are needed)")
    study = optuna.create_study(direction="minimize" if lower_is_better else "maximize")
    distributions = {path: _distribution([p.get(path) for p, _ in rows]) for path in varied}
    for parameters, value in rows:
        params = {path: _value(parameters.get(path), distributions[path]) for path in varied}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for evaluator in (optuna.importance.FanovaImportanceEvaluator(seed=0), optuna.importance.PedAnovaImportanceEvaluator()):
            try:
                found.append({str(k): float(v) for k, v in optuna.importance.get_param_importances(study, evaluator=evaluator).items()})
            except (ValueError, RuntimeError) as error:
                return _none(f"{type(evaluator).__name__}: {error}")
    return Importances(fanova=found[0], ped_anova=found[1], missing=None)


def _none(why: str) -> Importances:
    return Importances(fanova={}, ped_anova={}, missing=why)


def _distribution(values: Sequence[Any]) -> BaseDistribution:
    """A range where many numbers were drawn, else the choices."""
    distinct = {repr(v) for v in values}
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values) and len(distinct) > 5:
        whole = all(isinstance(v, int) for v in values)
        return IntDistribution(min(values), max(values)) if whole else FloatDistribution(float(min(values)), float(max(values)))
    return CategoricalDistribution(sorted({_plain(v) for v in values}, key=lambda v: (v is None, str(v))))


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float | bool) else repr(value)


def _value(value: Any, distribution: BaseDistribution) -> Any:
    return _plain(value) if isinstance(distribution, CategoricalDistribution) else value
