"""The commands of `python -m sweeps` that only read or write files: init, check, export, retry, stop, ui, and their help."""

import json
import math
import os
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.csv
import pyarrow.parquet
import pytest
import typer
from conftest import STANDIN, Sweeps, await_
from roots import METRIC, write_root
from typer.testing import CliRunner

from research.errors import UserError
from sweeps import schema
from sweeps.__main__ import app, main
from sweeps.jobs import Job
from sweeps.study import load_study
from sweeps.ui import mlflow_command, optuna_command

StudyWriter = Callable[..., Path]
COMMANDS = ("init", "check", "plan", "run", "submit", "status", "stop", "resume", "retry", "ui", "export", "doctor")


def invoke(*arguments: object) -> tuple[int, str, str]:
    """Exit code, what was printed, and the sentences of a UserError, as the door would print them."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if isinstance(result.exception, UserError):
        return 1, result.stdout, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_of_itself(command: str) -> None:
    group: Any = typer.main.get_command(app)
    text = " ".join((group.commands[command].help or "").split())
    example = re.search(r"Example: python -m sweeps (\S+)(.*)", text)
    assert example is not None
    assert example[1] == command
    options = {option for parameter in group.commands[command].params for option in parameter.opts}
    assert {word for word in example[2].split() if word.startswith("--")} <= options, "the example uses options that there are"


@pytest.mark.parametrize("command", [c for c in (*COMMANDS, "workers") if c != "ui"])
def test_what_a_script_would_read_comes_as_json_too(command: str) -> None:
    group: Any = typer.main.get_command(app)
    assert "--json" in {option for parameter in group.commands[command].params for option in parameter.opts}


def test_mistakes_come_as_json_where_that_is_asked_for(
    study: StudyWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = study(seeds=[])
    for arguments in (["run", str(path)], ["plan", str(path)], ["status", str(tmp_path / "nothing")]):
        said = {}
        for more in ([], ["--json"]):
            monkeypatch.setattr(sys, "argv", ["sweeps", *arguments, *more])
            with pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code == 1
            said[bool(more)] = capsys.readouterr()
        assert said[False].out == ""
        assert said[True].err == said[False].err
        assert json.loads(said[True].out) == {"ok": False, "problems": said[False].err.splitlines()}


def test_a_jobs_output_goes_where_it_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    class Client:
        async def tail_job_logs(self, submission: str) -> AsyncIterator[str]:
            yield f"{submission} says\n"

        def get_job_info(self, submission: str) -> SimpleNamespace:
            return SimpleNamespace(driver_exit_code=3)

    assert Job(Client(), "job").follow(sys.stderr) == 3
    assert tuple(capsys.readouterr()) == ("", "job says\n")


def test_init_writes_a_study_that_is_right_and_never_overwrites(tmp_path: Path) -> None:
    code, output, _ = invoke("init", "latent", "--folder", tmp_path)
    assert code == 0
    path = tmp_path / "latent.yaml"
    assert str(path) in output
    study = load_study(path)
    assert study.name == "latent"
    assert f"sweeps run {path}" in path.read_text()
    assert "{name}" not in path.read_text()
    comments = [line for line in path.read_text().splitlines() if "#" in line]
    assert len(comments) > 20
    path.write_text("mine")
    code, _, error = invoke("init", "latent", "--folder", tmp_path)
    assert code == 1
    assert "is there already" in error
    assert path.read_text() == "mine"
    assert invoke("init", "--folder", tmp_path, "--", "-latent")[0] == 1
    code, _, error = invoke("init", "a/b", "--folder", tmp_path)
    assert code == 1
    assert "NAME = 'a/b'" in error
    assert json.loads(invoke("init", "third", "--folder", tmp_path, "--json")[1])["file"] == str(tmp_path / "third.yaml")


def test_check_says_the_same_in_words_and_as_json(study: StudyWriter, tmp_path: Path) -> None:
    path = study()
    assert json.loads(invoke("check", path, "--json")[1])["ok"] is True
    path.write_text(path.read_text().replace("seeds:", "seed:").replace("one-factor", "one-fact"))
    code, output, _ = invoke("check", path, "--json")
    found = json.loads(output)
    code_in_words, _, sentences = invoke("check", path)
    assert (code, code_in_words, found["ok"]) == (1, 1, False)
    assert "\n".join(found["problems"]) == sentences
    assert len(found["problems"]) >= 2
    assert invoke("check", tmp_path / "none.yaml")[0] == 2, "a file that is not there is wrong usage"
    assert invoke("check", path, "--nonsense")[0] == 2


RUNS = {
    "000-0": {"state": "finished", "value": 2.5, "parameters": {"a.limit": 3, "a.kind": "mla", "a.mixed": None}},
    "001-0": {
        "state": "diverged",
        "metrics": {METRIC: math.inf},
        "reason": 'loss,\n"nan"',
        "parameters": {"a.limit": 2.5, "a.kind": "mha", "a.mixed": 4},
    },
    "002-0": {"state": "failed", "failure": "died", "reason": "gone", "attempts": 3, "parameters": {"a.limit": 8, "a.kind": "mla", "a.mixed": "x"}},
    "010-0": {"state": "running", "tokens": 300, "parameters": {"a.limit": 1, "a.kind": "mla", "a.mixed": True}},
}


def test_export_has_a_row_per_run_in_every_format(tmp_path: Path) -> None:
    root = write_root(tmp_path / "s", RUNS)
    for name in ("t.csv", "t.parquet", "t.json"):
        assert invoke("export", root, "--out", tmp_path / name)[0] == 0
    rows = json.loads((tmp_path / "t.json").read_text())
    assert [row["run"] for row in rows] == ["000-0", "001-0", "002-0", "010-0"]
    assert [row["state"] for row in rows] == ["finished", "diverged", "failed", "waiting"]
    assert [row["class"] for row in rows] == [None, "diverged", "died", None]
    assert [row[METRIC] for row in rows] == [2.5, None, None, None], "what is not a number is null in JSON, and what is missing stays missing"
    assert rows[2]["attempts"] == 3
    table = pyarrow.parquet.read_table(tmp_path / "t.parquet")
    assert table.column_names == list(rows[0])
    assert table.column(METRIC).to_pylist() == [2.5, math.inf, None, None]
    assert table.column("a.limit").to_pylist() == [3.0, 2.5, 8.0, 1.0]
    assert table.column("a.mixed").to_pylist() == [None, "4", "x", "true"], "one type per column"
    comma = pyarrow.csv.read_csv(tmp_path / "t.csv", parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True))
    assert comma.column_names == list(rows[0])
    assert comma.column("reason").to_pylist()[1] == 'loss,\n"nan"'
    assert invoke("export", root, "--json")[1] == (tmp_path / "t.json").read_text()
    assert invoke("export", root)[1] == (tmp_path / "t.csv").read_text()


@pytest.mark.parametrize("name", ["c.csv", "c.parquet", "c.json"])
def test_export_of_curves_has_a_row_per_record_and_metric(tmp_path: Path, name: str) -> None:
    root = write_root(tmp_path / "s", RUNS)
    with (root / "runs" / "010-0" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tok')  # a line that is being written
    assert invoke("export", root, "--out", tmp_path / "t.csv", "--metrics", tmp_path / name)[0] == 0
    read = {"csv": pyarrow.csv.read_csv, "parquet": pyarrow.parquet.read_table}.get(name[2:])
    rows = read(tmp_path / name).to_pylist() if read else json.loads((tmp_path / name).read_text())
    losses = [(row["run"], row["step"], row["value"]) for row in rows if row["metric"] == schema.LOSS]
    assert losses == [(run, s, 3.0 / s) for run, steps in (("000-0", 10), ("001-0", 10), ("002-0", 10), ("010-0", 3)) for s in range(1, steps + 1)]
    assert len(rows) == 2 * len(losses)


def test_export_refuses_what_it_cannot_write_and_leaves_no_half(tmp_path: Path) -> None:
    root = write_root(tmp_path / "s", RUNS)
    code, _, error = invoke("export", root, "--out", tmp_path / "t.xlsx")
    assert code == 1
    assert "valid: csv, parquet, json" in error
    assert invoke("export", root, "--format", "parquet")[0] == 2
    code, _, error = invoke("export", root, "--out", tmp_path)
    assert code == 1
    code, _, error = invoke("export", tmp_path / "nowhere")
    assert code == 1
    assert "holds no runs" in error
    (root / "runs" / "000-0" / "metrics.jsonl").write_text("broken\n")
    with pytest.raises(json.JSONDecodeError):
        CliRunner().invoke(app, ["export", str(root), "--out", str(tmp_path / "t.csv"), "--metrics", str(tmp_path / "c.csv")], catch_exceptions=False)
    assert not (tmp_path / "c.csv").exists()
    assert not list(tmp_path.glob(".c.csv*"))


def test_retry_puts_back_by_class_and_by_run(tmp_path: Path) -> None:
    failed = {f"00{i}-0": {"state": "failed", "failure": kind, "reason": "x"} for i, kind in enumerate(("bug", "died", "died", "out-of-memory"))}
    root = write_root(tmp_path / "s", {**failed, "004-0": {"state": "diverged"}, "005-0": {"state": "finished", "value": 1.0}})

    def open_runs() -> list[str]:
        return sorted(p.name for p in (root / "runs").iterdir() if not (p / schema.SUMMARY_FILE).exists())

    code, output, _ = invoke("retry", root, "--class", "died", "--run", "002-0", "--json")
    assert (code, json.loads(output)["runs"], open_runs()) == (0, ["002-0"], ["002-0"])
    assert f"sweeps run {root / 'study.yaml'} --root {root}" in json.loads(output)["next"]
    assert "001-0" in invoke("retry", root, "--class", "died", "--class", "bug")[1]
    assert open_runs() == ["000-0", "001-0", "002-0"]
    assert "003-0" in invoke("retry", root)[1]
    assert open_runs() == ["000-0", "001-0", "002-0", "003-0"], "what diverged would diverge again, unless it is asked for"
    assert "nothing to put back" in invoke("retry", root)[1]
    assert "004-0" in invoke("retry", root, "--class", "all")[1]
    code, _, error = invoke("retry", root, "--class", "oom")
    assert code == 1
    assert "oom" in error
    assert "out-of-memory" in error


@pytest.mark.slow
def test_what_failed_is_put_back_and_finished_and_a_running_study_is_stopped(study: StudyWriter, sweeps: Sweeps) -> None:
    path, inline = study(seeds=[0]), ["--executor", "inline", "--function", STANDIN]
    sweeps.steer("bug", "001-0")
    code, output = sweeps.call("run", path, *inline)
    assert code == 3, output
    assert sweeps.summaries()["001-0"]["state"] == "failed"
    (sweeps.root / "bug").unlink()
    sweeps.steer("slow", "3.0")
    process = sweeps.start("retry", "small", "--class", "bug", "--run-now", *inline)
    sweeps.await_steps("001-0", 3)
    code, output = sweeps.call("stop", "small", "--wait", "--json")
    assert (code, json.loads(output)["state"]) == (0, "stopped")
    assert process.wait(30) == 143
    code, output = sweeps.call("stop", "small")
    assert (code, "is not running" in output) == (1, True)
    sweeps.steer("slow", "0.0")
    command = [sys.executable, "-m", "sweeps", "resume", str(path), *inline, "--json"]
    done = subprocess.run(command, env=sweeps.environment, capture_output=True, text=True, timeout=120, check=False)
    said = json.loads(done.stdout)
    assert (done.returncode, said["exit_code"], said["state"], said["counts"]) == (0, 0, "finished", {"finished": 3})
    assert "001-0 finished" in done.stderr
    assert {s["state"] for s in sweeps.summaries().values()} == {"finished"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_ui_refuses_what_it_cannot_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="nothing has been recorded yet"):
        mlflow_command(free_port())
    (tmp_path / "mlflow.db").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=f"--port = {taken.getsockname()[1]}: cannot be served on"):
            mlflow_command(taken.getsockname()[1])
    with pytest.raises(UserError, match=r"no study\.journal"):
        optuna_command(tmp_path, free_port())
    (tmp_path / schema.JOURNAL_FILE).touch()
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match="pip install optuna-dashboard"):
            optuna_command(tmp_path, free_port())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
    with pytest.raises(UserError, match="a server, whose pages are at that address"):
        mlflow_command(free_port())
    assert invoke("ui", "--optuna")[0] == 2


@pytest.mark.slow
def test_ui_serves_optunas_pages_and_a_signal_ends_them(tmp_path: Path, environment: dict[str, str]) -> None:
    port, journal = free_port(), tmp_path / schema.JOURNAL_FILE
    make = "import sys, optuna; from optuna.storages import JournalStorage; from optuna.storages.journal import JournalFileBackend as B\n"
    make += "optuna.create_study(study_name='small', storage=JournalStorage(B(sys.argv[1])))"
    subprocess.run([sys.executable, "-c", make, str(journal)], check=True, timeout=60)
    code = f"import sys; from pathlib import Path; from sweeps.ui import optuna_command, serve; sys.exit(serve([optuna_command(Path(sys.argv[1]), {port})]))"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=5) as response:
                return bool(json.load(response)["study_summaries"][0]["study_name"] == "small")
        except OSError:
            return False

    try:
        await_(answers, 90, "optuna-dashboard")
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
    assert not answers(), "its server went with it"
    assert os.path.exists(journal)
