"""A study file: what it expands to, and every mistake in it at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from research.errors import ConfigError
from sweeps import schema
from sweeps.space import Range, cells, contains, value_problem
from sweeps.study import METRICS, label, load_study

StudyWriter = Callable[..., Path]
REPOSITORY = Path(__file__).parent.parent.parent
LIMIT, CHOSEN = "model.moe.device_limit", "model.moe.num_experts_per_tok"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "sweeps" / "studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_studies_that_come_along_are_right(path: Path) -> None:
    study = load_study(path)
    assert study.name == path.stem
    assert len(study.seeds) >= 2, "one seed has no interval"


def test_one_factor_changes_one_thing_at_a_time(study: StudyWriter) -> None:
    loaded = load_study(study(space={LIMIT: [2, 3, 8], CHOSEN: [2, 6]}))
    labels = [label(cell, loaded.baseline) for cell in cells(loaded)]
    assert labels == ["baseline", "device_limit=2", "device_limit=8", "num_experts_per_tok=2"]


def test_a_grid_has_every_combination_once(study: StudyWriter) -> None:
    loaded = load_study(study(search={"sampler": "grid"}, space={LIMIT: [2, 3, 8], CHOSEN: [2, 6]}))
    found = [(cell[LIMIT], cell[CHOSEN]) for cell in cells(loaded)]
    assert found[0] == (3, 6)
    assert sorted(found) == [(m, k) for m in (2, 3, 8) for k in (2, 6)]


def test_seeds_and_cells_reach_the_configuration(study: StudyWriter) -> None:
    loaded = load_study(study())
    config = loaded.run_config({LIMIT: 2, CHOSEN: 4}, 7)
    assert config.model.moe is not None
    assert (config.model.moe.device_limit, config.model.moe.num_experts_per_tok, config.seed) == (2, 4, 7)
    assert config.model.hidden_size == 32, "what the base lays over its preset stays"


def test_overrides_reach_any_leaf(study: StudyWriter) -> None:
    loaded = load_study(study(), ["seeds=[5]", "base.training.batch_size=2"])
    assert loaded.seeds == [5]
    assert loaded.run_config(loaded.baseline, 5).training.batch_size == 2


def problems(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_study(path)
    return list(caught.value.problems)


def test_all_mistakes_at_once_each_with_path_value_and_remedy(study: StudyWriter) -> None:
    path = study(
        name="not a name",
        base={"model": {"preset": "deepseek-v2-nano"}, "training": {"train_tokens": 2048, "batchsize": 4}},
        space={"model.moe.device_limti": [2, 3], CHOSEN: [2, "six"]},
        baseline={"model.moe.device_limti": 2, CHOSEN: 4},
        objectives=[{"metric": "validation/bits_per_bite"}],
        seeds=[1, 1],
        cluster={"file": "h900"},
        resources={"workers": "some"},
    )
    found = problems(path)
    assert all(problem.startswith(f"{path}: ") for problem in found)
    for words in (
        ["name", "'not a name'", "letters"],
        ["training.batchsize = 4", "did you mean 'batch_size'?"],
        ["space.model.moe.device_limti", f"did you mean '{LIMIT}'?"],
        [f"space.{CHOSEN} = 'six'", "integer"],
        [f"baseline.{CHOSEN} = 4", "outside"],
        ["objectives", "'validation/bits_per_bite'", "did you mean 'validation/bits_per_byte'?"],
        ["seeds = [1, 1]", "distinct"],
        ["h900", "h800"],
        ["resources.workers", "'some'"],
    ):
        assert any(all(word in problem for word in words) for problem in found), (words, found)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"space": {LIMIT: [3, 9], CHOSEN: [2, 6]}}, ["device_limit=9", "1..8"]),
        ({"space": {LIMIT: [1, 3], CHOSEN: [2, 6]}}, ["device_limit=1", "does not fit"]),
        ({"baseline": {LIMIT: 3}}, ["baseline", CHOSEN]),
        ({"space": {LIMIT: [2, 3]}, "baseline": {LIMIT: 3, CHOSEN: 6}}, [f"baseline.{CHOSEN}", "not in the space"]),
        ({"space": {LIMIT: 3, CHOSEN: [2, 6]}}, [f"space.{LIMIT} = 3", "list of choices"]),
        ({"space": {LIMIT: [2, 3], CHOSEN: {"low": 2, "hihg": 6}}}, [f"space.{CHOSEN}.hihg = 6", "did you mean 'high'?"]),
        ({"space": {LIMIT: [2, 3], CHOSEN: {"low": 6, "high": 2}}}, [f"space.{CHOSEN}", "low=6 must be < high=2"]),
        ({"search": {"sampler": "tpe"}}, ["search", "trials=None"]),
        ({"objectives": [{"metrc": "train/loss"}]}, ["objectives.0.metrc", "did you mean 'metric'?"]),
        ({"cluster": {"file": "h800", "nodes": 3, "gpus_per_node": 4}}, ["12 GPUs", "32"]),
        ({"base": {"model": "deepseek-v2-nanoo", "training": {"train_tokens": 9}}}, ["model.preset", "did you mean 'deepseek-v2-nano'?"]),
        ({"baseline": [1]}, ["baseline"]),
        ({"sampler": "tpe"}, ["sampler = 'tpe'", "unknown key"]),
    ],
)
def test_a_mistake_is_named(study: StudyWriter, changes: dict[str, Any], words: list[str]) -> None:
    found = problems(study(**changes))
    assert any(all(word in problem for word in words) for problem in found), found


def test_a_range_knows_its_ends_and_its_type() -> None:
    assert contains(Range(low=2, high=6), 6)
    assert not contains(Range(low=2, high=6), 7)
    assert value_problem(CHOSEN, 2.5) is not None
    assert value_problem(LIMIT, None) is None, "null is: unrestricted"
    assert value_problem(CHOSEN, True) is not None


def test_the_metrics_of_the_schema_are_what_objectives_may_name() -> None:
    assert schema.BITS_PER_BYTE in METRICS
    assert schema.ALL_TO_ALL_SECONDS in METRICS
    assert all("/" in metric for metric in METRICS)


def test_a_study_is_yaml_that_reads_back(study: StudyWriter) -> None:
    mapping = yaml.safe_load(study().read_text())
    assert load_study(study()).name == mapping["name"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"corpus": "quickstrt"}, ["data.corpus = 'quickstrt'", "did you mean 'quickstart'?"]),
        ({"corpus": "files", "paths": ["/nowhere/*.txt"]}, ["'/nowhere/*.txt'", "matches no file"]),
        ({"corpus": "quickstart", "mixture": {"english": 1}}, ["data.mixture.english = 1", "no domain", "en"]),
    ],
)
def test_text_that_is_not_there_is_found_before_anything_is_written(study: StudyWriter, data: dict[str, Any], words: list[str]) -> None:
    base = yaml.safe_load(study().read_text())["base"]
    found = problems(study(base={**base, "data": {**data, "tokenizer_vocab_size": 300}}))
    assert any(all(word in problem for word in words) for problem in found), found


def test_a_type_does_not_hide_what_only_makes_sense_together(study: StudyWriter) -> None:
    base = yaml.safe_load(study().read_text())["base"]
    base["model"] |= {"moe": {"device_limt": 2, "n_routed_experts": "many"}}
    base["training"] |= {"train_tokens": -3, "optimizer": {"decay_at": [2]}}
    found = problems(study(base=base, cluster={"nodes": "two", "dispatch_bits": "x"}, resources={"cpus_per_worker": 0, "workers": "some"}))
    for word in (
        "device_limt",
        "n_routed_experts",
        "train_tokens=-3",
        "decay_at=[2",
        "cpus_per_worker=0",
        "cluster.nodes",
        "dispatch_bits",
        "resources.workers = ",
    ):
        assert any(word in problem for problem in found), (word, found)
    assert not any("literal[" in problem or ".int " in problem for problem in found)
    assert len(found) == len(set(found))


def test_a_key_that_stands_twice_is_a_mistake(study: StudyWriter) -> None:
    path = study()
    path.write_text(path.read_text() + "\nseeds: [4]\n")
    assert any("'seeds' stands there twice" in problem for problem in problems(path))


def test_space_and_baseline_are_reached_by_set(study: StudyWriter) -> None:
    loaded = load_study(study(), [f"space.{LIMIT}=[2, 3, 8]", f"baseline.{LIMIT}=8"])
    assert loaded.space[LIMIT] == [2, 3, 8]
    assert loaded.baseline[LIMIT] == 8


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"objectives": [{"metric": "validation/bits_per_byte/zz"}]}, "validation/bits_per_byte/zz"),
        ({"objectives": [{"metric": "train/loss"}, {"metric": "train/loss"}]}, "twice"),
        ({"question": ""}, "must say what is asked"),
    ],
)
def test_questions_that_no_run_can_answer(study: StudyWriter, changes: dict[str, Any], word: str) -> None:
    assert any(word in problem for problem in problems(study(**changes)))
