"""What the workers of test_parallel.py run, in processes of their own."""

import os
import signal
import time
from pathlib import Path

from research.training.loop import train
from research.training.records import JsonlRecorder


def run(world, config, folder, stop_at=None, misbehave=None):
    """Train in `folder`; `misbehave` = (rank, step, "kill" | "hang" | "raise") strikes when that step has been recorded."""

    class Recorder(JsonlRecorder):
        pass

    recorder = Recorder(Path(folder) / "metrics.jsonl") if world.rank == 0 else None
    if misbehave and misbehave[0] == world.rank:
        _strike_at(world, *misbehave[1:])
    result = train(config, Path(folder), recorder, lambda record: record.step == stop_at, device="cpu", world=world)
    return result.state, result.steps, {name: value for name, value in result.metrics.items() if name != "train/tokens_per_second"}


def _strike_at(world, step, how):
    """Between two collectives of the forward pass of `step`."""
    gather = world.ledger.add

    class Striking(type(world.ledger)):
        def add(self, at, layer, phase, counts):
            if at == step and phase == "combine":
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "hang":
                    time.sleep(600)
                raise ValueError("a bug in the model")
            super().add(at, layer, phase, counts)

    del gather
    world.ledger = Striking(world.ledger.workers)
