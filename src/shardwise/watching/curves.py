"""Curves as SVG: axes, lines, bands and stacked areas of columns of numbers. Texts of numbers; no files, no pages.

Long columns are drawn as POINTS stretches: of each the mean, and the least and most as a band around it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 62, 20, 10, 30
POINTS = 600
_SMALLEST = 1e-300  # of what an axis divides: below it no power of ten is left

Form = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """A curve. values: one for each step, nan for none. kind: of its colour, a class of the page. dashed: how it is drawn."""

    name: str
    values: Sequence[float]
    kind: str
    dashed: bool = False
    band: bool = False


@dataclass(frozen=True)
class Stretch:
    """Neighbouring values: the mean step, and of those that are finite the mean, least and most (nan without any)."""

    step: float
    mean: float
    least: float
    most: float


def stretches(steps: Sequence[float], values: Sequence[float], points: int = POINTS) -> list[Stretch]:
    """At most `points` of them, in order; a value each where there are no more."""
    count = len(steps)
    bounds = [round(i * count / min(count, points)) for i in range(min(count, points) + 1)]
    found = []
    for begin, end in itertools.pairwise(bounds):
        finite = [value for value in values[begin:end] if math.isfinite(value)] or [math.nan]
        step = sum(steps[begin:end]) / (end - begin)
        found.append(Stretch(step, sum(finite) / len(finite), min(finite), max(finite)))
    return found


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`: 1, 2 or 5 times a power of ten apart."""
    if not high - low > _SMALLEST:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


class Scale:
    """From numbers to places in a drawing: steps to the right, values upwards."""

    def __init__(self, steps: Sequence[float], low: float, high: float) -> None:
        self.first, self.last = steps[0], steps[-1]
        if not high - low > _SMALLEST:  # a column of one number lies in the middle
            margin = abs(high) * 0.5 if abs(high) > _SMALLEST else 1.0
            low, high = low - margin, high + margin
        self.low, self.high = low, high

    def x(self, step: float) -> float:
        span = self.last - self.first
        share = (step - self.first) / span if span else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - BOTTOM - TOP)

    def point(self, step: float, value: float) -> str:
        return f"{self.x(step):.1f},{self.y(value):.1f}"


def line_chart(
    steps: Sequence[float],
    series: Sequence[Series],
    form: Form,
    *,
    marks: Sequence[float] = (),
    from_zero: bool = False,
) -> str:
    """An SVG of curves over steps. form: of the numbers at the axis. marks: steps with an upright line.

    from_zero: the axis begins there in any case.
    """
    drawn = [(one, stretches(steps, one.values)) for one in series]
    ends = [end for one, row in drawn for part in row for end in _ends(one, part) if math.isfinite(end)]
    if not ends:
        return ""
    low, high = min(ends), max(ends)
    if low > 0 and (from_zero or low < 0.6 * high):  # nearly down to it anyway
        low = 0.0
    scale = Scale(steps, low, high + (high - low) * 0.03)
    body = [_axes(scale, form), *(_mark(scale, step) for step in marks)]
    for one, row in drawn:
        if one.band and len(steps) > POINTS:
            body += [_area(scale, run, one.kind) for run in _runs(row, len(row))]
        body += [_line(scale, run, one) for run in _runs(row, len(row))]
    return _svg(body)


def stacked_chart(steps: Sequence[float], series: Sequence[Series], form: Form, *, marks: Sequence[float] = ()) -> str:
    """An SVG of areas on top of each other: the first one lowest. Values are zero or more; nan counts as zero."""
    rows = [stretches(steps, [value if math.isfinite(value) else 0.0 for value in one.values]) for one in series]
    floor = [0.0] * len(rows[0])
    layers = []
    for one, row in zip(series, rows, strict=True):
        roof = [below + part.mean for below, part in zip(floor, row, strict=True)]
        layers.append((one, floor, roof))
        floor = roof
    # One long step, such as the first, shall not flatten all others.
    top = sorted(floor)[min(len(floor) - 1, int(0.99 * len(floor)))] * 1.1 or 1.0
    scale = Scale(steps, 0.0, top)
    places = [part.step for part in rows[0]]
    if len(places) == 1:
        places, layers = [steps[0] - 0.5, steps[0] + 0.5], [(one, low * 2, high * 2) for one, low, high in layers]
        scale = Scale(places, 0.0, top)
    body = []
    for one, low, high in layers:
        upper = [scale.point(step, min(value, top)) for step, value in zip(places, high, strict=True)]
        lower = [scale.point(step, min(value, top)) for step, value in zip(places, low, strict=True)]
        body.append(f'<polygon class="fill {one.kind}" points="{" ".join(upper + lower[::-1])}"/>')
    return _svg([*body, _axes(scale, form), *(_mark(scale, step) for step in marks)])


def _ends(one: Series, part: Stretch) -> tuple[float, ...]:
    return (part.least, part.most) if one.band else (part.mean,)


def _runs(row: Sequence[Stretch], count: int) -> list[list[Stretch]]:
    """Neighbours with numbers: a gap divides a curve."""
    found: list[list[Stretch]] = [[]]
    for part in row[:count]:
        if math.isfinite(part.mean):
            found[-1].append(part)
        elif found[-1]:
            found.append([])
    return [run for run in found if run]


def _line(scale: Scale, run: Sequence[Stretch], one: Series) -> str:
    if len(run) == 1:
        return (
            f'<circle class="dot {one.kind}" cx="{scale.x(run[0].step):.1f}" cy="{scale.y(run[0].mean):.1f}" r="2.5"/>'
        )
    dash = ' stroke-dasharray="5 4"' if one.dashed else ""
    points = " ".join(scale.point(part.step, part.mean) for part in run)
    return f'<polyline class="line {one.kind}"{dash} points="{points}"/>'


def _area(scale: Scale, run: Sequence[Stretch], kind: str) -> str:
    upper = [scale.point(part.step, part.most) for part in run]
    lower = [scale.point(part.step, part.least) for part in run]
    return f'<polygon class="band {kind}" points="{" ".join(upper + lower[::-1])}"/>'


def _axes(scale: Scale, form: Form) -> str:
    parts = []
    for value in ticks(scale.low, scale.high):
        y = scale.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{escape(form(value))}</text>')
    for step in ticks(scale.first, scale.last, 6):
        if step == int(step):
            x = scale.x(step)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{int(step)}</text>')
    y = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
    return "".join(parts)


def _mark(scale: Scale, step: float) -> str:
    x = scale.x(step)
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"><title>resumed</title></line>'
    )


def _svg(body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(body)}'
        f'<line class="pointer" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
    )
