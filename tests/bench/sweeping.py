"""What a study costs around its training: beside Ray Tune with OptunaSearch on the same work, its driver's memory, its answers.

Each measurement is a process of its own (`python -m tests.bench.sweeping WHAT ...` prints one JSON object), so that neither side
finds what the other has imported or started.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest.mock import patch

import numpy as np
import yaml

WORKERS = 2
CASES = {"trivial": (0.0, 60), "10 s": (10.0, 12), "60 s": (60.0, 4)}
"""Seconds of work per trial, and trials."""
QUICK = {"trivial": (0.0, 10)}
RATE = "training.optimizer.learning_rate"
SIZE = 256


def measure_overhead(quick: bool = False, said: Callable[[dict[str, Any]], object] = lambda found: None) -> list[dict[str, Any]]:
    """Both systems on the same work in turn: seconds around a trial that are not its work."""
    found = []
    for name, (seconds, trials) in (QUICK if quick else CASES).items():
        rounds = _calibrated(seconds)
        for system in ("moelab", "ray-tune"):
            measured = _child(system, "--rounds", str(rounds), "--trials", str(trials))
            found.append({"case": name, "system": system, "trials": trials, **measured, **_overhead(measured, trials)})
            said(found[-1])
    return found


def measure_driver(quick: bool = False) -> dict[str, Any]:
    """Resident memory of a driver after a tenth of its trivial trials and after all, and how soon it answers with 64 workers."""
    trials = 200 if quick else 2000
    return {
        "memory": _child("memory", "--trials", str(trials)),
        "memory_of_optuna": _child("memory-of-optuna", "--trials", str(trials)),
        "answers": _child("answers", "--seconds", "5" if quick else "20"),
    }


def _overhead(of: Mapping[str, Any], trials: int) -> dict[str, float]:
    """Seconds around a trial: the pause before it, what its work waited for its core because others of the machine had it, and its
    part of the end of the study.  All of it is of one run: how fast a shared machine is changes from minute to minute."""
    around = of["pause"] + of["waited"] + of["end"] * WORKERS / trials
    return {"overhead": around, "share": around / (of["work"] - of["waited"]) if of["work"] > 1.0 else float("nan")}


def _child(*arguments: str) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "MOELAB_"))}
    root = str(Path(__file__).parents[2])
    with tempfile.TemporaryDirectory(prefix="b") as home:
        environment |= {"HOME": home, "MOELAB_HOME": f"{home}/m", "MOELAB_CACHE": f"{home}/c", "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # the other measurements pin this process
        command = [sys.executable, "-m", "tests.bench.sweeping", *arguments, "--home", home]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=home)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    value: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return value


# --- the work, the same on both sides -----------------------------------------------------------------------------------------


def _work(rounds: int) -> float:
    """So many matrix products; the same number comes back each time."""
    a = np.full((SIZE, SIZE), 1 / SIZE, np.float32)
    b = a
    for _ in range(rounds):
        b = a @ b
    return float(b[0, 0])


def _side_by_side(rounds: int) -> float:
    """Seconds that the workers take for it, on a core and with one thread each."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # the other measurements pin this process, and its children with it
    with patch.dict(os.environ, OMP_NUM_THREADS="1"), multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
        return mean(pool.map(_pinned, [(core, rounds) for core in range(WORKERS)], chunksize=1))


def _pinned(given: tuple[int, int]) -> float:
    core, rounds = given
    there = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {there[core % len(there)]})
    began = time.perf_counter()
    _work(rounds)
    return time.perf_counter() - began


def _calibrated(seconds: float) -> int:
    """Rounds that take about so many seconds where every worker does them."""
    return int(seconds / (median(_side_by_side(2000) for _ in range(3)) / 2000)) if seconds else 0


def _timed(rounds: int) -> str:
    """The work; when it began and ended, in which process, and the seconds that it had of a core or that other machines took of it."""
    began, had = time.time(), time.thread_time() + _stolen()
    _work(rounds)
    return json.dumps([began, time.time(), os.getpid(), time.thread_time() + _stolen() - had])


def _stolen() -> float:
    """Seconds that the host of this virtual machine gave to others, per core, since it started."""
    total = Path("/proc/stat").read_text().splitlines()[0].split()
    return int(total[8]) / os.sysconf("SC_CLK_TCK") / (os.cpu_count() or 1)


def trial(
    config: Mapping[str, Any], directory: Path, report: Callable[[Mapping[str, float]], None], should_stop: Callable[[], bool]
) -> dict[str, Any]:
    """A trial function of a study: the work, and when it was done."""
    began = time.time()
    (directory / "times.json").write_text(_timed(int((directory.parent.parent / "rounds").read_text())))
    metrics = {"validation/bits_per_byte": config["training"]["optimizer"]["learning_rate"]}
    return {"state": "finished", "reason": None, "steps": 1, "tokens": 1, "seconds": time.time() - began, "metrics": metrics, "device": "cpu"}


def sleeping(
    config: Mapping[str, Any], directory: Path, report: Callable[[Mapping[str, float]], None], should_stop: Callable[[], bool]
) -> dict[str, Any]:
    """A trial that records twice a second, as 64 at once do on one machine."""
    until = time.monotonic() + float((directory.parent.parent / "rounds").read_text())
    step = 0
    while time.monotonic() < until:
        time.sleep(0.5)
        step += 1
        report({"step": step, "tokens": step, "train/loss": 1.0 / step})
    return {"state": "finished", "reason": None, "steps": step, "tokens": 1, "seconds": 0.0, "metrics": {"validation/bits_per_byte": 1.0}}


# --- one measurement, in its own process --------------------------------------------------------------------------------------


def _study(home: Path, trials: int) -> Path:
    """A random search over a range, of which every trial is one run."""
    text = home / "text.txt"
    text.write_text("".join(f"the quick brown fox number {i * 7919 % 10007} jumps over {i * i % 97} lazy dogs\n" for i in range(2000)))
    mapping = {
        "name": "bench",
        "question": "What does a study cost around its training?",
        "base": {
            "model": {"preset": "deepseek-v2-nano", "vocab_size": 270},
            "data": {"corpus": "files", "paths": [str(text)], "tokenizer_vocab_size": 270, "sequence_length": 32},
            "training": {"train_tokens": 2048, "batch_size": 4},
        },
        "baseline": {RATE: 0.001},
        "space": {RATE: {"low": 0.0001, "high": 0.1, "log": True}},
        "search": {"sampler": "tpe", "trials": trials},
        "resources": {"workers": WORKERS},
        "seeds": [0],
    }
    path = home / "bench.yaml"
    path.write_text(yaml.safe_dump(mapping, sort_keys=False))
    return path


def _spans(files: list[Path]) -> dict[str, Any]:
    """First start, last end, mean work, what it waited of that, and the mean pause between two trials of one worker."""
    times = sorted(json.loads(file.read_text()) for file in files)
    last: dict[int, float] = {}
    pauses = []
    for began, ended, pid, _ in times:
        if pid in last:
            pauses.append(began - last[pid])
        last[pid] = ended
    works = [ended - began for began, ended, _, _ in times]
    waited = mean(works) - mean(had for *_, had in times)
    pause = mean(pauses) if pauses else float("nan")
    return {"first": times[0][0], "last": max(last.values()), "work": mean(works), "waited": waited, "pause": pause}


def _moelab(home: Path, rounds: int, trials: int) -> dict[str, Any]:
    from sweeps.cluster import RayExecutor
    from sweeps.driver import Driver
    from sweeps.study import load_study

    began, root = time.time(), home / "m" / "studies" / "bench"
    root.mkdir(parents=True)
    (root / "rounds").write_text(str(rounds))
    driver = Driver(load_study(_study(home, trials)), root, lambda s, n: RayExecutor(s.resources, n), lambda line: None, "tests.bench.sweeping:trial")
    state = driver.run()
    ended = time.time()
    spans = _spans(list(root.glob("runs/*/times.json")))
    assert state == "finished", state
    return {"seconds": ended - spans["first"], "start": spans["first"] - began, "end": ended - spans["last"], **spans}


def _ray_tune(home: Path, rounds: int, trials: int) -> dict[str, Any]:
    import ray
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    began, place = time.time(), home / "times"
    place.mkdir()

    def trainable(config: dict[str, float]) -> None:
        from tests.bench.sweeping import _timed

        (place / f"{os.getpid()}-{time.time()}.json").write_text(_timed(rounds))
        tune.report({"loss": config["rate"]})

    ray.init(address="local", include_dashboard=False, num_cpus=WORKERS, log_to_driver=False)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        param_space={"rate": tune.loguniform(0.0001, 0.1)},
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(metric="loss", mode="min", seed=0), num_samples=trials, max_concurrent_trials=WORKERS, reuse_actors=True
        ),
        run_config=tune.RunConfig(storage_path=str(home / "results"), verbose=0),
    )
    tuner.fit()
    ended = time.time()
    spans = _spans(list(place.glob("*.json")))
    # A worker is a new process for each trial, or not: the pause is taken over the slots.
    pause = (spans["last"] - spans["first"]) * WORKERS / trials - spans["work"]
    return {"seconds": ended - spans["first"], "start": spans["first"] - began, "end": ended - spans["last"], **spans, "pause": pause}


def _resident() -> int:
    """What is held, without what is free already and only not given back."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def _memory(home: Path, trials: int) -> dict[str, Any]:
    """With MLflow in its sqlite file, as by default."""
    from sweeps.driver import Driver
    from sweeps.executors import InlineExecutor
    from sweeps.study import load_study

    root = home / "m" / "studies" / "bench"
    root.mkdir(parents=True)
    (root / "rounds").write_text("0")
    seen: dict[int, int] = {}
    marks, began = {trials // 10, trials // 2, trials - 1}, time.time()

    def announce(line: str) -> None:
        done = driver.book.done if hasattr(driver, "book") else 0
        if done in marks and done not in seen:
            seen[done] = _resident()

    driver = Driver(load_study(_study(home, trials)), root, lambda s, n: InlineExecutor(4), announce, "tests.bench.sweeping:trial")
    assert driver.run() == "finished"
    size = (root / "state.json").stat().st_size
    first, last = min(seen), max(seen)
    return {
        "trials": trials,
        "seconds": time.time() - began,
        "resident": {str(n): seen[n] for n in sorted(seen)},
        "bytes_per_trial": (seen[last] - seen[first]) / (last - first),
        "state_bytes": size,
    }


def _memory_of_optuna(home: Path, trials: int) -> dict[str, Any]:
    """The same trials in Optuna alone, which keeps every one of them: what no driver on top of it can go below."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = JournalStorage(JournalFileBackend(str(home / "journal.log")))
    study = optuna.create_study(storage=storage, sampler=optuna.samplers.TPESampler(seed=0))
    marks, seen = {trials // 10, trials - 1}, {}
    for done in range(trials):
        if done in marks:
            seen[done] = _resident()
        trial = study.ask()
        rate = trial.suggest_float(RATE, 0.0001, 0.1, log=True)
        trial.set_user_attr("states", '["finished"]')
        trial.set_user_attr("seeds:validation/bits_per_byte", [rate])
        study.tell(trial, rate)
    first, last = min(seen), max(seen)
    return {"bytes_per_trial": (seen[last] - seen[first]) / (last - first), "resident": {str(n): seen[n] for n in sorted(seen)}}


def _answers(home: Path, seconds: float) -> dict[str, Any]:
    from sweeps.driver import Driver
    from sweeps.executors import Event, InlineExecutor
    from sweeps.study import load_study

    class Watched(InlineExecutor):
        """Notes when it is asked."""

        asked: list[float] = []  # noqa: RUF012

        def poll(self, wait: float = 0.0) -> list[Event]:
            self.asked.append(time.monotonic())
            return super().poll(wait)

    root = home / "m" / "studies" / "bench"
    root.mkdir(parents=True)
    (root / "rounds").write_text(str(seconds))
    code = "import json,subprocess,sys,time\nt=[]\nfor _ in range(5):\n b=time.time(); subprocess.run([sys.executable,'-m','sweeps','status','bench','--json'],check=True,stdout=subprocess.DEVNULL); t.append(time.time()-b); time.sleep(.5)\nprint(json.dumps(t))"
    command = [sys.executable, "-c", f"import time; time.sleep({seconds / 4})\n{code}"]
    asking = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    executor = Watched(64)
    driver = Driver(load_study(_study(home, 128)), root, lambda s, n: executor, lambda line: None, "tests.bench.sweeping:sleeping")
    assert driver.run() == "finished"
    output, _ = asking.communicate(timeout=60)
    turns = np.diff(executor.asked)
    return {"workers": 64, "status_seconds": sorted(json.loads(output)), "longest_turn": float(turns.max()), "median_turn": float(np.median(turns))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["moelab", "ray-tune", "memory", "memory-of-optuna", "answers"])
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=5.0)
    given = parser.parse_args()
    if given.what == "moelab":
        found = _moelab(given.home, given.rounds, given.trials)
    elif given.what == "ray-tune":
        found = _ray_tune(given.home, given.rounds, given.trials)
    elif given.what == "memory":
        found = _memory(given.home, given.trials)
    elif given.what == "memory-of-optuna":
        found = _memory_of_optuna(given.home, given.trials)
    else:
        found = _answers(given.home, given.seconds)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
