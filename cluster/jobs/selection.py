"""Which passages stay: one document per id, one passage per normalised text, decided over the whole corpus.

Both are joins on a hash. A task takes one bucket of the hash space over all fragments: first the hashes alone (8
bytes a row), then the rows
of those that repeat. The outcome is the list of exclusions, usually short, sorted by fragment.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from penstock.cluster.fragments import Receipt, open_fragment, read_fragment, read_receipt, write_fragment
from penstock.cluster.layout import PASSAGES, SELECTION, fragment_path, stage_folder
from penstock.cluster.node import connect
from penstock.cluster.storage import Store
from penstock.operators.deduplication import (
    DuplicateIds,
    bucket_of,
    hash_prefix,
    losing_documents,
    repeated,
    represented,
)
from penstock.operators.identity import row_hashes

OPERATOR_VERSION = 2
# Rows of one bucket: 16 bytes each, three copies while sorting: about 200 MB at most in a worker.
BUCKET_ROWS = 4_000_000
DUPLICATE_ID = "duplicate_id"
DUPLICATE_TEXT = "duplicate_text"
MAX_EXAMPLES = 5

EXCLUSION_SCHEMA = pa.schema(
    [
        ("fragment", pa.string()),
        ("passage_id", pa.string()),
        ("row_hash", pa.uint64()),
        ("document_id", pa.string()),
        ("source", pa.string()),
        ("position", pa.int64()),
        ("tokens", pa.int32()),
        ("reason", pa.string()),
        ("represented_by", pa.string()),
    ]
)
LOSER_SCHEMA = pa.schema(
    [("fragment", pa.string()), ("document_id", pa.string()), ("source", pa.string()), ("position", pa.int64())]
)


class DuplicateDocumentIds(Exception):
    """Documents share an id and the pipeline file says that this is an error."""


@dataclass(frozen=True)
class SelectionJob:
    """What all buckets share. `fragments` are the passages fragments, sorted."""

    root: str
    passages_fingerprint: str
    fingerprint: str
    fragments: tuple[str, ...]
    buckets: int
    duplicate_ids: DuplicateIds
    deduplicate: bool


@dataclass(frozen=True)
class ReceiptsTask:
    """Fragments of a stage whose receipts are wanted."""

    root: str
    stage: str
    fingerprint: str
    fragments: tuple[str, ...]


@dataclass(frozen=True)
class BucketTask:
    job: SelectionJob
    bucket: int


@dataclass(frozen=True)
class DocumentsResolved:
    """Fragments that hold losing documents, and a few examples of shared ids."""

    losing_fragments: dict[str, int] = field(default_factory=dict)
    examples: tuple[str, ...] = ()
    repeated_ids: int = 0


@dataclass(frozen=True)
class Exclusions:
    """What a fragment loses, mergeable over buckets: counts, tokens and an order-free digest of the passage ids."""

    duplicate_ids: int = 0
    duplicate_texts: int = 0
    tokens: int = 0
    digest: int = 0

    def merge(self, other: "Exclusions") -> "Exclusions":
        return Exclusions(
            self.duplicate_ids + other.duplicate_ids,
            self.duplicate_texts + other.duplicate_texts,
            self.tokens + other.tokens,
            (self.digest + other.digest) % 2**64,
        )

    @property
    def rows(self) -> int:
        return self.duplicate_ids + self.duplicate_texts


def bucket_count(rows: int) -> int:
    return max(1, -(-rows // BUCKET_ROWS))


def read_receipts(task: ReceiptsTask) -> list[Receipt]:
    """Receipts of fragments, from their footers."""
    store = connect(task.root)
    return [read_receipt(store, fragment_path(task.stage, task.fingerprint, fragment)) for fragment in task.fragments]


def resolve_documents(task: BucketTask) -> DocumentsResolved:
    """Find documents with the same id; write the losing ones of this bucket."""
    job = task.job
    candidates = _repeating(task, "document_hash", ["document_id", "source", "position"], first_passages=True)
    counts = candidates.group_by("document_id").aggregate([("document_id", "count")])
    shared = counts.filter(pc.greater(counts.column("document_id_count"), 1))
    candidates = candidates.filter(
        pc.is_in(candidates.column("document_id"), shared.column("document_id").combine_chunks())
    )
    if candidates.num_rows == 0:
        return DocumentsResolved()
    if job.duplicate_ids is DuplicateIds.ERROR:
        return DocumentsResolved(examples=_examples(candidates), repeated_ids=shared.num_rows)
    losers = losing_documents(candidates, job.duplicate_ids).select(LOSER_SCHEMA.names).sort_by("fragment")
    write_fragment(connect(job.root), _bucket_path(job, "losers", task.bucket), losers)
    return DocumentsResolved(losing_fragments=_count(losers.column("fragment")), repeated_ids=shared.num_rows)


def resolve_passages(task: tuple[BucketTask, frozenset[str]]) -> dict[str, Exclusions]:
    """Find passages that do not stay, of this bucket; the set names the fragments with losing documents."""
    bucket, losing = task
    job = bucket.job
    losers = _losing_passages(bucket, losing)
    tables = [losers]
    if job.deduplicate:
        columns = ["passage_id", "row_hash", "document_id", "ordinal", "source", "position", "tokens", "normal_hash"]
        candidates = _repeating(bucket, "normal_hash", columns)
        duplicates = represented(without(candidates, losers), "normal_hash")
        reason = pa.array([DUPLICATE_TEXT] * duplicates.num_rows, pa.string())
        tables.append(duplicates.append_column("reason", reason).select(EXCLUSION_SCHEMA.names).cast(EXCLUSION_SCHEMA))
    exclusions = pa.concat_tables(tables).sort_by([("fragment", "ascending"), ("row_hash", "ascending")])
    if exclusions.num_rows:
        write_fragment(connect(job.root), _bucket_path(job, "exclusions", bucket.bucket), exclusions)
    return _summarise(exclusions)


def exclusion_files(store: Store, root_fingerprint: str) -> list[str]:
    """Paths of the exclusion files of a selection, sorted."""
    folder = stage_folder(SELECTION, root_fingerprint)
    return sorted(f"{folder}/{name}" for name in store.names(folder) if name.startswith("exclusions-"))


def excluded_of(store: Store, fingerprint: str, fragment: str) -> pa.Table:
    """The exclusions (EXCLUSION_SCHEMA) of one passages fragment, reading only the row groups that may hold them."""
    tables = [EXCLUSION_SCHEMA.empty_table()]
    for path in exclusion_files(store, fingerprint):
        with store.open(path) as stream:
            tables.append(
                pq.read_table(stream, filters=[("fragment", "==", fragment)], page_checksum_verification=True)
            )
    return pa.concat_tables([table.replace_schema_metadata() for table in tables])


def kept_rows(store: Store, table: pa.Table, selection: str, fragment: str) -> pa.Table:
    """The passages of a fragment's `table` (with passage_id, source, position) that stay, in their order."""
    return without(table, excluded_of(store, selection, fragment))


def without(table: pa.Table, excluded: pa.Table) -> pa.Table:
    """The rows of `table` that `excluded` does not name. Documents that share an id share passage ids too: only
    source and
    position tell their passages apart."""
    suspects = pc.is_in(table.column("passage_id"), excluded.column("passage_id").combine_chunks())
    stays = ~suspects.to_numpy(zero_copy_only=False)
    names = ["passage_id", "source", "position"]
    excluded_rows = {tuple(row.values()) for row in excluded.select(names).to_pylist()}
    places = np.flatnonzero(~stays)
    rows = table.select(names).take(pa.array(places)).to_pylist()
    stays[places] = [tuple(row.values()) not in excluded_rows for row in rows]
    return table.filter(pa.array(stays))


def _repeating(task: BucketTask, key: str, columns: list[str], first_passages: bool = False) -> pa.Table:
    """Rows of this bucket whose key occurs more than once in the corpus, with their fragment: two passes over the
    fragments."""
    job, store = task.job, connect(task.job.root)
    hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int32)]
    for number, (_, values) in enumerate(_keys(store, task, key, first_passages)):
        hashes.append(values)
        owners.append(np.full(len(values), number, np.int32))
    joined = np.concatenate(hashes)
    wanted = repeated(joined)
    holders = np.unique(np.concatenate(owners)[np.isin(joined, wanted)])
    read = [*columns, *(name for name in (key, "ordinal") if name not in columns)]
    tables = []
    for number in holders:
        fragment = job.fragments[number]
        table = read_fragment(store, fragment_path(PASSAGES, job.passages_fingerprint, fragment), read)
        table = table.filter(pa.array(np.isin(_key_values(table.column(key)), wanted)))
        if first_passages:
            table = table.filter(pc.equal(table.column("ordinal"), 0))
        tables.append(table.append_column("fragment", pa.array([fragment] * table.num_rows, pa.string())))
    return pa.concat_tables(tables) if tables else _empty(store, job, read)


def _keys(store: Store, task: BucketTask, key: str, first_passages: bool) -> Iterator[tuple[str, np.ndarray]]:
    columns = [key, "ordinal"] if first_passages else [key]
    for fragment in task.job.fragments:
        table = read_fragment(store, fragment_path(PASSAGES, task.job.passages_fingerprint, fragment), columns)
        if first_passages:
            table = table.filter(pc.equal(table.column("ordinal"), 0))
        values = _key_values(table.column(key))
        yield fragment, values[bucket_of(values, task.job.buckets) == task.bucket]


def _key_values(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_uint64(column.type):
        values: np.ndarray = column.to_numpy()
        return values
    return hash_prefix(column)


def _empty(store: Store, job: SelectionJob, columns: list[str]) -> pa.Table:
    if not job.fragments:
        raise ValueError("selection needs at least one passages fragment, got none")
    with open_fragment(store, fragment_path(PASSAGES, job.passages_fingerprint, job.fragments[0])) as file:
        schema = pa.schema([file.schema_arrow.field(name) for name in columns])
    return schema.append(pa.field("fragment", pa.string())).empty_table()


def _losing_passages(task: BucketTask, losing: frozenset[str]) -> pa.Table:
    """The passages of losing documents in this bucket of normal_hash."""
    job, store = task.job, connect(task.job.root)
    tables = [EXCLUSION_SCHEMA.empty_table()]
    for fragment in sorted(losing):
        losers = _losers_of(store, job, fragment)
        columns = ["passage_id", "row_hash", "document_id", "source", "position", "tokens", "normal_hash"]
        table = read_fragment(store, fragment_path(PASSAGES, job.passages_fingerprint, fragment), columns)
        table = table.filter(pa.array(bucket_of(hash_prefix(table.column("normal_hash")), job.buckets) == task.bucket))
        table = table.join(losers, ["document_id", "source", "position"], join_type="left semi")
        extra = {"fragment": fragment, "reason": DUPLICATE_ID, "represented_by": None}
        for name, value in extra.items():
            table = table.append_column(name, pa.array([value] * table.num_rows, pa.string()))
        tables.append(table.select(EXCLUSION_SCHEMA.names).cast(EXCLUSION_SCHEMA))
    return pa.concat_tables(tables)


def _losers_of(store: Store, job: SelectionJob, fragment: str) -> pa.Table:
    folder = stage_folder(SELECTION, job.fingerprint)
    tables = [LOSER_SCHEMA.empty_table()]
    for name in sorted(name for name in store.names(folder) if name.startswith("losers-")):
        with store.open(f"{folder}/{name}") as stream:
            table = pq.read_table(stream, filters=[("fragment", "==", fragment)], page_checksum_verification=True)
            tables.append(table.replace_schema_metadata())
    return pa.concat_tables(tables).select(["document_id", "source", "position"])


def _summarise(exclusions: pa.Table) -> dict[str, Exclusions]:
    """Exclusions per fragment of a table sorted by fragment."""
    fragments = np.array(exclusions.column("fragment").to_pylist(), dtype=object)
    hashes = _exclusion_hashes(exclusions)
    tokens = exclusions.column("tokens").to_numpy()
    by_id = np.array([reason == DUPLICATE_ID for reason in exclusions.column("reason").to_pylist()], dtype=bool)
    result: dict[str, Exclusions] = {}
    starts = (
        [0, *(np.flatnonzero(fragments[1:] != fragments[:-1]) + 1).tolist(), len(fragments)] if len(fragments) else [0]
    )
    for start, stop in zip(starts, starts[1:], strict=False):
        ids = int(by_id[start:stop].sum())
        digest = int(hashes[start:stop].sum(dtype=np.uint64))
        result[str(fragments[start])] = Exclusions(ids, stop - start - ids, int(tokens[start:stop].sum()), digest)
    return result


def _exclusion_hashes(exclusions: pa.Table) -> np.ndarray:
    """Hash of each excluded passage, uint64 (N,). Passages of documents that share an id differ by source and
    position alone."""
    rows = exclusions.select(["passage_id", "source", "position"]).to_pylist()
    return row_hashes([f"{row['passage_id']}\0{row['source']}\0{row['position']}" for row in rows])


def _examples(candidates: pa.Table) -> tuple[str, ...]:
    ordered = candidates.sort_by([("document_id", "ascending"), ("source", "ascending"), ("position", "ascending")])
    places: dict[str, list[str]] = {}
    for row in ordered.to_pylist():
        places.setdefault(row["document_id"], []).append(f"{row['source']} row {row['position']}")
        if len(places) > MAX_EXAMPLES:
            break
    return tuple(f"{name!r} in {' and '.join(where[:3])}" for name, where in list(places.items())[:MAX_EXAMPLES])


def _count(column: pa.ChunkedArray) -> dict[str, int]:
    return {item["values"]: item["counts"] for item in column.value_counts().to_pylist()}


def _bucket_path(job: SelectionJob, kind: str, bucket: int) -> str:
    return f"{stage_folder(SELECTION, job.fingerprint)}/{kind}-{bucket:05d}.parquet"
