"""What is drawn: charts out of an analysis, and a sentence for each that the store has no data for."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from reports import caches, words
from reports.analysis import Analysis, Variant
from reports.charts import COLOURS, Bars, Chart, Interval, Intervals, Lines, Point, Points, Series, few_points
from reports.document import plain
from reports.routing_figures import device_load, distinct_devices, expert_load, simulated
from sweeps import schema


def draw(analysis: Analysis) -> tuple[dict[str, Chart], dict[str, str]]:
    """Charts by name, and why there is none."""
    colours = colour_of(analysis)
    makers: dict[str, Callable[[], Chart | str]] = {
        "effects": lambda: effects(analysis),
        "loss-curves": lambda: loss_curves(analysis, colours),
        "pareto": lambda: fronts(analysis, colours),
        "caches": lambda: caches.chart(analysis, colours),
        "simulated": lambda: simulated(analysis),
        "distinct-devices": lambda: distinct_devices(analysis, colours),
        "expert-load": lambda: expert_load(analysis),
        "device-load": lambda: device_load(analysis),
        "importances": lambda: importance_bars(analysis),
    }
    made = {name: make() for name, make in makers.items()}
    return {n: c for n, c in made.items() if isinstance(c, Chart)}, {n: c for n, c in made.items() if isinstance(c, str)}


def colour_of(analysis: Analysis) -> dict[str, int | None]:
    """The baseline, then the variants that differ most, have colours; the rest is grey."""
    base = [v.name for v in analysis.variants if v.baseline]
    strongest = sorted(analysis.compared, key=lambda v: -abs(v.effect.mean if v.effect else 0.0))
    names = [*base, *(v.name for v in strongest), *(v.name for v in analysis.variants)]
    chosen = list(dict.fromkeys(names))[:COLOURS]
    order = [v.name for v in analysis.variants if v.name in chosen]
    return {v.name: order.index(v.name) if v.name in chosen else None for v in analysis.variants}


def legend(variants: Sequence[Variant], colours: dict[str, int | None]) -> tuple[tuple[str, int | None], ...]:
    named = [(plain(v.words), colours[v.name]) for v in variants if colours[v.name] is not None]
    grey = sum(colours[v.name] is None for v in variants)
    return (*named, (f"{grey} others", None)) if grey else tuple(named)


def effects(analysis: Analysis) -> Chart | str:
    """Paired difference to the baseline, with its interval."""
    found = analysis.compared
    if not found:
        return "Effects: no variant has a finished run on a seed of the baseline."
    items = []
    for v in found:
        assert v.effect is not None
        tone = "none" if not v.effect.shown else "worse" if analysis.worse(v) else "better"
        told = "shown" if v.effect.shown else "not shown"
        note = f"{words.effect_words(v.effect)} {words.unit(analysis.metric)}, {words.seeds_words(v.effect.seeds)}, {told}"
        items.append(Interval(name=plain(v.words), mean=v.effect.mean, low=v.effect.low, high=v.effect.high, tone=tone, note=note))
    better = "left" if analysis.lower_is_better else "right"
    label = f"{words.unit(analysis.metric)}, difference to the baseline ({better} is better)"
    widest = max(abs(x) for i in items for x in (i.mean, i.low, i.high) if x is not None)
    band = analysis.floor if analysis.floor is not None and analysis.floor < widest else None
    panel = Intervals(title="", x_label=label, items=tuple(items), band=band)
    caption = "Effect of each variant with its 95 % interval; coloured where the study shows it."
    if band is not None:
        caption += " Grey band: the baseline's standard deviation over seeds."
    elif analysis.floor is not None:
        caption += " The baseline's standard deviation over seeds is wider than the picture: pairing by seed takes most of it out."
    listed = "; ".join(f"{i.name} {i.mean:+.{words.digits(i.mean)}f}{'' if i.tone == 'none' else ' (' + i.tone + ')'}" for i in items)
    return Chart(
        name="effects", caption=caption, alternative=f"Differences in {words.unit(analysis.metric)} to the baseline: {listed}.", panels=(panel,)
    )


def loss_curves(analysis: Analysis, colours: dict[str, int | None]) -> Chart | str:
    """Training loss and the objective over tokens: mean over seeds, band from lowest to highest."""
    keys = [(schema.LOSS, "training loss (nats per token, smoothed)")]
    shown = analysis.metric if any(analysis.metric in r for run in analysis.record.runs for r in run.records) else schema.BITS_PER_BYTE
    if shown != schema.LOSS:
        keys.append((shown, f"held-out {words.metric_name(shown)}" if shown.startswith("validation/") else words.metric_name(shown)))
    panels = []
    thinned = False
    for key, label in keys:
        whole = [s for v in analysis.variants if (s := _curve(v, key, colours[v.name])) is not None]
        series = few_points(whole)
        thinned = thinned or series != tuple(whole)
        if series:
            reference = [x for run in analysis.record.runs if (x := run.value(schema.NGRAM_BITS_PER_BYTE)) is not None]
            level = ("order-2 model of the same tokens", float(np.mean(reference))) if reference and key == schema.BITS_PER_BYTE else None
            panels.append(Lines(title=label, x_label="training tokens (millions)", y_label="", series=series, reference=level, from_x=_begin(series)))
    if not panels:
        return "Loss curves: no run has recorded any."
    begun = any(panel.from_x > 0 for panel in panels)
    scope = "Without the first tenth of training" if begun else "Over training"
    caption = f"{scope}. Lines are means over seeds, bands reach from the lowest to the highest seed."
    if thinned:
        caption += (
            f" Of each line {max(len(s.x) for panel in panels for s in panel.series)} points are kept; the runs' {schema.METRICS_FILE} hold all."
        )
    last = panels[-1]
    ends = "; ".join(f"{s.name} ends at {s.y[-1]:.4g}" for s in last.series[:12])
    return Chart(
        name="loss-curves",
        caption=caption,
        alternative=f"Curves of {len(last.series)} variants over training tokens; {last.title}: {ends}.",
        panels=tuple(panels),
        legend=legend(analysis.variants, colours),
    )


def _begin(series: Sequence[Series]) -> float:
    """The steep first tenth would flatten what is to be compared; short curves are drawn whole."""
    last = max(s.x[-1] for s in series)
    return last / 10 if all(sum(x >= last / 10 for x in s.x) >= 4 for s in series) else -math.inf


def _curve(variant: Variant, key: str, colour: int | None) -> Series | None:
    """Over the tokens that all seeds with records share; runs that failed early do not cut the others short."""
    runs = [run for run in variant.runs if run.finished] or list(variant.runs)
    curves = [c for run in runs if (c := {r["tokens"]: r[key] for r in run.records if np.isfinite(r.get(key, np.nan))})]
    tokens = sorted(set.intersection(*(set(c) for c in curves))) if curves else []
    if not tokens:
        return None
    values = np.array([[c[t] for t in tokens] for c in curves])
    if key == schema.LOSS:
        width = max(len(tokens) // 25, 1)
        values = np.array([np.convolve(row, np.ones(width) / width, "valid") for row in values])
        tokens = tokens[width - 1 :]
    band = len(values) > 1
    return Series(
        name=plain(variant.words),
        x=tuple(t / 1e6 for t in tokens),
        y=tuple(map(float, values.mean(0))),
        low=tuple(map(float, values.min(0))) if band else (),
        high=tuple(map(float, values.max(0))) if band else (),
        colour=colour,
        marked=key != schema.LOSS and len(tokens) <= 40,
    )


def fronts(analysis: Analysis, colours: dict[str, int | None]) -> Chart | str:
    """Objective against cache and against communication time, Pareto front of all three marked."""
    rows = []
    for v in analysis.variants:
        cache, time = v.means.get(schema.KV_BYTES_PER_TOKEN), v.means.get(schema.ALL_TO_ALL_SECONDS)
        if v.values and cache:
            rows.append((v, sum(v.values.values()) / len(v.values), cache.mean, time.mean * 1e6 if time else None))
    if len(rows) < 2:
        return "Pareto front: fewer than two variants have both the objective and a cache size."
    label = words.metric_name(analysis.metric)

    def panel(title: str, x_label: str, values: list[tuple[Variant, float, float]]) -> Points:
        points = tuple(Point(name=plain(v.words), x=x, y=y, front=v.name in analysis.front, colour=colours[v.name]) for v, y, x in values)
        return Points(title=title, x_label=x_label, y_label=label, points=points)

    panels = [panel(f"{label} against the cache", "KV cache (bytes per token, 16 bits)", [(v, y, c) for v, y, c, _ in rows])]
    timed = [(v, y, t) for v, y, _, t in rows if t is not None]
    if timed:
        panels.append(panel(f"{label} against communication", "simulated all-to-all of a layer (µs)", timed))
    front = ", ".join(plain(v.words) for v in analysis.variants if v.name in analysis.front)
    return Chart(
        name="pareto",
        caption="Discs are on the Pareto front of all three (objective, KV bytes, simulated time; means over seeds), crosses are beaten.",
        alternative=f"On the Pareto front of {label}, cache and simulated communication: {front or 'no variant that has all three'}.",
        panels=tuple(panels),
        legend=legend(analysis.variants, colours),
    )


def importance_bars(analysis: Analysis) -> Chart | str:
    """Two evaluators side by side."""
    found = analysis.importances
    if found.missing:
        return f"Importances: {found.missing}."
    names = sorted(found.fanova, key=lambda n: -found.fanova[n])
    groups = tuple((label, tuple(v.get(n, 0.0) for n in names)) for label, v in (("fANOVA", found.fanova), ("PED-ANOVA", found.ped_anova)))
    first = [words.setting(max(v, key=v.__getitem__)) for v in (found.fanova, found.ped_anova)]
    said = f"Both name {first[0]} first." if found.agree else f"The two disagree: fANOVA names {first[0]} first, PED-ANOVA {first[1]}."
    panel = Bars(
        title="", x_label=f"share of the variation in {words.unit(analysis.metric)}", names=tuple(words.setting(n) for n in names), groups=groups
    )
    caption = f"Importance of the searched settings by two evaluators over {len(analysis.variants)} variants. {said}"
    return Chart(name="importances", caption=caption, alternative=said, panels=(panel,), legend=(("fANOVA", 1), ("PED-ANOVA", 2)))
