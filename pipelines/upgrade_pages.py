"""Pages on a new model and on the health of a space, as HTML without scripts that any browser shows offline."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from penstock.pipelines.bar_plots import histogram_svg, intervals_svg
from penstock.pipelines.pages import STYLE

MORE_STYLE = """
h1, p { overflow-wrap: anywhere }
td.number, th + th { text-align: right; font-variant-numeric: tabular-nums }
details { margin: .6rem 0 }
th:first-child, td:first-child { width: 14rem }
.plots { display: flex; flex-wrap: wrap; gap: 1rem }
.no { background: #fee2e2 }
"""
PAIRINGS = {
    "old_to_old": "old queries, old index",
    "bridged_to_old": "new queries, bridged to the old index",
    "new_to_old": "new queries, old index as it is",
    "new_to_new": "new queries, new index",
}
DIRECTIONS = {"queries_to_old": "new queries to the old index", "documents_to_new": "old documents in the new space"}
FIGURES = {
    "effective_rank": "effective rank",
    "centred_rank": "effective rank, centred",
    "isotropy": "isotropy",
    "mean_cosine": "mean cosine",
    "mean_norm": "mean length",
    "norm_spread": "spread of lengths",
    "hubness": "hubness (skewness)",
    "antihub_share": "share of antihubs",
    "hub_share": "share of hubs",
    "hub_occupancy": "places taken by hubs",
}

SHOWN_FITS = 8
LEAST_SHOWN = 1e-4


def canary_page(record: Mapping[str, Any]) -> str:
    """A new model beside the old one: quality of each pairing, bridges, likeness, and the health of both spaces.

    Args:
        record: what `canary` gave.
    """
    spaces = record["spaces"]
    parts = [
        f"<p>Old: {escape(record['old']['model'])}, {record['old']['dimension']} dimensions. New: "
        f"{escape(record['new']['model'])}, {record['new']['dimension']} dimensions.</p>",
        f"<p>{escape(_sample_words(record))}</p>",
        "<h2>Answers</h2>",
        _pairings(record),
        "<h2>Bridges</h2>",
        _bridges(record["bridges"]),
        "<h2>Spaces</h2>",
        f"<p>{escape(likeness_words(record))}</p>",
        _health_table({name: one["health"] for name, one in spaces.items()}),
        _space_plots(spaces),
    ]
    return _page(f"{record['new']['model']} after {record['old']['model']}", parts)


def health_page(record: Mapping[str, Any]) -> str:
    """The space of a version, beside that of another where it was compared with one.

    Args:
        record: what `HealthCheck.report` gave.
    """
    versions = [record, *([record["against"]] if "against" in record else [])]
    reports = {one["version"]: one["report"] for one in versions}
    parts = [f"<p>{escape(_version_words(one))}</p>" for one in versions]
    if "against" in record:
        parts += ["<h2>Drift</h2>", _drift(record)]
    parts += [
        "<h2>Figures</h2>",
        _health_table({name: one["health"] for name, one in reports.items()}),
        _space_plots(reports),
    ]
    return _page(f"Health of {record['index']}, version {record['version']}", parts)


def _page(title: str, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{escape(title)}</title>
<style>{STYLE}{MORE_STYLE}</style>
<h1>{escape(title)}</h1>
{body}
</html>
"""


def _sample_words(record: Mapping[str, Any]) -> str:
    sample, queries = record["sample"], record["sample"]["queries"]
    words = [
        f"{sample['drawn']:,} of {sample['of_passages']:,} passages drawn by their hashes (seed {record['seed']}), "
        f"{sample['of_judged_documents']:,} more of judged documents."
    ]
    if queries["from"] == "passages":
        words.append(
            f"Passages stand in as queries ({queries['why']}); real queries are shorter and lie elsewhere, so take "
            "these figures for a first look."
        )
    if not queries["judged"]:
        words.append("There are no judgements: figures tell what agrees with the old model, not what is right.")
    words.append(
        f"{queries['fitting']:,} queries fitted and chose bridges; all figures are of {queries['judging']:,} others, "
        "and of a corpus as small as the sample: compare them with each other, not with those of an index."
    )
    rates = sample["throughput"]
    if rates is not None:
        words.append(
            f"The new model encodes {rates['passages_per_s_by_worker']:,.0f} passages and "
            f"{rates['tokens_per_s_by_worker']:,.0f} tokens a second and worker."
        )
    return " ".join(words)


def _pairings(record: Mapping[str, Any]) -> str:
    found = [(words, record["pairings"][name]) for name, words in PAIRINGS.items() if name in record["pairings"]]
    if not record["sample"]["queries"]["judged"]:
        rows = [[words, _interval(one["agreement"])] for words, one in found]
        table = _table(["", "share of the old model's ten nearest that are found"], rows)
        return table + intervals_svg(
            "Agreement with the old model", [(words, one["agreement"]) for words, one in found]
        )
    k = record["k"]
    own = PAIRINGS["old_to_old"]
    rows = [
        [words, _interval(one["recall"]), _interval(one["ndcg"])]
        + (["", ""] if words == own else [_interval(one["ndcg_change"]), _flips(one["flips"])])
        for words, one in found
    ]
    table = _table(["", f"recall@{k}", f"nDCG@{k}", "change of nDCG", "became wrong / right"], rows)
    lost = [_lost(words, one["flips"]["negative_queries"]) for words, one in found if one["flips"]["negative_queries"]]
    plot = intervals_svg(f"nDCG@{k}, with 95 % confidence intervals", [(words, one["ndcg"]) for words, one in found])
    return "\n".join([table, *lost, plot])


def _flips(flips: Mapping[str, Any]) -> str:
    return f"{flips['negative']['estimate']:.1%} / {flips['positive']['estimate']:.1%}"


def _lost(words: str, queries: Sequence[str]) -> str:
    return f"<p><small>Became wrong with {escape(words)}, among others: {escape(', '.join(queries))}</small></p>"


def _bridges(bridges: Mapping[str, Any]) -> str:
    if bridges["skipped"]:
        return (
            "<p>None is needed: the new model is declared compatible, and its queries answer better from the old index "
            "than the old model's do.</p>"
        )
    parts = [f"<p>{escape(_not_compatible(bridges))}</p>"] if bridges["declared_compatible"] else []
    for direction, words in DIRECTIONS.items():
        one = bridges["directions"][direction]
        verdict = one["record"]["verdict"]
        state = "kept" if one["stored"] else f"refused: {one['refused']}"
        parts.append(
            f"<p{'' if one['stored'] else ' class=no'}><b>{words}</b>: {escape(state)}. Recovers "
            f"{_interval(verdict['recovery'])} of the reference, {_interval(verdict['over_control'])} more than an "
            "adapter fitted to shuffled pairs.</p>"
        )
        chosen = one["record"]["chosen"]
        rows = [
            [fit_words(fit), _interval(fit["quality"]), "chosen" if same_fit(fit, chosen) else ""]
            for fit in best_first(one["record"]["candidates"])
        ]
        heads = ["fit", "quality on held-out queries", ""]
        parts.append(_table(heads, rows[:SHOWN_FITS]))
        if len(rows) > SHOWN_FITS:
            others = _table(heads, rows[SHOWN_FITS:])
            parts.append(f"<details><summary>{len(rows) - SHOWN_FITS} other fits</summary>{others}</details>")
    return "\n".join(parts)


def _not_compatible(bridges: Mapping[str, Any]) -> str:
    """Why a model that is declared compatible is bridged all the same."""
    figures = bridges["compatibility"]
    if figures is None:
        return "The new model is declared compatible, which cannot be measured here: judgements and equal dimensions."
    return (
        "The new model is declared compatible, but was not measured to be: the nDCG of its queries in the old index, "
        f"less that of the old model's, is {_interval(figures['difference'])}, which is not above 0."
    )


def best_first(candidates: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The fits that were tried, in an adapter's record, by the quality of their answers."""
    return sorted(candidates, key=lambda one: -float(one["quality"]["estimate"]))


def same_fit(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records are of one fit, whatever else they hold."""
    return all(one[name] == other[name] for name in ("method", "query_weight"))


def fit_words(fit: Mapping[str, Any]) -> str:
    """A fit of an adapter's record in words: the method, its parameters, and what a query weighs."""
    parameters = {name: value for name, value in fit["method"].items() if name not in ("type", "seed")}
    words = ", ".join(f"{name} {value:g}" for name, value in parameters.items())
    return f"{fit['method']['type']}{f' ({words})' if words else ''}, a query weighs {fit['query_weight']:g}"


def likeness_words(record: Mapping[str, Any]) -> str:
    """How alike the two spaces of a canary are: their neighbours, and their relative representations."""
    alike, overlap = record["likeness"], record["neighbour_overlap"]
    return (
        f"Of a passage's ten nearest, {overlap['estimate']:.1%} are the same in both spaces. By cosines to the same "
        f"{alike['anchors']} anchors, the two vectors of a passage are {alike['mean_cosine']:.3f} alike (1 for spaces "
        f"that differ by rotation and scale), and {alike['matched']:.1%} find each other among all."
    )


def _version_words(one: Mapping[str, Any]) -> str:
    return (
        f"Version {one['version']}: {one['model']}, {one['rows']:,} rows. Figures are of {one['sample_rows']:,} of "
        f"them, drawn by the hashes of their ids; from {one['vectors_from']}."
    )


def _drift(record: Mapping[str, Any]) -> str:
    if record["why"] is not None:
        return f"<p>Not compared: {escape(record['why'])}.</p>"
    rows = [
        [FIGURES[rule["figure"]], *(figure_text(rule[name]) for name in ("before", "after", "change", "most"))]
        + ["alarm" if rule["alarm"] else "well"]
        for rule in record["drift"]
    ]
    return _table(["", "before", "after", "change for the worse", "at most", ""], rows)


def _health_table(spaces: Mapping[str, Mapping[str, float]]) -> str:
    rows = [[words, *(figure_text(health[name]) for health in spaces.values())] for name, words in FIGURES.items()]
    return _table(["", *spaces], rows)


def _space_plots(spaces: Mapping[str, Mapping[str, Any]]) -> str:
    plots = [
        histogram_svg(title, axis, {name: one[kind] for name, one in spaces.items()})
        for kind, title, axis in (
            ("cosines", "Share of random pairs of rows, by cosine", "cosine"),
            (
                "occurrences",
                "Share of rows, by how often they are among the ten nearest of others",
                "times: a bar is from its number to below the next",
            ),
        )
    ]
    return '<div class="plots">' + "\n".join(plots) + "</div>"


def figure_text(value: float) -> str:
    """A figure of a space with the digits that a sample can tell: rounding errors are nothing."""
    return f"{value:.4g}" if abs(value) >= LEAST_SHOWN else "0"


def _interval(interval: Mapping[str, float]) -> str:
    return f"{interval['estimate']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text; the first column names."""
    head = "".join(f"<th>{escape(one)}</th>" for one in heads)
    body = "\n".join(
        f"<tr><td>{escape(row[0])}</td>"
        + "".join(f'<td class="number">{escape(cell)}</td>' for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"
