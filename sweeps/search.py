"""Optuna, asked and told by one driver, stored in a journal: which cell next, and what came of it."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from sweeps import schema
from sweeps.space import cells, distribution
from sweeps.study import Study

optuna.logging.set_verbosity(optuna.logging.ERROR)
CELLS_ENQUEUED = "cells_enqueued"
IMPOSSIBLE = "impossible"
REPEATS = "repeats"
"""User attributes of trials that were drawn and not trained; they do not count."""
TRIES = 300
"""Such trials one after the other before the search gives up: the space is used up."""


class Search:
    """Trials are configurations.  Those that were running when a driver died are handed out again under their number."""

    def __init__(self, study: Study, root: Path) -> None:
        self.study = study
        designed = study.search.sampler in ("one-factor", "grid")
        sampler: optuna.samplers.BaseSampler
        if study.search.sampler == "tpe":
            sampler = optuna.samplers.TPESampler(seed=study.search.seed, multivariate=True, constant_liar=True, n_startup_trials=8)
        else:
            sampler = optuna.samplers.RandomSampler(seed=study.search.seed)
        self._optuna = optuna.create_study(
            study_name=study.name,
            storage=JournalStorage(JournalFileBackend(str(root / schema.JOURNAL_FILE))),
            sampler=sampler,
            directions=[o.direction for o in study.objectives],
            load_if_exists=True,
        )
        self._distributions = {path: distribution(choices) for path, choices in study.space.items()}
        designed_cells = cells(study) if designed else [{path: study.baseline[path] for path in study.space}]
        self.total = len(designed_cells) if designed else (study.search.trials or 1)
        if not self._optuna.user_attrs.get(CELLS_ENQUEUED):
            for cell in designed_cells:
                self._optuna.enqueue_trial(cell, skip_if_exists=True)
            self._optuna.set_user_attr(CELLS_ENQUEUED, True)
        frozen = self._optuna.get_trials(deepcopy=False)
        self._adopted = [Trial(self._optuna, t._trial_id) for t in frozen if t.state == TrialState.RUNNING]
        self._asked = sum(t.state != TrialState.WAITING and not {IMPOSSIBLE, REPEATS} & t.user_attrs.keys() for t in frozen) - len(self._adopted)
        self._in_vain = 0

    @property
    def left(self) -> bool:
        """Whether there is a trial to hand out."""
        return bool(self._adopted) or (self._asked < self.total and self._in_vain < TRIES)

    def ask(self) -> Trial | None:
        """The next trial, or None when all have been asked for."""
        if self._adopted:
            self._asked += 1
            trial = self._adopted.pop(0)
            if set(trial.params) != set(self._distributions):
                for path, choices in self._distributions.items():
                    trial._suggest(path, choices)
            return trial
        while self.left:
            self._asked += 1
            trial = self._optuna.ask(self._distributions)
            first = next((t for t in self._optuna.get_trials(deepcopy=False) if t.params == trial.params and t.number < trial.number), None)
            if first is None:
                return trial
            self._repeat(trial, first)
        return None

    def _repeat(self, trial: Trial, first: FrozenTrial) -> None:
        """A cell that was drawn before is not trained again: the sampler is told what came of it, if that is known by now."""
        if IMPOSSIBLE in first.user_attrs:
            self.impossible(trial, first.user_attrs[IMPOSSIBLE])
            return
        trial.set_user_attr(REPEATS, first.number)
        if first.state == TrialState.COMPLETE:
            self._optuna.tell(trial, first.values)
        else:
            self._optuna.tell(trial, state=TrialState.FAIL)
        self._asked -= 1
        self._in_vain += 1

    def tell(self, trial: Trial, summaries: Sequence[dict[str, Any]]) -> None:
        """The mean over the seeds that finished; PRUNED if any diverged, FAIL if none finished or a metric is missing."""
        states = [s["state"] for s in summaries]
        trial.set_user_attr("states", json.dumps(states))
        if schema.DIVERGED in states:
            self._optuna.tell(trial, state=TrialState.PRUNED)
            return
        finished = [s["metrics"] for s in summaries if s["state"] == schema.FINISHED]
        columns = [[m[o.metric] for m in finished if o.metric in m] for o in self.study.objectives]
        if not finished or any(len(column) != len(finished) for column in columns):
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
            )
        )

    def impossible(self, trial: Trial, reason: str) -> None:
        """A drawn cell that no model can have: told as pruned and out of bounds, never with a number; another is drawn for it."""
        trial.set_user_attr(IMPOSSIBLE, reason)
        trial.set_constraint(IMPOSSIBLE, 1.0)
        self._optuna.tell(trial, state=TrialState.PRUNED)
        self._asked -= 1
        self._in_vain += 1
