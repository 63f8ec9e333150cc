"""A batch that goes through in smaller passes is the same batch: dropped alike, with the same gradient up to rounding."""

import itertools

import pytest
import torch
from small_runs import config, write_text

from research.data.prepare import prepare
from research.model.transformer import Transformer
from research.training import records
from research.training.health import Health
from research.training.loop import _make_batch, _optimizer_step, train
from research.training.optimizer import build_optimizer
from research.training.records import JsonlRecorder

MOE = {
    "DeepSeek-V2 (device capacity)": {"capacity_factor": 1.0},
    "GShard (expert capacity, chance)": {"capacity_factor": 1.0, "capacity_of": "expert", "second_expert": "by_chance", "device_limit": None},
    "chance alone": {"capacity_factor": None, "second_expert": "by_chance"},
    "nothing dropped": {"capacity_factor": None},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOELAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        torch.set_num_threads(1)
        yield write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("own", [None, 4])
def test_smaller_passes_give_the_same_gradient_and_drop_the_same(text, name, own):
    settings = config(text, model={"moe": MOE[name]}, training={"micro_batch_size": own})
    data = prepare(settings.data, lambda line: None)
    ids = torch.as_tensor(_make_batch(data, settings, torch.device("cpu"))(1))
    found, gradients = {}, {}
    for size in (None, 3, 1):
        model = Transformer(settings.model).initialise(0)
        optimizer = build_optimizer(model, settings.training.optimizer)
        found[size], _ = _optimizer_step(model, optimizer, settings, data, 1, ids, Health(), routing=True, size=size)
        gradients[size] = {name: p.grad for name, p in model.named_parameters()}
    for size in (3, 1):
        assert found[size] == pytest.approx(found[None], rel=2e-6)
        assert found[size][records.DROPPED_SHARE] == found[None][records.DROPPED_SHARE]
        for parameter, gradient in gradients[None].items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(gradients[size][parameter], gradient, rtol=0, atol=3e-5 * scale)
    if settings.model.moe.capacity_factor is not None:
        assert found[None][records.DROPPED_SHARE] > 0, "there was something to drop"


def test_what_is_dropped_depends_on_the_configured_micro_batch(text):
    """So that the test above can fail: cut without a decision on the whole, other tokens are dropped."""
    shares = []
    for own in (None, 1):
        settings = config(text, training={"micro_batch_size": own}, model={"moe": {"capacity_factor": 1.0}})
        data = prepare(settings.data, lambda line: None)
        ids = torch.as_tensor(_make_batch(data, settings, torch.device("cpu"))(1))
        model = Transformer(settings.model).initialise(0)
        optimizer = build_optimizer(model, settings.training.optimizer)
        shares.append(_optimizer_step(model, optimizer, settings, data, 1, ids, Health(), routing=True)[0][records.DROPPED_SHARE])
    assert shares[0] != shares[1]


def test_only_balance_over_a_batch_does_not_add_up(text):
    for scope, alpha in itertools.product(("sequence", "batch"), (0.0, 0.01)):
        balance = {"scope": scope, "expert": alpha, "device": 0.0, "communication": 0.0}
        assert config(text, model={"moe": {"balance": balance}}).micro_batches_add_up == (scope == "sequence" or alpha == 0)


def test_a_run_goes_on_from_its_checkpoint_with_smaller_passes(text, tmp_path):
    settings = config(text)
    whole = train(settings, tmp_path / "whole", JsonlRecorder(tmp_path / "whole.jsonl"), lambda record: False)
    asked = train(settings, tmp_path / "cut", JsonlRecorder(tmp_path / "cut.jsonl"), lambda record: record.step == 6)
    assert asked.state == "stopped"
    cut = train(settings, tmp_path / "cut", JsonlRecorder(tmp_path / "cut.jsonl"), lambda record: False, micro_batch_size=2)
    assert (cut.state, cut.steps, cut.tokens) == (whole.state, whole.steps, whole.tokens)
    for name in (records.LOSS, records.BITS_PER_BYTE):
        assert cut.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-4)
