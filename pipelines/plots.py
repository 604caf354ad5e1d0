"""Pictures of what was measured, as SVG that any browser shows."""

import math
from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT = 860, 520
LEFT, RIGHT, TOP, BOTTOM = 80, 30, 64, 60
QUALITY_COLOURS = {
    "recall": ("#b45309", "recall@{k}"),
    "recall_represented": ("#15803d", "recall@{k} with what is represented"),
    "ndcg": ("#7e22ce", "nDCG@{k}"),
    "ndcg_represented": ("#be185d", "nDCG@{k} with what is represented"),
}
LEGEND_TOP, LEGEND_STEP = 18, 13
COLOURS = {"flat": "#6b7280", "hnsw": "#1d4ed8", "ivf": "#b45309"}
TICK_FACTORS = (1, 2, 5)
PLOT_HEIGHT = HEIGHT - BOTTOM - TOP
CURVE_LINES = 5
LABEL_OFFSET = 13
STYLE = "font-family: system-ui, sans-serif; font-size: 12px; fill: #111827"


def tuning_svg(record: dict[str, Any]) -> str:
    """Queries per second over index bytes per vector, both logarithmic: a filled mark keeps the budget, an open one
    does not, the chosen one is ringed."""
    trials = record["trials"]
    x = _Axis([trial["bytes_per_vector"] for trial in trials], LEFT, WIDTH - RIGHT)
    y = _Axis([trial["queries_per_s"] for trial in trials], HEIGHT - BOTTOM, TOP)
    budget = record["budget"]
    title = f"recall@{budget['k']} of {budget['recall']:g}" + "".join(
        f", at most {budget[name]:g} {words}"
        for name, words in (("bytes_per_vector", "bytes per vector"), ("latency_ms", "ms"))
        if budget[name] is not None
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" style="{STYLE}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 24, f"Index configurations at {title}", "font-size: 15px; font-weight: 600"),
        *_grid(x, y),
        *(_mark(trial, x, y, trial == record["chosen"], budget) for trial in trials),
        *_labels(trials, x, y),
        *_legend(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def curve_svg(record: dict[str, Any]) -> str:
    """The share of passages that each threshold removes, and where queries were asked the quality of their answers on
    an axis of its own at the right; the threshold of the file is ringed."""
    points = record["points"]
    floor, most = record["floor"], max(point["share"] for point in points)
    top = max(most * 1.1, 1e-4)

    def place(point: dict[str, Any]) -> tuple[float, float]:
        across = (point["similarity"] - floor) / max(1 - floor, 1e-9)
        return round(LEFT + across * (WIDTH - RIGHT - LEFT), 1), round(
            HEIGHT - BOTTOM - point["share"] / top * PLOT_HEIGHT, 1
        )

    places = [place(point) for point in points]
    bottom = HEIGHT - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" style="{STYLE}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(
            LEFT, 24, f"Duplicates by meaning among {record['rows']:,} passages", "font-size: 15px; font-weight: 600"
        ),
        _text(LEFT, 46, "share removed at each threshold; ringed: the threshold of the file", "fill: #4b5563"),
        _text(
            (LEFT + WIDTH - RIGHT) / 2,
            HEIGHT - 16,
            "cosine similarity from which on two mean the same",
            anchor="middle",
        ),
        f'<line x1="{LEFT}" y1="{bottom}" x2="{WIDTH - RIGHT}" y2="{bottom}" stroke="#9ca3af"/>',
    ]
    for step in range(CURVE_LINES + 1):
        share = top * step / CURVE_LINES
        down = round(bottom - PLOT_HEIGHT * step / CURVE_LINES, 1)
        parts.append(f'<line x1="{LEFT}" y1="{down}" x2="{WIDTH - RIGHT}" y2="{down}" stroke="#e5e7eb"/>')
        parts.append(_text(LEFT - 8, down + 4, f"{share:.1%}", anchor="end"))
    line = " ".join(f"{across},{down}" for across, down in places)
    parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS["hnsw"]}" stroke-width="2"/>')
    for point, (across, down) in zip(points, places, strict=True):
        chosen = point["similarity"] == record["similarity"]
        about = f"{point['similarity']:g}: {point['removed']:,} of {record['rows']:,}, {point['saved_bytes']:,} bytes"
        if chosen:
            parts.append(f'<circle cx="{across}" cy="{down}" r="10" fill="none" stroke="#dc2626" stroke-width="2"/>')
        parts.append(
            f'<g><title>{escape(about)}</title><circle cx="{across}" cy="{down}" r="4" fill="{COLOURS["hnsw"]}"/></g>'
        )
        if not any(abs(across - other) < 34 for other, _ in places[: places.index((across, down))]):
            parts.append(_text(across, bottom + 18, f"{point['similarity']:g}", anchor="middle"))
    parts += _quality_lines(record, [across for across, _ in places])
    return "\n".join([*parts, "</svg>"]) + "\n"


def _quality_lines(record: dict[str, Any], across: Sequence[float]) -> list[str]:
    """What was measured of answers, from a little below the least value to 1."""
    points, bottom = record["points"], HEIGHT - BOTTOM
    names = [name for name in QUALITY_COLOURS if name in points[0]]
    if not names:
        return []
    least = math.floor(20 * min(point[name] for point in points for name in names) - 0.5) / 20
    lines = []
    for step in range(CURVE_LINES + 1):
        value, down = least + (1 - least) * step / CURVE_LINES, bottom - PLOT_HEIGHT * step / CURVE_LINES
        lines.append(_text(WIDTH - RIGHT + 4, round(down + 4, 1), f"{value:.2f}"))
    for number, name in enumerate(names):
        colour, words = QUALITY_COLOURS[name]
        downs = [round(bottom - (point[name] - least) / (1 - least) * PLOT_HEIGHT, 1) for point in points]
        line = " ".join(f"{x},{y}" for x, y in zip(across, downs, strict=True))
        lines.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        label = f"{words.format(k=record['quality']['k'])} (right axis)"
        lines.append(_text(WIDTH - RIGHT, LEGEND_TOP + LEGEND_STEP * number, label, f"fill: {colour}", anchor="end"))
    return lines


class _Axis:
    """A logarithmic axis between two pixels, from a little below the least value to a little above the largest."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self._low, self._high = math.log10(min(values) / 1.3), math.log10(max(values) * 1.3)
        self._start, self._end = start, end

    def place(self, value: float) -> float:
        share = (math.log10(value) - self._low) / (self._high - self._low)
        return round(self._start + share * (self._end - self._start), 1)

    def ticks(self) -> list[float]:
        powers = range(math.floor(self._low), math.ceil(self._high) + 1)
        values = [factor * 10.0**power for power in powers for factor in TICK_FACTORS]
        return [value for value in values if self._low <= math.log10(value) <= self._high]


def _grid(x: _Axis, y: _Axis) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    lines = [
        _text((LEFT + right) / 2, HEIGHT - 16, "index bytes per vector", anchor="middle"),
        f'<text transform="translate(20 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        "queries per second, one thread</text>",
    ]
    for value in x.ticks():
        place = x.place(value)
        lines.append(f'<line x1="{place}" y1="{TOP}" x2="{place}" y2="{bottom}" stroke="#e5e7eb"/>')
        lines.append(_text(place, bottom + 18, f"{value:,g}", anchor="middle"))
    for value in y.ticks():
        place = y.place(value)
        lines.append(f'<line x1="{LEFT}" y1="{place}" x2="{right}" y2="{place}" stroke="#e5e7eb"/>')
        lines.append(_text(LEFT - 8, place + 4, f"{value:,g}", anchor="end"))
    return lines


def _mark(trial: dict[str, Any], x: _Axis, y: _Axis, chosen: bool, budget: dict[str, Any]) -> str:
    colour = COLOURS[trial["family"]]
    fill = colour if keeps(trial, budget) else "white"
    place = f'cx="{x.place(trial["bytes_per_vector"])}" cy="{y.place(trial["queries_per_s"])}"'
    about = f"{_name(trial)}: recall {trial['recall']:.4f}, {trial['latency_ms']:.2f} ms a query"
    ring = f'<circle {place} r="10" fill="none" stroke="#dc2626" stroke-width="2"/>' if chosen else ""
    return f'<g><title>{escape(about)}</title>{ring}<circle {place} r="5" fill="{fill}" stroke="{colour}"/></g>'


def keeps(trial: dict[str, Any], budget: dict[str, Any]) -> bool:
    """Whether a trial's record keeps a budget's."""
    limits = ("bytes_per_vector", "latency_ms")
    within = all(budget[name] is None or trial[name] <= budget[name] for name in limits)
    return within and trial["recall"] >= budget["recall"]


def _labels(trials: Sequence[dict[str, Any]], x: _Axis, y: _Axis) -> list[str]:
    """A name beside each mark, unless it would lie over one that is there already."""
    taken: list[tuple[float, float]] = []
    labels = []
    for trial in trials:
        across, down = x.place(trial["bytes_per_vector"]), y.place(trial["queries_per_s"])
        if any(abs(down - other) < 13 and abs(across - place) < 150 for place, other in taken):
            continue
        taken.append((across, down))
        left = across > WIDTH - RIGHT - 170
        at = across - LABEL_OFFSET if left else across + LABEL_OFFSET
        labels.append(_text(at, down + 4, _name(trial), "font-size: 11px", anchor="end" if left else "start"))
    return labels


def _legend() -> list[str]:
    parts = []
    for number, (family, colour) in enumerate(COLOURS.items()):
        across = LEFT + 5 + 70 * number
        parts.append(f'<circle cx="{across}" cy="44" r="5" fill="{colour}"/>')
        parts.append(_text(across + 9, 48, family))
    parts.append(_text(WIDTH - RIGHT, 48, "filled: keeps the budget; ringed: chosen", "fill: #4b5563", anchor="end"))
    return parts


def _name(trial: dict[str, Any]) -> str:
    return f"{trial['factory']}{' + re-ranking' if trial['rerank'] else ''}"


def _text(x: float, y: float, words: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" style="{style}">{escape(words)}</text>'
