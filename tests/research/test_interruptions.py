"""kill -9 at any moment, a full disk, a stop: what stood there stays, and the run ends in the same bits."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import config, write_config

from research.errors import DiskFull
from research.training import checkpoint, records
from research.training.loop import train
from research.training.records import JsonlRecorder

RAMP = {"batch_ramp_from": 2, "batch_ramp_tokens": 1500, "micro_batch_size": 2}
KEPT = {"keep_checkpoints": 2, "keep_best": True}


def run(settings, out, should_stop=lambda record: False):
    return train(settings, out, JsonlRecorder(out / "metrics.jsonl"), should_stop)


def recorded(out):
    """What is in the JSONL, without what a clock says."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != records.TOKENS_PER_SECOND} for line in lines]


def timeless(folder):
    """A checkpoint's state without what a clock says."""
    about = json.loads((folder / "state.json").read_text())
    about["metrics"].pop(records.TOKENS_PER_SECOND)
    return {name: value for name, value in about.items() if name != "seconds"}


def same_checkpoint(one: Path, two: Path):
    assert {file.name for file in one.iterdir()} == {file.name for file in two.iterdir()}
    for name in ("model.safetensors", "optimizer.safetensors", "snapshots.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert timeless(one) == timeless(two)


def same_run(one: Path, two: Path):
    assert recorded(one) == recorded(two)
    for folder in sorted({p.parent.relative_to(root) for root in (one, two) for p in root.rglob("state.json")}):
        same_checkpoint(one / folder, two / folder)


@pytest.mark.slow
def test_a_command_killed_or_stopped_at_any_step_ends_in_the_same_bits(tmp_path, text):
    settings = write_config(tmp_path / "run.yaml", text, training={**RAMP, "train_tokens": 12_000})
    chance = random.Random(int.from_bytes(os.urandom(4)))  # any moment has to do

    def command(out):
        arguments = [sys.executable, "-u", "-m", "research", "train", str(settings), "--out", str(out)]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def steps(process):
        return (int(found[1]) for line in process.stdout if (found := re.search(r"step (\d+)/\d+ ", line)))

    begun = 0
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        process = command(tmp_path / "killed")
        for step in steps(process):
            if step >= begun + chance.randint(3, 9):
                process.send_signal(number)
                break
        rest = process.stdout.read()
        assert process.wait() == code, rest
        begun = step
    assert "stopping at the next record" in rest
    assert "The same command goes on from here." in rest
    for out in ("killed", "whole"):
        said, _ = command(tmp_path / out).communicate()
        assert "finished after" in said, said
        assert re.search(r"step (\d+)/\1 ", said), "the last record is shown too"
        assert ("resumed after step" in said) == (out == "killed")
    same_run(tmp_path / "killed", tmp_path / "whole")


DRIVER = '''
import json, os, shutil, signal, sys
from pathlib import Path
import torch
import torch._dynamo  # which the first optimizer imports: once here, not in every child
from research.training import checkpoint
from research.training.loop import train
from research.training.records import JsonlRecorder
from small_runs import config

torch.set_num_threads(1)
out, settings = Path(sys.argv[1]), config(Path(sys.argv[2]), training=json.loads(sys.argv[3]))
left = 0

def dying(act):
    """Dies before the call that is its turn; a written file is cut in the middle first, as a crash may leave it."""
    def call(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            if act.__name__ == "save_file":
                act(*arguments, **named)
                os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return act(*arguments, **named)
    return call

def newest():
    folder = checkpoint._whole(out / "checkpoint")
    return checkpoint.read_state(folder)["step"] if folder else 0

before, deaths = 0, 0
while True:
    child = os.fork()
    if child == 0:
        left = deaths + 1
        for place, name in ((checkpoint, "save_file"), (checkpoint, "sync"), (Path, "rename"), (shutil, "rmtree"), (os, "link")):
            setattr(place, name, dying(getattr(place, name)))
        result = train(settings, out, JsonlRecorder(out / "metrics.jsonl"), lambda record: False)
        os._exit(0 if result.state == "finished" else 1)
    _, status = os.waitpid(child, 0)
    assert newest() >= before, "a checkpoint was lost"
    before = newest()
    folders = [p.parent for p in out.rglob("model.safetensors")]
    assert len(folders) <= 2 + 1 + 3, folders  # kept, the best, and what is on its way in or out
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        assert os.waitstatus_to_exitcode(status) == 0
        break
    deaths += 1
print(deaths)
'''


@pytest.mark.slow
def test_killed_before_every_move_of_a_save_nothing_is_lost(tmp_path, text):
    training = {**RAMP, **KEPT, "train_tokens": 2000}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])}
    driver = [sys.executable, "-c", DRIVER, str(tmp_path / "killed"), str(text), json.dumps(training)]
    done = subprocess.run(driver, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15, "more deaths than one save has moves"
    run(config(text, training=training), tmp_path / "whole")
    same_run(tmp_path / "killed", tmp_path / "whole")
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".new", ".old")]


def test_the_last_ones_and_the_best_are_kept_and_nothing_else(tmp_path, text):
    settings = config(text, training={**KEPT, "keep_checkpoints": 3, "optimizer": {"learning_rate": 0.3, "warmup_steps": 1, "decay_at": []}})
    run(settings, tmp_path)
    scores = {line["step"]: line[records.BITS_PER_BYTE] for line in recorded(tmp_path) if records.BITS_PER_BYTE in line}
    best = min(scores, key=scores.get)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["best", "step-000008", "step-000010"]
    kept = {p.parent.name: timeless(p.parent) for p in tmp_path.rglob("state.json")}
    assert {name: about["step"] for name, about in kept.items()} == {"checkpoint": 12, "step-000010": 10, "step-000008": 8, "best": best}
    assert kept["best"]["metrics"][records.BITS_PER_BYTE] == kept["best"]["best"] == scores[best]
    for folder in (tmp_path, *(tmp_path / "checkpoints").iterdir()):
        assert checkpoint.load_model(folder)[1] == settings


def test_an_earlier_checkpoint_goes_on_to_the_same_end(tmp_path, text):
    settings = config(text, training={**RAMP, "keep_checkpoints": 4})
    run(settings, tmp_path / "a")
    kept = sorted((tmp_path / "a" / "checkpoints").iterdir())
    assert len(kept) == 3
    (tmp_path / "b").mkdir()
    kept[0].rename(tmp_path / "b" / "checkpoint")
    run(settings, tmp_path / "b")
    same_checkpoint(tmp_path / "a" / "checkpoint", tmp_path / "b" / "checkpoint")


def test_no_random_numbers_but_those_of_seed_and_step(tmp_path, text):
    for name, seed in (("a", 1), ("b", 2)):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        run(config(text), tmp_path / name)
    same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_full_disk_is_said_and_the_checkpoint_before_stands(tmp_path, text, file):
    """The limit on the size of a file is a disk that is full in the middle of a file, for whoever may not mount one."""
    settings = config(text, training={"checkpoint_every": 6})
    run(settings, tmp_path, lambda record: record.step == 6)
    before = {p.name: p.read_bytes() for p in (tmp_path / "checkpoint").iterdir()}
    sizes = sorted((len(content), name) for name, content in before.items())
    # Room for all the files that are smaller than this one.
    limit = next(size for size, name in sizes if name == file) - 1
    (tmp_path / "metrics.jsonl").unlink()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        with pytest.raises(
            DiskFull, match=rf"{re.escape(str(tmp_path))}.*checkpoint of step 12.*MB are free there; what stood there before was kept"
        ):
            train(settings, tmp_path, Nothing(), lambda record: False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "checkpoint").iterdir()} == before
    assert run(settings, tmp_path).state == "finished"


class Nothing:
    def record(self, record):
        pass


def test_a_record_that_finds_no_room_is_one_error(tmp_path, text):
    settings, old = config(text, training={"checkpoint_every": 20}), resource.getrlimit(resource.RLIMIT_FSIZE)
    recorder = JsonlRecorder(tmp_path / "metrics.jsonl")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
        with pytest.raises(DiskFull, match=r"metrics\.jsonl: the record of step \d+ cannot be written"):
            train(settings, tmp_path, recorder, lambda record: False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    # The line cut short goes when the run is taken up again, which ends as if nothing had been.
    run(settings, tmp_path)
    run(settings, tmp_path / "whole")
    assert recorded(tmp_path) == recorded(tmp_path / "whole")


def test_an_older_format_is_refused_with_a_sentence(tmp_path, text):
    run(config(text), tmp_path)
    state = tmp_path / "checkpoint" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "format": 1}))
    for act in (lambda: run(config(text), tmp_path), lambda: checkpoint.load_model(tmp_path)):
        with pytest.raises(checkpoint.CheckpointError, match="is a checkpoint of format 1, this version reads 2: use the version that wrote it"):
            act()
