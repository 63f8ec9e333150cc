"""Optuna, asked and told by one driver, stored in a journal: which cell next, and what came of it."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from research.errors import ConfigError
from sweeps import constraints, pruning, schema
from sweeps.definition import Study
from sweeps.pruning import Curve
from sweeps.samplers import ADAPTIVE, make_sampler
from sweeps.space import cell_key, cells, conditions_of, exists, in_order, resolve, suggest_cell

CELLS_ENQUEUED = "cells_enqueued"
IMPOSSIBLE = "impossible"
INFEASIBLE = "infeasible"
REPEATS = "repeats"
"""User attributes of trials that were drawn and not trained; they do not count."""
NOT_TRAINED = {IMPOSSIBLE, INFEASIBLE, REPEATS}
PRUNED_STEP, PRUNED_REASON = "pruned_step", "pruned_reason"
POPULATION = "population"
TRIES = 300
"""Such trials one after the other before the search gives up: the space is used up."""
PATIENCE = 10
"""Such trials before cells are drawn at random: a model that knows nothing of a bound may propose the same for ever."""


class Search:
    """Trials are configurations.  Those that were running when a driver died are handed out again under their number."""

    def __init__(self, study: Study, root: Path, storage: BaseStorage | None = None) -> None:
        self.study, self._root = study, root
        first, last = _record_steps(study)
        self._optuna = optuna.create_study(
            study_name=study.name,
            storage=storage or JournalStorage(JournalFileBackend(str(root / schema.JOURNAL_FILE))),
            pruner=pruning.build(study.pruner, first, last),
            directions=[o.direction for o in study.objectives],
            load_if_exists=True,
        )
        self._baseline = resolve(study.space, study.baseline, study.baseline)
        designed = cells(study) if study.search.designed else [self._baseline]
        self.infeasible = {cell_key(c): broken for c in designed if (broken := self._broken(c))} if study.search.designed else {}
        """Cells of the design that break a constraint known before training, with the constraint: they are never trained."""
        self.total = len(designed) - len(self.infeasible) if study.search.designed else (study.search.trials or 1)
        if not self._optuna.user_attrs.get(CELLS_ENQUEUED):
            self._optuna.set_user_attr(POPULATION, study.search.generation)
            for cell in designed:
                self._optuna.enqueue_trial(self._existing(cell), skip_if_exists=True)
            self._optuna.set_user_attr(CELLS_ENQUEUED, True)
        self._population = int(self._optuna.user_attrs.get(POPULATION, study.search.generation))
        frozen = self._optuna.get_trials(deepcopy=False)
        self._numbers = len(frozen)
        self._waiting = [t.number for t in frozen if t.state == TrialState.WAITING]
        self._adopted = [t for t in frozen if t.state == TrialState.RUNNING]
        self._seen = {cell_key(self._cell(t)): t.number for t in reversed(frozen) if t.state.is_finished() and REPEATS not in t.user_attrs}
        self._asked = sum(t.state.is_finished() and not NOT_TRAINED & t.user_attrs.keys() for t in frozen)
        self._in_vain = next((i for i, t in enumerate(reversed(frozen)) if not NOT_TRAINED & t.user_attrs.keys()), len(frozen))
        self._curves: dict[int, Curve] = {}

    @property
    def left(self) -> bool:
        """Whether there is a trial to hand out."""
        if self.study.search.designed:
            return bool(self._adopted or self._waiting)
        return bool(self._adopted) or (self._asked < self.total and self._in_vain < TRIES)

    def ask(self) -> Trial | None:
        """The next trial, or None when all have been asked for."""
        while self.left:
            self._asked += 1
            trial = self._adopt(self._adopted.pop(0)) if self._adopted else self._new()
            key = cell_key(self.cell(trial))
            number = self._seen.setdefault(key, trial.number)
            if number == trial.number:
                return trial
            self._repeat(trial, self._optuna.get_trials(deepcopy=False)[number])
        return None

    def cell(self, trial: Trial) -> dict[str, Any]:
        """Every searched path with its value; the baseline's where a dimension does not exist."""
        return resolve(self.study.space, self.study.baseline, trial.params)

    def rejects(self, trial: Trial) -> str | None:
        """Why a trial is not trained, having told Optuna so; None if it is to be trained.

        A cell that no model can have, and one that breaks a constraint known before training, is told as pruned and out of
        bounds, never with a number; a search draws another for it.
        """
        cell = self.cell(trial)
        try:
            config = self.study.run_config(cell, self.study.seeds[0])
            if config.model.moe is not None:
                self.study.all_to_all(config)
            found = constraints.known_violations(self.study.bounds, self.study, config)
        except (ConfigError, ValueError) as error:
            self.impossible(trial, str(error))
            return str(error)
        reasons = constraints.broken(self.study.bounds, self.study, config)
        if not reasons:
            return None
        self._reject(trial, INFEASIBLE, "; ".join(reasons), found)
        return "; ".join(reasons)

    def impossible(self, trial: Trial, reason: str) -> None:
        """A drawn cell that no model can have."""
        self._reject(trial, IMPOSSIBLE, reason, {IMPOSSIBLE: 1.0})

    def tell(self, trial: Trial, summaries: Sequence[dict[str, Any]]) -> None:
        """The mean over the seeds that finished; PRUNED if it was pruned or any diverged, FAIL if none finished or a metric is missing."""
        states = [s["state"] for s in summaries]
        trial.set_user_attr("states", json.dumps(states))
        if schema.PRUNED not in states:
            self._constrain(trial, summaries)
        self._report_all(trial, summaries)
        if schema.PRUNED in states or schema.DIVERGED in states:
            self._report_last(trial, summaries)
            self._optuna.tell(trial, state=TrialState.PRUNED)
            return
        finished = [s["metrics"] for s in summaries if s["state"] == schema.FINISHED]
        columns = [[m[o.metric] for m in finished if o.metric in m] for o in self.study.objectives]
        if not finished or any(len(column) != len(finished) for column in columns) or self._unmeasured(trial):
            self._optuna.tell(trial, state=TrialState.FAIL)
            return
        for objective, column in zip(self.study.objectives, columns, strict=True):
            trial.set_user_attr(f"seeds:{objective.metric}", column)
            if len(column) > 1:
                trial.set_user_attr(f"standard_error:{objective.metric}", statistics.stdev(column) / math.sqrt(len(column)))
        self._in_vain = 0
        self._optuna.tell(trial, [sum(column) / len(column) for column in columns])

    def was_told(self, number: int) -> bool:
        """Whether this trial has ended for Optuna."""
        return any(t.number == number and t.state.is_finished() for t in self._optuna.get_trials(deepcopy=False))

    def amend(self, number: int, summaries: Sequence[dict[str, Any]]) -> None:
        """Runs of a trial that was told were tried again.  What is told stays told: the sampler learns of the new outcome by another
        trial of the same cell, which counts as a repetition."""
        first = next(t for t in self._optuna.get_trials(deepcopy=False) if t.number == number)
        finished = [s["metrics"] for s in summaries if s["state"] == schema.FINISHED]
        columns = [[m[o.metric] for m in finished if o.metric in m] for o in self.study.objectives]
        if len(finished) < len(summaries) or any(len(column) != len(finished) for column in columns):
            return
        self._optuna.add_trial(
            optuna.trial.create_trial(
                params=first.params,
                distributions=first.distributions,
                values=[sum(column) / len(column) for column in columns],
                user_attrs={REPEATS: number},
                constraints=self._violations(first, summaries),
            )
        )

    def _violations(self, first: FrozenTrial, summaries: Sequence[dict[str, Any]]) -> dict[str, float] | None:
        """How far each constraint is met by runs of a trial's cell; None in a study without any."""
        if not self.study.bounds:
            return None
        config = self.study.run_config(self._cell(first), self.study.seeds[0])
        known = constraints.known_violations(self.study.bounds, self.study, config)
        return {**known, **constraints.measured_violations(self.study.bounds, summaries)}

    def should_prune(self, trial: Trial, summaries: Mapping[int, dict[str, Any]]) -> str | None:
        """Why a trial is to be given up, or None; once given up it stays so, also for a driver that comes after.

        `summaries` are those of its seeds that have ended, by seed.  The Wilcoxon pruner goes by them, every other one by
        what the run of the first seed has recorded by now.
        """
        if reason := trial.user_attrs.get(PRUNED_REASON):
            return str(reason)
        if self.study.pruner.kind == "none" or self.study.search.designed or self.cell(trial) == self._baseline:
            return None
        metric = self.study.objectives[0].metric
        for step, value, of in self._seed_news(trial, summaries) if self.study.pruner.kind == "wilcoxon" else self._curve_news(trial):
            trial.report(value, step)
            if trial.should_prune():
                reason = f"pruned {of}: {metric} = {value:.6g}, given up by the {self.study.pruner.kind} pruner"
                trial.set_user_attr(PRUNED_STEP, step)
                trial.set_user_attr(PRUNED_REASON, reason)
                return reason
        return None

    def _new(self) -> Trial:
        number = self._waiting.pop(0) if self._waiting else self._numbers
        self._use_sampler(number)
        trial = self._optuna.ask()
        self._numbers = max(self._numbers, trial.number + 1)
        if trial.number == 0 and self.study.search.sampler == "nsga2":
            _ = trial.relative_params  # the baseline belongs to the first generation, though nothing is drawn for it
        suggest_cell(trial, self.study.space, self.study.baseline)
        return trial

    def _adopt(self, frozen: FrozenTrial) -> Trial:
        self._use_sampler(frozen.number)
        trial = Trial(self._optuna, frozen._trial_id)
        if self._existing(self._cell(frozen)).keys() - frozen.params.keys():
            # It was killed while it was drawn: what it has is drawn once more for the sampler to be where it was.
            for path in (p for p in in_order(self.study.space) if p in frozen.params and p not in trial.relative_params):
                self._optuna.sampler.sample_independent(self._optuna, frozen, path, frozen.distributions[path])
        suggest_cell(trial, self.study.space, self.study.baseline)
        return trial

    def _use_sampler(self, number: int) -> None:
        search, space = self.study.search, self.study.space
        lost = search.sampler in ADAPTIVE and self._in_vain >= PATIENCE
        kind = "random" if search.designed or lost else search.sampler
        conditional = any(conditions_of(entry) for entry in space.values())
        self._optuna.sampler = make_sampler(
            kind, seed=search.seed, number=number, paths=list(space), conditional=conditional, population=self._population
        )

    def _broken(self, cell: Mapping[str, Any]) -> str:
        try:
            config = self.study.run_config(cell, self.study.seeds[0])
        except ConfigError:
            return ""
        return "; ".join(constraints.broken(self.study.bounds, self.study, config))

    def _existing(self, cell: Mapping[str, Any]) -> dict[str, Any]:
        return {path: cell[path] for path in in_order(self.study.space) if exists(self.study.space[path], cell)}

    def _cell(self, frozen: FrozenTrial) -> dict[str, Any]:
        return resolve(self.study.space, self.study.baseline, frozen.params)

    def _reject(self, trial: Trial, kind: str, reason: str, violations: Mapping[str, float]) -> None:
        trial.set_user_attr(kind, reason)
        self._set_constraints(trial, violations)
        self._optuna.tell(trial, state=TrialState.PRUNED)
        self._asked -= 1
        self._in_vain += 1

    def _repeat(self, trial: Trial, first: FrozenTrial) -> None:
        """A cell that was drawn before is not trained again: the sampler is told what came of it, if that is known by now."""
        for kind in (IMPOSSIBLE, INFEASIBLE):
            if kind in first.user_attrs:
                self._reject(trial, kind, first.user_attrs[kind], first.constraints)
                return
        trial.set_user_attr(REPEATS, first.number)
        self._set_constraints(trial, first.constraints)
        if first.state == TrialState.COMPLETE:
            self._optuna.tell(trial, first.values)
        else:
            self._optuna.tell(trial, state=TrialState.FAIL)
        self._asked -= 1
        self._in_vain += 1

    def _constrain(self, trial: Trial, summaries: Sequence[dict[str, Any]]) -> None:
        """Tell how far each constraint is met: those known before training too, so that all told trials have the same."""
        if not self.study.bounds:
            return
        config = self.study.run_config(self.cell(trial), self.study.seeds[0])
        found = constraints.known_violations(self.study.bounds, self.study, config)
        found |= constraints.measured_violations(self.study.bounds, summaries)
        self._set_constraints(trial, found)

    def _set_constraints(self, trial: Trial, violations: Mapping[str, float]) -> None:
        known = self._frozen(trial).constraints
        for name in violations.keys() - known.keys():
            trial.set_constraint(name, violations[name])

    def _frozen(self, trial: Trial) -> FrozenTrial:
        """What the storage has of a trial."""
        return self._optuna.get_trials(deepcopy=False)[trial.number]

    def _unmeasured(self, trial: Trial) -> bool:
        """Whether a constraint's metric is missing: then the trial has not answered."""
        known = self._frozen(trial).constraints if self.study.bounds else {}
        return any(bound.text not in known for bound in self.study.bounds)

    def _curve_news(self, trial: Trial) -> list[tuple[int, float, str]]:
        """What the run of the first seed has recorded since the last look."""
        seed = self.study.seeds[0]
        path = self._root / schema.RUNS_DIRECTORY / f"{trial.number:03d}-{seed}" / schema.METRICS_FILE
        curve = self._curves.setdefault(trial.number, Curve(path, self.study.objectives[0].metric))
        news = curve.news()
        known = self._frozen(trial).intermediate_values if news else {}
        return [(step, value, f"at step {step}") for step, value in news if step not in known]

    def _seed_news(self, trial: Trial, summaries: Mapping[int, dict[str, Any]]) -> list[tuple[int, float, str]]:
        """What seeds have reached that finished since the last look; as Optuna's step, the seed's place among the seeds."""
        metric, known = self.study.objectives[0].metric, self._frozen(trial).intermediate_values
        ended = [(i, seed, summaries[seed]) for i, seed in enumerate(self.study.seeds) if seed in summaries and i not in known]
        finished = [(i, seed, s["metrics"]) for i, seed, s in ended if s["state"] == schema.FINISHED and metric in s["metrics"]]
        return [(i, m[metric], f"after seed {seed}") for i, seed, m in finished]

    def _report_all(self, trial: Trial, summaries: Sequence[dict[str, Any]]) -> None:
        """Whatever a trial that ran to its end has recorded and no look has seen, so that later ones are compared with all of it."""
        kind = self.study.pruner.kind
        if kind != "none" and not self.study.search.designed and PRUNED_STEP not in trial.user_attrs:
            ended = dict(zip(self.study.seeds, summaries, strict=False))
            for step, value, _ in self._seed_news(trial, ended) if kind == "wilcoxon" else self._curve_news(trial):
                trial.report(value, step)
        self._curves.pop(trial.number, None)

    def _report_last(self, trial: Trial, summaries: Sequence[dict[str, Any]]) -> None:
        """The last finite value of a trial that has no final one, unless a later one is known."""
        known = self._frozen(trial).intermediate_values
        if len(self.study.objectives) > 1 or self.study.pruner.kind == "wilcoxon" or PRUNED_STEP in trial.user_attrs:
            return
        metric = self.study.objectives[0].metric
        reached = [(s["steps"], s["metrics"][metric]) for s in summaries if math.isfinite(s["metrics"].get(metric, math.nan))]
        if reached and (last := min(reached))[0] > max(known, default=-1):
            trial.report(last[1], last[0])


def _record_steps(study: Study) -> tuple[int, int]:
    """The first and last step at which the baseline records the first objective; (1, 2) where no pruner asks."""
    if study.pruner.kind == "none":
        return 1, 2
    config = study.run_config(study.baseline, study.seeds[0])
    training = config.training
    return pruning.record_steps(study.objectives[0].metric, training.record_every, training.validate_every, config.steps)


def preview(study: Study, root: Path, count: int) -> list[dict[str, Any]]:
    """The first cells that a new search would train, without the journal; what depends on results is drawn as without any."""
    search = Search(study, root, optuna.storages.InMemoryStorage())
    found: list[dict[str, Any]] = []
    while len(found) < count and (trial := search.ask()) is not None:
        if search.rejects(trial) is None:
            found.append(search.cell(trial))
    return found
