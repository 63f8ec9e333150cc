"""What `status` and the live table say, of roots written by hand, and on a real terminal."""

import json
import os
import pty
import re
import resource
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import STANDIN
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from roots import METRIC, write_root
from typer.testing import CliRunner

from research.terminal import console
from sweeps import schema
from sweeps.__main__ import app
from sweeps.lease import LOCK_FILE
from sweeps.progress import View, duration, render
from sweeps.status import Reader, mean_and_error

RUNS = {
    "000-0": {"state": "finished", "value": 2.0, "seconds": 10.0},
    "000-1": {"state": "finished", "value": 2.2, "seconds": 20.0},
    "001-0": {"state": "finished", "value": 1.9, "seconds": 15.0},
    "001-1": {"state": "running", "tokens": 400},
    "002-0": {"state": "failed", "failure": "out-of-memory", "reason": "no memory\nOutOfMemory: 3 GB", "attempts": 3},
    "002-1": {"state": "diverged", "reason": "loss is nan"},
    "003-0": {"state": "waiting"},
    "003-1": {"state": "waiting"},
}


@contextmanager
def held(root: Path) -> Iterator[None]:
    """As a driver at work holds it."""
    (root / "driver.json").write_text(json.dumps({"pid": os.getpid(), "host": "here", "job": None}))
    with FileLock(root / LOCK_FILE):
        yield


def read_elsewhere(root: Path, *arguments: str) -> tuple[int, str]:
    """From another process, for which the lock counts."""
    done = subprocess.run([sys.executable, "-m", "sweeps", *arguments, str(root)], capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_a_running_study_is_counted_weighed_and_expected_to_end(tmp_path: Path) -> None:
    root = write_root(tmp_path / "mid", RUNS, state="running", planned=8, workers=2)
    status = Reader(root).read(driven=True)
    assert (status.done, status.planned, status.workers, status.state) == (5, 8, 2, "running")
    assert status.counts == {"running": 1, "waiting": 2, "finished": 3, "diverged": 1, "failed": 1}
    assert status.failures == {"diverged": 1, "out-of-memory": 1}
    best = status.best(METRIC, "minimize")
    assert best is not None
    assert (best.name, best.finished) == ("baseline", 2), "one good seed of two does not make device_limit=1 the best"
    assert best.mean == pytest.approx(2.1)
    assert best.standard_error == pytest.approx(0.1)
    # A run takes 15 s in the mean; 0.6 of one and two whole ones are left, for two workers.
    assert status.seconds_left == pytest.approx(15.0 * 2.6 / 2)
    found = status.to_dict()
    assert found["runs"]["001-1"] | {"step": 4, "share": 0.4, "state": "running"} == found["runs"]["001-1"]
    assert found["best"][METRIC]["mean"] == pytest.approx(2.1)
    assert found["runs"]["002-0"]["class"] == "out-of-memory"


def test_before_any_run_has_ended_the_speed_of_those_that_run_is_the_measure(tmp_path: Path) -> None:
    runs = {"000-0": {"state": "running", "tokens": 500, "rate": 50.0}, "000-1": {"state": "waiting"}}
    status = Reader(write_root(tmp_path / "new", runs, state="running", planned=4)).read(driven=True)
    assert status.seconds_left == pytest.approx(20.0 * (0.5 + 3)), "1,000 tokens at 50 a second, on one worker; two runs are not even drawn"
    assert status.counts == {"running": 1, "waiting": 3}
    nothing = Reader(write_root(tmp_path / "none", {"000-0": {"state": "waiting"}}, state="running")).read(driven=True)
    assert nothing.seconds_left is None


def test_the_last_run_is_waited_for_whole_however_many_workers_are_idle(tmp_path: Path) -> None:
    runs = {"000-0": {"state": "finished", "value": 1.0, "seconds": 30.0}, "000-1": {"state": "running", "tokens": 100}}
    assert Reader(write_root(tmp_path / "s", runs, state="running", workers=8)).read(driven=True).seconds_left == pytest.approx(27.0)


def test_maximised_objectives_rank_the_other_way(tmp_path: Path) -> None:
    runs = {f"{trial:03d}-0": {"state": "finished", "value": float(trial)} for trial in range(4)}
    root = write_root(tmp_path / "m", runs, objectives=[{"metric": METRIC, "direction": "maximize"}])
    status = Reader(root).read()
    best = status.best(METRIC, "maximize")
    assert best is not None
    assert best.trial == 3
    assert [v.trial for v in status.variants] == [0, 3, 2, 1], "the baseline first, then the best"


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
def test_the_standard_error_is_that_of_the_textbook(values: list[float]) -> None:
    mean, error = mean_and_error(values)
    assert mean is not None
    assert error is not None
    n = len(values)
    assert mean == pytest.approx(sum(values) / n, abs=1e-6)
    assert error**2 == pytest.approx(sum((v - mean) ** 2 for v in values) / (n - 1) / n, rel=1e-6, abs=1e-9)


def test_a_reader_sees_what_changes_and_reads_what_has_ended_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_root(tmp_path / "s", {"000-0": {"state": "finished", "value": 1.0}, "000-1": {"state": "running", "tokens": 100}}, state="running")
    reader = Reader(root)
    assert reader.read(driven=True).done == 1
    write_root(root, {"000-1": {"state": "finished", "value": 3.0}}, state="running")
    (root / schema.RUNS_DIRECTORY / "000-0" / schema.RUN_FILE).write_text("no longer JSON")
    assert reader.read(driven=True).done == 2
    # Put back by `retry`: it has not ended any more.
    (root / schema.RUNS_DIRECTORY / "000-1" / schema.SUMMARY_FILE).unlink()
    assert reader.read(driven=True).done == 1


def test_status_answers_within_a_second_without_heavy_imports(tmp_path: Path) -> None:
    runs = {f"{trial:03d}-{seed}": {"state": "finished", "value": 1.0} for trial in range(30) for seed in (0, 1)}
    runs |= {f"{trial:03d}-{seed}": {"state": "running", "tokens": 500} for trial in range(30, 62) for seed in (0, 1)}
    root = write_root(tmp_path / "wide", runs, state="running", workers=64)
    code = (
        "import sys; from sweeps.__main__ import app; sys.argv = ['sweeps', 'status', sys.argv[1], '--json']\n"
        "try: app()\nfinally: print(sorted({'torch', 'ray', 'mlflow', 'optuna', 'numpy', 'sims'} & set(sys.modules)), file=sys.stderr)"
    )
    taken = []
    with held(root):
        for _ in range(3):
            # Of the processor, so that a busy machine is not mistaken for a slow command.
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=False, timeout=60)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            assert json.loads(done.stdout)["counts"] == {"running": 64, "finished": 60}
    assert done.stderr.strip() == "[]"
    assert min(taken) < 1.0, taken


def test_a_dead_drivers_study_is_interrupted_and_says_what_was_running(tmp_path: Path) -> None:
    root = write_root(tmp_path / "dead", RUNS, state="running", planned=8)
    code, output = read_elsewhere(root, "status", "--json")
    found = json.loads(output)
    assert (code, found["state"], found["driver"]) == (0, "interrupted", None)
    assert found["counts"]["interrupted"] == 1
    assert found["expected_seconds_left"] is None
    with held(root):
        assert json.loads(read_elsewhere(root, "status", "--json")[1])["state"] == "running"


def test_a_table_shows_best_failures_and_what_runs(tmp_path: Path) -> None:
    root = write_root(tmp_path / "mid", RUNS, state="running", planned=8, workers=2)
    with (screen := console()).capture() as captured:
        screen.print(View(lambda: Reader(root).read(driven=True)))
    text = captured.get()
    assert "mid: running, 5 of 8 runs; 1 running on 2 workers; expected to end at" in text
    assert "best so far, validation/bits_per_byte: 2.1000 ± 0.1000 (baseline; 2 of 2 seeds)" in text
    assert "failed or diverged: 1 diverged, 1 out-of-memory" in text
    assert "seed 1: step 4 (40%)" in text
    assert "seed 0: out-of-memory, attempt 3: OutOfMemory: 3 GB" in text
    assert re.search(r"device_limit=1 +1/2 +1\.9 +-0\.2000", text)


def test_where_there_is_little_room_the_baseline_and_what_runs_or_failed_stay(tmp_path: Path) -> None:
    runs = {f"{trial:03d}-0": {"state": "finished", "value": 5.0 - 0.01 * trial} for trial in range(40)}
    runs["017-0"], runs["023-0"] = {"state": "running", "tokens": 100}, {"state": "failed", "failure": "bug", "reason": "x"}
    status = Reader(write_root(tmp_path / "many", runs, state="running")).read(driven=True)
    with (screen := console()).capture() as captured:
        screen.print(render(status, rows=5))
    text = captured.get()
    assert [name for name in ("baseline", "device_limit=17", "device_limit=23", "device_limit=39", "device_limit=38") if name not in text] == []
    assert "... and 35 more variants" in text


def test_seconds_in_words() -> None:
    assert [duration(s) for s in (3.2, 89, 91, 600, 5400, 36000)] == ["3 s", "89 s", "2 min", "10 min", "1.5 h", "10.0 h"]


def test_watch_prints_an_object_per_change_until_the_study_has_ended(tmp_path: Path) -> None:
    root = write_root(tmp_path / "w", RUNS, state="running", planned=8)
    with held(root):
        process = subprocess.Popen([sys.executable, "-m", "sweeps", "status", str(root), "--watch", "--json"], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["done"] == 5
        write_root(root, {**RUNS, "001-1": {"state": "finished", "value": 1.8}}, state="running", planned=8)
        assert json.loads(process.stdout.readline())["best"][METRIC]["variant"] == "device_limit=1"
        write_root(root, {**RUNS, "001-1": {"state": "finished", "value": 1.8}}, state="stopped", planned=8)
        assert json.loads(process.stdout.readline())["state"] == "stopped"
        assert process.wait(20) == 0


def test_a_study_that_was_never_run_is_an_error_that_names_those_that_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path))
    write_root(tmp_path / "studies" / "there", {"000-0": {"state": "finished", "value": 1.0}})
    result = CliRunner().invoke(app, ["status", "absent"])
    assert result.exit_code == 1
    assert "absent: is no study that was run" in str(result.exception)
    assert str(result.exception).endswith(": there")


class Terminal:
    """A command on a terminal of its own; `screen` is what has come so far, without the codes that move the cursor."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._master, slave = pty.openpty()
        environment = {**environment, "TERM": "xterm-256color", "COLUMNS": "150", "LINES": "40"}
        self.process = subprocess.Popen(command, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)
        self.raw = ""

    @property
    def screen(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw)

    def await_(self, pattern: str, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.screen):
            assert time.monotonic() < deadline, f"{pattern!r} is not in:\n{self.screen[-3000:]}"
            self._read()

    def end(self, seconds: float = 60) -> int:
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.screen[-3000:]
            self._read()
        while self._read():
            pass
        os.close(self._master)
        return int(self.process.returncode)

    def _read(self) -> bool:
        ready, _, _ = select.select([self._master], [], [], 0.2)
        try:
            piece = os.read(self._master, 65536).decode(errors="replace") if ready else ""
        except OSError:  # the other side is closed
            return False
        self.raw += piece
        return bool(piece)


def test_on_a_terminal_the_table_lives_and_stays_at_its_end(study: Callable[..., Path], environment: dict[str, str]) -> None:
    root = Path(environment["MOELAB_HOME"]) / "studies" / "small"
    root.mkdir(parents=True)
    (root / "slow").write_text("0.05")
    command = [sys.executable, "-m", "sweeps", "run", str(study()), "--executor", "inline", "--function", STANDIN]
    # Where nobody listens: no database has to be made, and the table has to say so.
    terminal = Terminal(command, {**environment, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"})
    terminal.await_(r"small: running, 0 of 6 runs; 1 running on 1 workers")
    terminal.await_(r"seed 0: step \d+")
    terminal.await_(r"1 of 6 runs[^\n]*expected to end at \d\d:\d\d, in")
    terminal.await_(r"best so far, validation/bits_per_byte: \d\.\d+ \(baseline; 1 of 2 seeds\)")
    terminal.await_(r"MLflow is away: ")
    (root / "slow").write_text("0.0")
    terminal.await_(r"small: finished, 6 of 6 runs")
    assert terminal.end() == 0
    assert "\x1b[?25l" in terminal.raw, "it was live"
    assert re.sub(r"\s", "", terminal.screen).endswith(f"report:python-mreportsbuild{root}")
