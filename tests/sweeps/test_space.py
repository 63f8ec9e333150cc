"""Spaces with conditions: cells of designs, each once, and what exists in them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from research.errors import ConfigError
from sweeps.space import Conditional, Range, cell_key, cells, resolve, suggest, suggest_cell
from sweeps.study import label, load_study

StudyWriter = Callable[..., Path]
KIND, GROUPS, LATENT = "model.attention.kind", "model.attention.num_key_value_heads", "model.attention.kv_lora_rank"
LIMIT, CHOSEN = "model.moe.device_limit", "model.moe.num_experts_per_tok"
ATTENTION: dict[str, Any] = {
    KIND: ["mla", "mqa", "gqa"],
    GROUPS: {"when": {KIND: "gqa"}, "choices": [1, 2, 4]},
    LATENT: {"when": {KIND: ["mla"]}, "choices": {"low": 16, "high": 64, "step": 16}},
}
BASELINE = {KIND: "mla", GROUPS: 4, LATENT: 64}


def test_a_grid_has_a_conditional_dimension_only_where_it_exists(study: StudyWriter) -> None:
    loaded = load_study(study(space=ATTENTION, baseline=BASELINE, search={"sampler": "grid"}, budget={"matched": "none"}))
    found = [(c[KIND], c[GROUPS], c[LATENT]) for c in cells(loaded)]
    assert found[0] == ("mla", 4, 64)
    assert sorted(found) == sorted([*(("mla", 4, n) for n in (16, 32, 48, 64)), ("mqa", 4, 64), *(("gqa", n, 64) for n in (1, 2, 4))])


def test_one_factor_sets_the_condition_together_with_what_depends_on_it(study: StudyWriter) -> None:
    loaded = load_study(study(space=ATTENTION, baseline=BASELINE))
    assert [label(c, loaded.baseline) for c in cells(loaded)] == [
        "baseline",
        "kind=mqa",
        "kind=gqa",
        "kind=gqa, num_key_value_heads=1",
        "kind=gqa, num_key_value_heads=2",
        "kv_lora_rank=16",
        "kv_lora_rank=32",
        "kv_lora_rank=48",
    ]


def test_a_condition_may_hang_on_a_condition(study: StudyWriter) -> None:
    space = {CHOSEN: {"when": {LIMIT: [2]}, "choices": [2, 6]}, LIMIT: {"when": {KIND: "mqa"}, "choices": [2, 3]}, KIND: ["mla", "mqa"]}
    loaded = load_study(study(space=space, baseline={CHOSEN: 6, LIMIT: 3, KIND: "mla"}, search={"sampler": "grid"}))
    assert {(c[KIND], c[LIMIT], c[CHOSEN]) for c in cells(loaded)} == {("mla", 3, 6), ("mqa", 3, 6), ("mqa", 2, 2), ("mqa", 2, 6)}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"when": {KIND: "gqb"}, "choices": [1, 2]}, ["never holds", "'gqb'"]),
        ({"when": {"model.attention.kidn": "gqa"}, "choices": [1, 2]}, ["did you mean", KIND]),
        ({"when": {LIMIT: 3}, "choices": [1, 2]}, ["is not in the space"]),
        ({"when": {KIND: "gqa"}}, [f"space.{GROUPS}.choices", "is missing"]),
        ({"when": {}, "choices": [1, 2]}, ["expected a mapping"]),
        ({"when": {KIND: "gqa"}, "choices": [1, "two"]}, [f"space.{GROUPS}.choices = 'two'", "integer"]),
        ({"when": {KIND: "gqa"}, "choices": [1], "chioces": [2]}, ["chioces", "did you mean 'choices'?"]),
        ({"when": {GROUPS: 1}, "choices": [1, 2]}, ["circle"]),
    ],
)
def test_mistakes_in_a_condition_are_named(study: StudyWriter, entry: dict[str, Any], words: list[str]) -> None:
    path = study(space={KIND: ["mla", "gqa"], GROUPS: entry}, baseline={KIND: "mla", GROUPS: 4})
    with pytest.raises(ConfigError) as caught:
        load_study(path)
    assert any(all(word in problem for word in words) for problem in caught.value.problems), caught.value.problems


SPACE = {
    "a": ["x", "y", "z"],
    "b": Conditional(when={"a": ["x", "y"]}, choices=[1, 2, 3]),
    "c": Conditional(when={"b": 2}, choices=["u", "v"]),
    "d": [True, False],
}
BASE = {"a": "x", "b": 1, "c": "none", "d": True}


@given(st.fixed_dictionaries({"a": st.sampled_from("xyz"), "b": st.integers(1, 3), "c": st.sampled_from("uv"), "d": st.booleans()}))
def test_resolving_is_idempotent_and_hides_only_what_does_not_exist(values: dict[str, Any]) -> None:
    cell = resolve(SPACE, BASE, values)
    assert resolve(SPACE, BASE, cell) == cell
    assert cell["a"] == values["a"]
    assert cell["b"] == (values["b"] if values["a"] in "xy" else 1)
    assert cell["c"] == (values["c"] if cell["b"] == 2 and values["a"] in "xy" else "none")
    other = {**values, "c": "u" if values["c"] == "v" else "v"}
    assert (cell_key(resolve(SPACE, BASE, other)) == cell_key(cell)) == (cell["c"] == "none")


def test_a_drawn_cell_has_parameters_only_for_what_exists() -> None:
    drawing = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    seen = set()
    for _ in range(40):
        trial = drawing.ask()
        space = {KIND: ["mla", "gqa"], GROUPS: Conditional(when={KIND: "gqa"}, choices=[1, 2])}
        cell = suggest_cell(trial, space, {KIND: "mla", GROUPS: 4})
        assert set(trial.params) == ({KIND, GROUPS} if cell[KIND] == "gqa" else {KIND})
        seen.add((cell[KIND], cell[GROUPS]))
    assert seen == {("mla", 4), ("gqa", 1), ("gqa", 2)}


def test_a_range_has_levels_and_is_whole_only_for_whole_settings() -> None:
    assert Range(low=2, high=9, step=3).levels == [2, 5, 8]
    assert Range(low=0.1, high=0.3, step=0.1).levels == pytest.approx([0.1, 0.2, 0.3])
    assert Range(low=2, high=9).levels == [2, 9]
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    assert isinstance(suggest(trial, "model.moe.num_experts_per_tok", Range(low=1, high=6)), int)
    share = suggest(trial, "model.moe.undropped_sequences", Range(low=0, high=1))
    assert 0 < share < 1, "a share between two whole numbers is any number between them"
