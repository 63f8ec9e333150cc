"""What stands in MLflow: on a real server with a database, of a study that was really trained, and after every kind of interruption."""

import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import STANDIN, await_, end
from mlflow import MlflowClient, artifacts, pyfunc, set_tracking_uri
from mlflow.entities import Run
from roots import METRIC, write_root

from research.routing_trace import RoutingTrace
from research.training.checkpoint import load_model
from sweeps import figures, mlflow_entries, schema, tracking
from sweeps.driver import Driver
from sweeps.executors import InlineExecutor
from sweeps.status import Reader
from sweeps.study import load_study
from sweeps.system_metrics import Meter, sampled
from sweeps.tracking import Tracker
from sweeps.trial import failed_summary, write_summary
from sweeps.ui import QUIET

StudyWriter = Callable[..., Path]


def drive(path: Path, root: Path, function: str = STANDIN, lines: list[str] | None = None) -> str:
    return Driver(load_study(path), root, lambda study, runs: InlineExecutor(), (lines if lines is not None else []).append, function).run()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`mlflow server` with a database, which keeps the artifacts too, over HTTP."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = {**{k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}, **QUIET}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=2) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    try:
        await_(answers, 120, "mlflow server")
        yield uri
    finally:
        end(process)


def runs_of(client: MlflowClient, study: str) -> tuple[Run, dict[str, Run]]:
    """The parent, and the children by the run's name."""
    experiment = client.get_experiment_by_name(study)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    parents = [run for run in found if run.data.tags[schema.TAG_ROLE] == "study"]
    children = [run for run in found if run.data.tags[schema.TAG_ROLE] == "run"]
    assert len(parents) == 1
    assert len({run.data.tags[schema.TAG_RUN] for run in children}) == len(children), "none twice"
    return parents[0], {run.data.tags[schema.TAG_RUN]: run for run in children}


@pytest.mark.slow
def test_a_trained_study_can_be_understood_and_its_model_used_from_a_real_server_alone(
    server: str, study: StudyWriter, local: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setattr("sweeps.system_metrics.FIRST_SECONDS", 0.01)
    monkeypatch.setattr("sweeps.system_metrics.INTERVAL_SECONDS", 0.05)
    monkeypatch.setattr("sweeps.tracking.PICTURE_LEAST", 60.0)
    root, lines = local / "studies" / "small", list[str]()
    path = study(seeds=[0, 1], space={"model.moe.num_experts_per_tok": [2, 6]}, baseline={"model.moe.num_experts_per_tok": 6})
    assert drive(path, root, "sweeps.trial:run_trial", lines) == "finished"
    assert not any("MLflow" in line for line in lines), lines
    client = MlflowClient(server)
    parent, children = runs_of(client, "small")
    assert sorted(children) == ["000-0", "000-1", "001-0", "001-1"]
    summaries = {run: json.loads((root / "runs" / run / "summary.json").read_text()) for run in children}

    # The question and what the numbers say, in the note; a mean with its standard error, a paired difference.
    note, means = parent.data.tags["mlflow.note.content"], {t: [summaries[f"00{t}-{s}"]["metrics"][METRIC] for s in (0, 1)] for t in (0, 1)}
    assert note.startswith("# Does the laboratory lose anything?")
    assert f"| 0 | baseline | {np.mean(means[0]):.4f} ± {abs(means[0][0] - means[0][1]) / 2:.4f} |" in note
    differences = np.subtract(means[1], means[0])
    assert f"| {differences.mean():+.4g} ± {abs(differences[0] - differences[1]) / 2:.2g} (2) | 2 |" in note
    assert parent.data.metrics["study/finished"] == 4
    assert parent.info.status == "FINISHED"

    run = children["001-0"]
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    expected = {"variant": "num_experts_per_tok=2", "seed": "0", "trial": "1", "baseline": "false", "state": "finished", "attempt": "1"}
    assert {name: run.data.tags[f"moelab.{name}"] for name in expected} == expected
    assert run.data.tags[schema.TAG_CHANGED] == "num_experts_per_tok"
    assert run.data.tags["moelab.parameter.num_experts_per_tok"] == "2"
    assert (run.data.params["num_experts_per_tok"], run.data.params["preset"]) == ("2", "deepseek-v2-nano")
    assert len(run.data.params) < 25, "the whole configuration is an artifact"
    assert len(run.data.metrics) <= mlflow_entries.MAX_KEYS
    assert run.data.metrics[METRIC] == summaries["001-0"]["metrics"][METRIC]
    for metric in ("system/cpu_utilization_percentage", "system/process_memory_megabytes"):
        assert run.data.metrics[metric] > 0 or metric.endswith("percentage")
    data = json.loads((root / "data.json").read_text())
    inputs = {i.tags[0].value: i.dataset for i in run.inputs.dataset_inputs}
    assert {context: (d.name, d.digest) for context, d in inputs.items()} == {
        "training": ("files", data["data_id"]),
        "validation": ("files-held-out", data["data_id"]),
    }
    assert json.loads(inputs["training"].profile)["domains"]["text"]["tokens"] == data["domains"]["text"]["train_tokens"]
    assert json.loads(inputs["validation"].profile)["domains"]["text"]["tokens"] == data["domains"]["text"]["heldout_tokens"]
    there = {a.path for a in client.list_artifacts(run.info.run_id)}
    assert there >= {"config.json", "summary.json", "metrics.jsonl", "routing.npz", "simulation.json", "figures"}
    pictures = {a.path for a in client.list_artifacts(run.info.run_id, "figures")}
    assert pictures == {"figures/loss.png", "figures/routing.png", "figures/routing_histograms.npz"}
    assert [a.path for a in client.list_artifacts(parent.info.run_id, "figures")] == ["figures/comparison.png"]

    # The best run's model, back from the server: the same logits, and `research generate` speaks with it.
    best = min(summaries, key=lambda name: (summaries[name]["metrics"][METRIC], name))
    assert parent.data.tags[schema.TAG_BEST_RUN] == best
    uri = parent.data.tags[schema.TAG_BEST_MODEL]
    assert children[best].data.tags[schema.TAG_BEST_MODEL] == uri
    set_tracking_uri(server)
    folder = Path(artifacts.download_artifacts(uri, dst_path=str(tmp_path / "model"))) / "data" / "run"
    ids = torch.arange(4, 36)[None]
    (kept, _), (trained, _) = load_model(folder), load_model(root / "runs" / best)
    with torch.no_grad():
        assert torch.equal(kept(ids)[0], trained(ids)[0])
    # Nothing but the downloaded folder: no corpus, no cache.
    environment = {**os.environ, "MOELAB_CACHE": str(tmp_path / "empty")}
    command = [sys.executable, "-m", "research", "generate", str(folder), "--prompt", "def main(", "--tokens", "8", "--temperature", "0", "--json"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=120)
    text = json.loads(said.stdout)["continuations"][0]["text"]
    loaded = pyfunc.load_model(uri)
    assert loaded.predict(["def main("], params={"tokens": 8, "temperature": 0.0}) == ["def main(" + text]

    # A report's verdict stays when the note is written anew, and nothing doubles.
    client.set_tag(parent.info.run_id, schema.TAG_VERDICT, "Two experts cost nothing that two seeds can show.")
    assert drive(path, root, "sweeps.trial:run_trial") == "finished"
    again, children_again = runs_of(client, "small")
    assert "**Verdict.** Two experts cost nothing" in again.data.tags["mlflow.note.content"]
    assert again.data.tags[schema.TAG_BEST_MODEL] == uri
    assert {name: r.info.run_id for name, r in children_again.items()} == {name: r.info.run_id for name, r in children.items()}
    steps = [m.step for m in client.get_metric_history(run.info.run_id, schema.LOSS)]
    assert steps == sorted(set(steps))


def records(root: Path, run: str, first: int, last: int) -> None:
    folder = root / "runs" / run
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": s, "tokens": 100 * s, schema.LOSS: 1.0 / s}) + "\n" for s in range(first, last + 1))


@pytest.fixture
def unfinished(study: StudyWriter, local: Path) -> tuple[Tracker, Path, dict[str, Any]]:
    """A tracker on a root with one run of which ten records stand."""
    root = write_root(local / "studies" / "small", {"000-0": {"state": "running", "tokens": 0}}, state="running")
    config = json.loads(json.dumps(load_study(study()).run_config(load_study(study()).baseline, 0), default=vars_of))
    (root / "runs" / "000-0" / "config.json").write_text(json.dumps(config))
    records(root, "000-0", 1, 10)
    return Tracker(load_study(study()), root, "abc"), root, {"000-0": json.loads((root / "runs" / "000-0" / "run.json").read_text())}


def vars_of(value: Any) -> Any:
    from dataclasses import asdict

    return asdict(value)


def history(local: Path) -> list[int]:
    client = MlflowClient(f"sqlite:///{local / 'mlflow.db'}")
    _, children = runs_of(client, "small")
    return sorted(m.step for m in client.get_metric_history(children["000-0"].info.run_id, schema.LOSS))


def test_a_batch_whose_answer_was_lost_is_sent_again_and_stands_there_once(
    unfinished: tuple[Tracker, Path, dict[str, Any]], local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, root, runs = unfinished
    tracker._open()
    send, lost = tracker._client.log_batch, [True]

    def losing(run_id: str, **more: Any) -> None:
        send(run_id, **more)
        if more.get("metrics") and lost:
            lost.clear()
            raise ConnectionError("the answer was lost")

    monkeypatch.setattr(tracker._client, "log_batch", losing)
    tracker.sync(runs)
    assert tracker.behind is not None
    assert "the answer was lost" in tracker.behind
    records(root, "000-0", 11, 15)
    Tracker(tracker.study, root, "abc").sync(runs)  # another driver, later
    assert history(local) == list(range(1, 16)), "every record once"


def test_a_driver_that_died_between_creating_a_run_and_noting_it_creates_no_second(
    unfinished: tuple[Tracker, Path, dict[str, Any]], local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, root, runs = unfinished
    tracker._open()
    create = tracker._client.create_run

    def dying(*arguments: Any, **more: Any) -> None:
        create(*arguments, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tracker._client, "create_run", dying)
        with pytest.raises(KeyboardInterrupt):
            tracker.sync(runs)
    (root / tracking.STATE_FILE).write_text(json.dumps({"creating": True}))
    Tracker(tracker.study, root, "abc").sync(runs)
    assert history(local) == list(range(1, 11))


def test_what_wrote_the_files_of_a_run_that_has_ended_is_let_go(unfinished: tuple[Tracker, Path, dict[str, Any]]) -> None:
    """Else MLflow's client keeps it, with a pool of threads, for the last 1,024 runs."""
    from mlflow.tracking._tracking_service.utils import _artifact_repos_cache as kept

    tracker, root, runs = unfinished
    kept.clear()
    tracker.sync(runs)
    write_summary(root / "runs" / "000-0", failed_summary("a bug", 1, "bug"))
    tracker.sync(runs, final=True)
    assert tracker.behind is None
    child = json.loads((root / "runs" / "000-0" / tracking.STATE_FILE).read_text())["run_id"]
    assert child not in kept
    assert schema.SUMMARY_FILE in [file.path for file in tracker._client.list_artifacts(child)]
    tracker._client.log_artifact(child, str(root / "runs" / "000-0" / schema.SUMMARY_FILE))
    assert child in kept, "where it would be"


def test_another_store_or_one_that_was_emptied_gets_everything(
    unfinished: tuple[Tracker, Path, dict[str, Any]], local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, root, runs = unfinished
    tracker.sync(runs)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{local / 'other' / 'mlflow.db'}")
    other = Tracker(tracker.study, root, "abc")
    other.sync(runs)
    assert other.behind is None
    assert history(local / "other") == history(local) == list(range(1, 11))
    other._client.delete_run(other._parent)
    third = Tracker(tracker.study, root, "abc")
    third.sync(runs)
    assert third.behind is None
    assert third._parent != other._parent


def test_no_run_has_more_keys_than_its_page_can_show() -> None:
    known: set[str] = set()
    record = {"step": 1, "tokens": 100, **{f"routing/layer_{i}/load": 1.0 for i in range(400)}, METRIC: 2.0, "train/loss": 3.0}
    sent = mlflow_entries.metrics([record], 0, known, {METRIC})
    assert len(sent) == len(known) == mlflow_entries.RECORD_KEYS
    assert {METRIC, "train/loss"} <= known, "objectives first, then what is told of in the fewest words"
    sampled_ = [{"time": 1.0, "sample": 0, "system/cpu": 1.0}]
    assert mlflow_entries.system_metrics(sampled_, known)[0].timestamp == 1000
    summary = {"metrics": {f"model/x{i}": 1.0 for i in range(400)}, "seconds": 1.0, "steps": 3}
    mlflow_entries.final_metrics(summary, 0, known)
    assert len(known) == mlflow_entries.MAX_KEYS
    assert "run/seconds" in known


def test_a_note_names_what_failed_and_pairs_only_common_seeds(study: StudyWriter, tmp_path: Path) -> None:
    runs = {"000-0": {"state": "finished", "value": 2.0}, "000-1": {"state": "finished", "value": 3.0}, "000-2": {"state": "finished", "value": 9.0}}
    runs |= {
        "002-0": {"state": "finished", "value": 1.5},
        "002-1": {"state": "finished", "value": 2.7},
        "002-2": {"state": "diverged", "reason": "a\nnan"},
    }
    status = Reader(write_root(tmp_path / "s", runs)).read()
    note = mlflow_entries.study_note(load_study(study()), status, "finished", None)
    assert "| 2 | device_limit=2 | 2.1000 ± 0.6000 | -0.4 ± 0.1 (2) | 2 |" in note
    assert "* 002-2 (device_limit=2, seed 2): **diverged**, attempt 1: nan" in note
    assert "Verdict" not in note
    assert "**Verdict.** Yes." in mlflow_entries.study_note(load_study(study()), status, "finished", "Yes.")


def test_histograms_count_as_a_loop_does() -> None:
    generator = np.random.default_rng(0)
    ids = np.stack([generator.choice(12, 3, replace=False) for _ in range(2 * 3 * 50)]).reshape(2, 3, 50, 3).astype(np.int16)
    scores = np.zeros((3, 50, 12), np.float16)
    trace = RoutingTrace(
        expert_ids=ids, steps=np.array([1, 2]), layers=np.arange(3), scores=scores, n_routed_experts=12, expert_devices=4, device_limit=None
    )
    found = figures.histograms(trace)
    expert, device, distinct = np.zeros((2, 3, 12), int), np.zeros((2, 3, 4), int), np.zeros((2, 3, 5), int)
    for s in range(2):
        for layer in range(3):
            for token in range(50):
                chosen = ids[s, layer, token]
                for e in chosen:
                    expert[s, layer, e] += 1
                    device[s, layer, e // 3] += 1
                distinct[s, layer, len({e // 3 for e in chosen})] += 1
    assert np.array_equal(found["expert_load"], expert)
    assert np.array_equal(found["device_load"], device)
    assert np.array_equal(found["devices_per_token"], distinct)


def test_pictures_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    root = write_root(tmp_path / "s", {"000-0": {"state": "finished", "value": 2.0}, "001-0": {"state": "finished", "value": 2.5}})
    pictures = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        written = figures.draw_run(root / "runs" / "000-0", tmp_path / name, "x") + figures.draw_study(Reader(root).read(), tmp_path / name)
        pictures.append([(path.name, path.read_bytes()) for path in written])
    assert [name for name, _ in pictures[0]] == ["loss.png", "comparison.png"]
    assert pictures[0] == pictures[1]
    assert figures.draw_study(Reader(write_root(tmp_path / "none", {"000-0": {"state": "waiting"}})).read(), tmp_path) == []


def test_samples_of_the_machine_go_on_where_an_earlier_attempt_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweeps.system_metrics.FIRST_SECONDS", 0.01)
    monkeypatch.setattr("sweeps.system_metrics.INTERVAL_SECONDS", 0.02)
    path = tmp_path / schema.SYSTEM_FILE
    for wanted in (2, 4):
        with sampled(tmp_path):
            await_(lambda: path.exists() and len(path.read_text().splitlines()) >= wanted, 30, "samples")  # noqa: B023
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["sample"] for line in lines] == list(range(len(lines)))
    assert {name for name in lines[0] if name.startswith("system/")} == set(Meter().read())
    with sampled(tmp_path / "absent"):
        pass  # what cannot be sampled fails nothing
