"""One run on workers of several Ray nodes: two machines where namespaces make them, else two nodes of one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import HERE, REPOSITORY, await_, end
from machines import ADDRESSES, two_machines

from research.parallel.traffic import PAYLOAD, read_traffic
from sweeps import schema
from sweeps.failures import read_attempts

pytestmark = pytest.mark.slow
PORT = 26379
TOKENS_PER_STEP, STEPS = 4 * 32, 120
NODES = """
import sys, time, ray
until = time.monotonic() + 120
while True:
    try:
        ray.init(log_to_driver=False)
        break
    except Exception:  # the head is not there yet
        assert time.monotonic() < until
        time.sleep(0.5)
while sum(node["Alive"] for node in ray.nodes()) != int(sys.argv[1]):
    assert time.monotonic() < until, ray.nodes()
    time.sleep(0.2)
"""
"""Waits for so many nodes."""


class Cluster:
    """A head and a node of one CPU each; `python -m sweeps` runs beside the head.  Addresses are of the two machines, or of this one."""

    def __init__(self, home: Path, temporary: Path, machine: Callable[[int], list[str]] | None) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "MOELAB_"))}
        own = {"HOME": str(home), "MOELAB_CACHE": str(home / "cache"), "MOELAB_HOME": str(home / "moelab"), "RAY_USAGE_STATS_ENABLED": "0"}
        self.environment = {**kept, **own, "PYTHONPATH": os.pathsep.join([str(HERE), str(REPOSITORY)]), "OMP_NUM_THREADS": "1"}
        self.home, self.machine = home, machine or (lambda number: [])
        self.addresses = ADDRESSES if machine else ("127.0.0.1", "127.0.0.1")
        self.root = home / "moelab" / "studies" / "small"
        here = [] if machine is None else [f"--node-ip-address={self.addresses[0]}"]
        head = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={temporary}", *here]
        self.started = [self._node(0, *head)]
        self.environment["RAY_ADDRESS"] = f"{self.addresses[0]}:{PORT}"
        self.await_nodes(1)

    def add_node(self) -> None:
        here = [] if self.machine(1) == [] else [f"--node-ip-address={self.addresses[1]}"]
        self.started.append(self._node(1, f"--address={self.addresses[0]}:{PORT}", *here))

    def _node(self, number: int, *arguments: str) -> "subprocess.Popen[Any]":
        command = [*self.machine(number), sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--block", *arguments]
        with (self.home / f"ray-{number}.log").open("a") as log:
            return subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)

    def await_nodes(self, count: int) -> None:
        """One process asks until there are so many: to start one takes longer than all answers."""
        done = subprocess.run(
            [*self.machine(0), sys.executable, "-c", NODES, str(count)],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )
        assert done.returncode == 0, done.stderr

    def kill_node(self) -> None:
        """As when its power fails: everything of it at once."""
        node = self.started.pop()
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()

    def run(self, study: Path) -> "subprocess.Popen[str]":
        command = [*self.machine(0), sys.executable, "-m", "sweeps", "run", str(study)]
        return subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)

    def close(self) -> None:
        for node in reversed(self.started):
            end(node)


@pytest.fixture
def cluster(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        try:
            machine: Callable[[int], list[str]] | None = stack.enter_context(two_machines())
        except OSError:
            machine = None
        found = Cluster(tmp_path, tmp_path_factory.mktemp("ray"), machine)
        stack.callback(found.close)
        found.add_node()
        found.await_nodes(2)
        yield found


def records(directory: Path) -> list[dict[str, float]]:
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def numbers(directory: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in record.items() if "second" not in name} for record in records(directory)]


def test_a_run_on_two_nodes_survives_the_end_of_one_with_the_numbers_of_one_node(cluster: Cluster, study: Callable[..., Path]) -> None:
    only = {"space": {"model.moe.device_limit": [3]}, "baseline": {"model.moe.device_limit": 3}, "seeds": [0]}
    path = study(resources={"workers_per_trial": 2}, **only)
    mapping = yaml.safe_load(path.read_text())
    mapping["base"]["training"] |= {"train_tokens": STEPS * TOKENS_PER_STEP, "checkpoint_every": 20, "validate_every": STEPS}
    path.write_text(yaml.safe_dump(mapping))
    run = cluster.root / "runs" / "000-0"
    driver = cluster.run(path)
    try:
        await_(lambda: len(records(run)) >= 15, 180, "fifteen records")
        cluster.kill_node()
        await_(lambda: read_attempts(run)[0]["failure"] is not None, 90, "the driver's noticing")
        cluster.add_node()
        output, _ = driver.communicate(timeout=300)
    finally:
        driver.kill()
    assert driver.returncode == 0, output
    first, second = read_attempts(run)
    assert (first["failure"], first["charged"]) == (schema.NODE, False), first["text"]
    assert second["node"].count("(1)") == 2, "one worker on each node"
    assert second["step"] is None or second["step"] >= 20
    # The same run in two processes of one machine.
    config = cluster.home / "run.yaml"
    config.write_text((run / "config.json").read_text())
    alone = cluster.home / "alone"
    command = [sys.executable, "-m", "research", "train", str(config), "--out", str(alone), "--workers", "2", "--device", "cpu"]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert numbers(run) == numbers(alone), "to the bit"
    ours, theirs = (read_traffic(folder / "traffic.jsonl") for folder in (run, alone))
    steps = [key for key in theirs if key[2] in PAYLOAD]
    assert len(steps) >= 4 * STEPS
    assert all((ours[key] == theirs[key]).all() for key in steps), "and the same bytes"
