"""Charts as geometry: places within a small drawing, which the page's template writes as SVG.

Drawn by hand so that colours follow the reader's light or dark screen, and paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 420.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 12.0, 12.0, 44.0
ROW = 34.0
LABEL_ROW = 15.0
GAP = 8.0  # above the axis
SERIES = 6  # that colours and dashes tell apart
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on an axis: its place in the drawing, and its text."""

    place: float
    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """A line through data: SVG points, its style (0 to SERIES − 1), and what it is."""

    points: str
    style: int
    name: str
    ends: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """A level that lines are held against."""

    points: str
    name: str


@dataclass(frozen=True, slots=True)
class LineChart:
    """Lines over two axes; the same as a table lies beside it on the page."""

    id: str
    title: str
    description: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    rules: tuple[Rule, ...]
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a bar or dot chart: where it stands, from where to where it goes, what it says."""

    name: str
    value: str
    label_y: float
    y: float
    start: float
    end: float
    style: int


@dataclass(frozen=True, slots=True)
class RowChart:
    """Named rows over one axis: bars from its start, or dots around a level."""

    id: str
    title: str
    description: str
    kind: str
    x_label: str
    x_ticks: tuple[Tick, ...]
    rows: tuple[Row, ...]
    level: float | None
    height: float
    width: float = WIDTH
    left: float = 12.0
    right: float = WIDTH - RIGHT
    top: float = TOP

    @property
    def bottom(self) -> float:
        """Where the axis lies."""
        return self.height - BOTTOM


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        kept = min(max(value, self.low), self.high)
        span = (self.high - self.low) or 1.0
        return round(self.start + (kept - self.low) / span * (self.end - self.start), 2)


def lines(
    id: str,
    *,
    title: str,
    description: str,
    labels: tuple[str, str],
    series: Iterable[tuple[str, Points]],
    rules: Iterable[tuple[str, Points]] = (),
    x_range: tuple[float, float],
    y_range: tuple[float, float],
) -> LineChart:
    """Returns a chart of lines.

    Args:
        id: of the SVG on the page.
        title: what it shows.
        description: the same for who cannot see it, with the figures that matter.
        labels: of the x and the y axis.
        series: names and points, in the data's units.
        rules: names and points of levels.
        x_range: of the axis.
        y_range: of the axis.
    """
    x = _Scale(*x_range, LEFT, WIDTH - RIGHT)
    y = _Scale(*y_range, HEIGHT - BOTTOM, TOP)
    return LineChart(
        id=id,
        title=title,
        description=description,
        x_label=labels[0],
        y_label=labels[1],
        x_ticks=tuple(Tick(x(value), text) for value, text in ticks(*x_range)),
        y_ticks=tuple(Tick(y(value), text) for value, text in ticks(*y_range)),
        lines=tuple(
            Line(
                points=_path(points, x, y),
                style=place % SERIES,
                name=name,
                # A single round is a point, which no line shows.
                ends=tuple((x(a), y(b)) for a, b in points if len(points) == 1),
            )
            for place, (name, points) in enumerate(series)
        ),
        rules=tuple(Rule(_path(points, x, y), name) for name, points in rules),
    )


def bars(
    id: str,
    *,
    title: str,
    description: str,
    label: str,
    rows: Sequence[tuple[str, float, str]],
    level: float | None = None,
) -> RowChart:
    """Returns horizontal bars of (name, value, value as text); the first has a style of its own.

    With a `level` they are dots instead, on an axis from 0 to twice that.
    """
    low, high = 0.0, 2 * level if level is not None else _above(max(v for _, v, _ in rows))
    x = _Scale(low, high, 12.0, WIDTH - RIGHT)
    height = TOP + ROW * len(rows) + GAP + BOTTOM
    return RowChart(
        id=id,
        title=title,
        description=description,
        kind="bars" if level is None else "dots",
        x_label=label,
        x_ticks=tuple(Tick(x(value), text) for value, text in ticks(low, high)),
        rows=tuple(
            Row(
                name=name,
                value=text,
                label_y=TOP + ROW * place + LABEL_ROW - 3,
                y=TOP + ROW * place + LABEL_ROW + 3,
                start=x(low) if level is None else x(level),
                end=x(value),
                style=0 if place == 0 else 1,
            )
            for place, (name, value, text) in enumerate(rows)
        ),
        level=None if level is None else x(level),
        height=height,
    )


def ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Returns about five round values of a range, with their text.

    Example:
        >>> [text for _, text in ticks(0, 3.2)]
        ['0', '1', '2', '3']
    """
    rough = (high - low) / 5 or 1.0
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(step * unit for step in _STEPS if step * unit >= rough)
    first, count = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(n * step, f"{n * step:g}") for n in range(first, count + 1)]


def _above(value: float) -> float:
    return value * 1.05 if value > 0 else 1.0


def _path(points: Points, x: _Scale, y: _Scale) -> str:
    return " ".join(f"{x(a):g},{y(b):g}" for a, b in points)
