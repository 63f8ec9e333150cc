"""`check`: every mistake of a study at once, each with its path, and never anything but sentences."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from research.errors import ConfigError
from sweeps.__main__ import app
from sweeps.check import problems
from sweeps.check_cells import notes
from sweeps.space import cells
from sweeps.study import load_study

StudyWriter = Callable[..., Path]
LIMIT, CHOSEN, LATENT = "model.moe.device_limit", "model.moe.num_experts_per_tok", "model.attention.kv_lora_rank"
SEARCH = {"sampler": "random", "trials": 20}


def told(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_study(path)
    return list(caught.value.problems)


def test_sixteen_mistakes_in_one_file_are_sixteen_sentences(study: StudyWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    path = study(
        name="not a name",
        space={LIMIT: [3, 9], CHOSEN: [6, "six"], "model.moe.balanced": [1]},
        baseline={LIMIT: 3, CHOSEN: 6},
        search={"sampler": "grid", "trials": 3},
        objectives=[{"metric": "validation/bits_per_byte"}, {"metric": "simulation/seconds"}],
        constraints=["kv_bytes <= 4096", "kv_cache <= 4096", "device_violation << 2"],
        pruner={"kind": "median", "patience": 3},
        seeds=[1, 1],
        expects={"effect": -0.01, "source": "a paper"},
        budget={"matched": "training_flops", "adjust": "training.tokens"},
        retune={"factors": [1.0]},
        resources={"gpus": "required", "cpus_per_worker": 0},
        cluster={"file": "h900"},
        sampler="grid",
    )
    found = told(path)
    expected = {
        "name = 'not a name'": "letters",
        "sampler = 'grid'": "unknown key",
        f"space.{CHOSEN} = 'six'": "integer",
        "space.model.moe.balanced = [1]": "no such setting; did you mean",
        "baseline: has no value for model.moe.balanced": "",
        "space: cell (device_limit=9)": "1..8",
        "search: trials=3": "grid",
        "objectives.metric = 'simulation/seconds'": "did you mean 'simulation/",
        "constraints.1 = 'kv_cache <= 4096'": "did you mean",
        "constraints.2 = 'device_violation << 2'": "expected NAME <= NUMBER",
        "pruner: {'patience': 3}": "startup_trials",
        "pruner.kind = 'median'": "2 objectives",
        "seeds = [1, 1]": "distinct",
        "expects: effect=-0.01": "> 0",
        "budget.adjust = 'training.tokens'": "did you mean 'training.train_tokens'?",
        "retune: factors=[1.0]": "at least two",
        "resources: cpus_per_worker=0": ">= 1",
        "resources.gpus = 'required'": "no GPU",
        "cluster.file = 'h900'": "h800",
    }
    for where, remedy in expected.items():
        assert any(p.startswith(f"{path}: {where}") and remedy in p for p in found), (where, found)
    assert len(found) == len(set(found)) == len(expected), found


def test_the_command_prints_them_and_ends_with_1(study: StudyWriter) -> None:
    result = CliRunner().invoke(app, ["check", str(study(seeds=[2, 2], budget={"matched": "flops"}))])
    assert result.exit_code == 1
    assert isinstance(result.exception, ConfigError)
    assert len(result.exception.problems) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"search": SEARCH, "space": {LIMIT: {"low": 2, "high": 12}, CHOSEN: [2, 6]}}, [f"space.{LIMIT} = 12", "possible in no cell", "1..8"]),
        ({"search": SEARCH, "space": {LIMIT: [2, 3], CHOSEN: [6, 33]}}, [f"space.{CHOSEN} = 33", "possible in no cell"]),
        ({"search": {"sampler": "nsga2", "trials": 10, "population": 10}}, ["population=10", "2..9"]),
        ({"search": {"sampler": "tpe", "trials": 10, "population": 5}}, ["population=5", "only nsga2"]),
        ({"search": {"sampler": "cmaes", "trials": 10}}, ["search.sampler = 'cmaes'", "'quasi-random'"]),
        ({"pruner": {"kind": "median"}}, ["pruner.kind = 'median'", "confirmatory"]),
        ({"search": SEARCH, "pruner": {"kind": "median"}}, ["pruner.kind = 'median'", "last step (16) alone", "validate_every = 200"]),
        ({"search": SEARCH, "pruner": {"kind": "median", "startup_trials": 20}}, ["startup_trials = 20", "search.trials = 20"]),
        ({"search": SEARCH, "pruner": {"kind": "wilcoxon"}}, ["2 seeds cannot show p < 0.1", "5 seeds"]),
        (
            {"search": SEARCH, "pruner": {"kind": "median", "warmup_steps": 16}, "objectives": [{"metric": "train/loss"}]},
            ["pruner.warmup_steps = 16", "16 steps"],
        ),
        (
            {"search": SEARCH, "pruner": {"kind": "median"}, "objectives": [{"metric": "simulation/all_to_all_seconds"}]},
            ["known at a run's end alone"],
        ),
        ({"budget": {"matched": "tokens", "adjust": "training.train_tokens"}}, ["budget", "nothing is adjusted"]),
        ({"budget": {"matched": "kv_bytes", "adjust": "training.train_tokens"}}, ["does not change kv_bytes", LATENT]),
        ({"budget": {"matched": "training_flops", "adjust": CHOSEN}}, ["is searched over itself"]),
        ({"budget": {"matched": "training_flops", "adjust": "training.optimizer.learning_rate"}}, ["is no whole number"]),
        ({"budget": {"matched": "activated_parameters"}}, ["num_experts_per_tok=2", "no setting is adjusted"]),
        ({"space": {"training.train_tokens": [1024, 2048]}, "baseline": {"training.train_tokens": 2048}}, ["what budget.matched = tokens"]),
        (
            {
                "retune": {"factors": [0.5, 1]},
                "space": {"training.optimizer.learning_rate": [0.1, 0.2]},
                "baseline": {"training.optimizer.learning_rate": 0.1},
            },
            ["searched and re-tuned"],
        ),
        ({"constraints": ["kv_bytes <= 10"]}, ["the baseline breaks kv_bytes <= 10", "it is 320"]),
        ({"constraints": ["bits <= 10"]}, ["constraints.0 = 'bits <= 10'", "no run records"]),
        ({"constraints": ["dispatch_seconds <= nan"]}, ["constraints.0", "bounds nothing"]),
        ({"constraints": [{"kv_bytes": 3}]}, ["constraints.0", "string"]),
        ({"constraints": "diverged"}, ["constraints = 'diverged'", "list"]),
        ({"resources": {"gpus": "always"}}, ["resources.gpus = 'always'", "'required'"]),
        ({"search": {"sampler": "grid"}, "space": {LIMIT: {"low": 1, "high": 8, "step": 0}, CHOSEN: [2, 6]}}, [f"space.{LIMIT}", "step=0"]),
    ],
)
def test_a_mistake_is_named(study: StudyWriter, changes: dict[str, Any], words: list[str]) -> None:
    changes = {"base": {**yaml.safe_load(study().read_text())["base"]}, **changes}
    changes["base"]["model"] = {"preset": "deepseek-v2-nano", "vocab_size": 300}
    found = told(study(**changes))
    assert any(all(word in problem for word in words) for problem in found), found


def test_a_model_without_experts_records_no_routing(study: StudyWriter) -> None:
    base = yaml.safe_load(study().read_text())["base"]
    base["model"] |= {"moe": {"first_k_dense_replace": 2}}
    for wanted in ({"objectives": [{"metric": "routing/device_violation"}]}, {"constraints": ["all_to_all_seconds <= 1"]}):
        found = told(study(base=base, **wanted))
        assert len(found) == 1
        assert "without routed experts routes nothing" in found[0]
    layers = {"model.moe.first_k_dense_replace": [1, 2]}
    found = told(study(space=layers, baseline={"model.moe.first_k_dense_replace": 1}, objectives=[{"metric": "routing/expert_violation/layer_1"}]))
    assert "not every run records it" in found[0], "one cell of the design has no such layer"


def test_cells_of_a_design_that_break_a_constraint_are_listed(study: StudyWriter) -> None:
    loaded = load_study(study(space={LATENT: [16, 64, 128]}, baseline={LATENT: 16}, constraints=["kv_bytes <= 320", "diverged"]))
    assert notes(loaded) == ["cell (kv_lora_rank=128) is not trained: it breaks kv_bytes <= 320: it is 576"]
    result = CliRunner().invoke(app, ["check", str(study(space={LATENT: [16, 64, 128]}, baseline={LATENT: 16}, constraints=["kv_bytes <= 320"]))])
    assert result.exit_code == 0
    assert "kv_lora_rank=128) is not trained" in result.stdout


def test_gpus_are_only_asked_for_where_the_study_insists(study: StudyWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    load_study(study(resources={"gpus_per_worker": 1.0}))
    path = study(resources={"gpus": "required"})
    assert any("resources.gpus = 'required'" in p for p in told(path))
    load_study(path, here=False)  # it is sent to a cluster, which will say
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    load_study(path)


JUNK: list[Any] = [
    *(None, True, -1, 0, 1, 7, 70, 0.5, -2.5, float("nan"), float("inf"), "", "grid", "model", [], {}, [1, 1], [None], ["x", 2]),
    *({"when": {LIMIT: 3}, "choices": [1]}, {"low": 1, "high": 2}, {"preset": "deepseek-v2-nano"}),
]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += leaves(item, (*path, key))
    return found


def test_whatever_stands_in_a_study_it_is_read_or_told_of_in_sentences(study: StudyWriter) -> None:
    """Sixty times one to three values of a rich study are replaced by something else: it never ends in another error."""
    text = study(
        search={"sampler": "tpe", "trials": 12},
        constraints=["kv_bytes <= 1000"],
        pruner={"kind": "median", "startup_trials": 4},
        budget={"matched": "training_flops", "adjust": "training.train_tokens", "within": 0.2},
        retune={"factors": [0.5, 1.0]},
        space={LIMIT: [2, 3], CHOSEN: {"when": {LIMIT: [2, 3]}, "choices": [2, 6]}},
    ).read_text()
    draw = random.Random(0)
    assert problems(yaml.safe_load(text), "it", here=False) == ["it: " + LAST_STEP]
    silent = 0
    for _ in range(60):
        mapping = yaml.safe_load(text)
        for _ in range(draw.randint(1, 3)):
            *parents, key = draw.choice(leaves(mapping))
            node = mapping
            for part in parents:
                node = node[part]
            node[key] = copy.deepcopy(draw.choice(JUNK))
        found = problems(mapping, "it", here=False)
        assert all(problem.startswith("it: ") and "\n" not in problem for problem in found)
        silent += not found
    assert silent < 10, "nearly all of it is a mistake"


LAST_STEP = "pruner.kind = 'median': validation/bits_per_byte is recorded at the last step (16) alone; lower base.training.validate_every = 200"


RATE = "training.optimizer.learning_rate"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seeds:", "\tseeds:", ["line ", "column 1", "spaces"]),
        ("name: small", "name: small\non: 3", ["the key True", "quote it"]),
        ("batch_size: 4", "batch_size: yes", ["training.batch_size = True", "expected a number"]),
        ("- 1", "- on", ["seeds.1 = True", "expected a number"]),
        ("name: small", "name: small\na: &a [*a]", ["contains itself"]),
        ("preset: deepseek-v2-nano", "preset: [deepseek-v2-nano]", ["model.preset = ['deepseek-v2-nano']", "did you mean 'deepseek-v2-nano'?"]),
    ],
)
def test_oddities_of_yaml_are_mistakes_in_one_line(study: StudyWriter, old: str, new: str, words: list[str]) -> None:
    path = study()
    path.write_text(path.read_text().replace(old, new, 1))
    found = told(path)
    assert any(all(word in problem for word in words) for problem in found), found
    assert not any("\n" in problem for problem in found)
    path.write_text("# nothing yet\n")
    assert told(path) == [f"{path}: is empty, expected a mapping of keys to values"]


def test_numbers_with_an_exponent_are_numbers(study: StudyWriter) -> None:
    text = study(space={RATE: ["low", "high"]}, baseline={RATE: 0.001}).read_text()
    path = study()
    path.write_text(text.replace("- low", "- 1e-3").replace("- high", "- 2e+1"))
    assert load_study(path).space[RATE] == [0.001, 20.0]
    assert load_study(study(), [f"space.{RATE}=[1e-3, 1e-2]", f"baseline.{RATE}=1e-2"]).baseline[RATE] == 0.01


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cluster": {"nodes": 0}}, ["cluster: nodes=0 must be >= 1"]),
        ({"space": {LIMIT: [2, 3], CHOSEN: {"when": {LIMIT: []}, "choices": [2, 6]}}}, [f"space.{CHOSEN}.when.{LIMIT} = []", "never holds"]),
        ({"space": {RATE: {"low": 0.1, "high": 10**9, "step": 0.1}}, "baseline": {RATE: 1}}, ["one-factor design of", "at most 10,000"]),
        ({"space": {RATE: [0.1, float("inf")]}, "baseline": {RATE: 0.1}}, [f"space.{RATE} = inf", "finite"]),
        ({"space": {RATE: ["0.1", 0.2]}, "baseline": {RATE: 0.1}}, [f"space.{RATE} = '0.1'", "in quotes"]),
        ({"space": {"seed": [1, 2]}, "baseline": {"seed": 1}}, ["space.seed = [1, 2]", "seeds: [...]"]),
        ({"space": {"model.moe": [1, 2]}, "baseline": {"model.moe": 1}}, ["space.model.moe = [1, 2]", "is a section", "model.moe."]),
        ({"space": {"model.tie_word_embeddings": [True, "yes"]}, "baseline": {"model.tie_word_embeddings": True}}, ["'yes'", "true or false"]),
        ({"space": {"training.batch_size": [4, 100]}, "baseline": {"training.batch_size": 4}}, ["batch_size=100", "3,200 tokens", "2,048 (+56.2%"]),
        ({"seeds": [2**40]}, ["seeds = [1099511627776]", "at most"]),
        ({"name": "x" * 200}, ["name = 'xxx", "1 to 100"]),
        ({"resources": {"gpus_per_worker": 1.5}}, ["gpus_per_worker=1.5", "whole number"]),
        ({"resources": {"workers": 4000}}, ["resources.workers = 4000", "there is room for", "RAY_ADDRESS"]),
        ({"resources": {"cpus_per_worker": 4000}}, ["resources.cpus_per_worker = 4000", "RAY_ADDRESS"]),
    ],
)
def test_what_was_let_through_once_is_named(study: StudyWriter, changes: dict[str, Any], words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = told(study(**changes))
    assert any(all(word in problem for word in words) for problem in found), found
    assert len(found) <= 2, "and nothing is told of that only follows from it"


def test_settings_of_experts_in_a_dense_model(study: StudyWriter) -> None:
    base = yaml.safe_load(study().read_text())["base"]
    found = told(study(base={**base, "model": {"preset": "dense-nano", "vocab_size": 300}}))
    assert [p.split(": ", 1)[1] for p in found] == [
        f"space.{path}: base has no model.moe; take it out, or take a preset that has one" for path in (LIMIT, CHOSEN)
    ]


def test_a_wrong_leaf_of_base_hides_no_impossible_cell(study: StudyWriter) -> None:
    base = yaml.safe_load(study().read_text())["base"]
    base["training"] |= {"batchsize": 4, "train_tokens": "many"}
    found = told(study(base=base, space={LIMIT: [3, 9], CHOSEN: [2, 6]}))
    assert len(found) == 3
    assert "device_limit=9 must lie in 1..8" in found[2]


def test_a_section_of_the_wrong_type_is_one_mistake(study: StudyWriter) -> None:
    assert len(told(study(space=[1]))) == 1
    assert len(told(study(baseline=None))) == 1
    assert len(told(study(space={LIMIT: {"low": 3, "high": 2}, CHOSEN: [2, 6]}))) == 1


def test_equal_numbers_are_one_cell(study: StudyWriter) -> None:
    loaded = load_study(study(space={RATE: [1.0, 2.0]}, baseline={RATE: 1}))
    assert len(cells(loaded)) == 2
