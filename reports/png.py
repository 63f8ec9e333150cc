"""Charts as PNG files, by matplotlib: the same bytes each time."""

import io
import textwrap
from collections.abc import Callable
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from reports.charts import Bars, Chart, Heat, Intervals, Lines, Points

PALETTE = ("#1b1b1b", "#0b6bb8", "#d1495b", "#2a9d5c", "#c97a10", "#7b52ab", "#138a92", "#a8497f")
GREY = "#9aa0a8"
TONES = {"worse": "#d1495b", "better": "#2a9d5c", "none": "#777d86"}
STYLE: dict[Any, Any] = {
    "figure.dpi": 130,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
COLUMNS = 3
LEGEND_COLUMNS = 4
LABEL = 66
"""Characters of a line of a label beside an interval."""


def png(chart: Chart) -> bytes:
    """The whole figure."""
    kind = type(chart.panels[0])
    columns = min(len(chart.panels), 2 if kind in (Lines, Points) else COLUMNS)
    rows = -(-len(chart.panels) // columns)
    with mpl.rc_context(STYLE):
        canvas, grid = plt.subplots(rows, columns, figsize=_size(chart, rows, columns), squeeze=False)
        cells = list(grid.ravel())
        for axes, panel in zip(cells, chart.panels, strict=False):
            DRAW[type(panel)](axes, panel)
            axes.set_title(panel.title, loc="left")
        for axes in cells[len(chart.panels) :]:
            axes.set_visible(False)
        low = 0.0
        if chart.legend:
            marks = [plt.Line2D([], [], color=_colour(colour), lw=2) for _, colour in chart.legend]
            names = [name for name, _ in chart.legend]
            columns = min(LEGEND_COLUMNS, len(names))
            low = 0.22 * (1 + -(-len(names) // columns)) / canvas.get_figheight()
            canvas.legend(marks, names, loc="lower center", ncols=columns, fontsize=8)
        canvas.tight_layout(rect=(0, low, 1, 1))
        buffer = io.BytesIO()
        # Software and date would make the same figure different bytes.
        canvas.savefig(buffer, format="png", metadata={"Software": None})
        plt.close(canvas)
    return buffer.getvalue()


def pixels(values: np.ndarray, top: float) -> bytes:
    """A PNG of one pixel per value, for a page to scale."""
    buffer = io.BytesIO()
    plt.imsave(buffer, values, cmap="cividis", vmin=0, vmax=top, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _size(chart: Chart, rows: int, columns: int) -> tuple[float, float]:
    first = chart.panels[0]
    if isinstance(first, Intervals):
        return 7.6, 1.0 + 0.36 * len(first.items)
    if isinstance(first, Bars):
        return 6.4, 1.0 + 0.45 * len(first.names)
    if isinstance(first, Heat):
        tallest = max(len(p.row_labels) for p in chart.panels if isinstance(p, Heat))
        return 3.4 * columns + 0.8, rows * min(0.9 + 0.22 * tallest, 6.0)
    return 4.6 * columns, 3.4 * rows


def _colour(colour: int | None) -> str:
    return GREY if colour is None else PALETTE[colour % len(PALETTE)]


def _lines(axes: Axes, panel: Lines) -> None:
    for whole in reversed(panel.series):
        series = whole.since(panel.from_x)
        colour = _colour(series.colour)
        style: dict[str, Any] = {"marker": "o" if series.marked else None, "ms": 3, "ls": "--" if series.dashed else "-"}
        style["lw"] = 1.4 if series.colour is not None else 0.8
        axes.plot(series.x, series.y, color=colour, **style)
        if series.low:
            axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.13, lw=0)
    if panel.reference:
        axes.axhline(panel.reference[1], ls="--", lw=1, color="#888")
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "top", "fontsize": 8, "color": "#666"}
        axes.annotate(panel.reference[0], (0.98, panel.reference[1]), **place)
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
    if panel.from_zero:
        axes.set_ylim(0, None)


def _intervals(axes: Axes, panel: Intervals) -> None:
    names = [item.name for item in panel.items]
    for y, item in enumerate(reversed(panel.items)):
        if item.low is not None and item.high is not None:
            axes.plot([item.low, item.high], [y, y], color=TONES[item.tone], lw=2.4, alpha=0.55, solid_capstyle="round")
        axes.plot(item.mean, y, "o", color=TONES[item.tone], ms=6)
    axes.axvline(0, color="#1b1b1b", lw=1)
    if panel.band is not None:
        axes.axvspan(-panel.band, panel.band, color="#888", alpha=0.12, lw=0)
    # A label that is wider than the figure pushes it out of its own picture.
    labels = [textwrap.fill(name, LABEL) for name in names[::-1]]
    axes.set(yticks=range(len(names)), xlabel=panel.x_label)
    axes.set_yticklabels(labels, fontsize=7 if any("\n" in label for label in labels) else None)


def _points(axes: Axes, panel: Points) -> None:
    for point in panel.points:
        axes.scatter(point.x, point.y, s=60 if point.front else 28, marker="o" if point.front else "x", color=_colour(point.colour))
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
    axes.margins(0.12)


def _bars(axes: Axes, panel: Bars) -> None:
    height = 0.8 / len(panel.groups)
    places = np.arange(len(panel.names))
    for index, (label, values) in enumerate(panel.groups):
        axes.barh(places + (index - (len(panel.groups) - 1) / 2) * height, values, height=height * 0.9, label=label, color=PALETTE[index + 1])
    axes.set(yticks=places, yticklabels=panel.names, xlabel=panel.x_label)
    axes.invert_yaxis()
    axes.legend(fontsize=8)


def _heat(axes: Axes, panel: Heat) -> None:
    axes.imshow(panel.values, aspect="auto", cmap="cividis", vmin=0, vmax=panel.top, interpolation="nearest")
    axes.set(yticks=range(len(panel.row_labels)), xlabel=f"{panel.x_label}; {panel.value_label}, 0 to {panel.top:g}")
    axes.set_yticklabels(panel.row_labels, fontsize=6)
    axes.grid(visible=False)


DRAW: dict[type, Callable[[Axes, Any], None]] = {Lines: _lines, Intervals: _intervals, Points: _points, Bars: _bars, Heat: _heat}
