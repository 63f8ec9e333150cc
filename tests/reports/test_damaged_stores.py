"""A store's files with wrong values: said with file, key and value, never a traceback and never a number made up."""

import json
from collections import defaultdict

import pytest
import yaml

from reports import document, shape
from reports.__main__ import main
from reports.analysis import analyse
from reports.page import page
from reports.store import load
from research.errors import DataError
from sweeps import schema


@pytest.fixture
def root(write_store, tmp_path):
    return write_store(tmp_path / "s", {"kv_lora_rank=16": 0.2}, seeds=(0, 1))


def change(path, keys, value):
    read, write = (yaml.safe_load, yaml.safe_dump) if path.suffix == ".yaml" else (json.loads, json.dumps)
    whole = read(path.read_text())
    *parents, last = keys
    owner = whole
    for key in parents:
        owner = owner[key]
    owner[last] = value
    path.write_text(write(whole))


@pytest.mark.parametrize(
    ("file", "keys", "value", "words"),
    [
        ("runs/001-0/run.json", ("seed",), "x", "run.json: seed = 'x': expected a whole number: the run is left out"),
        ("runs/001-0/run.json", ("variant",), None, "run.json: variant = null: expected a text: the run is left out"),
        ("runs/001-0/run.json", ("parameters",), [1], "run.json: parameters = [1]: expected a mapping: the run is left out"),
        ("runs/000-0/summary.json", ("metrics",), "x", "summary.json: metrics = 'x': expected a mapping; it counts as missing"),
        ("runs/000-0/summary.json", ("tokens",), "x", "summary.json: tokens = 'x': expected a number; it counts as missing"),
        ("runs/000-0/summary.json", ("versions",), [1], "summary.json: versions = [1]: expected a mapping; it counts as missing"),
        ("runs/000-0/summary.json", ("metrics", schema.BITS_PER_BYTE), 1e308, "validation/bits_per_byte is not a finite number"),
        ("runs/000-0/summary.json", ("metrics", schema.BITS_PER_BYTE), True, "validation/bits_per_byte is not a finite number"),
        ("runs/000-0/config.json", ("model",), "x", "config.json: model = 'x': expected a mapping; it counts as missing"),
        ("runs/000-0/config.json", ("model", "moe"), [], "config.json: moe = []: expected a mapping; it counts as missing"),
        ("state.json", ("planned",), "many", "state.json: planned = 'many': expected a whole number; it counts as missing"),
        ("data.json", ("domains", "en"), {}, "data.json: domains.en = {}: expected train_bytes, train_tokens"),
        ("data.json", ("identity",), 3, "data.json: identity = 3: expected a mapping; it counts as missing"),
    ],
)
def test_a_wrong_value_is_said_at_its_place_and_the_rest_stands(root, file, keys, value, words):
    change(root / file, keys, value)
    analysis = analyse(load(root))
    text = document.html(page(analysis, {}, defaultdict(lambda: "not drawn")))
    assert any(words in problem.text for problem in analysis.incomplete), analysis.incomplete
    assert document.inline(document.safe(words)) in text
    assert next(v for v in analysis.variants if v.name == "device_limit=8").effect is not None


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("seeds",), None, "seeds = null: expected a list"),
        (("space",), "x", "space = 'x': expected a mapping"),
        (("objectives",), [{}], "objectives: {}: expected {metric: NAME"),
        (("cluster", "nodes"), "two", "cluster.nodes = 'two': expected a whole number"),
        (("budget",), [], "budget = []: expected a mapping"),
        (("question",), 3, "question = 3: expected a text"),
    ],
)
def test_a_study_of_which_no_page_can_be_made_is_refused(root, keys, value, words):
    change(root / schema.STUDY_FILE, keys, value)
    with pytest.raises(DataError) as caught:
        load(root)
    assert any(f"{root}/study.yaml: {words}" in problem for problem in caught.value.problems)


def test_a_configuration_of_another_version_costs_its_lines_alone(root):
    change(root / "runs" / "000-0" / schema.CONFIG_FILE, ("training", "batch_size"), None)
    text = document.markdown(page(analyse(load(root)), {}, defaultdict(lambda: "not drawn")))
    assert "configuration is not one that this version can read" in text
    assert "**KV latent = 16** costs" in text


def test_true_is_no_number():
    assert shape.wrong({"seed": True, "baseline": 1}, {"seed": shape.WHOLE, "baseline": shape.FLAG}).keys() == {"seed", "baseline"}


@pytest.mark.parametrize("size", ["nan", "inf", "0", "-0.1"])
def test_an_effect_that_is_no_size_is_wrong_usage(root, size, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["reports", "build", str(root), "--effect", size])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "must be a number > 0" in capsys.readouterr().err
    assert not (root / "report").exists()
