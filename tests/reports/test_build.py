"""Planted truth in, the right words out; the same bytes each time; nothing missing is filled in."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from reports import analysis
from reports.build import build
from reports.store import load
from research.errors import UserError
from sweeps import schema


def test_planted_effects_get_the_right_verdict(write_store, tmp_path):
    record = load(write_store(tmp_path / "s", {"kv_lora_rank=16": 0.2, "device_limit=2": -0.1}))
    sentences = {re.search(r"\*\*(.*?)\*\*", s).group(1): s for s in analysis.verdict(record)}
    assert re.search(r"costs 0\.(19|20)\d+ ±", sentences["kv_lora_rank=16"])
    assert "the KV cache -75%" in sentences["kv_lora_rank=16"]
    assert re.search(r"gains 0\.(09|10)\d+ ±", sentences["device_limit=2"])
    assert "no difference that 3 seeds can show" in sentences["device_limit=8"]
    assert "simulated all-to-all time +33%" in sentences["device_limit=8"]


def test_intervals_are_students_and_paired(write_store, tmp_path):
    record = load(write_store(tmp_path / "s"))
    runs = record.variants
    base, other = ([r.metrics[schema.BITS_PER_BYTE] for r in runs[n]] for n in ("baseline", "device_limit=2"))
    found = analysis.effects(record, schema.BITS_PER_BYTE)["device_limit=2"]
    assert not found.pooled
    d = np.subtract(other, base)
    assert found.mean == pytest.approx(d.mean())
    assert found.high - found.mean == pytest.approx(4.302652729911275 * d.std(ddof=1) / np.sqrt(3))
    # Seeds differ by 0.05 each, variants by nothing: pairing takes the seeds out.
    assert found.high - found.low < 0.02 < analysis.noise_floor(runs["baseline"], schema.BITS_PER_BYTE)


def test_with_no_effect_false_alarms_stay_at_the_stated_level():
    random = np.random.default_rng(0)
    alarms = np.mean([analysis.estimate(random.normal(0, 1, 3)).resolved for _ in range(2000)])
    assert 0.035 < alarms < 0.065


def test_two_seeds_take_their_spread_from_all_variants(write_store, tmp_path):
    """Against the textbook's block design: residual mean square with (V - 1)(S - 1) degrees of freedom."""
    record = load(write_store(tmp_path / "s", {"kv_lora_rank=16": 0.2}, noise=0.01, seeds=(0, 1)))
    values = np.array([[r.metrics[schema.BITS_PER_BYTE] for r in runs] for runs in record.variants.values()])
    residual = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    half = 3.182446305284263 * np.sqrt((residual**2).sum() / 3 * 2 / 2)
    for name, row in zip(list(record.variants)[1:], values[1:], strict=True):
        found = analysis.effects(record, schema.BITS_PER_BYTE)[name]
        assert found.pooled
        assert found.mean == pytest.approx((row - values[0]).mean())
        assert found.high - found.mean == pytest.approx(half)
    text = (build(tmp_path / "s").parent / "report.md").read_text()
    assert "takes its spread from all variants together" in text


def test_a_missing_seed_leaves_the_block_design_whole(write_store, tmp_path):
    states = {("device_limit=2", 1): schema.FAILED}
    record = load(write_store(tmp_path / "s", {"device_limit=2": 0.2}, noise=0.001, seeds=(0, 1), states=states))
    found = analysis.effects(record, schema.BITS_PER_BYTE)["device_limit=2"]
    assert (found.seeds, found.pooled) == (1, True)
    assert found.mean == pytest.approx(0.2, abs=0.01)
    assert found.resolved


def test_two_seeds_raise_false_alarms_at_the_stated_level(write_store, tmp_path):
    record = load(write_store(tmp_path / "s", seeds=(0, 1)))
    random, alarms = np.random.default_rng(0), []
    for _ in range(500):
        for run in record.runs:
            run.metrics[schema.BITS_PER_BYTE] = 0.1 * run.seed + random.normal()
        alarms += [effect.resolved for effect in analysis.effects(record, schema.BITS_PER_BYTE).values()]
    assert 0.035 < np.mean(alarms) < 0.065


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ((2.0, 2.25), "10.0% to 20.0% below an order-2"),
        ((3.0, 2.75), "10.0% to 20.0% above an order-2"),
        ((2.0, 2.75), "above to 20.0% below an order-2"),
    ],
)
def test_the_distance_to_the_yardstick_has_a_direction(write_store, tmp_path, found, words):
    record = load(write_store(tmp_path / "s", seeds=(0, 1)))
    for index, run in enumerate(record.runs):
        run.metrics[schema.BITS_PER_BYTE] = found[index % 2]
    assert words in analysis.reference_sentence(record)


def test_pareto():
    assert analysis.pareto({"a": (1.0, 2.0), "b": (2.0, 1.0), "c": (2.0, 2.0), "d": (1.0, 2.0)}) == {"a", "b", "d"}


def test_the_page_says_everything_and_is_the_same_when_built_again(write_store, tmp_path):
    root = write_store(tmp_path / "s", {"kv_lora_rank=16": 0.2})
    page = build(root)
    first = {p.name: p.read_bytes() for p in page.parent.rglob("*") if p.is_file()}
    build(root)
    assert first == {p.name: p.read_bytes() for p in page.parent.rglob("*") if p.is_file()}
    text = (page.parent / "report.md").read_text()
    for words in (
        "Does it matter?",
        "Noise floor",
        "an order-2",
        "Nothing: every planned run finished",
        "`id00` (000-0)",
        "differ only in the searched",
        "`d1`, corpus `quickstart`; SHA-256 tinytext `0123456789ab`",
        "| en | 9,000 | 4,000 | 900 | 400 |",
    ):
        assert words in text
    for picture in re.findall(r"\]\((figures/.*?\.png)\)", text):
        assert (page.parent / picture).stat().st_size > 5000
    assert len(re.findall(r"!\[.{20,}\]\(figures/", text)) >= 5
    whole = page.read_text()
    assert "<script src" not in whole
    assert not re.search(r'(src|href)="(?!data:|#)', whole)
    assert whole.count("<figure>") == whole.count("data:image/png")
    assert page.stat().st_size < 3_000_000


def test_failures_missing_seeds_and_an_unfinished_study_are_said(write_store, tmp_path):
    states = {("device_limit=2", 1): schema.FAILED, ("device_limit=8", 0): schema.DIVERGED, ("kv_lora_rank=16", 2): "running"}
    root = write_store(tmp_path / "s", states=states, state="running")
    text = (build(root).parent / "report.md").read_text()
    assert "has not finished cleanly" in text
    assert "(device_limit=2, seed 1): failed: ValueError: planted" in text
    assert "(device_limit=8, seed 0): diverged" in text
    assert "(kv_lora_rank=16, seed 2): not finished" in text
    record = load(root)
    assert analysis.effects(record, schema.BITS_PER_BYTE)["device_limit=8"].seeds == 2


def test_without_a_finished_baseline_nothing_is_compared(write_store, tmp_path):
    states = {("baseline", seed): schema.FAILED for seed in (0, 1, 2)}
    root = write_store(tmp_path / "s", states=states, state="finished-with-failures")
    text = (build(root).parent / "report.md").read_text()
    assert "There is no finished baseline" in text
    assert "not recorded" in text


def test_markup_from_outside_is_text(write_store, tmp_path):
    root = write_store(tmp_path / "s", states={("device_limit=2", 1): schema.FAILED})
    path = root / schema.STUDY_FILE
    path.write_text(path.read_text().replace("Does it matter?", "Does <script>alert(1)</script> matter?"))
    summary = root / schema.RUNS_DIRECTORY / "002-1" / schema.SUMMARY_FILE
    summary.write_text(summary.read_text().replace("ValueError: planted", "ValueError: <class 'int'> planted"))
    page = build(root)
    whole = page.read_text()
    assert "<script>alert" not in whole
    assert "&lt;script&gt;alert(1)" in whole
    assert "&lt;class 'int'&gt; planted" in whole
    assert "<script>alert" not in (page.parent / "report.md").read_text()


def test_a_study_is_found_by_its_file(write_store, tmp_path):
    write_store(tmp_path / "studies" / "planted")
    (tmp_path / "other.yaml").write_text("name: planted\n")
    done = subprocess.run(
        [sys.executable, "-m", "reports", "build", str(tmp_path / "other.yaml")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MOELAB_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr


def test_what_is_no_study_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no study's root"):
        build(tmp_path)
    done = subprocess.run([sys.executable, "-m", "reports", "build", str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "study.yaml" in done.stderr


def test_another_schema_is_refused(write_store, tmp_path):
    root = write_store(tmp_path / "s")
    path = root / schema.RUNS_DIRECTORY / "000-0" / schema.RUN_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(UserError, match="schema 99"):
        load(root)
