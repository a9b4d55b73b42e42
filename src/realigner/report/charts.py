"""Small charts as SVG text: sharp at every size, in the colours of the page's theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup, escape

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
    across = [(axis.at(value), value) for value in axis.ticks()]
    upright = [(at, "grid") for at, _ in across] + [(axis.at(value), f"{look} through") for value, look in lines]
    grid = "".join(f'<line class="{look}" x1="{at:.2f}%" x2="{at:.2f}%" y1="0" y2="100%"/>' for at, look in upright)
    parts = [f'<div class="dots" role="group" aria-label="{escape(title)}">']
    for label, dots in rows:
        there = [dot for dot in dots if math.isfinite(dot.x)]
        label_text = f"{escape(label)}: {_values_text([dot.x for dot in there])}"
        marks = "".join(_dot(dot, axis) for dot in there)
        drawn = f'<svg role="img"><title>{label_text}</title>{grid}{marks}</svg>'
        parts.append(f'<div class="dot-row"><span>{escape(label)}</span>{drawn}</div>')
    numbers = "".join(
        f'<text class="tick" x="{at:.2f}%" y="12" text-anchor="middle">{fmt(value)}</text>' for at, value in across
    )
    parts.append(f'<div class="dot-row dot-axis"><span></span><svg aria-hidden="true">{numbers}</svg></div>')
    parts.append(f'<div class="dot-row dot-name"><span></span><span>{escape(x_label)}</span></div>')
    return Markup("".join(parts) + "</div>")


def _dot(dot: Dot, axis: ChartAxis) -> str:
    interval = ""
    if math.isfinite(dot.low) and math.isfinite(dot.high):
        ends = f'x1="{axis.at(dot.low):.2f}%" x2="{axis.at(dot.high):.2f}%"'
        interval = f'<line class="c{dot.colour} interval" {ends} y1="{dot.down}%" y2="{dot.down}%"/>'
    look = f"c{dot.colour}{f' f{dot.colour}' if dot.filled else ' ring'}{' many' if dot.small else ''}"
    circle = f'<circle class="{look}" cx="{axis.at(dot.x):.2f}%" cy="{dot.down}%" r="{3 if dot.small else 5}">'
    return f"{interval}{circle}<title>{escape(dot.title)}</title></circle>"


def _values_text(values: Sequence[float]) -> str:
    """A few values, or their number and range."""
    if len(values) > 6:
        return f"{len(values)} from {fmt(min(values))} to {fmt(max(values))}"
    return ", ".join(map(fmt, values)) or "none"


def spans_much(values: Sequence[float]) -> bool:
    """Whether positive values are better seen on a logarithmic axis."""
    there = [value for value in values if math.isfinite(value) and value > 0]
    return bool(there) and max(there) > 20 * min(there)


def line_chart(
    lines: Sequence[Line], x_label: str, y_label: str, title: str, from_zero: bool = False, log: bool = False
) -> Markup:
    """Lines over a common axis, as an ``<svg>`` with a title that is read out.

    Args:
        lines: at least one point among them.
        x_label, y_label: with units.
        title: what it shows.
        from_zero: the vertical axis begins at 0.
        log: the vertical axis is logarithmic; what is not positive is left out.
    """
    if log:
        lines = [replace(line, y=[math.log10(y) if y > 0 else math.nan for y in line.y]) for line in lines]
    points = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return Markup()
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = (min(0.0, *ys) if from_zero else min(ys)), max(ys)
    x_high = x_high if x_high > x_low else x_low + 1
    room = 0.06 * (y_high - y_low) or abs(y_high) * 0.1 or 1.0
    y_low, y_high = (y_low if from_zero and y_low == 0 else y_low - room), y_high + room

    def across(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def up(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg class="chart" role="img" viewBox="0 0 {_WIDTH} {_HEIGHT}"><title>{escape(title)}</title>']
    for value in log_ticks(10**y_low, 10**y_high, 5) if log else ticks(y_low, y_high, 5):
        at = up(math.log10(value) if log else value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{fmt(value)}</text>')
    whole = all(x == int(x) for x in xs)  # layers and steps have no halves
    for value in [tick for tick in ticks(x_low, x_high, 8) if not whole or tick == int(tick)]:
        at, base = across(value), _HEIGHT - _BOTTOM
        parts.append(f'<text class="tick" x="{at:.1f}" y="{base + 16}" text-anchor="middle">{fmt(value)}</text>')
    middle, half = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(f'<text class="name" x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text class="name" x="12" y="{half}" text-anchor="middle" transform="rotate(-90 12 {half})">{escape(y_label)}</text>'
    )
    for line in lines:
        parts.append(_path(line, across, up))
    return Markup("".join(parts) + "</svg>")


def _path(line: Line, across: Callable[[float], float], up: Callable[[float], float]) -> str:
    steps, down, ring = list[str](), False, ""
    for x, y in zip(line.x, line.y, strict=True):
        if math.isfinite(x) and math.isfinite(y):
            steps.append(f"{'L' if down else 'M'}{across(x):.1f} {up(y):.1f}")
            down = True
            if x == line.marked:
                ring = f'<circle class="c{line.colour}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="5"/>'
        else:
            down = False
    style = f"c{line.colour} d{line.dash}"
    path = f'<path class="{style}" d="{"".join(steps)}"><title>{escape(line.label)}</title></path>' if steps else ""
    return path + ring


def bar_chart(heights: Sequence[float], ends: tuple[float, float], highest: float, colour: int, title: str) -> Markup:
    """A small histogram, one of several on one scale.

    Args:
        heights: of bars of one width, side by side.
        ends: what the axis begins and ends with.
        highest: the top of the axis.
        colour: as of a `Line`.
        title: what it shows.
    """
    width, height, left, right, bottom, top = 240, 120, 34, 6, 20, 8
    across, up = (width - left - right) / max(1, len(heights)), (height - top - bottom) / (highest or 1.0)
    parts = [f'<svg class="chart" role="img" viewBox="0 0 {width} {height}"><title>{escape(title)}</title>']
    for value in (0.0, highest):
        at = height - bottom - value * up
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 4}" y="{at + 4:.1f}" text-anchor="end">{fmt(value, 2)}</text>')
    for number, value in enumerate(heights):
        if value > 0:
            box = f'x="{left + number * across:.1f}" y="{height - bottom - value * up:.1f}"'
            parts.append(
                f'<rect class="f{colour}" {box} width="{max(1.0, across - 1):.1f}" height="{max(0.6, value * up):.1f}"/>'
            )
    for value, x, anchor in ((ends[0], left, "start"), (ends[1], width - right, "end")):
        parts.append(f'<text class="tick" x="{x}" y="{height - 5}" text-anchor="{anchor}">{fmt(value)}</text>')
    return Markup("".join(parts) + "</svg>")


def key(lines: Sequence[Line]) -> Markup:
    """The lines' names, each beside a piece of its line."""
    items = [
        f'<li><svg viewBox="0 0 28 10" aria-hidden="true"><path class="c{line.colour} d{line.dash}" d="M1 5H27"/></svg>'
        f"{escape(line.label)}</li>"
        for line in lines
    ]
    return Markup(f'<ul class="key">{"".join(items)}</ul>')


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


def fmt(value: float, digits: int = 3, zeros: bool = False) -> str:
    """A number in few characters: 0.0123, 1.2e-5, 1,512; with `zeros`, also 0.150, to stand under each other."""
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
