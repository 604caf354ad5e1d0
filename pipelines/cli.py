"""The command line."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import typer
from rich.console import Group

from penstock.cluster.catalog import AliasEntry, Catalog, PublishConflict
from penstock.cluster.file_cache import DamagedFile
from penstock.cluster.jobs.clustering import DamagedCentroids
from penstock.cluster.jobs.embeddings import RowsLost
from penstock.cluster.jobs.evaluation import QueriesInvalid
from penstock.cluster.jobs.passages import SourceChanged
from penstock.cluster.jobs.selection import DuplicateDocumentIds
from penstock.cluster.jobs.training import DamagedTraining
from penstock.cluster.jobs.transforms import DamagedTransforms
from penstock.cluster.leases import LeaseHeld, LeaseLost
from penstock.cluster.session import Session, WorkFailed
from penstock.cluster.storage import AlreadyExists, StorageUnavailable, Store, StoreUnsuitable, open_store
from penstock.operators.agreement import VectorsDisagree
from penstock.operators.bridging import WrongSpace
from penstock.operators.encoder_process import EncoderCrashed
from penstock.operators.encoder_worker import EncoderFails
from penstock.operators.encoding import ModelMismatch, TextRefused
from penstock.operators.filtering import parse_where
from penstock.operators.models import ModelUnavailable
from penstock.pipelines.backfilling import BackfillStopped
from penstock.pipelines.bridges import answers_through_bridge
from penstock.pipelines.canary_sample import FEWEST_PASSAGES, SAMPLE_PASSAGES
from penstock.pipelines.cleanup import DEFAULT_GRACE_HOURS, GraceTooShort, collect_garbage
from penstock.pipelines.config import PipelineFile
from penstock.pipelines.coverage import CoverageUnknown
from penstock.pipelines.diffing import compare
from penstock.pipelines.health import HealthCheck
from penstock.pipelines.history import Status, new_run_id, read_run, run_ids
from penstock.pipelines.ledger import LedgerDisagrees
from penstock.pipelines.loading import PipelineFileInvalid
from penstock.pipelines.mixed import BridgeUnfit, PartUnfit
from penstock.pipelines.mixed_format import MixedUnsupported, is_mixed
from penstock.pipelines.pages import pairs_page
from penstock.pipelines.pipeline import Pipeline
from penstock.pipelines.plots import curve_svg, tuning_svg
from penstock.pipelines.progress import choose_reporter
from penstock.pipelines.query_encoder import CodeNotTrusted
from penstock.pipelines.reader import AliasUnknown, find_alias, open_index
from penstock.pipelines.reporting import (
    answer_rows,
    answers_view,
    coverage_text,
    curve_view,
    difference_view,
    plan_summary,
    plan_table,
    print_view,
    records_table,
    report_view,
    tuning_view,
    with_duplicates,
)
from penstock.pipelines.tuning import unmet
from penstock.pipelines.upgrade_pages import canary_page, health_page
from penstock.pipelines.upgrade_views import bridge_view, drift_words, health_view, upgrade_view
from penstock.pipelines.upgrading import NothingToUpgrade, UpgradeStep

EXIT_FAILED = 1
EXIT_INVALID = 2
EXIT_GATE = 3
EXIT_BUSY = 4
EXIT_CONFLICT = 5
EXIT_INTERRUPTED = 130
SHOWN_RUNS = 10

# Exceptions whose message is for people, and the exit code that goes with each.
EXIT_CODES: dict[type[BaseException], int] = {
    PipelineFileInvalid: EXIT_INVALID,
    ModelUnavailable: EXIT_INVALID,
    QueriesInvalid: EXIT_INVALID,
    AliasUnknown: EXIT_INVALID,
    CodeNotTrusted: EXIT_INVALID,
    DamagedCentroids: EXIT_FAILED,
    DamagedTraining: EXIT_FAILED,
    DamagedTransforms: EXIT_FAILED,
    GraceTooShort: EXIT_INVALID,
    DuplicateDocumentIds: EXIT_INVALID,
    StoreUnsuitable: EXIT_INVALID,
    LeaseHeld: EXIT_BUSY,
    LeaseLost: EXIT_CONFLICT,
    PublishConflict: EXIT_CONFLICT,
    NothingToUpgrade: EXIT_INVALID,
    BackfillStopped: EXIT_GATE,
    CoverageUnknown: EXIT_FAILED,
    AlreadyExists: EXIT_CONFLICT,
    BridgeUnfit: EXIT_INVALID,
    MixedUnsupported: EXIT_INVALID,
    PartUnfit: EXIT_GATE,
    ModelMismatch: EXIT_FAILED,
    WrongSpace: EXIT_FAILED,
    EncoderFails: EXIT_FAILED,
    EncoderCrashed: EXIT_FAILED,
    RowsLost: EXIT_FAILED,
    TextRefused: EXIT_INVALID,
    VectorsDisagree: EXIT_INVALID,
    DamagedFile: EXIT_FAILED,
    SourceChanged: EXIT_FAILED,
    StorageUnavailable: EXIT_FAILED,
    LedgerDisagrees: EXIT_FAILED,
    WorkFailed: EXIT_FAILED,
    OSError: EXIT_FAILED,
    pa.ArrowException: EXIT_FAILED,
    ValueError: EXIT_INVALID,
}

File = Annotated[Path, typer.Argument(help="The pipeline file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a value: index.shards=4. May be repeated.")
]
AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]
Root = Annotated[str, typer.Option(help="Where the pipeline keeps everything.", show_default=False)]
AliasName = Annotated[str, typer.Argument(help="An alias, or index/alias.", show_default=False)]

app = typer.Typer(
    name="penstock",
    help="From a corpus in object storage to a published, searchable, sharded vector index.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point: runs a command and turns exceptions for people into messages and exit codes."""
    try:
        code = app(standalone_mode=False)
    except typer.Exit as leave:
        code = leave.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    except Exception as error:
        code = _explain(error)
    if code == EXIT_INTERRUPTED:
        sys.stderr.write("stopped; run the same command again to go on from here\n")
    sys.exit(code or 0)


@app.command()
def run(file: File, set_: Overrides = None, json_: AsJson = False) -> None:
    """Run a pipeline: do what is missing, measure, and publish through the gate."""
    pipeline = Pipeline.load(file, set_ or ())
    reporter = choose_reporter(json_)
    plan = pipeline.plan()
    for warning in plan.resolved.warnings:
        reporter.warn(warning)
    report = pipeline.run(reporter, plan)
    if report is None:
        _output(json_, {"event": "report", **plan.to_json()}, lambda: typer.echo(plan_summary(plan)))
        return
    _output(json_, {"event": "report", **report.to_json()}, lambda: print_view(report_view(report)))
    if report.status is Status.GATE_FAILED:
        raise typer.Exit(EXIT_GATE)


@app.command()
def reindex(file: File, set_: Overrides = None, json_: AsJson = False) -> None:
    """Build an index anew with the same model (other windows, dimension, codec, shards), from all that is still valid,
    publish it through the gate, and show what it changes."""
    pipeline = Pipeline.load(file, set_ or ())
    reporter = choose_reporter(json_)
    made = pipeline.plan()
    for warning in made.resolved.warnings:
        reporter.warn(warning)
    if not json_:
        print_view(plan_table(made))
    report, difference = pipeline.reindex(reporter, made)
    if report is None:
        _output(json_, {"event": "reindex", **made.to_json()}, lambda: typer.echo(plan_summary(made)))
        return
    changes = None if difference is None else difference.to_json()
    record = {"event": "reindex", "plan": made.to_json(), "report": report.to_json(), "difference": changes}
    views = [report_view(report), *([difference_view(difference)] if difference else [])]
    _output(json_, record, lambda: print_view(Group(*views)))
    if report.status is Status.GATE_FAILED:
        raise typer.Exit(EXIT_GATE)


@app.command()
def plan(file: File, set_: Overrides = None, json_: AsJson = False) -> None:
    """Show what a run would do, and why, without starting anything."""
    made = Pipeline.load(file, set_ or ()).plan()
    for warning in made.resolved.warnings:
        sys.stderr.write(f"warning: {warning}\n")
    _output(json_, made.to_json(), lambda: print_view(plan_table(made)))


@app.command()
def tune(
    file: File,
    set_: Overrides = None,
    plot: Annotated[Path | None, typer.Option(help="Draw queries per second over bytes into this SVG file.")] = None,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="Measure every configuration on the full sample.")
    ] = False,
    json_: AsJson = False,
) -> None:
    """Measure index configurations on the corpus and show which keep the budget; the next run builds the chosen one."""
    record = Pipeline.load(file, set_ or ()).tune(choose_reporter(json_), exhaustive)
    if plot is not None and "trials" in record:
        plot.write_text(tuning_svg(record))
    elif plot is not None:
        sys.stderr.write(f"--plot ({plot}) is not written: nothing was measured, as {record['why']}\n")
    _output(json_, {"event": "tuning", **record}, lambda: print_view(tuning_view(record)))
    if not record["met"]:
        sys.stderr.write(f"{unmet(record)}\n")
        raise typer.Exit(EXIT_GATE)


@app.command()
def upgrade(
    file: File,
    model: Annotated[str | None, typer.Option(help="The new model; without it, upgrade.model of the file.")] = None,
    until: Annotated[UpgradeStep, typer.Option(help="The last step to do; the next call goes on from there.")] = (
        UpgradeStep.FLIP
    ),
    max_workers: Annotated[int | None, typer.Option(min=1, help="Encoder workers at most.")] = None,
    window: Annotated[str | None, typer.Option(help="Local time of day in which to embed, as in 01:00-06:00.")] = None,
    set_: Overrides = None,
    page: Annotated[Path | None, typer.Option(help="Show the comparison of the models in this HTML file.")] = None,
    json_: AsJson = False,
) -> None:
    """Move an index to another model while it is searched: plan, canary, bridge, backfill, flip."""
    given = {"upgrade.max_workers": max_workers, "upgrade.window": window}
    overrides = [*(set_ or ()), *(f"{name}={value!r}" for name, value in given.items() if value is not None)]
    record = Pipeline.load(file, overrides).upgrade(choose_reporter(json_), model, until)
    if page is not None and "canary" in record:
        page.write_text(canary_page(record["canary"]), "utf-8")
    _output(json_, {"event": "upgrade", **record}, lambda: print_view(upgrade_view(record)))


@app.command("dedup-curve")
def dedup_curve(
    file: File,
    set_: Overrides = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the share removed over the threshold into this SVG file.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="Show pairs near the threshold side by side in this HTML file.")
    ] = None,
    json_: AsJson = False,
) -> None:
    """Show what each similarity would remove as duplicates by meaning."""
    record = Pipeline.load(file, set_ or ()).dedup_curve(choose_reporter(json_))
    if plot is not None:
        plot.write_text(curve_svg(record))
    if page is not None:
        page.write_text(pairs_page(record), "utf-8")
    _output(json_, {"event": "dedup-curve", **record}, lambda: print_view(curve_view(record)))


@app.command()
def bridge(
    file: File,
    model: Annotated[str, typer.Option(help="The new model, named as in embedding.model.", show_default=False)],
    set_: Overrides = None,
    page: Annotated[Path | None, typer.Option(help="Show all that was measured in this HTML file.")] = None,
    passages: Annotated[
        int, typer.Option(min=FEWEST_PASSAGES, help="To draw; those of judged documents come on top.")
    ] = SAMPLE_PASSAGES,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample and of the queries that judge.")] = 0,
    json_: AsJson = False,
) -> None:
    """Try another model on a sample, and fit bridges by which the published index can be asked with it at once."""
    old = Pipeline.load(file, set_ or ())
    new = Pipeline.load(file, [*(set_ or ()), f"embedding.model={model}"])
    record = old.bridge(new, choose_reporter(json_), passages, seed)
    if page is not None:
        page.write_text(canary_page(record), "utf-8")
    _output(json_, {"event": "bridge", **record}, lambda: print_view(bridge_view(record)))
    if not answers_through_bridge(record["bridges"]):
        raise typer.Exit(EXIT_GATE)


@app.command()
def health(
    alias: AliasName,
    root: Root,
    against: Annotated[
        str | None, typer.Option(help="A version of the same index that this one must not have drifted from.")
    ] = None,
    version: Annotated[
        str | None, typer.Option(help="A version of the same index to look at, instead of the alias's.")
    ] = None,
    page: Annotated[Path | None, typer.Option(help="Show figures and plots in this HTML file.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the rows that are looked at.")] = 0,
    json_: AsJson = False,
) -> None:
    """Report on the vector space of the version that an alias points to, or of another; of a mixed one, of its old
    part."""
    catalog, name = find_alias(open_store(root), alias)
    entry = catalog.alias(name)
    version = version or (entry.version if entry else "none")
    for one in [version, *([against] if against else [])]:
        if not catalog.has_manifest(one):
            raise AliasUnknown(
                f"version ({one}) must be a published one of index {catalog.index}; see `penstock versions --root "
                f"{root}`"
            )
    with Session() as session:
        record = HealthCheck(session, choose_reporter(json_), catalog, seed=seed).report(version, against)
    if page is not None:
        page.write_text(health_page(record), "utf-8")
    _output(json_, {"event": "health", **record}, lambda: print_view(health_view(record)))
    if record.get("alarms"):
        sys.stderr.write(f"drift since version {against}: {drift_words(record)}\n")
        raise typer.Exit(EXIT_FAILED)


@app.command()
def search(
    alias: AliasName,
    texts: Annotated[list[str], typer.Argument(help="What to look for; several texts are several queries.")],
    root: Root,
    k: Annotated[int, typer.Option(min=1, help="Answers for each query.")] = 5,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="Only rows that meet this: column=value, column=a,b (one of them), column>=value, column<=value. "
            "May be repeated."
        ),
    ] = None,
    degraded: Annotated[bool, typer.Option("--degraded", help="Answer without shards that are damaged.")] = False,
    duplicates: Annotated[
        bool,
        typer.Option(
            "--with-duplicates", help="Name the passages that an answer stands for: the same text or meaning."
        ),
    ] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
    json_: AsJson = False,
) -> None:
    """Search the version that an alias points to."""
    with open_index(root, alias, trust_remote_code=trust_remote_code) as index:
        found = index.search(texts, k, rows=True, where=parse_where(where or ()), degraded=degraded)
        tables = found.rows or []
        if duplicates:
            links = index.duplicates([name for name in found.ids.ravel() if name is not None])
            tables = [with_duplicates(table, links) for table in tables]
    if found.coverage.missing:
        sys.stderr.write(f"warning: {coverage_text(found.coverage)}\n")
    if json_:
        answers = [{"query": text, "answers": answer_rows(rows)} for text, rows in zip(texts, tables, strict=True)]
        record = {"version": found.version, "coverage": asdict(found.coverage), "results": answers}
        typer.echo(json.dumps(record, ensure_ascii=False, default=str))
        return
    for text, rows in zip(texts, tables, strict=True):
        print_view(answers_view(text, rows))


@app.command()
def versions(
    root: Root, index: Annotated[str | None, typer.Option(help="Only this index.")] = None, json_: AsJson = False
) -> None:
    """List the published versions and the aliases that point to them."""
    store = open_store(root)
    records = [
        record for name in ([index] if index else sorted(store.folders("indexes"))) for record in _versions(store, name)
    ]
    columns = ["index", "version", "aliases", "rows", "recall", "bytes_per_vector", "gate"]
    _output(json_, records, lambda: print_view(records_table(records, columns)))


@app.command()
def diff(
    old: Annotated[str, typer.Argument(help="A version.", show_default=False)],
    new: Annotated[str, typer.Argument(help="A later version of the same index.", show_default=False)],
    root: Root,
    index: Annotated[str | None, typer.Option(help="The index, where several have these versions.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
    json_: AsJson = False,
) -> None:
    """Compare two versions: documents, answers to the same queries, size, recall and latency."""
    store = open_store(root)
    catalog, _ = _catalog_of_version(store, f"{index}/" if index else "", old)
    if not catalog.has_manifest(new):
        raise AliasUnknown(
            f"version ({new}) must be one of index {catalog.index}, as {old} is; see `penstock versions --root {root}`"
        )
    with Session() as session:
        found = compare(store, catalog, old, new, session, choose_reporter(json_), trust_remote_code)
    _output(json_, {"event": "diff", **found.to_json()}, lambda: print_view(difference_view(found)))


@app.command()
def promote(
    alias: AliasName,
    version: Annotated[str, typer.Argument(help="The version that the alias shall point to.", show_default=False)],
    root: Root,
    json_: AsJson = False,
) -> None:
    """Point an alias to a version that passed its gate."""
    store = open_store(root)
    catalog, name = _catalog_of_version(store, alias, version)
    missed = [check for check in catalog.manifest(version)["gate"] if not check["passed"]]
    if missed:
        figures = "; ".join(f"{check['name']} {check['measured']:.4f} against {check['bound']:g}" for check in missed)
        sys.stderr.write(
            f"version {version} failed its gate ({figures}) and is never promoted; if it is the gate that is wrong, "
            "change it in the pipeline file and run that\n"
        )
        raise typer.Exit(EXIT_GATE)
    present = catalog.alias(name)
    number = present.number if present else 0
    _show_move(catalog.move(name, version, expected=number, run_id=new_run_id("promote"), reason="promote"), json_)


@app.command()
def rollback(alias: AliasName, root: Root, json_: AsJson = False) -> None:
    """Point an alias to the version before its present one."""
    catalog, name = find_alias(open_store(root), alias)
    _show_move(catalog.rollback(name, new_run_id("rollback")), json_)


@app.command()
def status(
    root: Root,
    name: Annotated[str | None, typer.Option(help="Only runs of this pipeline.")] = None,
    count: Annotated[int, typer.Option("-n", min=1, help="How many runs.")] = SHOWN_RUNS,
    json_: AsJson = False,
) -> None:
    """Show the last runs and what they did."""
    store = open_store(root)
    records = [record for run_id in run_ids(store, name)[-count:] if (record := read_run(store, run_id)) is not None]
    if json_:
        typer.echo(json.dumps(records, ensure_ascii=False))
        return
    columns = ["run", "started", "status", "documents", "rows", "encoded", "reused", "seconds", "version", "error"]
    print_view(records_table([_status_row(record) for record in records], columns))


@app.command()
def validate(file: File, set_: Overrides = None, json_: AsJson = False) -> None:
    """Check a pipeline file, and that its files, columns and model are there."""
    pipeline = Pipeline.load(file, set_ or ())
    made = pipeline.plan()
    files, fragments = len(made.resolved.files), len(made.resolved.fragments)
    summary = f"{file} is valid; files: {files}, fragments: {fragments}, model: {made.resolved.card.reference}"
    record = {
        "valid": True,
        "warnings": list(made.resolved.warnings),
        "pipeline": pipeline.config.model_dump(mode="json"),
    }
    for warning in made.resolved.warnings:
        sys.stderr.write(f"warning: {warning}\n")
    _output(json_, record, lambda: typer.echo(summary))


@app.command()
def schema() -> None:
    """Print the JSON Schema of the pipeline file, for editors to complete it."""
    typer.echo(json.dumps(PipelineFile.model_json_schema(), indent=2))


@app.command()
def gc(
    root: Root,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Versions to keep; without it, publish.keep of the last run.")
    ] = None,
    grace_hours: Annotated[
        float, typer.Option(help="Leave what is younger, by the store's clock.")
    ] = DEFAULT_GRACE_HOURS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
    json_: AsJson = False,
) -> None:
    """Remove versions and stage outputs that no kept version needs."""
    removals = collect_garbage(open_store(root), keep, grace_hours, dry_run)
    records = [
        {"what": removal.what, "objects": len(removal.paths), "bytes": removal.size_bytes} for removal in removals
    ]
    total = sum(removal.size_bytes for removal in removals)
    verb = "would be removed" if dry_run else "removed"

    def show() -> None:
        if records:
            print_view(records_table(records, ["what", "objects", "bytes"]))
        typer.echo(f"{sum(len(removal.paths) for removal in removals):,} objects, {total:,} bytes {verb}")

    _output(json_, {"dry_run": dry_run, "removed": records, "bytes": total}, show)


def _explain(error: Exception) -> int:
    """Print the message of an exception that has one for people; anything else is a defect and keeps its traceback."""
    for kind, code in EXIT_CODES.items():
        if isinstance(error, kind):
            sys.stderr.write(f"{error}\n")
            return code
    if hasattr(error, "format_message"):  # usage errors of the command line itself
        sys.stderr.write(f"{error.format_message()}\n")
        return EXIT_INVALID
    raise error


def _output(json_: bool, record: Any, show: Callable[[], None]) -> None:  # noqa: ANN401
    if json_:
        typer.echo(json.dumps(record, ensure_ascii=False))
    else:
        show()


def _versions(store: Store, index: str) -> list[dict[str, Any]]:
    catalog = Catalog(store, index)
    heads: dict[str, list[str]] = {}
    for alias in catalog.aliases():
        entry = catalog.alias(alias)
        if entry is not None:
            heads.setdefault(entry.version, []).append(alias)
    return [
        _version(index, version, catalog.manifest(version), heads.get(version, [])) for version in catalog.versions()
    ]


def _version(index: str, version: str, manifest: dict[str, Any], aliases: list[str]) -> dict[str, Any]:
    missed = [check["name"] for check in manifest["gate"] if not check["passed"]]
    return {
        "index": index,
        "version": version,
        "aliases": ", ".join(aliases),
        "rows": manifest["rows"],
        "recall": None if is_mixed(manifest) else round(manifest["evaluation"]["recall"], 4),
        "bytes_per_vector": manifest["bytes_per_vector"],
        "gate": f"failed: {', '.join(missed)}" if missed else "passed" if manifest["gate"] else "none",
        "run_id": manifest["run_id"],
    }


def _catalog_of_version(store: Store, alias: str, version: str) -> tuple[Catalog, str]:
    """The catalog that holds the version; the alias may be a new one."""
    index, _, name = alias.rpartition("/")
    indexes = [index] if index else sorted(store.folders("indexes"))
    holders = [one for one in indexes if Catalog(store, one).has_manifest(version)]
    if len(holders) != 1:
        problem = (
            f"several indexes have it ({', '.join(holders)}); name index/alias"
            if holders
            else "no index has it; see `penstock versions`"
        )
        raise AliasUnknown(f"version ({version}) must be one published under {store.url}: {problem}")
    return Catalog(store, holders[0]), name


def _show_move(entry: AliasEntry, json_: bool) -> None:
    record = {**vars(entry), "modified": entry.modified.isoformat()}
    before = f" (before: {entry.previous})" if entry.previous else ""
    _output(json_, record, lambda: typer.echo(f"alias {entry.alias} points to version {entry.version}{before}"))


def _status_row(record: dict[str, Any]) -> dict[str, Any]:
    report: dict[str, Any] = record.get("report", {})
    stages = {stage["stage"]: stage for stage in report.get("stages", [])}
    embeddings: dict[str, Any] = stages.get("embeddings", {})
    return {
        "run": record["run_id"],
        "started": record["started"],
        "status": record["status"],
        "documents": report.get("documents"),
        "rows": report.get("rows"),
        "encoded": embeddings.get("encoded"),
        "reused": embeddings["rows_in"] - embeddings["encoded"] if embeddings else None,
        "seconds": report.get("seconds"),
        "version": record.get("version"),
        "error": record.get("error"),
    }


if __name__ == "__main__":
    main()
