"""Several workers compute what one does, send what the routing says, and end together."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import parallel_worker
import pytest
import small_runs
import torch
from safetensors.torch import load_file

from research.config import to_dict
from research.errors import CollectiveFailed, ConfigError
from research.parallel import launch
from research.parallel.launch import run_workers
from research.parallel.traffic import COMBINE, COMBINE_BACKWARD, DISPATCH, DISPATCH_BACKWARD, PAYLOAD, read_routed, read_traffic
from research.parallel.world import ALONE, World, join
from sims.measured import read_run

DROPPING = {"capacity_factor": 1.0, "undropped_sequences": 0.25, "expert_devices": 4, "device_limit": 2}
FIFTY = {"precision": "float64", "micro_batch_size": 4, "train_tokens": 50 * 8 * 32, "validate_every": 25, "checkpoint_every": 25}


def settings(text, moe=DROPPING, **training):
    return small_runs.config(text, model={"moe": moe}, training={**FIFTY, **training})


def alone(config, folder):
    folder.mkdir()
    return parallel_worker.run(ALONE, None, config, folder)


def several(config, folder, workers, parts=None, *, stop_at=None, misbehave=None, witness=False, **how):
    folder.mkdir(exist_ok=True)
    return run_workers(parallel_worker.run, (config, folder, stop_at, misbehave, witness), workers=workers, expert_parallel=parts, **how)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_alike(folder, wanted, tolerance, names=None):
    ours, theirs = records(folder), records(wanted)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for our, their in zip(ours, theirs, strict=True):
        for name, value in their.items():
            if name != "train/tokens_per_second" and (names is None or name in names):
                assert our[name] == pytest.approx(value, abs=tolerance, rel=tolerance), (our["step"], name)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return small_runs.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def single(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("single") / "run"
    alone(settings(text), folder)
    return folder


@pytest.fixture(scope="module")
def four(text, tmp_path_factory):
    """A run on four workers, with what they routed; stopped at step 30 and gone on with on two."""
    folder = tmp_path_factory.mktemp("four") / "run"
    found = several(settings(text), folder, 4, stop_at=30, witness=True)
    return folder, found


def test_fifty_steps_on_four_workers_then_two_are_those_of_one(text, single, four):
    folder, found = four
    assert [f[:2] for f in found] == [("stopped", 30)] * 4
    gone_on = several(settings(text), folder, 2)
    assert gone_on[0] == gone_on[1]
    assert gone_on[0][:2] == ("finished", 50)
    assert records(single)[-1]["routing/dropped_share"] > 0
    assert_alike(folder, single, 1e-9)
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, wanted = (load_file(place / "checkpoint" / file) for place in (folder, single))
        assert ours.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(ours[name], wanted[name], atol=1e-9, rtol=1e-7)


def others(text):
    """Single precision with blocks computed again; expert capacity in the order of the tokens; second experts by chance; losses over a batch."""
    moe = {"capacity_of": "expert", "capacity_factor": 1.0, "expert_devices": 4, "device_limit": None, "num_experts_per_tok": 1}
    balance = {"expert": 0.01, "device": 0.0, "communication": 0.0, "scope": "batch"}
    by_chance = {**moe, "num_experts_per_tok": 2, "norm_topk_prob": True, "second_expert": "by_chance"}
    few = {"train_tokens": 6 * 8 * 32, "validate_every": 6}
    return {
        "float32": settings(text, precision="float32", train_tokens=20 * 8 * 32, validate_every=20, activation_checkpointing="blocks"),
        "switch": settings(text, {**moe, "balance": balance}, **few),
        "gshard": settings(text, {**by_chance, "balance": {**balance, "count_first_choice_only": True}}, **few),
    }


@pytest.fixture(scope="module")
def replicas(text, tmp_path_factory):
    """Each of `others` on four workers, two replicas of two."""
    folder = tmp_path_factory.mktemp("replicas")
    tasks = [(config, folder / name) for name, config in others(text).items()]
    for _, place in tasks:
        place.mkdir()
    run_workers(parallel_worker.run_each, (tasks,), workers=4, expert_parallel=2)
    return folder


@pytest.mark.parametrize("kind", ["float32", "switch", "gshard"])
def test_two_replicas_compute_what_one_worker_does(text, replicas, tmp_path, kind):
    """Twenty steps in single precision to 1e-4; capacities, chances and losses of a batch, which are those of all workers, to 1e-9."""
    alone(others(text)[kind], tmp_path / "one")
    assert records(tmp_path / "one")[-1]["routing/dropped_share"] > 0
    if kind == "float32":
        names = ("train/loss", "train/balance_expert", "train/balance_device", "train/balance_communication")
        assert_alike(replicas / kind, tmp_path / "one", 1e-4, names)
    else:
        assert_alike(replicas / kind, tmp_path / "one", 1e-9)


def test_the_bytes_that_moved_are_those_of_the_routing(text, four):
    """Each token goes once to each worker that has an expert of it; gradients go the same ways."""
    folder, _ = four
    width, workers, per_worker = settings(text).model.hidden_size * 8, 4, 2
    counted, routed = read_traffic(folder / "traffic.jsonl"), read_routed(folder / "routed")
    steps = {(step, layer) for step, layer, phase in counted if phase == DISPATCH and step <= 30}
    assert len(steps) == 30 * len(settings(text).model.moe_layers)
    for step, layer in steps:
        wanted = np.zeros((workers, workers), np.int64)
        for rank, tokens in enumerate(routed[step, layer]):
            for chosen in tokens:
                for worker in {expert // per_worker for expert in chosen if expert >= 0}:
                    wanted[rank, worker] += width
        for phase, matrix in ((DISPATCH, wanted), (COMBINE, wanted.T), (DISPATCH_BACKWARD, wanted.T), (COMBINE_BACKWARD, wanted)):
            np.testing.assert_array_equal(counted[step, layer, phase], matrix, err_msg=f"{step} {layer} {phase}")


def test_under_autocast_and_with_blocks_computed_again_the_bytes_are_those_predicted_too(text, tmp_path):
    """To the byte, of all that the simulator compares."""
    config = settings(text, precision="bfloat16", activation_checkpointing="blocks", train_tokens=2 * 8 * 32, validate_every=2)
    several(config, tmp_path / "run", 2, witness=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps(to_dict(config)))
    found = read_run(tmp_path / "run")
    assert (found.steps, found.agrees) == (2, True)
    sent = {phase.name: phase.measured for phase in found.phases}
    assert sent[DISPATCH] == 2 * sent[DISPATCH_BACKWARD] > 0


def test_the_records_say_what_left_its_worker_per_step(four):
    folder, _ = four
    counted, layers = read_traffic(folder / "traffic.jsonl"), 0
    record = next(r for r in records(folder) if r["step"] == 7)
    left = 0
    for (step, _, phase), matrix in counted.items():
        if step == 7 and phase in PAYLOAD:
            left += matrix.sum() - matrix.trace()
            layers += phase == DISPATCH
    assert layers > 0
    assert record["parallel/bytes_per_step"] == left
    assert record["parallel/seconds_per_step"] > 0
    assert 0 <= record["parallel/received_violation"] < 3


def test_the_device_limit_bounds_what_a_token_sends(four):
    folder, _ = four
    reached = [len({e // 2 for e in chosen if e >= 0}) for ranks in read_routed(folder / "routed").values() for tokens in ranks for chosen in tokens]
    assert max(reached) == 2


@pytest.mark.parametrize(
    ("how", "said"), [("kill", "rank 1 was killed|failed|waited for rank 1"), ("raise", "a bug in the model"), ("hang", "waited for rank 1")]
)
def test_a_worker_that_fails_takes_the_others_with_it_and_the_run_goes_on(text, tmp_path, how, said):
    config = settings(text, train_tokens=12 * 8 * 32, checkpoint_every=5, validate_every=12)
    pids = []
    began = time.monotonic()
    with pytest.raises((CollectiveFailed, RuntimeError), match=said) as caught:
        several(config, tmp_path / "run", 2, misbehave=(1, 8, how), timeout_seconds=5.0, started=pids.extend)
    assert time.monotonic() - began < 60
    if how == "hang":
        assert "of layer" in str(caught.value)
        assert "of step 8" in str(caught.value)
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
    if how == "kill":
        several(config, tmp_path / "run", 2)
        alone(config, tmp_path / "one")
        assert_alike(tmp_path / "run", tmp_path / "one", 1e-9)


def test_what_cannot_be_shared_out_is_refused(text):
    config = settings(text)
    with pytest.raises(ConfigError) as caught:
        World(0, 3, 3).check(config)
    assert len(caught.value.problems) == 3
    assert "training.batch_size = 8" in str(caught.value)
    assert "model.moe.expert_devices = 4" in str(caught.value)
    World(0, 4, 2).check(config)
    World(0, 2, 2).check(replace(config, model=replace(config.model, moe=None)))


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    """And Ctrl-C, which a terminal sends to all of them, is the parent's alone from their first instruction on."""
    here = os.path.dirname(parallel_worker.__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(os.path.dirname(here)), here])}
    parent = subprocess.Popen([sys.executable, parallel_worker.__file__, str(tmp_path)], env=environment, start_new_session=True)
    try:
        until = time.monotonic() + 120
        while len(marks := list(tmp_path.glob("rank-*"))) < 2 or not all(mark.read_text() for mark in marks):
            assert time.monotonic() < until, "the workers have not started"
            time.sleep(0.05)
        pids = [int(mark.read_text()) for mark in marks]
        for pid in pids:
            os.kill(pid, signal.SIGINT)
        time.sleep(0.5)
        assert parent.poll() is None, "its workers took no notice"
    finally:
        parent.kill()
        parent.wait()
    until = time.monotonic() + 10
    while alive := [pid for pid in pids if os.path.exists(f"/proc/{pid}")]:
        assert time.monotonic() < until, f"orphans: {alive}"
        time.sleep(0.05)


def test_each_worker_has_a_gpu_of_its_own_or_none_has(monkeypatch):
    assert launch._backend("auto", 8) == "gloo"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert launch._backend("cpu", 8) == "gloo"
    assert launch._backend("auto", 2) == "nccl"
    with pytest.raises(ConfigError, match="--workers 8: each needs a GPU of its own and this machine has 2; at most 2, or --device cpu"):
        launch._backend("cuda", 8)


def test_workers_that_do_not_meet_say_where_and_for_how_long():
    with pytest.raises(CollectiveFailed, match=r"rank 1 of 2: the workers did not all meet at 127\.0\.0\.1:\d+ within 1 s"):
        join(1, 2, address=f"127.0.0.1:{launch.free_port()}", timeout_seconds=1.0)
