"""The held-out text out of caches of fewer bits, where the runs recorded it (`training.cache_bits`)."""

from reports import words
from reports.analysis import Analysis, Variant
from reports.charts import Chart, Lines, Series
from reports.document import Cell, Table, plain
from reports.statistics import Estimate, estimate
from reports.words import estimate_words
from research.accounting import KV_BITS
from sweeps import schema

Entry = tuple[Variant, int, float, Estimate, Estimate | None]
"""Variant, bits per element, bytes per token, bits per byte, and its difference to the model's own precision, paired by seed."""


def entries(analysis: Analysis) -> list[Entry]:
    """One for each variant and width that was evaluated, smallest cache first."""
    found: list[Entry] = []
    for variant in analysis.variants:
        for bits in KV_BITS:
            runs = [run for run in variant.runs if run.value(schema.CACHE_BITS_PER_BYTE.format(bits)) is not None]
            values = [run.value(schema.CACHE_BITS_PER_BYTE.format(bits)) for run in runs]
            size = next((s for run in runs if (s := run.value(schema.CACHE_BYTES_PER_TOKEN.format(bits))) is not None), None)
            mean = estimate([v for v in values if v is not None])
            own = [(v, full) for v, run in zip(values, runs, strict=True) if v is not None and (full := run.value(schema.BITS_PER_BYTE)) is not None]
            if mean is not None and size is not None:
                found.append((variant, bits, size, mean, estimate([v - full for v, full in own])))
    return sorted(found, key=lambda e: (e[2], e[3].mean))


def beaten(found: list[Entry]) -> list[bool]:
    """Whether another entry has no more bytes and no more bits per byte, and less of one, on the means."""
    points = [(size, mean.mean) for _, _, size, mean, _ in found]
    return [any(o != p and o[0] <= p[0] and o[1] <= p[1] for o in points) for p in points]


def table(analysis: Analysis) -> Table | None:
    if not (found := entries(analysis)):
        return None
    rows: list[tuple[Cell, ...]] = []
    for (variant, bits, size, mean, change), lost in zip(found, beaten(found), strict=True):
        cost: Cell = "not recorded" if change is None else (words.plus_minus(change.mean, change.low, change.high, sign=True), change.mean)
        rows.append(
            (variant.words, (str(bits), float(bits)), (f"{size:,.0f}", size), (estimate_words(mean), mean.mean), cost, "no" if lost else "yes")
        )
    return Table(
        name="caches",
        caption="The held-out text out of a cache of fewer bits, smallest cache first",
        head=("variant", "bits", "bytes/token", "bits per byte", "cost of the width", "on the front"),
        rows=tuple(rows),
        note="Bytes as they are allocated, with the scale and offset of every vector; the cost is against the model's own precision, paired by seed. "
        "On the front: no other row is smaller and better, by means over seeds, which intervals may not tell apart.",
    )


def chart(analysis: Analysis, colours: dict[str, int | None]) -> Chart | str:
    if not (found := entries(analysis)):
        return "Caches of fewer bits: no run evaluated any (training.cache_bits)."
    lines = []
    for variant in analysis.variants:
        own = sorted((size, mean.mean, bits) for v, bits, size, mean, _ in found if v is variant)
        if own:
            sizes, means, _ = zip(*own, strict=True)
            lines.append(Series(name=plain(variant.words), x=sizes, y=means, colour=colours[variant.name], marked=True))
    best = [e for e, lost in zip(found, beaten(found), strict=True) if not lost]
    said = "; ".join(f"{plain(v.words)} at {bits} bits, {size:,.0f} bytes, {mean.mean:.4f}" for v, bits, size, mean, _ in best)
    return Chart(
        name="caches",
        caption="What a cache of so many bytes per token costs: one line a variant, one point a width that was evaluated.",
        alternative=f"The smallest caches for what they cost in {words.unit(schema.BITS_PER_BYTE)}: {said}.",
        panels=(Lines(title="", x_label="cache (bytes per token)", y_label="held-out bits per byte", series=tuple(lines)),),
        legend=tuple((line.name, line.colour) for line in lines if line.colour is not None),
    )
