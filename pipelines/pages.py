"""Pages of what was found, as HTML that any browser shows without a network."""

from html import escape
from typing import Any

from penstock.pipelines.reporting import QUALITY_COLUMNS, quality_words

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #111827; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; table-layout: fixed }
th, td { border-top: 1px solid #e5e7eb; padding: .6rem; text-align: left; vertical-align: top; overflow-wrap: anywhere }
th:first-child, td:first-child { width: 6rem; font-variant-numeric: tabular-nums }
small { color: #4b5563 }
.goes { background: #fef3c7 }
"""
MOST_CHARACTERS = 1_200


def pairs_page(record: dict[str, Any]) -> str:
    """Pairs near the threshold side by side; those that reach it are marked."""
    rows = "\n".join(_pair(pair, record["similarity"]) for pair in record["examples"])
    title = f"Pairs near {record['similarity']:g}"
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{STYLE}</style>
<h1>{title}</h1>
<p>{len(record["examples"])} of {record["pairs"]:,} stored pairs of {record["rows"]:,} passages, chosen at random among
those whose cosine similarity is near the threshold. Marked pairs reach it: {_what_goes(record)}.</p>
<table>
<tr><th>similarity</th><th>passage</th><th>passage</th></tr>
{rows}
</table>
{_thresholds(record)}</html>
"""


def _what_goes(record: dict[str, Any]) -> str:
    if record["documents"] is None:
        return "one of the two goes, unless it went already"
    return "they count towards the share of one document that is in another, by which documents go whole"


def _thresholds(record: dict[str, Any]) -> str:
    """What thresholds do to the answers to queries, where these were asked."""
    if "quality" not in record:
        return ""
    names = [name for name in QUALITY_COLUMNS if name in record["points"][0]]
    shares = {"share": "removed"}
    if record["documents"] is not None:
        shares = {"share_of_documents": "documents removed", "share": "passages removed"}
    titles = ["threshold", *shares.values(), *(QUALITY_COLUMNS[name] for name in names)]
    lines = [f"<tr>{''.join(f'<th>{title}</th>' for title in titles)}</tr>"]
    for point in record["points"]:
        removed = [f"{point[name]:.2%}" for name in shares]
        values = [f"{point['similarity']:g}", *removed, *(f"{point[name]:.4f}" for name in names)]
        kind = ' class="goes"' if point["similarity"] == record["similarity"] else ""
        lines.append(f"<tr{kind}>{''.join(f'<td>{value}</td>' for value in values)}</tr>")
    table = "\n".join(lines)
    return (
        f"<h2>Answers at each threshold</h2>\n<p>{quality_words(record['quality'])}</p>\n<table>\n{table}\n</table>\n"
    )


def _pair(pair: dict[str, Any], threshold: float) -> str:
    kind = ' class="goes"' if pair["similarity"] >= threshold else ""
    cells = "".join(f"<td>{_passage(pair[side])}</td>" for side in ("left", "right"))
    return f"<tr{kind}><td>{pair['similarity']:.4f}</td>{cells}</tr>"


def _passage(passage: dict[str, str]) -> str:
    text = passage["text"]
    shown = text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "…"
    return f"<small>{escape(passage['id'])}</small><br>{escape(shown)}"
