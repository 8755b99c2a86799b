"""Charts as inline SVG, drawn for a page without scripts: every one also says its values in words or in a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

COLOURS = ("#6b7280", "#b45309", "#2563eb", "#0d9488", "#9333ea", "#db2777", "#65a30d", "#0891b2")
"""Of the settings, in their order; the baseline is grey."""

WIDTH, HEIGHT = 640, 280
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 12, 44


@dataclass(frozen=True, slots=True)
class Series:
    """A named line or row of bars. points: (x, value, low, high)."""

    name: str
    colour: str
    points: tuple[tuple[float, float, float, float], ...]


def lines(series: Sequence[Series], x_title: str, y_title: str, title: str) -> Markup:
    """Lines over prompt length, both axes from zero, with the measured ranges as thin bars."""
    drawn = [s for s in series if s.points]
    if not drawn:
        return Markup("")
    top = _nice(max(high for s in drawn for _, _, _, high in s.points))
    right = max(x for s in drawn for x, _, _, _ in s.points)
    xs = sorted({x for s in drawn for x, _, _, _ in s.points})

    def at(x: float, y: float) -> tuple[float, float]:
        plot = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return LEFT + plot[0] * x / (right * 1.03), TOP + plot[1] * (1 - y / top)

    parts = _axis(top, y_title)
    for x in xs:
        px, py = at(x, 0)
        parts.append(f'<text x="{px:.1f}" y="{py + 16:.1f}" text-anchor="middle">{x:,.0f}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_title)}</text>')
    for s in drawn:
        path = " ".join(f"{'M' if i == 0 else 'L'}{at(p[0], p[1])[0]:.1f} {at(p[0], p[1])[1]:.1f}" for i, p in _n(s))
        parts.append(f'<path d="{path}" fill="none" stroke="{s.colour}" stroke-width="2.2"/>')
        for x, value, low, high in s.points:
            (px, py), (_, y1), (_, y2) = at(x, value), at(x, low), at(x, high)
            parts.append(f'<path d="M{px:.1f} {y1:.1f}V{y2:.1f}" stroke="{s.colour}" opacity=".45"/>')
            parts.append(
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" fill="{s.colour}">'
                f"<title>{escape(s.name)}, {x:,.0f}: {value:.3g}</title></circle>"
            )
    return _svg(parts, HEIGHT, title)


def intervals(rows: Sequence[Series], axis: str, title: str, limit: float | None = None) -> Markup:
    """One horizontal interval a row, about zero, with the limit as a dashed line."""
    drawn = [s for s in rows if s.points]
    if not drawn:
        return Markup("")
    low = min(0.0, *(p[2] for s in drawn for p in s.points))
    high = max(0.0, limit or 0.0, *(p[3] for s in drawn for p in s.points))
    margin, row, left = max((high - low) * 0.08, 0.5), 30, 190
    low, high, height = low - margin, high + margin, 22 + 30 * len(drawn) + 34

    def at(value: float) -> float:
        return left + (WIDTH - left - RIGHT) * (value - low) / (high - low)

    parts = [f'<path d="M{at(0):.1f} 10V{height - 34}" stroke="#9ca3af"/>']
    step = _nice((high - low) / 4)
    ticks = [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    parts += [f'<text x="{at(t):.1f}" y="{height - 20}" text-anchor="middle">{t:+.3g}</text>' for t in ticks if t]
    parts.append(f'<text x="{at(0):.1f}" y="{height - 20}" text-anchor="middle">0</text>')
    parts.append(f'<text x="{(left + WIDTH) / 2}" y="{height - 4}" text-anchor="middle">{escape(axis)}</text>')
    if limit is not None:
        parts.append(
            f'<path d="M{at(limit):.1f} 10V{height - 34}" stroke="#dc2626" stroke-dasharray="4 4"/>'
            f'<text x="{at(limit):.1f}" y="9" text-anchor="middle" fill="#dc2626">allowed</text>'
        )
    for index, s in enumerate(drawn):
        _, value, first, last = s.points[0]
        y = 22 + row * index + row / 2
        parts.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(s.name)}</text>')
        parts.append(f'<path d="M{at(first):.1f} {y}H{at(last):.1f}" stroke="{s.colour}" stroke-width="3"/>')
        parts.append(f'<circle cx="{at(value):.1f}" cy="{y}" r="5" fill="{s.colour}"/>')
    return _svg(parts, height, title)


def bars(rows: Sequence[Series], title: str, unit: str) -> Markup:
    """One horizontal bar a row, from zero, with its value behind it."""
    drawn = [s for s in rows if s.points]
    if not drawn:
        return Markup("")
    top, left, row = max(s.points[0][1] for s in drawn), 190, 28
    parts = []
    for index, s in enumerate(drawn):
        value, y = s.points[0][1], 6 + row * index
        width = (WIDTH - left - 110) * value / top if top else 0
        parts.append(f'<text x="{left - 10}" y="{y + 15}" text-anchor="end">{escape(s.name)}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{width:.1f}" height="20" rx="2" fill="{s.colour}"/>')
        parts.append(f'<text x="{left + width + 8:.1f}" y="{y + 15}">{figure(value)} {escape(unit)}</text>')
    return _svg(parts, 12 + row * len(drawn), title)


def figure(value: float) -> str:
    """A number with three digits or so, and no exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(2 - math.floor(math.log10(abs(value))), 0)}f}"


def _axis(top: float, title: str) -> list[str]:
    parts, steps = [], 5 if f"{top:e}"[0] in "15" or f"{top:e}".startswith("2.5") else 4
    for tick in range(steps + 1):
        value, y = top * tick / steps, TOP + (HEIGHT - TOP - BOTTOM) * (1 - tick / steps)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:,.4g}</text>')
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    turned = f'transform="rotate(-90 14 {middle:.0f})"'
    parts.append(f'<text x="14" y="{middle:.0f}" text-anchor="middle" {turned}>{escape(title)}</text>')
    return parts


def _svg(parts: Sequence[str], height: float, title: str) -> Markup:
    head = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
    return Markup(head + "".join(parts) + "</svg>")


def _n(series: Series) -> enumerate[tuple[float, float, float, float]]:
    return enumerate(series.points)


def _nice(value: float) -> float:
    """The next of 1, 2, 2.5, 4, 5, 8 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 2, 2.5, 4, 5, 8, 10) if power * step >= value * 0.999)
