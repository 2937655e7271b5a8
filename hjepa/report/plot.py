"""From series of numbers to what is drawn: scales, ticks, paths, and labels that do not cover one another.

Everything is in shares of the plot, so that the page can stretch it to any width; text is never part of a drawing and
keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Points = Sequence[tuple[int, float | None]]

HEIGHT = 190  # of a plot, in pixels
LABEL_HEIGHT = 17  # of the text at the end of a line
LABEL_WIDTH, VALUE_WIDTH, LETTER_WIDTH = 148, 54, 7  # of that text at most, of its figure, of a letter
MAX_POINTS = 500  # of a line; more could not be told apart
LOG_RATIO = 40  # from this ratio of the largest to the smallest value on, a scale may be logarithmic


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: stands at its end.
        points: step and value; None is a gap.
        colour: number of its colour.
        reference: whether it is a figure to compare with, drawn as a dashed line.
    """

    name: str
    points: Points
    colour: int = 0
    reference: bool = False


@dataclass(frozen=True)
class Chart:
    """Some curves on the same axes.

    Attributes:
        title: of the figure.
        lines: at least one of them with a point.
        note: what the figure means, in a few words.
        from_zero: the scale begins at zero.
        may_be_log: whether values far apart are shown on a logarithmic scale.
        decimals: of a value; None for four significant digits.
    """

    title: str
    lines: tuple[Line, ...]
    note: str = ""
    from_zero: bool = False
    may_be_log: bool = False
    decimals: int | None = None


@dataclass(frozen=True)
class Scale:
    """Values to shares of an axis, 0 at its beginning."""

    low: float
    high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where a value lies."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, count: int) -> list[float]:
        """About so many round values."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            marks = (1.0,) if len(decades) > 3 else (1.0, 3.0)
            return [m * 10.0**d for d in decades for m in marks if self.low <= m * 10.0**d <= self.high]
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def lay_out(chart: Chart) -> dict[str, Any] | None:
    """All that the page needs to draw a chart, or None where there is not one point.

    Returns:
        `x`, `y`: ticks as (share of the axis from the left or the top, text); `lines`: of each the `path` in a square
        of 1000, its `end` (share from the left and the top), the place of its `label` in shares of the plot's
        height, the text of its last `value`; `data`: what the page reads out at the pointer; in pixels the
        `height` of the plot and the `width` of the labels.
    """
    lines = [line for line in chart.lines if any(value is not None for _, value in line.points)]
    values = [value for line in lines for _, value in line.points if value is not None]
    steps = [step for line in lines for step, value in line.points if value is not None]
    if not values:
        return None
    x, y = Scale(min(0, *steps), max(max(steps), 1)), _value_scale(values, chart)
    height = max(HEIGHT, LABEL_HEIGHT * (len(lines) + 1))
    longest = max(len(line.name) for line in lines)
    ends = min(LABEL_WIDTH, VALUE_WIDTH + LETTER_WIDTH * (longest + (longest > 0)))
    drawn: list[dict[str, Any]] = []
    data = []
    for line in lines:
        points = thin(line.points)
        last_step, last = next((step, value) for step, value in reversed(points) if value is not None)
        drawn.append(
            {
                "name": line.name,
                "colour": line.colour,
                "reference": line.reference,
                "path": _path(points, x, y),
                "end": (x(last_step), 1 - y(last)),
                "value": number(last, chart.decimals),
            }
        )
        data.append({"x": [s for s, _ in points], "y": [None if v is None else _rounded(v) for _, v in points]})
    places = spread([item["end"][1] for item in drawn], LABEL_HEIGHT / height)
    for item, place in zip(drawn, places, strict=True):
        item["label"] = place
    return {
        "title": chart.title,
        "note": chart.note,
        "x": [(x(tick), _step_text(tick)) for tick in x.ticks(4) if tick == round(tick)],
        "y": [(1 - y(tick), text) for tick, text in _named(y.ticks(4), y.log)],
        "log": y.log,
        "lines": drawn,
        "height": height,
        "width": ends,
        "data": {
            "low": x.low,
            "high": x.high,
            "bottom": y.low,
            "top": y.high,
            "log": y.log,
            "decimals": chart.decimals,
            "lines": data,
        },
    }


def thin(points: Points) -> Points:
    """At most `MAX_POINTS` of the points themselves: of each stretch its lowest and its highest, and both ends."""
    if len(points) <= MAX_POINTS:
        return points
    count = (MAX_POINTS - 2) // 2
    kept = {0, len(points) - 1}
    for i in range(count):
        stretch = range(i * len(points) // count, (i + 1) * len(points) // count)
        known = [(value, k) for k in stretch if (value := points[k][1]) is not None]
        kept |= {min(known)[1], max(known)[1]} if known else {stretch[0]}
    return [points[k] for k in sorted(kept)]


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Places in [0, 1] moved apart to at least `gap`, in the same order: down where they touch, then up from the end.

    Args:
        places: where labels would like to be.
        gap: between two of them; `gap * (len(places) - 1)` is at most 1.
    """
    order = sorted(range(len(places)), key=lambda i: (places[i], i))
    moved = list(places)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    limit = 1.0
    for i in reversed(order):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - gap
    return moved


def number(value: float | None, decimals: int | None = None) -> str:
    """A figure with so many decimals, or four significant digits; `-` for none."""
    if value is None:
        return "-"
    if decimals is not None:
        return f"{value:.{decimals}f}"
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(size)))}f}"


def _value_scale(values: Sequence[float], chart: Chart) -> Scale:
    low, high = min(values), max(values)
    if chart.may_be_log and low > 0 and high / low >= LOG_RATIO:
        margin = (high / low) ** 0.04
        return Scale(low / margin, high * margin, log=True)
    if chart.from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-9 * max(abs(high), abs(low), 1e-30):
        pad = abs(high) / 10 or 0.5
        return Scale(0.0 if chart.from_zero and low >= 0 else low - pad, high + pad)
    margin = 0.05 * (high - low)
    return Scale(low if chart.from_zero and low == 0 else low - margin, high + margin)


def _named(ticks: Sequence[float], log: bool) -> Iterator[tuple[float, str]]:
    """Ticks with as many digits as tell them apart."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) if ticks else 1.0
    largest = max((abs(tick) for tick in ticks), default=1.0)
    for tick in ticks:
        if log or largest < 1e-3 or largest >= 1e6:
            yield tick, f"{tick:.3g}".replace("e-0", "e-").replace("e+0", "e")
        else:
            digits = max(0, -math.floor(math.log10(step) + 1e-9))
            digits += round(step * 10**digits, 6) % 1 != 0  # 0.25
            yield tick, f"{tick:.{digits}f}"


def _step_text(step: float) -> str:
    return f"{step / 1000:g}k" if step >= 1000 else f"{step:.0f}"


def _path(points: Points, x: Scale, y: Scale) -> str:
    """SVG path in a square of 1000; a gap begins a new stroke."""
    out, pen = [], "M"
    for step, value in points:
        if value is None:
            pen = "M"
            continue
        out.append(f"{pen}{1000 * x(step):.1f} {1000 * (1 - y(value)):.1f}")
        pen = "L"
    return "".join(out)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
