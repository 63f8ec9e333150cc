"""What a variant does to loads, drops and sends: differences to the baseline with intervals, as for the objective."""

from reports import words
from reports.analysis import Analysis
from reports.document import Block, Bullets, Cell, Table
from reports.statistics import Effect, compare
from sweeps import schema

METRICS = (schema.EXPERT_VIOLATION, schema.DEVICE_VIOLATION, schema.DROPPED_SHARE, schema.DISTINCT_DEVICES)


def effects(analysis: Analysis) -> dict[str, dict[str, Effect]]:
    """By metric and variant; a metric that the baseline or every variant lacks, or that is equal everywhere, is left out."""
    found = {}
    for metric in METRICS:
        values = {v.name: {run.seed: x for run in v.runs if (x := run.value(metric)) is not None} for v in analysis.variants}
        base = analysis.baseline
        if base is None or not values[base.name]:
            continue
        differences = compare(values[base.name], {v.name: values[v.name] for v in analysis.variants if not v.baseline})
        if any(effect.mean for effect in differences.values()):
            found[metric] = differences
    return found


def blocks(analysis: Analysis) -> list[Block]:
    """A table, and a sentence for each difference that the study shows; nothing where there is no difference at all."""
    if not (found := effects(analysis)):
        return []
    rows: list[tuple[Cell, ...]] = []
    for v in analysis.compared:
        cells: list[Cell] = []
        for differences in found.values():
            effect = differences.get(v.name)
            cells.append("not recorded" if effect is None else (words.effect_words(effect) + (", shown" if effect.shown else ""), effect.mean))
        rows.append((v.words, *cells))
    table = Table(
        name="routing-effects",
        caption="What each variant changes in routing at the end of training",
        head=("variant", *(words.metric_name(metric) for metric in found)),
        rows=tuple(rows),
        note="Difference to the baseline, paired by seed, with its 95 % interval; shown where it holds after Holm's correction over the variants of "
        "its column. Of the last recorded training batch, mean over layers.",
    )
    said = []
    for v in analysis.compared:
        shown = [(metric, d[v.name]) for metric, d in found.items() if v.name in d and d[v.name].shown]
        if shown:
            parts = [f"{'raises' if e.mean > 0 else 'lowers'} {words.metric_name(metric)} by {_amount(e)}" for metric, e in shown]
            said.append(f"**{v.words}** {words.join(parts)} against {v.against}.")
    return [table, *([Bullets(tuple(said))] if said else [])]


def _amount(effect: Effect) -> str:
    low, high = (
        (effect.low, effect.high) if effect.mean > 0 else (None if effect.high is None else -effect.high, None if effect.low is None else -effect.low)
    )
    return words.plus_minus(abs(effect.mean), low, high)
