"""What a figure shows, as values: one description that a PNG, an SVG, a CSV file and a spoken text are made of."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

COLOURS = 8
"""Series with a colour of their own; the rest is drawn in grey."""
MOST_POINTS, FEWEST_POINTS, ALL_POINTS = 240, 60, 3600
"""Of a line that is kept: as many as a picture can show, fewer where there are many lines, so that a committed report stays small."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """A line over `x`; `low` and `high` are its band.  `colour` counts from 0 (the baseline); None is grey."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    colour: int | None = None
    marked: bool = False
    dashed: bool = False

    def since(self, x: float) -> "Series":
        """Without the points before `x`."""
        return self._at([index for index, value in enumerate(self.x) if value >= x])

    def thinned(self, most: int) -> "Series":
        """`most` points of a longer one, evenly, both ends among them."""
        if len(self.x) <= most:
            return self
        return self._at([int(i) for i in np.unique(np.linspace(0, len(self.x) - 1, most).round())])

    def _at(self, keep: Sequence[int]) -> "Series":
        def kept(values: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(values[i] for i in keep) if values else ()

        return replace(self, x=kept(self.x), y=kept(self.y), low=kept(self.low), high=kept(self.high))


def few_points(series: Sequence[Series]) -> tuple[Series, ...]:
    """The lines of a panel, each with at most so many points that a report stays small."""
    most = min(max(ALL_POINTS // max(len(series), 1), FEWEST_POINTS), MOST_POINTS)
    return tuple(each.thinned(most) for each in series)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lines:
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    reference: tuple[str, float] | None = None
    """A level across the panel, with its name."""
    from_zero: bool = False
    from_x: float = -math.inf
    """What is drawn begins here; the data hold all."""

    def rows(self) -> Iterator[tuple[str, float, float, float | None, float | None]]:
        """name, x, y, low, high."""
        for series in self.series:
            bands = zip(series.low, series.high, strict=True) if series.low else iter([(None, None)] * len(series.x))
            for x, y, (low, high) in zip(series.x, series.y, bands, strict=True):
                yield series.name, x, y, low, high


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """`tone`: worse, better or none."""

    name: str
    mean: float
    low: float | None
    high: float | None
    tone: str
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Intervals:
    title: str
    x_label: str
    items: tuple[Interval, ...]
    band: float | None = None
    """Half the width of a grey band around zero."""

    def rows(self) -> Iterator[tuple[str, float, float | None, float | None]]:
        """name, mean, low, high."""
        return ((item.name, item.mean, item.low, item.high) for item in self.items)


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    name: str
    x: float
    y: float
    front: bool
    colour: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Points:
    title: str
    x_label: str
    y_label: str
    points: tuple[Point, ...]

    def rows(self) -> Iterator[tuple[str, float, float, bool]]:
        """name, x, y, on the front."""
        return ((p.name, p.x, p.y, p.front) for p in self.points)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bars:
    """Several values (one per group) for each name, lying."""

    title: str
    x_label: str
    names: tuple[str, ...]
    groups: tuple[tuple[str, tuple[float, ...]], ...]

    def rows(self) -> Iterator[tuple[str, str, float]]:
        """name, group, value."""
        return ((name, group, values[index]) for index, name in enumerate(self.names) for group, values in self.groups)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Heat:
    """`values` (rows, columns) as colours from 0 to `top`."""

    title: str
    x_label: str
    row_labels: tuple[str, ...]
    value_label: str
    values: np.ndarray
    top: float

    def rows(self) -> Iterator[tuple[str, int, float]]:
        """row, column, value."""
        return ((label, column, float(value)) for label, row in zip(self.row_labels, self.values, strict=True) for column, value in enumerate(row))


Panel = Lines | Intervals | Points | Bars | Heat
HEADS: dict[type, tuple[str, ...]] = {
    Lines: ("panel", "series", "x", "y", "low", "high"),
    Intervals: ("panel", "name", "mean", "low", "high"),
    Points: ("panel", "name", "x", "y", "on_front"),
    Bars: ("panel", "name", "group", "value"),
    Heat: ("panel", "row", "column", "value"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A figure of one kind of panels; `alternative` is the text that stands in for it."""

    name: str
    caption: str
    alternative: str
    panels: tuple[Panel, ...]
    legend: tuple[tuple[str, int | None], ...] = field(default=())
    """Names and colours, where the panels share them."""

    def table(self) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        """Head and rows of everything drawn."""
        return HEADS[type(self.panels[0])], [(panel.title, *row) for panel in self.panels for row in panel.rows()]
