"""One run on several real workers of a real Ray: the numbers of one worker, the bytes that moved, and the end of a member."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Sweeps, await_

from research.errors import ConfigError
from research.parallel.traffic import DISPATCH, PAYLOAD, read_traffic
from research.routing_trace import RoutingTrace
from sweeps import schema
from sweeps.failures import read_attempts
from sweeps.study import load_study

pytestmark = pytest.mark.slow

StudyWriter = Callable[..., Path]
BASE = {
    "model": {"preset": "deepseek-v2-nano", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2},
    "training": {"batch_size": 4, "validation_tokens": 512, "record_every": 2, "checkpoint_every": 10, "validate_every": 100, "trace_every": 100},
}
ALONE_NAMES = ("seconds", "tokens_per_second", "parallel/", "simulation/")


def parallel(study: StudyWriter, corpus: Path, tokens: int, workers: int, **changes: Any) -> Path:
    data = {"corpus": "files", "paths": [str(corpus)], "tokenizer_vocab_size": 300, "sequence_length": 32}
    model = {**BASE["model"], **changes.pop("model", {})}
    base = {"model": model, "data": data, "training": {**BASE["training"], "train_tokens": tokens}}
    resources = changes.pop("resources", {"workers_per_trial": workers})
    one = {"space": {"model.moe.device_limit": [3]}, "baseline": {"model.moe.device_limit": 3}, "seeds": [0]}
    return study(base=base, resources=resources, **{**one, **changes})


def records(root: Path, run: str = "000-0") -> list[dict[str, float]]:
    path = root / "runs" / run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def workers_of(home: Path) -> list[int]:
    """Process ids of the actors that train, of the Ray whose files are under `home`."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = dict(line.split(":\t", 1) for line in (folder / "status").read_text().splitlines() if ":\t" in line)
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if not status["State"].startswith("Z"):
            found[int(folder.name)] = (int(status["PPid"]), command)
    return [
        pid for pid, (parent, command) in found.items() if "ray::" in command and "Worker" in command and str(home) in found.get(parent, (0, ""))[1]
    ]


def test_a_member_that_is_killed_takes_its_group_with_it_and_the_run_ends_as_on_one_worker(
    sweeps_on_ray: Sweeps, study: StudyWriter, corpus: Path, session_home: Path
) -> None:
    sweeps, tokens = sweeps_on_ray, 100 * 4 * 32
    driver = sweeps.start("run", parallel(study, corpus, tokens, 2))
    await_((sweeps.root / "study.yaml").exists, 120, "the study's being read")
    # The same run in one worker, meanwhile.
    alone = sweeps.start("run", parallel(study, corpus, tokens, 1, name="alone"), "--executor", "inline")
    await_(lambda: len(records(sweeps.root)) >= 8, 300, "eight records")
    group = workers_of(session_home)
    assert len(group) == 2
    os.kill(group[-1], signal.SIGKILL)
    killed = time.monotonic()
    await_(lambda: not set(group) & set(workers_of(session_home)), 10, "the end of the group")
    assert time.monotonic() - killed < 10
    output, _ = driver.communicate(timeout=180)
    assert driver.returncode == 0, output
    ours, summary = records(sweeps.root), sweeps.summaries()["000-0"]
    assert summary["attempts"] == 2
    assert [r["step"] for r in ours] == list(range(2, 101, 2)), "each record stands there once"
    output, _ = alone.communicate(timeout=180)
    assert alone.returncode == 0, output
    sweeps.root = sweeps.root.with_name("alone")
    for our, wanted in list(zip(ours, records(sweeps.root), strict=True))[:10]:
        for name in ("train/loss", "train/balance_expert", "train/balance_device", "train/balance_communication"):
            assert our[name] == pytest.approx(wanted[name], rel=1e-4), (our["step"], name)
    assert not workers_of(session_home), "no orphans"


def test_a_member_that_hangs_is_named_with_its_layer_and_the_run_goes_on(
    sweeps_on_ray: Sweeps, study: StudyWriter, corpus: Path, session_home: Path
) -> None:
    """The group's own time-out comes before the driver's, which knows neither; no worker is left behind."""
    sweeps, path = sweeps_on_ray, parallel(study, corpus, 20 * 4 * 32, 2, resources={"workers_per_trial": 2, "hang_seconds": 4.0})
    code, output = sweeps.call("run", path, "--function", "standin:hanging", timeout=400)
    assert code == 0, output
    first, second = read_attempts(sweeps.root / "runs" / "000-0")
    assert (first["failure"], first["charged"], second["state"]) == (schema.HANG, True, "finished")
    assert re.search(r"rank 0 of 2: the counts of layer 1 of step 8 did not end within 4 s; it waited for rank 1", first["text"]), first["text"]
    assert [r["step"] for r in records(sweeps.root)] == list(range(2, 21, 2))
    await_(lambda: not workers_of(session_home), 20, "the end of all workers")


def test_the_device_limit_bounds_the_bytes_that_move(sweeps_on_ray: Sweeps, study: StudyWriter, corpus: Path) -> None:
    limits = {"space": {"model.moe.device_limit": [1, 8]}, "baseline": {"model.moe.device_limit": 8}}
    sweeps = sweeps_on_ray
    code, output = sweeps.call("run", parallel(study, corpus, 20 * 4 * 32, 2, model={"moe": {"num_experts_per_tok": 4}}, **limits))
    assert code == 0, output
    moved = {}
    for run, summary in sweeps.summaries().items():
        directory = sweeps.root / "runs" / run
        limit = json.loads((directory / "run.json").read_text())["parameters"]["model.moe.device_limit"]
        counted = read_traffic(directory / "traffic.jsonl")
        assert {phase for _, _, phase in counted} >= set(PAYLOAD)
        sent = np.sum([m.sum() for (_, _, phase), m in counted.items() if phase == DISPATCH])
        moved[limit] = sent / (20 * 4 * 32 * 32 * 4)  # workers that a token was sent to, on average
        assert summary["metrics"]["parallel/bytes_per_step"] > 0
        trace = RoutingTrace.load(directory / "routing.npz")
        assert trace.expert_ids.shape[2] > 0
    assert moved[1] <= 1.0
    assert moved[8] > moved[1]


def test_what_workers_cannot_share_is_found_before_anything_starts(study: StudyWriter, corpus: Path) -> None:
    path = parallel(study, corpus, 2048, 3, objectives=[{"metric": "parallel/bytes_per_step", "direction": "minimize"}])
    with pytest.raises(ConfigError, match=r"training.batch_size = 4: must be a multiple of the 3 workers .*workers_per_trial = 3"):
        load_study(path)
    path = parallel(study, corpus, 2048, 1, objectives=[{"metric": "parallel/bytes_per_step", "direction": "minimize"}])
    with pytest.raises(ConfigError, match=r"parallel/bytes_per_step.*only runs on several workers record it"):
        load_study(path)
    load_study(parallel(study, corpus, 2048, 2, objectives=[{"metric": "parallel/bytes_per_step", "direction": "minimize"}]))
