"""Two studies side by side: baseline against baseline, the variants that both tried, and what differs in their configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from reports import confounds, words
from reports.analysis import Analysis, Variant, analyse
from reports.build import render, write_folder
from reports.charts import Chart, Interval, Intervals
from reports.document import Block, Bullets, Cell, Document, Heading, Notice, Picture, Table, Text, plain, safe
from reports.statistics import LEVEL, estimate, holm
from reports.store import StudyRecord
from reports.verdict import headline
from sweeps import schema

SAME_DATA = ("data_id", "vocab_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrast:
    """The second study's value minus the first's, of one variant; `paired`: over common seeds of the same text."""

    variant: str
    words: str
    mean: float
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    paired: bool
    seeds: tuple[int, int]

    @property
    def shown(self) -> bool:
        excluded = self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)
        return excluded and self.p_holm is not None and self.p_holm <= 1 - LEVEL


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    html: Path
    answer: str
    contrasts: tuple[Contrast, ...]
    differences: dict[str, tuple[Any, Any]]
    complete: bool

    def to_dict(self) -> dict[str, Any]:
        contrasts = [{**{name: getattr(c, name) for name in Contrast.__dataclass_fields__}, "shown": c.shown} for c in self.contrasts]
        return {
            "answer": self.answer,
            "complete": self.complete,
            "contrasts": contrasts,
            "configuration": self.differences,
            "files": {"html": str(self.html)},
        }


def compare_records(a: StudyRecord, b: StudyRecord, place: Path) -> Comparison:
    """The page of two studies, written into `place`."""
    first, second = analyse(a), analyse(b)
    same_text = all(a.data.get(key) == b.data.get(key) for key in SAME_DATA)
    shared = [(v, w) for v in first.variants for w in second.variants if _same(v, w)] if first.metric == second.metric else []
    contrasts = _contrasts(shared, paired=same_text)
    differences = _differences(a, b)
    answer = _answer(first, second, contrasts)
    complete = not (first.incomplete or second.incomplete)
    document = _page(first, second, contrasts, differences, answer, same_text=same_text)
    write_folder(place, render(document), {"studies": [a.name, b.name], "complete": complete})
    return Comparison(html=place / "report.html", answer=plain(answer), contrasts=tuple(contrasts), differences=differences, complete=complete)


def _same(one: Variant, other: Variant) -> bool:
    """Both baselines, or equal values of the settings that both studies search (and the others at their baseline's)."""
    if one.baseline or other.baseline:
        return one.baseline and other.baseline
    return one.words == other.words and one.against == other.against


def _contrasts(shared: list[tuple[Variant, Variant]], *, paired: bool) -> list[Contrast]:
    raw = [(v, w, *_difference(v.values, w.values, paired=paired)) for v, w in shared if v.values and w.values]
    tested = [row[4] for row in raw if row[4] is not None]
    corrected = iter(holm(tested))
    return [
        Contrast(
            variant=v.name,
            words=v.words,
            mean=mean,
            low=bounds[0],
            high=bounds[1],
            p=p,
            p_holm=next(corrected) if p is not None else None,
            paired=by_seed,
            seeds=(len(v.values), len(w.values)),
        )
        for v, w, mean, bounds, p, by_seed in raw
    ]


def _difference(
    ours: Mapping[int, float], theirs: Mapping[int, float], *, paired: bool
) -> tuple[float, tuple[float | None, float | None], float | None, bool]:
    """Mean, 95 % interval and p of theirs minus ours: paired by seed, else Welch's t."""
    common = sorted(set(ours) & set(theirs)) if paired else []
    if len(common) > 1:
        d = np.array([theirs[s] - ours[s] for s in common])
        found = estimate(list(d))
        assert found is not None
        if not d.std():
            return found.mean, (found.mean, found.mean), 0.0 if found.mean else 1.0, True
        return found.mean, (found.low, found.high), float(stats.ttest_1samp(d, 0.0).pvalue), True
    x, y = np.array(list(theirs.values())), np.array(list(ours.values()))
    mean = float(x.mean() - y.mean())
    if min(len(x), len(y)) < 2 or not x.std() + y.std():
        return mean, (None, None), None, False
    test = stats.ttest_ind(x, y, equal_var=False)
    interval = test.confidence_interval(LEVEL)
    return mean, (float(interval.low), float(interval.high)), float(test.pvalue), False


def _differences(a: StudyRecord, b: StudyRecord) -> dict[str, tuple[Any, Any]]:
    """Settings of the resolved baselines that are not equal, without the seed."""
    ours, theirs = (confounds.leaves(next((run.config for run in record.baseline if run.config), {})) for record in (a, b))
    paths = sorted({*ours, *theirs} - {"seed", ""})
    return {path: (ours.get(path), theirs.get(path)) for path in paths if ours.get(path) != theirs.get(path)}


def _answer(first: Analysis, second: Analysis, contrasts: list[Contrast]) -> str:
    a, b = safe(first.record.name), safe(second.record.name)
    if first.metric != second.metric:
        return f"{a} has the objective {first.metric}, {b} {second.metric}: their results cannot be compared."
    base = next((c for c in contrasts if c.words == "baseline"), None)
    if base is None:
        return f"{a} and {b} have no finished baseline each, so there is nothing to compare."
    unit = words.unit(first.metric)
    size = words.plus_minus(base.mean, base.low, base.high, sign=True)
    shown = "" if base.shown else " (no difference that these seeds can show)" if base.low is not None else " (one seed: no interval)"
    others = [c for c in contrasts if c is not base]
    told = [c.words for c in others if c.shown]
    count = f"{len(others)} variant{'' if len(others) == 1 else 's'}" if others else "no variant"
    tail = f": {words.join(told)} differ{'s' if len(told) == 1 else ''}" if told else ", none of which can be told apart" if others else ""
    return f"The baseline of {b} differs from that of {a} by {size} {unit}{shown}; they share {count}{tail}."


def _page(
    first: Analysis, second: Analysis, contrasts: list[Contrast], differences: Mapping[str, tuple[Any, Any]], answer: str, *, same_text: bool
) -> Document:
    a, b = safe(first.record.name), safe(second.record.name)
    blocks: list[Block] = []
    gaps = [(name, p) for name, side in ((a, first), (b, second)) for p in side.incomplete]
    if gaps:
        blocks.append(Notice(f"Incomplete; nothing was filled in. {'; '.join(f'{name}, {safe(p.place)}: {safe(p.text)}' for name, p in gaps[:12])}."))
    if not same_text:
        blocks.append(Notice("The two studies were not trained and validated on the same prepared text: bits per byte are of different text."))
    blocks += [Heading("Shared variants"), _table(first, second, contrasts, a, b)]
    if contrasts:
        blocks.insert(-1, Picture(_chart(first, contrasts, a, b)))
    blocks += [Heading("What differs in configuration"), *_configuration(differences, a, b)]
    blocks += [
        Heading("Each study's own answer"),
        Bullets((f"**{a}** ({safe(first.record.question)}) {headline(first)}", f"**{b}** ({safe(second.record.question)}) {headline(second)}")),
    ]
    blocks.append(_effects(first, second, a, b))
    return Document(title=f"{a} against {b}", kicker=f"Studies `{a}` and `{b}`", answer=answer, facts=(), blocks=tuple(blocks))


def _chart(first: Analysis, contrasts: list[Contrast], a: str, b: str) -> Chart:
    def tone(c: Contrast) -> str:
        return "none" if not c.shown else "worse" if (c.mean > 0) == first.lower_is_better else "better"

    items = tuple(
        Interval(name=plain(c.words), mean=c.mean, low=c.low, high=c.high, tone=tone(c), note=words.plus_minus(c.mean, c.low, c.high, sign=True))
        for c in contrasts
    )
    unit = words.unit(first.metric)
    return Chart(
        name="contrasts",
        caption=f"{b} minus {a}, with 95 % intervals; coloured where the difference is shown.",
        alternative=f"Difference of {b} to {a} in {unit}: {'; '.join(f'{i.name} {i.note}' for i in items)}.",
        panels=(Intervals(title="", x_label=f"{unit}, {plain(b)} minus {plain(a)}", items=items),),
    )


def _table(first: Analysis, second: Analysis, contrasts: list[Contrast], a: str, b: str) -> Block:
    if not contrasts:
        return Text("The two studies share no variant with values: neither their baselines nor any other.")
    rows: list[tuple[Cell, ...]] = []
    by_name = {v.name: v for v in first.variants}
    for c in contrasts:
        ours = by_name[c.variant]
        theirs = next(w for w in second.variants if _same(ours, w))
        found = [estimate(list(v.values.values())) for v in (ours, theirs)]
        cells: list[Cell] = [(words.estimate_words(e), e.mean) if e else "not recorded" for e in found]
        how = "paired by seed" if c.paired else "Welch" if c.low is not None else "one seed"
        p: Cell = "none" if c.p_holm is None else (f"{c.p_holm:.4f}", c.p_holm)
        rows.append((c.words, *cells, (words.plus_minus(c.mean, c.low, c.high, sign=True), c.mean), p, how, "shown" if c.shown else "not shown"))
    return Table(
        name="contrasts",
        caption=f"{words.metric_name(first.metric)} of the variants that both studies tried",
        head=("variant", a, b, f"{b} minus {a}", "p (Holm)", "interval", "difference"),
        rows=tuple(rows),
        note="95 % t-intervals; differences are paired where both studies trained a seed on the same text, else by Welch's t.",
    )


def _configuration(differences: Mapping[str, tuple[Any, Any]], a: str, b: str) -> list[Block]:
    if not differences:
        return [Text("The resolved configurations of the two baselines are equal.")]
    rows = tuple((f"`{path}`", safe(str(x)), safe(str(y))) for path, (x, y) in differences.items())
    return [Table(name="configuration", caption="Settings in which the baselines differ", head=("setting", a, b), rows=rows)]


def _effects(first: Analysis, second: Analysis, a: str, b: str) -> Table:
    """Each variant's effect within its own study."""
    names = list(dict.fromkeys(v.words for side in (first, second) for v in side.variants if not v.baseline))
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        cells: list[Cell] = []
        for side in (first, second):
            found = next((v for v in side.variants if v.words == name), None)
            effect = found.effect if found else None
            cells.append("not tried" if found is None else "none" if effect is None else (words.effect_words(effect), effect.mean))
        rows.append((name, *cells))
    metric = words.metric_name(first.metric if first.metric == second.metric else schema.BITS_PER_BYTE)
    return Table(name="effects", caption=f"Effect on {metric} against each study's own baseline", head=("variant", a, b), rows=tuple(rows))
