"""Train an index on a sample and fill its shards: faiss underneath, chosen by a factory string.

Training happens once per index, on a bounded seeded sample; its result is an empty index in bytes, which every shard is
filled from, so that all shards share centroids, code books and rotation.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeAlias, assert_never

import faiss
import numpy as np

# The type stubs of faiss 1.15 leave names out, and give others another shape than they have.
_faiss: Any = faiss
FaissObject: TypeAlias = Any

PQ_CENTROIDS = 256  # 8 bits per sub-quantizer
TRAINING_ROWS_PER_CENTROID = 39  # below it faiss calls the centroids starved (ClusteringParameters)
# The smallest and largest of n training values leave about 2/n of the later ones outside, where SQ8 clips them.
RANGE_TRAINING_ROWS = 10_000
CENTROIDS_PER_ROOT_ROW = 4  # about 4 * sqrt(rows) lists: faiss wiki, "Guidelines to choose an index"
DIMENSIONS_PER_PQ_BYTE = 8
MOST_RABITQ_BITS = 9
MOST_SEED = 2**31 - 1  # faiss keeps seeds as C int
INVERTED_LIST_ID_BYTES = 8
# Rows reach faiss in batches of this fixed size whatever the caller's: HNSW orders each batch by level, so its graph
# depends on them. 8,192 rows of 1,024 float32 are 32 MiB.
BATCH_ROWS = 8_192


class Family(StrEnum):
    FLAT = "flat"
    HNSW = "hnsw"
    IVF = "ivf"


class Codec(StrEnum):
    NONE = "none"
    SQ8 = "sq8"
    PQ = "pq"
    RABITQ = "rabitq"


class Metric(StrEnum):
    COSINE = "cosine"
    INNER_PRODUCT = "inner_product"


@dataclass(frozen=True)
class IndexSpec:
    """What index to build. `training_rows` bounds the sample that training reads; cosine means unit vectors.

    Raises:
        ValueError: for a combination that faiss cannot build, or a factory string of another family or codec.
    """

    family: Family
    codec: Codec
    metric: Metric
    dimension: int
    factory: str
    training_rows: int
    seed: int
    ef_construction: int = 100

    def __post_init__(self) -> None:
        faiss_metric(self.family, self.codec, self.metric)
        _refuse_other_factory(self)
        if not 0 <= self.seed <= MOST_SEED:
            raise ValueError(f"seed ({self.seed}) must lie in 0..{MOST_SEED}")
        if self.ef_construction < 1:
            raise ValueError(f"ef_construction ({self.ef_construction}) must be at least 1")
        if self.training_rows < fewest_training_rows(self):
            raise ValueError(
                f"training_rows ({self.training_rows}) is below the {fewest_training_rows(self)} rows that "
                f"{self.factory} cannot be trained without; {training_rows_needed(self)} train it well"
            )


class FixedBatches:
    """Cuts a stream of rows into batches of one size, whatever the sizes they arrive in. Memory: one batch."""

    def __init__(self, rows: int, dimension: int, dtype: type[np.floating[Any]]) -> None:
        self._buffer = np.empty((rows, dimension), dtype)
        self._filled = 0

    def push(self, vectors: np.ndarray) -> Iterator[np.ndarray]:
        """Full batches as they fill up; each is valid until the next one is asked for."""
        taken = 0
        while taken < len(vectors):
            part = vectors[taken : taken + len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            taken += len(part)
            if self._filled == len(self._buffer):
                self._filled = 0
                yield self._buffer

    def rest(self) -> np.ndarray:
        """The rows that fill no batch; the buffer is empty afterwards."""
        rest, self._filled = self._buffer[: self._filled], 0
        return rest


class ShardBuilder:
    """Fills one shard from a trained empty index. Memory: the finished shard, and one batch of BATCH_ROWS rows.

    The result depends on the rows and their order alone, not on the batches they were added in; with several threads
    an HNSW graph may also depend on how these interleave.
    """

    def __init__(self, trained: bytes, threads: int = 1) -> None:
        if threads < 1:
            raise ValueError(f"threads ({threads}) must be at least 1")
        self._index = _faiss.deserialize_index(np.frombuffer(trained, dtype=np.uint8))
        self._threads = threads
        self._batches = FixedBatches(BATCH_ROWS, self._index.d, np.float32)
        self.ntotal = 0

    def add(self, vectors: np.ndarray) -> None:
        """Adds floating point (n, d) rows behind those added before."""
        _refuse_shape(vectors, self._index.d, "vectors to add")
        for batch in self._batches.push(vectors):
            self._add_batch(batch)
        self.ntotal += len(vectors)

    def write(self, path: str | Path) -> None:
        """Writes the shard as a plain faiss file.

        Raises:
            OSError: when the file cannot be written in full.
        """
        rest = self._batches.rest()
        if len(rest):
            self._add_batch(rest)
        try:
            faiss.write_index(self._index, str(path))
        except RuntimeError as error:
            raise OSError(f"shard {path} ({self.ntotal} rows) could not be written: {_reason(error)}") from error

    def _add_batch(self, batch: np.ndarray) -> None:
        with _threads(self._threads):
            self._index.add(batch)


def faiss_metric(family: Family, codec: Codec, metric: Metric) -> int:
    """The faiss metric that an index is built with: inner product wherever faiss can.

    faiss 1.15 builds HNSW over PQ or RaBitQ codes with L2 distance alone (asked for inner product, it silently takes L2
    for PQ and raises for RaBitQ). Unit vectors have the same order under both.
    """
    if family is not Family.HNSW or codec in (Codec.NONE, Codec.SQ8):
        return faiss.METRIC_INNER_PRODUCT
    match metric:
        case Metric.COSINE:
            return faiss.METRIC_L2
        case Metric.INNER_PRODUCT:
            raise ValueError(
                f"metric ({metric}) cannot be searched with family hnsw over codec {codec}, as faiss builds that with "
                "distances only; take metric cosine, family ivf or flat, or codec sq8 or none"
            )
        case _:
            assert_never(metric)


def similarities(distances: np.ndarray, metric_type: int) -> np.ndarray:
    """Inner products from what faiss returns, float32: as they are, or 1 - squared L2 distance / 2 of unit vectors."""
    if metric_type == faiss.METRIC_INNER_PRODUCT:
        return distances
    return np.float32(1) - distances / np.float32(2)


def factory_string(
    family: Family,
    codec: Codec,
    dimension: int,
    *,
    hnsw_m: int = 32,
    nlist: int | None = None,
    rows: int | None = None,
    pq_bytes: int | None = None,
    rabitq_bits: int = 1,
) -> str:
    """The faiss factory string of an index. `nlist` is derived from `rows`, those of one shard, unless it is given."""
    code = _code_part(codec, dimension, pq_bytes, rabitq_bits)
    # RaBitQ spends its bits evenly over the dimensions, which needs them exchangeable: a random rotation makes them so.
    rotation = f"RR{dimension}," if codec is Codec.RABITQ else ""
    match family:
        case Family.FLAT:
            return rotation + code
        case Family.HNSW:
            return f"{rotation}HNSW{hnsw_m}" + ("" if codec is Codec.NONE else f"_{code}")
        case Family.IVF:
            return f"{rotation}IVF{_list_count(nlist, rows)},{code}"
        case _:
            assert_never(family)


def requires_training(spec: IndexSpec) -> bool:
    """Whether an index of this spec learns anything from a sample."""
    return spec.family is Family.IVF or spec.codec is not Codec.NONE


def training_rows_needed(spec: IndexSpec) -> int:
    """Rows that train this index well; a corpus with fewer is trained on all it has. 0 when nothing is trained."""
    return max(TRAINING_ROWS_PER_CENTROID * _centroids(spec), RANGE_TRAINING_ROWS if _learns_ranges(spec) else 0)


def fewest_training_rows(spec: IndexSpec) -> int:
    """Rows below which faiss cannot train at all: one per centroid."""
    return max(_centroids(spec), 1 if _learns_ranges(spec) else 0)


def nlist_of(spec: IndexSpec) -> int:
    """Inverted lists of an IVF index; 0 for the other families."""
    return _number_after("IVF", spec.factory)


def train_index(spec: IndexSpec, sample: np.ndarray, threads: int = 1) -> bytes:
    """The trained empty index in bytes, the same for the same spec, sample and thread count.

    Args:
        sample: float32 (n, d) in hash order, of which the first `spec.training_rows` are read. May be empty when the
            spec requires no training.
    """
    _refuse_shape(sample, spec.dimension, "training sample")
    rows = np.ascontiguousarray(sample[: spec.training_rows], dtype=np.float32)
    if len(rows) < fewest_training_rows(spec):
        raise ValueError(
            f"training sample ({len(rows)} rows) is too small for {spec.factory}: at least "
            f"{fewest_training_rows(spec)} rows are needed and {training_rows_needed(spec)} train it well; give more "
            "rows, fewer lists, or codec none or sq8"
        )
    index = _empty_index(spec)
    if requires_training(spec):
        with _threads(threads):
            index.train(rows)
    _refuse_other_metric(spec, index)
    trained: bytes = _faiss.serialize_index(index).tobytes()
    return trained


def open_index(path: str | Path, family: Family | None = None, *, mmap: bool = True) -> faiss.Index:
    """Opens a shard. With `mmap` codes and graph stay in the file; inverted lists too, if `family` says it is IVF.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is not a complete faiss index.
    """
    size_bytes = Path(path).stat().st_size
    try:
        index: faiss.Index = _faiss.read_index(str(path), _io_flags(family, mmap))
    except RuntimeError as error:
        raise ValueError(
            f"index file {path} ({size_bytes} bytes) is not a complete faiss index: {_reason(error)}; compare its "
            "sha256 with the manifest and fetch or build it again"
        ) from error
    _stop_prefetching(index)
    return index


def core_index(index: faiss.Index) -> FaissObject:
    """The index behind the vector transforms, as its own class."""
    outer = _faiss.downcast_index(index)
    core = _faiss.downcast_index(outer.index) if isinstance(outer, _faiss.IndexPreTransform) else outer
    _faiss.add_to_referenced_objects(core, index)  # the C++ object dies with its owner, whoever still uses the part
    return core


def bytes_per_vector(spec: IndexSpec) -> float:
    """Bytes that one more row adds to the shard file (without ids and stored vectors), on average."""
    core = core_index(_empty_index(spec))  # untrained: code sizes are known from the start
    match spec.family:
        case Family.FLAT:
            return float(core.code_size)
        case Family.HNSW:
            return float(_faiss.downcast_index(core.storage).code_size) + _graph_bytes(spec)
        case Family.IVF:
            return float(core.code_size) + INVERTED_LIST_ID_BYTES
        case _:
            assert_never(spec.family)


def _graph_bytes(spec: IndexSpec) -> float:
    # Per row: a level (int32), an offset (uint64) and int32 links: 2m at the bottom, m for each level above, of which
    # there are 1 / (m - 1) on average (a row reaches level l with probability m^-l).
    links = _number_after("HNSW", spec.factory)
    return 4 + 8 + 4 * (2 * links + links / (links - 1))


def _code_part(codec: Codec, dimension: int, pq_bytes: int | None, rabitq_bits: int) -> str:
    match codec:
        case Codec.NONE:
            return "Flat"
        case Codec.SQ8:
            return "SQ8"
        case Codec.PQ:
            return f"PQ{_sub_quantizers(dimension, pq_bytes)}"
        case Codec.RABITQ:
            if not 1 <= rabitq_bits <= MOST_RABITQ_BITS:
                raise ValueError(f"rabitq_bits ({rabitq_bits}) must lie in 1..{MOST_RABITQ_BITS}")
            return "RaBitQ" if rabitq_bits == 1 else f"RaBitQ{rabitq_bits}"
        case _:
            assert_never(codec)


def _sub_quantizers(dimension: int, pq_bytes: int | None) -> int:
    count = dimension // DIMENSIONS_PER_PQ_BYTE if pq_bytes is None else pq_bytes
    if count < 1 or dimension % count:
        divisors = ", ".join(str(n) for n in range(1, dimension + 1) if dimension % n == 0)
        raise ValueError(f"pq_bytes ({count}) must divide the dimension ({dimension}); take one of {divisors}")
    return count


def _list_count(nlist: int | None, rows: int | None) -> int:
    if nlist is not None:
        if nlist < 1:
            raise ValueError(f"nlist ({nlist}) must be at least 1")
        return nlist
    if rows is None:
        raise ValueError("nlist (none) of family ivf is derived from the rows of a shard; give nlist or rows")
    return max(1, min(round(CENTROIDS_PER_ROOT_ROW * math.sqrt(rows)), rows // TRAINING_ROWS_PER_CENTROID))


def _centroids(spec: IndexSpec) -> int:
    """Centroids of the largest k-means that training runs."""
    return max(nlist_of(spec), PQ_CENTROIDS if spec.codec is Codec.PQ else 0)


def _learns_ranges(spec: IndexSpec) -> bool:
    """Whether training learns per-dimension statistics: minima and maxima for SQ8, means for RaBitQ."""
    return spec.codec in (Codec.SQ8, Codec.RABITQ)


def _number_after(mark: str, factory: str) -> int:
    found = re.search(rf"{mark}(\d+)", factory)
    return int(found[1]) if found else 0


def _refuse_other_factory(spec: IndexSpec) -> None:
    marks = {Family.HNSW: "HNSW", Family.IVF: "IVF", Codec.SQ8: "SQ8", Codec.PQ: "PQ", Codec.RABITQ: "RaBitQ"}
    for variant, mark in marks.items():
        present = re.search(rf"(?<![A-Za-z]){mark}", spec.factory) is not None
        if present != (variant in (spec.family, spec.codec)):
            raise ValueError(
                f"factory ({spec.factory}) is not one of family {spec.family} with codec {spec.codec}; "
                "build it with factory_string()"
            )


def _empty_index(spec: IndexSpec) -> FaissObject:
    """The untrained index with all its random choices seeded."""
    index = _faiss.index_factory(spec.dimension, spec.factory, faiss_metric(spec.family, spec.codec, spec.metric))
    if spec.codec is Codec.RABITQ:
        rotation = _faiss.downcast_VectorTransform(index.chain.at(0))
        rotation.init(spec.seed)  # marks it as trained, which keeps train() from drawing it with a fixed seed
    core = core_index(index)
    _prepare_clustering(core, spec.seed)
    if spec.family is Family.HNSW:
        core.hnsw.efConstruction = spec.ef_construction
        _prepare_clustering(_faiss.downcast_index(core.storage), spec.seed)
    return index


def _prepare_clustering(part: FaissObject, seed: int) -> None:
    """Seeds every k-means of one index, and lets small corpora train without a warning on stderr."""
    for holder in (part, getattr(part, "pq", None)):
        if holder is not None and hasattr(holder, "cp"):
            holder.cp.seed = seed
            holder.cp.min_points_per_centroid = 1
    if hasattr(part, "do_polysemous_training"):
        # On in the factory: 1.7 s per sub-quantizer to order codes by Hamming distance, which no search here uses.
        part.do_polysemous_training = False


def _refuse_other_metric(spec: IndexSpec, index: faiss.Index) -> None:
    expected = faiss_metric(spec.family, spec.codec, spec.metric)
    for part in (index, core_index(index)):
        if part.metric_type != expected:
            raise ValueError(
                f"metric of {spec.factory} (faiss metric type {part.metric_type}) differs from the {expected} that "
                f"{spec.metric} needs: this faiss build cannot index it; choose another family or codec"
            )


def _refuse_shape(vectors: np.ndarray, dimension: int, subject: str) -> None:
    if vectors.ndim != 2 or vectors.shape[1] != dimension:
        raise ValueError(f"{subject} (shape {vectors.shape}) must be rows of the index's {dimension} dimensions")


def _io_flags(family: Family | None, mmap: bool) -> int:
    if not mmap:
        return 0
    # The two kinds of mapping exclude each other: faiss maps inverted lists, or everything else.
    return int(faiss.IO_FLAG_MMAP if family is Family.IVF else faiss.IO_FLAG_MMAP_IFC)


def _stop_prefetching(index: faiss.Index) -> None:
    """Keeps mapped inverted lists from starting 32 threads per search: 0.42 ms against 0.03 ms on 3,000 rows."""
    core = core_index(index)
    if isinstance(core, faiss.IndexIVF):
        lists = _faiss.downcast_InvertedLists(core.invlists)
        if hasattr(lists, "prefetch_nthread"):
            lists.prefetch_nthread = 0


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Runs faiss with this many OpenMP threads, a setting of the calling thread alone."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _reason(error: RuntimeError) -> str:
    """faiss' own words, without the C++ signature and source line in front of them."""
    return str(error).rsplit("failed: ", 1)[-1].rsplit("Error: ", 1)[-1].strip()
