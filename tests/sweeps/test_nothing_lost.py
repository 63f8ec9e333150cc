"""Real processes that are really killed, on a real Ray: every run is accounted for, none twice, none lost."""

import json
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import STANDIN, Sweeps, computed
from standin import bits_per_byte
from test_driver import optuna_trials

pytestmark = pytest.mark.slow

StudyWriter = Callable[..., Path]
RUNS = ["000-0", "000-1", "001-0", "001-1", "002-0", "002-1"]


def test_a_killed_worker_is_replaced_and_its_run_goes_on_from_the_checkpoint(sweeps_on_ray: Sweeps, study: StudyWriter) -> None:
    sweeps = sweeps_on_ray
    sweeps.steer("slow", "0.1")
    driver = sweeps.start("run", study(), "--function", STANDIN)
    killed = sweeps.await_steps("000-0", 6)[-1][0]
    os.kill(killed, signal.SIGKILL)
    sweeps.steer("slow", "0.01")
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, output
    assert "died (" in output
    summaries = sweeps.summaries()
    assert list(summaries) == RUNS
    assert {s["state"] for s in summaries.values()} == {"finished"}
    lines = computed(sweeps.root, "000-0")
    second_pid, resumed_at = next((pid, step) for pid, step in lines if pid != killed)
    assert resumed_at == 5, "goes on after the checkpoint of step 4"
    assert lines[-1] == (second_pid, 20)
    assert summaries["000-0"]["attempts"] == 2
    assert summaries["002-0"]["attempts"] == 1
    recorded = (sweeps.root / "runs" / "000-0" / "metrics.jsonl").read_text().splitlines()
    assert len(recorded) == 20, "each step stands there once"


def test_a_killed_driver_repeats_nothing(sweeps_on_ray: Sweeps, study: StudyWriter) -> None:
    sweeps, path = sweeps_on_ray, study()
    sweeps.steer("slow", "0.05")
    driver = sweeps.start("run", path, "--function", STANDIN)
    sweeps.await_steps("001-0", 6)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    before = sweeps.summaries()
    finished = {run: computed(sweeps.root, run) for run in before}
    assert finished, "the first runs were done before the kill"
    sweeps.steer("slow", "0.0")
    code, output = sweeps.call("run", path, "--function", STANDIN)
    assert code == 0, output
    after = sweeps.summaries()
    assert list(after) == RUNS
    assert {run: after[run] for run in before} == before
    assert {run: computed(sweeps.root, run) for run in before} == finished, "no finished run was touched again"
    assert [step for _, step in computed(sweeps.root, "001-0")].count(4) == 1, "nor a step before its checkpoint"
    assert sweeps.state()["state"] == "finished"
    trials = optuna_trials(sweeps.root)
    assert [(t.number, t.state.name) for t in trials] == [(0, "COMPLETE"), (1, "COMPLETE"), (2, "COMPLETE")], "under the same numbers"
    assert len({json.dumps(t.params) for t in trials}) == 3, "no cell twice"
    for run, summary in after.items():
        config = json.loads((sweeps.root / "runs" / run / "config.json").read_text())
        assert summary["metrics"]["validation/bits_per_byte"] == bits_per_byte(config), "the table of an undisturbed study"
    assert interrupted(sweeps, "001-0") == [("interrupted", False), ("finished", False)], "and nobody was charged"


def interrupted(sweeps: Sweeps, run: str) -> list[tuple[str, bool]]:
    return [(attempt["state"], attempt["charged"]) for attempt in json.loads((sweeps.root / "runs" / run / "attempts.json").read_text())]


def test_sigterm_drains_and_the_next_run_goes_on(sweeps_on_ray: Sweeps, study: StudyWriter) -> None:
    sweeps, path = sweeps_on_ray, study()
    sweeps.steer("slow", "0.1")
    driver = sweeps.start("run", path, "--function", STANDIN)
    sweeps.await_steps("000-0", 6)
    driver.send_signal(signal.SIGTERM)
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 143, output
    assert sweeps.state()["state"] == "stopped"
    stopped = sweeps.summaries()["000-0"]
    assert stopped["state"] == "stopped"
    sweeps.steer("slow", "0.0")
    code, output = sweeps.call("resume", path, "--function", STANDIN)
    assert code == 0, output
    steps = [step for _, step in computed(sweeps.root, "000-0")]
    assert steps == list(range(1, 21)), "the checkpoint of the stop lost no step"
    assert {s["state"] for s in sweeps.summaries().values()} == {"finished"}


def test_a_second_driver_is_refused(sweeps_on_ray: Sweeps, study: StudyWriter) -> None:
    sweeps, path = sweeps_on_ray, study(seeds=[0])
    sweeps.steer("slow", "0.3")
    first = sweeps.start("run", path, "--function", STANDIN, "--executor", "inline")
    sweeps.await_steps("000-0", 1)
    code, output = sweeps.call("run", path, "--function", STANDIN, "--executor", "inline")
    assert code == 1
    assert str(first.pid) in output
    sweeps.steer("slow", "0.0")
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 0, output


def test_stop_from_another_shell(sweeps: Sweeps, study: StudyWriter) -> None:
    path = study(seeds=[0])
    sweeps.steer("slow", "0.1")
    driver = sweeps.start("run", path, "--function", STANDIN, "--executor", "inline")
    sweeps.await_steps("000-0", 2)
    code, output = sweeps.call("stop", "small")
    assert code == 0, output
    driver.communicate(timeout=60)
    assert driver.returncode == 143
    code, output = sweeps.call("stop", "small")
    assert code == 1
    assert "not running" in output


def test_real_models_on_ray(sweeps_on_ray: Sweeps, study: StudyWriter) -> None:
    """The real trial function: trained, simulated, recorded."""
    code, output = sweeps_on_ray.call("run", study(seeds=[0]))
    assert code == 0, output
    for run, summary in sweeps_on_ray.summaries().items():
        assert summary["state"] == "finished"
        assert 0 < summary["metrics"]["validation/bits_per_byte"] < 8
        assert summary["metrics"]["simulation/all_to_all_seconds"] > 0
        assert (sweeps_on_ray.root / "runs" / run / "routing.npz").exists()


def test_a_local_ray_joins_no_dead_cluster_and_leaves_no_token(environment: dict[str, str], study: StudyWriter, tmp_path: Path) -> None:
    """As after a cluster that was killed: its address is still written down where Ray looks first."""
    with tempfile.TemporaryDirectory() as place:  # pytest's paths are too long for Ray's sockets
        (Path(place) / "ray").mkdir()
        (Path(place) / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
        sweeps = Sweeps({**environment, "HOME": str(tmp_path), "RAY_TMPDIR": place})
        code, output = sweeps.call("run", study(seeds=[0]), "--function", STANDIN)
    assert code == 0, output
    assert not (tmp_path / ".ray").exists()
    assert {s["state"] for s in sweeps.summaries().values()} == {"finished"}
