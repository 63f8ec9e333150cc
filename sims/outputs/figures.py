"""Figures of results: seconds over the device limit with bands, bars of where time goes, curves of serving."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogFormatter

from sims.outputs.style import COLOURS, STYLE, png, svg
from sims.quantiles import Quantiles

FORMULA_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 4)))


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitPoint:
    """One all-to-all of the M x K x nodes figure; a limit of None is unrestricted routing."""

    nodes: int
    num_experts_per_tok: int
    device_limit: int | None
    seconds: Quantiles
    """Dispatch and combine together."""
    formulas: Mapping[str, float] = field(default_factory=dict)
    """Seconds of both by the formulas of other tools."""
    distinct_devices_per_token: float = float("nan")


def limit_figure(points: Sequence[LimitPoint]) -> Canvas:
    """Seconds over the limit: a column of panels per number of nodes, a row per K; ours with its P10 to P90 band, the formulas of others as lines."""
    nodes, chosen = sorted({p.nodes for p in points}), sorted({p.num_experts_per_tok for p in points})
    with mpl.rc_context(STYLE):
        canvas, grid = plt.subplots(
            len(chosen),
            len(nodes),
            squeeze=False,
            sharex=True,
            sharey="row",
            figsize=(1.2 + 2.9 * len(nodes), 1.1 + 2.1 * len(chosen)),
            layout="constrained",
        )
        for row, k in enumerate(chosen):
            for column, n in enumerate(nodes):
                here = [p for p in points if p.nodes == n and p.num_experts_per_tok == k]
                _limit_panel(grid[row][column], sorted(here, key=lambda p: (p.device_limit is None, p.device_limit or 0)))
                grid[row][column].set_title(f"{n} node{'s' if n > 1 else ''}, K = {k}", fontsize=9)
        for axes in grid[-1]:
            axes.set_xlabel("device limit M")
        for axes in grid[:, 0]:
            axes.set_ylabel("dispatch + combine (us)")
        handles = {label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        canvas.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=7)
        return canvas


def _limit_panel(axes: Axes, points: Sequence[LimitPoint]) -> None:
    if not points:
        axes.text(0.5, 0.5, "not asked for", ha="center", va="center", transform=axes.transAxes, color="#666")
        return
    limits = [p.device_limit for p in points if p.device_limit is not None]
    free = max(limits, default=0) + 1
    x = [p.device_limit or free for p in points]
    low, mid, high = ([1e6 * value for value in values] for values in zip(*(tuple(p.seconds) for p in points), strict=True))
    axes.fill_between(x, low, high, color=COLOURS[0], alpha=0.2, lw=0, label="ours, P10 to P90")
    axes.plot(x, mid, marker="o", ms=3, color=COLOURS[0], label="ours, P50")
    for index, name in enumerate(points[0].formulas):
        values = [1e6 * p.formulas[name] for p in points]
        colour = COLOURS[1 + index % (len(COLOURS) - 1)]
        axes.plot(x, values, label=f"formula {name}", ls=FORMULA_LINES[index % len(FORMULA_LINES)], lw=1, color=colour)
    # A formula that is far off must not flatten the curve that the figure is about.
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.4)))
    axes.set_xticks(x, [str(p.device_limit) if p.device_limit is not None else "none" for p in points])


def limit_csv(points: Sequence[LimitPoint]) -> str:
    """The data of the figure, a row per point, seconds."""
    names = list(dict.fromkeys(name for point in points for name in point.formulas))
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(
        ["nodes", "num_experts_per_tok", "device_limit", "seconds_p10", "seconds_p50", "seconds_p90", "distinct_devices_per_token"]
        + [f"formula_{name}_seconds" for name in names]
    )
    for p in points:
        limit = "" if p.device_limit is None else p.device_limit
        writer.writerow([p.nodes, p.num_experts_per_tok, limit, *p.seconds, p.distinct_devices_per_token, *(p.formulas.get(n, "") for n in names)])
    return sink.getvalue()


def limit_text(points: Sequence[LimitPoint]) -> str:
    """What the figure shows, in words."""
    nodes, chosen = sorted({p.nodes for p in points}), sorted({p.num_experts_per_tok for p in points})
    seconds = [p.seconds.p50 * 1e6 for p in points]
    formulas = ", ".join(points[0].formulas) if points else ""
    return (
        f"Microseconds of dispatch and combine over the device limit M, for {_listed(nodes)} nodes and K = {_listed(chosen)}: P50 from "
        f"{min(seconds):,.0f} to {max(seconds):,.0f}, with P10 to P90 bands; beside it the formulas {formulas}, which do not change with M."
    )


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def bars_figure(parts: Mapping[str, float], title: str, unit: str = "ms", scale: float = 1e3) -> Canvas:
    """Where time goes: a horizontal bar per part, the longest first, with its number and share."""
    total = sum(parts.values()) or 1.0
    ordered = sorted(((name.replace("_", " "), value) for name, value in parts.items() if value > 1e-9 * total), key=lambda part: -part[1])
    with mpl.rc_context(STYLE):
        canvas, axes = plt.subplots(figsize=(7.6, 0.9 + 0.34 * len(ordered)), layout="constrained")
        positions = range(len(ordered))
        axes.barh(positions, [value * scale for _, value in ordered], color=COLOURS[0], height=0.65)
        for y, (_, value) in zip(positions, ordered, strict=True):
            axes.annotate(f"{value * scale:,.3g} ({100 * value / total:.1f} %)", (value * scale, y), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(positions, [name for name, _ in ordered])
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.set(xlabel=unit, title=title)
        axes.grid(axis="y", visible=False)
        return canvas


def formula_figure(ours: Mapping[str, Quantiles], theirs: Mapping[str, Mapping[str, float]], title: str) -> Canvas:
    """Microseconds of dispatch and combine: ours with P10 to P90, and the formulas of other tools."""
    with mpl.rc_context(STYLE):
        canvas, axes = plt.subplots(figsize=(7.6, 1.3 + 0.5 * (1 + len(theirs))), layout="constrained")
        names = ["ours", *(f"formula {name}" for name in theirs)]
        for index, move in enumerate(ours):
            values = [1e6 * ours[move].p50, *(1e6 * formula[move] for formula in theirs.values())]
            at = [y + 0.36 * (index - 0.5) for y in range(len(names))]
            axes.barh(at, values, height=0.34, color=COLOURS[index], label=move)
            low, high = 1e6 * (ours[move].p50 - ours[move].p10), 1e6 * (ours[move].p90 - ours[move].p50)
            axes.errorbar(values[0], at[0], xerr=[[low], [high]], color="#1b1b1b", capsize=3, lw=1)
            for y, value in zip(at, values, strict=True):
                axes.annotate(f"{value:,.0f}", (value, y), (8, 0), textcoords="offset points", va="center", fontsize=7)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set(xlabel="us", title=title)
        axes.grid(axis="y", visible=False)
        axes.legend(loc="lower right")
        return canvas


def curve_figure(
    x: Sequence[float],
    bands: Sequence[Quantiles],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    log_x: bool = False,
    marked: tuple[str, float] | None = None,
) -> Canvas:
    """P50 over x, with the P10 to P90 band; a named x may be marked."""
    with mpl.rc_context(STYLE):
        canvas, axes = plt.subplots(figsize=(7.0, 3.6), layout="constrained")
        axes.fill_between(x, [b.p10 for b in bands], [b.p90 for b in bands], alpha=0.2, lw=0, label="P10 to P90")
        axes.plot(x, [b.p50 for b in bands], marker="o", ms=3, label="P50")
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title, xscale="log" if log_x else "linear")
        if marked is not None:
            axes.axvline(marked[1], color=COLOURS[1], ls="--", lw=1.2, label=f"{marked[0]}: {marked[1]:,.0f}")
        axes.legend()
        return canvas


def limit_png(points: Sequence[LimitPoint]) -> bytes:
    with mpl.rc_context(STYLE):
        return png(limit_figure(points), limit_text(points))


def svg_bytes(canvas: Canvas) -> bytes:
    with mpl.rc_context(STYLE):
        return svg(canvas)


def png_bytes(canvas: Canvas, alternative: str) -> bytes:
    with mpl.rc_context(STYLE):
        return png(canvas, alternative)
