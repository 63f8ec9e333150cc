"""`ray job submit` and its wrapper against a real head with its dashboard, with token authentication: run, stop, go on."""

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import HERE, REPOSITORY, STANDIN, Sweeps, await_, computed, end
from test_nothing_lost import StudyWriter

from sweeps.doctor_services import ray_authentication

pytestmark = pytest.mark.slow

RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Head:
    """`ray start --head` on ports of its own, in a home that has a token already; says it has a GPU, which Ray believes."""

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        self.environment = {**environment, "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text(secrets.token_hex(32))
        self.dashboard = free_port()
        ports = [f"--port={free_port()}", f"--dashboard-port={self.dashboard}", f"--dashboard-agent-listen-port={free_port()}"]
        command = [*RAY, "start", "--head", "--num-cpus=4", "--num-gpus=1", "--block", f"--temp-dir={home / 'ray'}", *ports]
        self.process = subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    def call(self, *arguments: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*RAY, *arguments], env={**self.environment, **environment}, capture_output=True, text=True, timeout=timeout, check=False
        )

    def job(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.call("job", arguments[0], "--address", self.address, *arguments[1:], RAY_AUTH_MODE="token")

    def status(self, submission: str) -> str:
        """What Ray says of it in words: running, stopped, succeeded, failed."""
        done = self.job("status", submission)
        found = re.findall(r"(pending|running|was stopped|succeeded|failed)", (done.stdout + done.stderr).lower())
        return found[-1].removeprefix("was ") if found else ""

    def listens(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.dashboard)) == 0

    def close(self) -> None:
        end(self.process)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    home = tmp_path_factory.mktemp("h")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "MOELAB_"))}
    # A job is started as `python`: the one that these tests run on comes first.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    found = Head(home, {**kept, "PATH": path, "PYTHONPATH": os.pathsep.join([str(HERE), str(REPOSITORY)])})
    try:
        await_(found.listens, 120, "the dashboard's port")  # asking costs seconds, each time
        await_(lambda: found.job("list").returncode == 0, 120, "the dashboard")
        yield found
    finally:
        found.close()


def await_status(head: Head, submission: str, wanted: set[str]) -> str:
    await_(lambda: head.status(submission) in wanted, 90, f"{submission} {wanted}")
    return head.status(submission)


def test_a_submitted_study_is_stopped_cleanly_and_the_next_job_goes_on(head: Head, study: StudyWriter, tmp_path: Path, sweeps: Sweeps) -> None:
    sweeps.steer("slow", "0.5")  # the study must not end before `ray job stop`, which takes seconds to start, has been heard
    path = study(seeds=[0])
    run_time = json.dumps({"env_vars": {"MOELAB_HOME": sweeps.environment["MOELAB_HOME"], "MOELAB_CACHE": sweeps.environment["MOELAB_CACHE"]}})
    folder = ["--working-dir", str(path.parent), "--runtime-env-json", run_time]
    command = ["--", "python", "-m", "sweeps", "run", path.name, "--function", STANDIN]
    submitted = head.job("submit", "--submission-id", "first", "--no-wait", *folder, *command)
    assert submitted.returncode == 0, submitted.stderr
    sweeps.await_steps("001-0", 3)
    stopped = head.job("stop", "first")
    assert stopped.returncode == 0, stopped.stderr
    await_status(head, "first", {"stopped"})
    await_(lambda: not sweeps_is_driven(sweeps), 30, "the driver's end")
    kept = computed(sweeps.root, "001-0")
    assert sweeps.state()["state"] == "stopped", "drained, not killed"
    sweeps.steer("slow", "0.0")
    assert head.job("submit", "--submission-id", "second", *folder, *command).returncode == 0
    assert await_status(head, "second", {"succeeded", "failed"}) == "succeeded", head.job("logs", "second").stdout
    assert sweeps.state()["state"] == "finished"
    assert {s["state"] for s in sweeps.summaries().values()} == {"finished"}
    steps = [step for _, step in computed(sweeps.root, "001-0")]
    assert steps == list(range(1, 21)), f"nothing was computed twice ({len(kept)} before the stop)"


def sweeps_is_driven(sweeps: Sweeps) -> bool:
    _, output = sweeps.call("status", "small", "--json")
    return bool(json.loads(output)["state"] == "running")


def test_the_wrapper_finds_token_commit_and_home_by_itself(head: Head, study: StudyWriter, sweeps: Sweeps) -> None:
    sweeps.environment["HOME"] = head.environment["HOME"]
    path = study(seeds=[0], base=quick(study))
    began = time.monotonic()
    code, output = sweeps.call("submit", path, "--address", head.address, "--wait", timeout=240)
    assert code == 0, output
    assert "finished: " in output, output
    assert "on 2 workers" in output, "half a GPU each, though there are four cores"
    assert f"MLflow: sqlite:///{sweeps.environment['MOELAB_HOME']}/mlflow.db" in output
    assert sweeps.state()["state"] == "finished"
    about = json.loads((sweeps.root / "runs" / "000-0" / "run.json").read_text())
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False, cwd=REPOSITORY
    ).stdout.strip()
    assert about["commit"] == (commit or "unknown"), "there is no .git where a job runs"
    assert time.monotonic() - began < 240


def quick(study: StudyWriter) -> dict[str, object]:
    base: dict[str, object] = yaml.safe_load(study().read_text())["base"]
    base["training"] = {"train_tokens": 512, "batch_size": 4, "validation_tokens": 256, "record_every": 2}
    return base


def test_a_dashboard_that_is_not_there_is_said_with_a_remedy(study: StudyWriter, sweeps: Sweeps) -> None:
    code, output = sweeps.call("submit", study(), "--address", f"http://127.0.0.1:{free_port()}")
    assert code == 1
    assert "no Ray cluster answers" in output
    assert "ray start --head" in output


def test_the_doctor_knows_the_token_of_a_real_head(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", head.environment["HOME"])
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    right = list(ray_authentication(head.address))[-1]
    assert (right.level, "takes this one" in right.sentence) == ("ok", True), right
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    wrong = list(ray_authentication(head.address))[-1]
    assert (wrong.level, "refuses the token" in wrong.sentence) == ("problem", True), wrong
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", "/nonexistent")
    assert any("asks for a token, and there is none" in f.sentence for f in ray_authentication(head.address))
