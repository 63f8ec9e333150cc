"""From runs to statements: paired effects with intervals, Pareto fronts, importances."""

import math
import warnings
from collections.abc import Sequence, Sized
from dataclasses import dataclass

import numpy as np
import optuna
from scipy import stats

from reports.store import Run, StudyRecord
from sweeps import schema

optuna.logging.set_verbosity(optuna.logging.WARNING)
LEVEL = 0.95
WORTH_SAYING = 0.02
"""Relative change of a saving from which on the verdict names it; the table holds all of them."""
OWN_SPREAD = 3
"""Seeds from which on a variant's interval rests on its own spread: with two, Student's factor is 12.7."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over seeds with a 95 % t-interval; `low` and `high` are None where one seed gives none."""

    mean: float
    low: float | None
    high: float | None
    seeds: int
    pooled: bool = False
    """The spread was taken from all variants together (see `effects`)."""

    @property
    def resolved(self) -> bool:
        """The interval leaves zero out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def estimate(values: Sequence[float]) -> Estimate | None:
    """None where there is no value."""
    if not len(values):
        return None
    mean = float(np.mean(values))
    if len(values) == 1:
        return Estimate(mean=mean, low=None, high=None, seeds=1)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Estimate(mean=mean, low=mean - half, high=mean + half, seeds=len(values))


def metric(runs: Sequence[Run], name: str) -> Estimate | None:
    """Over the finished runs that recorded it."""
    return estimate([run.metrics[name] for run in runs if run.finished and name in run.metrics])


def paired(runs: Sequence[Run], baseline: Sequence[Run], name: str) -> Estimate | None:
    """Variant minus baseline, seed by seed: both saw the same tokens in the same order."""
    base = {run.seed: run.metrics[name] for run in baseline if run.finished and name in run.metrics}
    return estimate([run.metrics[name] - base[run.seed] for run in runs if run.finished and name in run.metrics and run.seed in base])


def effects(record: StudyRecord, name: str) -> dict[str, Estimate]:
    """Each variant minus the baseline, with a 95 % interval; variants that share no finished seed with it are left out.

    From OWN_SPREAD seeds on a variant stands on its own spread (`paired`), whatever that of the others is.
    With fewer, the study is read as a block design (value = variant + seed + noise of one size): the noise
    is estimated from all variants together, so that two seeds give an interval that says something.
    """
    variants = record.variants
    base = next((runs for runs in variants.values() if runs[0].baseline), [])
    found = {n: e for n, runs in variants.items() if not runs[0].baseline and (e := paired(runs, base, name)) is not None}
    if any(e.seeds < OWN_SPREAD for e in found.values()):
        pooled = _block_design([variants[n] for n in found], base, name)
        found = {n: e if e.seeds >= OWN_SPREAD else p or e for (n, e), p in zip(found.items(), pooled, strict=True)}
    return found


def _block_design(variants: Sequence[Sequence[Run]], base: Sequence[Run], name: str) -> list[Estimate | None]:
    """Least squares of value = variant + seed over the finished runs; None for all where no degree of freedom is left."""
    cells = [
        (index, run.seed, run.metrics[name]) for index, runs in enumerate([base, *variants]) for run in runs if run.finished and name in run.metrics
    ]
    seeds = sorted({seed for _, seed, _ in cells})
    design = np.zeros((len(cells), len(variants) + len(seeds)))
    for row, (index, seed, _) in enumerate(cells):
        design[row, len(variants) + seeds.index(seed)] = 1.0
        if index:
            design[row, index - 1] = 1.0
    values = np.array([value for _, _, value in cells])
    solution, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    freedom = len(cells) - int(rank)
    if freedom < 1:
        return [None] * len(variants)
    noise = float(((values - design @ solution) ** 2).sum() / freedom)
    spread = np.sqrt(noise * np.diag(np.linalg.pinv(design.T @ design))[: len(variants)])
    half = stats.t.ppf((1 + LEVEL) / 2, freedom) * spread
    counts = [sum(i == index for i, _, _ in cells) for index in range(1, len(variants) + 1)]
    rows = zip(solution, half, counts, strict=False)
    return [Estimate(mean=float(m), low=float(m - h), high=float(m + h), seeds=n, pooled=True) for m, h, n in rows]


def noise_floor(baseline: Sequence[Run], name: str) -> float | None:
    """Standard deviation of the baseline over its seeds; None with fewer than two."""
    values = [run.metrics[name] for run in baseline if run.finished and name in run.metrics]
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def pareto(points: dict[str, tuple[float, ...]]) -> set[str]:
    """Names of the points that no other point beats or equals in everything and beats in something (all minimised)."""

    def dominated(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
        return all(o <= p for o, p in zip(other, one, strict=True)) and other != one

    return {name for name, point in points.items() if not any(dominated(point, other) for other in points.values())}


@dataclass(frozen=True, kw_only=True, slots=True)
class Importances:
    """Share of the objective's variation that each searched setting explains, by two evaluators; or why there are none."""

    fanova: dict[str, float]
    ped_anova: dict[str, float]
    missing: str | None


def importances(record: StudyRecord, name: str) -> Importances:
    """Computed over the run table (mean over seeds per variant), not over the journal: the store alone decides."""
    rows = [(runs[0].parameters, e.mean) for runs in record.variants.values() if (e := metric(runs, name)) is not None]
    varied = {path for path in (rows[0][0] if rows else {}) if len({str(p[path]) for p, _ in rows}) > 1}
    if len(rows) < 4 or len(varied) < 2:
        return Importances(
            fanova={}, ped_anova={}, missing=f"{len(rows)} finished variants of {len(varied)} settings are too few (4 and 2 are needed)"
        )
    study = optuna.create_study(direction="minimize")
    choices = {path: sorted({p[path] for p, _ in rows}, key=lambda v: (v is None, str(v))) for path in sorted(varied)}
    for parameters, value in rows:
        distributions: dict[str, optuna.distributions.BaseDistribution] = {
            path: optuna.distributions.CategoricalDistribution(values) for path, values in choices.items()
        }
        study.add_trial(optuna.trial.create_trial(params={p: parameters[p] for p in choices}, distributions=distributions, value=value))
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for evaluator in (optuna.importance.FanovaImportanceEvaluator(seed=0), optuna.importance.PedAnovaImportanceEvaluator()):
            try:
                found.append(dict(optuna.importance.get_param_importances(study, evaluator=evaluator)))
            except (ValueError, RuntimeError) as error:
                return Importances(fanova={}, ped_anova={}, missing=f"{type(evaluator).__name__}: {error}")
    return Importances(fanova=found[0], ped_anova=found[1], missing=None)


def verdict(record: StudyRecord) -> list[str]:
    """The answer in sentences, each computed."""
    variants = record.variants
    base = next((runs for runs in variants.values() if runs[0].baseline), [])
    if not any(run.finished for run in base):
        return ["There is no finished baseline, so there is nothing to compare with."]
    sentences = []
    found = effects(record, schema.BITS_PER_BYTE)
    for name, runs in variants.items():
        if runs[0].baseline:
            continue
        effect = found.get(name)
        if effect is None:
            sentences.append(f"**{name}**: no run finished on a seed that the baseline has.")
            continue
        sentences.append(f"**{name}** {_cost(effect)}; {_savings(runs, base)}.")
    return sentences


def headline(record: StudyRecord) -> str:
    """How many changes could be told from the baseline, and how small a difference the study can tell at all."""
    found = effects(record, schema.BITS_PER_BYTE)
    halves = [(e.high - e.low) / 2 for e in found.values() if e.low is not None and e.high is not None]
    if not halves:
        return ""
    worse = [name for name, e in found.items() if e.resolved and e.mean > 0]
    better = [name for name, e in found.items() if e.resolved and e.mean < 0]
    parts = [f"{len(names)} {word} ({', '.join(names)})" for names, word in ((worse, "worse"), (better, "better")) if names]
    told = " and ".join(parts) if parts else "none can be told from it"
    smallest = f"{min(halves):.4f}" if max(halves) - min(halves) < 5e-5 else f"{min(halves):.4f} to {max(halves):.4f}"
    return (
        f"Of {_count(found)} compared with the baseline: {told}; the others differ by less than this study can show, "
        f"which is {smallest} bits per byte."
        if parts
        else f"Of {_count(found)} compared with the baseline {told}: this study can show differences from {smallest} bits per byte on."
    )


def _count(found: Sized) -> str:
    return f"{len(found)} variant{'' if len(found) == 1 else 's'}"


def _cost(effect: Estimate) -> str:
    if effect.low is None or effect.high is None:
        return f"differs by {effect.mean:+.4f} bits per byte from the baseline on one seed, which gives no interval"
    half = (effect.high - effect.low) / 2
    if not effect.resolved:
        return f"differs by {effect.mean:+.4f} ± {half:.4f} bits per byte: no difference that {effect.seeds} seeds can show"
    word = "costs" if effect.mean > 0 else "gains"
    return f"{word} {abs(effect.mean):.4f} ± {half:.4f} bits per byte"


def _savings(runs: Sequence[Run], base: Sequence[Run]) -> str:
    parts = []
    quantities = (
        (schema.KV_BYTES_PER_TOKEN, "the KV cache"),
        (schema.ACTIVATED_PARAMETERS, "activated parameters"),
        (schema.ALL_TO_ALL_SECONDS, "simulated all-to-all time"),
        (schema.DISTINCT_DEVICES, "devices per token"),
    )
    for name, words in quantities:
        ours, theirs = metric(runs, name), metric(base, name)
        if ours is None or theirs is None or not theirs.mean:
            continue
        change = ours.mean / theirs.mean - 1
        if abs(change) >= WORTH_SAYING:
            parts.append(f"{words} {change:+.0%}")
    return ", ".join(parts) if parts else "cache, parameters and simulated communication stay as they are"


def reference_sentence(record: StudyRecord) -> str:
    """How far below the order-2 model of the same tokens the trained models are."""
    shares = {
        run.name: 1 - run.metrics[schema.BITS_PER_BYTE] / run.metrics[schema.NGRAM_BITS_PER_BYTE]
        for run in record.runs
        if run.finished and schema.NGRAM_BITS_PER_BYTE in run.metrics and schema.BITS_PER_BYTE in run.metrics
    }
    if not shares:
        return "No run recorded the order-2 reference."
    low, high = min(shares.values()), max(shares.values())
    ends = sorted((low, high), key=abs)
    words = ["below" if share > 0 else "above" for share in ends]
    span = f"{abs(ends[0]):.1%} {'' if words[0] == words[1] else words[0] + ' '}to {abs(ends[1]):.1%} {words[1]}"
    above = sum(share <= 0 for share in shares.values())
    told = f"all {len(shares)} of them" if not above else f"{above} of {len(shares)} are not below it"
    return f"Trained models are {span} an order-2 Kneser-Ney model of the very tokens that each was trained on: {told}."
