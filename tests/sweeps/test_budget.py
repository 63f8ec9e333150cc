"""Budgets: the solver against looking at every value, and every quantity matched by its knob."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import STANDIN
from hypothesis import given, settings
from hypothesis import strategies as st

from research import accounting
from research.errors import ConfigError
from sims import simulate
from sweeps import schema
from sweeps.budget import closest, value_at, with_values
from sweeps.driver import Driver
from sweeps.executors import InlineExecutor
from sweeps.plan import plan
from sweeps.quantities import communication
from sweeps.space import cells
from sweeps.study import Study, load_study

StudyWriter = Callable[..., Path]
LIMIT, CHOSEN, LATENT = "model.moe.device_limit", "model.moe.num_experts_per_tok", "model.attention.kv_lora_rank"
WIDTH, LAYERS, TOKENS = "model.moe.moe_intermediate_size", "model.num_hidden_layers", "training.train_tokens"


@settings(max_examples=200)
@given(
    start=st.integers(1, 60),
    target=st.integers(-50, 5000),
    slope=st.sampled_from([-7, -1, 1, 3, 40]),
    low=st.integers(0, 20),
    high=st.integers(60, 200),
    unit=st.sampled_from([None, 1, 3]),
    flat=st.sampled_from([1, 4]),
)
def test_the_solver_finds_what_looking_at_every_value_finds(
    start: int, target: int, slope: int, low: int, high: int, unit: int | None, flat: int
) -> None:
    """Of any monotone amount, with steps or without, in any range of possible values."""

    def amount(value: int) -> float | None:
        return float(slope * (value // flat)) if low <= value <= high else None

    start = min(max(start, low), high)
    possible = [v for v in range(low, high + 1) if v % (unit or 1) == 0]
    value, found = closest(amount, start, target, unit)
    assert found == amount(value)
    assert value in possible
    assert abs(found - target) == min(abs(slope * (v // flat) - target) for v in possible)


def test_strides_over_impossible_values_are_found() -> None:
    value, found = closest(lambda v: float(v) if v % 8 == 0 and v <= 160 else None, 32, 100.0, None)
    assert (value, found) == (96, 96.0) or (value, found) == (104, 104.0)


@pytest.mark.parametrize(
    ("budget", "space", "baseline"),
    [
        ({"matched": "training_flops", "adjust": TOKENS}, {CHOSEN: [2, 6]}, {CHOSEN: 6}),
        ({"matched": "training_flops", "adjust": WIDTH}, {CHOSEN: [2, 6]}, {CHOSEN: 6}),
        ({"matched": "activated_parameters", "adjust": WIDTH}, {CHOSEN: [4, 6]}, {CHOSEN: 6}),
        ({"matched": "total_parameters", "adjust": WIDTH, "multiple_of": 2}, {"model.moe.n_routed_experts": [32, 64]}, {"model.moe.n_routed_experts": 32}),
        ({"matched": "kv_bytes", "adjust": LATENT, "within": 0.05}, {LAYERS: [2, 4]}, {LAYERS: 2}),
        ({"matched": "communication_seconds", "adjust": TOKENS}, {LIMIT: [2, 3, 8]}, {LIMIT: 3}),
        ({"matched": "communication_bytes", "adjust": TOKENS}, {CHOSEN: [2, 6]}, {CHOSEN: 6}),
    ],
)  # fmt: skip
def test_every_quantity_is_held_equal(study: StudyWriter, budget: dict[str, Any], space: dict[str, Any], baseline: dict[str, Any]) -> None:
    base = {
        "model": {"preset": "deepseek-v2-nano", "vocab_size": 300},
        "data": {"corpus": "installed", "tokenizer_vocab_size": 300, "sequence_length": 32},
        "training": {"train_tokens": 200_000, "batch_size": 4},
    }
    loaded = load_study(study(base=base, space=space, baseline=baseline, budget=budget))
    amounts = []
    for cell in cells(loaded):
        config, match = loaded.matched_config(cell, 0)
        assert match is not None
        assert match.requested == loaded.requested
        assert abs(match.difference) <= loaded.budget.within
        assert match.value == value_at(config, budget["adjust"])
        assert match.value % (loaded.budget.multiple_of or 1) == 0
        amounts.append(measured(loaded, budget["matched"], cell))
        assert amounts[-1] == pytest.approx(match.achieved, rel=1e-12)
    unmatched = loaded.unmatched_config(cells(loaded)[1], 0)
    assert loaded.run_config(cells(loaded)[1], 0) != unmatched, "without turning the knob it would not match"
    assert loaded.run_config(loaded.baseline, 0) == loaded.unmatched_config(loaded.baseline, 0), "the baseline stays as it is"


def measured(study: Study, quantity: str, cell: dict[str, Any]) -> float:
    """The quantity, counted here without the module that matches it."""
    config = study.run_config(cell, 0)
    model = config.model
    if quantity.startswith("communication"):
        result = simulate(study.all_to_all(config))
        layer = result.seconds if quantity.endswith("seconds") else result.dispatch.nvlink_bytes + result.combine.nvlink_bytes
        if quantity.endswith("bytes"):
            layer += result.dispatch.infiniband_bytes + result.combine.infiniband_bytes
        gpus = study.cluster.nodes * study.cluster.gpus_per_node
        return 2 * layer * len(model.moe_layers) * config.tokens / (gpus * study.cluster.tokens_per_device)
    return {
        "training_flops": lambda: accounting.train_flops_per_token(model, config.data.sequence_length) * config.tokens,
        "activated_parameters": lambda: accounting.activated_parameters(model),
        "total_parameters": lambda: accounting.total_parameters(model),
        "kv_bytes": lambda: (model.attention.kv_lora_rank + model.attention.qk_rope_head_dim) * 2 * model.num_hidden_layers,
    }[quantity]()


def test_communication_of_a_dense_model_is_nothing(study: StudyWriter) -> None:
    loaded = load_study(study())
    config = loaded.run_config(loaded.baseline, 0)
    assert communication(loaded, config)[0] > 0
    assert communication(loaded, with_values(config, {"model.moe.first_k_dense_replace": 2})) == (0.0, 0.0)


def test_what_cannot_be_matched_is_told_with_the_closest(study: StudyWriter) -> None:
    path = study(space={LAYERS: [2, 40]}, baseline={LAYERS: 2}, budget={"matched": "kv_bytes", "adjust": LATENT})
    with pytest.raises(ConfigError) as caught:
        load_study(path)
    [problem] = caught.value.problems
    assert "cell (num_hidden_layers=40)" in problem
    assert f"cannot be held at 320 within 2.0%; the closest {LATENT} = 1 gives 1,360 (+325.0%)" in problem


def test_run_json_and_the_plan_say_what_was_matched(study: StudyWriter, local: Path) -> None:
    path = study(space={CHOSEN: [2, 6]}, baseline={CHOSEN: 6}, seeds=[0], budget={"matched": "training_flops", "adjust": TOKENS, "within": 0.05})
    loaded, root = load_study(path), local / "small"
    assert Driver(loaded, root, lambda s, runs: InlineExecutor(), lambda line: None, STANDIN).run() == "finished"
    about = json.loads((root / "runs" / "001-0" / schema.RUN_FILE).read_text())
    config = json.loads((root / "runs" / "001-0" / schema.CONFIG_FILE).read_text())
    matched = about["matched"]
    assert (matched["quantity"], matched["adjusted"]) == ("training_flops", TOKENS)
    assert matched["value"] == config["training"]["train_tokens"] > 2048
    assert matched["achieved"] == pytest.approx(matched["requested"], rel=0.05)
    rows = plan(loaded, root, 1)["rows"]
    assert rows[1]["train_tokens"] == matched["value"]
    assert rows[1]["matched"] == matched
    assert rows[1]["train_flops"] == pytest.approx(rows[0]["train_flops"], rel=0.05)


@given(chosen=st.integers(1, 40), limit=st.none() | st.integers(0, 10), expert=st.sampled_from([0, 0.1, 1]))
@settings(max_examples=60, deadline=None)
def test_the_short_way_to_a_configuration_is_the_long_way(chosen: int, limit: int | None, expert: float) -> None:
    """Changing leaves of the base gives what reading the whole mapping anew gives, errors too."""
    base = {"model": "deepseek-v2-nano", "data": {"tokenizer_vocab_size": 300}, "training": {"train_tokens": 2048}}
    cell = {CHOSEN: chosen, LIMIT: limit, "model.moe.balance.expert": expert}
    short = Study(name="s", question="?", base=base, baseline={}, space={})
    long = Study(name="s", question="?", base=base, baseline={}, space={})
    long.__dict__["_base_config"] = None
    assert outcome(short, cell) == outcome(long, cell)


def outcome(study: Study, cell: dict[str, Any]) -> Any:
    try:
        return repr(study.unmatched_config(cell, 3))
    except ConfigError as error:
        return error.problems
