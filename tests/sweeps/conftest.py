"""One Ray for the whole session, a home of its own (Ray keeps its token there), one small prepared corpus."""

import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
STANDIN = "standin:count"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text that every installation has: the source of one module of the standard library."""
    path = tmp_path_factory.mktemp("text") / "argparse.py"
    path.write_text(inspect.getsource(__import__("argparse")), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def session_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def empty_store(session_home: Path) -> Path:
    """MLflow's database before anything is recorded, whose making takes seconds: each test gets a copy."""
    path = session_home / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def environment(session_home: Path, tmp_path: Path, empty_store: Path) -> dict[str, str]:
    """For a `python -m sweeps` of a test: its own MOELAB_HOME, no Ray but what the test gives it."""
    (tmp_path / "moelab").mkdir()
    shutil.copy(empty_store, tmp_path / "moelab" / "mlflow.db")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "MOELAB_"))}
    path = os.pathsep.join([str(HERE), str(REPOSITORY)])
    own = {"HOME": str(session_home), "MOELAB_CACHE": str(session_home / "cache"), "MOELAB_HOME": str(tmp_path / "moelab")}
    return {**kept, **own, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def local(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same environment for a study that is driven in this process; MOELAB_HOME comes back."""
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MOELAB_COMMIT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "MOELAB_CACHE", "MOELAB_HOME"):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setattr("sweeps.outbox.FINAL_PAUSES", ())
    return Path(environment["MOELAB_HOME"])


@pytest.fixture(scope="session")
def ray_address(session_home: Path) -> Iterator[str]:
    """A Ray of two CPUs, started as a person would; its workers find the stand-in."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"HOME": str(session_home), "PYTHONPATH": os.pathsep.join([str(HERE), str(REPOSITORY)]), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        f"--port={port}",
        "--num-cpus=2",
        "--include-dashboard=false",
        "--block",
        f"--temp-dir={session_home / 'ray'}",
    ]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        await_(lambda: _answers(port), 90, "Ray's head")
        yield f"127.0.0.1:{port}"
    finally:
        end(process)


@pytest.fixture
def study(tmp_path: Path, corpus: Path) -> Callable[..., Path]:
    """Write a study file: three variants (baseline, M = 2, K = 2) and two seeds unless told otherwise."""

    def write(**changes: Any) -> Path:
        mapping: dict[str, Any] = {
            "name": "small",
            "question": "Does the laboratory lose anything?",
            "base": {
                "model": {"preset": "deepseek-v2-nano", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2},
                "data": {"corpus": "files", "paths": [str(corpus)], "tokenizer_vocab_size": 300, "sequence_length": 32},
                "training": {"train_tokens": 2048, "batch_size": 4, "validation_tokens": 512, "record_every": 2, "checkpoint_every": 4},
            },
            "baseline": {"model.moe.device_limit": 3, "model.moe.num_experts_per_tok": 6},
            "space": {"model.moe.device_limit": [2, 3], "model.moe.num_experts_per_tok": [2, 6]},
            "search": {"sampler": "one-factor"},
            "objectives": [{"metric": "validation/bits_per_byte", "direction": "minimize"}],
            "seeds": [0, 1],
            "cluster": {"file": "h800", "nodes": 2, "gpus_per_node": 4, "tokens_per_device": 64, "hidden_size": 512},
        }
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump({**mapping, **changes}, sort_keys=False), encoding="utf-8")
        return path

    return write


class Sweeps:
    """`python -m sweeps` in a process of its own."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.root = Path(environment["MOELAB_HOME"]) / "studies" / "small"

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "sweeps", *map(str, arguments)]
        return subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)

    def call(self, *arguments: str | Path, timeout: float = 120) -> tuple[int, str]:
        process = self.start(*arguments)
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return process.returncode, output

    def steer(self, file: str, text: str = "") -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / file).write_text(text)

    def await_steps(self, run: str, steps: int) -> list[tuple[int, int]]:
        """Wait until `run` has computed `steps` steps; its (pid, step) lines come back."""
        await_(lambda: len(computed(self.root, run)) >= steps, 90, f"step {steps} of run {run}")
        return computed(self.root, run)

    def summaries(self) -> dict[str, dict[str, Any]]:
        return {p.parent.name: json.loads(p.read_text()) for p in sorted(self.root.glob("runs/*/summary.json"))}

    def state(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.root / "state.json").read_text())
        return value


@pytest.fixture
def sweeps(environment: dict[str, str]) -> Sweeps:
    return Sweeps(environment)


@pytest.fixture
def sweeps_on_ray(environment: dict[str, str], ray_address: str) -> Sweeps:
    return Sweeps({**environment, "RAY_ADDRESS": ray_address})


def computed(root: Path, run: str) -> list[tuple[int, int]]:
    path = root / "runs" / run / "computed.log"
    if not path.exists():
        return []
    return [(int(pid), int(step)) for pid, step in (line.split() for line in path.read_text().splitlines())]


def end(process: subprocess.Popen[Any]) -> None:
    """Ray's head ends its children when it is asked to; what is left of its group after a while is killed."""
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def await_(condition: Callable[[], bool], seconds: float, what: str, every: float = 0.05) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(every)
