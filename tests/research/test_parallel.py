"""Several workers compute what one does, send what the routing says, and end together."""

import json

import parallel_worker
import pytest
import small_runs
import torch
from safetensors.torch import load_file

from research.parallel.launch import run_workers
from research.parallel.world import ALONE


def settings(text, **changes):
    moe = {"capacity_factor": 1.0, "undropped_sequences": 0.25, "expert_devices": 4, "device_limit": 2, **changes.pop("moe", {})}
    training = {"precision": "float64", "micro_batch_size": 4, "train_tokens": 50 * 8 * 32, "validate_every": 25, "checkpoint_every": 25}
    return small_runs.config(text, model={"moe": moe}, training={**training, **changes.pop("training", {})}, **changes)


def alone(config, folder):
    folder.mkdir()
    return parallel_worker.run(ALONE, config, folder)


def several(config, folder, workers, parts=None, **how):
    folder.mkdir(exist_ok=True)
    return run_workers(
        parallel_worker.run, (config, folder, how.pop("stop_at", None), how.pop("misbehave", None)), workers=workers, expert_parallel=parts, **how
    )


def losses(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return small_runs.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def single(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("single") / "run"
    alone(settings(text), folder)
    return folder


@pytest.mark.parametrize(("workers", "parts"), [(2, 2), (4, 4), (4, 2)])
def test_fifty_steps_in_double_precision_are_those_of_one_worker(text, single, tmp_path, workers, parts):
    found = several(settings(text), tmp_path / "run", workers, parts)
    assert all(f == found[0] for f in found)
    for ours, wanted in zip(losses(tmp_path / "run"), losses(single), strict=True):
        for name, value in wanted.items():
            if name != "train/tokens_per_second":
                assert ours[name] == pytest.approx(value, abs=1e-9, rel=1e-9), (ours["step"], name)
    # The same checkpoint, too: whole tensors under the same names.
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, wanted = (load_file(folder / "checkpoint" / file) for folder in (tmp_path / "run", single))
        assert ours.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(ours[name], wanted[name], atol=1e-8, rtol=1e-7)
