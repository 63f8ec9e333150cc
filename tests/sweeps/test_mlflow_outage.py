"""A real MLflow server with a database that is killed while a study runs: training goes on, and nothing is missing afterwards."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import STANDIN, Sweeps, await_, end
from mlflow import MlflowClient
from mlflow.entities import Run

from sweeps import schema
from sweeps.ui import QUIET

pytestmark = pytest.mark.slow

IMPATIENT = "import sweeps.driver, sweeps.tracking; sweeps.driver.SYNC_SECONDS, sweeps.tracking.RETRY_SECONDS = 1.0, 2.0; "
IMPATIENT += "from sweeps.__main__ import main; main()"
"""`python -m sweeps`, but for how long it waits before it asks the server again."""


class Server:
    """`mlflow server` on a port and a database that survive its death."""

    def __init__(self, folder: Path, environment: dict[str, str], empty_store: Path) -> None:
        shutil.copy(empty_store, folder / "server.db")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.database = f"sqlite:///{folder / 'server.db'}"
        store = ["--backend-store-uri", self.database, "--artifacts-destination", str(folder / "artifacts")]
        self._command = [sys.executable, "-m", "mlflow", "server", *store, "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        self._environment = {**environment, **QUIET}
        self.start()

    def start(self) -> None:
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(self._command, env=self._environment, stdout=quiet, stderr=quiet, start_new_session=True)
        await_(self._answers, 120, "mlflow server")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _answers(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0


def test_a_server_that_is_killed_and_comes_back_has_everything_once(
    sweeps: Sweeps, study: Callable[..., Path], tmp_path: Path, empty_store: Path
) -> None:
    server = Server(tmp_path, sweeps.environment, empty_store)
    try:
        sweeps.environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{server.port}"
        sweeps.steer("slow", "0.5")
        log = tmp_path / "output"
        with log.open("w") as file:
            command = [sys.executable, "-c", IMPATIENT, "run", str(study(seeds=[0])), "--executor", "inline", "--function", STANDIN]
            driver = subprocess.Popen(command, env=sweeps.environment, stdout=file, stderr=subprocess.STDOUT)
        client = MlflowClient(server.database)
        await_(lambda: _records(client, "0") > 0, 90, "the first records in MLflow", every=1.0)
        server.kill()
        await_(lambda: "MLflow cannot be reached" in log.read_text(), 60, "the driver's noticing")
        assert driver.poll() is None
        sweeps.await_steps("001-0", 1)  # training goes on meanwhile
        sweeps.steer("slow", "5")  # so that it is not over before the server is there, which takes longest on a busy machine
        server.start()
        sweeps.steer("slow", "0.02")
        assert driver.wait(120) == 0, log.read_text()
        assert sweeps.state()["mlflow_behind"] is None, log.read_text()
        runs = {r.data.tags[schema.TAG_TRIAL]: r for r in _runs(client) if r.data.tags[schema.TAG_ROLE] == "run"}
        assert sorted(runs) == ["0", "1", "2"]
        assert {r.info.status for r in runs.values()} == {"FINISHED"}
        for run in runs.values():
            history = client.get_metric_history(run.info.run_id, schema.LOSS)
            assert sorted(metric.step for metric in history) == list(range(1, 21)), "every record once"
    finally:
        end(server.process)


def _runs(client: MlflowClient) -> list[Run]:
    experiments = [e.experiment_id for e in client.search_experiments() if e.name != "Default"]
    return list(client.search_runs(experiments)) if experiments else []


def _records(client: MlflowClient, trial: str) -> int:
    runs = [r for r in _runs(client) if r.data.tags.get(schema.TAG_TRIAL) == trial]
    return len(client.get_metric_history(runs[0].info.run_id, schema.LOSS)) if runs else 0
