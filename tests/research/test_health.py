"""A run that is not well says so: diverged, dead experts, no memory."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from small_runs import config

from research.errors import OutOfMemory
from research.model.transformer import Transformer
from research.training import checkpoint, health, records
from research.training.health import DEAD_AFTER, PATIENCE, Diverged, Health, largest_gradients, naming_out_of_memory
from research.training.loop import train
from research.training.records import JsonlRecorder


def run(settings, out, should_stop=lambda record: False, **more):
    return train(settings, out, JsonlRecorder(out / "metrics.jsonl"), should_stop, **more)


def spoil(monkeypatch, step, parameter, value):
    """Give `parameter` a gradient of `value` in one step, before anything has looked at it."""
    real, steps = torch.nn.utils.get_total_norm, []

    def norm(gradients):
        steps.append(0)
        if len(steps) == step:
            parameter_of(gradients).fill_(value)
        return real(gradients)

    def parameter_of(gradients):
        model = Transformer(config_of[0].model)
        return gradients[[name for name, _ in model.named_parameters()].index(parameter)]

    config_of = []
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", norm)
    return config_of


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_ends_the_run_before_it_is_used(tmp_path, text, monkeypatch, value):
    settings = config(text, training={"checkpoint_every": 100})
    stopped = run(settings, tmp_path / "before", lambda record: record.step == 6)
    assert stopped.steps == 6
    spoil(monkeypatch, 7, "layers.1.mlp.gate.weight", value).append(settings)
    seen = {}
    real = health.largest_gradients
    monkeypatch.setattr(health, "largest_gradients", lambda model: seen.update(model.state_dict()) or real(model))
    result = run(settings, tmp_path / "diverged")
    assert (result.state, result.steps, result.tokens) == ("diverged", 6, 6 * 256)
    assert re.search(rf"gradient norm {value} at step 7; largest gradient by layer: layers\.1 \(mlp\.gate\.weight {value}\), ", result.reason)
    assert "not finite in 1 of 5" in result.reason
    assert not (tmp_path / "diverged" / "checkpoint").exists()
    weights = checkpoint.load_model(tmp_path / "before")[0].state_dict()
    assert all(torch.equal(seen[name], weights[name]) for name in weights), "the weights are those before the step"


def test_the_largest_gradient_of_each_layer_is_named_in_order(text):
    model = Transformer(config(text).model)
    for value, (_, parameter) in enumerate(model.named_parameters(), 1):
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad.view(-1)[0] = value
    names = [name for name, _ in model.named_parameters()]
    last = {layer: max(i for i, name in enumerate(names) if name.startswith(layer)) for layer in ("layers.0", "layers.1", "norm", "lm_head")}
    said = largest_gradients(model)
    assert said.startswith(f"largest gradient by layer: lm_head.weight ({last['lm_head'] + 1}), norm.weight ({last['norm'] + 1}), layers.1 (")
    assert f"layers.0 ({names[last['layers.0']].removeprefix('layers.0.')} {last['layers.0'] + 1})" in said


def test_a_loss_that_stays_above_knowing_nothing_is_divergence(tmp_path, text):
    """Finite all along, but the rate is a thousand times too large."""
    settings = config(text, training={"train_tokens": 400 * 64, "batch_size": 2, "optimizer": {"learning_rate": 10.0, "warmup_steps": 0}})
    result = run(settings, tmp_path)
    assert result.state == "diverged"
    found = re.match(
        r"loss ([\d.e+]+) at step (\d+), and above ([\d.]+) .* for 100 steps; gradient norm .*; largest gradient by layer: ", result.reason
    )
    assert float(found[1]) > float(found[3]) >= 1.5 * math.log(270)
    assert PATIENCE < int(found[2]) < 400
    assert result.steps == int(found[2]) - 1
    # A run taken up again knows how long it has been bad: it ends in the same step.
    again = run(settings, tmp_path)
    assert (again.state, again.reason) == ("diverged", result.reason)


def test_a_loss_of_the_beginning_or_a_spike_is_no_divergence(text):
    model = Transformer(config(text).model)
    well = Health()
    for step in range(1, 1000):
        high = step % PATIENCE != 0  # one good step in a hundred is enough
        well.check_step(model, step, 20.0 if high else 5.0, 1.0, 270)
        if step == 1:
            assert well.first_loss == 20.0, "begun there: the bound is above it"
    spiky = Health()
    spiky.check_step(model, 1, 5.6, 1.0, 270)
    for step in range(2, PATIENCE + 1):
        spiky.check_step(model, step, 50.0, 1.0, 270)
    spiky = Health.from_dict(json.loads(json.dumps(spiky.to_dict())))
    with pytest.raises(Diverged, match=f"for {PATIENCE} steps"):
        spiky.check_step(model, PATIENCE + 1, 50.0, 1.0, 270)


def test_experts_without_tokens_are_named_once_and_counted(tmp_path, text, monkeypatch):
    """Hashed experts of which the vocabulary reaches only some: the text has no token of the others."""
    settings = config(
        text,
        model={"moe": {"n_routed_experts": 270, "num_experts_per_tok": 1, "selection": "hash", "expert_devices": 1, "device_limit": None}},
        training={"train_tokens": 14 * 256, "checkpoint_every": 7},
    )
    said = []
    result = run(settings, tmp_path / "a", announce=said.append)
    (warning,) = result.warnings
    assert [line for line in said if line.startswith("warning")] == [warning]
    assert warning.startswith("warning: layer 1: experts ")
    assert f"no token in the last {DEAD_AFTER} records, at step {DEAD_AFTER}" in warning
    # Each id has an expert of its own here, so the dead ones are the tokens that no batch of the last ten had.
    from research.data.batches import batch
    from research.data.prepare import prepare
    from research.model.router import hash_table

    table = hash_table(270, settings.model.moe, 1)[:, 0]
    data = prepare(settings.data)
    for step, count in ((DEAD_AFTER, None), (14, result.metrics[records.DEAD_EXPERTS])):
        steps = range(step - DEAD_AFTER + 1, step + 1)
        used = {int(i) for s in steps for i in batch(data, settings.data, seed=0, step=s, batch_size=8)[:, :-1].ravel()}
        dead = sorted(set(range(270)) - {int(table[i]) for i in used})
        assert count is None or count == len(dead)
        if count is None:
            assert re.search(r"experts ([\d, ]+):", warning)[1] == ", ".join(map(str, dead))
    # Taken up again after it was said, it is not said again, and is in the result all the same.
    run(settings, tmp_path / "b", lambda record: record.step == 12)
    said.clear()
    assert run(settings, tmp_path / "b", announce=said.append).warnings == (warning,)
    assert said == ["resumed after step 12 of 14"]


def test_a_model_larger_than_memory_is_one_error(tmp_path, text):
    vast = replace(config(text), model=replace(config(text).model, vocab_size=10**13))
    with pytest.raises(
        OutOfMemory, match=r"out of memory on cpu when the model was built: 1,164\.2 TiB more were asked for, [\d.,]+ \w+ of [\d.,]+ \w+ are free"
    ) as info:
        run(vast, tmp_path)
    assert info.value.asked == 10**13 * 32 * 4
    assert 0 < info.value.free < info.value.asked


def test_a_batch_larger_than_memory_is_one_error_and_names_the_step(tmp_path, text):
    settings = config(text, training={"batch_size": 10**15, "train_tokens": 10**17})
    with pytest.raises(OutOfMemory, match=r"in step 1: .* more were asked for, .* a smaller training\.micro_batch_size"):
        run(settings, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == []


def test_the_words_of_a_gpu_are_understood_and_other_errors_go_through(monkeypatch):
    monkeypatch.setattr(health, "_memory", lambda place: (3 * 2**30, 80 * 2**30))
    with (
        pytest.raises(OutOfMemory, match=r"in step 3: 20\.0 GiB more were asked for, 3\.0 GiB of 80\.0 GiB are free"),
        naming_out_of_memory(torch.device("cuda"), "in step 3"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB")
    with pytest.raises(RuntimeError, match="shapes") as info, naming_out_of_memory(torch.device("cpu"), "in step 3"):
        raise RuntimeError("shapes do not fit")
    assert not isinstance(info.value, OutOfMemory)
