"""The trials of a study: asked for, planned as runs, given up by the pruner, told when their runs have ended."""

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from optuna.trial import Trial

from research import config as run_config
from research.atomic import write_text
from sweeps import retune, schema
from sweeps.book import RUNNING, WAITING, Book, OpenRun, read_json
from sweeps.budget import matched_about
from sweeps.executors import Executor
from sweeps.failures import was_reset
from sweeps.search import PRUNED_REASON, Search
from sweeps.study import Study, label
from sweeps.trial import pruned_summary, write_summary


class Trials:
    """What the driver asks of Optuna and tells it; `next` is the run to start."""

    def __init__(self, study: Study, root: Path, search: Search, book: Book, commit: str, announce: Callable[[str], None]) -> None:
        self.study, self.root, self.search, self.book = study, root, search, book
        self.commit, self.announce = commit, announce
        self.open: dict[int, Trial] = {}
        self.again: set[int] = set()
        """Trials that Optuna was told of, some of whose runs were put back."""
        self.queue: deque[str] = deque()
        self.paused: list[tuple[float, str]] = []
        """When each run goes back to the queue."""
        self.pruned: dict[str, str] = {}
        """Runs that were asked to end for good, with why."""
        self.closed = False
        """No trial is asked for any more."""

    @property
    def left(self) -> bool:
        """Whether there is anything to start, now or later."""
        return bool(self.queue or self.paused) or (not self.closed and self.search.left)

    def open_again(self) -> None:
        """Runs that `reset_runs` put back, of trials that Optuna was told of; those of open trials come with their trial."""
        for path in sorted((self.root / schema.RUNS_DIRECTORY).glob(f"*/{schema.RUN_FILE}")):
            about = read_json(path) if was_reset(path.parent) else None
            if about is not None and self.search.was_told(about["trial"]):
                self.again.add(about["trial"])
                self.book.plan(path.parent.name, about)
                self.queue.append(path.parent.name)

    def next(self) -> str | None:
        """A run to start: of the trials asked for already, or of a newly asked one."""
        now = time.monotonic()
        self.queue.extendleft(run for at, run in self.paused if at <= now)
        self.paused = [(at, run) for at, run in self.paused if at > now]
        if not self.queue:
            self.fill()
        return self.queue.popleft() if self.queue else None

    def fill(self) -> bool:
        """Ask for trials until one has a run to do; trials that the root already finished are told at once."""
        while not self.queue:
            if self.closed or (trial := self.search.ask()) is None:
                return False
            if reason := self.search.rejects(trial):
                self.announce(f"trial {trial.number} is not trained: {reason}")
                continue
            self.open[trial.number] = trial
            self._plan_trial(trial.number)
            if reason := trial.user_attrs.get(PRUNED_REASON):
                self._give_up(trial.number, reason, None)
            self.tell_if_done(trial.number)
        return True

    def put_back(self, run: str, pause: float = 0.0) -> None:
        """A run waits for another attempt: it is the next, or comes after `pause` seconds."""
        self.book.open[run].state = WAITING
        if pause:
            self.paused.append((time.monotonic() + pause, run))
        else:
            self.queue.appendleft(run)

    def close(self) -> None:
        """Start nothing more."""
        self.closed = True
        self.queue.clear()
        self.paused.clear()

    # --- planning -------------------------------------------------------------------------------------------------------------

    def _plan_trial(self, number: int) -> None:
        """The runs of a trial: those that re-tune its learning rate, if asked for, and when they have ended its replicates."""
        trial, tuning = self.open[number], self.study.retune
        cell = self.search.cell(trial)
        config, matched = self.study.matched_config(cell, self.study.seeds[0])
        about: dict[str, Any] = {"role": "replicate", **matched_about(matched)}
        if tuning is not None:
            chosen = trial.user_attrs.get(retune.ROLE) or self._retuned(number, cell, config, tuning)
            if chosen is None:
                return
            trial.set_user_attr(retune.ROLE, chosen)
            about[retune.ROLE] = chosen
            config = retune.with_rate(config, chosen["learning_rate"])
        for seed in self.study.seeds:
            self._plan_run(f"{number:03d}-{seed}", number, cell, replace(config, seed=seed), about)

    def _retuned(self, number: int, cell: dict[str, Any], config: run_config.RunConfig, tuning: retune.Retune) -> dict[str, Any] | None:
        """The learning rate that the short runs of a trial say, or None as long as they have not all ended."""
        own = config.training.optimizer.learning_rate
        config = replace(config, seed=self.study.seeds[0] if tuning.seed is None else tuning.seed)
        rates = tuning.rates(own)
        runs = [f"{number:03d}-lr{i}" for i in range(len(rates))]
        for run, rate in zip(runs, rates, strict=True):
            if run not in self.book.open:
                self._plan_run(run, number, cell, retune.short_config(config, tuning, rate), {"role": retune.ROLE})
        if not all(self.book.open[run].ended for run in runs):
            return None
        chosen = retune.choose(rates, [self.book.summary(run) for run in runs], own)
        edge = ", at the edge of what was tried" if chosen["edge"] else ""
        self.announce(f"trial {number}: learning rate {chosen['learning_rate']:g} ({chosen['chosen_by']}{edge})")
        return chosen

    def _plan_run(self, run: str, number: int, cell: dict[str, Any], config: run_config.RunConfig, more: dict[str, Any]) -> None:
        directory = self.root / schema.RUNS_DIRECTORY / run
        about = {
            "schema": schema.SCHEMA_VERSION,
            "run": run,
            "study": self.study.name,
            "trial": number,
            "variant": label(cell, self.study.baseline),
            "seed": config.seed,
            "baseline": cell == {path: self.study.baseline[path] for path in cell},
            "parameters": cell,
            "config_id": run_config.config_id(config),
            "commit": self.commit,
            **more,
        }
        if not (directory / schema.RUN_FILE).exists():
            write_text(directory / schema.CONFIG_FILE, json.dumps(run_config.to_dict(config), indent=1))
            write_text(directory / schema.RUN_FILE, json.dumps(about, indent=1))
        self.book.plan(run, about)
        summary = self.book.summary(run)
        # A trial that was not told yet is not done: what failed in it gets another chance (a bug may have been mended meanwhile).
        if summary and summary["state"] not in (schema.STOPPED, schema.FAILED):
            self.book.end(run, summary)
        else:
            self.queue.append(run)

    # --- giving up ------------------------------------------------------------------------------------------------------------

    def prune(self, executor: Executor) -> None:
        """Give up the trials that the study's pruner has had enough of."""
        if self.study.pruner.kind == "none":
            return
        for number, trial in list(self.open.items()):
            ended = {run.about["seed"]: self.book.summary(name) for name, run in self._replicates(number).items() if run.ended}
            if reason := self.search.should_prune(trial, ended):
                self._give_up(number, reason, executor)

    def _give_up(self, number: int, reason: str, executor: Executor | None) -> None:
        """End the runs of a pruned trial and start no more of them."""
        for name, run in self._replicates(number).items():
            if run.state == RUNNING and name not in self.pruned and executor is not None:
                self.announce(f"{name} {reason}")
                self.pruned[name] = reason
                executor.request_stop(name)
            elif run.state == WAITING:
                summary = pruned_summary(reason, len(run.attempts.all), run.directory)
                write_summary(run.directory, summary)
                self.book.end(name, summary)
                self.paused = [(at, other) for at, other in self.paused if other != name]
                if name in self.queue:
                    self.queue.remove(name)
        self.tell_if_done(number)

    # --- telling --------------------------------------------------------------------------------------------------------------

    def ended(self, run: str) -> None:
        """A run has ended: its trial may have others to plan, or be done."""
        about = self.book.open[run].about
        if about.get("role") == retune.ROLE and about["trial"] in self.open:
            self._plan_trial(about["trial"])
        self.tell_if_done(about["trial"])

    def tell_if_done(self, number: int) -> None:
        """Tell Optuna of a trial whose runs have all ended.

        As long as nothing is learnt, failures are kept back: should the study be halted for a bug,
        its trials are still open and are trained when it is run again.
        """
        runs = self._replicates(number).values()
        whole = number in self.again or (number in self.open and len(runs) >= len(self.study.seeds))
        if not whole or not all(run.ended for run in self.book.of_trial(number).values()):
            return
        if any(run.state == schema.FAILED for run in runs) and not self.book.learnt:
            return
        self._tell(number)

    def tell_rest(self) -> None:
        """Those that were kept back."""
        for number in sorted({*self.open, *self.again}):
            self._tell(number)

    def _replicates(self, number: int) -> dict[str, OpenRun]:
        return {name: run for name, run in self.book.of_trial(number).items() if run.about.get("role") != retune.ROLE}

    def _tell(self, number: int) -> None:
        if number in self.again:
            self.again.discard(number)
            names = [f"{number:03d}-{seed}" for seed in self.study.seeds]
            self.search.amend(number, [summary for name in names if (summary := self.book.summary(name))])
        else:
            self.search.tell(self.open.pop(number), [self.book.summary(name) for name in self._replicates(number)])
        self.book.close(number, self.study.objectives[0])
