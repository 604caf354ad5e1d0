"""The rows of a shard: embeddings with their passages, fragment by fragment."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from penstock.cluster.fragments import open_fragment, read_hash_range
from penstock.cluster.jobs.selection import kept_rows
from penstock.cluster.layout import EMBEDDINGS, PASSAGES, fragment_path
from penstock.cluster.storage import Store

EMBEDDED_COLUMNS = ("passage_id", "text_hash", "embedding")


@dataclass(frozen=True)
class FragmentPair:
    """An embeddings fragment, the passages fragment it was made of, and whether any of its passages are excluded."""

    passages: str
    embeddings: str
    has_exclusions: bool


@dataclass(frozen=True)
class RowSource:
    """Where passages that stay, and their embeddings, are read from."""

    root: str
    passages_fingerprint: str
    selection_fingerprint: str
    embeddings_fingerprint: str


def read_rows(store: Store, source: RowSource, pair: FragmentPair, first: int, last: int) -> tuple[pa.Table, pa.Table]:
    """(embeddings, passages) of a fragment with first <= row_hash <= last, aligned and in order of hashes.

    Raises:
        ValueError: they are not of the same rows.
    """
    path = fragment_path(EMBEDDINGS, source.embeddings_fingerprint, pair.embeddings)
    embedded = read_hash_range(store, path, first, last, EMBEDDED_COLUMNS).replace_schema_metadata()
    passages = _passages(store, source, pair, first, last)
    if embedded.num_rows == 0:
        return embedded, passages.slice(0, 0)
    return embedded.combine_chunks(), _aligned(passages, embedded)


def read_slices(
    store: Store, source: RowSource, pairs: tuple[FragmentPair, ...], first: int, last: int
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """What read_rows gives for each fragment that holds any such rows; one empty pair where none does."""
    return or_one_empty(read_rows(store, source, pair, first, last) for pair in pairs)


def or_one_empty(pairs: Iterable[tuple[pa.Table, pa.Table]]) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Those of (embeddings, passages) that have rows; the first without any where none has."""
    found, nothing = False, None
    for rows in pairs:
        if rows[0].num_rows:
            found = True
            yield rows
        elif nothing is None:
            nothing = rows
    if not found and nothing is not None:
        yield nothing


def _passages(store: Store, source: RowSource, pair: FragmentPair, first: int, last: int) -> pa.Table:
    """The passages of a fragment in a range that stay, with all their columns."""
    path = fragment_path(PASSAGES, source.passages_fingerprint, pair.passages)
    with open_fragment(store, path) as file:
        columns = file.schema_arrow.names
    table = read_hash_range(store, path, first, last, columns).replace_schema_metadata()
    return kept_rows(store, table, source.selection_fingerprint, pair.passages) if pair.has_exclusions else table


def _aligned(passages: pa.Table, embedded: pa.Table) -> pa.Table:
    """The passages of the embedded rows, in their order; both are sorted the same way, the passages may be more."""
    kept = passages.filter(pc.is_in(passages.column("passage_id"), embedded.column("passage_id").combine_chunks()))
    if any(not kept.column(name).equals(embedded.column(name)) for name in ("passage_id", "text_hash")):
        raise ValueError(
            "embeddings and passages of a fragment must agree row by row; they do not: rebuild the fragment"
        )
    return kept.combine_chunks()
