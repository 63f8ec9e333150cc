"""What was measured: the runs of a study's store, or of the data beside a report that was built from one."""

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from reports import places
from reports.statistics import Effect, compare
from reports.store import StudyRecord, load
from research.config import to_dict
from research.configfile import load_run_config, read_yaml, set_path
from research.errors import DataError, UserError
from sweeps import schema
from sweeps.variants import VARIANT, laid_over

GENERATED = Path(__file__).resolve().parent.parent / "generated"
"""Committed reports."""
RUNS = Path("data") / "runs.csv"
Model = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """One configuration of a study: its model as plain values, searched settings, and final metrics of finished runs by seed."""

    name: str
    trial: int
    baseline: bool
    model: Model
    settings: dict[str, Any]
    metrics: dict[int, dict[str, float]]

    def values(self, metric: str) -> dict[int, float]:
        """By seed, where it was recorded and is finite."""
        return {seed: found[metric] for seed, found in self.metrics.items() if math.isfinite(found.get(metric, math.nan))}


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """`tokens`: that the study's base trains on, None where it does not say."""

    name: str
    variants: tuple[Trained, ...]
    tokens: int | None
    expected: float | None = None
    """The effect in bits per byte that the study's file expects, where that is its objective."""

    def effect(self, metric: str, ours: Trained, theirs: Trained) -> Effect | None:
        """`ours` minus `theirs` over common seeds, among all variants of the study (so Holm's correction is the study's)."""
        others = {v.name: v.values(metric) for v in self.variants if v.name != theirs.name}
        reference = theirs.values(metric)
        return compare(reference, others).get(ours.name) if reference else None


def committed(beside: Path = GENERATED) -> list[Study]:
    """Of all committed reports that carry their runs, by name."""
    return [from_report(path.parent.parent) for path in sorted(beside.glob(f"*/{RUNS}"))]


def find(study: str) -> Study:
    """A study by its root, its YAML file, its name under $MOELAB_HOME, or the folder or name of a report; UserError if it is none of these."""
    root = places.study_root(study)
    if (root / schema.STUDY_FILE).exists() and (root / schema.RUNS_DIRECTORY).is_dir():
        return from_record(load(root))
    for folder in (Path(study), GENERATED / study):
        if (folder / RUNS).exists():
            return from_report(folder)
    raise UserError(
        f"--study {study}: is no study: expected a study's root ({schema.STUDY_FILE} and {schema.RUNS_DIRECTORY}/), a name under "
        f"{places.studies()} or {GENERATED}, or a report's folder with {RUNS}"
    )


def from_record(record: StudyRecord) -> Study:
    """Variants with at least one finished run whose configuration is there."""
    variants = []
    for name, runs in record.variants.items():
        done = [run for run in runs if run.finished and run.config.get("model")]
        if done:
            metrics = {run.seed: {key: float(value) for key, value in run.metrics.items()} for run in done}
            first = done[0]
            variants.append(
                Trained(
                    name=name,
                    trial=first.trial,
                    baseline=first.baseline,
                    model=first.config["model"],
                    settings=first.parameters,
                    metrics=metrics,
                )
            )
    return Study(name=record.name, variants=tuple(variants), tokens=_base_tokens(record.study), expected=_expected(record.study))


def from_report(folder: Path) -> Study:
    """From a built report's data/runs.csv and study.yaml: a variant's model is the study's base with its settings laid over it."""
    source = folder / RUNS
    study = read_yaml(folder / schema.STUDY_FILE)
    with source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return Study(name=str(study["name"]), variants=tuple(_variants(study, rows)), tokens=_base_tokens(study), expected=_expected(study))
    except (KeyError, ValueError) as error:
        raise DataError(f"{source}: is not what `python -m reports build` writes ({type(error).__name__}: {error})") from error


def _variants(study: dict[str, Any], rows: Sequence[dict[str, str]]) -> list[Trained]:
    paths = [path for path in study["space"] if rows and path in rows[0]]
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if row["state"] == schema.FINISHED:
            groups.setdefault(row["variant"], []).append(row)
    found = []
    for name, runs in groups.items():
        settings = {path: yaml.safe_load(runs[0][path]) for path in paths}
        metrics = {int(run["seed"]): {key: float(value) for key, value in run.items() if "/" in key and value} for run in runs}
        found.append(
            Trained(
                name=name,
                trial=int(runs[0]["trial"]),
                baseline=runs[0]["baseline"] == "True",
                model=_model(study, settings),
                settings=settings,
                metrics=metrics,
            )
        )
    return sorted(found, key=lambda v: (not v.baseline, v.trial))


def _model(study: dict[str, Any], settings: dict[str, Any]) -> Model:
    mapping = json.loads(json.dumps(study.get("base") or {}))
    if VARIANT in settings:
        mapping = laid_over(mapping, study["variants"][settings[VARIANT]])
    for path, value in settings.items():
        if path == VARIANT:
            continue
        if isinstance(mapping.get("model"), str) and path.startswith("model."):
            mapping["model"] = {"preset": mapping["model"]}
        set_path(mapping, path, value)
    model: Model = to_dict(load_run_config(mapping, f"{study['name']}/{schema.STUDY_FILE}"))["model"]
    return model


def _base_tokens(study: dict[str, Any]) -> int | None:
    found = ((study.get("base") or {}).get("training") or {}).get("train_tokens")
    return None if found is None else int(found)


def _expected(study: dict[str, Any]) -> float | None:
    first = (study.get("objectives") or [{"metric": schema.BITS_PER_BYTE}])[0]
    found = (study.get("expects") or {}).get("effect")
    return None if found is None or first["metric"] != schema.BITS_PER_BYTE else float(found)


def pairs(
    study: Study,
    left: Callable[[Model], bool],
    right: Callable[[Model], bool],
    alike: Callable[[Trained, Trained], bool],
) -> list[tuple[Trained, Trained]]:
    """Two variants that a claim compares; those with the study's baseline first, then in the order of trials."""
    found = [(a, b) for a in study.variants for b in study.variants if a.name != b.name and left(a.model) and right(b.model) and alike(a, b)]
    return sorted(found, key=lambda pair: (not (pair[0].baseline or pair[1].baseline), pair[0].trial, pair[1].trial))
