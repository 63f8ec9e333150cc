"""MLflow's pages, and Optuna's, on what studies recorded."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from research.errors import UserError
from sweeps import schema
from sweeps.places import tracking_uri

HOST = "127.0.0.1"
QUIET = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
"""MLflow's server starts eight more processes, half a minute of a core's work, for judging answers of language models, which is not done here."""


def mlflow_command(port: int) -> list[str]:
    """The command that serves the store; UserError if nothing has been recorded, or if the store is a server with pages of its own."""
    uri = tracking_uri()
    if uri.startswith(("http://", "https://")):
        raise UserError(f"MLFLOW_TRACKING_URI = {uri!r}: is a server, whose pages are at that address already")
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise UserError(f"{uri}: nothing has been recorded yet; `make ablation` does")
    _refuse_taken(port, "--port")
    # One process of the server's is plenty for a person, and four do not fit on a small machine.
    return [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", HOST, "--port", str(port), "--workers", "1"]


def optuna_command(root: Path, port: int) -> list[str]:
    """The command that serves a study's search; UserError if there is none, or no optuna-dashboard."""
    journal = root / schema.JOURNAL_FILE
    if not journal.exists():
        raise UserError(f"{root}: holds no search to show (no {schema.JOURNAL_FILE}); `python -m sweeps run` makes it")
    if importlib.util.find_spec("optuna_dashboard") is None:
        raise UserError("--optuna: optuna-dashboard is not installed here; `pip install optuna-dashboard` into this environment brings it")
    _refuse_taken(port, "--optuna-port")
    serve = "import sys; from optuna_dashboard._cli import main; sys.argv[0] = 'optuna-dashboard'; main()"
    return [sys.executable, "-c", serve, str(journal), "--storage-class", "JournalFileStorage", "--host", HOST, "--port", str(port), "--quiet"]


def serve(commands: list[list[str]]) -> int:
    """Run servers until one of them ends, or until Ctrl-C or a SIGTERM ends them all; 0 after those, else the code of the one that ended."""
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    # In sessions of their own, so that Ctrl-C reaches them once, from here.
    servers = [subprocess.Popen(command, start_new_session=True, env={**QUIET, **os.environ}) for command in commands]
    try:
        while not stopped and all(server.poll() is None for server in servers):
            time.sleep(0.2)
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            _end(server)
        for number, handler in previous.items():
            signal.signal(number, handler)
    codes = [server.returncode for server in servers if server.returncode not in (0, -signal.SIGTERM, None)]
    return 0 if stopped or not codes else 1


def _end(server: "subprocess.Popen[bytes]") -> None:
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _refuse_taken(port: int, option: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"{option} = {port}: cannot be served on ({error.strerror}); `python -m sweeps doctor` says by whom it is used; give another"
            ) from error
