"""What an attempt failed of, what follows, and what is written down: by law, and in real studies driven in this process."""

import errno
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from conftest import STANDIN, computed
from hypothesis import given, settings
from hypothesis import strategies as st
from test_driver import DyingExecutor, drive, optuna_trials, read

from research.errors import CollectiveFailed, ConfigError, DiskFull, OutOfMemory
from sweeps import schema
from sweeps.cluster import RayExecutor
from sweeps.connection import connect
from sweeps.executors import Event, InlineExecutor
from sweeps.failures import MAX_TRIES, Attempts, Failure, classify, read_attempts, reset_runs
from sweeps.slots import Slot
from sweeps.study import load_study
from sweeps.trial import Job

StudyWriter = Callable[..., Path]


def attempts(root: Path, run: str) -> list[dict[str, Any]]:
    return read_attempts(root / "runs" / run)


def wrapped(error: Exception) -> Exception:
    try:
        try:
            raise error
        except Exception as inner:
            raise RuntimeError("while the checkpoint was written") from inner
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OutOfMemory("no memory"), schema.OUT_OF_MEMORY),
        (MemoryError(), schema.OUT_OF_MEMORY),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"), schema.OUT_OF_MEMORY),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), schema.OUT_OF_MEMORY),
        (DiskFull("no room"), schema.DISK),
        (OSError(errno.ENOSPC, "No space left on device"), schema.DISK),
        (wrapped(OSError(errno.EDQUOT, "Disk quota exceeded")), schema.DISK),
        (OSError(errno.ENOENT, "No such file"), schema.BUG),
        (ConfigError("wrong"), schema.BUG),
        (ZeroDivisionError("division by zero"), schema.BUG),
    ],
)
def test_what_was_raised_has_a_class(error: Exception, kind: str) -> None:
    failure = classify(error)
    assert failure.kind == kind
    assert str(error) in failure.text
    assert ("Error" in failure.text) == (not isinstance(error, ConfigError | OutOfMemory | DiskFull)), (
        "a mistake has its sentence, all else its traceback"
    )


CONFIG = {
    "model": {"preset": "deepseek-v2-nano", "vocab_size": 300},
    "data": {"corpus": "installed", "tokenizer_vocab_size": 300, "sequence_length": 32},
    "training": {"train_tokens": 2048, "batch_size": 12},
}
TRANSIENT = [schema.OUT_OF_MEMORY, schema.DIED, schema.NODE, schema.HANG, schema.DISK]


@settings(max_examples=40, deadline=None)
@given(kinds=st.lists(st.sampled_from([*TRANSIENT, schema.BUG]), max_size=14))
def test_every_attempt_is_kept_and_tries_are_charged_by_class(tmp_path_factory: pytest.TempPathFactory, kinds: list[str]) -> None:
    folder = tmp_path_factory.mktemp("run")
    (folder / schema.CONFIG_FILE).write_text(json.dumps(CONFIG))
    kept, size, charged = Attempts(folder), 12, 0
    for number, kind in enumerate(kinds, 1):
        assert kept.begin() == number
        assert (kept.last["micro_batch_size"] or 12) == size
        verdict = kept.fail(Failure(kind=kind, text=f"the {number}th"), STANDIN)
        charged += kind in (schema.DIED, schema.HANG, schema.DISK)
        if kind == schema.OUT_OF_MEMORY:
            assert verdict.again == (size > 1)
            size = max(size // 2, 1)
        elif kind == schema.NODE:
            assert verdict.again
        elif kind == schema.BUG:
            assert not verdict.again
        else:
            assert verdict.again == (charged < MAX_TRIES)
        # As another driver finds it.
        kept = Attempts(folder)
        assert kept.last["state"] == ("lost" if verdict.again else schema.FAILED)
        if not verdict.again:
            break
    found = read_attempts(folder)
    assert [a["failure"] for a in found] == kinds[: len(found)]
    assert all(set(a) == set(schema.ATTEMPT_KEYS) for a in found)


def test_an_attempt_whose_driver_is_gone_is_told_from_one_that_runs(tmp_path: Path) -> None:
    Attempts(tmp_path).begin()
    assert read_attempts(tmp_path)[0]["state"] == "running"
    kept = Attempts(tmp_path)
    assert (kept.last["state"], kept.last["charged"]) == ("interrupted", False)
    assert kept.begin() == 2


@pytest.mark.parametrize("memory", ["memory", "gpu-memory"])
def test_out_of_memory_halves_the_micro_batch_and_nothing_else(study: StudyWriter, local: Path, memory: str) -> None:
    root, lines = local / "small", list[str]()
    root.mkdir(parents=True)
    (root / memory).write_text("1")
    assert drive(study(seeds=[0]), root, lines) == "finished"
    tried = attempts(root, "000-0")
    assert [(a["state"], a["failure"], a["micro_batch_size"]) for a in tried] == [
        ("lost", schema.OUT_OF_MEMORY, None),
        ("lost", schema.OUT_OF_MEMORY, 2),
        ("finished", None, 1),
    ]
    assert read(root / "runs" / "000-0" / schema.CONFIG_FILE)["training"]["batch_size"] == 4
    assert any("out-of-memory" in line and "2 sequences per pass, the same global batch" in line for line in lines)
    state = read(root / schema.STATE_FILE)
    assert (state["failed_attempts"], state["failures"]) == ({schema.OUT_OF_MEMORY: 6}, {})


class KillingNode(InlineExecutor):
    """Ray's memory monitor: it kills the worker of every attempt with more than 2 sequences per pass, and raises what Ray raises."""

    def __init__(self, error: Exception) -> None:
        import ray

        super().__init__()
        self._real = RayExecutor.__new__(RayExecutor)
        self._real._ray = ray
        self._error, self.lost = error, list[str]()

    def start(self, job: Job) -> None:
        if job.micro_batch_size is None:
            self.lost.append(job.run)
        else:
            super().start(job)

    def poll(self, wait: float = 0.0) -> list[Event]:
        named = [self._real._named(self._error, Slot(members=[])) for _ in self.lost]
        found = [Event(run=run, kind="failed", failure=failure) for run, failure in zip(self.lost, named, strict=True)]
        self.lost = []
        return found or super().poll(wait)


def test_a_worker_that_the_node_killed_for_its_memory_goes_on_with_half(study: StudyWriter, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is Ray's own, and says what ray 2.60 said of an actor that its memory monitor had killed (RAY_memory_usage_threshold just
    above what was in use, a trial that takes more).  Provoked for good it would depend on what else the machine is doing."""
    import ray

    said = "1 worker(s) were killed due to the node running low on memory.\nMemory on the node was 2.61GB used / 23.54GB limit (0.110690)"
    error = ray.exceptions.OutOfMemoryError(said)
    monkeypatch.setattr(RayExecutor, "_all_nodes_live", lambda *_: True)
    root = local / "small"
    assert drive(study(seeds=[0]), root, executor=lambda study, runs: KillingNode(error)) == "finished"
    for run in ("000-0", "001-0", "002-0"):
        first, second = attempts(root, run)
        assert (first["state"], first["failure"], first["charged"], first["micro_batch_size"]) == ("lost", schema.OUT_OF_MEMORY, False, None)
        assert "running low on memory" in first["text"]
        assert (second["state"], second["micro_batch_size"]) == ("finished", 2)
        assert read(root / "runs" / run / schema.CONFIG_FILE)["training"]["batch_size"] == 4


def test_a_local_ray_that_starts_late_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late:
        """`ray.init` as on a machine that is busy: a plain Exception, twice."""

        def __init__(self, times: int) -> None:
            self.left, self.said = times, list[str]()

        def init(self, **_: Any) -> None:
            self.said.append("init")
            self.left -= 1
            if self.left >= 0:
                raise Exception("The current node timed out during startup.")

        def shutdown(self) -> None:
            self.said.append("shutdown")

    slow, dead = Late(2), Late(100)
    connect(slow, None)
    assert slow.said == ["init", "shutdown", "init", "shutdown", "init"]
    with pytest.raises(ConfigError, match=r"no Ray of its own can be started here, in 3 tries \(The current node timed out"):
        connect(dead, None)
    assert dead.said.count("init") == 3
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS = 'there:1': no Ray cluster answers there"):
        connect(Late(1), "there:1")


def test_one_sequence_that_does_not_fit_is_the_end(study: StudyWriter, local: Path) -> None:
    root = local / "small"
    root.mkdir(parents=True)
    (root / "memory").write_text("0")
    assert drive(study(seeds=[0]), root) == "finished-with-failures"
    summary = read(root / "runs" / "000-0" / schema.SUMMARY_FILE)
    assert (summary["state"], summary["failure"], summary["attempts"]) == (schema.FAILED, schema.OUT_OF_MEMORY, 3)
    assert "one sequence per pass already" in summary["reason"]


def test_what_is_defined_over_a_batch_is_not_made_another_experiment(study: StudyWriter, local: Path) -> None:
    root = local / "small"
    root.mkdir(parents=True)
    (root / "memory").write_text("2")
    base = yaml.safe_load(study().read_text())["base"]
    base["model"]["moe"] = {"balance": {"scope": "batch"}}
    assert drive(study(seeds=[0], base=base), root) == "finished-with-failures"
    assert "defined over a batch" in read(root / "runs" / "000-0" / schema.SUMMARY_FILE)["reason"]


def test_a_full_disk_leaves_the_earlier_checkpoint_and_the_run_goes_on(study: StudyWriter, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real training; in the sixth step files can grow to 20 kB only, so that the checkpoint of the eighth does not fit."""
    monkeypatch.setattr("sweeps.failures.DISK_PAUSE_SECONDS", 0.1)
    space, baseline = {"model.moe.device_limit": [3]}, {"model.moe.device_limit": 3}
    calm, root = local / "calm", local / "small"
    path = study(seeds=[0], space=space, baseline=baseline)
    assert drive(path, calm, function="standin:harsh") == "finished"
    root.mkdir(parents=True)
    (root / "faults").write_text("000-0 disk")
    assert drive(path, root, function="standin:harsh") == "finished"
    first, second = attempts(root, "000-0")
    assert (first["state"], first["failure"], first["step"], first["charged"]) == ("lost", schema.DISK, 8, True)
    assert "checkpoint of step 8" in first["text"]
    assert second["state"] == "finished"
    assert numbers(root, "000-0") == numbers(calm, "000-0")
    assert records(root, "000-0") == records(calm, "000-0"), "went on from step 4, each record once"


def numbers(root: Path, run: str) -> dict[str, float]:
    """Final metrics but for those that are times."""
    metrics = read(root / "runs" / run / schema.SUMMARY_FILE)["metrics"]
    return {name: value for name, value in metrics.items() if name != schema.TOKENS_PER_SECOND}


def records(root: Path, run: str) -> list[dict[str, float]]:
    lines = (root / "runs" / run / schema.METRICS_FILE).read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != schema.TOKENS_PER_SECOND} for line in lines]


def test_weights_that_are_not_finite_are_diverged_and_told_and_not_tried_again(study: StudyWriter, local: Path) -> None:
    root, rate = local / "small", "training.optimizer.learning_rate"
    path = study(seeds=[0], space={rate: [0.001, 1e30]}, baseline={rate: 0.001})
    assert drive(path, root, function="sweeps.trial:run_trial") == "finished-with-failures"
    summary = read(root / "runs" / "001-0" / schema.SUMMARY_FILE)
    assert (summary["state"], summary["failure"], summary["attempts"]) == (schema.DIVERGED, schema.DIVERGED, 1)
    assert [a["failure"] for a in attempts(root, "001-0")] == [schema.DIVERGED]
    assert [t.state.name for t in optuna_trials(root)] == ["COMPLETE", "PRUNED"]
    assert read(root / schema.STATE_FILE)["failures"] == {schema.DIVERGED: 1}


def test_a_lost_node_is_never_charged(study: StudyWriter, local: Path) -> None:
    class Flapping(DyingExecutor):
        def start(self, job: Any) -> None:
            if job.attempt > 7:
                InlineExecutor.start(self, job)
            else:
                super().start(job)

    root = local / "small"
    assert drive(study(seeds=[0]), root, executor=lambda study, runs: Flapping(schema.NODE)) == "finished"
    assert [a["failure"] for a in attempts(root, "001-0")] == [schema.NODE] * 7 + [None]


def test_failed_runs_are_put_back_by_class_and_finish_under_their_numbers(study: StudyWriter, local: Path) -> None:
    root = local / "small"
    root.mkdir(parents=True)
    (root / "bug").write_text("001-0")
    (root / "diverge").write_text("002-1")
    assert drive(study(), root) == "finished-with-failures"
    before = {run: computed(root, run) for run in ("000-0", "000-1", "001-1", "002-0")}
    with pytest.raises(ConfigError, match="--class = bugs: must be of bug, out-of-memory"):
        reset_runs(root, ["bugs"])
    with pytest.raises(ConfigError, match="--run = 009-0: no such run"):
        reset_runs(root, ["bug"], ["009-0"])
    assert reset_runs(root, ["died", "hang"]) == []
    assert reset_runs(root, ["bug"], ["001-1"]) == []
    assert reset_runs(root, ["bug"]) == ["001-0"]
    (root / "bug").unlink()
    assert drive(study(), root) == "finished-with-failures", "the diverged one was not put back"
    assert read(root / "runs" / "001-0" / schema.SUMMARY_FILE)["state"] == schema.FINISHED
    assert [(a["state"], a["forgiven"]) for a in attempts(root, "001-0")] == [("failed", True), ("finished", False)]
    (root / "diverge").unlink()
    assert reset_runs(root, ["all"]) == ["002-1"]
    assert drive(study(), root) == "finished"
    assert {run: computed(root, run) for run in before} == before, "no other run was touched"
    state = read(root / schema.STATE_FILE)
    assert (state["counts"], state["failures"], state["done"]) == ({schema.FINISHED: 6}, {}, 6)
    trials = optuna_trials(root)
    assert [t.state.name for t in trials[:3]] == ["COMPLETE", "COMPLETE", "PRUNED"], "what was told stays told"
    assert [(t.params, t.state) for t in trials[3:]] == [(trials[n].params, optuna.trial.TrialState.COMPLETE) for n in (1, 2)], (
        "and the sampler learns"
    )
    assert drive(study(), root, executor=none_needed) == "finished"


def none_needed(*_: Any) -> Any:
    raise AssertionError("no worker is needed")


def test_a_run_is_trained_in_one_worker_unless_its_function_says_otherwise(study: StudyWriter, local: Path) -> None:
    path = study(resources={"workers_per_trial": 2})
    with pytest.raises(ConfigError, match="workers_per_trial = 2: standin:count trains a run in one worker"):
        drive(path, local / "small")


def test_settings_that_a_root_does_not_know_yet_have_their_defaults(study: StudyWriter, local: Path) -> None:
    """A root of an earlier version goes on."""
    root, path = local / "small", study(seeds=[0])
    drive(path, root)
    stored = yaml.safe_load((root / schema.STUDY_FILE).read_text())
    del stored["budget"], stored["resources"]["hang_seconds"]
    (root / schema.STUDY_FILE).write_text(yaml.safe_dump(stored))
    assert drive(path, root, executor=none_needed) == "finished"
    with pytest.raises(ConfigError) as refused:
        drive(study(seeds=[0, 3], question="Another?"), root)
    assert refused.value.problems[1:3] == ("  question: 'Does the laboratory lose anything?' -> 'Another?'", "  seeds: [0] -> [0, 3]")


def test_state_and_memory_do_not_grow_with_the_runs(study: StudyWriter, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sweeps.driver import Driver

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    root = local / "small"
    seeds = list(range(150))
    driver = Driver(load_study(study(seeds=seeds)), root, lambda study, runs: InlineExecutor(8), lambda line: None, "standin:idle")
    assert driver.run() == "finished"
    state = read(root / schema.STATE_FILE)
    assert (state["done"], state["counts"]) == (450, {schema.FINISHED: 450})
    assert len(state["runs"]) <= 100
    assert not driver.book.open, "every run is on disk"
    assert state["best"]["variant"] == "baseline"
    assert len(driver.book.unsent) == 450, "MLflow was away, and its names are kept"


def test_a_neighbour_that_is_gone_or_hangs_is_no_bug_of_the_run() -> None:
    """Otherwise a group whose other node lost its power is not tried again."""
    assert classify(CollectiveFailed("rank 0 of 2: the combine of layer 1 of step 8 failed")).kind == schema.DIED
    error = pickle.loads(pickle.dumps(CollectiveFailed("rank 0 of 2: the combine of layer 1 did not end within 5 s", timed_out=True)))
    assert classify(error).kind == schema.HANG
    assert "layer 1" in classify(error).text
