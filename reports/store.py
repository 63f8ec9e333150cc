"""A study's root, read into values.  The contract is `sweeps.schema`; nothing here changes a file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from research.errors import DataError, UserError
from research.routing_trace import RoutingTrace
from sweeps import schema


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

    @property
    def metrics(self) -> dict[str, float]:
        """Final values; empty where the run did not end."""
        value: dict[str, float] = self.summary.get("metrics", {})
        return value

    @property
    def finished(self) -> bool:
        return self.state == schema.FINISHED


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyRecord:
    """Everything a report is made of."""

    root: Path
    study: dict[str, Any]
    state: dict[str, Any]
    data: dict[str, Any]
    runs: tuple[Run, ...]

    @property
    def variants(self) -> dict[str, list[Run]]:
        """Runs by variant, the baseline first, then in the order of their trials."""
        groups: dict[str, list[Run]] = {}
        for run in sorted(self.runs, key=lambda r: (not r.baseline, r.trial, r.seed)):
            groups.setdefault(run.variant, []).append(run)
        return groups


def load(root: Path) -> StudyRecord:
    """UserError if `root` is no study's root; DataError if a file in it is damaged or of another schema."""
    if not (root / schema.STUDY_FILE).exists():
        raise UserError(f"{root}: is no study's root (expected {schema.STUDY_FILE} and {schema.RUNS_DIRECTORY}/ in it)")
    study = yaml.safe_load((root / schema.STUDY_FILE).read_text(encoding="utf-8"))
    folders = sorted(path.parent for path in (root / schema.RUNS_DIRECTORY).glob(f"*/{schema.RUN_FILE}"))
    if not folders:
        raise UserError(f"{root}: has no run yet ({schema.RUNS_DIRECTORY}/ is empty); `python -m sweeps run` makes them")
    return StudyRecord(
        root=root,
        study=study,
        state=_json(root / schema.STATE_FILE),
        data=_json(root / schema.DATA_FILE),
        # Short runs that re-tune a learning rate are no replicates.
        runs=tuple(_run(folder) for folder in folders if _json(folder / schema.RUN_FILE).get("role", "replicate") == "replicate"),
    )


def _run(folder: Path) -> Run:
    about, summary = _json(folder / schema.RUN_FILE), _json(folder / schema.SUMMARY_FILE)
    for name, value in ((schema.RUN_FILE, about), (schema.SUMMARY_FILE, summary)):
        if value and value.get("schema") != schema.SCHEMA_VERSION:
            raise DataError(f"{folder / name}: is of schema {value.get('schema')}, this version reads {schema.SCHEMA_VERSION}")
    lines = (folder / schema.METRICS_FILE).read_text(encoding="utf-8").splitlines() if (folder / schema.METRICS_FILE).exists() else []
    trace = folder / schema.ROUTING_FILE
    return Run(
        name=about["run"],
        variant=about["variant"],
        seed=about["seed"],
        trial=about["trial"],
        baseline=about["baseline"],
        parameters=about["parameters"],
        config_id=about["config_id"],
        commit=about["commit"],
        config=_json(folder / schema.CONFIG_FILE),
        state=summary.get("state", "not finished"),
        reason=summary.get("reason"),
        summary=summary,
        records=tuple(json.loads(line) for line in lines if line.endswith("}")),
        trace=RoutingTrace.load(trace) if trace.exists() else None,
        simulation=_json(folder / schema.SIMULATION_FILE),
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: is damaged ({error})") from error
    return value
