"""What people see: plans, reports and answers as tables."""

from typing import Any

import pyarrow as pa
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from penstock.pipelines.diffing import Difference
from penstock.pipelines.gate import failed
from penstock.pipelines.history import Status
from penstock.pipelines.opened import Coverage
from penstock.pipelines.planning import Plan
from penstock.pipelines.publishing import how_built
from penstock.pipelines.running import Report

SNIPPET_CHARACTERS = 240
FILE_WIDTH = 160  # of tables when the output is no terminal
QUALITY_COLUMNS = {
    "recall": "recall",
    "recall_represented": "represented",
    "ndcg": "nDCG",
    "ndcg_represented": "represented",
}


def plan_table(plan: Plan) -> RenderableType:
    """The stages of a plan, what is done and to do in each, and why."""
    table = _table("stage", "fingerprint", "done", "to do", "rows", "to read", "why")
    for stage in plan.stages:
        _row(
            table,
            stage.name,
            (stage.fingerprint or "")[:12],
            _count(stage.done),
            _count(stage.todo),
            _count(stage.rows),
            _size(stage.bytes_to_read),
            stage.why,
        )
    return Group(table, Text(plan_summary(plan)))


def plan_summary(plan: Plan) -> str:
    """One sentence on what a run would do."""
    alias = plan.resolved.pipeline.publish.alias
    if plan.up_to_date:
        where = f", published as {alias}" if alias and not plan.notes else ""
        return f"Nothing to do: version {plan.version} is built and measured{where}." + "".join(
            f"\n{note}" for note in plan.notes
        )
    if plan.published:
        return f"Version {plan.version} is there; a run would check its gate and move alias {alias} to it."
    return f"A run would make version {plan.version}." if plan.version else "A run would make a new version."


def report_view(report: Report) -> RenderableType:
    """The closing view of a run: figures, stages, gate and where it was published."""
    return Group(_figures(report), _stages(report), Text(_verdict(report), style="bold"))


def tuning_view(record: dict[str, Any]) -> RenderableType:
    """What was measured: one line a configuration, those on the Pareto front marked, and the choice."""
    chosen = record["chosen"]
    if "trials" not in record:
        return Text(f"{chosen['family']}, codec {chosen['codec']}: {record['why']}")
    table = _table("", "index", "bytes/vector", "stored", "recall", "queries/s", "ms a query", "search", "build s")
    for trial in record["trials"]:
        mark = "chosen" if trial == chosen else "front" if trial in record["pareto"] else ""
        point = ", ".join(f"{name} {value}" for name, value in trial["parameters"].items() if value != 1) or "exact"
        _row(
            table,
            mark,
            f"{trial['factory']}{' + re-ranking' if trial['rerank'] else ''}",
            f"{trial['bytes_per_vector']:,.0f}",
            f"{trial['rerank_bytes']:,.0f}",
            f"{trial['recall']:.4f}",
            f"{trial['queries_per_s']:,.0f}",
            f"{trial['latency_ms']:.2f}",
            point,
            f"{trial['build_s']:.1f}",
        )
    rows = max(trial["rows"] for trial in record["trials"])
    return Group(table, Text(f"Measured on {rows:,} vectors, one thread; front: no other is better in every column."))


def curve_view(record: dict[str, Any]) -> RenderableType:
    """What each threshold removes as duplicates by meaning."""
    figures = [name for name in QUALITY_COLUMNS if name in record["points"][0]]
    whole = [] if record["documents"] is None else ["documents", "share"]
    titles = "threshold", *whole, "passages" if whole else "removed", "share", "saved bytes"
    table = _table("", *titles, *(QUALITY_COLUMNS[name] for name in figures))
    for point in record["points"]:
        mark = "in the file" if point["similarity"] == record["similarity"] else ""
        _row(
            table,
            mark,
            f"{point['similarity']:g}",
            *((f"{point['removed_documents']:,}", f"{point['share_of_documents']:.2%}") if whole else ()),
            f"{point['removed']:,}",
            f"{point['share']:.2%}",
            f"{point['saved_bytes']:,}",
            *(f"{point[name]:.4f}" for name in figures),
        )
    recall = record["pair_recall"]
    words = (
        f"{record['pairs']:,} pairs of {record['rows']:,} passages reach {record['floor']:g}; bytes of stored vectors."
        f"\nFound by join {record['join']}: {recall['recall']:.4f} of {recall['pairs']:,} true pairs of a sample."
    )
    if whole:
        words += f"\nDocuments go whole, of {record['documents']:,}, with all their passages."
    if "quality" in record:
        words += f"\n{quality_words(record['quality'])}"
    return Group(table, Text(words))


def quality_words(quality: dict[str, Any]) -> str:
    """What the columns of answers are, and what they were before anything went."""
    relevant = "relevant documents" if quality["relevant"] == "judged" else "passages that are nearest before any goes"
    before = ", ".join(f"{name} {value:.4f}" for name, value in quality["before"].items())
    return (
        f"Answers to {quality['queries']:,} queries by exact search in what stays: are the {relevant} among the first "
        f"{quality['k']}? Before: {before}. Represented: what went counts as found where what represents it is."
    )


def difference_view(difference: Difference) -> RenderableType:
    """Two versions side by side, and what became of documents and answers."""
    table = _table("", "old", "new")
    for name, value in difference.old.items():
        _row(table, name, _plain(value), _plain(difference.new[name]))
    documents = difference.documents
    lines = [
        f"documents: {documents.added:,} added, {documents.removed:,} removed, {documents.changed:,} changed, "
        f"{documents.unchanged:,} unchanged"
    ]
    for name, ids in documents.examples.items():
        if ids:
            lines.append(f"  {name}, among others: {', '.join(ids)}")
    if difference.churn is not None:
        lines.append(
            f"answers: {difference.churn:.1%} of the old version's 10 nearest are not among the new one's, "
            f"over {difference.queries} passages as queries"
        )
    return Group(table, Text("\n".join(lines)))


def answers_view(query: str, rows: pa.Table) -> RenderableType:
    """One query's answers: similarity, id, metadata and a snippet of the text."""
    table = _table("similarity", "id", "metadata", "text", title=escape(f"“{query}”"))
    for row in rows.to_pylist():
        near = "" if row["similarity"] is None else f"{row['similarity']:.4f}"
        _row(table, near, row["id"], metadata_text(row), snippet(row["text"]))
    return table


def answer_rows(rows: pa.Table) -> list[dict[str, Any]]:
    """The same for machines."""
    return [
        {**{name: value for name, value in row.items() if name != "text"}, "snippet": snippet(row["text"])}
        for row in rows.to_pylist()
    ]


def metadata_text(row: dict[str, Any]) -> str:
    """Kept columns of a row as `name: value` lines."""
    own = {"id", "similarity", "document_id", "start", "end", "text"}
    shown = {name: ", ".join(value) if isinstance(value, list) else value for name, value in row.items()}
    return "\n".join(f"{name}: {value}" for name, value in shown.items() if name not in own and value not in (None, ""))


def with_duplicates(rows: pa.Table, links: pa.Table) -> pa.Table:
    """Found rows with a column `duplicates`: the ids of the passages that each of them stands for.

    Args:
        links: id, document_id and represented_by, as `OpenIndex.duplicates` gives them.
    """
    represented: dict[str, list[str]] = {}
    for link in links.to_pylist():
        represented.setdefault(link["represented_by"], []).append(link["id"])
    duplicates = [represented.get(name, []) for name in rows.column("id").to_pylist()]
    return rows.append_column("duplicates", pa.array(duplicates, pa.list_(pa.string())))


def coverage_text(coverage: Coverage) -> str:
    """One sentence on what a degraded search did not look through."""
    shards = ", ".join(str(shard) for shard in coverage.missing)
    return f"answers come from {coverage.share:.1%} of the rows, without shard {shards}"


def snippet(text: str) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= SNIPPET_CHARACTERS else line[: SNIPPET_CHARACTERS - 1].rstrip() + "…"


def records_table(records: list[dict[str, Any]], columns: list[str]) -> RenderableType:
    """Records as a table of the named columns."""
    table = _table(*columns)
    for record in records:
        _row(table, *("" if record.get(name) is None else str(record[name]) for name in columns))
    return table


def print_view(view: RenderableType) -> None:
    """Print to standard output; wide enough for tables when it is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_WIDTH)
    console.print(view, highlight=False)


def _encoder(report: Report) -> list[tuple[str, str]]:
    """The line on what encoded, where anything was."""
    encoder = report.encoder
    if encoder is None or not encoder["tokens"]:
        return []
    rates, worker = encoder["rates"], encoder["worker"]
    words = (
        f"{report.manifest['model']['precision']}, {worker['batch_tokens']:,} tokens a batch; "
        f"{rates['passages_per_s']:,.0f} passages/s, padding {encoder['padding_share']:.0%}, "
        f"idle {rates['idle_share']:.0%}, {encoder['start_s']:.0f} s to start"
    )
    return [("encoder", words)]


def _figures(report: Report) -> RenderableType:
    evaluation = report.manifest["evaluation"]
    selection = report.entries[1]
    embeddings = report.entries[2]
    point = evaluation["default"]
    table = Table(box=SIMPLE_HEAD, show_header=False)
    rows = [
        ("documents", f"{report.entries[0].rows_in:,}{_dropped(report.entries[0].dropped)}"),
        ("passages", f"{selection.rows_in:,}"),
        ("duplicates left out", f"{sum(selection.dropped.values()):,}"),
        ("tokens", f"{selection.tokens:,}"),
        ("encoded / reused", f"{embeddings.encoded:,} / {report.entries[2].rows_in - embeddings.encoded:,}"),
        *_encoder(report),
        (
            "index",
            f"{how_built(report.manifest)['factory']}, {len(report.manifest['shards'])} shards, "
            f"{report.index_bytes:,} bytes{', centroids of deduplication' if report.shares_centroids else ''}",
        ),
        ("index bytes per vector", f"{report.manifest['bytes_per_vector']:,.1f}"),
        (
            f"recall@{evaluation['k']} measured",
            f"{evaluation['recall']:.4f} on {evaluation['queries']} queries, {_point(point)}",
        ),
    ]
    if "ndcg" in evaluation:
        rows.append(
            (f"nDCG@{evaluation['k']}, MRR@{evaluation['k']}", f"{evaluation['ndcg']:.4f}, {evaluation['mrr']:.4f}")
        )
    rows += [("version", report.version), ("alias", _alias(report))]
    for name, value in rows:
        _row(table, name, value)
    return Panel(table, title=escape(f"{report.name}: {report.status}"), expand=False)


def _stages(report: Report) -> RenderableType:
    table = _table("stage", "rows in", "rows out", "dropped", "fragments", "seconds", "busy", "idle", "written")
    for entry in report.entries:
        fragments = f"{entry.fragments - entry.fragments_done_before} of {entry.fragments}" if entry.fragments else ""
        _row(
            table,
            entry.stage,
            _count(entry.rows_in),
            _count(entry.rows_out),
            ", ".join(f"{reason}: {count:,}" for reason, count in entry.dropped.items()),
            fragments,
            f"{entry.seconds:.1f}",
            f"{entry.busy_s:.1f}",
            f"{entry.idle_s:.1f}",
            _size(entry.bytes_written),
        )
    return table


def _verdict(report: Report) -> str:
    lines = [f"gate: {check}" for check in report.checks]
    match report.status:
        case Status.GATE_FAILED:
            missed = "; ".join(str(check) for check in failed(report.checks))
            lines.append(f"Version {report.version} is kept but not published: {missed}.")
        case Status.PUBLISHED if report.alias is not None:
            lines.append(
                f"Alias {report.alias.alias} points to version {report.alias.version} (entry {report.alias.number})."
            )
        case _:
            lines.append(f"Version {report.version} is built; the pipeline file names no alias.")
    lines += report.notes
    lines.append(f"{report.seconds:.1f} seconds in all, run {report.run_id}.")
    return "\n".join(lines)


def _alias(report: Report) -> str:
    if report.alias is None:
        return "none"
    return report.alias.alias


def _dropped(dropped: dict[str, int]) -> str:
    return f" ({', '.join(f'{reason}: {count:,}' for reason, count in dropped.items())})" if dropped else ""


def _point(point: dict[str, Any]) -> str:
    names = ", ".join(
        f"{name} {value}" for name, value in point["parameters"].items() if (name, value) != ("rerank_factor", 1)
    )
    touched = f", {point['shards']:.1f} shards a query" if "shards" in point else ""
    return f"{names or 'exact'}, {point['latency_ms']:.2f} ms a query{touched}"


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    numeric = {
        "done",
        "to do",
        "rows",
        "to read",
        "rows in",
        "rows out",
        "seconds",
        "busy",
        "idle",
        "written",
        "similarity",
        "threshold",
        "removed",
        "share",
        "saved bytes",
        "bytes/vector",
        "stored",
        "recall",
        "queries/s",
        "ms a query",
        "build s",
    }
    for column in columns:
        table.add_column(column, justify="right" if column in numeric else "left", overflow="fold")
    return table


def _row(table: Table, *cells: str) -> None:
    """A row of plain text: brackets in ids and texts are no markup."""
    table.add_row(*(Text(cell) for cell in cells))


def _plain(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if isinstance(value, float) else str(value)


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _size(size_bytes: int | None) -> str:
    if size_bytes is None:
        return "?"
    size = float(size_bytes)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
