"""The search without workers: which cells are drawn, that a killed one goes on alike, and what Optuna is told."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, InMemoryStorage

from sweeps import constraints, schema
from sweeps.constraints import parse
from sweeps.definition import METRICS
from sweeps.samplers import spread
from sweeps.search import INFEASIBLE, NOT_TRAINED, REPEATS, Search
from sweeps.study import Study, load_study

StudyWriter = Callable[..., Path]
LIMIT, CHOSEN, LATENT = "model.moe.device_limit", "model.moe.num_experts_per_tok", "model.attention.kv_lora_rank"
EXPERT, KIND, GROUPS = "model.moe.balance.expert", "model.attention.kind", "model.attention.num_key_value_heads"
SPACE: dict[str, Any] = {
    LIMIT: [1, 2, 3, 8],
    CHOSEN: {"low": 1, "high": 8},
    LATENT: {"low": 8, "high": 128, "step": 8},
    EXPERT: {"low": 0.0001, "high": 0.1, "log": True},
    GROUPS: {"when": {KIND: "gqa"}, "choices": [1, 2, 4]},
    KIND: ["mla", "gqa"],
}
BASELINE = {LIMIT: 3, CHOSEN: 6, LATENT: 16, EXPERT: 0.003, GROUPS: 4, KIND: "mla"}
BITS, KV = schema.BITS_PER_BYTE, schema.KV_BYTES_PER_TOKEN
ONE, TWO = [{"metric": BITS}], [{"metric": BITS}, {"metric": KV}]


def summary(cell: dict[str, Any], state: str = schema.FINISHED) -> dict[str, Any]:
    cell = {**BASELINE, **cell}
    bits = 2 + 0.1 / cell[CHOSEN] + 1 / cell[LATENT] + 0.01 / (cell[LIMIT] or 8) + cell[EXPERT]
    return {"state": state, "steps": 7, "metrics": {BITS: bits, KV: 4.0 * cell[LATENT], schema.DEVICE_VIOLATION: cell[CHOSEN] / 8}}


def draw(study: Study, root: Path, count: int | None = None, storage: BaseStorage | None = None) -> list[dict[str, Any]]:
    """Ask and tell until `count` cells were trained, or all; each call is a driver of its own."""
    root.mkdir(exist_ok=True)
    search, found = Search(study, root, storage), list[dict[str, Any]]()
    while (count is None or len(found) < count) and (trial := search.ask()) is not None:
        if search.rejects(trial) is None:
            found.append(search.cell(trial))
            search.tell(trial, [summary(found[-1])])
    return found


def trials(root: Path) -> list[optuna.trial.FrozenTrial]:
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(root / schema.JOURNAL_FILE)))
    return optuna.load_study(study_name="small", storage=storage).get_trials()


@pytest.mark.parametrize("objectives", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize("sampler", ["random", "quasi-random", "tpe", "nsga2", "gp"])
def test_a_search_that_is_killed_now_and_then_draws_what_it_would_have(
    study: StudyWriter, tmp_path: Path, sampler: str, objectives: list[Any]
) -> None:
    count = 11 if sampler == "gp" else 18  # 8 at random before the model, which takes its time
    search = {"sampler": sampler, "trials": count, "seed": 3}
    loaded = load_study(
        study(search=search, space=SPACE, baseline=BASELINE, objectives=objectives, constraints=["kv_bytes <= 800", "device_violation <= 0.8"])
    )
    whole = draw(loaded, tmp_path, storage=InMemoryStorage())
    storage = InMemoryStorage()  # all that one driver leaves to the next
    parts = [cell for n in (1, 4, 5, None) for cell in draw(loaded, tmp_path, n, storage)]
    assert len(whole) == count
    assert parts == whole
    assert whole[0] == BASELINE
    assert len({json.dumps(cell) for cell in whole}) == count, "no cell twice"
    other = load_study(study(search={**search, "seed": 4}, space=SPACE, baseline=BASELINE, objectives=objectives))
    assert draw(other, tmp_path, 5, InMemoryStorage())[1:] != whole[1:5]


def test_a_trial_that_was_killed_while_it_was_drawn_is_drawn_to_its_end(study: StudyWriter, tmp_path: Path) -> None:
    loaded = load_study(study(search={"sampler": "random", "trials": 5}, space=SPACE, baseline=BASELINE))
    whole = draw(loaded, tmp_path / "whole")
    root = tmp_path / "cut"
    draw(loaded, root, 2)
    search = Search(loaded, root)
    number = next(t.number for t in trials(tmp_path / "whole") if t.number >= len(trials(root)) and not NOT_TRAINED & t.user_attrs.keys())
    while (trial := search.ask()) is not None and trial.number < number and search.rejects(trial):
        pass
    assert trial is not None
    assert trials(root)[-1].state == optuna.trial.TrialState.RUNNING
    lines = (root / schema.JOURNAL_FILE).read_text().splitlines(keepends=True)
    (root / schema.JOURNAL_FILE).write_text("".join(lines[:-2]))  # two of its dimensions were not written yet
    assert draw(loaded, root) == whole[2:]


def test_better_cells_are_drawn_more_often_by_what_learns(study: StudyWriter, tmp_path: Path) -> None:
    mean = {}
    for sampler in ("random", "tpe"):
        search = {"sampler": sampler, "trials": 30, "seed": 1}
        loaded = load_study(study(search=search, space=SPACE, baseline=BASELINE))
        mean[sampler] = sum(summary(cell)["metrics"][BITS] for cell in draw(loaded, tmp_path, storage=InMemoryStorage())[15:]) / 15
    assert mean["tpe"] < mean["random"]


@given(share=st.floats(0, 1, exclude_max=True), low=st.integers(1, 20), width=st.integers(1, 30), step=st.integers(1, 5))
def test_shares_spread_over_a_distribution_and_stay_inside(share: float, low: int, width: int, step: int) -> None:
    for distribution in (
        IntDistribution(low, low + width * step, step=step),
        IntDistribution(low, low + width, log=True),
        FloatDistribution(low, low + width),
        FloatDistribution(low, low + width, log=True),
        FloatDistribution(low, low + width, step=0.5),
        CategoricalDistribution([None, low, "x"]),
    ):
        value = spread(share, distribution)
        assert distribution._contains(distribution.to_internal_repr(value))


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [
        (IntDistribution(1, 4), [1, 2, 3, 4]),
        (IntDistribution(2, 8, step=3), [2, 5, 8]),
        (CategoricalDistribution(["a", None]), ["a", None]),
        (FloatDistribution(0.0, 1.0, step=0.5), [0.0, 0.5, 1.0]),
    ],
)
def test_every_value_has_an_equal_part(distribution: BaseDistribution, expected: Sequence[Any]) -> None:
    count = 60
    drawn = [spread((i + 0.5) / count, distribution) for i in range(count)]
    assert [drawn.count(value) for value in expected] == [count // len(expected)] * len(expected)


def test_quasi_random_cells_fill_the_space_evenly(study: StudyWriter, tmp_path: Path) -> None:
    space = {CHOSEN: {"low": 1, "high": 4}, LATENT: {"low": 8, "high": 64, "step": 8}}
    loaded = load_study(study(search={"sampler": "quasi-random", "trials": 17}, space=space, baseline={CHOSEN: 4, LATENT: 64}))
    drawn = [t.params for t in trials_of(loaded, tmp_path / "r")][1:17]
    assert sorted(p[CHOSEN] for p in drawn) == [n for n in range(1, 5) for _ in range(4)]
    assert sorted(p[LATENT] for p in drawn) == [n for n in range(8, 72, 8) for _ in range(2)]


def trials_of(study: Study, root: Path) -> list[optuna.trial.FrozenTrial]:
    draw(study, root)
    return trials(root)


def test_what_breaks_a_bound_known_before_training_is_never_trained(study: StudyWriter, tmp_path: Path) -> None:
    bounds = ["kv_cache_bytes_per_token <= 160", "activated_parameters < 1e6", "communication_seconds > 0"]
    loaded = load_study(study(search={"sampler": "tpe", "trials": 12}, space=SPACE, baseline=BASELINE, constraints=bounds))
    found = draw(loaded, tmp_path / "r")
    assert len(found) == 12
    assert all(loaded.run_config(cell, 0).model.attention.kv_lora_rank <= 24 for cell in found if cell[KIND] == "mla")
    refused = [t for t in trials(tmp_path / "r") if INFEASIBLE in t.user_attrs]
    assert len(refused) > 5
    assert {t.state.name for t in refused} == {"PRUNED"}
    assert all(t.value is None and t.constraints["kv_cache_bytes_per_token <= 160"] > 0 for t in refused)
    assert all("it is" in t.user_attrs[INFEASIBLE] for t in refused)
    kept = [t for t in trials(tmp_path / "r") if not NOT_TRAINED & t.user_attrs.keys()]
    assert all(set(t.constraints) == set(bounds) and max(t.constraints.values()) <= 0 for t in kept)


def test_cells_of_a_design_that_break_a_bound_do_not_count(study: StudyWriter, tmp_path: Path) -> None:
    loaded = load_study(
        study(search={"sampler": "grid"}, space={LATENT: [16, 64, 128], CHOSEN: [2, 6]}, baseline={LATENT: 16, CHOSEN: 6}, constraints=["kv_bytes <= 320"])
    )  # fmt: skip
    search = Search(loaded, tmp_path)
    assert search.total == 4
    assert len(search.infeasible) == 2
    assert len(draw(loaded, tmp_path / "r")) == 4
    assert [t.state.name for t in trials(tmp_path / "r")].count("PRUNED") == 2


def test_measured_bounds_are_told_when_the_runs_have_ended(study: StudyWriter, tmp_path: Path) -> None:
    loaded = load_study(study(space={CHOSEN: [2, 6]}, baseline={CHOSEN: 6}, constraints=["routing/device_violation <= 0.5", "diverged"]))
    search = Search(loaded, tmp_path)
    for states in ((schema.FINISHED, schema.FINISHED), (schema.FINISHED, schema.DIVERGED)):
        trial = search.ask()
        assert trial is not None
        assert search.rejects(trial) is None
        search.tell(trial, [summary({LATENT: 16, LIMIT: 3, EXPERT: 0, **search.cell(trial)}, state) for state in states])
    first, second = trials(tmp_path)
    assert first.constraints == {"routing/device_violation <= 0.5": pytest.approx(0.5), "diverged": 0.0}, "0.75 is half as much again"
    assert second.constraints == {"routing/device_violation <= 0.5": pytest.approx(-0.5), "diverged": 1.0}
    assert (first.state.name, second.state.name) == ("COMPLETE", "PRUNED")
    assert second.intermediate_values == {7: pytest.approx(summary({CHOSEN: 2, LATENT: 16, LIMIT: 3, EXPERT: 0})["metrics"][BITS])}


def test_a_bound_that_nothing_measured_is_no_answer(study: StudyWriter, tmp_path: Path) -> None:
    loaded = load_study(study(space={CHOSEN: [2, 6]}, baseline={CHOSEN: 6}, constraints=["routing/dropped_share <= 0.5"]))
    search = Search(loaded, tmp_path)
    trial = search.ask()
    assert trial is not None
    search.tell(trial, [summary({LATENT: 16, LIMIT: 3, EXPERT: 0, CHOSEN: 6})])
    assert trials(tmp_path)[0].state.name == "FAIL"


def test_a_repeated_cell_is_told_with_what_the_first_one_reached(study: StudyWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_study(
        study(search={"sampler": "random", "trials": 6}, space={CHOSEN: [2, 6], LIMIT: [2, 3]}, baseline={CHOSEN: 6, LIMIT: 3}, constraints=["diverged"])
    )  # fmt: skip
    root = tmp_path
    monkeypatch.setattr("sweeps.search.TRIES", 15)
    search = Search(loaded, root)
    while (trial := search.ask()) is not None:
        search.tell(trial, [summary({LATENT: 16, EXPERT: 0, **search.cell(trial)})])
    repeated = [t for t in trials(root) if REPEATS in t.user_attrs]
    assert len(repeated) >= 15, "four cells, six trials: the search gives up"
    assert all(t.values == trials(root)[t.user_attrs[REPEATS]].values for t in repeated[:5])
    assert all(t.constraints == {"diverged": 0.0} for t in repeated[:5])


@pytest.mark.parametrize(
    ("text", "metric", "kept", "broken"),
    [
        ("kv_cache_bytes_per_token <= 4096", KV, [4096, 1], [4097]),
        ("device_violation<0.5", schema.DEVICE_VIOLATION, [0.4999], [0.5, 0.6]),
        ("validation/bits_per_byte/ko >= 2", "validation/bits_per_byte/ko", [2, 3], [1.9]),
        ("training_flops > 1e9", "training_flops", [1.1e9], [1e9]),
        ("dead_experts <= 0", schema.DEAD_EXPERTS, [0], [1]),
    ],
)
def test_a_sentence_bounds_a_metric(text: str, metric: str, kept: list[float], broken: list[float]) -> None:
    constraint = parse(text, METRICS)
    assert constraint.metric == metric
    assert all(constraint.violation(value) <= 0 for value in kept)
    assert all(constraint.violation(value) > 0 for value in broken)


def test_an_ambiguous_short_name_is_asked_about() -> None:
    with pytest.raises(ValueError, match="routing/x, train/x: say which"):
        parse("x <= 1", ["train/x", "routing/x"])
    assert parse("not diverged", METRICS).metric == constraints.DIVERGED
