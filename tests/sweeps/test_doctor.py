"""`doctor` finds what is really wrong: ports that are taken, stores that are dead, tokens that do not fit, homes that cannot be written."""

import http.server
import json
import os
import resource
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sweeps import doctor, doctor_services
from sweeps.__main__ import app
from sweeps.findings import OK, PROBLEM, WARNING, Finding


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No Ray and no store but what a test says."""
    for name in list(os.environ):
        if name.startswith(("RAY_", "MLFLOW_", "MOELAB_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "cache"))


def one(findings: Iterator[Finding]) -> Finding:
    found = list(findings)
    assert len(found) == 1, found
    return found[0]


@contextmanager
def serving(answers: dict[str, tuple[int, str]], seen: list[dict[str, str]] | None = None, date: str | None = None) -> Iterator[str]:
    """A real HTTP server with these answers; any other path is 404."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if seen is not None:
                seen.append({"path": self.path, **{k.lower(): v for k, v in self.headers.items()}})
            code, body = answers.get(self.path, (404, ""))
            if self.path == "/api/version" and self.headers.get("Authorization") != "Bearer right":
                code, body = 403, "Forbidden: Invalid authentication token"
            self.send_response_only(code)
            self.send_header("Date", date or self.date_time_string())
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def listening() -> Iterator[int]:
    """A port on which somebody listens and never answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield int(taken.getsockname()[1])


def test_a_port_that_is_taken_is_found_with_its_user() -> None:
    with listening() as port:
        found = doctor_services.port_finding(port, "Ray's head", "ray start --head --port=6380", ("gcs_server",))
        assert found.level == WARNING
        assert f"process {os.getpid()} (" in found.sentence
        assert "--port=6380" in found.remedy
        assert doctor_services.port_finding(port, "it", "other", ("pytest", "python")).level == OK, "used by whom it is meant for"
    assert doctor_services.port_finding(port, "Ray's head", "x", ("gcs_server",)).level == OK


def test_a_tracker_that_is_dead_or_mute_is_found_within_its_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    dead = one(doctor_services.tracker())
    assert dead.level == PROBLEM
    assert "refused" in dead.sentence
    with listening() as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        began = time.monotonic()
        mute = one(doctor_services.tracker(1.0))
        assert mute.level == PROBLEM
        assert time.monotonic() - began < 3.0
        assert "within 1 s" in mute.sentence


def test_a_tracking_server_that_answers_is_in_order_and_its_clock_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({"/health": (200, "OK")}) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert one(doctor_services.tracker()).level == OK
    with serving({"/health": (200, "OK")}, date="Tue, 01 Jan 2030 00:00:00 GMT") as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert [(f.level, f.subject) for f in doctor_services.tracker()] == [(OK, "MLflow"), (WARNING, "clock")]
    with serving({}) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert "status 404" in one(doctor_services.tracker()).sentence


def test_a_database_that_is_none_or_is_locked_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "store.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
    assert "will be made" in one(doctor_services.tracker()).sentence
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
    connection.commit()
    assert one(doctor_services.tracker()).level == OK
    connection.execute("BEGIN EXCLUSIVE")
    locked = one(doctor_services.tracker())
    connection.rollback()
    connection.close()
    assert (locked.level, "locked" in locked.sentence) == (PROBLEM, True)
    file.write_text("this is no database, and long enough to be seen as none" * 40)
    assert one(doctor_services.tracker()).level == PROBLEM
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    assert "no longer in plain files" in one(doctor_services.tracker()).sentence


def test_a_home_that_cannot_be_written_is_found_and_nothing_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = one(doctor.directory("studies", tmp_path / "file" / "home", "MOELAB_HOME"))
    assert found.level == PROBLEM
    assert "export MOELAB_HOME=" in found.remedy
    assert one(doctor.directory("studies", tmp_path / "new" / "home", "MOELAB_HOME")).level in (OK, WARNING)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_little_room_and_another_clock_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 0.2e9, "total": 1e9})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert one(doctor.directory("studies", tmp_path, "MOELAB_HOME")).level == PROBLEM
    usage.free = 5e9  # type: ignore[attr-defined]
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 60)
    found = list(doctor.directory("studies", tmp_path, "MOELAB_HOME"))
    assert [(f.level, f.subject) for f in found] == [(WARNING, "studies"), (WARNING, "clock")]
    assert "by 60 s" in found[1].sentence


def test_versions_out_of_range_are_each_named_with_the_command_that_mends_them() -> None:
    found = list(doctor.versions(["numpy>=99", "no-such-package>=1", "filelock>=3", "winonly>=1; sys_platform == 'win32'", "x; extra == 'dev'"]))
    assert [(f.level, f.sentence.split(":")[0]) for f in found] == [(PROBLEM, "numpy"), (PROBLEM, "no-such-package")]
    assert found[0].remedy == "pip install 'numpy>=99'"
    assert one(doctor.versions(["filelock>=3"])).level == OK
    requirements, python = doctor._requirements()
    assert any(text.startswith("mlflow") for text in requirements)
    assert python


def smi(folder: Path, script: str) -> None:
    """A stand-in for the driver's own tool, found on PATH."""
    folder.mkdir(exist_ok=True)
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_a_card_that_torch_cannot_use_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    subject = doctor.Subject(study=None, address="")
    smi(tmp_path / "bin", "echo NVIDIA H100; echo NVIDIA H100")
    monkeypatch.setattr(torch.version, "cuda", None)
    cpu_only = one(doctor._gpu(subject))
    assert (cpu_only.level, "built for the CPU alone" in cpu_only.sentence) == (PROBLEM, True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    old = one(doctor._gpu(subject))
    assert (old.level, "for CUDA 13.0 cannot use it" in old.sentence) == (PROBLEM, True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert one(doctor._gpu(subject)).level == WARNING
    smi(tmp_path / "bin", "echo 'Failed to initialize NVML: Driver/library version mismatch' >&2; exit 18")
    broken = one(doctor._gpu(subject))
    assert (broken.level, "version mismatch" in broken.sentence) == (PROBLEM, True)


def test_rays_modes_and_tokens_that_do_not_fit_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nowhere = doctor_services.DASHBOARD
    monkeypatch.setattr(doctor_services, "_cluster", lambda address, mode, token: iter(()))
    monkeypatch.setenv("RAY_AUTH_MODE", "tokens")
    assert "Ray knows disabled and token" in one(doctor_services.ray_authentication(nowhere)).sentence
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    missing = one(doctor_services.ray_authentication(nowhere))
    assert (missing.level, missing.remedy) == (PROBLEM, "ray get-auth-token --generate")
    file = tmp_path / "user" / ".ray" / "auth_token"
    file.parent.mkdir(parents=True)
    file.write_text("right")
    file.chmod(0o600)
    assert one(doctor_services.ray_authentication(nowhere)).level == OK
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert "`ray job` does not send it" in one(doctor_services.ray_authentication(nowhere)).sentence
    file.chmod(0o644)
    assert [f.remedy for f in doctor_services.ray_authentication(nowhere)][1] == f"chmod 600 {file}"
    assert stat.S_IMODE(file.stat().st_mode) == 0o644, "nothing is changed"


def test_what_a_cluster_asks_for_is_compared_with_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def last(address: str) -> Finding:
        return list(doctor_services.ray_authentication(address))[-1]

    seen: list[dict[str, str]] = []
    asking = {"/api/authentication_mode": (200, '{"authentication_mode": "token"}'), "/api/version": (200, "{}")}
    with serving(asking, seen) as address:
        assert (last(address).level, "there is none here" in last(address).sentence) == (PROBLEM, True)
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
        assert (last(address).level, "refuses the token" in last(address).sentence) == (PROBLEM, True)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
        assert last(address).level == OK
    assert all("authorization" not in request for request in seen if request["path"] == "/api/authentication_mode")
    with serving({"/api/authentication_mode": (200, '{"authentication_mode": "disabled"}')}) as address:
        assert (last(address).level, "has it off" in last(address).sentence) == (WARNING, True)
    assert last("http://127.0.0.1:9").level == PROBLEM, "an address that was named and does not answer"


def test_nodes_that_do_not_see_the_home_are_named(tmp_path: Path) -> None:
    near = {"host": "near", "word": "abc", "skew": 0.0, "package": True}
    far = {"host": "far", "word": None, "skew": -95.0, "package": False}
    stale = {"host": "stale", "word": "of another file", "skew": 0.0, "package": True}
    assert one(doctor_services.node_findings([near, near], tmp_path, "abc")).level == OK
    found = list(doctor_services.node_findings([near, far, stale], tmp_path, "abc"))
    assert [f.level for f in found] == [PROBLEM, WARNING, WARNING]
    assert "far, stale (2 of 3 nodes)" in found[0].sentence
    assert "by -95 s" in found[1].sentence


@pytest.mark.slow
def test_every_node_of_a_real_cluster_is_asked(ray_address: str, session_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(session_home))
    monkeypatch.setenv("RAY_ADDRESS", ray_address)
    found = one(doctor_services.nodes(tmp_path / "home", doctor_services.DASHBOARD))
    assert (found.level, "seen by all 1 nodes" in found.sentence) == (OK, True), found
    assert not list((tmp_path / "home").iterdir())


def test_too_few_open_files_and_a_compiler_that_fails_are_found(tmp_path: Path) -> None:
    """In a process of its own, whose limit is lowered for good."""
    code = "\n".join(
        [
            "import resource, json, sys",
            "resource.setrlimit(resource.RLIMIT_NOFILE, (512, 8192))",
            "from sweeps import doctor",
            "subject = doctor.Subject(study=None, address='')",
            "print(json.dumps([f.to_dict() for f in [*doctor._memory(subject), *doctor._compiler(subject)]]))",
        ]
    )
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 8192:
        pytest.skip("this machine allows fewer files")
    environment = {**os.environ, "CC": "/bin/false", "MOELAB_CACHE": str(tmp_path / "kernels")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, timeout=60)
    found = {f["subject"]: f for f in json.loads(done.stdout.splitlines()[-1])}
    assert (found["open files"]["level"], found["open files"]["remedy"][:14]) == (PROBLEM, "ulimit -n 8192")
    assert (found["kernels"]["level"], "plain PyTorch" in found["kernels"]["sentence"]) == (WARNING, True)


def test_the_command_reports_all_and_its_exit_code_is_that_of_the_worst(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, study: object) -> None:
    monkeypatch.setattr(doctor_services, "ports", lambda: iter(()))
    result = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(result.stdout)
    assert (result.exit_code == 0) == found["ok"]
    assert {f["subject"] for f in found["findings"]} >= {"versions", "GPU", "kernels", "studies", "cache", "open files", "MLflow", "Ray", "nodes"}
    assert all(f["remedy"] for f in found["findings"] if f["level"] != OK)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    path = study(seeds=[], resources={"workers": 1000})  # type: ignore[operator]
    result = CliRunner().invoke(app, ["doctor", str(path)])
    assert result.exit_code == 1
    text = " ".join(result.stdout.split())
    assert "seeds = []" in text
    assert "127.0.0.1:9" in text
    right = study(resources={"workers": 1000})  # type: ignore[operator]
    found = json.loads(CliRunner().invoke(app, ["doctor", str(right), "--json"]).stdout)["findings"]
    assert any("resources.workers = 1000" in f["sentence"] for f in found if f["level"] == PROBLEM)
