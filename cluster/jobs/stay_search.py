"""Exact search among the rows that stay, for several removals in one pass over the vectors.

A removal takes passages by themselves, or documents with all of theirs.
"""

from collections.abc import Iterator, Sequence
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
    """Count the documents of a fragment, which has them whole, that each of some removals took."""

    root: str
    embeddings_fingerprint: str
    fragment: str
    removals: tuple[DocumentJob, ...]


def search_stays(task: StayTask) -> StayFound:
    """The exact neighbours after each removal. Every row is compared once: rows that the same removals took are
    searched together, and what each removal left is put together from these.

    Memory: a fragment, what goes of one bucket of rows, and neighbours for each such group.

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
    for fragment in task.fragments:
        path = fragment_path(EMBEDDINGS, task.embeddings_fingerprint, fragment)
        table = read_fragment(store, path, ["row_hash", "passage_id", "embedding"])
        ids, vectors = table.column("passage_id").combine_chunks(), vectors_of(table.column("embedding"))
        passages += _passages(ids, task.documents)
        fates = _fates(store, task.removals, table.column("row_hash").to_numpy(), ids)
        for fate in np.unique(fates).tolist():
            rows = np.flatnonzero(fates == fate)
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
    """Documents int64 (t + 1, 2) of the fragment and their passages: all, and those that each removal took."""
    store = connect(task.root)
    path = fragment_path(EMBEDDINGS, task.embeddings_fingerprint, task.fragment)
    ids = read_fragment(store, path, ["passage_id"]).column("passage_id").combine_chunks()
    documents, passages = np.unique(_document_hashes(ids), return_counts=True)
    counts = [(len(documents), len(ids))]
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


def _fates(store: Store, removals: Sequence[RemovalJob | DocumentJob], hashes: np.ndarray, ids: pa.Array) -> np.ndarray:
    """Which removals took each row, of which `ids` are the names: a bit for each, int64 (n,)."""
    fates = np.zeros(len(hashes), np.int64)
    documents = _document_hashes(ids) if any(isinstance(one, DocumentJob) for one in removals) else hashes
    for bit, removal in enumerate(removals):
        match removal:
            case RemovalJob():
                taken = _taken(store, removal, hashes)
            case DocumentJob():
                taken = _taken(store, removal.removal, documents)
            case _:
                assert_never(removal)
        fates |= taken.astype(np.int64) << bit
    return fates


def _taken(store: Store, removal: RemovalJob, hashes: np.ndarray) -> np.ndarray:
    """Which of some hashes (n,) a removal took, bool (n,)."""
    taken = np.zeros(len(hashes), bool)
    for table in removed_rows(store, removal):
        taken |= np.isin(hashes, table.column("removed").to_numpy())
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
