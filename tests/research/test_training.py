"""The loop on real text of this installation: it learns, it resumes to the bit, it says when it diverges."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from research.config import DataConfig, RunConfig
from research.configfile import load_run_config
from research.data.batches import batch, heldout_batches
from research.data.prepare import prepare
from research.errors import CheckpointError
from research.evaluation.bits_per_byte import evaluate_domains
from research.model.transformer import Transformer
from research.training import checkpoint, records
from research.training.loop import train
from research.training.optimizer import learning_rate
from research.training.records import JsonlRecorder, Record
from sweeps import schema


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOELAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        torch.set_num_threads(1)
        yield


def small(**training) -> RunConfig:
    settings = {
        "train_tokens": 30 * 512,
        "batch_size": 8,
        "record_every": 5,
        "validate_every": 15,
        "checkpoint_every": 10,
        "trace_every": 15,
        "validation_tokens": 2048,
    }
    return load_run_config(
        {
            "model": {"preset": "deepseek-v2-nano", "vocab_size": 512},
            "data": {"corpus": "installed", "max_train_megabytes": 1, "tokenizer_vocab_size": 512, "sequence_length": 64},
            "training": {**settings, "optimizer": {"learning_rate": 0.003, "warmup_steps": 5}, **training},
        }
    )


def never(record: Record) -> bool:
    return False


def losses(path):
    return {r["step"]: r[records.LOSS] for r in map(json.loads, path.read_text().splitlines())}


def test_names_are_those_of_the_schema():
    shared = {n: v for n, v in vars(records).items() if n.isupper() and isinstance(v, str)}
    assert len(shared) > 12
    assert all(getattr(schema, name) == value for name, value in shared.items())


def test_it_learns_and_a_stopped_run_goes_on_to_the_bit(tmp_path):
    config = small(cache_bits=[16, 4])
    whole = train(config, tmp_path / "a", JsonlRecorder(tmp_path / "a" / "m.jsonl"), never)
    stopped = train(config, tmp_path / "b", JsonlRecorder(tmp_path / "b" / "m.jsonl"), lambda record: record.step >= 15)
    assert (stopped.state, stopped.steps) == ("stopped", 15)
    resumed = train(config, tmp_path / "b", JsonlRecorder(tmp_path / "b" / "m.jsonl"), never)
    assert whole.state == resumed.state == "finished"
    first, second = losses(tmp_path / "a" / "m.jsonl"), losses(tmp_path / "b" / "m.jsonl")
    assert first == second
    assert first[30] < math.log(512) - 1  # uniform is ln 512
    weights = [checkpoint.load_model(tmp_path / d)[0].state_dict() for d in "ab"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    np.testing.assert_array_equal(whole.trace.expert_ids, resumed.trace.expert_ids)
    assert list(whole.trace.steps) == [15, 30]
    assert whole.metrics[records.BITS_PER_BYTE] == resumed.metrics[records.BITS_PER_BYTE] < 5
    assert 0 < whole.metrics[records.DISTINCT_DEVICES] <= 3
    full, wide, narrow = (whole.metrics[m] for m in (records.BITS_PER_BYTE, *(records.CACHE_BITS_PER_BYTE.format(bits) for bits in (16, 4))))
    assert 0 < abs(wide - full) < abs(narrow - full) < 0.01
    assert resumed.metrics[records.CACHE_BITS_PER_BYTE.format(4)] == narrow
    assert whole.metrics[records.CACHE_BYTES_PER_TOKEN.format(16)] == whole.metrics[records.KV_BYTES_PER_TOKEN]
    assert records.CACHE_BITS_PER_BYTE.format(8) not in whole.metrics


def test_a_checkpoint_of_another_configuration_is_refused_with_the_difference(tmp_path):
    train(small(train_tokens=512), tmp_path, JsonlRecorder(tmp_path / "m.jsonl"), never)
    with pytest.raises(CheckpointError, match=r"training\.batch_size: 8 -> 4"):
        train(small(train_tokens=512, batch_size=4), tmp_path, JsonlRecorder(tmp_path / "m.jsonl"), never)


def test_a_crash_between_the_two_renames_leaves_the_old_checkpoint(tmp_path):
    config = small(train_tokens=10 * 512)
    train(config, tmp_path, JsonlRecorder(tmp_path / "m.jsonl"), never)
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    assert checkpoint.load_model(tmp_path)[1] == config


def test_a_damaged_checkpoint_is_named(tmp_path):
    train(small(train_tokens=512), tmp_path, JsonlRecorder(tmp_path / "m.jsonl"), never)
    earlier = tmp_path / "checkpoints" / "step-000001"
    shutil.copytree(tmp_path / "checkpoint", earlier)
    weights = tmp_path / "checkpoint" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    for act in (
        lambda: checkpoint.load_model(tmp_path),
        lambda: train(small(train_tokens=512), tmp_path, JsonlRecorder(tmp_path / "m.jsonl"), never),
    ):
        with pytest.raises(CheckpointError, match="is damaged") as caught:
            act()
    assert str(earlier) in str(caught.value)
    (tmp_path / "checkpoint" / "state.json").write_text(json.dumps({"format": checkpoint.FORMAT}))
    with pytest.raises(CheckpointError, match="holds no configuration"):
        checkpoint.load_model(tmp_path)


def test_a_checkpoint_is_written_by_the_clock_too(tmp_path):
    config = small(train_tokens=6 * 512, record_every=1, checkpoint_every=1000, checkpoint_seconds=1e-6)
    train(config, tmp_path, JsonlRecorder(tmp_path / "m.jsonl"), lambda record: record.step == 3)
    saved = []
    original, checkpoint.save = checkpoint.save, lambda *given, **named: saved.append(given[4].step) or original(*given, **named)
    try:
        train(config, tmp_path, JsonlRecorder(tmp_path / "m.jsonl"), never)
    finally:
        checkpoint.save = original
    assert saved == [4, 5, 6]


def test_divergence_ends_the_run_and_is_said(tmp_path):
    result = train(small(optimizer={"learning_rate": 1e30, "warmup_steps": 0}), tmp_path, JsonlRecorder(tmp_path / "m.jsonl"), never)
    assert result.state == "diverged"
    assert "step" in result.reason


def test_micro_batches_change_nothing_but_rounding(tmp_path):
    results = []
    for size in (None, 2):
        config = small(train_tokens=5 * 512, micro_batch_size=size)
        # Dropping depends on who shares a forward pass, so it is off here.
        mapping = {"moe": {"capacity_factor": None}}
        config = load_run_config({"model": {**_model(config), **{"moe": {**_model(config)["moe"], **mapping["moe"]}}}, **_rest(config)})
        path = tmp_path / str(size)
        train(config, path, JsonlRecorder(path / "m.jsonl"), never)
        results.append(losses(path / "m.jsonl")[5])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def _model(config):
    from research.config import to_dict

    return to_dict(config.model)


def _rest(config):
    from research.config import to_dict

    value = to_dict(config)
    return {key: value[key] for key in ("data", "training", "seed")}


def test_learning_rate_is_the_papers_schedule():
    config = small().training.optimizer
    rates = [learning_rate(config, step, (step - 1) * 512, 1000 * 512) for step in (1, 5, 6, 600, 601, 900, 901, 1000)]
    peak = 0.003
    assert rates == pytest.approx([peak / 5, peak, peak, peak, peak * 0.316, peak * 0.316, peak * 0.316**2, peak * 0.316**2])


def test_bits_per_byte_of_a_uniform_model_is_log2_vocabulary_over_bytes_per_token():
    config = small()
    data = prepare(config.data)
    model = Transformer(config.model).initialise(0)
    torch.nn.init.zeros_(model.lm_head.weight)
    scores = evaluate_domains(model, data, config.data, 2048)
    for domain, score in scores.items():
        windows = np.concatenate(list(heldout_batches(data, config.data, domain=domain, max_tokens=2048)))[:, 1:]
        text = data.tokenizer().decode(windows.ravel().tolist(), skip_special_tokens=True)
        assert score.bytes == pytest.approx(len(text.encode()), abs=40)
        assert score.bits == pytest.approx(windows.size * math.log2(512), rel=1e-5)


def test_batches_are_functions_of_seed_and_step():
    config = DataConfig(corpus="installed", max_train_megabytes=1, tokenizer_vocab_size=512, sequence_length=64)
    data = prepare(config)
    one, again, other = (batch(data, config, seed=0, step=s, batch_size=8) for s in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert one.shape == (8, 65)
    assert one.max() < 512
