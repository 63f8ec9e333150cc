"""From a record to statements: effects, what the study could show, Pareto front, importances, what is missing."""

import math
import statistics as plain_statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reports import confounds, words
from reports.importance import Importances, importances
from reports.statistics import POWER, Effect, Estimate, compare, estimate, noise_floor, power, seeds_needed, smallest_effect
from reports.store import Problem, Run, StudyRecord
from sweeps import schema

SIZES = (0.005, 0.01, 0.02)
"""Effects in bits per byte for which the page says how many seeds they would take; shares of the mean for another objective."""
METRICS = (
    schema.KV_BYTES_PER_TOKEN, schema.ACTIVATED_PARAMETERS, schema.TOTAL_PARAMETERS, schema.TRAIN_FLOPS_PER_TOKEN, schema.ALL_TO_ALL_SECONDS,
    schema.DISTINCT_DEVICES, schema.EXPERT_VIOLATION, schema.DEVICE_VIOLATION, schema.DROPPED_SHARE, schema.TOKENS_PER_SECOND,
    schema.NGRAM_BITS_PER_BYTE, schema.BITS_PER_BYTE,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One configuration and what came of its seeds; `words` say what it changes, `against` what the baseline has there."""

    name: str
    words: str
    against: str
    baseline: bool
    runs: tuple[Run, ...]
    values: dict[int, float]
    effect: Effect | None
    means: dict[str, Estimate]

    @property
    def finished(self) -> int:
        return sum(run.finished for run in self.runs)

    def ended(self, state: str) -> list[Run]:
        return [run for run in self.runs if run.state == state]


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Seeds per variant that would show an effect of this size, and what that comes to; None beyond a thousand seeds."""

    effect: float
    stated: bool
    expected: bool
    seeds: int | None
    runs: int | None
    tokens: float | None
    hours: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """The effect that the study's file expects (`expects`), and how often a study like this one shows an effect of this size.

    `power` is None where nothing gives a spread; `above_floor`: the noise floor is smaller, None where there is none.
    """

    effect: float
    source: str
    power: float | None
    above_floor: bool | None

    @property
    def enough(self) -> bool:
        return self.power is not None and self.power >= POWER


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """Everything a page says, before it is said.  `incomplete` lists what is missing from the store (exit code 3)."""

    record: StudyRecord
    metric: str
    lower_is_better: bool
    variants: tuple[Variant, ...]
    floor: float | None
    spread: float | None
    smallest: float | None
    expected: Expected | None
    needs: tuple[Need, ...]
    front: tuple[str, ...]
    importances: Importances
    differences: tuple[confounds.Difference, ...]
    incomplete: tuple[Problem, ...]

    @property
    def baseline(self) -> Variant | None:
        return next((v for v in self.variants if v.baseline), None)

    @property
    def compared(self) -> list[Variant]:
        """Variants with an effect, smallest first; the best first where less is better."""
        found = [v for v in self.variants if v.effect is not None]
        return sorted(found, key=lambda v: v.effect.mean if v.effect else 0.0, reverse=not self.lower_is_better)

    def worse(self, variant: Variant) -> bool:
        return variant.effect is not None and (variant.effect.mean > 0) == self.lower_is_better


def analyse(record: StudyRecord, sizes: Sequence[float] = ()) -> Analysis:
    """`sizes`: effects (in the objective's unit) for which the needed seeds are wanted; default SIZES."""
    metric, lower = record.objective
    groups = record.variants
    base = next((runs for runs in groups.values() if runs[0].baseline), [])
    values = {name: {run.seed: v for run in runs if (v := run.value(metric)) is not None} for name, runs in groups.items()}
    reference = values[base[0].variant] if base else {}
    effects = compare(reference, {name: values[name] for name, runs in groups.items() if not runs[0].baseline}) if reference else {}
    variants = tuple(_variant(name, runs, values[name], effects.get(name), base) for name, runs in groups.items())
    sensitivity = _sensitivity(effects, reference)
    floor, expected = noise_floor(reference), record.expects
    rows = [(v.runs[0].parameters, sum(v.values.values()) / len(v.values)) for v in variants if v.values]
    return Analysis(
        record=record,
        metric=metric,
        lower_is_better=lower,
        variants=variants,
        floor=floor,
        spread=sensitivity.spread,
        smallest=sensitivity.smallest,
        expected=None if expected is None else _expected(*expected, sensitivity, floor),
        needs=_needs(variants, effects, sensitivity, sizes or _examples(metric, reference), expected[0] if expected else None),
        front=_front(variants, metric, lower_is_better=lower),
        importances=importances(record, rows, lower_is_better=lower),
        differences=tuple(confounds.differences(record)),
        incomplete=tuple(_incomplete(record, metric, base)),
    )


def _variant(name: str, runs: Sequence[Run], values: dict[int, float], effect: Effect | None, base: Sequence[Run]) -> Variant:
    said, against = words.variant_words(runs[0], base[0] if base else None)
    found = {m: e for m in METRICS if (e := estimate([v for run in runs if (v := run.value(m)) is not None])) is not None}
    return Variant(name=name, words=said, against=against, baseline=runs[0].baseline, runs=tuple(runs), values=values, effect=effect, means=found)


@dataclass(frozen=True, slots=True)
class _Sensitivity:
    """Standard deviation of a paired difference, on how many seeds and degrees of freedom, and the number of comparisons."""

    spread: float | None
    seeds: int
    freedom: int
    comparisons: int

    @property
    def smallest(self) -> float | None:
        """The effect that is shown four times of five."""
        return smallest_effect(self.spread, self.seeds, self.freedom, self.comparisons) if self.spread is not None and self.freedom else None

    def power(self, effect: float) -> float | None:
        if self.spread is None or not self.freedom:
            return None
        return power(effect, self.spread, self.seeds, self.freedom, self.comparisons) if self.spread else 1.0


def _sensitivity(effects: Mapping[str, Effect], reference: Mapping[int, float]) -> _Sensitivity:
    with_spread = [e for e in effects.values() if e.spread is not None and e.freedom]
    comparisons = max(len(with_spread), 1)
    if with_spread:
        spread = float(plain_statistics.median(e.spread or 0.0 for e in with_spread))
        seeds, freedom = (int(plain_statistics.median_low([getattr(e, n) for e in with_spread])) for n in ("seeds", "freedom"))
        return _Sensitivity(spread, seeds, freedom, comparisons)
    floor = noise_floor(reference)
    return _Sensitivity(floor * math.sqrt(2) if floor is not None else None, 0, 0, comparisons)


def _expected(effect: float, source: str, sensitivity: _Sensitivity, floor: float | None) -> Expected:
    return Expected(effect=effect, source=source, power=sensitivity.power(effect), above_floor=None if floor is None else floor < effect)


def _examples(metric: str, reference: Mapping[int, float]) -> list[float]:
    """Sizes in bits per byte, or as shares of the baseline's mean."""
    mean = abs(sum(reference.values()) / max(len(reference), 1))
    return [size if metric.startswith(schema.BITS_PER_BYTE) else size * mean for size in SIZES]


def _needs(
    variants: Sequence[Variant], effects: Mapping[str, Effect], sensitivity: _Sensitivity, sizes: Sequence[float], expected: float | None
) -> tuple[Need, ...]:
    if not sensitivity.spread:
        return ()
    unshown = [abs(e.mean) for e in effects.values() if not e.shown and e.mean]
    done = [run for v in variants for run in v.runs if run.finished]
    tokens, seconds = (_mean([run.summary.get(key) for run in done]) for key in ("tokens", "seconds"))
    asked = {*sizes, *([expected] if expected else [])}
    found = []
    for size in sorted({max(unshown, default=0.0), *asked}):
        if size <= 0:
            continue
        seeds = seeds_needed(size, sensitivity.spread, sensitivity.comparisons)
        runs = seeds * len(variants) if seeds else None
        found.append(
            Need(
                effect=size,
                stated=size in asked,
                expected=size == expected,
                seeds=seeds,
                runs=runs,
                tokens=runs * tokens if runs and tokens else None,
                hours=runs * seconds / 3600 if runs and seconds else None,
            )
        )
    return tuple(found)


def _mean(values: Sequence[Any]) -> float | None:
    known = [float(v) for v in values if v]
    return sum(known) / len(known) if known else None


def _front(variants: Sequence[Variant], metric: str, *, lower_is_better: bool) -> tuple[str, ...]:
    """Variants that no other beats in loss, cache and simulated time (0 without experts) at once."""
    points = {}
    for v in variants:
        cache, time = v.means.get(schema.KV_BYTES_PER_TOKEN), v.means.get(schema.ALL_TO_ALL_SECONDS)
        if v.values and cache and (time or not has_experts(v.runs[0])):
            loss = sum(v.values.values()) / len(v.values)
            points[v.name] = (loss if lower_is_better else -loss, cache.mean, time.mean if time else 0.0)
    return tuple(name for name in points if name in pareto(points))


def pareto(points: Mapping[str, tuple[float, ...]]) -> set[str]:
    """Names of the points that no other point beats or equals in everything and beats in something (all minimised)."""

    def dominated(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
        return all(o <= p for o, p in zip(other, one, strict=True)) and other != one

    return {name for name, point in points.items() if not any(dominated(point, other) for other in points.values())}


def has_experts(run: Run) -> bool:
    return bool((run.config.get("model") or {}).get("moe"))


def _incomplete(record: StudyRecord, metric: str, base: Sequence[Run]) -> list[Problem]:
    """What a whole study would have and this one has not."""
    found = list(record.problems)
    state = record.state.get("state", "unknown")
    if state not in ("finished", "finished-with-failures"):
        planned = record.state.get("planned")
        done = sum(run.finished for run in record.runs)
        found.append(Problem(place="study", text=f"has not finished (state: {state}); {done} of {planned or 'an unknown number of'} runs have"))
    for run in record.runs:
        if run.state in (schema.FAILED, schema.STOPPED) or run.state not in schema.STATES:
            found.append(Problem(place=run.name, text=f"{run.variant}, seed {run.seed}: {run.state}"))
        elif run.finished and run.value(metric) is None:
            there = "is not a finite number" if metric in run.metrics else "was not recorded"
            found.append(Problem(place=run.name, text=f"{run.variant}, seed {run.seed}: {metric} {there}"))
        if not run.config:
            found.append(Problem(place=run.name, text=f"{schema.CONFIG_FILE} is missing: its settings cannot be compared"))
    seeds = sum(run.value(metric) is not None for run in base)
    if seeds < 2:
        said = "has no run" if not base else f"has no finished seed with {metric}" if not seeds else "has one finished seed"
        found.append(Problem(place="study", text=f"the baseline {said}: {'nothing can be compared' if not seeds else 'there is no noise floor'}"))
    return found


def to_dict(analysis: Analysis) -> dict[str, Any]:
    """Plain values for JSON; numbers in full."""
    variants = [
        {
            "variant": v.name,
            "words": v.words,
            "baseline": v.baseline,
            "parameters": v.runs[0].parameters,
            "runs": {run.name: {"seed": run.seed, "state": run.state, "value": run.value(analysis.metric)} for run in v.runs},
            "effect": None if v.effect is None else {**asdict(v.effect), "shown": v.effect.shown},
            "means": {name: asdict(value) for name, value in v.means.items()},
            "on_pareto_front": v.name in analysis.front,
        }
        for v in analysis.variants
    ]
    return {
        "study": analysis.record.name,
        "question": analysis.record.question,
        "state": analysis.record.state.get("state"),
        "metric": analysis.metric,
        "lower_is_better": analysis.lower_is_better,
        "noise_floor": analysis.floor,
        "paired_spread": analysis.spread,
        "smallest_effect": analysis.smallest,
        "expected": None if analysis.expected is None else {**asdict(analysis.expected), "enough": analysis.expected.enough},
        "needs": [asdict(need) for need in analysis.needs],
        "variants": variants,
        "importances": asdict(analysis.importances),
        "confounds": [asdict(d) for d in analysis.differences],
        "incomplete": [asdict(p) for p in analysis.incomplete],
    }
