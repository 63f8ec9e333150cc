"""How far a study is, read out of its root: by its driver's own table, and by `status` from any other shell.

The directories of the runs are the truth; state.json adds what only the driver knows.  A run that has ended is read once.
Imports nothing heavy (no torch, Ray, MLflow or Optuna): `status` answers within a second.
"""

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from sweeps import schema
from sweeps.lease import holder_of, is_driven

WAITING, RUNNING, INTERRUPTED = "waiting", "running", "interrupted"
ENDED = tuple(state for state in schema.STATES if state != schema.STOPPED)
TAIL_BYTES = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """One (variant, seed).  `share` is what of its tokens it has seen, 0 to 1; `values` its objectives, as far as they are known."""

    run: str
    trial: int
    variant: str
    seed: int
    baseline: bool
    state: str
    failure: str | None
    reason: str | None
    attempts: int
    step: int
    share: float
    seconds: float
    values: Mapping[str, float]
    counts: bool = True
    """Whether it is one of the study's planned runs: short runs that choose a learning rate are not."""

    @property
    def ended(self) -> bool:
        return self.state in ENDED


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """The runs of one configuration; `mean` and `standard_error` of the first objective over the seeds that finished."""

    name: str
    trial: int
    baseline: bool
    runs: tuple[RunStatus, ...]
    mean: float | None
    standard_error: float | None

    @property
    def finished(self) -> int:
        return sum(run.state == schema.FINISHED for run in self.runs)


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyStatus:
    root: Path
    state: str
    question: str
    objectives: tuple[tuple[str, str], ...]
    """(metric, direction)."""
    planned: int
    seeds: int
    runs: tuple[RunStatus, ...]
    workers: int
    seconds_left: float | None
    """Expected, from the runs that have finished, else from the speed of those that run; None where nothing is known."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """state.json as it stands."""

    @property
    def done(self) -> int:
        return sum(run.ended for run in self.runs if run.counts)

    @property
    def counts(self) -> dict[str, int]:
        """Runs by state; those that no trial was drawn for yet are waiting too."""
        counted = Counter(run.state for run in self.runs if run.counts)
        counted[WAITING] += max(self.planned - counted.total(), 0)
        return {state: counted[state] for state in (RUNNING, INTERRUPTED, WAITING, *schema.STATES) if counted[state]}

    @property
    def failures(self) -> dict[str, int]:
        """Runs that ended badly, by class."""
        return dict(sorted(Counter(run.failure for run in self.runs if run.failure).items()))

    @property
    def variants(self) -> list[Variant]:
        """Baseline first, then best first by the first objective; variants without a number come last."""
        groups: dict[int, list[RunStatus]] = {}
        for run in self.runs:
            if run.counts:
                groups.setdefault(run.trial, []).append(run)
        metric, direction = self.objectives[0] if self.objectives else ("", "minimize")
        sign = -1.0 if direction == "maximize" else 1.0
        found = [_variant(runs, metric) for runs in groups.values()]
        return sorted(found, key=lambda v: (not v.baseline, v.mean is None, sign * (v.mean or 0.0), v.trial))

    def best(self, metric: str, direction: str) -> Variant | None:
        """The variant with the best mean of a metric, among those whose seeds have all finished if there are such."""
        groups: dict[int, list[RunStatus]] = {}
        for run in self.runs:
            if run.state == schema.FINISHED and run.counts and metric in run.values:
                groups.setdefault(run.trial, []).append(run)
        whole = [runs for runs in groups.values() if len(runs) >= self.seeds] or list(groups.values())
        sign = -1.0 if direction == "maximize" else 1.0
        variants = [_variant(runs, metric) for runs in whole]
        return min(variants, key=lambda v: (sign * (v.mean if v.mean is not None else math.inf), v.trial), default=None)

    def to_dict(self) -> dict[str, Any]:
        """For --json; numbers that are not finite become null."""
        left = self.seconds_left
        best = {metric: _described(self.best(metric, direction), direction) for metric, direction in self.objectives}
        own = {key: self.about.get(key) for key in ("started", "updated", "commit", "mlflow_tracking_uri", "mlflow_behind", "versions")}
        return {
            "schema": schema.SCHEMA_VERSION,
            "study": self.root.name,
            "question": self.question,
            "root": str(self.root),
            "state": self.state,
            "driver": holder_of(self.root) if self.state == RUNNING else None,
            **own,
            "planned": self.planned,
            "done": self.done,
            "counts": self.counts,
            "failures": self.failures,
            "workers": self.workers,
            "best": best,
            "expected_seconds_left": None if left is None else round(left, 1),
            "expected_end": None if left is None else (datetime.now(UTC) + timedelta(seconds=left)).isoformat(timespec="seconds"),
            "runs": {run.run: _run_dict(run) for run in self.runs},
        }


class Reader:
    """Reads one root, again and again; what has ended is kept."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._ended: dict[str, tuple[int, RunStatus]] = {}
        self._study: tuple[int, dict[str, Any]] = (0, {})

    def read(self, *, driven: bool | None = None) -> StudyStatus:
        """`driven`: whether a driver holds the study, where the caller knows (the driver itself)."""
        about = read_json(self.root / schema.STATE_FILE)
        study = self._read_study()
        objectives = tuple((o["metric"], o.get("direction", "minimize")) for o in study.get("objectives") or [])
        seeds = len(study.get("seeds") or [0])
        state = about.get("state", "starting")
        alive = (is_driven(self.root) if driven is None else driven) if state in (RUNNING, "starting") else False
        if state == RUNNING and not alive:
            state = INTERRUPTED  # its driver is gone without a word; `run` goes on from there
        known = about.get("runs")
        runs = [
            run
            for path in sorted((self.root / schema.RUNS_DIRECTORY).glob(f"*/{schema.RUN_FILE}"))
            if (run := self._run(path.parent, known if isinstance(known, Mapping) else {}, alive, [m for m, _ in objectives])) is not None
        ]
        planned = int(about.get("planned") or 0)
        running = sum(run.state == RUNNING for run in runs)
        workers = int(about.get("workers") or running)
        return StudyStatus(
            root=self.root,
            state=state,
            question=str(study.get("question", "")),
            objectives=objectives,
            planned=planned,
            seeds=seeds,
            runs=tuple(runs),
            workers=workers if alive else 0,
            seconds_left=_seconds_left(runs, planned, max(workers, running, 1)) if alive else None,
            about=about,
        )

    def _read_study(self) -> dict[str, Any]:
        path = self.root / schema.STUDY_FILE
        stamp = path.stat().st_mtime_ns if path.exists() else 0
        if stamp != self._study[0]:
            self._study = (stamp, yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {})
        return self._study[1]

    def _run(self, folder: Path, known: Mapping[str, Any], alive: bool, metrics: list[str]) -> RunStatus | None:
        summary_file = folder / schema.SUMMARY_FILE
        try:
            stamp = summary_file.stat().st_mtime_ns
        except FileNotFoundError:
            stamp = 0
        if stamp and (kept := self._ended.get(folder.name)) and kept[0] == stamp:
            return kept[1]
        about, summary = read_json(folder / schema.RUN_FILE), read_json(summary_file) if stamp else {}
        if not about:
            return None
        run = _ended_run(about, summary, metrics) if summary else _open_run(folder, about, known.get(folder.name) or {}, alive, metrics)
        if run.ended:
            self._ended[folder.name] = (stamp, run)
        return run


def read_json(path: Path) -> dict[str, Any]:
    """An object in a file that another process may replace or remove meanwhile; {} when it is not there."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return value


def attempts_of(folder: Path) -> list[dict[str, Any]]:
    """Every attempt at a run so far, oldest first."""
    try:
        found: list[dict[str, Any]] = json.loads((folder / schema.ATTEMPTS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    return found


def failure_class(summary: Mapping[str, Any]) -> str | None:
    """Why a run ended badly, one of schema.FAILURE_CLASSES; None for one that did not."""
    if summary.get("state") == schema.DIVERGED:
        return schema.DIVERGED
    return str(summary.get("failure") or schema.BUG) if summary.get("state") == schema.FAILED else None


def last_record(path: Path) -> dict[str, Any]:
    """The last whole line of a metrics.jsonl; {} when there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - TAIL_BYTES, 0))
            lines = file.read().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    for line in reversed(lines[:-1]):
        try:
            value: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        return value
    return {}


def mean_and_error(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Mean, and its standard error where there are at least two."""
    found = list(values)
    if not found:
        return None, None
    mean = math.fsum(found) / len(found)
    spread = all(math.isfinite(value) for value in found) and len(found) > 1
    return mean, statistics.stdev(found) / math.sqrt(len(found)) if spread else None


def _variant(runs: list[RunStatus], metric: str) -> Variant:
    values = [run.values[metric] for run in runs if run.state == schema.FINISHED and metric in run.values]
    mean, error = mean_and_error(values)
    first = runs[0]
    return Variant(name=first.variant, trial=first.trial, baseline=first.baseline, runs=tuple(runs), mean=mean, standard_error=error)


def _identity(about: Mapping[str, Any]) -> dict[str, Any]:
    own = {key: about[key] for key in ("run", "trial", "variant", "seed", "baseline")}
    return {**own, "counts": about.get("role") != "retune"}


def _ended_run(about: Mapping[str, Any], summary: Mapping[str, Any], metrics: list[str]) -> RunStatus:
    return RunStatus(
        **_identity(about),
        state=summary["state"],
        failure=failure_class(summary),
        reason=summary.get("reason"),
        attempts=summary.get("attempts", 1),
        step=summary.get("steps", 0),
        share=1.0,
        seconds=float(summary.get("seconds") or 0.0),
        values={metric: summary["metrics"][metric] for metric in metrics if metric in summary["metrics"]},
    )


def _open_run(folder: Path, about: Mapping[str, Any], known: Mapping[str, Any], alive: bool, metrics: list[str]) -> RunStatus:
    """A run without a summary: it waits, is computed now, or was when its driver died."""
    attempts = attempts_of(folder)
    started = bool(attempts)
    now = known.get("state") or (attempts[-1].get("state") if started else WAITING)
    state = (RUNNING if now == RUNNING else WAITING) if alive else INTERRUPTED if started and now == RUNNING else WAITING
    record = last_record(folder / schema.METRICS_FILE) if started else {}
    total = (read_json(folder / schema.CONFIG_FILE).get("training") or {}).get("train_tokens") or 0 if record else 0
    rate = record.get(schema.TOKENS_PER_SECOND) or 0.0
    return RunStatus(
        **_identity(about),
        state=state,
        failure=None,
        reason=known.get("reason"),
        attempts=len(attempts),
        step=int(record.get("step", 0)),
        share=min(record.get("tokens", 0) / total, 1.0) if total else 0.0,
        seconds=total / rate if rate else 0.0,
        values={metric: record[metric] for metric in metrics if metric in record},
    )


def _seconds_left(runs: list[RunStatus], planned: int, workers: int) -> float | None:
    """What is left to train, in runs, times what a run takes, over the workers; never less than the longest run still needs."""
    counted = [run for run in runs if run.counts]
    taken = [run.seconds for run in counted if run.state == schema.FINISHED and run.seconds > 0]
    expected = [run.seconds for run in counted if run.state == RUNNING and run.seconds > 0]
    if not taken and not expected:
        return None
    each = statistics.fmean(taken or expected)
    running = [1.0 - run.share for run in counted if run.state == RUNNING]
    waiting = max(planned, len(counted)) - sum(run.ended for run in counted) - len(running)
    return max(each * (sum(running) + max(waiting, 0)) / workers, each * max(running, default=0.0))


def _described(best: Variant | None, direction: str) -> dict[str, Any] | None:
    if best is None:
        return None
    return {
        "direction": direction,
        "variant": best.name,
        "trial": best.trial,
        "baseline": best.baseline,
        "mean": _finite(best.mean),
        "standard_error": _finite(best.standard_error),
        "seeds": best.finished,
    }


def _run_dict(run: RunStatus) -> dict[str, Any]:
    return {
        "state": run.state,
        "variant": run.variant,
        "seed": run.seed,
        "trial": run.trial,
        "baseline": run.baseline,
        "attempts": run.attempts,
        "class": run.failure,
        "reason": run.reason,
        "step": run.step,
        "share": round(run.share, 4),
        "seconds": round(run.seconds, 3) if run.ended else None,
        "values": {metric: _finite(value) for metric, value in run.values.items()},
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
