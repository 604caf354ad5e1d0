"""Pictures of what was measured, as SVG that any browser shows."""

import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any, TypeAlias

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
LETTER = 6.8  # pixels of a letter of 11, on average of capitals and digits
FULL, FAINT = (5, 1.0), (3, 0.4)  # radius and opacity of a mark
RING = "#dc2626"
LISTS = re.compile(r"IVF\d+")

Box: TypeAlias = tuple[float, float, float, float]  # left, top, right, bottom
STYLE = "font-family: system-ui, sans-serif; font-size: 12px; fill: #111827"


def tuning_svg(record: dict[str, Any]) -> str:
    """Queries per second over index bytes per vector, both logarithmic. A filled mark keeps the budget, an open one
    does not, the chosen one is ringed; small faint ones are estimates from a part of the sample. The line joins the
    measured ones that keep the recall and that none as small is faster than."""
    budget, full, faint = record["budget"], record["trials"], _estimates(record)
    marks = [*full, *faint]
    x = _Axis([trial["bytes_per_vector"] for trial in marks], LEFT, WIDTH - RIGHT)
    y = _Axis([trial["queries_per_s"] for trial in marks], HEIGHT - BOTTOM, TOP)
    limits = (("bytes_per_vector", "bytes per vector"), ("latency_ms", "ms"))
    asked = [f"at most {budget[name]:g} {words}" for name, words in limits if budget[name] is not None]
    title = ", ".join([f"Index configurations at recall@{budget['k']} of {budget['recall']:g}", *asked])
    chosen = record["chosen"]
    first = sorted(full, key=lambda trial: trial != chosen)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" style="{STYLE}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 24, title, "font-size: 15px; font-weight: 600"),
        *_grid(x, y),
        *_limit(x, budget["bytes_per_vector"]),
        _front([trial for trial in full if trial["recall"] >= budget["recall"]], x, y),
        *(_mark(trial, x, y, False, budget, FAINT) for trial in faint),
        *(_mark(trial, x, y, trial == chosen, budget, FULL) for trial in full),
        *_labels([*first, *faint], len(first), x, y),
        *_legend(full, faint),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def curve_svg(record: dict[str, Any]) -> str:
    """The share of passages that each threshold removes, that of documents where these go whole, and where queries were
    asked the quality of their answers on an axis of its own at the right; the threshold of the file is ringed."""
    points = record["points"]
    shares = ["share"] if record["documents"] is None else ["share", "share_of_documents"]
    floor, most = record["floor"], max(point[name] for point in points for name in shares)
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
        if record["documents"] is not None:
            about += f", {point['removed_documents']:,} of {record['documents']:,} documents"
        if chosen:
            parts.append(f'<circle cx="{across}" cy="{down}" r="10" fill="none" stroke="#dc2626" stroke-width="2"/>')
        parts.append(
            f'<g><title>{escape(about)}</title><circle cx="{across}" cy="{down}" r="4" fill="{COLOURS["hnsw"]}"/></g>'
        )
        if not any(abs(across - other) < 34 for other, _ in places[: places.index((across, down))]):
            parts.append(_text(across, bottom + 18, f"{point['similarity']:g}", anchor="middle"))
    if record["documents"] is not None:
        downs = [bottom - point["share_of_documents"] / top * PLOT_HEIGHT for point in points]
        parts += _document_line([across for across, _ in places], downs)
    parts += _quality_lines(record, [across for across, _ in places])
    return "\n".join([*parts, "</svg>"]) + "\n"


def _document_line(across: Sequence[float], downs: Sequence[float]) -> list[str]:
    """The share of documents, dashed beside that of passages."""
    colour = COLOURS["hnsw"]
    line = " ".join(f"{x},{y:.1f}" for x, y in zip(across, downs, strict=True))
    label = _text(LEFT, TOP - 4, "dashed: the share of documents", f"fill: {colour}")
    return [
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5" stroke-dasharray="6 4"/>',
        label,
    ]


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


def _estimates(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The last trial of each configuration that was measured on a part of the sample alone."""
    last = {_identity(trial): trial for trial in record.get("screened", ())}
    for trial in record["trials"]:
        last.pop(_identity(trial), None)
    return list(last.values())


def _identity(trial: dict[str, Any]) -> tuple[Any, ...]:
    names = ("family", "codec", "rerank", "hnsw_m", "nlist", "pq_bytes", "rabitq_bits", "reduced")
    return tuple(trial.get(name) for name in names)


def _limit(x: _Axis, most: float | None) -> list[str]:
    """A line at the bytes that the budget allows, where that is in the picture."""
    if most is None or not LEFT < (place := x.place(most)) < WIDTH - RIGHT:
        return []
    ends = f'x1="{place}" y1="{TOP}" x2="{place}" y2="{HEIGHT - BOTTOM}"'
    return [f'<line {ends} stroke="{RING}" stroke-dasharray="5 4"/>']


def _front(trials: Sequence[dict[str, Any]], x: _Axis, y: _Axis) -> str:
    """A line through the trials that are faster than any as small."""
    best, points = 0.0, []
    for trial in sorted(trials, key=lambda trial: (trial["bytes_per_vector"], -trial["queries_per_s"])):
        if trial["queries_per_s"] > best:
            best = trial["queries_per_s"]
            points.append(f"{x.place(trial['bytes_per_vector'])},{y.place(best)}")
    return f'<polyline points="{" ".join(points)}" fill="none" stroke="#9ca3af" stroke-width="1.5"/>'


def _mark(
    trial: dict[str, Any], x: _Axis, y: _Axis, chosen: bool, budget: dict[str, Any], look: tuple[int, float]
) -> str:
    radius, opacity = look
    colour = COLOURS[trial["family"]]
    fill = colour if keeps(trial, budget) else "white"
    place = f'cx="{x.place(trial["bytes_per_vector"])}" cy="{y.place(trial["queries_per_s"])}"'
    about = f"{_name(trial)}: recall {trial['recall']:.4f}, {trial['latency_ms']:.2f} ms a query"
    ring = f'<circle {place} r="10" fill="none" stroke="{RING}" stroke-width="2"/>' if chosen else ""
    circle = f'<circle {place} r="{radius}" fill="{fill}" stroke="{colour}" opacity="{opacity}"/>'
    return f"<g><title>{escape(about)}</title>{ring}{circle}</g>"


def keeps(trial: dict[str, Any], budget: dict[str, Any]) -> bool:
    """Whether a trial's record keeps a budget's."""
    limits = ("bytes_per_vector", "latency_ms")
    within = all(budget[name] is None or trial[name] <= budget[name] for name in limits)
    return within and trial["recall"] >= budget["recall"]


def _labels(trials: Sequence[dict[str, Any]], full: int, x: _Axis, y: _Axis) -> list[str]:
    """A name beside each mark where there is room; the first `full` of them in black, the others in grey."""
    places = [(x.place(trial["bytes_per_vector"]), y.place(trial["queries_per_s"])) for trial in trials]
    taken: list[Box] = [(across - 6, down - 6, across + 6, down + 6) for across, down in places]
    labels = []
    for number, (trial, place) in enumerate(zip(trials, places, strict=True)):
        words = _label(trial)
        box = next((box for box in _boxes(words, *place) if not any(_overlap(box, other) for other in taken)), None)
        if box is not None:
            taken.append(box)
            style = f"font-size: 11px; fill: {'#111827' if number < full else '#9ca3af'}"
            labels.append(_text((box[0] + box[2]) / 2, box[1] + 10, words, style, anchor="middle"))
    return labels


def _boxes(words: str, across: float, down: float) -> list[Box]:
    """Where a label may stand, the best first: right of its mark, left, above or below; all within the picture."""
    half = LETTER * len(words) / 2
    aside = half + LABEL_OFFSET
    centres = [(across + aside, down), (across - aside, down), (across, down - 15), (across, down + 15)]
    boxes = [(x - half, y - 6, x + half, y + 6) for x, y in centres]
    return [box for box in boxes if LEFT < box[0] and box[2] < WIDTH - RIGHT and TOP < box[1]]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _legend(full: Sequence[dict[str, Any]], faint: Sequence[dict[str, Any]]) -> list[str]:
    parts = []
    for number, (family, colour) in enumerate(COLOURS.items()):
        across = LEFT + 5 + 55 * number
        parts.append(f'<circle cx="{across}" cy="44" r="5" fill="{colour}"/>')
        parts.append(_text(across + 9, 48, family))
    words = f"filled: keeps the budget; ringed: chosen; +r: re-ranked; on {full[0]['rows']:,} vectors"
    words += f", faint: estimated from ≤ {max(one['rows'] for one in faint):,}" if faint else ""
    parts.append(_text(WIDTH - RIGHT, 48, words, "font-size: 11px; fill: #4b5563", anchor="end"))
    return parts


def _name(trial: dict[str, Any]) -> str:
    return f"{_factory(trial)}{' + re-ranking' if trial['rerank'] else ''}"


def _label(trial: dict[str, Any]) -> str:
    return f"{_factory(trial)}{' +r' if trial['rerank'] else ''}"


def _factory(trial: dict[str, Any]) -> str:
    """The factory string of a whole shard, whose lists are more than those of a part."""
    factory: str = trial["factory"]
    return factory if trial.get("nlist") is None else LISTS.sub(f"IVF{trial['nlist']}", factory)


def _text(x: float, y: float, words: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" style="{style}">{escape(words)}</text>'
