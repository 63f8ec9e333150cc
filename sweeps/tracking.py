"""MLflow: experiment = study, parent run = the study, child run = one (variant, seed).

Only the driver writes.  What a run recorded stands in its metrics.jsonl first; from there it goes to
MLflow in batches, with the place reached kept beside it, so that an outage of the server stops nothing
and loses nothing: what could not be sent is sent at a later turn.
"""

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from research.atomic import write_text
from research.errors import UserError
from sweeps import schema
from sweeps.study import Study, home, short_name

STATE_FILE = "mlflow.json"
BATCH = 900
RETRY_SECONDS = 20.0
ARTIFACTS = (schema.CONFIG_FILE, schema.SUMMARY_FILE, schema.ROUTING_FILE, schema.SIMULATION_FILE)


def tracking_uri() -> str:
    """$MLFLOW_TRACKING_URI, or a sqlite file in moelab's home."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


class Tracker:
    """A study's parent run and its children.  No method raises because the store is away: `behind` says so."""

    def __init__(self, study: Study, root: Path, commit: str) -> None:
        self.study, self.root, self.commit = study, root, commit
        self.behind: str | None = None
        self._retry_at = 0.0
        self._client: Any = None
        self._parent: str | None = None

    def sync(self, runs: Mapping[str, Mapping[str, Any]], *, final: bool = False) -> None:
        """Bring MLflow up to what the root holds; `runs` maps a run to its run.json."""
        if time.monotonic() < self._retry_at and not final:
            return
        try:
            self._open()
            for run, about in runs.items():
                self._sync_run(run, about)
            self.behind = None
        except UserError:
            raise
        except Exception as error:
            # Whatever the store's client raises (its own errors, requests', SQLAlchemy's), training goes on.
            self.behind = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            self._retry_at = time.monotonic() + RETRY_SECONDS

    def finish(self, state: str, note: str) -> None:
        """End the parent run with what came out."""
        try:
            self._open()
            self._client.set_tag(self._parent, "mlflow.note.content", note)
            self._client.set_tag(self._parent, schema.TAG_STATE, state)
            for name in (schema.STUDY_FILE, schema.DATA_FILE):
                if (self.root / name).exists():
                    self._client.log_artifact(self._parent, str(self.root / name))
            status = "KILLED" if state == schema.STOPPED else "FINISHED" if state == "finished" else "FAILED"
            self._client.set_terminated(self._parent, status)
        except Exception as error:
            self.behind = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"

    def _open(self) -> None:
        if self._client is not None:
            return
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow  # noqa: PLC0415  (four seconds, and only a run needs it)

        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.ERROR)
        uri = tracking_uri()
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        client = mlflow.MlflowClient(uri)
        experiment = client.get_experiment_by_name(self.study.name)
        if experiment is None:
            place = str(home() / "mlartifacts" / self.study.name) if uri.startswith("sqlite:///") else None
            experiment_id = client.create_experiment(self.study.name, artifact_location=place)
        else:
            experiment_id = experiment.experiment_id
        state = _read(self.root / STATE_FILE)
        if "run_id" not in state:
            tags = {
                schema.TAG_SCHEMA: str(schema.SCHEMA_VERSION),
                schema.TAG_STUDY: self.study.name,
                schema.TAG_QUESTION: self.study.question,
                schema.TAG_ROLE: "study",
                schema.TAG_COMMIT: self.commit,
                schema.TAG_ROOT: str(self.root),
                "mlflow.note.content": f"# {self.study.question}\n\nRunning.",
            }
            state = {"run_id": client.create_run(experiment_id, tags=tags, run_name=self.study.name).info.run_id}
            write_text(self.root / STATE_FILE, json.dumps(state))
        else:
            client.update_run(state["run_id"], status="RUNNING")
        self._experiment, self._parent, self._client = experiment_id, state["run_id"], client

    def _sync_run(self, run: str, about: Mapping[str, Any]) -> None:
        directory = self.root / schema.RUNS_DIRECTORY / run
        state, summary = _read(directory / STATE_FILE), _read(directory / schema.SUMMARY_FILE)
        if state.get("ended"):
            if summary.get("attempts") == state["ended"]:
                return
            # It was stopped, or had failed, and is on its way again.
            self._client.update_run(state["run_id"], status="RUNNING")
            self._client.set_tag(state["run_id"], schema.TAG_STATE, "running")
            state["ended"] = None
        if "run_id" not in state:
            state |= {"run_id": self._create(run, about, directory), "offset": 0}
            write_text(directory / STATE_FILE, json.dumps(state))
        state["offset"] = self._send_metrics(state["run_id"], directory / schema.METRICS_FILE, state["offset"])
        if summary:
            self._end(state["run_id"], directory, summary)
            state["ended"] = summary["attempts"]
        write_text(directory / STATE_FILE, json.dumps(state))

    def _create(self, run: str, about: Mapping[str, Any], directory: Path) -> str:
        from mlflow.entities import Param  # noqa: PLC0415

        tags = {
            "mlflow.parentRunId": self._parent,
            schema.TAG_SCHEMA: str(schema.SCHEMA_VERSION),
            schema.TAG_STUDY: self.study.name,
            schema.TAG_ROLE: "retune" if about.get("role") == "retune" else "run",
            schema.TAG_VARIANT: about["variant"],
            schema.TAG_SEED: str(about["seed"]),
            schema.TAG_TRIAL: str(about["trial"]),
            schema.TAG_BASELINE: str(about["baseline"]).lower(),
            schema.TAG_STATE: "running",
            schema.TAG_COMMIT: about["commit"],
            schema.TAG_CONFIG: about["config_id"],
            "mlflow.note.content": f"**{about['variant']}**, seed {about['seed']}, of the study *{self.study.question}*",
        }
        created = self._client.create_run(self._experiment, tags=tags, run_name=f"{about['variant']} / seed {about['seed']}")
        searched = {short_name(path): value for path, value in about["parameters"].items()}
        fixed = {path: value for path, value in _leaves(_read(directory / schema.CONFIG_FILE)) if path not in about["parameters"]}
        params = [Param(name, str(value)) for name, value in {**searched, **fixed}.items()]
        self._client.log_batch(created.info.run_id, params=params[:100])
        return str(created.info.run_id)

    def _send_metrics(self, run_id: str, path: Path, offset: int) -> int:
        from mlflow.entities import Metric  # noqa: PLC0415

        if not path.exists():
            return offset
        with path.open("rb") as file:
            file.seek(offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        stamp = int(time.time() * 1000)
        metrics = []
        for line in whole.splitlines():
            record = json.loads(line)
            metrics += [Metric(name, float(v), stamp, record["step"]) for name, v in record.items() if name not in ("step", "tokens")]
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(run_id, metrics=metrics[start : start + BATCH])
        return offset + len(whole)

    def _end(self, run_id: str, directory: Path, summary: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric, RunTag  # noqa: PLC0415

        recorded = ("train/", "routing/", "validation/")
        stamp = int(time.time() * 1000)
        final = [Metric(name, float(v), stamp, summary["steps"]) for name, v in summary["metrics"].items() if not name.startswith(recorded)]
        tags = [RunTag(schema.TAG_STATE, summary["state"]), RunTag(schema.TAG_ATTEMPT, str(summary["attempts"]))]
        tags.append(RunTag(schema.TAG_REASON, (summary["reason"] or "")[-4000:]))
        self._client.log_batch(run_id, metrics=final, tags=tags)
        for name in ARTIFACTS:
            if (directory / name).exists():
                self._client.log_artifact(run_id, str(directory / name))
        status = {schema.FINISHED: "FINISHED", schema.PRUNED: "FINISHED", schema.STOPPED: "KILLED"}.get(summary["state"], "FAILED")
        self._client.set_terminated(run_id, status)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(prefix, value)]
    return [leaf for key, item in value.items() for leaf in _leaves(item, f"{prefix}.{key}".lstrip("."))]
