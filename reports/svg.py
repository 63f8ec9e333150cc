"""Charts for the page: SVG that follows the page's colours, with the values that a pointer or the arrow keys read out.

Coordinates are the view box's; every panel is a picture of its own, so that a phone stacks them.  Marks are (x, y, text).
"""

import base64
import json
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np

from reports.charts import Bars, Chart, Heat, Intervals, Lines, Points
from reports.png import pixels

WIDTH = 460
HEAT_WIDTH = 340
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 46
CHARACTER = 6.9
"""Width of a character of the labels, in the view box's units."""
MOST_POINTS = 60
Mark = tuple[float, float, str]


def svg(chart: Chart) -> str:
    """All panels in a `<div class="panels">`, each with its marks as JSON."""
    parts = []
    for index, panel in enumerate(chart.panels):
        height, body, marks = DRAW[type(panel)](panel)
        width = HEAT_WIDTH if isinstance(panel, Heat) else WIDTH
        label = f"{panel.title}: {chart.alternative}" if len(chart.panels) > 1 and panel.title else chart.alternative
        title = f'<p class="panel-title">{escape(panel.title)}</p>' if panel.title else ""
        data = json.dumps(marks, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
        parts.append(
            f'<div class="panel">{title}<div class="plot" tabindex="0" role="group" '
            f'aria-label="{escape(chart.name)} {index + 1}: arrow keys read the values">'
            f'<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(label)}">{body}</svg></div>'
            f'<script type="application/json">{data}</script></div>'
        )
    return f'<div class="panels k-{type(chart.panels[0]).__name__.lower()}">{"".join(parts)}</div>{_legend(chart)}'


def _legend(chart: Chart) -> str:
    if not chart.legend:
        return ""
    items = "".join(
        f'<li><button type="button" aria-pressed="true" data-series="{_slot(colour)}"><i class="{_slot(colour)}"></i>{escape(name)}</button></li>'
        for name, colour in chart.legend
    )
    return f'<ul class="legend" aria-label="Series; a button hides or shows one">{items}</ul>'


def _slot(colour: int | None) -> str:
    return "sx" if colour is None else f"s{colour}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within low..high, about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    return [round(step * i, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A short form that does not lose what matters."""
    if value and (abs(value) >= 1e9 or abs(value) < 1e-4):
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


class _Axes:
    """A frame with ticks and labels; `x` and `y` take values to coordinates."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], height: float, labels: tuple[str, str], left: float = LEFT) -> None:
        self.left, self.right, self.top, self.bottom = left, WIDTH - RIGHT, TOP, height - BOTTOM
        (self.x0, self.x1), (self.y0, self.y1) = _wide(*x), _wide(*y)
        self.parts: list[str] = []
        for value in ticks(self.x0, self.x1):
            self.parts.append(f'<path class="grid" d="M{self.x(value):.1f} {self.top}V{self.bottom}"/>')
            self.parts.append(f'<text class="tick" x="{self.x(value):.1f}" y="{self.bottom + 15}" text-anchor="middle">{number(value)}</text>')
        for value in ticks(self.y0, self.y1) if left > RIGHT else []:
            self.parts.append(f'<path class="grid" d="M{self.left} {self.y(value):.1f}H{self.right}"/>')
            self.parts.append(f'<text class="tick" x="{self.left - 6}" y="{self.y(value) + 4:.1f}" text-anchor="end">{number(value)}</text>')
        self.parts.append(f'<text class="label" x="{(self.left + self.right) / 2}" y="{height - 8}" text-anchor="middle">{escape(labels[0])}</text>')
        if labels[1]:
            middle = (self.top + self.bottom) / 2
            self.parts.append(f'<text class="label" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{escape(labels[1])}</text>')

    def x(self, value: float) -> float:
        return self.left + (value - self.x0) / (self.x1 - self.x0) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.y0) / (self.y1 - self.y0) * (self.bottom - self.top)

    def line(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        return "L".join(f"{self.x(a):.1f} {self.y(b):.1f}" for a, b in zip(xs, ys, strict=True))


def _wide(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - (abs(low) or 1) * 0.05, high + (abs(high) or 1) * 0.05)


def _span(values: Sequence[float], margin: float = 0.06) -> tuple[float, float]:
    low, high = min(values), max(values)
    return low - (high - low) * margin, high + (high - low) * margin


def _thinned(xs: Sequence[float], from_x: float) -> np.ndarray:
    """Indices of the points to draw."""
    kept = np.flatnonzero(np.array(xs) >= from_x)
    return kept[np.unique(np.linspace(0, len(kept) - 1, min(len(kept), MOST_POINTS)).round().astype(int))] if len(kept) else kept


def _lines(panel: Lines) -> tuple[float, str, list[Mark]]:
    rows = [row for row in panel.rows() if row[1] >= panel.from_x]
    ys = [v for row in rows for v in row[2:] if v is not None] + ([panel.reference[1]] if panel.reference else [])
    span = _span(ys)
    axes = _Axes(_span([r[1] for r in rows], 0.02), (0.0, span[1]) if panel.from_zero else span, 310, (panel.x_label, panel.y_label))
    body, marks = list(axes.parts), []
    if panel.reference:
        level = axes.y(panel.reference[1])
        body.append(f'<path class="reference" d="M{axes.left} {level:.1f}H{axes.right}"/>')
        body.append(f'<text class="tick" x="{axes.right}" y="{level - 5:.1f}" text-anchor="end">{escape(panel.reference[0])}</text>')
    for series in reversed(panel.series):
        keep = _thinned(series.x, panel.from_x)
        xs, values = np.array(series.x)[keep], np.array(series.y)[keep]
        group = []
        if series.low and len(keep):
            low, high = np.array(series.low)[keep], np.array(series.high)[keep]
            group.append(f'<path class="band" d="M{axes.line(xs, high)}L{axes.line(xs[::-1], low[::-1])}Z"/>')
        group.append(f'<path class="line{" dashed" if series.dashed else ""}" d="M{axes.line(xs, values)}"/>')
        if series.marked:
            group += [f'<circle r="2.6" cx="{axes.x(a):.1f}" cy="{axes.y(b):.1f}"/>' for a, b in zip(xs, values, strict=True)]
        body.append(f'<g class="{_slot(series.colour)}">{"".join(group)}</g>')
    for series in panel.series:
        for index in _thinned(series.x, panel.from_x):
            x, y = series.x[index], series.y[index]
            band = f" ({number(series.low[index])} to {number(series.high[index])})" if series.low else ""
            marks.append((round(axes.x(x), 1), round(axes.y(y), 1), f"{series.name}: {number(y)}{band} at {number(x)}"))
    return 310, "".join(body), marks


def _intervals(panel: Intervals) -> tuple[float, str, list[Mark]]:
    row = 40
    height = TOP + row * len(panel.items) + BOTTOM
    ends = [v for item in panel.items for v in (item.mean, item.low, item.high) if v is not None] + [0.0]
    axes = _Axes(_span(ends), (0, 1), height, (panel.x_label, ""), left=RIGHT)
    body, marks = [], []
    if panel.band is not None:
        left, right = max(axes.x(-panel.band), axes.left), min(axes.x(panel.band), axes.right)
        body.append(f'<rect class="floor" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{axes.bottom - TOP}"/>')
    # The zero line beside each interval only: it would run through the names.
    zero = "".join(f"M{axes.x(0):.1f} {TOP + row * index + 20}v14" for index in range(len(panel.items)))
    body += [*axes.parts, f'<path class="zero" d="{zero}"/>']
    for index, item in enumerate(panel.items):
        y = TOP + row * index + 27
        body.append(f'<text class="name" x="{axes.left}" y="{y - 11}">{escape(item.name)}</text>')
        group = ""
        if item.low is not None and item.high is not None:
            group = f'<path class="whisker" d="M{axes.x(item.low):.1f} {y}H{axes.x(item.high):.1f}"/>'
        body.append(f'<g class="t-{item.tone}">{group}<circle r="4.5" cx="{axes.x(item.mean):.1f}" cy="{y}"/></g>')
        marks.append((round(axes.x(item.mean), 1), float(y), f"{item.name}: {item.note}"))
    return height, "".join(body), marks


def _points(panel: Points) -> tuple[float, str, list[Mark]]:
    points = panel.points
    axes = _Axes(_span([p.x for p in points], 0.1), _span([p.y for p in points], 0.1), 310, (panel.x_label, panel.y_label))
    body, marks = list(axes.parts), []
    for p in points:
        x, y = axes.x(p.x), axes.y(p.y)
        shape = f'<circle r="5.5" cx="{x:.1f}" cy="{y:.1f}"/>' if p.front else f'<path class="line" d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"/>'
        body.append(f'<g class="{_slot(p.colour)}">{shape}</g>')
        where = "on the front" if p.front else "beaten"
        marks.append((round(x, 1), round(y, 1), f"{p.name}: {number(p.y)} at {number(p.x)}, {where}"))
    return 310, "".join(body), marks


def _bars(panel: Bars) -> tuple[float, str, list[Mark]]:
    row = 16 * len(panel.groups) + 26
    height = TOP + row * len(panel.names) + BOTTOM
    axes = _Axes((0.0, max(v for _, values in panel.groups for v in values) * 1.05 or 1.0), (0, 1), height, (panel.x_label, ""), left=RIGHT)
    body, marks = list(axes.parts), []
    for index, name in enumerate(panel.names):
        y = TOP + row * index
        body.append(f'<text class="name" x="{axes.left + 2}" y="{y + 14}">{escape(name)}</text>')
        for group, (label, values) in enumerate(panel.groups):
            top, end = y + 20 + 16 * group, axes.x(values[index])
            body.append(f'<g class="s{group + 1}"><rect class="bar" x="{axes.left}" y="{top}" width="{end - axes.left:.1f}" height="13"/></g>')
            marks.append((round(end, 1), top + 6.0, f"{name}: {number(values[index])} by {label}"))
    return height, "".join(body), marks


def _heat(panel: Heat) -> tuple[float, str, list[Mark]]:
    rows, columns = panel.values.shape
    cell = min(18.0, max(4.0, 260 / rows))
    height = TOP + cell * rows + BOTTOM
    left = min(150.0, 10 + CHARACTER * max(map(len, panel.row_labels)))
    width, bottom = HEAT_WIDTH - RIGHT - left, TOP + cell * rows
    picture = base64.b64encode(pixels(panel.values, panel.top)).decode()
    body = [
        f'<image class="heat" x="{left}" y="{TOP}" width="{width:.1f}" height="{cell * rows:.1f}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{picture}"/>'
    ]
    every = max(1, math.ceil(13 / cell))
    for index in range(0, rows, every):
        y = TOP + cell * (index + 0.5) + 4
        body.append(f'<text class="tick" x="{left - 6}" y="{y:.1f}" text-anchor="end">{escape(panel.row_labels[index])}</text>')
    for column in sorted({0, columns - 1, *(int(v) for v in ticks(0, columns - 1, 4) if v == int(v) and v < columns * 0.9)}):
        x = left + width * (column + 0.5) / columns
        body.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 14:.1f}" text-anchor="middle">{column}</text>')
    words = f"{panel.x_label}; {panel.value_label}: dark 0, bright {number(panel.top)}"
    body.append(f'<text class="label" x="{HEAT_WIDTH / 2}" y="{height - 8:.1f}" text-anchor="middle">{escape(words)}</text>')
    marks = [
        (round(left + width * (c + 0.5) / columns, 1), round(TOP + cell * (r + 0.5), 1), f"{label}, {c}: {panel.values[r, c]:.2f}")
        for r, label in enumerate(panel.row_labels)
        for c in range(columns)
    ]
    return height, "".join(body), marks


DRAW: dict[type, Callable[[Any], tuple[float, str, list[Mark]]]] = {
    Lines: _lines,
    Intervals: _intervals,
    Points: _points,
    Bars: _bars,
    Heat: _heat,
}
