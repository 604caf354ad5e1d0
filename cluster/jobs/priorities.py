"""Passages fragments → how much each is asked for, which decides in what order they are embedded again; and the most
wanted documents of each as a fragment of their own, a slice, which goes before the rest of it.

Documents that are asked for lie scattered: in the order of whole fragments they come hardly sooner than at random.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from penstock.cluster.fragments import read_fragment
from penstock.cluster.jobs.canary_sample import SampleFragment, of_places, write_passages
from penstock.cluster.jobs.selection import excluded_of, without
from penstock.cluster.layout import PASSAGES, documents_path, fragment_path
from penstock.cluster.node import connect
from penstock.cluster.storage import Store
from penstock.operators.backfill_order import Priorities, first_wanted, of_hubs
from penstock.operators.identity import row_hashes

PLACE = ["passage_id", "source", "position"]
MOST_VISITS = 1e15  # of a row; sums over all rows of a corpus stay finite


@dataclass(frozen=True)
class PriorityJob:
    """What all fragments share.

    Attributes:
        traffic: a kept column of numbers, or None.
        asked: how often documents are asked for, by id.
        found: how many others the passages of a document are among the neighbours of, together, by id.
        residuals: how far the adapter misses documents, those of the sample, by id.
        late: whether passages are embedded within their documents, which then belong to a slice.
    """

    root: str
    passages_fingerprint: str
    selection_fingerprint: str
    traffic: str | None = None
    asked: Mapping[str, float] = field(default_factory=dict)
    found: Mapping[str, float] = field(default_factory=dict)
    residuals: Mapping[str, float] = field(default_factory=dict)
    late: bool = False


@dataclass(frozen=True)
class PriorityTask:
    """Some fragments, and which of them have passages that selection leaves out."""

    job: PriorityJob
    fragments: tuple[str, ...]
    excluding: frozenset[str] = frozenset()


@dataclass(frozen=True)
class UnitPriority:
    """What is known of a slice of a fragment, or of the rest of it, which is all of it where it has no slice.

    Attributes:
        rows: passages that stay.
        traffic, occurrences: sums over these; occurrences of hubs alone.
        residual: the mean of the documents that have one; None without any.
        slice: what was written; None for the rest.
    """

    fragment: str
    rows: int
    traffic: float
    occurrences: float
    residual: float | None
    slice: SampleFragment | None = None


@dataclass(frozen=True, eq=False)
class _Documents:
    """The n documents of a fragment: float64 (n,), sums over their passages that stay; NaN for no residual.

    Attributes:
        whole: bool (n,), whether all passages of a document stay.
    """

    names: pa.Array
    rows: np.ndarray
    traffic: np.ndarray
    occurrences: np.ndarray
    residuals: np.ndarray
    whole: np.ndarray

    def wanted(self) -> np.ndarray:
        """Which of them make a slice: bool (n,)."""
        hashes = row_hashes(self.names.to_pylist())
        priorities = Priorities(hashes, self.traffic / self.rows, self.occurrences / self.rows)
        return first_wanted(priorities, self.rows, self.whole)

    def unit(self, fragment: str, chosen: np.ndarray, slice_: SampleFragment | None = None) -> UnitPriority:
        known = chosen & ~np.isnan(self.residuals)
        residual = float(self.residuals[known].mean()) if known.any() else None
        rows, traffic, occurrences = (
            float(values[chosen].sum()) for values in (self.rows, self.traffic, self.occurrences)
        )
        return UnitPriority(fragment, int(rows), traffic, occurrences, residual, slice_)


def fragment_priorities(task: PriorityTask) -> list[UnitPriority]:
    """What is known of each fragment, the slice of one before its rest; writes slices, those that are there stay.

    Memory: the fragment, where it has a slice, and what is known of documents.

    Raises:
        ValueError: traffic that is no number.
    """
    return [unit for fragment in task.fragments for unit in _units(task.job, fragment, fragment in task.excluding)]


def _units(job: PriorityJob, fragment: str, excluding: bool) -> list[UnitPriority]:
    store = connect(job.root)
    documents = _documents(job, store, fragment, excluding)
    wanted = documents.wanted()
    rest = documents.unit(fragment, ~wanted)
    if not wanted.any():
        return [rest]
    return [documents.unit(fragment, wanted, _slice(job, store, fragment, documents.names.filter(wanted))), rest]


def _documents(job: PriorityJob, store: Store, fragment: str, excluding: bool) -> _Documents:
    columns = ["document_id", *([job.traffic] if job.traffic is not None else []), *(PLACE if excluding else [])]
    table = read_fragment(store, fragment_path(PASSAGES, job.passages_fingerprint, fragment), columns)
    torn = pa.array([], pa.string())
    if excluding:
        excluded = excluded_of(store, job.selection_fingerprint, fragment)
        table, torn = without(table, excluded), excluded.column("document_id").combine_chunks()
    encoded = table.column("document_id").combine_chunks().dictionary_encode()
    names, of_row = encoded.dictionary, encoded.indices.to_numpy()
    rows = np.bincount(of_row, minlength=len(names)).astype(np.float64)
    traffic = rows * _of(names, job.asked)
    if job.traffic is not None:
        visits = _traffic(table.column(job.traffic), job.traffic)
        traffic += np.bincount(of_row, weights=visits, minlength=len(names))
    whole = ~pc.is_in(names, value_set=torn).to_numpy(zero_copy_only=False)
    residuals = _of(names, job.residuals, np.nan)
    return _Documents(names, rows, traffic, of_hubs(_of(names, job.found), rows), residuals, whole)


def _of(names: pa.Array, values: Mapping[str, float], missing: float = 0.0) -> np.ndarray:
    if not values:
        return np.full(len(names), missing)
    return np.array([values.get(name, missing) for name in names.to_pylist()], np.float64)


def _traffic(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """float64 (rows,); rows without a value, and negative ones, count as 0, infinite ones as MOST_VISITS."""
    if not pa.types.is_integer(column.type) and not pa.types.is_floating(column.type):
        raise ValueError(f"upgrade.traffic ({name}) must be a column of numbers, got {column.type}; name another")
    visits: np.ndarray = np.nan_to_num(pc.fill_null(column, 0).to_numpy().astype(np.float64)).clip(0, MOST_VISITS)
    return visits


def _slice(job: PriorityJob, store: Store, fragment: str, names: pa.Array) -> SampleFragment:
    """The passages of some documents, all of which stay, as a fragment of the same stage."""
    stage = job.passages_fingerprint
    table = read_fragment(store, fragment_path(PASSAGES, stage, fragment)).replace_schema_metadata()
    table = table.filter(pc.is_in(table.column("document_id"), value_set=names))
    documents = of_places(read_fragment(store, documents_path(stage, fragment)), [table]) if job.late else None
    return write_passages(store, stage, table, documents)
