"""Curves as an SVG image, written by hand so that no plotting library is needed. Pure: from points to text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from runner.reports.curves import LOG_SCALE_FACTOR

_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#db2777", "#65a30d")
_PLOT_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 546, 420, 64, 40, 44
_LETTER_WIDTH = 7.0
"""Upper estimate in pixels of a letter of the legend."""

Curve = tuple[str, Sequence[tuple[float, float]]]
"""Name and points (x, y), finite, x rising."""


def plot(title: str, series: Sequence[Curve], rungs: Sequence[int] = ()) -> str:
    """Return an SVG image of validation losses by step, with axes and a legend; series without points are left out.

    The axis of losses is logarithmic where they span a large factor. `rungs` are steps that have a dashed line.
    """
    drawn = [(name, points) for name, points in series if points]
    width = _LEFT + _PLOT_WIDTH + 60 + int(_LETTER_WIDTH * max([len(name) for name, _ in drawn], default=0))
    xs = [x for _, points in drawn for x, _ in points] or [0.0, 1.0]
    ys = [y for _, points in drawn for _, y in points] or [0.0, 1.0]
    is_log = min(ys) > 0 and max(ys) >= LOG_SCALE_FACTOR * min(ys)
    x_min, x_max, y_min, y_max = min(xs), max(xs), *(math.log10(y) if is_log else y for y in (min(ys), max(ys)))
    x_max, y_max = (x_max if x_max > x_min else x_min + 1), (y_max if y_max > y_min else y_min + 1)
    margin = 0.04 * (y_max - y_min)
    y_min, y_max = y_min - margin, y_max + margin
    right, bottom = _LEFT + _PLOT_WIDTH, _HEIGHT - _BOTTOM

    def pixel(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - x_min) / (x_max - x_min) * _PLOT_WIDTH
        y = math.log10(y) if is_log else y
        return across, _TOP + (y_max - y) / (y_max - y_min) * (bottom - _TOP)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="24" font-size="15" fill="#111">{escape(title)}</text>',
    ]
    for tick in log_ticks(y_min, y_max) if is_log else ticks(y_min, y_max):
        _, y = pixel(x_min, tick)
        out.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#e5e7eb"/>')
        out.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{tick:g}</text>')
    for tick in ticks(x_min, x_max):
        x, _ = pixel(tick, ys[0])
        out.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle" fill="#555">{tick:g}</text>')
    out.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle" fill="#111">step</text>')
    middle = (_TOP + bottom) / 2
    rotated = f'text-anchor="middle" fill="#111" transform="rotate(-90 16 {middle})"'
    out.append(f'<text x="16" y="{middle}" {rotated}>valid loss</text>')
    for rung in (rung for rung in rungs if x_min <= rung <= x_max):
        x, _ = pixel(rung, ys[0])
        line = f'<line x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{bottom}" stroke="#555" stroke-dasharray="3 3"/>'
        out.append(f'{line}<text x="{x + 4:.1f}" y="{_TOP + 10}" fill="#555">rung {rung}</text>')
    for i, (name, points) in enumerate(drawn):
        colour, dash = _COLOURS[i % len(_COLOURS)], ' stroke-dasharray="5 3"' if i >= len(_COLOURS) else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (pixel(*point) for point in points))
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        x, y = pixel(*points[-1])
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        row = _TOP + 8 + 20 * i
        if row < bottom:
            out.append(
                f'<line x1="{right + 14}" y1="{row}" x2="{right + 36}" y2="{row}" stroke="{colour}"{dash} '
                'stroke-width="2"/>'
            )
            out.append(f'<text x="{right + 42}" y="{row + 4}" fill="#111">{escape(name)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten from 10 ** low to 10 ** high; of many powers, these alone."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    numbers = [factor * 10.0**power for power in powers for factor in ((1, 2, 5) if high - low < 4 else (1,))]
    return [number for number in numbers if low <= math.log10(number) <= high]


def ticks(low: float, high: float) -> list[float]:
    """Return about six round numbers from `low` to `high`, in steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]
