"""A row per claim: published, ours, the error, and the verdict that follows from it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reports import words
from reports.claims.closed import CLOSED, Ours
from reports.claims.measured import RULES, Measured, measure
from reports.claims.published import Claim, Tolerance, published
from reports.claims.studies import Study
from reports.statistics import MOST_SEEDS, seeds_needed, smallest_effect
from sweeps import schema

REPRODUCED, CLOSE, MISSED = "reproduced", "close", "missed"
UNDECIDED, ALONE, UNMEASURED = "undecided", "nothing printed", "not yet measured here"
VERDICTS = (REPRODUCED, CLOSE, MISSED, UNDECIDED, ALONE, UNMEASURED)
HOW = {"closed form": "closed form", "simulation": "simulation", "measurement": "measured on trained models"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """`ours`, `low` and `high` (P10 to P90 of a simulation, 95 % of a measurement) and `published` in `unit`; `error` is relative.

    A measured row's `ours` is the relative difference of the two models in per cent of the second.  `tolerance` says in words what the
    verdict rests on.
    """

    id: str
    section: str
    claim: str
    published: float | None
    published_text: str
    source: str
    ours: float | None
    ours_text: str
    low: float | None
    high: float | None
    unit: str
    how: str
    error: float | None
    tolerance: str
    verdict: str
    rests_on: str
    study: str | None = None
    short: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Numbers to six figures, which no machine's rounding reaches."""
        return {key: _six(value) if isinstance(value, float) else value for key, value in asdict(self).items() if key != "short"}


def _six(value: float) -> float:
    return float(f"{value:.6g}") if abs(value) < 1e6 or value % 1 else value


def build_rows(simulated: Mapping[str, Ours], studies: Sequence[Study]) -> list[Row]:
    """In the order of the page; a measured claim has a row for each study that answers it, or one that says that none does."""
    found: list[Row] = []
    for section in published().sections:
        for claim in section.claims:
            if claim.how == "measurement":
                answers = measure(RULES[claim.id], studies)
                found += [_measured_row(section.title, claim, answer) for answer in answers] or [_unmeasured_row(section.title, claim)]
            else:
                ours = Ours(value=CLOSED[claim.id]()) if claim.how == "closed form" else simulated[claim.id]
                found.append(_computed_row(section.title, claim, ours))
    return found


def relative_error(reading: str, ours: float, theirs: float) -> float:
    """Ours over the published figure less 1; of a saving in per cent, on what remains."""
    return (100 - ours) / (100 - theirs) - 1 if reading == "cut" else ours / theirs - 1


def verdict_of(claim: Claim, ours: float, error: float, tolerance: Tolerance) -> str:
    """From the error alone, but for a bound, which is met or not, and a closed form that rounds to the printed digits."""
    assert claim.value is not None
    if claim.reading == "at least":
        return REPRODUCED if ours >= claim.value else CLOSE if abs(error) <= tolerance.close else MISSED
    rounds = claim.how == "closed form" and abs(ours - claim.value) <= claim.last_digit * (1 + 1e-9)
    if rounds or abs(error) <= tolerance.reproduced:
        return REPRODUCED
    return CLOSE if abs(error) <= tolerance.close else MISSED


def _computed_row(section: str, claim: Claim, ours: Ours) -> Row:
    tolerance = published().tolerances[claim.how]
    error = None if claim.value is None else relative_error(claim.reading, ours.value, claim.value)
    return Row(
        id=claim.id,
        section=section,
        claim=claim.claim,
        published=claim.value,
        published_text=_with_unit(claim.text or _printed(claim), claim.unit) if claim.value is not None else "",
        source=claim.source,
        ours=ours.value,
        ours_text=_ours_text(claim, ours),
        low=ours.low,
        high=ours.high,
        unit=claim.unit,
        how=HOW[claim.how],
        error=error,
        tolerance=_tolerance_text(claim, tolerance),
        verdict=ALONE if error is None else verdict_of(claim, ours.value, error, tolerance),
        rests_on="; ".join(part for part in (claim.rests_on, ours.note) if part),
        short=claim.short or claim.claim,
    )


def _tolerance_text(claim: Claim, tolerance: Tolerance) -> str:
    if claim.value is None:
        return ""
    if claim.reading == "at least":
        return "met"
    rounding = f" or {claim.last_digit:g}" if claim.how == "closed form" and claim.last_digit else ""
    return f"{100 * tolerance.reproduced:g} %{rounding}"


def _printed(claim: Claim) -> str:
    text = claim.published or ""
    return f"{int(text):,}" if text.isdigit() else text


def _with_unit(text: str, unit: str) -> str:
    """`21B`, `-93.3 %`, `34,560 elements`."""
    if unit == "1e9 parameters":
        return f"{text}B"
    if unit == "1e12 parameters":
        return f"{text}T"
    if unit.startswith("1e3 "):
        return f"{text}K {unit.removeprefix('1e3 ')}"
    return f"-{text} %" if unit.startswith("% ") else f"{text} {unit}" if unit else text


def _ours_text(claim: Claim, ours: Ours) -> str:
    if float(ours.value).is_integer() and abs(ours.value) >= 100:
        text = f"{ours.value:,.0f}"
    else:
        decimals = max(len((claim.published or "").partition(".")[2]) + 1, 2 if abs(ours.value) < 1000 else 1)
        text = f"{ours.value:,.{decimals}f}"
    shown = _with_unit(text, claim.unit)
    if ours.low is None or ours.high is None:
        return shown
    decimals = 2 if abs(ours.value) < 10 else 1
    return f"{_with_unit(f'{ours.value:.{decimals}f}', claim.unit)} ({ours.low:.{decimals}f} to {ours.high:.{decimals}f})"


def _measured_row(section: str, claim: Claim, answer: Measured) -> Row:
    relative = answer.relative
    theirs = None if claim.pair is None else claim.pair[0] / claim.pair[1] - 1
    error = None
    if relative is not None:
        error = relative[0] if claim.reading == "equal" else None if theirs is None else relative[0] / theirs - 1
    tolerance = published().tolerances["measurement"]
    scaled = tuple(None if value is None else 100 * value for value in relative) if relative else (None, None, None)
    return Row(
        id=claim.id,
        section=section,
        claim=claim.claim,
        published=None if theirs is None else 100 * theirs,
        published_text=claim.says if theirs is None else f"{claim.says} ({100 * theirs:+.1f} %)",
        source=claim.source,
        ours=scaled[0],
        ours_text=_difference_text(answer),
        low=scaled[1],
        high=scaled[2],
        unit="% of the second",
        how=HOW[claim.how],
        error=error,
        tolerance=_measured_tolerance(claim, tolerance),
        verdict=measured_verdict(claim.reading, answer, tolerance),
        rests_on="; ".join([*_rests_on(answer), *_would_take(claim, answer)]),
        study=answer.study.name,
    )


def measured_verdict(reading: str, answer: Measured, tolerance: Tolerance) -> str:
    """A direction needs a difference that the study can show; equality an interval that ends within the tolerance."""
    effect = answer.effect
    if reading == "lower":
        return UNDECIDED if not effect.shown else REPRODUCED if effect.mean < 0 else MISSED
    relative = answer.relative
    if relative is None or relative[1] is None or relative[2] is None:
        return UNDECIDED
    # Better than the reference is no less "as good": only the upper end counts.
    if relative[2] <= tolerance.reproduced:
        return REPRODUCED
    if effect.shown and relative[0] > tolerance.reproduced:
        return MISSED
    return CLOSE if relative[0] <= tolerance.reproduced and relative[2] <= tolerance.close else UNDECIDED


def _measured_tolerance(claim: Claim, tolerance: Tolerance) -> str:
    if claim.reading == "lower":
        return "sign, at 95 %"
    return f"+{100 * tolerance.reproduced:g} %, at 95 %"


def _difference_text(answer: Measured) -> str:
    effect, relative = answer.effect, answer.relative
    unit = words.unit(answer.metric)
    absolute = f"{words.effect_words(effect)} {unit}"
    return absolute if relative is None else f"{100 * relative[0]:+.2f} % ({absolute})"


def _would_take(claim: Claim, answer: Measured) -> list[str]:
    """Of a direction that the study cannot show: from which size on it would, and how many seeds the published one would take.

    The published size is the relative difference that is printed, else what the study's file expects.
    """
    effect = answer.effect
    if claim.reading != "lower" or effect.shown or not effect.spread or not effect.freedom:
        return []
    least = smallest_effect(effect.spread, effect.seeds, effect.freedom, effect.comparisons)
    found = [f"too few seeds to show less than {words.amount(words.number(least), answer.metric)}"]
    size = None if answer.metric != schema.BITS_PER_BYTE else answer.study.expected
    if claim.pair is not None:
        size = abs(claim.pair[0] / claim.pair[1] - 1) * answer.reference
    if size and size < least:
        seeds = seeds_needed(size, effect.spread, effect.comparisons)
        what = "the published difference" if claim.pair is not None else "the expected effect"
        found.append(f"{what}, {words.number(size)} here, would take {f'{seeds} seeds' if seeds else f'over {MOST_SEEDS} seeds'}")
    return found


def _rests_on(answer: Measured) -> list[str]:
    ours, theirs = answer.ours, answer.theirs
    parts = [f"study {answer.study.name}: {ours.name} against {theirs.name}", words.seeds_words(answer.effect.seeds)]
    if answer.study.tokens:
        parts.append(f"{answer.study.tokens:,} tokens")
    for metric, name in ((schema.TOTAL_PARAMETERS, "parameters"), (schema.TRAIN_FLOPS_PER_TOKEN, "FLOPs"), (schema.KV_BYTES_PER_TOKEN, "cache")):
        a, b = (_mean(v, metric) for v in (ours, theirs))
        if a and b and abs(a / b - 1) >= words.WORTH_SAYING:
            parts.append(f"{100 * (a / b - 1):+.0f} % {name}")
    return parts


def _mean(variant: Any, metric: str) -> float | None:
    values = list(variant.values(metric).values())
    return sum(values) / len(values) if values else None


def _unmeasured_row(section: str, claim: Claim) -> Row:
    theirs = None if claim.pair is None else 100 * (claim.pair[0] / claim.pair[1] - 1)
    return Row(
        id=claim.id,
        section=section,
        claim=claim.claim,
        published=theirs,
        published_text=claim.says if theirs is None else f"{claim.says} ({theirs:+.1f} %)",
        source=claim.source,
        ours=None,
        ours_text=UNMEASURED,
        low=None,
        high=None,
        unit="% of the second",
        how=HOW[claim.how],
        error=None,
        tolerance=_measured_tolerance(claim, published().tolerances["measurement"]),
        verdict=UNMEASURED,
        rests_on=f"a study with {RULES[claim.id].said}",
    )
