"""The batch ramp: stages against stepping one by one, and the exact tokens that decay and records are counted in."""

from bisect import bisect_left
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.config import DataConfig, OptimizerConfig, RunConfig, TrainingConfig
from research.configfile import load_run_config
from research.errors import ConfigError
from research.presets import preset
from research.schedule import batch_schedule, batch_size_at
from research.training.optimizer import learning_rate


@settings(max_examples=300, deadline=None)
@given(
    multiple=st.integers(1, 4),
    first=st.integers(1, 8),
    growth=st.integers(0, 12),
    ramp=st.integers(1, 4000),
    train=st.integers(1, 8000),
    length=st.integers(1, 40),
)
def test_stages_are_the_rule_applied_step_by_step(multiple, first, growth, ramp, train, length):
    first, last = first * multiple, (first + growth) * multiple
    schedule = batch_schedule(train_tokens=train, sequence_length=length, batch_size=last, first=first, ramp_tokens=ramp, multiple=multiple)
    seen, step = 0, 0
    while seen < train:
        step += 1
        exact = first + Fraction((last - first) * min(seen, ramp), ramp)
        size = schedule.batch_size(step)
        assert size == batch_size_at(seen, first=first, last=last, ramp_tokens=ramp, multiple=multiple)
        assert size % multiple == 0
        assert exact - multiple < size <= exact
        assert schedule.tokens(step - 1) == seen
        assert schedule.sequences(step - 1) * length == seen
        seen += size * length
    assert (schedule.steps, schedule.tokens(schedule.steps)) == (step, seen)


def test_without_a_ramp_every_step_has_the_batch_size():
    schedule = batch_schedule(train_tokens=1001, sequence_length=10, batch_size=5, first=None, ramp_tokens=0, multiple=1)
    assert (schedule.steps, schedule.tokens(21)) == (21, 1050)
    assert {schedule.batch_size(step) for step in range(1, 22)} == {5}


def paper() -> RunConfig:
    """Section 3.1.2: 8.1T tokens in sequences of 4K, 2304 to 9216 sequences over the first 225B, 2K steps of warm-up."""
    training = TrainingConfig(train_tokens=8_100_000_000_000, batch_size=9216, batch_ramp_from=2304, batch_ramp_tokens=225_000_000_000)
    return RunConfig(model=preset("deepseek-v2"), data=DataConfig(sequence_length=4096, tokenizer_vocab_size=102400), training=training)


def test_the_papers_schedule():
    config = paper()
    schedule = config.schedule
    assert [schedule.batch_size(step) for step in (1, config.steps)] == [2304, 9216]
    full = next(stage for stage in schedule.stages if stage.batch_size == 9216)
    # Linear in tokens: the ramp takes ramp / (length (last - first)) ln(last / first) steps, as d(size)/d(step) is in proportion to size.
    assert full.first_step == pytest.approx(225e9 / (4096 * 6912) * 1.3863, rel=1e-3)
    assert 225e9 <= full.tokens < 225e9 + 9216 * 4096

    def rate(step):
        return learning_rate(config.training.optimizer, step, schedule.tokens(step - 1), config.tokens)

    peak = rate(2000)
    assert rate(1000) == pytest.approx(peak / 2)
    for share, factor in ((0.6, 0.316), (0.9, 0.316**2)):
        drop = bisect_left(range(config.steps + 1), True, lo=2000, key=lambda step: rate(step) < 1.1 * factor * peak)
        assert rate(drop) == pytest.approx(factor * peak)
        # The first step that begins with so large a share of the tokens seen: by steps it would come much later, as the ramp's hold fewer tokens.
        assert schedule.tokens(drop - 2) < share * config.tokens <= schedule.tokens(drop - 1)
        assert drop > share * config.steps + 400


def test_warm_up_is_in_steps_and_a_share_is_a_decimal():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, decay_at=(0.1,), decay_factor=0.5)
    assert [learning_rate(config, step, 0, 10) for step in (1, 2, 4)] == [0.25, 0.5, 1.0]
    # 0.1 * 30 is a little more than 3 in binary; the tenth of 30 tokens is 3 all the same.
    assert [learning_rate(config, 5, seen, 30) for seen in (2, 3)] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"batch_ramp_from": 4}, "batch_ramp_from=4 and batch_ramp_tokens=None go together"),
        ({"batch_ramp_from": 9, "batch_ramp_tokens": 10}, "batch_ramp_from=9 must lie in 1..8"),
        ({"batch_ramp_from": 3, "batch_ramp_tokens": 10, "micro_batch_size": 2}, "must be a multiple of micro_batch_size=2"),
        ({"batch_ramp_from": 4, "batch_ramp_tokens": 0}, "batch_ramp_tokens=0 must be > 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints=0 must be > 0"),
        ({"precision": "float16"}, "training.precision = 'float16'"),
    ],
)
def test_mistakes_are_named(training, said):
    with pytest.raises(ConfigError, match=said):
        load_run_config({"model": "deepseek-v2-nano", "training": {"train_tokens": 1000, "batch_size": 8, **training}})
