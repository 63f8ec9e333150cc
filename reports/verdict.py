"""The answer in sentences, each computed."""

from reports import words
from reports.analysis import Analysis, Variant
from reports.words import join, seeds_words
from sweeps import schema


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
    saved = words.savings(variant.means, base.means, analysis.metric)
    tail = f", and {saved}" if saved else "; cache, activated parameters, FLOPs and sends stay as they are"
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
    """The study in a sentence: how many changes could be told from the baseline, and which."""
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
    parts = [f"{_are(len(group))} {word} ({'; '.join(_named(v) for v in group)})" for group, word in groups if group]
    if diverged:
        parts.append(f"{len(diverged)} diverged on every seed ({'; '.join(v.words for v in diverged)})")
    rest = len(analysis.compared) - len(told)
    if not parts:
        return f"Of {len(others)} variants none can be told from the baseline{_limit(analysis)}."
    shown = f"; {rest} cannot be told from it{_limit(analysis)}" if rest else ""
    return f"Of {len(others)} variants {join(parts)}{shown}."


def _are(count: int) -> str:
    return f"{count} {'is' if count == 1 else 'are'}"


def _named(variant: Variant) -> str:
    assert variant.effect is not None
    return f"{variant.words}: {words.effect_words(variant.effect)}"


def _limit(analysis: Analysis) -> str:
    halves = [v.effect.half for v in analysis.compared if v.effect and v.effect.half is not None and not v.effect.shown]
    if not halves:
        return ""
    low, high = min(halves), max(halves)
    size = f"{high:.{words.digits(high)}f}" if high - low < 0.02 * high else f"{low:.{words.digits(low)}f} to {high:.{words.digits(high)}f}"
    return f", with 95 % intervals of ± {size} {words.unit(analysis.metric)}"


def floor_sentences(analysis: Analysis) -> list[str]:
    """The noise floor, what could have been shown, and what a smaller effect would take."""
    base, unit = analysis.baseline, words.unit(analysis.metric)
    if base is None or analysis.floor is None:
        found = ["The baseline has fewer than two finished seeds: there is no noise floor."]
    else:
        found = [
            f"Noise floor: the baseline's standard deviation over {seeds_words(len(base.values))} is "
            f"{analysis.floor:.{words.digits(analysis.floor)}f} {unit}"
            + (f"; that of a difference paired by seed {analysis.spread:.{words.digits(analysis.spread)}f}." if analysis.spread is not None else ".")
        ]
    compared = [v.effect for v in analysis.compared if v.effect and v.effect.freedom]
    if analysis.smallest is not None:
        count = f"{len(compared)} comparisons" if len(compared) > 1 else "one comparison"
        found.append(
            f"With its seeds and {count} this study shows an effect of {analysis.smallest:.{words.digits(analysis.smallest)}f} {unit} "
            "in four cases of five; a smaller one it mostly misses."
        )
    if analysis.floor is not None and analysis.smallest is not None:
        missed = [need for need in analysis.needs if need.stated and need.effect < analysis.smallest]
        if missed:
            sizes = join([f"{need.effect:g}" for need in missed])
            found.append(f"It is too small for effects of {sizes} {unit}; the table says what they would take.")
    return found


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
