"""One run on D workers of this machine: strong and weak scaling, and where the time of a step goes.

`python -m tests.bench.parallel WORKERS BATCH STEPS` prints one JSON object; each measurement is a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from statistics import mean, median
from typing import Any, TypeVar

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from research.config import RunConfig
from research.configfile import load_run_config
from research.parallel.launch import run_workers
from research.parallel.world import ALONE, World
from research.training.loop import train
from research.training.records import NoRecorder

T = TypeVar("T")
WORKERS = (1, 2, 4, 8)
MODEL, LENGTH = "deepseek-v2-micro", 64
STRONG_BATCH, WEAK_BATCH = 16, 4
"""Sequences of a step in all, and per worker."""
STEPS, WARM_UP = 12, 3
COMPUTE, EXCHANGE, REDUCTION, GATHERING, UPDATE, REST = PARTS = (
    "compute",
    "dispatch and combine",
    "gradient reduction",
    "gathering weights",
    "optimizer",
    "other collectives",
)
"""Of a step's seconds: all but the last is what it says, waiting for slower workers included; `compute` is what remains."""
OF_COLLECTIVE = {
    "the reduction": REDUCTION,
    "the norm": REDUCTION,
    "gathering the updated": GATHERING,
    "the dispatch": EXCHANGE,
    "the combine": EXCHANGE,
    "the metadata": EXCHANGE,
    "the counts": EXCHANGE,
}
"""By how the name begins that `World.run` is told."""


class Timed(World):
    """A world that keeps the seconds of each step by PARTS."""

    __slots__ = ("began", "parts", "steps_taken", "updating")

    def __init__(self, world: World) -> None:
        for field in fields(World):
            setattr(self, field.name, getattr(world, field.name))
        self.parts = dict.fromkeys(PARTS, 0.0)
        self.steps_taken: list[dict[str, float]] = []
        self.began = self.updating = 0.0
        register_optimizer_step_pre_hook(self._update)
        register_optimizer_step_post_hook(self._updated)

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self.parts, self.updating, self.began = dict.fromkeys(PARTS, 0.0), 0.0, time.perf_counter()

    def end_step(self) -> None:
        super().end_step()
        seconds = time.perf_counter() - self.began
        self.parts[COMPUTE] = seconds - sum(self.parts.values())
        self.steps_taken.append(self.parts)

    def run(self, collective: Callable[[], T], name: str) -> T:
        began = time.perf_counter()
        try:
            return super().run(collective, name)
        finally:
            if self.training:
                part = next((part for start, part in OF_COLLECTIVE.items() if name.startswith(start)), REST)
                self.parts[part] += time.perf_counter() - began

    # The sharded optimizer's step calls AdamW's: the outer pair counts, less the gathering between.

    def _update(self, *_: Any) -> None:
        if self.updating == 0.0:
            self.updating = time.perf_counter()

    def _updated(self, *_: Any) -> None:
        self.parts[UPDATE] = time.perf_counter() - self.updating - self.parts[GATHERING]


def measure_parallel(quick: bool = False) -> dict[str, Any]:
    """Strong and weak scaling; `quick`: the smallest once."""
    workers = WORKERS[:2] if quick else WORKERS
    steps = WARM_UP + 2 if quick else STEPS
    strong = [_child(count, STRONG_BATCH, steps) for count in workers]
    weak = [_child(count, WEAK_BATCH * count, steps) for count in workers]
    return {"model": MODEL, "length": LENGTH, "cores": os.cpu_count() or 1, "strong": strong, "weak": weak}


def _child(workers: int, batch: int, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="b") as home:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MOELAB_")}
        environment |= {"MOELAB_CACHE": home, "OMP_NUM_THREADS": "1"}
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # the other measurements pin this process
        command = [sys.executable, "-m", "tests.bench.parallel", str(workers), str(batch), str(steps)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        os.sched_setaffinity(0, before)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def configuration(batch: int, steps: int) -> RunConfig:
    """Text that every installation has, with the published balance losses and M = 3."""
    data = {"corpus": "files", "paths": [argparse.__file__], "tokenizer_vocab_size": 300, "sequence_length": LENGTH}
    training = {"train_tokens": steps * batch * LENGTH, "batch_size": batch, "validation_tokens": 2 * LENGTH, "record_every": 10**6}
    often = {"validate_every": 10**6, "checkpoint_every": 10**6, "trace_every": 10**6}
    return load_run_config({"model": {"preset": MODEL, "vocab_size": 300}, "data": data, "training": {**training, **often}})


def measure(workers: int, batch: int, steps: int) -> dict[str, Any]:
    """Median seconds of a step and the mean share of each part; of several workers, the mean of theirs."""
    config = configuration(batch, steps)
    with tempfile.TemporaryDirectory(prefix="b") as folder:
        if workers == 1:
            _pin(0)
            found = [_work(ALONE, None, config, Path(folder))]
        else:
            found = run_workers(_work, (config, Path(folder)), workers=workers)
    taken = [one[WARM_UP:] for one in found]
    seconds = median(mean(sum(one[index].values()) for one in taken) for index in range(len(taken[0])))
    parts = {part: mean(step[part] for one in taken for step in one) for part in PARTS}
    tokens = batch * LENGTH
    return {"workers": workers, "batch": batch, "seconds": seconds, "tokens_per_second": tokens / seconds, "parts": parts}


def _work(world: World, parent: Any, config: RunConfig, folder: Path) -> list[dict[str, float]]:
    _pin(world.rank)
    timed = Timed(world)
    train(config, folder, NoRecorder(), lambda record: False, device="cpu", world=timed)
    return timed.steps_taken


def _pin(rank: int) -> None:
    """Rank by rank to the cores there are."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)


if __name__ == "__main__":
    print(json.dumps(measure(*map(int, sys.argv[1:4]))))
