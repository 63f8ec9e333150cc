"""The answer in sentences, each computed."""

from collections import Counter
from collections.abc import Sequence

from reports import words
from reports.analysis import Analysis, Variant, has_experts
from reports.document import safe
from reports.statistics import MOST_SEEDS
from reports.words import join, seeds_words
from sweeps import schema

MOST_NAMED = 5


def sentences(analysis: Analysis) -> list[str]:
    """One per variant, in the order of their effects; then those without one."""
    if not (base := analysis.baseline) or not base.values:
        return []
    ordered = analysis.compared + [v for v in analysis.variants if v.effect is None and not v.baseline]
    return [sentence(analysis, variant) for variant in ordered]


def sentence(analysis: Analysis, variant: Variant) -> str:
    base = analysis.baseline
    assert base is not None
    diverged = len(variant.ended(schema.DIVERGED))
    if variant.effect is None:
        return f"**{variant.words}** {_why_no_effect(analysis, variant)}."
    text = words.cost(variant.effect, variant.against, analysis.metric, lower_is_better=analysis.lower_is_better)
    dense = [all(run.config and not has_experts(run) for run in v.runs) for v in (variant, base)]
    saved = words.savings(variant.means, base.means, analysis.metric, dense=dense[0], dense_baseline=dense[1])
    tail = f"{', and' if saved.startswith(('saves', 'takes')) else ';'} {saved}" if saved else ""
    if diverged:
        tail += f". {diverged} of its {len(variant.runs)} runs diverged, so that this is said of those that did not"
    return f"**{variant.words}** {text}{tail}."


def _why_no_effect(analysis: Analysis, variant: Variant) -> str:
    total = len(variant.runs)
    if len(variant.ended(schema.DIVERGED)) == total:
        return f"diverged on {'its one seed' if total == 1 else f'all {total} seeds'}, where the baseline trained: there is no loss to compare"
    if len(variant.ended(schema.PRUNED)) == total:
        return "was pruned: it was behind and was not trained to the end, so that no effect is stated"
    if variant.finished and not variant.values:
        return f"finished without recording {analysis.metric}: no effect is stated"
    if variant.values:
        return "finished on no seed that the baseline has: no effect is stated"
    states = sorted({run.state for run in variant.runs})
    return f"has no finished run ({', '.join(states)}): no effect is stated"


def headline(analysis: Analysis) -> str:
    """The study in a sentence: how many changes could be told from the baseline, and which; and whether it could have shown what it expected."""
    told = _answer(analysis)
    expected = analysis.expected
    if expected is None or expected.enough or not any(v.effect and not v.effect.shown for v in analysis.compared):
        return told
    need = next((need for need in analysis.needs if need.expected), None)
    if need is None:
        return told
    seeds = f"{need.seeds} seeds" if need.seeds else f"over {MOST_SEEDS} seeds"
    return f"{told} An effect of {words.amount(words.stated(expected.effect), analysis.metric)}, as expected, would take {seeds} per variant."


def _answer(analysis: Analysis) -> str:
    base = analysis.baseline
    if base is None or not base.values:
        return "There is no finished baseline, so there is nothing to compare with."
    others = [v for v in analysis.variants if not v.baseline]
    if not others:
        return "Only the baseline was trained, so there is nothing to compare with it."
    if len(others) == 1:
        return sentence(analysis, others[0])
    told = [v for v in analysis.compared if v.effect and v.effect.shown]
    worse, better = ([v for v in told if analysis.worse(v) == flag] for flag in (True, False))
    diverged = [v for v in others if len(v.ended(schema.DIVERGED)) == len(v.runs)]
    groups = ((better, "better than the baseline"), (worse, "worse" if better else "worse than the baseline"))
    parts = [f"{_are(len(group))} {word} ({_listed(group)})" for group, word in groups if group]
    if diverged:
        parts.append(f"{len(diverged)} diverged on every seed ({'; '.join(v.words for v in diverged)})")
    rest = len(analysis.compared) - len(told)
    silent = _without_result(others, diverged)
    if not parts:
        none = f"Of {len(others)} variants none can be told from the baseline{_limit(analysis)}"
        return f"{none}{silent}." if analysis.compared else f"None of {len(others)} variants can be compared with the baseline{silent}."
    if len(told) == len(others) > 2 and len({analysis.worse(v) for v in told}) == 1:
        return f"All {len(others)} variants are {'worse' if worse else 'better'} than the baseline ({_listed(told)})."
    shown = f"; {rest} cannot be told from it{_limit(analysis)}" if rest else ""
    return f"Of {len(others)} variants {join(parts)}{shown}{silent}."


def _without_result(others: Sequence[Variant], diverged: Sequence[Variant]) -> str:
    """Variants that have no effect, other than by diverging, and how they ended."""
    rest = [v for v in others if v.effect is None and v not in diverged]
    if not rest:
        return ""
    ended = Counter("pruned" if len(v.ended(schema.PRUNED)) == len(v.runs) else "without a value to compare" for v in rest)
    return "; " + join(
        [f"{ended[how]} {'was' if ended[how] == 1 else 'were'} {how}" for how in ("pruned", "without a value to compare") if ended[how]]
    )


def _are(count: int) -> str:
    return f"{count} {'is' if count == 1 else 'are'}"


def _listed(group: list[Variant]) -> str:
    """The MOST_NAMED that differ most."""
    strongest = sorted(group, key=lambda v: -abs(v.effect.mean if v.effect else 0.0))[:MOST_NAMED]
    more = f"; and {len(group) - len(strongest)} more" if len(group) > len(strongest) else ""
    return "; ".join(_named(v) for v in group if v in strongest) + more


def _named(variant: Variant) -> str:
    assert variant.effect is not None
    return f"{variant.words}: {words.effect_words(variant.effect)}"


def _limit(analysis: Analysis) -> str:
    halves = [v.effect.half for v in analysis.compared if v.effect and v.effect.half and not v.effect.shown]
    if not halves:
        single = all(v.effect is None or v.effect.seeds == 1 for v in analysis.compared)
        return ": one seed gives no interval" if single and analysis.compared else ""
    low, high = min(halves), max(halves)
    size = words.number(high) if high - low < 0.02 * high else f"{words.number(low)} to {words.number(high)}"
    return f", with 95 % intervals of ± {words.amount(size, analysis.metric)}"


def floor_sentences(analysis: Analysis) -> list[str]:
    """The noise floor, what could have been shown, and what a smaller effect would take."""
    base = analysis.baseline
    if base is None or analysis.floor is None:
        found = ["The baseline has fewer than two finished seeds: there is no noise floor."]
    else:
        found = [
            f"Noise floor: the baseline's standard deviation over {seeds_words(len(base.values))} is "
            + words.amount(words.number(analysis.floor), analysis.metric)
            + (f"; that of a difference paired by seed {words.number(analysis.spread)}." if analysis.spread is not None else ".")
        ]
    if analysis.spread == 0:
        return [*found, "Paired differences have no noise at all, so that any difference is one."]
    compared = [v.effect for v in analysis.compared if v.effect and v.effect.freedom]
    if analysis.smallest is not None:
        count = f"{len(compared)} comparisons" if len(compared) > 1 else "one comparison"
        size = words.amount(words.number(analysis.smallest), analysis.metric)
        found.append(f"With its seeds and {count} this study shows an effect of {size} in four cases of five; a smaller one it mostly misses.")
    if analysis.expected is not None or analysis.needs:
        found.append(expected_sentence(analysis))
    if analysis.floor is not None and analysis.smallest is not None:
        missed = [need for need in analysis.needs if need.stated and not need.expected and need.effect < analysis.smallest]
        if missed:
            sizes = words.amount(join([words.stated(need.effect) for need in missed]), analysis.metric)
            found.append(f"It is too small for effects of {sizes}; the table says what they would take.")
    return found


def expected_sentence(analysis: Analysis) -> str:
    """Whether the study is large enough for the effect that its file expects, and else what would be."""
    expected = analysis.expected
    if expected is None:
        return "Its file names no effect that was expected (`expects`), so that it is held against examples."
    size = words.amount(words.stated(expected.effect), analysis.metric)
    said = f"Expected: an effect of {size}{f' ({safe(expected.source)})' if expected.source else ''}."
    if expected.above_floor is None:
        return f"{said} Without a noise floor nothing says whether this study could show it."
    assert analysis.floor is not None
    said += f" The noise floor of {words.number(analysis.floor)} is {'below' if expected.above_floor else 'not below'} it"
    if expected.power is None:
        return f"{said}; nothing was compared."
    link = "and" if expected.enough == expected.above_floor else "but"
    often = f"{said}, {link} a study like this one shows it in {_percent(expected.power)} of all cases"
    if expected.enough:
        return f"{often}, which is enough."
    return f"{often}: that is too few. {_budget_needed(analysis)}"


def _budget_needed(analysis: Analysis) -> str:
    need = next(need for need in analysis.needs if need.expected)
    if need.seeds is None:
        return (
            f"It would take over {MOST_SEEDS} seeds per variant with runs as long as these; whether longer runs are less noisy only a pilot can tell."
        )
    parts = [f"{need.runs:,} runs", f"{_tokens(need.tokens)} training tokens" if need.tokens else ""]
    parts.append(f"{need.hours:,.1f} hours of training" if need.hours else "")
    return f"It would take {need.seeds} seeds per variant ({', '.join(p for p in parts if p)}) with runs as long as these."


def _tokens(count: float) -> str:
    return f"{count / 1e6:,.1f} million" if count >= 1e6 else f"{count:,.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if 0.005 <= share < 0.995 else "under 1 %" if share < 0.5 else "over 99 %"


def reference_sentence(analysis: Analysis) -> str:
    """How far below the order-2 model of the same tokens the trained models are."""
    shares = []
    for run in analysis.record.runs:
        ours, theirs = run.value(schema.BITS_PER_BYTE), run.value(schema.NGRAM_BITS_PER_BYTE)
        if ours is not None and theirs:
            shares.append(1 - ours / theirs)
    if not shares:
        return "No run recorded the order-2 reference."
    ends = sorted((min(shares), max(shares)), key=abs)
    sides = ["below" if share > 0 else "above" for share in ends]
    span = f"{abs(ends[0]):.1%} {'' if sides[0] == sides[1] else sides[0] + ' '}to {abs(ends[1]):.1%} {sides[1]}"
    above = sum(share <= 0 for share in shares)
    told = f"all {len(shares)} of them" if not above else f"{above} of {len(shares)} are not below it"
    return f"Trained models are {span} an order-2 Kneser-Ney model of the very tokens that each was trained on: {told}."
