"""Faults that are real, in real processes on the session's Ray, of real training where its numbers are what is asked."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import STANDIN, Sweeps, await_, computed
from machines import little_memory
from test_failures import numbers, records

from sweeps import schema
from sweeps.control import set_workers
from sweeps.failures import read_attempts

pytestmark = pytest.mark.slow

StudyWriter = Callable[..., Path]


def attempts(sweeps: Sweeps, run: str) -> list[dict[str, Any]]:
    return read_attempts(sweeps.root / "runs" / run)


def kinds(sweeps: Sweeps, run: str) -> list[str | None]:
    return [attempt["failure"] for attempt in attempts(sweeps, run)]


def test_faults_change_no_number(sweeps_on_ray: Sweeps, study: StudyWriter) -> None:
    """Real training: killed, frozen, out of memory, each in its sixth step, beside the same study undisturbed."""
    only = {"baseline": {"model.moe.device_limit": 3}, "space": {"model.moe.device_limit": [2, 3]}}
    sweeps, path = sweeps_on_ray, study(resources={"hang_seconds": 12.0}, **only)
    calm = Sweeps({**sweeps.environment, "MOELAB_HOME": str(Path(sweeps.environment["MOELAB_HOME"]).with_name("calm"))})
    sweeps.steer("faults", "000-0 kill\n000-1 freeze\n001-1 memory\n")
    beside = calm.start("run", path, "--executor", "inline", "--function", "standin:harsh")  # while the other waits for its frozen worker
    try:
        code, output = sweeps.call("run", path, "--function", "standin:harsh", timeout=240)
        output_of_calm, _ = beside.communicate(timeout=240)
    finally:
        beside.kill()
    assert code == 0, output
    assert beside.returncode == 0, output_of_calm
    assert kinds(sweeps, "000-0") == [schema.DIED, None]
    assert kinds(sweeps, "000-1") == [schema.HANG, None]
    assert kinds(sweeps, "001-1") == [schema.OUT_OF_MEMORY, None]
    assert attempts(sweeps, "001-1")[1]["micro_batch_size"] == 2
    assert "petabyte" in attempts(sweeps, "001-1")[0]["text"], "the traceback says where"
    killed = attempts(sweeps, "000-0")
    assert killed[0]["pid"] == int((sweeps.root / "runs" / "000-0" / "struck").read_text())
    assert killed[0]["step"] is None or killed[0]["step"] <= 6
    for run in calm.summaries():
        if run == "001-1":
            assert numbers(sweeps.root, run) == pytest.approx(numbers(calm.root, run), rel=2e-3), "the same batches, other sums"
        else:
            assert numbers(sweeps.root, run) == numbers(calm.root, run), "to the bit"
            assert records(sweeps.root, run) == records(calm.root, run)
    state = sweeps.state()
    assert state["failed_attempts"] == {schema.DIED: 1, schema.HANG: 1, schema.OUT_OF_MEMORY: 1}
    assert (state["failures"], state["done"]) == ({}, 4)
    if hasattr(os, "sched_getaffinity"):
        assert len(set(json.loads((sweeps.root / "runs" / "001-0" / "affinity.json").read_text()))) == 1, "one trial, one core"


def test_a_run_that_makes_no_progress_is_replaced(sweeps_on_ray: Sweeps, study: StudyWriter) -> None:
    """Its worker answers, its training does not move."""
    sweeps = sweeps_on_ray
    sweeps.steer("hang", "000-0")
    code, output = sweeps.call("run", study(seeds=[0], resources={"hang_seconds": 3.0}), "--function", STANDIN)
    assert code == 0, output
    assert kinds(sweeps, "000-0") == [schema.HANG, None]
    assert "no progress for" in attempts(sweeps, "000-0")[0]["text"]
    first, second = (attempt["pid"] for attempt in attempts(sweeps, "000-0"))
    assert next(step for pid, step in computed(sweeps.root, "000-0") if pid == second) == 5, "went on after the checkpoint of step 4"
    assert not Path(f"/proc/{first}").exists()


def test_a_worker_that_the_kernel_kills_for_its_memory_goes_on_with_half(sweeps_on_ray: Sweeps, study: StudyWriter) -> None:
    """The kernel's own killer, of a machine that is too small for the run: a control group with little memory."""
    sweeps, only = sweeps_on_ray, {"space": {"model.moe.device_limit": [3]}, "baseline": {"model.moe.device_limit": 3}, "seeds": [0]}
    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(little_memory(64 * 2**20))
        except OSError as error:
            pytest.skip(str(error))
        sweeps.steer("greedy", str(group))
        code, output = sweeps.call("run", study(**only), "--function", STANDIN)
    assert code == 0, output
    first, second = attempts(sweeps, "000-0")
    assert (first["failure"], first["charged"], first["micro_batch_size"]) == (schema.OUT_OF_MEMORY, False, None), first["text"]
    assert "killed by the kernel" in first["text"]
    assert (second["failure"], second["micro_batch_size"]) == (None, 2)
    assert next(step for pid, step in computed(sweeps.root, "000-0") if pid == second["pid"]) == 5, "went on after the checkpoint of step 4"
    assert json.loads((sweeps.root / "runs" / "000-0" / schema.CONFIG_FILE).read_text())["training"]["batch_size"] == 4, "the same global batch"


class Node:
    """A second node of two CPUs on this machine."""

    def __init__(self, sweeps: Sweeps, home: Path) -> None:
        environment = {**sweeps.environment, "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
        address = environment.pop("RAY_ADDRESS")
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={address}", "--num-cpus=2", "--block"]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def kill(self) -> None:
        """As when its power fails: everything of it at once."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def test_workers_come_and_go_and_a_killed_node_is_not_charged(sweeps_on_ray: Sweeps, study: StudyWriter, session_home: Path) -> None:
    sweeps = sweeps_on_ray
    sweeps.steer("slow", "0.3")
    driver, node = sweeps.start("run", study(), "--function", STANDIN), None
    try:
        sweeps.await_steps("000-0", 1)
        sweeps.await_steps("000-1", 1)
        sweeps.steer("slow", "60")
        node = Node(sweeps, session_home)
        await_(lambda: sweeps.state()["workers"] == 4, 90, "the workers of the second node")
        await_(lambda: attempts(sweeps, "001-0") != [], 90, "a run there, since the first two are busy")
        sweeps.steer("slow", "0.5")
        sweeps.await_steps("001-0", 6)
        node.kill()
        await_(lambda: schema.NODE in sweeps.state()["failed_attempts"], 90, "the driver's noticing")
        await_(lambda: sweeps.state()["workers"] == 2, 90, "the end of its workers")
        set_workers(sweeps.root, 1)
        await_(lambda: sweeps.state()["workers"] == 1, 90, "the end of one more")
        sweeps.steer("slow", "0.0")
        output, _ = driver.communicate(timeout=120)
    finally:
        driver.kill()
        if node is not None:
            node.kill()
    lines = output.splitlines()
    assert driver.returncode == 0, output
    lost = [attempt for run in sweeps.summaries() for attempt in attempts(sweeps, run) if attempt["failure"] is not None]
    assert lost, output
    assert {(attempt["failure"], attempt["charged"]) for attempt in lost} == {(schema.NODE, False)}
    assert {s["state"] for s in sweeps.summaries().values()} == {"finished"}
    assert any("4 workers now, 2 before" in line for line in lines), output
    assert any("1 workers now, 2 before" in line for line in lines), output
    for run in sweeps.summaries():
        again = [step for _, step in computed(sweeps.root, run)]
        assert sorted(set(again)) == list(range(1, 21)), "every step was computed"


def test_a_trial_of_two_workers_starts_and_fails_together(sweeps_on_ray: Sweeps, study: StudyWriter) -> None:
    sweeps = sweeps_on_ray
    sweeps.steer("bug", "000-0")
    code, output = sweeps.call("run", study(seeds=[0], resources={"workers_per_trial": 2}), "--function", "standin:together")
    assert code == 0, output
    assert "on 1 workers" in output
    assert kinds(sweeps, "000-0") == [schema.DIED, None]
    for run in ("000-0", "001-0", "002-0"):
        ranks = [(sweeps.root / "runs" / run / f"rank-{rank}").read_text().split() for rank in (0, 1)]
        assert ranks[0][0] != ranks[1][0], "two processes"
        assert {size for _, size, _ in ranks} == {"2"}
        assert len({address for *_, address in ranks}) == 1, "that know one address to meet at"
    code, output = sweeps.call("run", study(seeds=[1], resources={"workers_per_trial": 4}, name="wide"), "--function", "standin:together")
    assert code == 1
    assert "do not fit on 2 CPUs" in output
