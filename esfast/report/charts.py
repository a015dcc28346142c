"""Charts as SVG text: lines with bands, a map of histograms, bars of shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .text import escaped

WIDTH, HEIGHT = 480, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 38
COLOURS = ("#2563a8", "#c2571a", "#2f7d4f", "#8c3f8f", "#a3202c", "#5b6470", "#7a6a12", "#1a8a91", "#c04a86", "#333a8f")
Point = tuple[float, float]


@dataclass
class Line:
    """A line through points, with a band (low, high) at the same places, dots where there are few."""

    label: str
    points: Sequence[Point]
    colour: str
    band: Sequence[tuple[float, float, float]] = ()  # x, low, high
    thin: bool = False


def lines(title: str, x_label: str, drawn: Sequence[Line]) -> str:
    """A chart of lines over common axes, through their finite points; nothing if there is none."""
    drawn = [replace(line, points=_finite(line.points), band=_finite(line.band)) for line in drawn]
    points, bands = [p for line in drawn for p in line.points], [b for line in drawn for b in line.band]
    if not points:
        return ""
    xs = _range([p[0] for p in points])
    ys = _range([p[1] for p in points] + [y for b in bands for y in b[1:]], pad=0.05)
    place = _Scale(xs, ys)
    body = [_axes(place, x_label)]
    for line in drawn:
        if len(line.band) > 1:
            up = [place(x, high) for x, _, high in line.band]
            down = [place(x, low) for x, low, _ in reversed(line.band)]
            body.append(f'<polygon points="{_join(up + down)}" fill="{line.colour}" fill-opacity=".17"/>')
        placed = [place(*p) for p in line.points]
        width = 1 if line.thin else 2.2
        opacity = ' stroke-opacity=".4"' if line.thin else ""
        body.append(
            f'<polyline points="{_join(placed)}" fill="none" stroke="{line.colour}" stroke-width="{width}"{opacity}/>'
        )
        if len(placed) <= 40 and not line.thin:
            body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{line.colour}"/>' for x, y in placed]
    labels = [(line.label, line.colour) for line in drawn if line.label]
    return _figure(title, "".join(body), labels)


def histograms(title: str, x_label: str, rewards: Sequence[Sequence[float]], colour: str) -> str:
    """A map of the distribution of each generation's numbers. A column is a generation (or a few together); a cell is
    the darker the more of the numbers lie in it. Empty without numbers."""
    everything = [r for generation in rewards for r in generation if math.isfinite(r)]
    if not everything:
        return ""
    low, high = _range(everything)
    columns, cells = min(len(rewards), 60), 24
    place = _Scale((0.5, len(rewards) + 0.5), (low, high))
    body = []
    for column in range(columns):
        start, end = column * len(rewards) // columns, (column + 1) * len(rewards) // columns
        values = [r for generation in rewards[start:end] for r in generation if math.isfinite(r)]
        counts = [0] * cells
        for r in values:
            counts[min(cells - 1, int((r - low) / (high - low) * cells))] += 1
        for cell, count in enumerate(counts):
            if count:
                x0, y1 = place(start + 0.5, low + (high - low) * cell / cells)
                x1, y0 = place(end + 0.5, low + (high - low) * (cell + 1) / cells)
                share = count / len(values)
                body.append(
                    f'<rect x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0 + 0.3:.1f}" height="{y1 - y0 + 0.3:.1f}" '
                    f'fill="{colour}" fill-opacity="{min(1.0, 0.12 + 1.8 * share):.2f}"/>'
                )
    return _figure(title, "".join(body) + _axes(place, x_label), [])


def shares(title: str, bars: Sequence[tuple[str, dict[str, float]]]) -> str:
    """A stacked bar for each (label, seconds by phase) with seconds; empty if there are none."""
    bars = [(label, {k: v for k, v in parts.items() if v > 0}) for label, parts in bars]
    bars = [(label, parts) for label, parts in bars if parts]
    if not bars:
        return ""
    phases = sorted({k for _, parts in bars for k in parts}, key=lambda k: -sum(p.get(k, 0) for _, p in bars))
    colours = {phase: COLOURS[i % len(COLOURS)] for i, phase in enumerate(phases)}
    row, body = 46, []
    for i, (label, parts) in enumerate(bars):
        total, x = sum(parts.values()), 8.0
        body.append(f'<text x="8" y="{i * row + 15}">{escaped(_short(label))}: {_seconds(total)}</text>')
        for phase in phases:
            width = (WIDTH - 16) * parts.get(phase, 0) / total
            body.append(
                f'<rect x="{x:.1f}" y="{i * row + 21}" width="{width:.1f}" height="17" fill="{colours[phase]}">'
                f"<title>{escaped(phase)}: {_seconds(parts.get(phase, 0))}</title></rect>"
            )
            x += width
    everything = sum(sum(p.values()) for _, p in bars)
    labels = [(f"{k} {sum(p.get(k, 0) for _, p in bars) / everything:.1%}", colours[k]) for k in phases]
    return _figure(title, "".join(body), labels, height=row * len(bars))


class _Scale:
    def __init__(self, xs: Point, ys: Point):
        self.xs, self.ys = xs, ys

    def __call__(self, x: float, y: float) -> Point:
        (x0, x1), (y0, y1) = self.xs, self.ys
        return (
            LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM),
        )


def _axes(place: _Scale, x_label: str) -> str:
    parts = []
    for y in _ticks(*place.ys):
        at = place(place.xs[0], y)[1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4.5:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in _ticks(*place.xs):
        at = place(x, place.ys[0])[0]
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{x:.4g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escaped(x_label)}</text>')
    return "".join(parts)


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within the range."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= next((m for m in (1, 2, 5) if (high - low) / (m * step) <= about), 10)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _range(values: Sequence[float], pad: float = 0.0) -> Point:
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        half = abs(low) / 2 or 0.5
        return low - half, high + half
    return low - pad * (high - low), high + pad * (high - low)


def _figure(title: str, body: str, labels: Sequence[tuple[str, str]], height: int = HEIGHT) -> str:
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{escaped(_short(label))}</span>' for label, colour in labels
    )
    return (
        f'<figure><figcaption>{escaped(title)}</figcaption><svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escaped(title)}">{body}</svg><div class="legend">{legend}</div></figure>'
    )


def _finite(rows: Sequence[tuple[float, ...]]) -> list[tuple[Any, ...]]:
    return [row for row in rows if all(map(math.isfinite, row))]


def _join(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 60:.1f} min"


def _short(label: str) -> str:
    return label if len(label) <= 44 else f"...{label[-41:]}"
