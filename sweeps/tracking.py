"""MLflow: experiment = study, parent run = the study, child run = one (variant, seed).

Only the driver writes.  What a run recorded stands in its metrics.jsonl first; from there it goes to
MLflow in batches, with the place reached kept beside it, so that an outage of the server stops nothing
and loses nothing: what could not be sent is sent at a later turn.  Nothing is sent twice either: a batch is
written down with its time stamp before it is sent, and MLflow keeps one of two equal values.
"""

import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from research.atomic import write_text
from research.errors import UserError
from sweeps import mlflow_entries as entries
from sweeps import schema
from sweeps.places import home, tracking_uri
from sweeps.status import Reader, StudyStatus, read_json
from sweeps.study import Study

__all__ = ["Tracker", "tracking_uri"]

STATE_FILE = "mlflow.json"
SENT_FILES = {"offset": schema.METRICS_FILE, "system": schema.SYSTEM_FILE}
"""Files that grow, by the key under which mlflow.json keeps how many of their bytes are sent."""
BATCH = 900
RETRY_SECONDS = 20.0
NOTE_SECONDS = 15.0
PICTURE_SECONDS = 30.0
"""A run that took less is drawn when the study ends: what surrounds a run should cost nearly nothing beside it."""
PICTURE_SHARE, PICTURE_LEAST = 0.01, 0.5
"""At its end the short runs are drawn, those of the best variants first, for this share of the time that training took, and at least
for half a second."""
ARTIFACTS = (schema.CONFIG_FILE, schema.SUMMARY_FILE, schema.METRICS_FILE, schema.ROUTING_FILE, schema.SIMULATION_FILE)


class Tracker:
    """A study's parent run and its children.  No method raises because the store is away: `behind` says so."""

    def __init__(self, study: Study, root: Path, commit: str) -> None:
        self.study, self.root, self.commit = study, root, commit
        self.behind: str | None = None
        self._ends = 0
        self._undrawn: set[str] = set()
        self._retry_at = self._note_at = 0.0
        self._client: Any = None
        self._experiment = self._parent = ""

    def sync(self, runs: Mapping[str, Mapping[str, Any]], *, final: bool = False) -> None:
        """Bring MLflow up to what the root holds; `runs` maps a run to its run.json."""
        if time.monotonic() < self._retry_at and not final:
            return
        try:
            self._open()
            for run, about in runs.items():
                self._sync_run(run, about)
            if self._ends and time.monotonic() > self._note_at and not final:
                self._note()
            self.behind = None
        except UserError:
            raise
        except Exception as error:
            # Whatever the store's client raises (its own errors, requests', SQLAlchemy's), training goes on.
            self._away(error)

    def finish(self, state: str) -> None:
        """End the parent run with what came out: its note, its pictures, and the model of the best run."""
        try:
            self._open()
            status = self._note(state)
            self._client.set_tag(self._parent, schema.TAG_STATE, state)
            self._client.log_batch(self._parent, metrics=entries.study_metrics(status, int(time.time() * 1000)))
            for name in (schema.STUDY_FILE, schema.DATA_FILE):
                if (self.root / name).exists():
                    self._client.log_artifact(self._parent, str(self.root / name))
            if state != schema.STOPPED:
                self._draw_study(status)
                self._keep_best_model(status)
            ended = "KILLED" if state == schema.STOPPED else "FINISHED" if state == schema.FINISHED else "FAILED"
            self._client.set_terminated(self._parent, ended)
        except Exception as error:
            self._away(error)

    def _away(self, error: Exception) -> None:
        self.behind = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:400] if str(error).strip() else 'no reason given'}"
        self._retry_at = time.monotonic() + RETRY_SECONDS

    def connect(self) -> None:
        """Import what takes seconds, and reach the store, whose database is made where there is none; what goes wrong the first
        `sync` says."""
        with suppress(Exception):
            self._connect().search_experiments(max_results=1)
            from sweeps import best_model, figures  # noqa: F401, PLC0415  (for the end of the study, when nothing else is computed)

    def _connect(self) -> Any:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        import mlflow  # noqa: PLC0415  (seconds, and only a run needs it)

        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.ERROR)
        uri = tracking_uri()
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        return mlflow.MlflowClient(uri)

    def _open(self) -> None:
        if self._client is not None:
            return
        client, uri = self._connect(), tracking_uri()
        experiment = client.get_experiment_by_name(self.study.name)
        if experiment is None:
            place = str(home() / "mlartifacts" / self.study.name) if uri.startswith("sqlite:///") else None
            tags = entries.experiment_tags(self.study)
            experiment_id = client.create_experiment(self.study.name, artifact_location=place, tags=tags)
        elif experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
            experiment_id = experiment.experiment_id
        else:
            experiment_id = experiment.experiment_id
        self._experiment, self._parent = experiment_id, self._parent_run(client, experiment_id)
        self._client = client

    def _parent_run(self, client: Any, experiment_id: str) -> str:
        """The run of this root in this store: the one that it has had before, if it is still there."""
        state = read_json(self.root / STATE_FILE)
        if state.get("run_id") and _is_there(client, state["run_id"]):
            client.update_run(state["run_id"], status="RUNNING")
            return str(state["run_id"])
        found = self._found(client, experiment_id, f"tags.`{schema.TAG_ROLE}` = 'study'") if state else None
        if found is None:
            write_text(self.root / STATE_FILE, json.dumps({"creating": True}))
            tags = entries.study_tags(self.study, self.root, self.commit)
            found = client.create_run(experiment_id, tags=tags, run_name=self.study.name).info.run_id
            entries.log_datasets(client, found, self.root, self.study.name)
        write_text(self.root / STATE_FILE, json.dumps({"run_id": found}))
        return str(found)

    def _found(self, client: Any, experiment_id: str, condition: str) -> str | None:
        """A run of this root that was created when its number could not be written down any more."""
        place = str(self.root).replace("'", "\\'")
        there = client.search_runs([experiment_id], f"tags.`{schema.TAG_ROOT}` = '{place}' and {condition}", max_results=1)
        return str(there[0].info.run_id) if there else None

    def _sync_run(self, run: str, about: Mapping[str, Any]) -> None:
        directory = self.root / schema.RUNS_DIRECTORY / run
        state, summary = read_json(directory / STATE_FILE), read_json(directory / schema.SUMMARY_FILE)
        if state.get("parent") not in (None, self._parent):
            state = {}  # another store, or one that was emptied: it gets everything
        if state.get("ended"):
            if summary.get("attempts") == state["ended"]:
                return
            # It was stopped, or had failed, and is on its way again.
            self._client.update_run(state["run_id"], status="RUNNING")
            self._client.set_tag(state["run_id"], schema.TAG_STATE, "running")
            state["ended"] = None
        if "run_id" not in state:
            state = {"run_id": self._child_run(run, about, directory, state), "parent": self._parent, "offset": 0, "keys": []}
            write_text(directory / STATE_FILE, json.dumps(state))
        self._send_metrics(directory, state)
        if summary:
            self._end(state["run_id"], directory, about, summary, state)
            state["ended"] = summary["attempts"]
            write_text(directory / STATE_FILE, json.dumps(state))
            self._ends += 1

    def _child_run(self, run: str, about: Mapping[str, Any], directory: Path, state: Mapping[str, Any]) -> str:
        if state.get("creating") == self._parent and (found := self._found(self._client, self._experiment, f"tags.`{schema.TAG_RUN}` = '{run}'")):
            return found
        write_text(directory / STATE_FILE, json.dumps({"creating": self._parent}))
        tags = entries.run_tags(self.study, self.root, about, self._parent)
        created = self._client.create_run(self._experiment, tags=tags, run_name=f"{about['variant']} / seed {about['seed']}")
        params = entries.params(self.study, about, read_json(directory / schema.CONFIG_FILE))
        self._client.log_batch(created.info.run_id, params=params)
        if not any(path.startswith("data.") for path in about["parameters"]):
            entries.log_datasets(self._client, created.info.run_id, self.root, self.study.name)
        return str(created.info.run_id)

    def _send_metrics(self, directory: Path, state: dict[str, Any]) -> None:
        """What is new in metrics.jsonl and system.jsonl; first, as it was, what was being sent when something went wrong."""
        while self._sending(directory, state):
            self._send(directory, state)

    def _sending(self, directory: Path, state: dict[str, Any]) -> bool:
        """Write down what is to be sent and under which time stamp, unless that was done; False if there is nothing."""
        if state.get("sending") is None:
            ends = {key: _whole_lines(directory / name, state.get(key, 0)) for key, name in SENT_FILES.items()}
            if all(ends[key] == state.get(key, 0) for key in SENT_FILES):
                return False
            state["sending"] = {**ends, "stamp": int(time.time() * 1000)}
            write_text(directory / STATE_FILE, json.dumps(state))
        return True

    def _send(self, directory: Path, state: dict[str, Any]) -> None:
        sending, known = state["sending"], set(state["keys"])
        new = {key: _records(directory / name, state.get(key, 0), sending[key]) for key, name in SENT_FILES.items()}
        metrics = entries.metrics(new["offset"], sending["stamp"], known, {o.metric for o in self.study.objectives})
        metrics += entries.system_metrics(new["system"], known)
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(state["run_id"], metrics=metrics[start : start + BATCH])
        state |= {**{key: sending[key] for key in SENT_FILES}, "keys": sorted(known), "sending": None}
        write_text(directory / STATE_FILE, json.dumps(state))

    def _end(self, run_id: str, directory: Path, about: Mapping[str, Any], summary: Mapping[str, Any], state: dict[str, Any]) -> None:
        known = set(state["keys"])
        stamp = state.setdefault("end_stamp", int(time.time() * 1000))
        final = entries.final_metrics(summary, stamp, known)
        state["keys"] = sorted(known)
        self._client.log_batch(run_id, metrics=final, tags=entries.end_tags(self.study, about, summary, known))
        for name in ARTIFACTS:
            if (directory / name).exists():
                self._client.log_artifact(run_id, str(directory / name))
        if summary["seconds"] < PICTURE_SECONDS:
            self._undrawn.add(about["run"])
        elif summary["state"] != schema.STOPPED:
            self._draw_run(run_id, directory, about["variant"], about["seed"])
        status = {schema.FINISHED: "FINISHED", schema.PRUNED: "FINISHED", schema.STOPPED: "KILLED"}.get(summary["state"], "FAILED")
        self._client.set_terminated(run_id, status)
        _forget(run_id)

    def _note(self, state: str | None = None) -> StudyStatus:
        """Write the parent's note, from what the root holds, which comes back.  A report's verdict stands at its head and stays."""
        began = time.monotonic()
        status = Reader(self.root).read(driven=True)
        verdict = self._client.get_run(self._parent).data.tags.get(schema.TAG_VERDICT)
        self._client.set_tag(self._parent, "mlflow.note.content", entries.study_note(self.study, status, state or status.state, verdict))
        # All runs are read for it: the more there are the rarer it is.
        self._ends, self._note_at = 0, time.monotonic() + max(NOTE_SECONDS, 50 * (time.monotonic() - began))
        return status

    def _draw_run(self, run_id: str, directory: Path, variant: str, seed: int) -> None:
        from sweeps import figures  # noqa: PLC0415  (matplotlib)

        with tempfile.TemporaryDirectory() as folder:
            if figures.draw_run(directory, Path(folder), f"{variant}, seed {seed}"):
                self._client.log_artifacts(run_id, folder, "figures")

    def _draw_study(self, status: StudyStatus) -> None:
        from sweeps import figures  # noqa: PLC0415  (matplotlib)

        took = sum(run.seconds for run in status.runs if run.ended) / max(int(status.about.get("workers") or 1), 1)
        until = time.monotonic() + max(PICTURE_LEAST, PICTURE_SHARE * took)
        for run in (run for variant in status.variants for run in variant.runs if run.ended and run.run in self._undrawn):
            if time.monotonic() > until:
                break
            directory = self.root / schema.RUNS_DIRECTORY / run.run
            self._draw_run(read_json(directory / STATE_FILE)["run_id"], directory, run.variant, run.seed)
        self._undrawn.clear()
        with tempfile.TemporaryDirectory() as folder:
            if figures.draw_study(status, Path(folder)):
                self._client.log_artifacts(self._parent, folder, "figures")

    def _keep_best_model(self, status: StudyStatus) -> None:
        """Log the model of the run with the best first objective, once, as a model that MLflow loads."""
        from sweeps import best_model  # noqa: PLC0415

        best = best_model.best_run(status)
        if best is None:
            return
        directory = self.root / schema.RUNS_DIRECTORY / best.run
        run_id = read_json(directory / STATE_FILE).get("run_id")
        kept = self._client.get_run(self._parent).data.tags
        if not run_id or not best_model.has_weights(directory) or kept.get(schema.TAG_BEST_RUN) == best.run:
            return
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            best_model.save(directory, Path(folder) / "model")
            made = self._client.create_logged_model(
                self._experiment, name=best_model.NAME, source_run_id=run_id, tags=best_model.tags(best), model_type="deepseek-v2"
            )
            self._client.log_model_artifacts(made.model_id, str(Path(folder) / "model"))
        self._client.finalize_logged_model(made.model_id, "READY")
        best_model.link(self._client, run_id, made.model_id, best)
        for name, value in ((schema.TAG_BEST_MODEL, f"models:/{made.model_id}"), (schema.TAG_BEST_RUN, best.run)):
            self._client.set_tag(self._parent, name, value)
        self._client.set_tag(run_id, schema.TAG_BEST_MODEL, f"models:/{made.model_id}")


def _forget(run_id: str) -> None:
    """MLflow's client keeps what writes a run's files, with a pool of threads, for the last 1,024 runs; of one that has ended nobody
    needs it.  It has no public way to say so; where the name is gone it stays."""
    with suppress(ImportError, AttributeError):
        from mlflow.tracking._tracking_service import utils  # noqa: PLC0415

        utils._artifact_repos_cache.pop(run_id, None)


def _is_there(client: Any, run_id: str) -> bool:
    """False for a run that this store does not know, or that somebody has deleted; other errors go through."""
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def _whole_lines(path: Path, offset: int) -> int:
    """Where the last whole line of a file that grows ends; `offset` if there is none beyond it."""
    if not path.exists() or path.stat().st_size <= offset:
        return offset
    with path.open("rb") as file:
        file.seek(offset)
        return offset + file.read().rfind(b"\n") + 1


def _records(path: Path, start: int, end: int) -> list[dict[str, Any]]:
    if end <= start:
        return []
    with path.open("rb") as file:
        file.seek(start)
        return [json.loads(line) for line in file.read(end - start).splitlines()]
