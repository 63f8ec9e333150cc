"""A study's store, read into values.  The contract is `sweeps.schema`; nothing here changes a file.

What cannot be read, or is of another schema, is left out and said: every such finding is a `Problem`
with its place, which the page prints there and the exit code carries.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from reports import shape
from research.errors import DataError, UserError
from research.routing_trace import RoutingTrace
from sweeps import schema

ATTEMPTS_FILE = "attempts.json"
REPLICATE = "replicate"
"""Runs of another role (`retune`: short runs that choose a learning rate) are listed and never counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Something that the store does not hold as it should; `place` is a run's name, or `study`."""

    place: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One (variant, seed): what it was, how it ended, and its records."""

    name: str
    variant: str
    seed: int
    trial: int
    baseline: bool
    parameters: dict[str, Any]
    config_id: str
    commit: str
    config: dict[str, Any]
    state: str
    reason: str | None
    summary: dict[str, Any]
    records: tuple[dict[str, float], ...]
    trace: RoutingTrace | None
    simulation: dict[str, Any]
    attempts: tuple[dict[str, Any], ...] = ()
    role: str = REPLICATE
    matched: dict[str, Any] = field(default_factory=dict)
    """What was asked of the budget and what the turned setting reached."""
    retuned: dict[str, Any] = field(default_factory=dict)
    """The learning rate chosen for the variant, with all that were tried."""

    @property
    def metrics(self) -> dict[str, float]:
        """Final values; empty where the run did not end."""
        value: dict[str, float] = self.summary.get("metrics", {})
        return value

    @property
    def finished(self) -> bool:
        return self.state == schema.FINISHED

    def value(self, metric: str) -> float | None:
        """A final value of a finished run; None where there is none or it is no finite number."""
        found = self.metrics.get(metric) if self.finished else None
        if not isinstance(found, int | float) or isinstance(found, bool):
            return None
        return float(found) if abs(found) < shape.LARGEST else None


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyRecord:
    """Everything a report is made of."""

    study: dict[str, Any]
    state: dict[str, Any]
    data: dict[str, Any]
    runs: tuple[Run, ...]
    others: tuple[Run, ...] = ()
    """Runs that are no replicates (see REPLICATE)."""
    problems: tuple[Problem, ...] = ()
    study_text: str = ""

    @property
    def name(self) -> str:
        return str(self.study["name"])

    @property
    def question(self) -> str:
        return str(self.study["question"])

    @property
    def objective(self) -> tuple[str, bool]:
        """The first objective's metric, and whether less of it is better."""
        first = (self.study.get("objectives") or [{"metric": schema.BITS_PER_BYTE}])[0]
        return str(first["metric"]), first.get("direction", "minimize") == "minimize"

    @property
    def expects(self) -> tuple[float, str] | None:
        """The effect that the study's file expects of the objective, and where it is published; None where it names none."""
        found = _mapping(self.study.get("expects"))
        effect = found.get("effect")
        return (float(effect), str(found.get("source", ""))) if isinstance(effect, int | float) and 0 < effect < math.inf else None

    @property
    def variants(self) -> dict[str, list[Run]]:
        """Runs by variant, the baseline first, then in the order of their trials."""
        groups: dict[str, list[Run]] = {}
        for run in sorted(self.runs, key=lambda r: (not r.baseline, r.trial, r.seed)):
            groups.setdefault(run.variant, []).append(run)
        return groups

    @property
    def baseline(self) -> list[Run]:
        """The baseline's runs; empty if there are none."""
        return [run for runs in self.variants.values() for run in runs if run.baseline]


def load(root: Path) -> StudyRecord:
    """UserError if `root` is no study's root; DataError if nothing in it can be read."""
    path = root / schema.STUDY_FILE
    if not path.exists():
        raise UserError(
            f"{root}: is no study's root (expected {schema.STUDY_FILE} and {schema.RUNS_DIRECTORY}/ in it); "
            "if it is gone, --mlflow URI reads the study there"
        )
    text = path.read_text(encoding="utf-8")
    folders = sorted(path.parent for path in (root / schema.RUNS_DIRECTORY).glob(f"*/{schema.RUN_FILE}"))
    if not folders:
        raise UserError(f"{root}: has no run yet ({schema.RUNS_DIRECTORY}/ is empty); `python -m sweeps run` makes them")
    problems: list[Problem] = []
    found = [run for folder in folders if (run := read_run(folder, problems)) is not None]
    return assemble(
        str(root),
        text,
        found,
        problems,
        state=_json(root / schema.STATE_FILE, "study", problems),
        data=_json(root / schema.DATA_FILE, "study", problems),
    )


def assemble(
    source: str, study_text: str, found: Iterable[Run], problems: list[Problem], *, state: dict[str, Any], data: dict[str, Any]
) -> StudyRecord:
    """A record of what was read, wherever it stood (`source`); DataError if no run of this schema is among it."""
    try:
        study = yaml.safe_load(study_text)
    except yaml.YAMLError as error:
        raise DataError(f"{source}/{schema.STUDY_FILE}: is damaged ({str(error).splitlines()[0]})") from error
    missing = [key for key in ("name", "question", "space", "seeds") if not isinstance(study, dict) or key not in study]
    if missing:
        raise DataError(f"{source}/{schema.STUDY_FILE}: has no {', '.join(missing)}: it is no resolved study")
    if damaged := shape.study_problems(study):
        raise DataError(*(f"{source}/{schema.STUDY_FILE}: {text}" for text in damaged))
    if bad := shape.data_problem(data):
        problems.append(Problem(place="study", text=f"{schema.DATA_FILE}: {bad}; it counts as missing"))
        data = {}
    runs: dict[tuple[str, int], Run] = {}
    others = []
    for run in found:
        if run.role != REPLICATE:
            others.append(run)
        elif (first := runs.setdefault((run.variant, run.seed), run)) is not run:
            problems.append(Problem(place=run.name, text=f"is {run.variant}, seed {run.seed}, as {first.name} is: left out"))
    if not runs:
        raise DataError(f"{source}: no run can be read: {'; '.join(f'{p.place}: {p.text}' for p in problems) or 'none of them is a replicate'}")
    ordered = tuple(sorted(runs.values(), key=lambda r: r.name))
    return StudyRecord(study=study, state=state, data=data, runs=ordered, others=tuple(others), problems=tuple(problems), study_text=study_text)


def read_run(folder: Path, problems: list[Problem], about: dict[str, Any] | None = None) -> Run | None:
    """One run's folder; None, and a problem, where it cannot be used.  `about` stands in for a run.json that is not there."""
    name = folder.name
    about = about or _json(folder / schema.RUN_FILE, name, problems)
    summary = _json(folder / schema.SUMMARY_FILE, name, problems)
    for file, value in ((schema.RUN_FILE, about), (schema.SUMMARY_FILE, summary)):
        if value and value.get("schema") != schema.SCHEMA_VERSION:
            text = f"{file} is of schema {value.get('schema')}, this version reads {schema.SCHEMA_VERSION}: the run is left out"
            problems.append(Problem(place=name, text=text))
            return None
    missing = [key for key in schema.RUN_KEYS if key not in about]
    if missing:
        if about:
            problems.append(Problem(place=name, text=f"{schema.RUN_FILE} has no {', '.join(missing)}: the run is left out"))
        return None
    empty = [f"{key} = null: expected {kind}" for key, kind in shape.RUN.items() if about[key] is None]
    if damaged := [*shape.wrong(about, shape.RUN).values(), *empty]:
        problems.append(Problem(place=name, text=f"{schema.RUN_FILE}: {'; '.join(damaged)}: the run is left out"))
        return None
    config = _json(folder / schema.CONFIG_FILE, name, problems)
    if config and (why := shape.config_problem(config)):
        problems.append(Problem(place=name, text=f"{schema.CONFIG_FILE}: {why}; it counts as missing"))
        config = {}
    return Run(
        name=about["run"],
        variant=about["variant"],
        seed=about["seed"],
        trial=about["trial"],
        baseline=about["baseline"],
        parameters=about["parameters"],
        config_id=about["config_id"],
        commit=about["commit"],
        config=config,
        state=summary.get("state") or "not finished",
        reason=summary.get("reason"),
        summary=summary,
        records=_records(folder / schema.METRICS_FILE, name, problems),
        trace=_trace(folder / schema.ROUTING_FILE, name, problems),
        simulation=_json(folder / schema.SIMULATION_FILE, name, problems),
        attempts=_attempts(folder),
        role=REPLICATE if about.get("role") in (None, "run") else about["role"],
        matched=_mapping(about.get("matched")),
        retuned=_mapping(about.get("retune")),
    )


def _json(path: Path, place: str, problems: list[Problem]) -> dict[str, Any]:
    """The object in a file; empty where there is no file, and with a problem where it is damaged, as a whole or in a value."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        problems.append(Problem(place=place, text=f"{path.name} is damaged ({error}) and counts as missing"))
        return {}
    if not isinstance(value, dict):
        problems.append(Problem(place=place, text=f"{path.name} holds no object, and counts as missing"))
        return {}
    damaged = shape.wrong(value, shape.FILES.get(path.name, {}))
    problems += [Problem(place=place, text=f"{path.name}: {text}; it counts as missing") for text in damaged.values()]
    return {key: item for key, item in value.items() if key not in damaged and (item is not None or key not in shape.FILES.get(path.name, {}))}


def _records(path: Path, place: str, problems: list[Problem]) -> tuple[dict[str, float], ...]:
    """Whole lines.  The last may be cut off (a run that goes on, or was killed); another that cannot be read is a problem."""
    if not path.exists():
        return ()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found: list[dict[str, float]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            found.append({**record, "tokens": record["tokens"], "step": record["step"]})
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                problems.append(Problem(place=place, text=f"{path.name}, line {number}: is no record, and is left out"))
    return tuple(found)


def _trace(path: Path, place: str, problems: list[Problem]) -> RoutingTrace | None:
    if not path.exists():
        return None
    try:
        trace = RoutingTrace.load(path)
    except Exception as error:  # a damaged archive raises zlib's and zipfile's own errors too
        problems.append(Problem(place=place, text=f"{path.name}: cannot be read ({type(error).__name__}) and counts as missing"))
        return None
    return trace if trace.expert_ids.size else None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _attempts(folder: Path) -> tuple[dict[str, Any], ...]:
    """What became of each attempt, where the driver kept a list of them: objects with `failure`, `text`, `step` and the like."""
    path = folder / ATTEMPTS_FILE
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except ValueError:
        return ()
    return tuple(item for item in value if isinstance(item, dict)) if isinstance(value, list) else ()
