"""Train an index on a sample and fill its shards: faiss underneath, or svs, chosen by a factory string.

Training happens once per index, on a bounded seeded sample; its result is an empty index in bytes, which every shard is
filled from, so that all shards share centroids, code books and rotation.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias, assert_never

import faiss
import numpy as np

from penstock.operators.vamana import (
    FACTORY_PREFIX,
    VamanaBuilder,
    VamanaIndex,
    VamanaLayout,
    open_vamana,
    refuse_unusable,
)

# The type stubs of faiss 1.15 leave names out, and give others another shape than they have.
_faiss: Any = faiss
FaissObject: TypeAlias = Any
AnyIndex: TypeAlias = faiss.Index | VamanaIndex

TRAINING_ROWS_PER_CENTROID = 39  # below it faiss calls the centroids starved (ClusteringParameters)
# The smallest and largest of n training values leave about 2/n of the later ones outside, where SQ8 clips them. OPQ
# that learnt 384 dimensions from 2,500 rows errs a quarter more (squared distance 0.114) than from 10,000 (0.090).
RANGE_TRAINING_ROWS = 10_000
CENTROIDS_PER_ROOT_ROW = 4  # about 4 * sqrt(rows) lists: faiss wiki, "Guidelines to choose an index"
COARSE_GRAPH_LISTS = 65_536  # from here on a graph finds the lists of a row: faiss wiki, as above
COARSE_GRAPH_LINKS = 32
# Of 12,000 centroids (128 dimensions) it finds 99.96 % of the 16 nearest and 99.7 % of the 64 nearest in 0.13 ms; the
# 16 that faiss starts with find 95 and 79 %.
COARSE_GRAPH_EF_SEARCH = 128
DIMENSIONS_PER_PQ_BYTE = 8
DEFAULT_PQ_BITS = 8
DEFAULT_DEGREE = 64
LARGEST_IN_FACTORY = 2**24  # faiss allocates the lists of an index while it reads how many there are
MOST_RABITQ_BITS = 9
MOST_SEED = 2**31 - 1  # faiss keeps seeds as C int
INVERTED_LIST_ID_BYTES = 8
# Rows reach faiss in batches of this fixed size whatever the caller's: HNSW orders each batch by level, so its graph
# depends on them, and BLAS rounds a row of a rotation by its place in the batch. 8,192 rows of 1,024 float32: 32 MiB.
BATCH_ROWS = 8_192


class Family(StrEnum):
    FLAT = "flat"
    HNSW = "hnsw"
    IVF = "ivf"
    VAMANA = "vamana"


class Codec(StrEnum):
    """How rows are stored: `none` is float32, `fs` stands for fast-scan, blocks of 32 rows compared at once.

    `lvq` and `leanvec` are codes of svs, of so many bits a component, and so many more of what these leave over.
    """

    NONE = "none"
    FP16 = "fp16"
    SQ8 = "sq8"
    SQ6 = "sq6"
    SQ4 = "sq4"
    PQ = "pq"
    PQFS = "pqfs"
    RABITQ = "rabitq"
    RABITQFS = "rabitqfs"
    LVQ8 = "lvq8"
    LVQ4X4 = "lvq4x4"
    LVQ4X8 = "lvq4x8"
    LEANVEC4X8 = "leanvec4x8"
    LEANVEC8X8 = "leanvec8x8"


class Metric(StrEnum):
    COSINE = "cosine"
    INNER_PRODUCT = "inner_product"


FAST_SCAN = (Codec.PQFS, Codec.RABITQFS)
HNSW_WITH_DISTANCES_ONLY = (Codec.PQ, Codec.RABITQ)
ROTATED_CODECS = (Codec.RABITQ, Codec.RABITQFS)
OPQ_CODECS = (Codec.PQ, Codec.PQFS)
LEANVEC_CODECS = (Codec.LEANVEC4X8, Codec.LEANVEC8X8)
FAISS_FAMILIES = (Family.FLAT, Family.HNSW, Family.IVF)
# The codecs of family vamana, as its factory strings name them.
VAMANA_CODES: Mapping[Codec, str] = {
    Codec.NONE: "",
    Codec.FP16: "FP16",
    Codec.LVQ8: "LVQ8",
    Codec.LVQ4X4: "LVQ4x4",
    Codec.LVQ4X8: "LVQ4x8",
    Codec.LEANVEC4X8: "LeanVec4x8",
    Codec.LEANVEC8X8: "LeanVec8x8",
}
FAISS_CODECS = (Codec.NONE, Codec.FP16, *(codec for codec in Codec if codec not in VAMANA_CODES))
# Exactly these classes: a subclass may store or search in another way.
CODEC_OF_CLASS: Mapping[type, Codec] = {
    faiss.IndexFlat: Codec.NONE,
    faiss.IndexFlatIP: Codec.NONE,
    faiss.IndexFlatL2: Codec.NONE,
    faiss.IndexIVFFlat: Codec.NONE,
    faiss.IndexPQ: Codec.PQ,
    faiss.IndexIVFPQ: Codec.PQ,
    faiss.IndexPQFastScan: Codec.PQFS,
    faiss.IndexIVFPQFastScan: Codec.PQFS,
    _faiss.IndexRaBitQ: Codec.RABITQ,
    _faiss.IndexIVFRaBitQ: Codec.RABITQ,
    _faiss.IndexRaBitQFastScan: Codec.RABITQFS,
    _faiss.IndexIVFRaBitQFastScan: Codec.RABITQFS,
}
CODEC_OF_SCALAR_QUANTIZER: Mapping[int, Codec] = {
    faiss.ScalarQuantizer.QT_fp16: Codec.FP16,
    faiss.ScalarQuantizer.QT_8bit: Codec.SQ8,
    faiss.ScalarQuantizer.QT_6bit: Codec.SQ6,
    faiss.ScalarQuantizer.QT_4bit: Codec.SQ4,
}
COARSE_QUANTIZERS = (faiss.IndexFlat, faiss.IndexFlatIP, faiss.IndexFlatL2, faiss.IndexHNSWFlat)


@dataclass(frozen=True)
class IndexSpec:
    """What index to build: factory_string() writes the factory string, parse_factory() reads one.

    `training_rows` bounds the sample that training reads; cosine means unit vectors. `ef_construction` is that of any
    HNSW graph, also of the one over the centroids of an IVF index, and the window that a Vamana graph is built with.

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

    Shards of one trained index, merged, answer as one index of all rows does, without a graph and under any codec but:
    a rotation (RR, OPQ, PCA) rounds the last bit of a row by its place in the batch, which may change its code; and a
    search over RaBitQ of 2 bits and more skips rows by an estimate that is compared with what was found so far.
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
        with faiss_threads(self._threads):
            self._index.add(batch)


def codecs_of(family: Family, metric: Metric) -> tuple[Codec, ...]:
    """The codecs that faiss 1.15 or svs 0.5 builds this family over, searchable under this metric."""
    if family is Family.VAMANA:
        return tuple(VAMANA_CODES)
    if family is not Family.HNSW:
        return FAISS_CODECS
    refused = FAST_SCAN if metric is Metric.COSINE else FAST_SCAN + HNSW_WITH_DISTANCES_ONLY
    return tuple(codec for codec in FAISS_CODECS if codec not in refused)


def refuse_missing_engine(family: Family, codec: Codec) -> None:
    """Refuses an index of svs where svs is not installed, or cannot run its codes.

    Raises:
        ValueError: naming what is missing.
    """
    if family is Family.VAMANA:
        refuse_unusable(VAMANA_CODES[codec])


def faiss_metric(family: Family, codec: Codec, metric: Metric) -> int:
    """The faiss metric that an index is built with: inner product wherever faiss can.

    faiss 1.15 builds HNSW over PQ or RaBitQ codes with L2 distance alone (asked for inner product, it silently takes L2
    for PQ and raises for RaBitQ). Unit vectors have the same order under both.

    Raises:
        ValueError: for a codec that is none of codecs_of() this family and metric.
    """
    if codec in codecs_of(family, metric):
        distances = family is Family.HNSW and codec in HNSW_WITH_DISTANCES_ONLY
        return faiss.METRIC_L2 if distances else faiss.METRIC_INNER_PRODUCT
    others = ", ".join(codecs_of(family, metric))
    if codec not in FAISS_CODECS or family is Family.VAMANA:
        raise ValueError(
            f"codec ({codec}) is not built with family {family}, as codes of svs belong to family vamana and others to "
            f"the rest; take another family, or one of {others}"
        )
    if codec in FAST_SCAN:
        raise ValueError(
            f"codec ({codec}) cannot be searched with family hnsw, as a graph compares single rows and these codes "
            f"come in blocks; take family ivf or flat, or one of {others}"
        )
    raise ValueError(
        f"metric ({metric}) cannot be searched with family hnsw over codec {codec}, as faiss builds that with "
        f"distances only; take metric cosine, family ivf or flat, or one of {others}"
    )


def compares_products(spec: IndexSpec) -> bool:
    """Whether the index compares by inner product, so that its centroids are of unit length; else by distance."""
    return faiss_metric(spec.family, spec.codec, spec.metric) == faiss.METRIC_INNER_PRODUCT


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
    opq: bool = False,
    opq_dimension: int | None = None,
    rotate: bool = False,
    degree: int = DEFAULT_DEGREE,
    leanvec_dimension: int | None = None,
) -> str:
    """The factory string of an index. Which codec goes with which family, codecs_of() says.

    Args:
        hnsw_m: links of a vertex on each level of an HNSW graph, twice as many on the lowest.
        nlist: inverted lists; derived from `rows`, those of one shard, unless it is given. From COARSE_GRAPH_LISTS on,
            an HNSW graph finds the lists of a row.
        pq_bytes: bytes of a row under pq (8 bits for each of as many parts) and pqfs (4 bits for each of twice as
            many); an eighth of the dimension by default.
        rabitq_bits: bits of a component under rabitq and rabitqfs, 1 to 9.
        opq: rotate before pq or pqfs such that the codes err least (OPQ, Ge et al. 2013).
        opq_dimension: components kept by OPQ; all by default.
        rotate: a seeded random rotation first. RaBitQ always has one.
        degree: links of a vertex of a Vamana graph, at most.
        leanvec_dimension: components that LeanVec searches first; half of them by default.

    Raises:
        ValueError: for a codec that the family is not built over, or an option that does not fit codec or dimension.
    """
    faiss_metric(family, codec, Metric.COSINE)  # refuses what is built for no metric
    if family is Family.VAMANA:
        return _vamana_factory(codec, dimension, degree, leanvec_dimension)
    width = dimension if opq_dimension is None else opq_dimension
    code = _code_part(codec, width, pq_bytes, rabitq_bits)
    if opq or opq_dimension is not None:
        rotation = _opq_part(codec, dimension, width, pq_bytes, opq=opq, rotate=rotate)
    else:
        # RaBitQ spends its bits evenly over the dimensions, which needs them exchangeable: a random rotation makes
        # them so.
        rotation = f"RR{dimension}," if rotate or codec in ROTATED_CODECS else ""
    match family:
        case Family.FLAT:
            return rotation + code
        case Family.HNSW:
            return f"{rotation}HNSW{hnsw_m}" + ("" if codec is Codec.NONE else f"_{code}")
        case Family.IVF:
            return f"{rotation}{_coarse_part(_list_count(nlist, rows))},{code}"
        case _:
            assert_never(family)


def parse_factory(
    factory: str,
    dimension: int,
    metric: Metric,
    seed: int,
    *,
    training_rows: int | None = None,
    ef_construction: int = 100,
) -> IndexSpec:
    """The spec of a factory string that a user wrote, its family and codec being those of what faiss builds of it.

    Before the index there may be transforms that keep inner products: RR, HR, OPQ, Pad, and PCA, whose shift is left
    out as it would reorder them. Comparing candidates again (`RFlat`) is not the index' part.

    Args:
        training_rows: bound of the training sample; by default what trains the index well.

    Raises:
        ValueError: for a string that faiss cannot build, or not for this dimension or metric; for an index of another
            family or codec, or behind another transform.
    """
    # Everything can be built with L2; the metric to take follows from what it is.
    is_vamana = factory.startswith(FACTORY_PREFIX)
    anatomy = _vamana_anatomy(factory, dimension) if is_vamana else _anatomy(factory, dimension, faiss.METRIC_L2)
    rows = anatomy.good_training_rows if training_rows is None else training_rows
    return IndexSpec(anatomy.family, anatomy.codec, metric, dimension, factory, rows, seed, ef_construction)


def requires_training(spec: IndexSpec) -> bool:
    """Whether an index of this spec learns anything from a sample."""
    return _anatomy_of(spec).learns


def training_rows_needed(spec: IndexSpec) -> int:
    """Rows that train this index well; a corpus with fewer is trained on all it has. 0 when nothing is trained."""
    return _anatomy_of(spec).good_training_rows


def fewest_training_rows(spec: IndexSpec) -> int:
    """Rows below which faiss cannot train at all: one per centroid, and per component that OPQ or PCA keeps."""
    return _anatomy_of(spec).fewest_training_rows


def nlist_of(spec: IndexSpec) -> int:
    """Inverted lists of an IVF index; 0 for the other families."""
    return _anatomy_of(spec).lists


def train_index(
    spec: IndexSpec, sample: np.ndarray, threads: int = 1, plant: Callable[..., None] | None = None
) -> bytes:
    """The trained empty index in bytes, the same for the same spec, sample and thread count.

    Args:
        sample: float32 (n, d) in hash order, of which the first `spec.training_rows` are read. May be empty when the
            spec requires no training.
        plant: called with the untrained index and `sample`, to give it centroids that were found elsewhere, or bounds.
    """
    _refuse_shape(sample, spec.dimension, "training sample")
    rows = np.ascontiguousarray(sample[: spec.training_rows], dtype=np.float32)
    if len(rows) < fewest_training_rows(spec):
        raise ValueError(
            f"training sample ({len(rows)} rows) is too small for {spec.factory}: at least "
            f"{fewest_training_rows(spec)} rows are needed and {training_rows_needed(spec)} train it well; give more "
            "rows, fewer lists, or codec none or sq8"
        )
    if spec.family is Family.VAMANA:
        return spec.factory.encode()  # there is nothing to learn, and svs has no empty index
    index = _empty_index(spec)
    if requires_training(spec):
        with faiss_threads(threads):
            if plant:
                plant(index, sample=rows)
            index.train(rows)
    _refuse_other_metric(spec, index)
    trained: bytes = _faiss.serialize_index(index).tobytes()
    return trained


def limit_iterations(index: FaissObject, most: int) -> None:
    """Lets no k-means of an untrained index, of lists or code books, take more iterations."""
    for part in _parts(core_index(index)):
        for holder in (part, getattr(part, "pq", None)):
            if holder is not None and hasattr(holder, "cp"):
                holder.cp.niter = min(holder.cp.niter, most)


def shard_builder(spec: IndexSpec, trained: bytes, threads: int = 1) -> ShardBuilder | VamanaBuilder:
    """What fills a shard of a trained index: see both of them for the memory that it takes."""
    if spec.family is Family.VAMANA:
        return VamanaBuilder(spec.factory, spec.dimension, spec.ef_construction, threads)
    return ShardBuilder(trained, threads)


def open_shard(path: str | Path, family: Family, scratch: str | Path | None = None) -> AnyIndex:
    """Opens a shard of either kind: open_index() with `mmap`, or open_vamana()."""
    return open_vamana(path, scratch) if family is Family.VAMANA else open_index(path, family)


def open_index(path: str | Path, family: Family | None = None, *, mmap: bool = True) -> faiss.Index:
    """Opens a faiss shard. With `mmap` codes and graph stay in the file; lists too, if `family` says that it is IVF.

    Fast-scan codes are read into memory all the same, as faiss keeps them in aligned tables of its own.

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


def core_index(index: AnyIndex) -> FaissObject:
    """The index behind the vector transforms, as its own class."""
    if isinstance(index, VamanaIndex):
        return index
    outer = _faiss.downcast_index(index)
    core = _faiss.downcast_index(outer.index) if isinstance(outer, _faiss.IndexPreTransform) else outer
    _faiss.add_to_referenced_objects(core, index)  # the C++ object dies with its owner, whoever still uses the part
    return core


def bytes_per_vector(spec: IndexSpec, rows: int | None = None) -> float:
    """Bytes that one more row adds to the shard file (without ids and stored vectors), on average.

    What every shard holds whatever its rows (centroids, code books, rotation) is the trained index: its length counts
    once per shard.

    Args:
        rows: those of one shard, to count in the padding of fast-scan codes to whole blocks, of each list if there are
            any. Exact without lists; with them half a block for each is expected.
    """
    if rows is not None and rows < 1:
        raise ValueError(f"rows ({rows}) of a shard must be at least 1 to share its padding")
    anatomy = _anatomy_of(spec)
    padding = 0.0 if rows is None else anatomy.code_bytes * _padding_rows(anatomy, rows) / rows
    match spec.family:
        case Family.FLAT:
            return anatomy.code_bytes + padding
        case Family.HNSW:
            return anatomy.code_bytes + _graph_bytes(anatomy.links)
        case Family.IVF:
            return anatomy.code_bytes + padding + INVERTED_LIST_ID_BYTES
        case Family.VAMANA:
            return anatomy.code_bytes + VamanaLayout.parse(spec.factory, spec.dimension).graph_bytes
        case _:
            assert_never(spec.family)


@dataclass(frozen=True)
class _Anatomy:
    """What faiss builds of a factory string, known before training.

    Attributes:
        lists: inverted lists, 0 without.
        links: of a vertex on the upper levels of an HNSW graph, or of a Vamana graph; 0 without.
        learns: whether anything is learnt from a sample.
        code_bytes: of one row.
        block_rows: the codes of so many rows are stored as one block, of which the last is padded.
    """

    family: Family
    codec: Codec
    lists: int
    links: int
    learns: bool
    fewest_training_rows: int
    good_training_rows: int
    code_bytes: float
    block_rows: int


def _anatomy_of(spec: IndexSpec) -> _Anatomy:
    if spec.family is Family.VAMANA:
        return _vamana_anatomy(spec.factory, spec.dimension)
    return _anatomy(spec.factory, spec.dimension, faiss_metric(spec.family, spec.codec, spec.metric))


@lru_cache(maxsize=1024)
def _anatomy(factory: str, dimension: int, metric_type: int) -> _Anatomy:
    index = _built(factory, dimension, metric_type)
    transforms = _transforms(index)
    _refuse_transforms(factory, transforms)
    core = core_index(index)
    codes = _codes(core)
    codec = _codec(factory, codes)
    _refuse_sizes(factory, core, transforms)
    code_bytes, block_rows = _code_block(codes)
    lists = int(core.nlist) if isinstance(core, _faiss.IndexIVF) else 0
    learns_axes = [transform for transform in transforms if isinstance(transform, (_faiss.OPQMatrix, _faiss.PCAMatrix))]
    centroids = max([lists, _pq_centroids(codes), *(_opq_centroids(transform, codes) for transform in learns_axes)])
    statistics = learns_axes or codec in (Codec.SQ8, Codec.SQ6, Codec.SQ4, Codec.RABITQ, Codec.RABITQFS)
    return _Anatomy(
        family=_family(core),
        codec=codec,
        lists=lists,
        links=_links(core) if isinstance(core, _faiss.IndexHNSW) else 0,
        learns=bool(learns_axes) or not core.is_trained,
        # One per axis: with fewer, PCA of faiss 1.15 refuses and OPQ writes past its memory.
        fewest_training_rows=max([centroids, int(bool(statistics)), *(transform.d_out for transform in learns_axes)]),
        good_training_rows=max(TRAINING_ROWS_PER_CENTROID * centroids, RANGE_TRAINING_ROWS if statistics else 0),
        code_bytes=code_bytes,
        block_rows=block_rows,
    )


def _vamana_anatomy(factory: str, dimension: int) -> _Anatomy:
    """Nothing is trained: svs fits its codes to each shard while it builds it."""
    layout = VamanaLayout.parse(factory, dimension)
    codec = next(codec for codec, code in VAMANA_CODES.items() if code == layout.code)
    return _Anatomy(
        family=Family.VAMANA,
        codec=codec,
        lists=0,
        links=layout.degree,
        learns=False,
        fewest_training_rows=0,
        good_training_rows=0,
        code_bytes=layout.code_bytes,
        block_rows=1,
    )


def _vamana_factory(codec: Codec, dimension: int, degree: int, leanvec_dimension: int | None) -> str:
    code = VAMANA_CODES[codec]
    if leanvec_dimension is not None and codec not in LEANVEC_CODECS:
        raise ValueError(
            f"leanvec_dimension ({leanvec_dimension}) belongs to codecs {', '.join(LEANVEC_CODECS)}, got {codec}; "
            "leave it out"
        )
    reduced = max(1, dimension // 2) if leanvec_dimension is None else leanvec_dimension
    ending = f"_{reduced}" if codec in LEANVEC_CODECS else ""
    factory = f"{FACTORY_PREFIX}{degree}" + (f",{code}{ending}" if code else "")
    VamanaLayout.parse(factory, dimension)  # refuses what svs cannot build
    return factory


def _built(factory: str, dimension: int, metric_type: int) -> FaissObject:
    largest = max(map(int, re.findall(r"\d+", factory)), default=0)
    if largest > LARGEST_IN_FACTORY:
        raise ValueError(f"factory ({factory}) must hold no number beyond {LARGEST_IN_FACTORY}, got {largest}")
    try:
        return _faiss.index_factory(dimension, factory, metric_type)
    except RuntimeError as error:
        kind = "L2 distance" if metric_type == faiss.METRIC_L2 else "inner product"
        raise ValueError(
            f"factory ({factory}) must be a string of which faiss builds an index of {dimension} dimensions with "
            f"{kind}, got: {_reason(error)}; correct it, or leave it out and give family and codec"
        ) from error


def _family(core: FaissObject) -> Family:
    if isinstance(core, _faiss.IndexHNSW):
        return Family.HNSW
    return Family.IVF if isinstance(core, _faiss.IndexIVF) else Family.FLAT


def _codes(core: FaissObject) -> FaissObject:
    """The part that holds the codes: the storage of an HNSW index, else the index itself."""
    return _faiss.downcast_index(core.storage) if isinstance(core, _faiss.IndexHNSW) else core


def _links(core: FaissObject) -> int:
    per_level = core.hnsw.cum_nneighbor_per_level  # twice as many on the lowest; no level at all with one link
    return int(per_level.at(1)) // 2 if per_level.size() > 1 else 0


def _codec(factory: str, codes: FaissObject) -> Codec:
    if type(codes) in (_faiss.IndexScalarQuantizer, _faiss.IndexIVFScalarQuantizer):
        codec = CODEC_OF_SCALAR_QUANTIZER.get(codes.sq.qtype)
    else:
        codec = CODEC_OF_CLASS.get(type(codes))
    if codec is None:
        raise ValueError(
            f"factory ({factory}) must be of family {', '.join(Family)} with codec {', '.join(Codec)}, got "
            f"{type(codes).__name__}; leave out what re-ranks or renames rows, or take one of these codecs"
        )
    return codec


def _transforms(index: FaissObject) -> list[FaissObject]:
    """The transforms before the index, each as its own class; they live as long as the index."""
    if not isinstance(index, _faiss.IndexPreTransform):
        return []
    return [_faiss.downcast_VectorTransform(index.chain.at(place)) for place in range(index.chain.size())]


def _refuse_transforms(factory: str, transforms: list[FaissObject]) -> None:
    """Refuses transforms after which inner products are others, not only less exact."""
    kept = (
        _faiss.RandomRotationMatrix,
        _faiss.HadamardRotation,
        _faiss.OPQMatrix,
        _faiss.PCAMatrix,
        _faiss.RemapDimensionsTransform,
    )
    for transform in transforms:
        whitens = isinstance(transform, _faiss.PCAMatrix) and transform.eigen_power != 0
        if whitens or not isinstance(transform, kept):
            raise ValueError(
                f"factory ({factory}) must keep inner products, and its {type(transform).__name__} changes them; take "
                "RR, HR, OPQ, PCA or Pad"
            )


def _refuse_sizes(factory: str, core: FaissObject, transforms: list[FaissObject]) -> None:
    """Refuses what faiss builds but cannot train, fill or search."""
    ivf, codes = isinstance(core, _faiss.IndexIVF), _codes(core)
    rules = {
        "at least 1 list": not ivf or core.nlist >= 1,
        "lists found by Flat or HNSW": not ivf or type(_faiss.downcast_index(core.quantizer)) in COARSE_QUANTIZERS,
        "at least 2 links": not isinstance(core, _faiss.IndexHNSW) or _links(core) >= 2,
        "at least 1 bit": not hasattr(codes, "pq") or codes.pq.nbits >= 1,
        "transforms to at least 1 component": all(transform.d_out >= 1 for transform in transforms),
        "no more components of PCA than of the vectors": all(
            transform.d_out <= transform.d_in for transform in transforms if isinstance(transform, _faiss.PCAMatrix)
        ),
        "parts of OPQ that divide its components": all(
            transform.M >= 1 and transform.d_out % transform.M == 0
            for transform in transforms
            if isinstance(transform, _faiss.OPQMatrix)
        ),
    }
    broken = [rule for rule, kept in rules.items() if not kept]
    if broken:
        raise ValueError(f"factory ({factory}) must have {broken[0]}; correct it")


def _code_block(codes: FaissObject) -> tuple[float, int]:
    """Bytes of one row's code, and the rows whose codes are stored as one block."""
    if isinstance(codes, (_faiss.IndexFastScan, _faiss.IndexIVFFastScan)):
        packer = codes.get_CodePacker()
        return packer.block_size / packer.nvec, int(packer.nvec)
    return float(codes.code_size), 1


def _pq_centroids(codes: FaissObject) -> int:
    return int(codes.pq.ksub) if hasattr(codes, "pq") else 0


def _opq_centroids(transform: FaissObject, codes: FaissObject) -> int:
    """Centroids of each part of the product quantizer that OPQ rotates for: that of the codes, or one of its own."""
    return 2 ** _opq_bits(codes) if isinstance(transform, _faiss.OPQMatrix) else 0


def _opq_bits(codes: FaissObject) -> int:
    return int(codes.pq.nbits) if hasattr(codes, "pq") else DEFAULT_PQ_BITS


def _padding_rows(anatomy: _Anatomy, rows: int) -> float:
    """Rows of padding expected in a shard: at the end, or in each list."""
    if anatomy.lists == 0:
        return -rows % anatomy.block_rows
    filled = min(anatomy.lists, rows)
    return filled * max((anatomy.block_rows - 1) / 2, anatomy.block_rows - rows / filled)


def _graph_bytes(links: int) -> float:
    # Per row: a level (int32), an offset (uint64) and int32 links: 2m at the bottom, m for each level above, of which
    # there are 1 / (m - 1) on average (a row reaches level l with probability m^-l).
    return 4 + 8 + 4 * (2 * links + links / (links - 1))


def _opq_part(codec: Codec, dimension: int, width: int, pq_bytes: int | None, *, opq: bool, rotate: bool) -> str:
    if not opq:
        raise ValueError(f"opq_dimension ({width}) is kept by OPQ, which is off; set opq, or leave it out")
    if codec not in OPQ_CODECS:
        raise ValueError(f"opq (true) belongs to codecs {', '.join(OPQ_CODECS)}, got codec {codec}; leave it out")
    if rotate:
        raise ValueError("rotate (true) adds nothing before OPQ, which is a rotation; leave out one of them")
    if not 1 <= width <= dimension:
        raise ValueError(f"opq_dimension ({width}) must lie in 1..{dimension}, the dimension of the vectors")
    return f"OPQ{_sub_quantizers(codec, width, pq_bytes)}_{width},"


def _code_part(codec: Codec, width: int, pq_bytes: int | None, rabitq_bits: int) -> str:
    match codec:
        case Codec.NONE:
            return "Flat"
        case Codec.FP16:
            return "SQfp16"
        case Codec.SQ8 | Codec.SQ6 | Codec.SQ4:
            return codec.upper()
        case Codec.PQ:
            return f"PQ{_sub_quantizers(codec, width, pq_bytes)}"
        case Codec.PQFS:
            return f"PQ{_sub_quantizers(codec, width, pq_bytes)}x4fs"
        case Codec.RABITQ:
            return f"RaBitQ{_rabitq_bits(rabitq_bits)}"
        case Codec.RABITQFS:
            return f"RaBitQfs{_rabitq_bits(rabitq_bits)}"
        case Codec.LVQ8 | Codec.LVQ4X4 | Codec.LVQ4X8 | Codec.LEANVEC4X8 | Codec.LEANVEC8X8:
            raise ValueError(f"codec ({codec}) is one of svs, which faiss does not have; take family {Family.VAMANA}")
        case _:
            assert_never(codec)


def _rabitq_bits(bits: int) -> str:
    if not 1 <= bits <= MOST_RABITQ_BITS:
        raise ValueError(f"rabitq_bits ({bits}) must lie in 1..{MOST_RABITQ_BITS}")
    return "" if bits == 1 else str(bits)


def _coarse_part(lists: int) -> str:
    return f"IVF{lists}" + (f"_HNSW{COARSE_GRAPH_LINKS}" if lists >= COARSE_GRAPH_LISTS else "")


def _sub_quantizers(codec: Codec, width: int, pq_bytes: int | None) -> int:
    size_bytes = width // DIMENSIONS_PER_PQ_BYTE if pq_bytes is None else pq_bytes
    per_byte = 2 if codec is Codec.PQFS else 1
    if size_bytes < 1 or width % (size_bytes * per_byte):
        whole = "half the dimension" if codec is Codec.PQFS else "the dimension"
        fitting = ", ".join(str(n) for n in range(1, width + 1) if width % (n * per_byte) == 0)
        raise ValueError(
            f"pq_bytes ({size_bytes}) must divide {whole} ({width / per_byte:g}); "
            f"take {f'one of {fitting}' if fitting else 'codec pq'}"
        )
    return size_bytes * per_byte


def _list_count(nlist: int | None, rows: int | None) -> int:
    if nlist is not None:
        if nlist < 1:
            raise ValueError(f"nlist ({nlist}) must be at least 1")
        return nlist
    if rows is None:
        raise ValueError("nlist (none) of family ivf is derived from the rows of a shard; give nlist or rows")
    return max(1, min(round(CENTROIDS_PER_ROOT_ROW * math.sqrt(rows)), rows // TRAINING_ROWS_PER_CENTROID))


def _refuse_other_factory(spec: IndexSpec) -> None:
    anatomy = _anatomy_of(spec)
    if (anatomy.family, anatomy.codec) != (spec.family, spec.codec):
        raise ValueError(
            f"factory ({spec.factory}) is not one of family {spec.family} with codec {spec.codec}, but of "
            f"{anatomy.family} with {anatomy.codec}; write it with factory_string() or read it with parse_factory()"
        )


def _empty_index(spec: IndexSpec) -> FaissObject:
    """The untrained index with all its random choices seeded."""
    index = _built(spec.factory, spec.dimension, faiss_metric(spec.family, spec.codec, spec.metric))
    core = core_index(index)
    transforms = _transforms(index)
    for transform in transforms:
        _prepare_transform(index, transform, _codes(core), spec.seed)
    for part in _parts(core):
        _prepare_clustering(part, spec.seed)
        if isinstance(part, _faiss.IndexHNSW):
            part.hnsw.efConstruction = spec.ef_construction
        if isinstance(part, _faiss.IndexHNSW) and isinstance(core, _faiss.IndexIVF):
            part.hnsw.efSearch = COARSE_GRAPH_EF_SEARCH
    index.is_trained = core.is_trained and all(transform.is_trained for transform in transforms)
    return index


def _parts(core: FaissObject) -> list[FaissObject]:
    """The core index with the ones inside it that may cluster or hold a graph."""
    if isinstance(core, _faiss.IndexIVF):
        return [core, _faiss.downcast_index(core.quantizer)]
    return [core, _codes(core)]


def _prepare_transform(index: FaissObject, transform: FaissObject, codes: FaissObject, seed: int) -> None:
    """Seeds a transform, which faiss would start from a seed of its own, and keeps PCA from shifting."""
    if isinstance(transform, (_faiss.RandomRotationMatrix, _faiss.HadamardRotation)):
        transform.init(seed)  # marks it as trained, which keeps train() from drawing it again
    elif isinstance(transform, _faiss.PCAMatrix):
        transform.have_bias = False
    elif isinstance(transform, _faiss.OPQMatrix):
        start = _faiss.RandomRotationMatrix(max(transform.d_in, transform.d_out), transform.d_out)
        start.init(seed)
        transform.A = start.A
        # Without a quantizer to learn for, faiss takes one of 8 bits, which for 4-bit codes is slower and less fit.
        transform.pq = quantizer = _faiss.ProductQuantizer(transform.d_out, transform.M, _opq_bits(codes))
        quantizer.cp.seed = seed
        quantizer.cp.min_points_per_centroid = 1
        _faiss.add_to_referenced_objects(index, quantizer)


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
    # The two kinds of mapping exclude each other: with the first, centroids are in memory and lists in the file.
    return int(faiss.IO_FLAG_MMAP if family is Family.IVF else faiss.IO_FLAG_MMAP_IFC)


def _stop_prefetching(index: faiss.Index) -> None:
    """Keeps mapped inverted lists from starting 32 threads per search: 0.42 ms against 0.03 ms on 3,000 rows."""
    core = core_index(index)
    if isinstance(core, _faiss.IndexIVF):
        lists = _faiss.downcast_InvertedLists(core.invlists)
        if hasattr(lists, "prefetch_nthread"):
            lists.prefetch_nthread = 0


@contextmanager
def faiss_threads(count: int) -> Iterator[None]:
    """Runs faiss with this many OpenMP threads, a setting of the calling thread alone."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _reason(error: RuntimeError) -> str:
    """faiss' own words, without the C++ signature and source line in front of them."""
    words = re.split(r"\.(?:cpp|h):\d+: ", str(error))[-1]
    return words.rsplit("failed: ", 1)[-1].removeprefix("Error: ").strip()
