"""Search one shard, merge the answers of many, and read and write the vectors that candidates are re-ranked with."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import faiss
import numpy as np
import pyarrow as pa

from penstock.operators.indexing import FaissObject, FixedBatches, Metric, core_index, similarities

VECTOR_COLUMN = "vector"
VECTOR_TYPES: dict[type[np.floating[Any]], pa.DataType] = {np.float16: pa.float16(), np.float32: pa.float32()}
STORED_BATCH_ROWS = 16_384  # 32 MiB of 1,024 float16; the file does not depend on the batches it was given
UNIT_LENGTH_TOLERANCE = 1e-2  # float16 rounds each component by up to 2^-11, so lengths by less than 5e-4
_faiss: Any = faiss  # for the search parameter classes that the type stubs of faiss 1.15 leave out


@dataclass(frozen=True)
class SearchParameters:
    """How to search: what an operating point stores. None leaves a knob that the index family lacks.

    `rerank_factor` times k candidates are compared again by their stored vectors.
    """

    ef_search: int | None = None
    nprobe: int | None = None
    rerank_factor: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")

    def to_json(self) -> dict[str, int]:
        """The parameters that are set, for a manifest."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, value: Mapping[str, int]) -> Self:
        """The inverse of to_json; unknown names are errors."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(value) - set(known))
        if unknown:
            raise ValueError(f"search parameter {unknown[0]} ({value[unknown[0]]}) is none of {', '.join(known)}")
        return cls(**value)


@dataclass(frozen=True, eq=False)
class Hits:
    """The k nearest rows of q queries, most similar first, equals by ascending id; unfilled places come last.

    Attributes:
        ids: object (q, k) of str, None where there is none.
        similarities: float32 (q, k), NaN where there is none.
        shards: int32 (q, k), -1 where there is none.
        rows: int64 (q, k), the row within its shard, -1 where there is none.
    """

    ids: np.ndarray
    similarities: np.ndarray
    shards: np.ndarray
    rows: np.ndarray


class StoredVectors:
    """Vectors in one or several (n, d) pieces, usually memory-mapped; rows are counted through all of them."""

    def __init__(self, pieces: Sequence[np.ndarray], dimension: int) -> None:
        self._pieces = pieces
        self._ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        self.dimension = dimension

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The rows (n,) int64 in the order asked for, as float32 (n, d)."""
        taken = np.empty((len(rows), self.dimension), np.float32)
        for piece, places, local_rows in _by_piece(self._ends, rows):
            taken[places] = self._pieces[piece][local_rows]
        return taken

    def batches(self) -> Iterator[np.ndarray]:
        """The pieces in row order, as they are stored."""
        yield from self._pieces


class VectorWriter:
    """Writes vectors as an Arrow IPC file with one column `vector`: fixed_size_list<halffloat or float>[dimension].

    A context manager: the file is complete once it is left without an exception. Memory: one batch.
    """

    def __init__(self, path: str | Path, dimension: int, dtype: type[np.floating[Any]]) -> None:
        if dtype not in VECTOR_TYPES:
            raise ValueError(f"dtype ({np.dtype(dtype)}) of {path} must be float16 or float32")
        self._schema = pa.schema([(VECTOR_COLUMN, pa.list_(VECTOR_TYPES[dtype], dimension))])
        self._batches = FixedBatches(STORED_BATCH_ROWS, dimension, dtype)
        self._dimension, self._dtype, self._path = dimension, dtype, path
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, self._schema)
        self.rows = 0

    def add(self, vectors: np.ndarray) -> None:
        """Appends floating point (n, d) rows.

        Raises:
            ValueError: for another dimension, or a value that is not finite as the stored type.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self._dimension:
            raise ValueError(f"vectors (shape {vectors.shape}) for {self._path} must have {self._dimension} columns")
        with np.errstate(over="ignore"):
            stored = vectors.astype(self._dtype)
        finite = np.isfinite(stored).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"vector {self.rows + int(np.argmin(finite))} for {self._path} is not finite as "
                f"{np.dtype(self._dtype)}; drop the row, or store float32"
            )
        for batch in self._batches.push(stored):
            self._write(batch)
        self.rows += len(vectors)

    def close(self) -> None:
        """Writes what is left and the footer, without which the file cannot be opened."""
        rest = self._batches.rest()
        if len(rest):
            self._write(rest)
        self._writer.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()

    def _write(self, batch: np.ndarray) -> None:
        values = pa.FixedSizeListArray.from_arrays(pa.array(batch.reshape(-1)), self._dimension)
        self._writer.write_batch(pa.record_batch([values], schema=self._schema))


class ShardSearcher:
    """Searches one opened shard. Threads may share it: knobs are passed with each call, and nothing is changed.

    Args:
        index: an opened faiss index.
        ids: pa.Array or pa.ChunkedArray of string, one for each row.
        vectors: (n, d) array or StoredVectors to compare candidates with, or None.
        metric: the one the index was built for; cosine expects unit vectors and queries.
        shard: the number that hits carry.
    """

    def __init__(
        self,
        index: faiss.Index,
        ids: pa.Array | pa.ChunkedArray,
        vectors: np.ndarray | StoredVectors | None,
        metric: Metric,
        shard: int,
    ) -> None:
        self._index, self._metric, self._shard = index, metric, shard
        self._ids = _IdColumn(ids)
        self._vectors = StoredVectors([vectors], vectors.shape[1]) if isinstance(vectors, np.ndarray) else vectors
        self._refuse_mismatch()

    def search(self, queries: np.ndarray, k: int, parameters: SearchParameters) -> Hits:
        """The k most similar rows for each query, float32 (q, d).

        With stored vectors, k * rerank_factor candidates are ranked by their exact float32 inner product; without, the
        similarities are those that the codes give. Which of several rows equal at the last place a shard offers is
        faiss' choice.
        """
        self._refuse_queries(queries, k, parameters)
        fetched = min(k * parameters.rerank_factor, self._index.ntotal)
        if fetched == 0 or len(queries) == 0:
            return _empty_hits(len(queries), k)
        contiguous = np.ascontiguousarray(queries, dtype=np.float32)
        distances, rows = self._index.search(contiguous, fetched, params=_faiss_parameters(self._index, parameters))
        near = similarities(distances, self._index.metric_type)
        if self._vectors is not None:
            near = _exact_similarities(contiguous, rows, self._vectors)
        return self._hits(near, rows, k)

    def _hits(self, near: np.ndarray, rows: np.ndarray, k: int) -> Hits:
        candidates = _at_least_kth(np.where(rows >= 0, near, -np.inf), k) & (rows >= 0)
        query_of = np.nonzero(candidates)[0]
        found = rows[candidates]
        shards = np.full(len(found), self._shard, np.int32)
        return _select(len(rows), k, query_of, near[candidates], self._ids.take(found), shards, found)

    def _refuse_mismatch(self) -> None:
        rows, dimension = self._index.ntotal, self._index.d
        if len(self._ids) != rows:
            raise ValueError(f"ids of shard {self._shard} ({len(self._ids)}) differ from the {rows} rows of its index")
        if self._vectors is not None and (len(self._vectors), self._vectors.dimension) != (rows, dimension):
            raise ValueError(
                f"stored vectors of shard {self._shard} ({len(self._vectors)} of {self._vectors.dimension} dimensions) "
                f"differ from its index: {rows} of {dimension}"
            )
        if self._metric is Metric.INNER_PRODUCT and self._index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise ValueError(
                f"index of shard {self._shard} (faiss metric type {self._index.metric_type}) holds distances, from "
                f"which no {self._metric} follows; build it for this metric"
            )

    def _refuse_queries(self, queries: np.ndarray, k: int, parameters: SearchParameters) -> None:
        if queries.ndim != 2 or queries.shape[1] != self._index.d:
            raise ValueError(f"queries (shape {queries.shape}) must have the index's {self._index.d} columns")
        if k < 1:
            raise ValueError(f"k ({k}) must be at least 1")
        if parameters.rerank_factor > 1 and self._vectors is None:
            raise ValueError(
                f"rerank_factor ({parameters.rerank_factor}) needs stored vectors, and shard {self._shard} has none; "
                "take 1, or build the index with them"
            )
        refuse_unfit_lengths(queries, self._metric, "query")


class _IdColumn:
    """String ids by row, without joining the chunks of a memory-mapped column."""

    def __init__(self, ids: pa.Array | pa.ChunkedArray) -> None:
        self._chunks = ids.chunks if isinstance(ids, pa.ChunkedArray) else [ids]
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def take(self, rows: np.ndarray) -> np.ndarray:
        taken = np.empty(len(rows), dtype=object)
        for chunk, places, local_rows in _by_piece(self._ends, rows):
            taken[places] = self._chunks[chunk].take(pa.array(local_rows)).to_numpy(zero_copy_only=False)
        return taken


def merge_hits(hits: Sequence[Hits], k: int) -> Hits:
    """The k most similar of all hits for each query: the same whatever the number and order of the shards."""
    counts = {len(part.ids) for part in hits}
    if len(counts) != 1:
        raise ValueError(f"hits to merge answer {sorted(counts)} queries; there must be some, for the same queries")
    queries = counts.pop()
    ids, near, shards, rows = (
        np.concatenate([getattr(part, name) for part in hits], axis=1)
        for name in ("ids", "similarities", "shards", "rows")
    )
    filled = rows >= 0
    return _select(queries, k, np.nonzero(filled)[0], near[filled], ids[filled], shards[filled], rows[filled])


def most_similar(query_of: np.ndarray, near: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Picks the k most similar of each query among n (query, row) pairs; equals by ascending id.

    Args:
        query_of: int64 (n,). near: float32 (n,) similarities, no NaN. ids: object (n,) of str.

    Returns:
        The positions of the chosen pairs, grouped by query and best first, and the 0-based rank of each: int64 both.
    """
    id_ranks = np.unique(ids, return_inverse=True)[1]
    order = np.lexsort((id_ranks, -near, query_of))
    grouped = query_of[order]
    ranks = np.arange(len(order)) - np.searchsorted(grouped, grouped)
    return order[ranks < k], ranks[ranks < k]


def exact_inner_products(queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Row by row inner products (n,) of two (n, d) arrays, or of one (d,) query with (n, d) vectors.

    The sum of a pair depends on that pair alone, which BLAS does not promise: equal vectors get equal similarities.
    """
    products: np.ndarray = np.einsum("...d,...d->...", queries, vectors)
    return products


def normalize(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1: floating point (n, d) to float32 (n, d).

    Raises:
        ValueError: naming the first row that is zero or not finite.
    """
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    usable = np.isfinite(lengths) & (lengths > 0)
    if not usable.all():
        row = int(np.argmin(usable))
        raise ValueError(f"vector {row} (length {lengths[row, 0]}) has no direction; drop the row")
    unit: np.ndarray = (vectors / lengths).astype(np.float32)
    return unit


def refuse_unfit_lengths(vectors: np.ndarray, metric: Metric, subject: str) -> None:
    """Refuses vectors (n, d) that are not finite, or under cosine not of unit length."""
    lengths = np.linalg.norm(vectors.astype(np.float32, copy=False), axis=1)
    fit = np.isfinite(lengths)
    if metric is Metric.COSINE:
        fit &= np.abs(lengths - 1) <= UNIT_LENGTH_TOLERANCE
    if not fit.all():
        row = int(np.argmin(fit))
        rule = "length 1" if metric is Metric.COSINE else "a finite length"
        raise ValueError(f"{subject} {row} (length {lengths[row]:.6g}) must have {rule} for {metric}; normalize() it")


def open_vectors(path: str | Path) -> StoredVectors:
    """Memory-maps what VectorWriter wrote; nothing is copied until rows are taken.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged or holds something else.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(
            f"vector file {path} is damaged ({error}); compare its sha256 with the manifest and fetch it again"
        ) from error
    kind = _vector_type(path, reader.schema)
    # `flatten` and not `values`: it keeps to the rows of a sliced batch.
    pieces = [batch.column(0).flatten().to_numpy().reshape(-1, kind.list_size) for batch in batches]
    return StoredVectors(pieces, kind.list_size)


def _vector_type(path: str | Path, schema: pa.Schema) -> pa.FixedSizeListType:
    kind = schema.field(0).type if schema.names == [VECTOR_COLUMN] else None
    if not isinstance(kind, pa.FixedSizeListType) or kind.value_type not in VECTOR_TYPES.values():
        raise ValueError(
            f"vector file {path} (columns {schema.to_string(show_field_metadata=False)}) must hold one column "
            f"{VECTOR_COLUMN} of fixed size lists of halffloat or float"
        )
    return kind


def _by_piece(ends: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each piece that holds any of the rows: its number, the places of these in `rows`, their rows within it."""
    piece_of = np.searchsorted(ends, rows, side="right")
    for piece in np.unique(piece_of):
        places = np.nonzero(piece_of == piece)[0]
        start = ends[piece - 1] if piece else 0
        yield int(piece), places, rows[places] - start


def _faiss_parameters(index: faiss.Index, parameters: SearchParameters) -> FaissObject:
    """The parameters of one call; None where all knobs are left to the index."""
    core = core_index(index)
    inner = None
    if parameters.nprobe is not None:
        _refuse_family(core, faiss.IndexIVF, "nprobe", parameters.nprobe)
        inner = _faiss.SearchParametersIVF(nprobe=parameters.nprobe)
    if parameters.ef_search is not None:
        _refuse_family(core, faiss.IndexHNSW, "ef_search", parameters.ef_search)
        inner = _faiss.SearchParametersHNSW(efSearch=parameters.ef_search)
    if inner is not None and isinstance(index, faiss.IndexPreTransform):
        return _faiss.SearchParametersPreTransform(index_params=inner)
    return inner


def _refuse_family(core: FaissObject, expected: type, name: str, value: int) -> None:
    if not isinstance(core, expected):
        raise ValueError(f"{name} ({value}) is no parameter of {type(core).__name__}; only {expected.__name__} has it")


def _exact_similarities(queries: np.ndarray, rows: np.ndarray, vectors: StoredVectors) -> np.ndarray:
    """float32 (q, n) inner products with the rows (q, n), unset where a row is -1. Memory: one query's n vectors."""
    near = np.full(rows.shape, -np.inf, np.float32)
    for query, (vector, candidates) in enumerate(zip(queries, rows, strict=True)):
        found = candidates >= 0
        near[query, found] = exact_inner_products(vector, vectors.take(candidates[found]))
    return near


def _at_least_kth(near: np.ndarray, k: int) -> np.ndarray:
    """bool (q, n): what is not below the k-th largest of its row, so that ids are looked up for few rows."""
    if near.shape[1] <= k:
        return np.ones(near.shape, dtype=bool)
    kept: np.ndarray = near >= -np.partition(-near, k - 1, axis=1)[:, k - 1 : k]
    return kept


def _empty_hits(queries: int, k: int) -> Hits:
    shape = (queries, k)
    return Hits(
        np.full(shape, None, dtype=object),
        np.full(shape, np.nan, np.float32),
        np.full(shape, -1, np.int32),
        np.full(shape, -1, np.int64),
    )


def _select(
    queries: int,
    k: int,
    query_of: np.ndarray,
    near: np.ndarray,
    ids: np.ndarray,
    shards: np.ndarray,
    rows: np.ndarray,
) -> Hits:
    """Hits of the k most similar of n found pairs, each column (n,)."""
    chosen, ranks = most_similar(query_of, near, ids, k)
    hits = _empty_hits(queries, k)
    places = (query_of[chosen], ranks)
    hits.ids[places] = ids[chosen]
    hits.similarities[places] = near[chosen]
    hits.shards[places] = shards[chosen]
    hits.rows[places] = rows[chosen]
    return hits
