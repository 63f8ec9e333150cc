"""What the workers of test_parallel.py run, in processes of their own."""

import os
import signal
import sys
import time
from pathlib import Path

from research.parallel.launch import run_workers
from research.parallel.traffic import COMBINE, Ledger
from research.training.loop import train
from research.training.records import JsonlRecorder, NoRecorder


def run(world, parent, config, folder, stop_at=None, misbehave=None, witness=False):
    """Train in `folder`, up to `stop_at`; `misbehave` = (rank, step, "kill" | "hang" | "raise") strikes inside the layers of that step."""
    recorder = JsonlRecorder(Path(folder) / "metrics.jsonl") if world.rank == 0 else NoRecorder()
    world.ledger = Struck(world.expert_parallel, misbehave[1:] if misbehave and misbehave[0] == world.rank else None)
    world.ledger.witness = witness
    result = train(config, Path(folder), recorder, lambda record: record.step == stop_at, device="cpu", world=world)
    metrics = {name: value for name, value in result.metrics.items() if name != "train/tokens_per_second"}
    return result.state, result.steps, metrics


def run_each(world, parent, tasks):
    """`run` of several (configuration, folder), one after the other: starting the processes is what takes longest."""
    return [run(world, parent, config, folder) for config, folder in tasks]


def wait(world, parent, marks):
    """Leave a mark with this process's id, and wait for longer than any test."""
    (Path(marks) / f"rank-{world.rank}").write_text(str(os.getpid()))
    time.sleep(600)


def main(marks):
    """Two workers that wait; what a test starts in order to end it."""
    run_workers(wait, (marks,), workers=2)


class Struck(Ledger):
    """A ledger that is not well: where a worker counts what it is about to send, it ends, sleeps or fails."""

    def __init__(self, workers, when=None):
        super().__init__(workers)
        self.when = when

    def add(self, step, layer, phase, counts):
        if self.when and step == self.when[0] and phase == COMBINE:
            if self.when[1] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.when[1] == "hang":
                time.sleep(600)
            raise ValueError("a bug in the model")
        super().add(step, layer, phase, counts)


if __name__ == "__main__":
    main(sys.argv[1])
