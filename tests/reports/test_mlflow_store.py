"""A study read out of MLflow after its root is gone says what its root said."""

import json
import shutil
from dataclasses import replace

import planted
import pytest

from reports import document, verdict
from reports.analysis import analyse, to_dict
from reports.page import page
from reports.store import load
from research.errors import DataError
from sweeps import schema

ARTIFACTS = (schema.CONFIG_FILE, schema.SUMMARY_FILE, schema.ROUTING_FILE, schema.SIMULATION_FILE)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A root, and the sqlite store that holds the same study under the names of `sweeps.schema`."""
    place = tmp_path_factory.mktemp("tracked")
    states = {("device_limit=2", 1): schema.FAILED}
    root = planted.write_store(place / "s", {"kv_lora_rank=16": 0.2}, seeds=(0, 1), states=states, state="finished-with-failures")
    uri = f"sqlite:///{place / 'mlflow.db'}"
    _log(root, uri, str(place / "artifacts"))
    return root, uri


def _log(root, uri, artifacts):
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(uri)
    experiment = client.create_experiment("planted", artifact_location=artifacts)
    tags = {schema.TAG_ROLE: "study", schema.TAG_SCHEMA: "1", schema.TAG_STATE: "finished-with-failures", schema.TAG_COMMIT: "abc"}
    client.create_run(experiment, tags=tags, start_time=1)  # begun earlier and without children: it does not count
    parent = client.create_run(experiment, tags=tags, start_time=2).info.run_id
    for name in (schema.STUDY_FILE, schema.DATA_FILE):
        client.log_artifact(parent, str(root / name))
    for folder in sorted((root / schema.RUNS_DIRECTORY).iterdir()):
        about = json.loads((folder / schema.RUN_FILE).read_text())
        tags = {"mlflow.parentRunId": parent, schema.TAG_ROLE: "run", schema.TAG_SCHEMA: "1", schema.TAG_STUDY: "planted",
                schema.TAG_VARIANT: about["variant"], schema.TAG_SEED: str(about["seed"]), schema.TAG_TRIAL: str(about["trial"]),
                schema.TAG_BASELINE: str(about["baseline"]).lower(), schema.TAG_COMMIT: about["commit"], schema.TAG_CONFIG: about["config_id"]}  # fmt: skip
        run = client.create_run(experiment, tags=tags).info.run_id
        records = [json.loads(line) for line in (folder / schema.METRICS_FILE).read_text().splitlines()]
        metrics = [Metric(k, float(v), 0, r["step"]) for r in records for k, v in r.items() if k not in ("step", "tokens")]
        client.log_batch(run, metrics=metrics)
        for name in ARTIFACTS:
            if (folder / name).exists():
                client.log_artifact(run, str(folder / name))


def test_the_same_analysis_and_page(tracked):
    from reports.mlflow_store import load as load_tracked

    root, uri = tracked
    ours, theirs = load(root), load_tracked("planted", uri)
    assert [replace(r, records=(), trace=None) for r in ours.runs] == [replace(r, records=(), trace=None) for r in theirs.runs]
    for one, other in zip(ours.runs, theirs.runs, strict=True):
        assert [{k: v for k, v in r.items() if k != "tokens"} for r in one.records] == [
            {k: v for k, v in r.items() if k != "tokens"} for r in other.records
        ]
        assert (one.trace is None) == (other.trace is None)
        assert one.trace is None or (one.trace.expert_ids == other.trace.expert_ids).all()
    # The tracker keeps no tokens: they come from the run's schedule, which sees 8 sequences a step.
    length = theirs.runs[0].config["data"]["sequence_length"]
    assert [r["tokens"] for r in theirs.runs[0].records][:2] == [8 * length, 16 * length]
    first, second = analyse(ours), analyse(theirs)
    assert to_dict(first) == to_dict(second)
    assert verdict.sentences(first) == verdict.sentences(second)
    assert "kv" in document.markdown(page(second, {}, dict.fromkeys(_figures(), ""))).lower()
    shutil.rmtree(root)
    assert to_dict(analyse(load_tracked("planted", uri))) == to_dict(first)


def _figures():
    return ("effects", "loss-curves", "pareto", "simulated", "distinct-devices", "device-load", "expert-load", "importances")


def test_what_is_not_there_is_named(tracked, tmp_path):
    from reports.mlflow_store import load as load_tracked

    with pytest.raises(DataError, match=r"has no study 'other' \(it has planted\)"):
        load_tracked("other", tracked[1])
    with pytest.raises(DataError, match="there is no such database"):
        load_tracked("planted", f"sqlite:///{tmp_path / 'none.db'}")
    assert not (tmp_path / "none.db").exists()
