"""The driver in this process, with a trial function that counts: what is asked, told, kept and refused."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from conftest import STANDIN, computed
from mlflow import MlflowClient
from standin import bits_per_byte
from typer.testing import CliRunner

from research.errors import DataError, UserError
from sweeps import schema, search
from sweeps.__main__ import app
from sweeps.driver import Driver
from sweeps.executors import Event, InlineExecutor
from sweeps.failures import Failure
from sweeps.outbox import Outbox
from sweeps.study import load_study
from sweeps.trial import Job

StudyWriter = Callable[..., Path]
LIMIT, CHOSEN = "model.moe.device_limit", "model.moe.num_experts_per_tok"


def drive(path: Path, root: Path, lines: list[str] | None = None, executor: Callable[..., Any] | None = None, function: str = STANDIN) -> str:
    announce = (lines if lines is not None else []).append
    return Driver(load_study(path), root, executor or (lambda study, runs: InlineExecutor()), announce, function).run()


def optuna_trials(root: Path) -> list[optuna.trial.FrozenTrial]:
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(root / schema.JOURNAL_FILE)))
    return optuna.load_study(study_name="small", storage=storage).get_trials()


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def test_the_root_holds_what_the_schema_says(study: StudyWriter, local: Path) -> None:
    root = local / "studies" / "small"
    assert drive(study(), root) == "finished"
    runs = sorted(path.name for path in (root / "runs").iterdir())
    assert len(runs) == 6
    for run in runs:
        about, summary = read(root / "runs" / run / schema.RUN_FILE), read(root / "runs" / run / schema.SUMMARY_FILE)
        config = read(root / "runs" / run / schema.CONFIG_FILE)
        assert set(schema.RUN_KEYS) <= set(about)
        assert set(schema.SUMMARY_KEYS) <= set(summary)
        assert summary["metrics"][schema.BITS_PER_BYTE] == bits_per_byte(config)
        assert config["model"]["moe"]["device_limit"] == about["parameters"][LIMIT]
        assert config["seed"] == about["seed"]
        simulated = read(root / "runs" / run / schema.SIMULATION_FILE)
        assert summary["metrics"][schema.ALL_TO_ALL_SECONDS] == simulated["result"]["seconds"]
        per_device = 32 // 8
        fits = [str(m) for m in range(1, 9) if m * per_device >= about["parameters"][CHOSEN]]
        assert sorted(simulated["by_device_limit"]) == [*fits, "unrestricted"]
        assert simulated["by_device_limit"][str(about["parameters"][LIMIT])]["seconds"] == simulated["result"]["seconds"]
    assert set(schema.DATA_KEYS) <= set(read(root / schema.DATA_FILE))
    state = read(root / schema.STATE_FILE)
    assert (state["state"], state["planned"], sorted(state["runs"])) == ("finished", 6, runs)
    assert [read(root / "runs" / run / schema.RUN_FILE)["baseline"] for run in runs] == [True, True, False, False, False, False]


def test_optuna_is_told_the_mean_over_seeds(study: StudyWriter, local: Path) -> None:
    root = local / "small"
    objectives = [{"metric": schema.BITS_PER_BYTE}, {"metric": schema.ALL_TO_ALL_SECONDS, "direction": "minimize"}]
    drive(study(objectives=objectives), root)
    trials = optuna_trials(root)
    assert [t.state.name for t in trials] == ["COMPLETE"] * 3
    for trial in trials:
        metrics = [read(root / "runs" / f"{trial.number:03d}-{seed}" / schema.SUMMARY_FILE)["metrics"] for seed in (0, 1)]
        bits = [m[schema.BITS_PER_BYTE] for m in metrics]
        assert trial.values[0] == pytest.approx(sum(bits) / 2)
        assert trial.values[1] == pytest.approx(sum(m[schema.ALL_TO_ALL_SECONDS] for m in metrics) / 2)
        assert trial.user_attrs[f"standard_error:{schema.BITS_PER_BYTE}"] == pytest.approx(abs(bits[0] - bits[1]) / 2)


def test_a_second_run_computes_nothing(study: StudyWriter, local: Path) -> None:
    root = local / "small"
    drive(study(), root)
    # MLflow's pictures of short runs are drawn as far as there is time, the others the next time.
    files = [path for path in sorted(root.glob("runs/*/*.*")) if path.name != "mlflow.json"]
    before = {path: path.read_bytes() for path in files}

    def none(*_: Any) -> Any:
        raise AssertionError("no worker is needed")

    assert drive(study(), root, executor=none) == "finished"
    assert {path: path.read_bytes() for path in sorted(root.glob("runs/*/*.*")) if path.name != "mlflow.json"} == before


def test_a_changed_study_is_refused_with_the_difference(study: StudyWriter, local: Path) -> None:
    path = study()
    base = ["--root", str(local / "small"), "--executor", "inline", "--function", STANDIN]
    assert CliRunner().invoke(app, ["run", str(path), *base]).exit_code == 0
    result = CliRunner().invoke(app, ["run", str(path), "--set", "base.training.train_tokens=4096", *base])
    assert result.exit_code == 1
    assert "train_tokens: 2048 -> 4096" in str(result.exception)
    assert CliRunner().invoke(app, ["run", str(path), "--set", "resources.workers=1", *base]).exit_code == 0
    # What is expected changes no run, and the report reads it where the study lies.
    assert CliRunner().invoke(app, ["run", str(path), "--set", "expects={effect: 0.01, source: a paper}", *base]).exit_code == 0
    assert yaml.safe_load((local / "small" / schema.STUDY_FILE).read_text())["expects"] == {"effect": 0.01, "source": "a paper"}


def test_a_bug_in_one_run_does_not_stop_the_others(study: StudyWriter, local: Path) -> None:
    root = local / "studies" / "small"
    root.mkdir(parents=True)
    (root / "bug").write_text("001-1")
    result = CliRunner().invoke(app, ["run", str(study()), "--executor", "inline", "--function", STANDIN])
    assert result.exit_code == 3
    summary = read(root / "runs" / "001-1" / schema.SUMMARY_FILE)
    assert summary["state"] == schema.FAILED
    assert "Traceback" in summary["reason"]
    assert "a bug in step 3" in summary["reason"]
    assert summary["metrics"] == {}, "no number is made up for it"
    assert read(root / schema.STATE_FILE)["state"] == "finished-with-failures"
    trials = optuna_trials(root)
    assert [t.state.name for t in trials] == ["COMPLETE"] * 3
    assert len(trials[1].user_attrs[f"seeds:{schema.BITS_PER_BYTE}"]) == 1


def test_a_bug_that_hits_the_first_runs_stops_the_study_and_can_be_mended(study: StudyWriter, local: Path) -> None:
    root, lines = local / "small", list[str]()
    root.mkdir(parents=True)
    (root / "bug").write_text("")
    assert drive(study(), root, lines) == "finished-with-failures"
    assert any("failed alike" in line and "a bug in step 3" in line for line in lines)
    assert any("Traceback" in line and "standin.py" in line for line in lines), "whole, for whoever mends it"
    assert sum((path / schema.SUMMARY_FILE).exists() for path in (root / "runs").iterdir()) == 3
    (root / "bug").unlink()
    assert drive(study(), root) == "finished"
    assert len(list(root.glob("runs/*/summary.json"))) == 6
    assert [t.state.name for t in optuna_trials(root)] == ["COMPLETE"] * 3


def test_a_diverged_trial_is_told_as_pruned(study: StudyWriter, local: Path) -> None:
    root = local / "small"
    root.mkdir(parents=True)
    (root / "diverge").write_text("002-0 002-1")
    drive(study(), root)
    assert [t.state.name for t in optuna_trials(root)] == ["COMPLETE", "COMPLETE", "PRUNED"]
    assert read(root / "runs" / "002-0" / schema.SUMMARY_FILE)["state"] == schema.DIVERGED


class DyingExecutor(InlineExecutor):
    """Loses the worker of every attempt at run 001-0, as told."""

    def __init__(self, kind: str = schema.DIED) -> None:
        super().__init__()
        self.kind, self.lost = kind, list[str]()

    def start(self, job: Job) -> None:
        if job.run == "001-0":
            self.lost.append(job.run)
        else:
            super().start(job)

    def poll(self, wait: float = 0.0) -> list[Event]:
        if self.lost:
            return [Event(run=self.lost.pop(), kind="failed", failure=Failure(kind=self.kind, text="killed"))]
        return super().poll(wait)


def test_a_run_that_loses_three_workers_is_given_up(study: StudyWriter, local: Path) -> None:
    root = local / "small"
    assert drive(study(seeds=[0]), root, executor=lambda study, runs: DyingExecutor()) == "finished-with-failures"
    summary = read(root / "runs" / "001-0" / schema.SUMMARY_FILE)
    assert (summary["state"], summary["attempts"], summary["failure"]) == (schema.FAILED, 3, schema.DIED)
    assert summary["reason"] == "killed\ngiven up after 3 such attempts"
    assert [t.state.name for t in optuna_trials(root)] == ["COMPLETE", "FAIL", "COMPLETE"]


def test_tpe_draws_again_for_impossible_cells(study: StudyWriter, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("standin.STEPS", 2)
    root = local / "small"
    path = study(search={"sampler": "tpe", "trials": 12}, seeds=[0], space={LIMIT: [1, 2, 3], CHOSEN: {"low": 1, "high": 8}})
    assert drive(path, root) == "finished"
    trials = optuna_trials(root)
    impossible = [t for t in trials if search.IMPOSSIBLE in t.user_attrs]
    possible = [t for t in trials if not {search.IMPOSSIBLE, search.REPEATS} & t.user_attrs.keys()]
    assert len(possible) == 12
    assert {t.state.name for t in possible} == {"COMPLETE"}
    assert impossible, "with M = 1 and K > 4 there are many"
    assert {t.state.name for t in impossible} == {"PRUNED"}
    assert all(t.params[CHOSEN] > 4 * t.params[LIMIT] for t in impossible)
    assert len(list(root.glob("runs/*/summary.json"))) == len({json.dumps(t.params) for t in possible}) == 12, "no configuration twice"
    repeated = [t for t in trials if search.REPEATS in t.user_attrs]
    assert all(t.params == trials[t.user_attrs[search.REPEATS]].params for t in repeated)


def test_mlflow_has_what_the_root_has(study: StudyWriter, local: Path) -> None:
    root = local / "studies" / "small"
    drive(study(seeds=[0]), root)
    drive(study(seeds=[0]), root)
    client = MlflowClient(f"sqlite:///{local / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [r for r in runs if r.data.tags[schema.TAG_ROLE] == "study"]
    children = {r.data.tags[schema.TAG_TRIAL]: r for r in runs if r.data.tags[schema.TAG_ROLE] == "run"}
    assert len(parents) == 1
    assert "Does the laboratory lose anything?" in parents[0].data.tags["mlflow.note.content"]
    assert len(runs) == 4, "a second run makes no second entry"
    child = children["1"]
    assert child.info.status == "FINISHED"
    assert child.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
    assert child.data.tags[schema.TAG_VARIANT] == "device_limit=2"
    assert child.data.params["device_limit"] == "2"
    assert child.data.metrics[schema.BITS_PER_BYTE] == pytest.approx(
        read(root / "runs" / "001-0" / schema.SUMMARY_FILE)["metrics"][schema.BITS_PER_BYTE]
    )
    history = client.get_metric_history(child.info.run_id, schema.LOSS)
    assert sorted(m.step for m in history) == list(range(1, 21)), "every record once"
    assert child.data.metrics[schema.ALL_TO_ALL_SECONDS] > 0
    assert {a.path for a in client.list_artifacts(child.info.run_id)} >= {"config.json", "summary.json", "routing.npz", "simulation.json"}
    assert "study.yaml" in {a.path for a in client.list_artifacts(parents[0].info.run_id)}


def child_runs(local: Path) -> dict[str, Any]:
    client = MlflowClient(f"sqlite:///{local / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments(filter_string="name = 'small'")])
    return {r.data.tags[schema.TAG_TRIAL]: r for r in runs if r.data.tags[schema.TAG_ROLE] == "run"}


def test_mlflow_follows_a_run_that_was_stopped_and_one_that_had_failed(study: StudyWriter, local: Path) -> None:
    root = local / "studies" / "small"
    root.mkdir(parents=True)
    (root / "bug").write_text("000-0 001-0 002-0")
    assert drive(study(seeds=[0]), root) == "finished-with-failures"
    assert {r.info.status for r in child_runs(local).values()} == {"FAILED"}
    (root / "bug").unlink()
    (root / "slow").write_text("0.02")
    driver: Driver

    def stopping(*_: Any) -> InlineExecutor:
        executor = InlineExecutor()
        begin = executor.start

        def start(job: Job) -> None:
            begin(job)
            if job.run == "001-0":
                driver.stopping = True

        executor.start = start  # type: ignore[method-assign]
        return executor

    driver = Driver(load_study(study(seeds=[0])), root, stopping, lambda line: None, STANDIN)
    assert driver.run() == "stopped"
    runs = child_runs(local)
    assert (runs["0"].info.status, runs["1"].info.status) == ("FINISHED", "KILLED")
    assert runs["1"].data.tags[schema.TAG_STATE] == "stopped"
    assert drive(study(seeds=[0]), root) == "finished"
    runs = child_runs(local)
    assert {r.info.status for r in runs.values()} == {"FINISHED"}
    assert {r.data.tags[schema.TAG_STATE] for r in runs.values()} == {"finished"}
    client = MlflowClient(f"sqlite:///{local / 'mlflow.db'}")
    for run in runs.values():
        assert sorted(m.step for m in client.get_metric_history(run.info.run_id, schema.LOSS)) == list(range(1, 21)), "every record once"


def test_a_study_that_never_ran_binds_nobody(study: StudyWriter, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = local / "studies" / "small"

    def broken(*_: Any) -> Any:
        raise DataError("no text")

    with monkeypatch.context() as patch:
        patch.setattr("sweeps.driver.prepare", broken)
        with pytest.raises(DataError):
            drive(study(), root)
    assert not (root / schema.STUDY_FILE).exists()
    assert drive(study(seeds=[3]), root) == "finished"


def test_an_outage_of_mlflow_stops_nothing_and_loses_nothing(study: StudyWriter, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, lines = local / "small", list[str]()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{local / 'file' / 'mlflow.db'}")
    local.mkdir(parents=True, exist_ok=True)
    (local / "file").write_text("not a directory, so that no store can be opened there")
    assert drive(study(seeds=[0]), root, lines) == "finished"
    assert any("MLflow cannot be reached" in line for line in lines)
    (local / "file").unlink()
    assert drive(study(seeds=[0]), root) == "finished"
    client = MlflowClient(f"sqlite:///{local / 'file' / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments(filter_string="name = 'small'")])
    assert len(runs) == 4
    child = next(r for r in runs if r.data.tags[schema.TAG_ROLE] == "run")
    assert len(client.get_metric_history(child.info.run_id, schema.LOSS)) == 20


def test_plan_counts_and_starts_nothing(study: StudyWriter, local: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(study()), "--json"])
    planned = json.loads(result.stdout)
    assert (planned["variants"], planned["seeds"], planned["runs"]) == (3, 2, 6)
    assert planned["rows"][2]["activated_parameters"] < planned["rows"][0]["activated_parameters"]
    assert planned["expected_seconds"] > 0
    assert not list(local.glob("**/runs"))


def test_status_knows_a_driver_that_is_gone(study: StudyWriter, local: Path) -> None:
    root = local / "studies" / "small"
    drive(study(seeds=[0]), root)
    state = read(root / schema.STATE_FILE)
    (root / schema.STATE_FILE).write_text(json.dumps({**state, "state": "running"}))
    result = CliRunner().invoke(app, ["status", "small", "--json"])
    assert json.loads(result.stdout)["state"] == "interrupted"
    assert computed(root, "000-0")[-1][1] == 20


def test_the_store_is_reached_while_workers_start_and_closed_while_they_end(study: StudyWriter, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the other, so that one after the other would never end."""
    reached, finishing, closing = threading.Event(), threading.Event(), threading.Event()

    class Slow(InlineExecutor):
        def __init__(self) -> None:
            assert reached.wait(20), "nothing reached for the store while the workers start"
            super().__init__()

        def close(self) -> None:
            closing.set()
            assert finishing.wait(20), "nothing sends the rest while the workers end"

    def finish(self: Outbox, state: str) -> None:
        finishing.set()
        assert closing.wait(20)

    monkeypatch.setattr("sweeps.tracking.Tracker.connect", lambda self: reached.set())
    monkeypatch.setattr("sweeps.tracking.Tracker.sync", lambda self, runs, **_: None)
    monkeypatch.setattr(Outbox, "finish", finish)
    assert drive(study(seeds=[0]), local / "small", executor=lambda study, runs: Slow()) == "finished"


def test_a_root_that_cannot_be_is_refused_in_a_sentence(study: StudyWriter, local: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for root in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(UserError, match=r"file.*: cannot be a study's directory \(.*--root"):
            drive(study(), root)
    assert (tmp_path / "file").read_text() == "mine"
