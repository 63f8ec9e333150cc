"""Runs on real workers as they are read: gone on with on others, cut short, damaged."""

import json
from itertools import product

import numpy as np
import pytest

from research.errors import DataError
from research.parallel.traffic import COMBINE, COMBINE_BACKWARD, DISPATCH, DISPATCH_BACKWARD, TrafficFile, read_traffic, write_routed
from sims.measured import read_run

EXPERTS, WIDTH = 8, 16


def write_step(folder, step, workers, tokens=6):
    """One layer: what `workers` choose at random, and the bytes that they send for it, counted here token by token."""
    ids = np.random.default_rng(step).integers(-1, EXPERTS, (workers, tokens, 2)).astype(np.int16)
    sent = np.zeros((workers, workers), np.int64)
    for rank, token in product(range(workers), range(tokens)):
        for other in {int(expert) // (EXPERTS // workers) for expert in ids[rank, token] if expert >= 0}:
            sent[rank, other] += WIDTH * 4
    ways = {DISPATCH: sent, COMBINE: sent.T, DISPATCH_BACKWARD: sent.T, COMBINE_BACKWARD: sent}
    TrafficFile(folder / "traffic.jsonl").append([{(step, 1, name): matrix[rank] for name, matrix in ways.items()} for rank in range(workers)])
    write_routed(folder / "routed", [{(step, 1): [ids[rank]]} for rank in range(workers)])


@pytest.fixture
def folder(tmp_path):
    moe = {"n_routed_experts": EXPERTS, "device_limit": 2}
    training = {"precision": "float32", "activation_checkpointing": "none"}
    (tmp_path / "config.json").write_text(json.dumps({"model": {"hidden_size": WIDTH, "moe": moe}, "training": training}))
    return tmp_path


def test_a_run_that_went_on_with_other_workers_is_compared_over_the_last_ones(folder):
    for step, workers in ((1, 4), (2, 4), (3, 2)):
        write_step(folder, step, workers)
    found = read_run(folder)
    assert (found.workers, found.steps, found.left_out, found.agrees) == (2, 1, 2, True)
    assert all(phase.measured > 0 for phase in found.phases)


def test_one_byte_is_found(folder):
    write_step(folder, 1, 4)
    text = (folder / "traffic.jsonl").read_text().splitlines()
    row = json.loads(text[0])
    row["bytes"][1][2] += 1
    (folder / "traffic.jsonl").write_text("\n".join([json.dumps(row), *text[1:]]) + "\n")
    assert sum(phase.different for phase in read_run(folder).phases) == 1


def test_a_line_that_a_crash_cut_short_does_not_spoil_the_next(folder):
    write_step(folder, 1, 2)
    path = folder / "traffic.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert read_run_or_none(folder) is None, "a phase of the only step is gone"
    write_step(folder, 2, 2)
    assert len(read_traffic(path)) == 3 + 4
    assert (read_run(folder).steps, read_run(folder).left_out) == (1, 1)


def read_run_or_none(folder):
    try:
        return read_run(folder)
    except DataError:
        return None


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {"moe": null}}', '{"model": {"moe": {"n_routed_experts": 8, "device_limit": 1}}}'])
def test_a_damaged_configuration_is_one_error(folder, text):
    write_step(folder, 1, 2)
    (folder / "config.json").write_text(text)
    with pytest.raises(DataError, match=r"config\.json: is not the configuration of a run with experts"):
        read_run(folder)
