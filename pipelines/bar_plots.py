"""Bars and intervals as inline SVG, for pages of what was measured."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

COLOURS = ("#1d4ed8", "#b45309", "#047857", "#6b7280")
WIDTH, HEIGHT = 620, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 44, 46
ROW_HEIGHT, NAMES_WIDTH = 28, 270
MOST_LABELS = 12
STEPS = 4
NICE_STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.25)  # of shares, from one line to the next
LETTER = 7.6  # pixels that a letter of a legend takes, at most but for W and M
STYLE = "font-family: system-ui, sans-serif; font-size: 12px; fill: #111827"


def histogram_svg(title: str, axis: str, series: Mapping[str, Mapping[str, Any]]) -> str:
    """Shares of values in the bins of one or more histograms with the same edges, side by side.

    Args:
        series: name → `Histogram.to_json`. Bins that are empty in all of them at either end are left out.
    """
    shares = [one["shares"] for one in series.values()]
    edges, open_ended = next(iter(series.values()))["edges"], next(iter(series.values()))["open_ended"]
    filled = [number for number in range(len(shares[0])) if any(one[number] for one in shares)]
    first, last = min(filled), max(filled)
    step = next(step for step in NICE_STEPS if STEPS * step >= max(max(one) for one in shares))
    top = STEPS * step
    slot = (WIDTH - LEFT - RIGHT) / (last - first + 1)
    parts = _frame(title, axis, step)
    apart = max(map(len, series)) * LETTER + 30
    for place, colour, (name, one) in zip(range(len(series)), COLOURS, series.items(), strict=False):
        parts.append(_legend(name, colour, LEFT + apart * place))
        for number in range(first, last + 1):
            share = one["shares"][number]
            high = share / top * (HEIGHT - TOP - BOTTOM)
            across = LEFT + (number - first) * slot + place * slot * 0.9 / len(series)
            words = f"{name}, {_bin(edges, number, open_ended)}: {share:.2%}"
            parts.append(
                f'<rect x="{across:.1f}" y="{HEIGHT - BOTTOM - high:.1f}" width="{slot * 0.9 / len(series):.1f}" '
                f'height="{high:.1f}" fill="{colour}"><title>{escape(words)}</title></rect>'
            )
    every = 1
    while last - first + 1 > MOST_LABELS * every:
        every *= 2  # of edges from -1 to 1, these are round ones
    for number in range(first + -first % every, last + 1, every):
        parts.append(_text(LEFT + (number - first) * slot, HEIGHT - BOTTOM + 16, f"{edges[number]:g}", "middle"))
    return "\n".join([*parts, "</svg>"])


def intervals_svg(title: str, rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Estimates with their confidence intervals, one under the other, on an axis from 0 to 1 at least.

    Args:
        rows: name and `Interval.to_json`.
    """
    most = max(1.0, *(interval["high"] for _, interval in rows))
    height = TOP + ROW_HEIGHT * len(rows) + BOTTOM
    scale = (WIDTH - NAMES_WIDTH - RIGHT - 20) / most
    parts = [_opening(height), _text(10, 20, title, weight="600")]
    for step in range(STEPS + 1):
        across = NAMES_WIDTH + scale * most * step / STEPS
        parts.append(
            f'<line x1="{across:.1f}" y1="{TOP - 8}" x2="{across:.1f}" y2="{height - BOTTOM}" stroke="#e5e7eb"/>'
        )
        parts.append(_text(across, height - BOTTOM + 16, f"{most * step / STEPS:.2f}", "middle"))
    for number, (name, interval) in enumerate(rows):
        down = TOP + ROW_HEIGHT * number + 8
        low, at, high = (NAMES_WIDTH + scale * interval[end] for end in ("low", "estimate", "high"))
        words = f"{name}: {interval['estimate']:.4f} [{interval['low']:.4f}, {interval['high']:.4f}]"
        parts.append(_text(NAMES_WIDTH - 12, down + 4, name, "end"))
        parts.append(
            f'<line x1="{low:.1f}" y1="{down}" x2="{high:.1f}" y2="{down}" stroke="{COLOURS[0]}" stroke-width="2"/>'
        )
        parts.append(
            f'<circle cx="{at:.1f}" cy="{down}" r="5" fill="{COLOURS[0]}"><title>{escape(words)}</title></circle>'
        )
    return "\n".join([*parts, "</svg>"])


def _frame(title: str, axis: str, share: float) -> list[str]:
    """The opening, the title and the grid of shares, of which a line is at each multiple of one."""
    parts = [_opening(HEIGHT), _text(10, 20, title, weight="600")]
    for step in range(STEPS + 1):
        down = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * step / STEPS
        parts.append(f'<line x1="{LEFT}" y1="{down:.1f}" x2="{WIDTH - RIGHT}" y2="{down:.1f}" stroke="#e5e7eb"/>')
        parts.append(_text(LEFT - 6, down + 4, f"{100 * share * step:g} %", "end"))
    return [*parts, _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, axis, "middle")]


def _opening(height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'style="{STYLE}">\n<rect width="{WIDTH}" height="{height}" fill="white"/>'
    )


def _legend(name: str, colour: str, across: float) -> str:
    return f'<rect x="{across:.1f}" y="28" width="10" height="10" fill="{colour}"/>' + _text(across + 15, 37, name)


def _bin(edges: Sequence[float], number: int, open_ended: bool) -> str:
    if open_ended and number == len(edges) - 1:
        return f"{edges[number]:g} and above"
    return f"{edges[number]:g} to {edges[number + 1]:g}"


def _text(x: float, y: float, words: str, anchor: str = "start", weight: str = "400") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{escape(words)}</text>'
