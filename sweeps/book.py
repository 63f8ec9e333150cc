"""What the driver knows of a study's runs: those of open trials in full, of all others only how many ended how.

The runs themselves are on disk, each in its directory, so that memory does not grow with their number.
"""

import json
import platform
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from research.atomic import write_text
from sweeps import schema
from sweeps.failures import Attempts, failure_class, read_attempts
from sweeps.study import Objective

RECENT = 100
"""Ended runs that state.json shows."""
WAITING, RUNNING = "waiting", "running"
RETUNE = "retune"
"""The role of a short run that tries a learning rate: how it ends is no result of the study."""
LEARNT = (schema.FINISHED, schema.DIVERGED, schema.PRUNED)
"""Ends of which something is known; one of them shows that the study is not wrong as a whole."""


@dataclass(kw_only=True, slots=True, eq=False)
class OpenRun:
    """A run of a trial that Optuna has not been told of."""

    about: dict[str, Any]
    directory: Path
    attempts: Attempts
    state: str = WAITING
    reason: str | None = None
    failure: str | None = None

    @property
    def ended(self) -> bool:
        return self.state in schema.STATES and self.state != schema.STOPPED

    def shown(self) -> dict[str, Any]:
        """Its line in state.json."""
        last = self.attempts.all[-1] if self.attempts.all else {}
        return {
            "state": self.state,
            "attempts": len(self.attempts.all),
            "reason": self.reason,
            "failure": self.failure,
            "trial": self.about["trial"],
            "variant": self.about["variant"],
            "seed": self.about["seed"],
            "step": last.get("step"),
            "node": last.get("node") if self.state == RUNNING else None,
        }


class Runs(Mapping[str, dict[str, Any]]):
    """run -> its run.json, read when it is asked for."""

    def __init__(self, root: Path, names: list[str]) -> None:
        self._root, self._names = root, names

    def __getitem__(self, run: str) -> dict[str, Any]:
        return read_json(self._root / schema.RUNS_DIRECTORY / run / schema.RUN_FILE)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Book:
    """The runs of a root, as they are found and as they go on."""

    def __init__(self, root: Path, planned: int, about: Mapping[str, Any]) -> None:
        self.root, self.planned, self._about = root, planned, dict(about)
        self.open: dict[str, OpenRun] = {}
        self.counts: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        """Runs that failed, by class."""
        self.lost: Counter[str] = Counter()
        """Attempts that failed, by class, whatever became of their runs."""
        self.unsent: dict[str, int] = {}
        """Ended runs of which the tracker may not know the end, with the attempt that ended."""
        self.best: dict[str, Any] | None = None
        self.workers = 0
        self._recent: deque[tuple[str, dict[str, Any]]] = deque(maxlen=RECENT)
        self._started = _now()
        for path in sorted((root / schema.RUNS_DIRECTORY).glob(f"*/{schema.SUMMARY_FILE}")):
            self._count(path.parent.name, read_json(path), read_attempts(path.parent))

    @property
    def done(self) -> int:
        """Runs that have ended for good."""
        return sum(count for state, count in self.counts.items() if state != schema.STOPPED)

    @property
    def learnt(self) -> bool:
        return any(self.counts[state] for state in LEARNT)

    @property
    def running(self) -> list[OpenRun]:
        return [run for run in self.open.values() if run.state == RUNNING]

    def plan(self, run: str, about: dict[str, Any]) -> OpenRun:
        """Open a run; what an earlier driver knows of its end no longer counts."""
        directory = self.root / schema.RUNS_DIRECTORY / run
        summary = read_json(directory / schema.SUMMARY_FILE)
        if summary:
            self.counts[summary["state"]] -= 1
            if (kind := failure_class(summary)) and about.get("role") != RETUNE:
                self.failures[kind] -= 1
            self._recent = deque((pair for pair in self._recent if pair[0] != run), maxlen=RECENT)
        self.open[run] = OpenRun(about=about, directory=directory, attempts=Attempts(directory))
        if not summary:
            self.lost.update(a["failure"] for a in self.open[run].attempts.all if a["failure"])
        return self.open[run]

    def end(self, run: str, summary: Mapping[str, Any]) -> None:
        """How an open run ended."""
        now = self.open[run]
        now.state, now.reason, now.failure = summary["state"], summary["reason"], failure_class(dict(summary))
        self.counts[now.state] += 1
        if now.failure and now.about.get("role") != RETUNE:
            self.failures[now.failure] += 1
        self.unsent[run] = summary["attempts"]

    def close(self, trial: int, objective: Objective) -> None:
        """Optuna was told: the trial's runs are on disk, and here only in the counts."""
        self._note_best(trial, objective)
        for name in self.of_trial(trial):
            self._recent.append((name, self.open.pop(name).shown()))

    def _note_best(self, trial: int, objective: Objective) -> None:
        """By the mean over seeds of a trial that finished whole, for whoever asks for the state."""
        runs = {name: run for name, run in self.of_trial(trial).items() if run.about.get("role") != RETUNE}
        values = [self.summary(name).get("metrics", {}).get(objective.metric) for name, run in runs.items() if run.state == schema.FINISHED]
        numbers = [value for value in values if value is not None]
        if not numbers or len(numbers) < len(runs):
            return
        mean, sign = sum(numbers) / len(numbers), 1 if objective.direction == "minimize" else -1
        if self.best is None or sign * mean < sign * self.best["value"]:
            variant = next(iter(runs.values())).about["variant"]
            self.best = {"trial": trial, "variant": variant, "metric": objective.metric, "value": mean, "seeds": len(numbers)}

    def of_trial(self, trial: int) -> dict[str, OpenRun]:
        return {name: run for name, run in self.open.items() if run.about["trial"] == trial}

    def summary(self, run: str) -> dict[str, Any]:
        return read_json(self.root / schema.RUNS_DIRECTORY / run / schema.SUMMARY_FILE)

    def to_send(self) -> tuple[Runs, dict[str, int]]:
        """What the tracker should look at, and which of it has ended by now."""
        return Runs(self.root, sorted({*self.unsent, *self.open})), dict(self.unsent)

    def sent(self, handed: Mapping[str, int]) -> None:
        """All that was handed over went through; what has ended since then anew has not."""
        self.unsent = {run: attempt for run, attempt in self.unsent.items() if handed.get(run) != attempt}

    def write_state(self, state: str, more: Mapping[str, Any]) -> None:
        """state.json: of a size that does not depend on the number of runs."""
        shown = {**dict(self._recent), **{name: run.shown() for name, run in self.open.items()}}
        waiting = {WAITING: sum(run.state == WAITING for run in self.open.values()), RUNNING: len(self.running)}
        about = {
            "schema": schema.SCHEMA_VERSION,
            **self._about,
            "state": state,
            "started": self._started,
            "updated": _now(),
            "planned": self.planned,
            "done": self.done,
            "workers": self.workers,
            "counts": {name: count for name, count in {**self.counts, **waiting}.items() if count},
            "failures": {name: count for name, count in self.failures.items() if count},
            "failed_attempts": {name: count for name, count in self.lost.items() if count},
            "best": self.best,
            "runs": dict(sorted(shown.items())),
            **more,
            "versions": versions(),
        }
        write_text(self.root / schema.STATE_FILE, json.dumps(about, indent=1))

    def _count(self, run: str, summary: dict[str, Any], attempts: list[dict[str, Any]]) -> None:
        """A run that an earlier driver left."""
        kind = failure_class(summary)
        self.counts[summary["state"]] += 1
        self.lost.update(a["failure"] for a in attempts if a["failure"])
        self.unsent[run] = summary["attempts"]
        about = read_json(self.root / schema.RUNS_DIRECTORY / run / schema.RUN_FILE)
        if kind and about.get("role") != RETUNE:
            self.failures[kind] += 1
        shown = {"state": summary["state"], "attempts": summary["attempts"], "reason": summary["reason"], "failure": kind}
        place = {key: about.get(key) for key in ("trial", "variant", "seed")}
        self._recent.append((run, {**shown, **place, "step": summary["steps"], "node": None}))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return value


@cache
def versions() -> dict[str, str]:
    """Of what a study rests on."""
    found = {name: version(name) for name in ("torch", "ray", "optuna", "mlflow", "simpy", "numpy", "tokenizers")}
    return {**found, "python": platform.python_version()}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
