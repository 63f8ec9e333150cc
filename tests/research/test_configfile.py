"""The door: what is right passes, what is wrong is named with path, value and remedy."""

import pytest

from research.config import config_id
from research.configfile import load_run_config, merge, parse_yaml
from research.errors import ConfigError

RUN = {"model": "deepseek-v2-nano", "training": {"train_tokens": 1000}}


def test_a_preset_with_overrides():
    config = load_run_config(RUN, overrides=["model.moe.device_limit=2", "model.attention.q_lora_rank=null", "seed=7"])
    assert config.model.moe.device_limit == 2
    assert config.model.attention.q_lora_rank is None
    assert config_id(config) == config_id(
        load_run_config({**RUN, "seed": 7}, overrides=["model.moe.device_limit=2", "model.attention.q_lora_rank=null"])
    )
    assert config_id(config) != config_id(load_run_config(RUN))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.moe.device_limti=2", "model.moe.device_limti = 2: unknown key; did you mean 'device_limit'?"),
        ("training.seed=3", "training.seed = 3: unknown key; did you mean 'seed'?"),
        ("device_limit=3", "device_limit = 3: unknown key; did you mean 'model.moe.device_limit'?"),
        ("model.moe.device_limit=9", "device_limit=9 must lie in 1..8"),
        ("model.moe.device_limit=1", "num_experts_per_tok=6 does not fit on device_limit=1 devices of 4 experts"),
        ("model.moe.n_routed_experts=33", "n_routed_experts=33 must be divisible by expert_devices=8"),
        ("model.attention.qk_rope_head_dim=3", "qk_rope_head_dim=3 must be even"),
        ("training.train_tokens=many", "training.train_tokens = 'many': input should be a valid integer"),
        ("data.corpus=files", "paths go with corpus 'files'"),
    ],
)
def test_mistakes(override, said):
    with pytest.raises(ConfigError) as caught:
        load_run_config(RUN, overrides=[override])
    assert said in str(caught.value)


def test_all_mistakes_at_once():
    with pytest.raises(ConfigError) as caught:
        load_run_config({**RUN, "training": {"train_tokens": "x", "batch_sise": 2}, "seed": -1.5})
    assert len(caught.value.problems) == 3


def test_beside_an_unknown_preset_the_other_mistakes_are_told_too():
    with pytest.raises(ConfigError) as caught:
        load_run_config({"model": {"preset": "deepseek-v2-nan"}, "training": {"train_tokens": "x"}, "data": {"corpsu": "files"}})
    assert len(caught.value.problems) == 3


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'deepseek-v2-nano'"):
        load_run_config({**RUN, "model": "deepseek-v2-nan"})


def test_merge_lays_leaves_over_each_other():
    assert merge({"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"c": 3}, "d": [2]}) == {"a": {"b": 1, "c": 3}, "d": [2]}


def test_a_number_in_front_of_words_is_a_word():
    assert parse_yaml("{a: 1e3 GPU-hours, b: 1e3, c: -2.5E-4, d: 3e4x}") == {"a": "1e3 GPU-hours", "b": 1000.0, "c": -2.5e-4, "d": "3e4x"}
