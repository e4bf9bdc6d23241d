"""Charts as plain SVG and HTML: this file works out where everything lies, `charts.html.j2` writes it down.

Places are per cents of the plane, from its left and its top, and paths count in thousandths. So a chart is as wide as
the page, while its texts and lines keep their size; it needs no script, and follows the reader's theme by CSS alone.

Colours tell series apart for colour-blind readers on light and on dark ground alike, and never alone: dashes and marks
differ too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "blue", "orange", "green", "purple", "red", "grey"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)
DASHES = ("solid", "dash", "dot", "dashdot")
SHAPES = {
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "square": "M-3.5-3.5h7v7h-7z",
    "diamond": "M0-5l5 5l-5 5l-5-5z",
    "triangle": "M0-5l5 9h-10z",
    "cross": "M-5-3l2-2l3 3l3-3l2 2l-3 3l3 3l-2 2l-3-3l-3 3l-2-2l3-3z",
    "dot": "M-2.5 0a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0-5 0z",
}
"""Marks around their middle, in pixels."""
MARKS = ("circle", "square", "diamond", "triangle")


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One direction of a plane."""

    title: str
    """With the unit."""
    low: float = 0.0
    high: float
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """How far the value lies from the low end, 0 .. 1; what is beyond an end is at it."""
        value = min(max(value, self.low), self.high)
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 8) -> list[tuple[float, str]]:
        """About so many places in per cent of the way, with their labels."""
        values = (_decades if self.logarithmic else _even_steps)(self.low, self.high, most)
        return [(_per_cent(self.share(value)), f"{value:.10g}") for value in values]


def from_zero(title: str, values: Iterable[float], *, margin: float = 0.05) -> Axis:
    """From 0 to a little more than the greatest value."""
    return Axis(title=title, high=max(values, default=0.0) * (1 + margin) or 1.0)


def logarithmic(title: str, values: Iterable[float]) -> Axis:
    """Around all values above 0, with room for a mark beyond each end."""
    found = [value for value in values if value > 0] or [1.0]
    least, greatest = min(found), max(found)
    margin = max((greatest / least) ** 0.04, 1.1)
    return Axis(title=title, low=least / margin, high=greatest * margin, logarithmic=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One entry of the legend."""

    name: str
    colour: str
    dash: str = ""
    """Empty for marks without a line."""
    shape: str = ""
    """Empty for a line without marks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A line through the plane."""

    colour: str
    dash: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One point with what a pointer is told of it."""

    left: float
    top: float
    colour: str
    shape: str
    says: str
    bar: tuple[float, float] | None = None
    """Of its confidence interval, from top to top."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stripe:
    """A part of the plane from its top to its bottom; without width it is a line."""

    left: float
    width: float = 0.0
    colour: str
    says: str = ""


@dataclass(slots=True, kw_only=True)
class Chart:
    """One plane and what is drawn on it."""

    x: Axis
    y: Axis
    height: int
    """Of the plane, in pixels."""
    with_x: bool = True
    """Whether the horizontal axis has its ticks and title, which of several charts below each other the last has."""
    keys: list[Key] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    bands: list[Stripe] = field(default_factory=list)
    lines: list[Stripe] = field(default_factory=list)
    """Their words stand above the plane, each in a line of its own."""
    columns: list[Stripe] = field(default_factory=list)
    """Unseen, for a pointer."""

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """As many as leave room for their labels."""
        return self.y.ticks(min(round(self.height / 28), 8))

    def line(self, points: Sequence[tuple[float, float]], colour: str, dash: str) -> None:
        """Straight from point to point."""
        path = "L".join(f"{self._x(x)} {self._y(y)}" for x, y in points)
        self.curves.append(Curve(colour=colour, dash=dash, path=f"M{path}"))

    def staircase(self, points: Sequence[tuple[float, float]], colour: str, dash: str) -> None:
        """Up from 0 at each point, and on to the right at that height, to the plane's edge."""
        path, last = [f"M{self._x(points[0][0])} 1000"], (self._x(points[0][0]), 1000)
        for x, y in points:
            place = (self._x(x), self._y(y))
            if place[1] != last[1]:
                path += [f"H{place[0]}"] * (place[0] != last[0]) + [f"V{place[1]}"]
                last = place
        self.curves.append(Curve(colour=colour, dash=dash, path="".join([*path, "H1000"])))

    def levels(self, edges: Sequence[float], values: Sequence[float | None], colour: str) -> None:
        """Each value level between two edges; None is a gap."""
        path, drawn = [], False
        for (left, right), value in zip(pairwise(edges), values, strict=True):
            if value is not None:
                path.append(f"V{self._y(value)}" if drawn else f"M{self._x(left)} {self._y(value)}")
                path.append(f"H{self._x(right)}")
            drawn = value is not None
        self.curves.append(Curve(colour=colour, dash="solid", path="".join(path)))

    def mark(
        self,
        x: float,
        y: float,
        colour: str,
        shape: str,
        says: str,
        interval: tuple[float, float] | None = None,
    ) -> None:
        """One point, with its confidence interval where that is known."""
        bar = None if interval is None else (self._top(interval[0]), self._top(interval[1]))
        left = _per_cent(self.x.share(x))
        self.marks.append(Mark(left=left, top=self._top(y), colour=colour, shape=shape, says=says, bar=bar))

    def band(self, left: float, right: float, colour: str) -> None:
        """From one value of the horizontal axis to another; nothing where that is nothing."""
        if right > left:
            self.bands.append(self._stripe(left, right, colour))

    def upright(self, x: float, colour: str, says: str = "") -> None:
        """A line from top to bottom."""
        self.lines.append(Stripe(left=_per_cent(self.x.share(x)), colour=colour, says=says))

    def column(self, left: float, right: float, says: str) -> None:
        """Tells a pointer what is there."""
        self.columns.append(self._stripe(left, right, "none", says))

    def _stripe(self, left: float, right: float, colour: str, says: str = "") -> Stripe:
        start, end = _per_cent(self.x.share(left)), _per_cent(self.x.share(right))
        return Stripe(left=start, width=round(end - start, 2), colour=colour, says=says)

    def _top(self, value: float) -> float:
        return _per_cent(1 - self.y.share(value))

    def _x(self, value: float) -> int:
        return round(self.x.share(value) * 1000)

    def _y(self, value: float) -> int:
        return round((1 - self.y.share(value)) * 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One value as a length."""

    name: str
    share: float
    """Of the whole width, in per cent."""
    colour: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """Values below each other, or end to end."""

    bars: tuple[Bar, ...]
    end_to_end: bool = False


def bars(values: Sequence[tuple[str, float, str, str]], whole: float | None = None) -> Bars:
    """From names, values, texts and colours; the greatest value, or `whole`, takes the whole width."""
    greatest = whole or max((value for _, value, _, _ in values), default=0.0) or 1.0
    return Bars(
        bars=tuple(
            Bar(name=name, share=_per_cent(value / greatest), text=text, colour=colour)
            for name, value, text, colour in values
        )
    )


def _per_cent(share: float) -> float:
    return round(share * 100, 2)


def _even_steps(low: float, high: float, most: int) -> list[float]:
    """
    >>> _even_steps(0, 24, 5)
    [0.0, 5.0, 10.0, 15.0, 20.0]
    """
    rough = (high - low) / most
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= rough)
    return [round(number * step, 12) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _decades(low: float, high: float, most: int) -> list[float]:
    """
    >>> _decades(40, 2500, 8), _decades(0.5, 20000, 8), _decades(21, 45, 5)
    ([50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0], [1.0, 10.0, 100.0, 1000.0, 10000.0], [25.0, 30.0, 35.0, 40.0, 45.0])
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) * 3 <= most + 1 else (1,)
    every = (factor * 10.0**power for power in powers for factor in factors)
    found = [value for value in every if low <= value <= high]
    return found if len(found) > 1 else _even_steps(low, high, most)
