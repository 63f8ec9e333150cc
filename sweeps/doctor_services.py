"""What `doctor` asks of servers: the tracking store, ports, Ray's authentication and Ray's nodes; each within a time limit."""

import json
import os
import secrets
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from sweeps.findings import OK, PROBLEM, WARNING, Finding
from sweeps.places import tracking_uri
from sweeps.system_metrics import load_psutil

T = TypeVar("T")
DASHBOARD = "http://127.0.0.1:8265"
TRACKER_SECONDS, DASHBOARD_SECONDS, NODES_SECONDS = 5.0, 5.0, 90.0
SKEW_SECONDS = 30.0
MODES = ("disabled", "token")
OWNERS = {8265: ("ray", "dashboard"), 6379: ("gcs_server", "ray"), 5000: ("mlflow",)}
PROBE_FILE = ".moelab-doctor"


def tracker(seconds: float = TRACKER_SECONDS) -> Iterator[Finding]:
    """Whether runs can be recorded in the tracking store."""
    uri = tracking_uri()
    scheme = uri.partition(":")[0] if "://" in uri else ""
    if scheme in ("http", "https"):
        yield from _tracking_server(uri, seconds)
    elif scheme == "sqlite":
        yield from _sqlite(uri, Path(uri.removeprefix("sqlite:///")))
    elif scheme.partition("+")[0] in ("postgresql", "mysql", "mssql"):
        yield from _database(uri, seconds)
    elif scheme in ("", "file"):
        remedy = "export MLFLOW_TRACKING_URI=sqlite:////a/path/mlflow.db, or unset it"
        yield Finding(PROBLEM, "MLflow", f"MLFLOW_TRACKING_URI = {uri!r}: MLflow records in a database or a server, no longer in plain files", remedy)
    else:
        yield Finding(WARNING, "MLflow", f"MLFLOW_TRACKING_URI = {uri!r}: such a store is not looked into", "try it with a short study")


def _tracking_server(uri: str, seconds: float) -> Iterator[Finding]:
    remedy = "start it (`mlflow server`), mend MLFLOW_TRACKING_URI, or unset it; a study would run all the same and send everything later"
    try:
        status, _, headers = within(seconds, lambda: get(f"{uri.rstrip('/')}/health", seconds))
    except (OSError, ValueError) as error:
        yield Finding(PROBLEM, "MLflow", f"{uri}: does not answer within {seconds:.0f} s ({_reason(error)})", remedy)
        return
    if status != 200:
        yield Finding(PROBLEM, "MLflow", f"{uri}: answers with status {status} to /health", remedy)
        return
    yield Finding(OK, "MLflow", f"{uri}: answers")
    if headers.get("date"):
        skew = abs(parsedate_to_datetime(headers["date"]).timestamp() - time.time())
        if skew > SKEW_SECONDS:
            yield Finding(WARNING, "clock", f"{uri}: its clock differs from this machine's by {skew:.0f} s", "set both by NTP (chrony, timesyncd)")


def _sqlite(uri: str, path: Path) -> Iterator[Finding]:
    if not path.exists():
        yield Finding(OK, "MLflow", f"{uri}: will be made by the first run")
        return
    try:
        connection = sqlite3.connect(path, timeout=2.0)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("SELECT version_num FROM alembic_version")
            connection.rollback()
        finally:
            connection.close()
    except sqlite3.Error as error:
        remedy = (
            "end the process that locks it"
            if "locked" in str(error)
            else "put it aside (runs keep their records), or name another in MLFLOW_TRACKING_URI"
        )
        yield Finding(PROBLEM, "MLflow", f"{uri}: cannot be written ({error})", remedy)
        return
    yield Finding(OK, "MLflow", f"{uri}: can be written")


def _database(uri: str, seconds: float) -> Iterator[Finding]:
    from sqlalchemy import create_engine  # noqa: PLC0415
    from sqlalchemy.engine import make_url  # noqa: PLC0415

    shown = make_url(uri).render_as_string(hide_password=True)
    try:
        within(seconds, lambda: create_engine(uri).connect().close())
    except ModuleNotFoundError as error:
        yield Finding(PROBLEM, "MLflow", f"{shown}: needs the package {error.name}", f"pip install {error.name}")
    except Exception as error:  # SQLAlchemy's, the driver's, or the time limit
        yield Finding(
            PROBLEM, "MLflow", f"{shown}: cannot be reached within {seconds:.0f} s ({_reason(error)})", "start it, or mend MLFLOW_TRACKING_URI"
        )
    else:
        yield Finding(OK, "MLflow", f"{shown}: answers")


def ports() -> Iterator[Finding]:
    """The ports of Ray's dashboard and head and of MLflow's pages: free, or by whom they are used."""
    local = urlsplit(tracking_uri())
    pages = local.port if local.scheme == "http" and local.hostname in ("127.0.0.1", "localhost") and local.port else 5000
    remedies = {8265: "ray start --head --dashboard-port=8266", 6379: "ray start --head --port=6380", pages: "python -m sweeps ui --port 5001"}
    names = {8265: "Ray's dashboard", 6379: "Ray's head", pages: "MLflow's pages"}
    for port, name in names.items():
        yield port_finding(port, name, remedies[port], OWNERS.get(port, OWNERS[5000]))


def port_finding(port: int, name: str, remedy: str, owners: tuple[str, ...]) -> Finding:
    """`owners`: words of the command lines of those for whom the port is meant."""
    if _is_free(port):
        return Finding(OK, "ports", f"{port}, of {name}, is free")
    user = _user_of(port)
    if user is not None and any(word in user.lower() for word in owners):
        return Finding(OK, "ports", f"{port}, of {name}, is used by it: {user}")
    return Finding(WARNING, "ports", f"{port}, of {name}, is used by {user or 'a process that this user may not see'}", f"end that, or {remedy}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def _user_of(port: int) -> str | None:
    """`process 123 (its command line)`, where this user may see it."""
    psutil = load_psutil()
    try:
        listening = [c for c in psutil.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port and c.pid]
        process = psutil.Process(listening[0].pid)
        return f"process {process.pid} ({' '.join(process.cmdline())[:80] or process.name()})"
    except (psutil.Error, IndexError):
        return None


def ray_authentication(address: str) -> Iterator[Finding]:
    """Ray's mode and token in this shell, and whether a cluster that runs at `address` (its dashboard's) takes them."""
    given, token, place = os.environ.get("RAY_AUTH_MODE"), ray_token(), _token_file()
    mode = given.lower() if given else None
    if mode is not None and mode not in MODES:
        yield Finding(PROBLEM, "Ray", f"RAY_AUTH_MODE = {given!r}: Ray knows {' and '.join(MODES)}", "export RAY_AUTH_MODE=token, or unset it")
        return
    if mode == "token" and token is None:
        yield Finding(PROBLEM, "Ray", f"RAY_AUTH_MODE=token, but there is no token in RAY_AUTH_TOKEN or {place}", "ray get-auth-token --generate")
    elif token is not None and mode is None and place.exists():
        remedy = "export RAY_AUTH_MODE=token (`sweeps submit` does so itself), or RAY_AUTH_MODE=disabled"
        yield Finding(WARNING, "Ray", f"{place} is there: `ray start` asks every client for it, and `ray job` does not send it by itself", remedy)
    else:
        yield Finding(OK, "Ray", f"authentication: {mode or 'not asked for'}{', with a token' if token else ''}")
    if place.exists() and stat.S_IMODE(place.stat().st_mode) & 0o077:
        yield Finding(WARNING, "Ray", f"{place}: others on this machine can read it", f"chmod 600 {place}")
    yield from _cluster(address, mode, token)


def _cluster(address: str, mode: str | None, token: str | None) -> Iterator[Finding]:
    try:
        status, body, _ = within(DASHBOARD_SECONDS, lambda: get(f"{address.rstrip('/')}/api/authentication_mode", DASHBOARD_SECONDS))
    except (OSError, ValueError) as error:
        named = address != DASHBOARD
        sentence = f"no Ray dashboard answers at {address} ({_reason(error)})"
        if named:
            yield Finding(PROBLEM, "Ray", sentence, "start it (`ray start --head`), or mend the address")
        else:
            yield Finding(OK, "Ray", f"{sentence}; `run` starts a Ray of its own, `submit` needs `ray start --head`")
        return
    asks = status == 200 and json.loads(body or "{}").get("authentication_mode") == "token"
    if not asks:
        yield Finding(OK, "Ray", f"the cluster at {address} asks for no token")
        if mode == "token":
            yield Finding(
                WARNING, "Ray", "RAY_AUTH_MODE=token here, but that cluster has it off", "unset RAY_AUTH_MODE, or start the cluster anew with it"
            )
        return
    if token is None:
        remedy = "copy the head's ~/.ray/auth_token here, or export RAY_AUTH_TOKEN; then RAY_AUTH_MODE=token"
        yield Finding(PROBLEM, "Ray", f"the cluster at {address} asks for a token, and there is none here", remedy)
        return
    status, _, _ = get(f"{address.rstrip('/')}/api/version", DASHBOARD_SECONDS, {"Authorization": f"Bearer {token}"})
    if status in (401, 403):
        yield Finding(
            PROBLEM,
            "Ray",
            f"the cluster at {address} refuses the token of this shell",
            "take that of the machine on which `ray start --head` was typed",
        )
    elif mode == "token":
        yield Finding(OK, "Ray", f"the cluster at {address} asks for a token and takes this one")
    else:
        yield Finding(WARNING, "Ray", f"the cluster at {address} asks for the token that is here", "export RAY_AUTH_MODE=token for `ray job`")


def ray_token() -> str | None:
    """The token that Ray would send: $RAY_AUTH_TOKEN, else that of $RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token."""
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given.strip()
    try:
        return _token_file().read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _token_file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def nodes(home: Path, address: str) -> Iterator[Finding]:
    """Of a cluster of several nodes: whether every one sees the studies' directory, its clock, and whether it has this package."""
    if not os.environ.get("RAY_ADDRESS"):
        yield Finding(OK, "nodes", "RAY_ADDRESS names no cluster: studies run on this machine alone")
        return
    probe = home / PROBE_FILE
    word = secrets.token_hex(8)
    try:
        home.mkdir(parents=True, exist_ok=True)
        probe.write_text(word, encoding="utf-8")
        answer = _ask_nodes(probe)
    except OSError as error:
        yield Finding(PROBLEM, "nodes", f"{probe}: cannot be written ({error.strerror})", "export MOELAB_HOME=/a/directory/of/yours")
        return
    finally:
        probe.unlink(missing_ok=True)
    if isinstance(answer, str):
        place = os.environ["RAY_ADDRESS"]
        yield Finding(
            PROBLEM, "nodes", f"RAY_ADDRESS = {place!r}: no cluster can be asked there ({answer})", "mend or unset RAY_ADDRESS, or start the cluster"
        )
        return
    yield from node_findings(answer, home, word)


def node_findings(answers: list[Mapping[str, Any]], home: Path, word: str) -> Iterator[Finding]:
    """From what each node said of itself; see `doctor_nodes`."""
    blind = [a["host"] for a in answers if a["word"] != word]
    if blind:
        remedy = "let MOELAB_HOME (and MOELAB_CACHE) lie on storage that every node has mounted at the same path"
        yield Finding(PROBLEM, "nodes", f"{home}: is not seen, as it is here, by {', '.join(blind)} ({len(blind)} of {len(answers)} nodes)", remedy)
    else:
        yield Finding(OK, "nodes", f"{home}: is seen by all {len(answers)} nodes")
    for a in answers:
        if abs(a["skew"]) > SKEW_SECONDS:
            yield Finding(
                WARNING, "clock", f"node {a['host']}: its clock differs from this machine's by {a['skew']:.0f} s", "set it by NTP (chrony, timesyncd)"
            )
        if not a["package"]:
            yield Finding(
                WARNING, "nodes", f"node {a['host']}: cannot import sweeps", "install moelab there, or use `python -m sweeps submit`, which sends it"
            )


def _ask_nodes(probe: Path) -> list[Mapping[str, Any]] | str:
    """In a process of its own, which can be ended: a cluster that is half dead keeps its clients waiting for ever."""
    command = [sys.executable, "-m", "sweeps.doctor_nodes", str(probe)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NODES_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"not within {NODES_SECONDS:.0f} s"
    if done.returncode:
        said = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return said[-1][:300] if said else f"exit code {done.returncode}"
    found: list[Mapping[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def get(url: str, seconds: float, headers: Mapping[str, str] | None = None) -> tuple[int, str, Mapping[str, str]]:
    """Status, body and headers (by lower-case names) of a GET; OSError where nothing answers."""
    try:
        with urlopen(Request(url, headers=dict(headers or {})), timeout=seconds) as response:
            return response.status, response.read().decode(errors="replace"), {k.lower(): v for k, v in response.headers.items()}
    except HTTPError as error:
        return error.code, error.read().decode(errors="replace"), {k.lower(): v for k, v in error.headers.items()}


def within(seconds: float, ask: Callable[[], T]) -> T:
    """What `ask` gives, or raises; TimeoutError after so many seconds, however it waits (names are looked up without a limit)."""
    found: list[T] = []
    failed: list[BaseException] = []

    def call() -> None:
        try:
            found.append(ask())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError("timed out")
    if failed:
        raise failed[0]
    return found[0]


def _reason(error: BaseException) -> str:
    inner = error.reason if isinstance(error, URLError) else error
    text = str(inner).strip().splitlines()
    return (text[0] if text else type(inner).__name__)[:160]
