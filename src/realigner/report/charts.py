"""Small charts as SVG text: sharp at every size, in the colours of the page's theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from realigner.report.page import number, page_filter, templates

MINUS, NONE = "\u2212", "\u2013"  # signs as a printer sets them
_WIDTH, _HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 10, 40


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: what it is.
        x, y: its points; NaN breaks it.
        colour: number of the page's colour; 0 is the grey of baselines.
        dash: number of the dash pattern, 0 for none.
        marked: a ring around the point at this x.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dash: int = 0
    marked: float | None = None


@dataclass(frozen=True)
class Dot:
    """One dot of a row of dots.

    Attributes:
        x: where; NaN leaves it out.
        title: its tooltip.
        colour: as of a `Line`.
        filled: or a ring.
        low, high: the ends of its interval.
        small: one of many.
        down: where in the height of its row, in percent.
    """

    x: float
    title: str
    colour: int = 0
    filled: bool = True
    low: float = math.nan
    high: float = math.nan
    small: bool = False
    down: int = 50


@dataclass(frozen=True)
class Spot:
    """One named point of a scatter chart.

    Attributes:
        label: written beside it.
        x, y: where; NaN leaves it out.
        colour: as of a `Line`.
        title: its tooltip.
        small: one of a trail.
    """

    label: str
    x: float
    y: float
    colour: int = 0
    title: str = ""
    small: bool = False


@dataclass(frozen=True)
class ChartAxis:
    """A horizontal axis, in percent of its width; a logarithmic one has zeros at its left.

    Attributes:
        low, high: the values at its ends.
        log: whether it is logarithmic.
        zeros: whether there are any.
    """

    low: float
    high: float
    log: bool = False
    zeros: bool = False

    @classmethod
    def over(cls, values: Sequence[float], log: bool = False) -> ChartAxis:
        """An axis that all finite values fit on."""
        finite = [value for value in values if math.isfinite(value)]
        there = [value for value in finite if value > 0] if log else finite
        low, high = min(there, default=1.0), max(there, default=1.0)
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - (abs(low) or 1.0), high + (abs(high) or 1.0))
        return cls(low, high, log, log and len(there) < len(finite))

    def at(self, value: float) -> float:
        """Where a value lies."""
        if self.log and value <= 0:
            return 3.0
        start, end = 10.0 if self.zeros else 4.0, 95.0
        low, high, value = (math.log10(part) if self.log else part for part in (self.low, self.high, value))
        return start + (value - low) / (high - low) * (end - start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round numbers on it."""
        if self.log:
            return [*([0.0] if self.zeros else []), *log_ticks(self.low, self.high, most)]
        return ticks(self.low, self.high, most)


def dot_chart(
    rows: Sequence[tuple[str, Sequence[Dot]]],
    axis: ChartAxis,
    x_label: str,
    title: str,
    lines: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Dots over a common axis, a row for each name, as HTML: names wrap, and dots keep their size on every screen.

    Args:
        rows: name and dots.
        axis: see `ChartAxis.over`.
        x_label: with units.
        title: what it shows.
        lines: vertical ones through all rows: value, and colour and dash as ``"c2 d1"``.
    """
    across = [(round(axis.at(value), 2), fmt(value)) for value in axis.ticks()]
    upright = [(at, "grid") for at, _ in across] + [(round(axis.at(value), 2), f"{look} through") for value, look in lines]
    drawn = []
    for label, dots in rows:
        there = [dot for dot in dots if math.isfinite(dot.x)]
        values = [dot.x for dot in there]
        if len(values) > 6:
            said = f"{len(values)} from {fmt(min(values))} to {fmt(max(values))}"
        else:
            said = ", ".join(map(fmt, values)) or "none"
        drawn.append((label, said, there))
    return _markup("dot_chart", title, x_label, drawn, axis, across, upright)


def spans_much(values: Sequence[float]) -> bool:
    """Whether positive values are better seen on a logarithmic axis."""
    there = [value for value in values if math.isfinite(value) and value > 0]
    return bool(there) and max(there) > 20 * min(there)


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    title: str,
    from_zero: bool = False,
    log: bool = False,
    band: tuple[float, float] | None = None,
) -> Markup:
    """Lines over a common axis, as an ``<svg>`` with a title that is read out.

    Args:
        lines: at least one point among them.
        x_label, y_label: with units.
        title: what it shows.
        from_zero: the vertical axis begins at 0.
        log: the vertical axis is logarithmic; what is not positive is left out.
        band: a range of the horizontal axis to shade.
    """
    if log:
        lines = [replace(line, y=[math.log10(y) if y > 0 else math.nan for y in line.y]) for line in lines]
    points = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return Markup()
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_low, x_high, y_low, y_high = min(xs), max(xs), min([0.0, *ys] if from_zero else ys), max(ys)
    x_high = x_high if x_high > x_low else x_low + 1
    room = 0.06 * (y_high - y_low) or abs(y_high) * 0.1 or 1.0
    y_low, y_high = (y_low if from_zero and y_low == 0 else y_low - room), y_high + room

    def across(x: float) -> float:
        return round(_LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT), 1)

    def up(y: float) -> float:
        return round(_HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM), 1)

    paths = []
    for line in lines:
        path, pen, ring = "", "M", None
        for x, y in zip(line.x, line.y, strict=True):
            if math.isfinite(x) and math.isfinite(y):
                path += f"{pen}{across(x)} {up(y)}"
                pen, ring = "L", (across(x), up(y)) if x == line.marked else ring
            else:
                pen = "M"
        paths.append((line, path, ring))
    values = log_ticks(10**y_low, 10**y_high, 5) if log else ticks(y_low, y_high, 5)
    heights = [(up(math.log10(value) if log else value), fmt(value)) for value in values]
    whole = all(x == int(x) for x in xs)  # layers and steps have no halves
    places = [(across(value), fmt(value)) for value in ticks(x_low, x_high, 8) if not whole or value == int(value)]
    edges = _LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM
    shaded = band and tuple(across(min(x_high, max(x_low, end))) for end in band)
    return _markup("line_chart", title, x_label, y_label, (_WIDTH, _HEIGHT), edges, heights, places, paths, shaded)


def scatter_chart(
    spots: Sequence[Spot],
    x_label: str,
    y_label: str,
    title: str,
    trail: Sequence[Spot] = (),
    log: bool = False,
    ends: tuple[float, float] | None = None,
) -> Markup:
    """Named points, as an ``<svg>``: labels keep clear of each other and of the points; empty without a point.

    Args:
        spots: the points.
        x_label, y_label: with units.
        title: what it shows.
        trail: points that a line joins in their order, drawn below the others.
        log: the horizontal axis is logarithmic; what is not positive is left out.
        ends: of the vertical axis, if not those of the points.
    """
    shown = [spot for spot in (*trail, *spots) if math.isfinite(spot.x) and math.isfinite(spot.y) and (spot.x > 0 or not log)]
    if not shown:
        return Markup()
    height, right = 380, 24
    left_to_right = ChartAxis.over([spot.x for spot in shown], log)
    bottom_to_top = ChartAxis(*ends) if ends else ChartAxis.over([spot.y for spot in shown])

    def across(value: float) -> float:
        return round(_LEFT + left_to_right.at(value) / 100 * (_WIDTH - _LEFT - right), 1)

    def up(value: float) -> float:
        return round(height - _BOTTOM - bottom_to_top.at(value) / 100 * (height - _TOP - _BOTTOM), 1)

    points = [(across(spot.x), up(spot.y)) for spot in shown]
    places = label_places(
        [(spot.label, at) for spot, at in zip(shown, points, strict=True)], (_LEFT, _WIDTH, _TOP, height - _BOTTOM)
    )
    drawn = list(zip(shown, points, places, strict=True))
    path = "".join(f"{'L' if number else 'M'}{x} {y}" for number, (spot, (x, y), _) in enumerate(drawn) if spot.small)
    heights = [(up(value), fmt(value)) for value in bottom_to_top.ticks(6)]
    below = [(across(value), fmt(value)) for value in left_to_right.ticks(8)]
    edges = _LEFT, _WIDTH - right, _TOP, height - _BOTTOM
    return _markup("scatter_chart", title, x_label, y_label, (_WIDTH, height), edges, heights, below, drawn, path)


def label_places(
    points: Sequence[tuple[str, tuple[float, float]]], edges: tuple[float, float, float, float]
) -> list[tuple[float, float, str, bool]]:
    """Where each point's label is written: x, y, anchor, and whether a line should join them.

    The nearest of some places beside the point where nothing is yet; the nearest of all if there is none.
    """
    left, right, top, bottom = edges
    taken = [(x - 5, y - 5, x + 5, y + 5) for _, (x, y) in points]
    found: list[tuple[float, float, str, bool]] = []
    for label, (x, y) in points:
        wide = 6.3 * len(label) + 2
        best, least = None, math.inf
        for down in sorted(range(-108, 120, 12), key=abs):
            for anchor, start in (("start", x + 8), ("end", x - 8 - wide)):
                box = (start, y + down - 6, start + wide, y + down + 6)
                outside = box[0] < left or box[2] > right or box[1] < top or box[3] > bottom
                covered = sum(_overlap(box, other) for other in taken) + 1e4 * outside
                if covered < least:
                    best, least = (box, anchor, down), covered
        assert best is not None
        box, anchor, down = best
        taken.append(box)
        found.append((round(x + (8 if anchor == "start" else -8), 1), round(y + down + 4, 1), anchor, abs(down) > 12))
    return found


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """The area that two boxes (left, top, right, bottom) share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def bar_chart(heights: Sequence[float], ends: tuple[float, float], highest: float, colour: int, title: str) -> Markup:
    """A small histogram, one of several on one scale.

    Args:
        heights: of bars of one width, side by side.
        ends: what the axis begins and ends with.
        highest: the top of the axis.
        colour: as of a `Line`.
        title: what it shows.
    """
    left, right, top, bottom = 34, 234, 8, 100
    across, up = (right - left) / max(1, len(heights)), (bottom - top) / (highest or 1.0)
    grid = [(round(bottom - value * up, 1), fmt(value, 2)) for value in (0.0, highest)]
    bars = [
        (round(left + number * across, 1), round(bottom - value * up, 1), round(max(0.6, value * up), 1))
        for number, value in enumerate(heights)
        if value > 0
    ]
    wide = round(max(1.0, across - 1), 1)
    return _markup("bar_chart", title, (left, right), grid, bars, wide, colour, [fmt(end) for end in ends])


def key(lines: Sequence[Line]) -> Markup:
    """The lines' names, each beside a piece of its line."""
    return _markup("key", lines)


def _markup(macro: str, *values: Any) -> Markup:
    """What a macro of charts.html.j2 makes of some values."""
    return Markup(getattr(templates().get_template("charts.html.j2").module, macro)(*values))


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high`, `most` or fewer (about)."""
    raw = (high - low) / max(1, most)
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round((first + n) * step, 12) for n in range(math.floor(high / step + 1e-9) - first + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high` on a logarithmic axis, `most` or fewer (about): 1, 2, 5, 10, ... or powers of ten."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        found = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(found) <= most:
            break
    return found[:: max(1, math.ceil(len(found) / most))] or [low, high]


@page_filter
def fmt(value: Any, digits: int = 3, zeros: bool = False) -> str:
    """A number in few characters: 0.0123, 1.2e-5, 1,512; with `zeros`, also 0.150, to stand under each other."""
    value = number(value)
    if not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}".replace("-", MINUS)
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    text = f"{value:,.{decimals}f}"
    return (text.rstrip("0").rstrip(".") if "." in text and not zeros else text).replace("-", MINUS)
