"""Planted truth in, the right verdict out; where nothing was planted, false alarms at or under the stated level."""

import math

import numpy as np
import planted
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from reports import statistics, verdict
from reports.analysis import analyse
from reports.statistics import compare, holm
from reports.words import plus_minus
from sweeps import schema

SEEDS = (0, 1, 2, 3, 4)


def answers(values, **arguments):
    """{variant: its sentence}, and the analysis."""
    analysis = analyse(planted.record(values, **arguments))
    found = {v.name: verdict.sentence(analysis, v) for v in analysis.variants if not v.baseline}
    return found, analysis


def shown(analysis):
    return {v.name for v in analysis.variants if v.effect and v.effect.shown}


@pytest.mark.parametrize("seed", range(5))
def test_no_small_and_large_effects(seed):
    effects = {"small": 0.001, "large": 0.1, "gain": -0.1}
    values = planted.losses(["baseline", "none", "small", "large", "gain"], SEEDS, effects, noise=0.005, seed=seed)
    said, analysis = answers(values)
    assert shown(analysis) == {"large", "gain"}
    assert "no difference that 5 seeds can show" in said["none"]
    assert "no difference that 5 seeds can show" in said["small"]
    assert "costs 0.0" in said["large"] or "costs 0.1" in said["large"]
    assert "gains 0.0" in said["gain"] or "gains 0.1" in said["gain"]
    assert "no difference" not in said["large"] + said["gain"]
    assert analysis.compared[0].name == "gain"
    assert "1 is better than the baseline (gain" in verdict.headline(analysis)
    assert "1 is worse (large" in verdict.headline(analysis)


@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_variant_neither_alarms_nor_hides_the_others(seed):
    """Unequal variances: no effect in a variant 30 times as noisy, a clear one in a quiet one."""
    values = planted.losses(["baseline", "wild", "clear", "none"], SEEDS, {"clear": 0.05}, noise=0.003, spread={"wild": 0.1}, seed=seed)
    _, analysis = answers(values)
    assert shown(analysis) == {"clear"}


def test_missing_seeds_are_paired_over_those_in_common():
    values = planted.losses(["baseline", "some", "none"], SEEDS, {"some": 0.2}, noise=0.002)
    values["some"] = {s: values["some"][s] for s in (1, 2, 4)}
    values["none"] = {7: 2.0, 8: 2.0}
    said, analysis = answers(values)
    found = next(v.effect for v in analysis.variants if v.name == "some")
    assert found.seeds == 3
    assert found.mean == pytest.approx(np.mean([values["some"][s] - values["baseline"][s] for s in (1, 2, 4)]))
    assert "costs 0." in said["some"]
    assert "on no seed that the baseline has" in said["none"]


def test_a_diverged_variant_is_said_and_never_a_number():
    values = planted.losses(["baseline", "broken", "half"], SEEDS, {"half": 0.2}, noise=0.002)
    states = {("broken", s): schema.DIVERGED for s in SEEDS} | {("half", 3): schema.DIVERGED}
    said, analysis = answers(values, states=states)
    assert "diverged on all 5 seeds" in said["broken"]
    assert "1 diverged on every seed (broken)" in verdict.headline(analysis)
    assert next(v for v in analysis.variants if v.name == "broken").effect is None
    assert "1 of its 5 runs diverged" in said["half"]
    assert shown(analysis) == {"half"}


@pytest.mark.parametrize("variants", [3, 7])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_false_alarms_of_500_studies_without_an_effect(seeds, variants):
    """Family-wise: a study alarms if any of its verdicts does."""
    alarms, covered, intervals = 0, 0, 0
    random = np.random.default_rng(1)
    for _ in range(500):
        table = random.normal(0, 1, (variants + 1, seeds)) + random.normal(0, 5, seeds)
        effects = compare(dict(enumerate(table[0])), {str(v): dict(enumerate(row)) for v, row in enumerate(table[1:])})
        alarms += any(e.shown for e in effects.values())
        covered += sum(e.low <= 0 <= e.high for e in effects.values())
        intervals += len(effects)
    assert alarms / 500 <= 1 - statistics.LEVEL
    # Three standard deviations of that many intervals, as if each variant of a study were its own study.
    assert covered / intervals > statistics.LEVEL - 3 * math.sqrt(0.95 * 0.05 / 500)


def test_one_variant_alarms_at_the_level_itself():
    """Nothing is corrected there, so that studies scatter around it: a thousand are within two standard deviations."""
    random = np.random.default_rng(2)
    tables = random.normal(0, 1, (1000, 2, 3))
    alarms = sum(compare(dict(enumerate(a)), {"v": dict(enumerate(b))})["v"].shown for a, b in tables)
    assert alarms / 1000 == pytest.approx(0.05, abs=2 * math.sqrt(0.05 * 0.95 / 1000))


@pytest.mark.parametrize("noise", [(1, 0.2, 0.2, 0.2, 5), (3, 1, 1, 1, 1)])
def test_unequal_variances_stay_at_the_level_from_three_seeds_on(noise):
    random = np.random.default_rng(3)
    alarms = 0
    for _ in range(500):
        table = random.normal(0, 1, (len(noise), 3)) * np.array(noise)[:, None]
        effects = compare(dict(enumerate(table[0])), {str(v): dict(enumerate(row)) for v, row in enumerate(table[1:])})
        alarms += any(e.shown for e in effects.values())
    assert alarms / 500 <= 0.05


def test_an_effect_of_the_stated_size_is_shown_as_often_as_stated():
    """With the number of seeds that the page asks for: at least four times of five."""
    spread, comparisons = math.sqrt(2), 3
    seeds = statistics.seeds_needed(3.0, spread, comparisons)
    assert statistics.power(3.0, spread, seeds, seeds - 1, comparisons) >= 0.8 > statistics.power(3.0, spread, seeds - 1, seeds - 2, comparisons)
    random = np.random.default_rng(4)
    hits = 0
    for _ in range(300):
        table = random.normal(0, 1, (4, seeds))
        table[1:] += 3.0
        effects = compare(dict(enumerate(table[0])), {str(v): dict(enumerate(row)) for v, row in enumerate(table[1:])})
        hits += effects["0"].shown
    assert hits / 300 > 0.8 - 2 * math.sqrt(0.16 / 300)


def test_the_smallest_effect_is_what_power_says():
    size = statistics.smallest_effect(0.01, 5, 4, 7)
    assert statistics.power(size, 0.01, 5, 4, 7) == pytest.approx(0.8, abs=1e-4)
    assert statistics.seeds_needed(size, 0.01, 7) == 5
    assert statistics.seeds_needed(1e-9, 1.0, 1) is None
    assert statistics.seeds_needed(0.1, 0.0, 1) == 2


def test_own_spread_is_students_t_and_never_under_the_median():
    values = planted.losses(["baseline", "a", "b", "c"], (0, 1, 2), noise=0.01)
    effects = compare(values["baseline"], {n: values[n] for n in "abc"})
    spreads = {n: np.std([values[n][s] - values["baseline"][s] for s in (0, 1, 2)], ddof=1) for n in "abc"}
    median = sorted(spreads.values())[1]
    for name, found in effects.items():
        assert found.spread == pytest.approx(max(spreads[name], median))
        assert found.freedom == 2
        half = stats.t.ppf(0.975, found.freedom) * found.spread / math.sqrt(3)
        assert found.half == pytest.approx(half)
        assert found.p == pytest.approx(2 * stats.t.sf(abs(found.mean) / (found.spread / math.sqrt(3)), found.freedom))


def test_two_seeds_take_their_spread_from_all_variants():
    """Against the textbook's block design: residual mean square with (V - 1)(S - 1) degrees of freedom."""
    values = planted.losses(["baseline", "a", "b", "c"], (0, 1), {"a": 0.2}, noise=0.01)
    effects = compare(values["baseline"], {n: values[n] for n in "abc"})
    table = np.array([[values[n][s] for s in (0, 1)] for n in ("baseline", "a", "b", "c")])
    residual = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    half = 3.182446305284263 * np.sqrt((residual**2).sum() / 3 * 2 / 2)
    for found, row in zip(effects.values(), table[1:], strict=True):
        assert found.pooled
        assert found.mean == pytest.approx((row - table[0]).mean())
        differences = row - table[0]
        low, high = min(found.mean - half, differences.min()), max(found.mean + half, differences.max())
        assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_a_missing_seed_leaves_the_block_design_whole():
    values = planted.losses(["baseline", "a", "b", "c"], (0, 1), {"a": 0.2}, noise=0.001)
    del values["a"][1]
    found = compare(values["baseline"], {n: values[n] for n in "abc"})["a"]
    assert (found.seeds, found.pooled, found.shown) == (1, True, True)
    assert found.mean == pytest.approx(0.2, abs=0.01)


def test_exact_differences_need_no_seeds_to_agree():
    """A closed-form objective (bytes, say) has no noise: a difference is shown, none is not."""
    effects = compare({0: 1.0, 1: 1.0, 2: 1.0}, {"same": {0: 1.0, 1: 1.0, 2: 1.0}, "less": {0: 0.5, 1: 0.5, 2: 0.5}})
    assert (effects["same"].p, effects["same"].shown) == (1.0, False)
    assert (effects["less"].p, effects["less"].shown) == (0.0, True)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_keeps_order_and_lies_between_the_raw_and_bonferronis(p):
    corrected = holm(p)
    for one, other in zip(p, corrected, strict=True):
        assert one <= other <= min(1.0, one * len(p)) or other == pytest.approx(max(corrected[i] for i in range(len(p)) if p[i] <= one))
    assert sorted(range(len(p)), key=lambda i: (p[i], i)) == sorted(range(len(p)), key=lambda i: (corrected[i], p[i], i))
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.floats(-3, 3), st.floats(0.1, 10), st.integers(0, 99))
def test_effects_move_and_scale_with_the_values(seeds, shift, scale, seed):
    table = np.random.default_rng(seed).normal(0, 1, (3, seeds))
    first = compare(dict(enumerate(table[0])), {str(i): dict(enumerate(row)) for i, row in enumerate(table[1:])})
    moved = table * scale + shift
    second = compare(dict(enumerate(moved[0])), {str(i): dict(enumerate(row)) for i, row in enumerate(moved[1:])})
    for name, one in first.items():
        assert second[name].mean == pytest.approx(scale * one.mean, rel=1e-6, abs=1e-9)
        assert second[name].half == pytest.approx(scale * one.half, rel=1e-6)
        assert second[name].p == pytest.approx(one.p, rel=1e-6, abs=1e-9)


def test_more_can_be_better():
    values = planted.losses(["baseline", "fast"], SEEDS, {"fast": 0.5}, noise=0.01)
    said, analysis = answers(values, metric=schema.TOKENS_PER_SECOND, direction="maximize")
    assert not analysis.worse(analysis.compared[0])
    assert "raises tokens per second by" in said["fast"]
    assert "for the better" in said["fast"]


def test_the_interval_never_leaves_out_what_the_seeds_themselves_say():
    """Of twenty variants with two seeds one differs by 0 and by 1: the lent spread is narrower than its own two seeds."""
    random = np.random.default_rng(6)
    values = {str(v): {s: random.normal(0, 0.001) for s in (0, 1)} for v in range(20)} | {"wild": {0: 0.0, 1: 1.0}}
    found = compare(values["0"], {name: values[name] for name in values if name != "0"})["wild"]
    differences = [values["wild"][s] - values["0"][s] for s in (0, 1)]
    lent = stats.t.ppf(0.975, found.freedom) * found.spread / math.sqrt(2)
    assert found.pooled
    assert lent < 0.45
    assert (found.low, found.high) == (pytest.approx(min(differences)), pytest.approx(max(differences)))
    assert (found.bootstrap_low, found.bootstrap_high) == (found.low, found.high)
    assert not found.shown


@pytest.mark.parametrize(
    ("mean", "low", "high", "words"),
    [
        (0.004, -0.002, 0.010, "+0.0040 ± 0.0060"),
        (-1e-4, -1.1e-4, -0.9e-4, "-0.000100 ± 0.000010"),
        (-1e-4, -1e-4, -1e-4, "-0.0001000"),
        (0.5, 0.4, 0.9, "+0.5000 (+0.4000 to +0.9000)"),
        (12345.6, 12000.0, 12691.2, "+12,346 ± 346"),
        (0.25, None, None, "+0.2500"),
    ],
)
def test_numbers_show_what_their_interval_allows(mean, low, high, words):
    assert plus_minus(mean, low, high, sign=True) == words


def test_fifty_worse_variants_do_not_fill_the_headline():
    names = [f"v{i}" for i in range(50)]
    values = planted.losses(["baseline", *names], (0, 1, 2), {n: 0.1 + 0.01 * i for i, n in enumerate(names)}, noise=0.001)
    headline = verdict.headline(analyse(planted.record(values)))
    assert headline.startswith("All 50 variants are worse than the baseline (v45: ")
    assert "and 45 more" in headline
    assert "v49" in headline
    assert "v10" not in headline


def test_one_seed_has_no_interval_and_says_so():
    said, analysis = answers(planted.losses(["baseline", "a"], (0,), {"a": 0.5}))
    assert "on one seed, which gives no interval" in said["a"]
    values = planted.losses(["baseline", "a", "b"], (0,), {"a": 0.5})
    assert verdict.headline(analyse(planted.record(values))) == "Of 2 variants none can be told from the baseline: one seed gives no interval."
    assert not shown(analysis)
