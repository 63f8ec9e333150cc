"""Sentences of a verdict: what was expected and what it would take, what a variant saves, and numbers that have no noise."""

import dataclasses
import itertools
import json
import math

import numpy as np
import planted
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports import document, statistics, verdict
from reports.analysis import analyse, to_dict
from reports.statistics import Estimate, compare
from reports.words import savings
from sweeps import schema

SEEDS = (0, 1, 2)


def study(values, expects=None, **arguments):
    record = planted.record(values, **arguments)
    return analyse(dataclasses.replace(record, study={**record.study, "expects": expects}))


def said(analysis, name):
    return verdict.sentence(analysis, next(v for v in analysis.variants if v.name == name))


# What was expected.


@pytest.mark.parametrize("seed", range(3))
def test_a_study_too_small_for_what_is_expected_says_what_would_be_enough(seed):
    values = planted.losses(["baseline", "a", "b"], SEEDS, noise=0.01, seed=seed)
    analysis = study(values, {"effect": 0.01, "source": "V2 [appendix] D.1"})
    need = next(n for n in analysis.needs if n.expected)
    assert statistics.power(0.01, analysis.spread, need.seeds, need.seeds - 1, 2) >= 0.8 > analysis.expected.power
    assert need.runs == 3 * need.seeds
    assert need.tokens == 1000 * need.runs
    text = " ".join(verdict.floor_sentences(analysis))
    assert "Expected: an effect of 0.01 bits per byte (V2 \\[appendix\\] D.1). The noise floor of" in text
    assert f"It would take {need.seeds} seeds per variant ({need.runs} runs, {need.tokens:,.0f} training tokens, " in text
    assert verdict.headline(analysis).endswith(f" An effect of 0.01 bits per byte, as expected, would take {need.seeds} seeds per variant.")
    assert json.loads(json.dumps(to_dict(analysis)))["expected"]["enough"] is False


def test_pairing_can_be_enough_where_the_noise_floor_is_not_below():
    """Seeds that differ by 0.05 hide an effect of 0.02 from whoever does not pair them."""
    analysis = study(planted.losses(["baseline", "a", "b"], SEEDS, {"a": 0.1}, noise=0.001), {"effect": 0.02, "source": "x"})
    assert (analysis.expected.above_floor, analysis.expected.enough) == (False, True)
    assert "is not below it, but a study like this one shows it in over 99 % of all cases, which is enough." in verdict.expected_sentence(analysis)
    assert "as expected" not in verdict.headline(analysis)


def test_the_stated_power_is_how_often_it_is_shown():
    """Of 400 studies with that effect in the first variant, at the spread that they have."""
    analysis = study({str(i): dict.fromkeys(range(4), 0.0) for i in range(4)}, {"effect": 2.5, "source": "x"})
    assert analysis.expected.power == 1.0
    random, hits = np.random.default_rng(8), 0
    for _ in range(400):
        table = random.normal(0, 1, (4, 4))
        table[1] += 2.5
        hits += compare(dict(enumerate(table[0])), {str(v): dict(enumerate(row)) for v, row in enumerate(table[1:])})["0"].shown
    # The spread of the variant that has it is never under the others' median, so that slightly fewer are shown.
    stated = statistics.power(2.5, math.sqrt(2), 4, 3, 3)
    assert stated - 0.12 < hits / 400 < stated + 2 * math.sqrt(stated * (1 - stated) / 400)


@pytest.mark.parametrize(
    ("values", "expects", "words"),
    [
        ({"baseline": {0: 2.0}, "a": {0: 2.1}}, {"effect": 0.01, "source": ""}, "Without a noise floor nothing says"),
        ({"baseline": {0: 2.0, 1: 2.1, 2: 2.2}, "a": {0: 2.0, 1: 2.2, 2: 2.1}}, {"effect": 1e-9, "source": ""}, "over 1000 seeds per variant"),
        ({"baseline": {0: 2.0, 1: 2.1, 2: 2.2}, "a": {0: 2.0, 1: 2.2, 2: 2.1}}, None, "names no effect that was expected"),
        ({"baseline": {0: 2.0, 1: 2.1, 2: 2.2}, "a": {0: 2.0, 1: 2.2, 2: 2.1}}, {"effect": "much"}, "names no effect that was expected"),
    ],
)
def test_what_cannot_be_said_of_an_expectation(values, expects, words):
    assert words in " ".join(verdict.floor_sentences(study(values, expects)))


# The verdict over whole studies.


@pytest.mark.parametrize("seeds", [3, 5])
def test_verdicts_of_500_studies_without_an_effect(seeds, monkeypatch):
    """Sentences, not numbers: a study alarms if its headline tells any of 5 to 8 variants from the baseline."""
    for name in ("smallest_effect", "seeds_needed"):  # of which no verdict knows, and which are most of the time
        monkeypatch.setattr(f"reports.analysis.{name}", lambda *_: None)
    random, alarms = np.random.default_rng(seeds), 0
    for number in range(500):
        names = ["baseline", *map(str, range(5 + number % 4))]
        table = 2.0 + random.normal(0, 0.05, seeds) + random.normal(0, 0.01, (len(names), seeds))
        analysis = analyse(planted.record({name: dict(enumerate(row)) for name, row in zip(names, table, strict=True)}))
        told = [s for s in verdict.sentences(analysis) if "no difference that" not in s and "not after Holm" not in s]
        assert bool(told) is not verdict.headline(analysis).startswith(f"Of {len(names) - 1} variants none can be told")
        alarms += bool(told)
    assert alarms / 500 <= 1 - statistics.LEVEL


def test_variants_without_a_result_are_counted():
    values = planted.losses(["baseline", "a", "b", "c", "d"], SEEDS, {"a": 0.3}, noise=0.001)
    states = {("b", s): schema.PRUNED for s in SEEDS} | {("c", s): schema.FAILED for s in SEEDS}
    found = verdict.headline(study(values, states=states))
    assert found.startswith("Of 4 variants 1 is worse than the baseline (a: +0.3")
    assert found.endswith("; 1 was pruned and 1 was without a value to compare.")
    states |= {(v, s): schema.PRUNED for v in "ad" for s in SEEDS}
    assert verdict.headline(study(values, states=states)) == (
        "None of 4 variants can be compared with the baseline; 3 were pruned and 1 was without a value to compare."
    )


# What rounding leaves is no difference and no noise.


@pytest.mark.parametrize("seeds", [2, 3, 4])
def test_equal_values_are_said_to_be_equal(seeds):
    values = {"baseline": {s: 2.0 + 0.1 * s for s in range(seeds)}}
    values |= {"same": dict(values["baseline"]), "more": {s: v + 0.1 for s, v in values["baseline"].items()}}
    analysis = study(values)
    assert said(analysis, "same") == "**same** has exactly the bits per byte of the baseline."
    assert said(analysis, "more") == "**more** costs 0.1000 bits per byte against the baseline."
    assert "no noise at all" in " ".join(verdict.floor_sentences(analysis))
    assert "0.000000" not in verdict.headline(analysis)


def test_one_equal_variant_among_noisy_ones():
    values = planted.losses(["baseline", "a", "b"], SEEDS, noise=0.01)
    values["same"] = dict(values["baseline"])
    assert said(study(values), "same") == "**same** has exactly the bits per byte of the baseline on 3 seeds."


# What a variant saves.


def means(**values):
    names = {"sends": schema.DISTINCT_DEVICES, "cache": schema.KV_BYTES_PER_TOKEN, "flops": schema.TRAIN_FLOPS_PER_TOKEN,
             "seconds": schema.ALL_TO_ALL_SECONDS}  # fmt: skip
    return {names[name]: Estimate(mean=value, low=None, high=None, seeds=1) for name, value in values.items()}


@pytest.mark.parametrize(
    ("ours", "theirs", "arguments", "words"),
    [
        ({}, {}, {}, ""),
        ({"cache": 100}, {"flops": 3}, {}, ""),
        ({"cache": 100, "flops": 3}, {"cache": 100, "flops": 3}, {}, "KV cache and training FLOPs stay as they are"),
        ({"cache": 101}, {"cache": 100}, {}, "KV cache within 2 %"),
        ({"cache": 50, "flops": 4}, {"cache": 100, "flops": 2}, {}, "saves 50 % of the KV cache, but takes 2 times the training FLOPs"),
        ({"cache": 0.1}, {"cache": 100}, {}, "saves 99.90 % of the KV cache"),
        ({"flops": 2}, {"flops": 2, "sends": 3, "seconds": 1}, {"dense": True}, "saves all of the sends and all of the simulated all-to-all time"),
        ({"flops": 2}, {"flops": 2, "sends": 3}, {}, "training FLOPs stays as it is"),
        ({"sends": 3.25}, {"flops": 2}, {"dense_baseline": True}, "takes 3.2 sends per token, where the baseline has none"),
    ],
)
def test_what_was_not_recorded_is_not_said_to_stay(ours, theirs, arguments, words):
    assert savings(means(**ours), means(**theirs), schema.BITS_PER_BYTE, **arguments) == words


def test_the_objective_itself_is_no_saving():
    assert savings(means(cache=50), means(cache=100), schema.KV_BYTES_PER_TOKEN) == ""


@pytest.mark.parametrize(("metric", "unit"), [(schema.ALL_TO_ALL_SECONDS, " seconds"), (schema.EXPERT_VIOLATION, "")])
def test_a_change_of_another_metric_has_its_unit(metric, unit):
    values = {"baseline": dict(enumerate((1.0, 1.1, 1.2))), "less": dict(enumerate((0.5, 0.61, 0.7)))}
    text = said(study(values, metric=metric), "less")
    assert f"{unit} against the baseline, for the better." in text
    assert f"by 0.4967 ± 0.0143{unit} against" in text


def test_large_numbers_have_no_decimals():
    values = {n: {s: 1e8 * (1 + i + 0.01 * (s - i) ** 2) for s in SEEDS} for i, n in enumerate(("baseline", "a"))}
    text = " ".join(verdict.floor_sentences(study(values, metric=schema.TOKENS_PER_SECOND)))
    assert not any(a == "." and b.isdigit() for a, b in itertools.pairwise(text.replace("e+", "")))


@given(st.text(alphabet=st.sampled_from("a_*`\\<&|[] "), min_size=1).filter(str.strip))
def test_a_name_in_a_code_span_is_shown_as_it_is(name):
    shown = document.inline(document.code(name))
    assert shown.startswith("<code>")
    assert document.plain(document.code(name)) == " ".join(name.split())
