"""Exact search among the rows that stay, for several removals in one pass over the vectors.

A removal takes passages by themselves, or documents with all of theirs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import assert_never

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from penstock.cluster.fragments import read_fragment, vectors_of
from penstock.cluster.jobs.document_pairs import DocumentJob, passage_links
from penstock.cluster.jobs.evaluation import Queries
from penstock.cluster.jobs.removal import RemovalJob, removed_rows
from penstock.cluster.layout import EMBEDDINGS, fragment_path
from penstock.cluster.node import connect
from penstock.cluster.storage import Store
from penstock.operators.evaluation import Neighbours, exact_neighbours, merge_neighbours
from penstock.operators.identity import row_hashes
from penstock.operators.indexing import Metric
from penstock.operators.sorted_places import places_among

MOST_REMOVALS = 63  # bits of a row's fate


@dataclass(frozen=True)
class StayTask:
    """Search some fragments exactly, without what each of some removals took.

    Attributes:
        documents: of which to name the passages.
    """

    root: str
    embeddings_fingerprint: str
    fragments: tuple[str, ...]
    removals: tuple[RemovalJob | DocumentJob, ...]
    queries: Queries
    k: int
    metric: Metric
    documents: frozenset[str] = frozenset()


@dataclass(frozen=True)
class StayFound:
    """The nearest of all rows, then those of the rows that stay after each removal; and passages of the documents."""

    neighbours: tuple[Neighbours, ...]
    passages: tuple[str, ...]

    def merged(self, other: "StayFound", k: int) -> "StayFound":
        """Those of both their fragments."""
        pairs = zip(self.neighbours, other.neighbours, strict=True)
        return StayFound(tuple(merge_neighbours(pair, k) for pair in pairs), self.passages + other.passages)


@dataclass(frozen=True)
class RepresentedTask:
    """Which of the rows uint64 (n,), ascending, a removal took; of documents where `whole`."""

    removal: RemovalJob | DocumentJob
    rows: np.ndarray
    whole: bool = False


@dataclass(frozen=True)
class CountTask:
    """Count the documents of fragments, each of which has its own whole, that each of some removals took."""

    root: str
    embeddings_fingerprint: str
    fragments: tuple[str, ...]
    removals: tuple[DocumentJob, ...]


def search_stays(task: StayTask) -> StayFound:
    """The exact neighbours after each removal. Every row is compared once: rows that the same removals took are
    searched together, and what each removal left is put together from these.

    Memory: a fragment, 24 bytes for each row of all fragments, what goes of one bucket of rows, and neighbours for each
    such group. What each removal took is read once.

    Raises:
        ValueError: more than MOST_REMOVALS removals.
    """
    if len(task.removals) > MOST_REMOVALS:
        raise ValueError(
            f"removals ({len(task.removals)}) must be at most {MOST_REMOVALS} in one pass; search in several"
        )
    store, queries = connect(task.root), task.queries
    found: dict[int, Neighbours] = {}
    passages: list[str] = []
    fates = _Fates(store, task)
    for fragment in task.fragments:
        table = _read(store, task.embeddings_fingerprint, fragment, ["row_hash", "passage_id", "embedding"])
        ids, vectors = table.column("passage_id").combine_chunks(), vectors_of(table.column("embedding"))
        passages += _passages(ids, task.documents)
        own = fates.of(table.column("row_hash").to_numpy(), ids)
        for fate in np.unique(own).tolist():
            rows = np.flatnonzero(own == fate)
            batch = (ids.take(pa.array(rows)), vectors[rows])
            near = exact_neighbours(queries.vectors, [batch], task.k, task.metric, queries.exclude)
            found[fate] = merge_neighbours([found[fate], near], task.k) if fate in found else near
    return StayFound(tuple(_left(task, found, bit) for bit in range(-1, len(task.removals))), tuple(passages))


def represented(task: RepresentedTask) -> tuple[np.ndarray, np.ndarray]:
    """Rows that went and those that represent them: uint64 (g,) both. Passages of documents that went are represented
    by the similar ones that they are linked to."""
    gone, kept = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    for table in _represented(connect(task.removal.root), task):
        wanted = np.isin(table.column("removed").to_numpy(), task.rows)
        gone.append(table.column("removed").to_numpy()[wanted])
        kept.append(table.column("kept").to_numpy()[wanted])
    return np.concatenate(gone), np.concatenate(kept)


def count_gone(task: CountTask) -> np.ndarray:
    """Documents int64 (t + 1, 2) of the fragments and their passages: all, and those that each removal took. Memory: 24
    bytes for each document, a fragment's ids, and what goes of one bucket. What each removal took is read once."""
    store = connect(task.root)
    found, counted = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for fragment in task.fragments:
        ids = _read(store, task.embeddings_fingerprint, fragment, ["passage_id"]).column("passage_id")
        documents, passages = np.unique(_document_hashes(ids.combine_chunks()), return_counts=True)
        found.append(documents)
        counted.append(passages)
    documents, passages = np.concatenate(found), np.concatenate(counted)
    order = np.argsort(documents)
    documents, passages = documents[order], passages[order]
    counts = [(len(documents), int(passages.sum()))]
    for removal in task.removals:
        went = _taken(store, removal.removal, documents)
        counts.append((int(np.count_nonzero(went)), int(passages[went].sum())))
    return np.array(counts, np.int64)


def _represented(store: Store, task: RepresentedTask) -> Iterator[pa.Table]:
    match task.removal:
        case RemovalJob():
            return removed_rows(store, task.removal)
        case DocumentJob():
            return removed_rows(store, task.removal.removal) if task.whole else passage_links(store, task.removal)
        case _:
            assert_never(task.removal)


class _Fates:
    """Which removals took the rows of the fragments of a task: a bit for each."""

    def __init__(self, store: Store, task: StayTask) -> None:
        kinds = [isinstance(removal, DocumentJob) for removal in task.removals]
        self._rows = _hashes(store, task, documents=False) if not all(kinds) else np.empty(0, np.uint64)
        self._documents = _hashes(store, task, documents=True) if any(kinds) else np.empty(0, np.uint64)
        self._row_fates = np.zeros(len(self._rows), np.int64)
        self._document_fates = np.zeros(len(self._documents), np.int64)
        for bit, removal in enumerate(task.removals):
            match removal:
                case RemovalJob():
                    self._row_fates |= _taken(store, removal, self._rows).astype(np.int64) << bit
                case DocumentJob():
                    taken = _taken(store, removal.removal, self._documents)
                    self._document_fates |= taken.astype(np.int64) << bit
                case _:
                    assert_never(removal)

    def of(self, hashes: np.ndarray, ids: pa.Array) -> np.ndarray:
        """Those of rows of a fragment, of which `ids` are the names: int64 (n,)."""
        fates = np.zeros(len(hashes), np.int64)
        if len(self._rows):
            fates |= self._row_fates[np.searchsorted(self._rows, hashes)]
        if len(self._documents):
            fates |= self._document_fates[np.searchsorted(self._documents, _document_hashes(ids))]
        return fates


def _hashes(store: Store, task: StayTask, documents: bool) -> np.ndarray:
    """The hashes of the rows of all fragments, or of their documents: ascending uint64 (n,)."""
    found = [np.empty(0, np.uint64)]
    for fragment in task.fragments:
        column = _read(
            store, task.embeddings_fingerprint, fragment, ["passage_id" if documents else "row_hash"]
        ).column(0)
        found.append(np.unique(_document_hashes(column.combine_chunks()) if documents else column.to_numpy()))
    return np.unique(np.concatenate(found))


def _read(store: Store, embeddings_fingerprint: str, fragment: str, columns: list[str]) -> pa.Table:
    return read_fragment(store, fragment_path(EMBEDDINGS, embeddings_fingerprint, fragment), columns)


def _taken(store: Store, removal: RemovalJob, ascending: np.ndarray) -> np.ndarray:
    """Which of some hashes uint64 (n,), ascending, a removal took, bool (n,)."""
    taken = np.zeros(len(ascending), bool)
    for table in removed_rows(store, removal):
        taken[places_among(ascending, table.column("removed").to_numpy())[1]] = True
    return taken


def _document_hashes(ids: pa.Array) -> np.ndarray:
    """The hashes uint64 (n,) of the documents of some passages."""
    of = pc.replace_substring_regex(ids, "#[^#]*$", "").dictionary_encode()
    hashes: np.ndarray = row_hashes(of.dictionary.to_pylist())[of.indices.to_numpy()]
    return hashes


def _left(task: StayTask, found: dict[int, Neighbours], bit: int) -> Neighbours:
    """The nearest of the rows that a removal left; of all rows where `bit` is -1."""
    left = [near for fate, near in sorted(found.items()) if bit < 0 or not fate >> bit & 1]
    nobody = Neighbours(
        np.full((len(task.queries.ids), task.k), None, object),
        np.full((len(task.queries.ids), task.k), np.nan, np.float32),
    )
    return merge_neighbours(left, task.k) if left else nobody


def _passages(ids: pa.Array, documents: frozenset[str]) -> list[str]:
    """Those of some passages that are of the documents."""
    if not documents:
        return []
    of = pc.replace_substring_regex(ids, "#[^#]*$", "")
    found: list[str] = ids.filter(pc.is_in(of, pa.array(sorted(documents), of.type))).to_pylist()
    return found
