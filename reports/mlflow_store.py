"""The same record out of MLflow, when a study's root is gone: its runs, their metrics and their artifacts.

An artifact that the tracker logged (configuration, summary, routing, simulation) is read as the file that it was.  What was
never logged as one is put together again: `run.json` from tags and parameters, the records from the metrics' histories, with
the tokens of a step from the run's own schedule.
"""

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import yaml
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Run as Tracked

from reports.store import Problem, Run, StudyRecord, assemble, read_run
from research.errors import DataError
from research.schedule import batch_schedule
from sweeps import schema
from sweeps.variants import VARIANT

for _logger in ("alembic", "mlflow"):
    logging.getLogger(_logger).setLevel(logging.ERROR)
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
TAG_RUN, TAG_VERDICT = "moelab.run", "moelab.verdict"
RECORDED = ("train/", "routing/", "validation/")


def load(name: str, uri: str) -> StudyRecord:
    """DataError if the store cannot be reached, has no such study, or holds none of its runs."""
    with _readable(name, uri):
        return _load(MlflowClient(uri), name, uri)


def publish(name: str, uri: str, sentence: str) -> None:
    """Write a verdict into the study's parent run, where MLflow's pages show it.  DataError as in `load`."""
    with _readable(name, uri):
        client = MlflowClient(uri)
        parent, _ = _family(client, name, uri)
        client.set_tag(parent.info.run_id, TAG_VERDICT, sentence)


@contextmanager
def _readable(name: str, uri: str) -> Iterator[None]:
    try:
        _database_exists(uri)
        yield
    except DataError:
        raise
    except Exception as error:
        # The client raises its own errors, requests' and SQLAlchemy's.
        raise DataError(
            f"{uri}: study {name!r} cannot be read from this MLflow store ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
        ) from error


def _database_exists(uri: str) -> None:
    """sqlite would make an empty store of a mistyped path."""
    path = uri.removeprefix("sqlite:///")
    if path != uri and not Path(path).exists():
        raise DataError(f"{uri}: there is no such database")


def _family(client: MlflowClient, name: str, uri: str) -> tuple[Tracked, list[Tracked]]:
    """The study's parent run and its children."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        known = sorted(e.name for e in client.search_experiments() if e.name != "Default")
        raise DataError(f"{uri}: has no study {name!r} (it has {', '.join(known) or 'none'})")
    tracked = _all_runs(client, experiment.experiment_id)
    parents = [t for t in tracked if t.data.tags.get(schema.TAG_ROLE) == "study"]
    if not parents:
        raise DataError(f"{uri}: experiment {name!r} has no run with the tag {schema.TAG_ROLE} = study")
    # A study that was begun anew has several parents; the last one counts, and its children alone.
    parent = max(parents, key=lambda t: (t.info.start_time, t.info.run_id))
    return parent, [t for t in tracked if t.data.tags.get("mlflow.parentRunId") == parent.info.run_id]


def _load(client: MlflowClient, name: str, uri: str) -> StudyRecord:
    parent, children = _family(client, name, uri)
    problems: list[Problem] = []
    with tempfile.TemporaryDirectory() as folder:
        study = _artifact(uri, parent, schema.STUDY_FILE, Path(folder))
        data = _artifact(uri, parent, schema.DATA_FILE, Path(folder))
        if study is None:
            raise DataError(f"{uri}: study {name!r} has no artifact {schema.STUDY_FILE}: it is logged when a study ends")
        runs = [run for child in children if (run := _run(client, uri, child, Path(folder), study, problems)) is not None]
        about = json.loads(data.read_text(encoding="utf-8")) if data else {}
        return assemble(uri, study.read_text(encoding="utf-8"), runs, problems, state=_state(parent, runs), data=about)


def _all_runs(client: MlflowClient, experiment: str) -> list[Tracked]:
    found: list[Tracked] = []
    token: str | None = None
    while True:
        page = client.search_runs([experiment], page_token=token, max_results=500)
        found += list(page)
        token = page.token
        if not token:
            return found


def _artifact(uri: str, run: Tracked, name: str, folder: Path) -> Path | None:
    """The file, downloaded; None if it was not logged."""
    try:
        path = download_artifacts(run_id=run.info.run_id, artifact_path=name, dst_path=str(folder / run.info.run_id), tracking_uri=uri)
    except Exception:
        return None
    return Path(path)


def _run(client: MlflowClient, uri: str, child: Tracked, folder: Path, study: Path, problems: list[Problem]) -> Run | None:
    tags = child.data.tags
    place = folder / "runs" / _name(tags)
    place.mkdir(parents=True, exist_ok=True)
    names = (schema.RUN_FILE, schema.CONFIG_FILE, schema.SUMMARY_FILE, schema.ROUTING_FILE, schema.SIMULATION_FILE, schema.METRICS_FILE)
    listed = {item.path for item in client.list_artifacts(child.info.run_id)}
    for name in names:
        if name in listed and (path := _artifact(uri, child, name, folder)) is not None:
            path.replace(place / name)
    config = place / schema.CONFIG_FILE
    settings = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    if not (place / schema.METRICS_FILE).exists():
        lines = [json.dumps(record) for record in _histories(client, child, settings)]
        (place / schema.METRICS_FILE).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    about = None if (place / schema.RUN_FILE).exists() else _about(tags, settings, study)
    return read_run(place, problems, about)


def _name(tags: dict[str, str]) -> str:
    if TAG_RUN in tags:
        return tags[TAG_RUN]
    trial, seed = tags.get(schema.TAG_TRIAL, "0"), tags.get(schema.TAG_SEED, "0")
    role = tags.get(schema.TAG_ROLE, "run")
    return f"{int(trial):03d}-{seed}" + ("" if role == "run" else f"-{role}")


def _about(tags: dict[str, str], settings: dict[str, Any], study: Path) -> dict[str, Any]:
    """What run.json says, from the tags and the configuration."""
    space = (yaml.safe_load(study.read_text(encoding="utf-8")) or {}).get("space") or {}
    version = tags.get(schema.TAG_SCHEMA, "none")
    return {
        "schema": int(version) if version.isdigit() else version,
        "run": _name(tags),
        "study": tags.get(schema.TAG_STUDY),
        "trial": int(tags.get(schema.TAG_TRIAL, 0)),
        "variant": tags.get(schema.TAG_VARIANT, "unknown"),
        "seed": int(tags.get(schema.TAG_SEED, 0)),
        "baseline": tags.get(schema.TAG_BASELINE) == "true",
        "parameters": {path: tags.get(f"{schema.TAG_PARAMETER}{path}") if path == VARIANT else _at(settings, path) for path in space},
        "config_id": tags.get(schema.TAG_CONFIG, "not recorded"),
        "commit": tags.get(schema.TAG_COMMIT, "not recorded"),
        "role": tags.get(schema.TAG_ROLE, "run"),
    }


def _at(settings: Any, path: str) -> Any:
    for key in path.split("."):
        settings = settings.get(key) if isinstance(settings, dict) else None
    return settings


def _histories(client: MlflowClient, child: Tracked, settings: dict[str, Any]) -> list[dict[str, float]]:
    """The records by step, each metric's history put back into its step."""
    records: dict[int, dict[str, float]] = {}
    for name in sorted(child.data.metrics):
        if name.startswith(RECORDED):
            for point in client.get_metric_history(child.info.run_id, name):
                records.setdefault(point.step, {"step": point.step})[name] = point.value
    tokens = _tokens(settings)
    return [{**record, "tokens": tokens(step)} for step, record in sorted(records.items())]


def _tokens(settings: dict[str, Any]) -> Any:
    """Tokens seen by a step, from the run's own schedule."""
    data, training = settings.get("data") or {}, settings.get("training") or {}
    if not data or not training:
        return lambda step: step
    schedule = batch_schedule(
        train_tokens=training["train_tokens"],
        sequence_length=data["sequence_length"],
        batch_size=training["batch_size"],
        first=training.get("batch_ramp_from"),
        ramp_tokens=training.get("batch_ramp_tokens") or 0,
        multiple=training.get("micro_batch_size") or 1,
    )
    return schedule.tokens


def _state(parent: Tracked, runs: list[Run]) -> dict[str, Any]:
    """What state.json says, as far as MLflow knows it."""
    versions: dict[str, str] = next((run.summary["versions"] for run in runs if run.summary.get("versions")), {})
    times = (("started", parent.info.start_time), ("updated", parent.info.end_time))
    written = {key: datetime.fromtimestamp(at / 1000, UTC).isoformat(timespec="seconds") for key, at in times if at}
    return written | {
        "state": parent.data.tags.get(schema.TAG_STATE, "running"),
        "commit": parent.data.tags.get(schema.TAG_COMMIT),
        "versions": versions,
    }
