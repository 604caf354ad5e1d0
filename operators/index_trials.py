"""Measure index configurations on a sample: each is built, and searched at the point that reaches a recall with the
least work."""

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, assert_never

import faiss
import numpy as np
import pyarrow as pa

from penstock.operators.evaluation import (
    TIE_ROOM,
    Neighbours,
    accepted_neighbours,
    exact_neighbours,
    recall_at_k,
)
from penstock.operators.indexing import (
    TRAINING_ROWS_PER_CENTROID,
    Codec,
    FaissObject,
    Family,
    IndexSpec,
    Metric,
    ShardBuilder,
    bytes_per_vector,
    factory_string,
    faiss_threads,
    limit_iterations,
    nlist_of,
    open_index,
    requires_training,
    train_index,
)
from penstock.operators.moments import moments_of
from penstock.operators.recall_prediction import recall_of_more_rows
from penstock.operators.search_parameters import faiss_parameters
from penstock.operators.searching import SearchParameters, ShardSearcher, StoredVectors, VectorWriter, open_vectors
from penstock.operators.transform_fitting import fit_step
from penstock.operators.transforms import Chain, FittedStep, Pca, metric_after
from penstock.operators.vector_codecs import VectorCodec, code_bytes, is_lvq

TIMED_ROUNDS = 3
TIMED_SINGLE_QUERIES = 32
RERANK_FACTORS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
GRAPH_RERANK_FACTORS = (1, 2, 4)  # a graph searches as widely as it is asked for rows: more is its width again
# Widths of search (ef_search, nprobe) that are tried lie this factor apart: queries per second are known to 10 %.
WIDTH_STEP = 1.15
COARSE_STEPS = 4  # widths are tried in strides of so many steps first, and one by one within the stride that suffices
# A width whose search of the index alone takes so many times as long as the first that sufficed cannot be the fastest.
TOO_WIDE = 4
SATURATED = 0.001  # recall that a stride gains where more width finds nothing more
LEAST_EF, MOST_EF = 10, 1024
BUILD_ROWS = 8192
CENTROID_BYTES = 4.0  # of a component
LVQ_SCALE_BYTES = 4  # offset and scale of a stored vector
NO_ROW = -2  # faiss says -1 where it found none


@dataclass(frozen=True)
class Budget:
    """What the user knows: recall at k, and at most so many index bytes a vector (stored vectors for re-ranking are
    memory-mapped and do not count) and milliseconds for a single query on one thread."""

    recall: float
    k: int = 10
    bytes_per_vector: float | None = None
    latency_ms: float | None = None


@dataclass(frozen=True)
class Candidate:
    """An index configuration. `nlist` is that of a whole shard; None derives it from the rows. `reduced` is how many
    principal components of the vectors are indexed; None indexes them as they are."""

    family: Family
    codec: Codec
    rerank: bool
    hnsw_m: int = 32
    pq_bytes: int | None = None
    rabitq_bits: int = 1
    nlist: int | None = None
    reduced: int | None = None

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Candidate":
        """The candidate of a trial's record."""
        names = ("hnsw_m", "pq_bytes", "rabitq_bits", "nlist", "reduced")
        options = {name: record[name] for name in names if name in record}
        return cls(Family(record["family"]), Codec(record["codec"]), bool(record["rerank"]), **options)

    def of_sample(self, rows: int, shard_rows: int) -> "Candidate":
        """The same in fewer rows: lists are fewer by the root of the rows."""
        if self.nlist is None or rows >= shard_rows:
            return self
        lists = round(self.nlist * math.sqrt(rows / shard_rows))
        return replace(self, nlist=max(1, min(lists, rows // TRAINING_ROWS_PER_CENTROID)))

    def spec(self, dimension: int, metric: Metric, rows: int, seed: int, training_rows: int) -> IndexSpec:
        """The index of a shard of `rows` vectors, which have this dimension and metric before they are reduced."""
        if self.reduced is not None:
            dimension, metric = self.reduced, metric_after(Pca(self.reduced), dimension, metric)
        factory = factory_string(
            self.family,
            self.codec,
            dimension,
            hnsw_m=self.hnsw_m,
            nlist=self.nlist,
            rows=rows,
            pq_bytes=self.pq_bytes,
            rabitq_bits=self.rabitq_bits,
        )
        return IndexSpec(self.family, self.codec, metric, dimension, factory, training_rows, seed)


@dataclass(frozen=True)
class Trial:
    """A candidate as measured on `rows` vectors at the operating point that reaches the recall with least work.

    Queries are timed in one batch, `latency_ms` one by one, both on one thread; both figures are for a shard of
    `shard_rows`, by how its family scales. `query_us` is what a query of the batch took as measured, of which
    `index_us` within the index: that part grows with the rows; `single_ms` is what a query by itself took as measured.
    `shard_recall` is what the same lists and width are predicted to keep in a shard. `bytes_per_vector` is of the index
    file of a whole shard, and of the transforms in front of it as if each shard had its own; stored vectors for
    re-ranking are `rerank_bytes`. `factory` is that of the index, behind `PCA` where vectors are reduced.
    """

    candidate: Candidate
    factory: str
    rows: int
    shard_rows: int
    parameters: SearchParameters
    recall: float
    shard_recall: float
    query_us: float
    index_us: float
    single_ms: float
    queries_per_s: float
    latency_ms: float
    bytes_per_vector: float
    rerank_bytes: float
    build_s: float

    def meets(self, budget: Budget) -> bool:
        """Whether all that the budget names holds."""
        return not self.misses(budget)

    def misses(self, budget: Budget) -> dict[str, float]:
        """By how much, as a share, each unmet part of the budget is missed."""
        over = {"recall": (budget.recall - self.recall) / budget.recall if budget.recall else 0.0}
        if budget.bytes_per_vector is not None:
            over["bytes_per_vector"] = self.bytes_per_vector / budget.bytes_per_vector - 1
        if budget.latency_ms is not None:
            over["latency_ms"] = self.latency_ms / budget.latency_ms - 1
        return {name: share for name, share in over.items() if share > 0}

    def grown(self, exponent: float) -> "Trial":
        """The figures for a whole shard, where the time in the index grows with this power of the rows: from what was
        measured, so that a later estimate replaces an earlier one."""
        more_us = self.index_us * ((self.shard_rows / self.rows) ** exponent - 1)
        return replace(
            self,
            queries_per_s=1e6 / (self.query_us + more_us),
            latency_ms=self.single_ms * (1 + more_us / self.query_us),
        )

    def to_json(self) -> dict[str, Any]:
        candidate = {name: value for name, value in asdict(self.candidate).items() if value is not None}
        figures = {
            "recall": round(self.recall, 5),
            "shard_recall": round(self.shard_recall, 5),
            "query_us": round(self.query_us, 2),
            "index_us": round(self.index_us, 2),
            "single_ms": round(self.single_ms, 4),
            "queries_per_s": round(self.queries_per_s, 1),
            "latency_ms": round(self.latency_ms, 4),
            "bytes_per_vector": round(self.bytes_per_vector, 1),
            "rerank_bytes": round(self.rerank_bytes, 1),
            "build_s": round(self.build_s, 3),
        }
        return {
            **candidate,
            "factory": self.factory,
            "rows": self.rows,
            "shard_rows": self.shard_rows,
            "parameters": self.parameters.to_json(),
        } | figures


@dataclass(frozen=True, eq=False)
class Sample:
    """Rows of the corpus and held-out queries, float32 (n, d) and (q, d), with the exact neighbours of the latter.

    `neighbours` holds their rows, int64 (q, m), best first; `accepted` those that count as found. NO_ROW fills both.
    `counts` is how many true neighbours each query has, int64 (q,). `chain` are transforms in front of every index,
    fitted; `stored` is how vectors for re-ranking are kept. `iterations` bounds those of k-means; None bounds nothing.
    """

    vectors: np.ndarray
    queries: np.ndarray
    truth: Neighbours
    metric: Metric
    neighbours: np.ndarray
    accepted: np.ndarray
    counts: np.ndarray
    chain: Chain | None = None
    stored: VectorCodec = VectorCodec.FLOAT16
    iterations: int | None = None

    @property
    def space(self) -> tuple[int, Metric]:
        """Dimension and metric behind the transforms in front of every index."""
        if self.chain is None:
            return self.vectors.shape[1], self.metric
        return self.chain.output_dimension, self.chain.metric_after(self.metric)

    def chain_of(self, candidate: Candidate) -> Chain | None:
        """What vectors and queries pass before this index; None where they come as they are."""
        if candidate.reduced is None:
            return self.chain
        dimension = self.vectors.shape[1]
        arrays = {"matrix": self._components[: candidate.reduced]}
        return Chain(dimension, (FittedStep(Pca(candidate.reduced), dimension, arrays),))

    @cached_property
    def _components(self) -> np.ndarray:
        """All principal directions of the vectors, float32 (d, d): those of fewer are the first of them."""
        moments = moments_of(self.vectors, self.vectors.mean(axis=0, dtype=np.float64))
        return fit_step(Pca(), self.vectors.shape[1], moments, None).arrays["matrix"]


def make_sample(
    vectors: np.ndarray,
    queries: np.ndarray,
    metric: Metric,
    k: int,
    chain: Chain | None = None,
    stored: VectorCodec = VectorCodec.FLOAT16,
    iterations: int | None = None,
) -> Sample:
    """A sample with the exact neighbours of its queries."""
    batch = [(_row_ids(len(vectors)), vectors)]
    truth = exact_neighbours(queries, batch, k + TIE_ROOM, metric, [None] * len(queries))
    neighbours = np.array([[_row_of(row_id) for row_id in ids] for ids in truth.ids], np.int64)
    known = [accepted_neighbours(truth, query, k) for query in range(len(queries))]
    counts, floors = (np.array([facts[column] for facts in known]) for column in (0, 1))
    accepted = np.where(truth.similarities >= floors[:, None], neighbours, NO_ROW)
    return Sample(vectors, queries, truth, metric, neighbours, accepted, counts, chain, stored, iterations)


def groups(grid: Iterable[Candidate]) -> list[tuple[Candidate, ...]]:
    """Candidates that differ only in re-ranking share an index, and so are measured together."""
    found: dict[Candidate, list[Candidate]] = {}
    for one in grid:
        found.setdefault(replace(one, rerank=False), []).append(one)
    return [tuple(group) for group in found.values()]


def measure(
    sample: Sample, group: Sequence[Candidate], budget: Budget, seed: int, training_rows: int, shard_rows: int
) -> list[Trial]:
    """Build one index of the whole sample and search it as a reader would, with and without re-ranking.

    Args:
        group: candidates with one index, as of `groups`.
        shard_rows: the size of a shard, for which bytes are counted; at least the sample's.

    Memory: the sample, the index, and what building it takes.
    """
    with tempfile.TemporaryDirectory(prefix="penstock-tune-") as place:
        built = _built(sample, group, seed, training_rows, shard_rows, Path(place))
        with faiss_threads(1):
            return [_trial(sample, one, budget, shard_rows) for one in built]


def usual_growth(family: Family, rows: int, larger: int) -> float:
    """The power of the rows with which a search of the index takes longer: all of them are compared, about their root
    of the lists' (whose number grows with the root), or a number that grows with the logarithm."""
    match family:
        case Family.FLAT:
            return 1.0
        case Family.IVF:
            return 0.5
        case Family.HNSW | Family.VAMANA:
            rows, larger = max(rows, 2), max(larger, 3)
            return math.log(math.log(larger) / math.log(rows)) / math.log(larger / rows) if larger > rows else 0.0
        case _:
            assert_never(family)


@dataclass(frozen=True)
class _Built:
    """A candidate's index, opened as a reader opens it, and `queries` as the index itself is asked, float32 (q, d')."""

    candidate: Candidate
    spec: IndexSpec
    index: faiss.Index
    searcher: ShardSearcher
    queries: np.ndarray
    index_bytes: int
    chain_bytes: int
    build_s: float


def _built(
    sample: Sample, group: Sequence[Candidate], seed: int, training_rows: int, shard_rows: int, place: Path
) -> Iterator[_Built]:
    rows, chain = len(sample.vectors), sample.chain_of(group[0])
    spec = group[0].of_sample(rows, shard_rows).spec(*sample.space, rows, seed, training_rows)
    path = place / "index.faiss"
    started = time.perf_counter()
    _build(spec, chain.apply_documents(sample.vectors) if chain else sample.vectors, path, sample.iterations)
    build_s = time.perf_counter() - started
    index = open_index(path, spec.family)
    queries = chain.apply_queries(sample.queries) if chain else sample.queries
    chain_bytes = len(chain.to_bytes()) if chain else 0
    for one in group:
        stored = _stored(sample, place / "vectors.arrow") if one.rerank else None
        searcher = ShardSearcher(index, _row_ids(rows), stored, sample.metric, 0, chain)
        yield _Built(one, spec, index, searcher, queries, path.stat().st_size, chain_bytes, build_s)


def _trial(sample: Sample, built: _Built, budget: Budget, shard_rows: int) -> Trial:
    point, recall = _operating_point(sample, built, budget)
    query_us, index_us = _timed_batch(built, sample.queries, budget.k, point)
    single_ms = _timed_singles(built.searcher, sample.queries, budget.k, point)
    rows, dimension = sample.vectors.shape
    reduced = built.candidate.reduced
    trial = Trial(
        candidate=built.candidate,
        factory=built.spec.factory if reduced is None else f"PCA{reduced},{built.spec.factory}",
        rows=rows,
        shard_rows=shard_rows,
        parameters=point,
        recall=recall,
        shard_recall=_shard_recall(sample, built, budget.k, point, shard_rows) if shard_rows > rows else recall,
        query_us=query_us,
        index_us=index_us,
        single_ms=single_ms,
        queries_per_s=1e6 / query_us,
        latency_ms=single_ms,
        bytes_per_vector=_bytes_in_shard(built, sample, shard_rows),
        rerank_bytes=_stored_bytes(sample) if built.candidate.rerank else 0.0,
        build_s=built.build_s,
    )
    return trial.grown(usual_growth(built.candidate.family, rows, shard_rows))


def _stored_bytes(sample: Sample) -> float:
    """Of one vector kept for re-ranking."""
    lvq = LVQ_SCALE_BYTES if is_lvq(sample.stored) else 0
    return float(code_bytes(sample.stored, sample.vectors.shape[1]) + lvq)


def _bytes_in_shard(built: _Built, sample: Sample, shard_rows: int) -> float:
    """Bytes per vector of a whole shard: what a row adds, and its part of what every index holds (transforms,
    centroids, code books, rotation), of which centroids become more with the rows."""
    rows = len(sample.vectors)
    spec = built.candidate.spec(*sample.space, shard_rows, built.spec.seed, built.spec.training_rows)
    whole: float = built.chain_bytes + built.index_bytes - bytes_per_vector(built.spec, rows) * rows
    more_centroids = (nlist_of(spec) - nlist_of(built.spec)) * CENTROID_BYTES * spec.dimension
    return float(bytes_per_vector(spec, shard_rows) + (whole + more_centroids) / shard_rows)


# ---- the operating point


def _operating_point(sample: Sample, built: _Built, budget: Budget) -> tuple[SearchParameters, float]:
    """The fastest point that reaches the recall, else the one with the highest recall that was tried, and its recall.

    Widths are found from the candidates that the index offers, as re-ranking returns the true ones among them; the
    recall of the point is of a search with all that a reader does.
    """
    widths = _Widths(sample, built, budget)
    points = widths.enough()
    position, factor = min(
        points or [widths.best_missed()],
        key=lambda one: _seconds(built.searcher, sample.queries, budget.k, widths.at(*one)),
    )
    recall = _recall(sample, built, budget.k, widths.at(position, factor))
    while points and recall < budget.recall and position < widths.last:
        position += 1
        recall = _recall(sample, built, budget.k, widths.at(position, factor))
    return widths.at(position, factor), recall


class _Widths:
    """Widths of search from narrow to wide, and the recall of each factor of re-ranking at those that were tried."""

    def __init__(self, sample: Sample, built: _Built, budget: Budget) -> None:
        self._sample, self._built, self._budget = sample, built, budget
        self._widths = _widths(built.spec, len(sample.vectors))
        self._tried: dict[tuple[int, int], tuple[dict[int, float], float]] = {}
        self.last = len(self._widths) - 1

    def at(self, position: int, factor: int) -> SearchParameters:
        return replace(self._widths[position], rerank_factor=factor)

    def enough(self) -> list[tuple[int, int]]:
        """Least position and factor, for each factor that reaches the recall without being far too slow."""
        if not self._built.candidate.rerank:
            return self._least((1,))
        if self._built.spec.family is Family.HNSW:
            return [point for factor in GRAPH_RERANK_FACTORS for point in self._least((factor,))]
        return self._least(RERANK_FACTORS)

    def best_missed(self) -> tuple[int, int]:
        """Of all that was tried, position and factor with the highest recall."""
        found = [
            (recall, position, factor)
            for (position, _), (tried, _) in self._tried.items()
            for factor, recall in tried.items()
        ]
        _, position, factor = max(found)
        return position, factor

    def _least(self, factors: Sequence[int]) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for factor, (below, position) in self._strides(factors).items():
            low, high = below + 1, position
            while low < high:
                middle = (low + high) // 2
                if self._try(middle, factors)[0][factor] >= self._budget.recall:
                    high = middle
                else:
                    low = middle + 1
            if not found or high < found[-1][0]:  # to re-rank more without searching less is only slower
                found.append((high, factor))
        return found

    def _strides(self, factors: Sequence[int]) -> dict[int, tuple[int, int]]:
        """For each factor that reaches the recall the stride in which it does: the last position that does not, and
        one that does."""
        reached: dict[int, tuple[int, int]] = {}
        first_seconds, before, below = math.inf, -1.0, -1
        for position in [*range(0, self.last, COARSE_STEPS), self.last]:
            recalls, seconds = self._try(position, factors)
            for factor in factors:
                if recalls[factor] >= self._budget.recall:
                    reached.setdefault(factor, (below, position))
            first_seconds = min(first_seconds, seconds if reached else math.inf)
            stopped = not reached and recalls[factors[-1]] < before + SATURATED
            if len(reached) == len(factors) or seconds > TOO_WIDE * first_seconds or stopped:
                break
            before, below = recalls[factors[-1]], position
        return reached

    def _try(self, position: int, factors: Sequence[int]) -> tuple[dict[int, float], float]:
        """The recall of each factor at a width, and seconds in the index."""
        fetched = min(self._budget.k * factors[-1], len(self._sample.vectors))
        if (position, fetched) not in self._tried:
            parameters = faiss_parameters(self._built.index, self._widths[position])
            started = time.process_time()
            rows = self._built.index.search(self._built.queries, fetched, params=parameters)[1]
            seconds = time.process_time() - started
            self._tried[position, fetched] = self._recalls(rows, factors), seconds
        return self._tried[position, fetched]

    def _recalls(self, rows: np.ndarray, factors: Sequence[int]) -> dict[int, float]:
        """Recall when the first k * factor of the rows (q, n) are compared exactly."""
        hits = np.cumsum((rows[:, :, None] == self._sample.accepted[:, None, :]).any(axis=2), axis=1)
        counts = self._sample.counts
        return {
            factor: float(np.mean(np.minimum(hits[:, : self._budget.k * factor][:, -1], counts) / counts))
            for factor in factors
        }


def _recall(sample: Sample, built: _Built, k: int, point: SearchParameters) -> float:
    hits = built.searcher.search(sample.queries, k, point)
    exact = hits.similarities if built.candidate.rerank and not is_lvq(sample.stored) else None
    return float(np.nanmean(recall_at_k(hits.ids, sample.truth, k, exact)))


def _shard_recall(sample: Sample, built: _Built, k: int, point: SearchParameters, shard_rows: int) -> float:
    offered = k * point.rerank_factor
    fetched = min(offered, len(sample.vectors))
    parameters = faiss_parameters(built.index, point)
    candidates = built.index.search(built.queries, fetched, params=parameters)[1]
    return recall_of_more_rows(candidates, sample.neighbours, k, offered, len(sample.vectors), shard_rows)


def _widths(spec: IndexSpec, rows: int) -> list[SearchParameters]:
    """Search parameters from narrow to wide: ef_search or nprobe in steps of about WIDTH_STEP, up to all there is."""
    match spec.family:
        case Family.FLAT:
            return [SearchParameters()]
        case Family.HNSW | Family.VAMANA:
            most = max(LEAST_EF, min(MOST_EF, rows))
            return [SearchParameters(ef_search=ef) for ef in _steps(LEAST_EF, most)]
        case Family.IVF:
            return [SearchParameters(nprobe=nprobe) for nprobe in _steps(1, nlist_of(spec))]
        case _:
            assert_never(spec.family)


def _steps(first: int, last: int) -> list[int]:
    found = [first]
    while found[-1] < last:
        found.append(min(last, max(found[-1] + 1, round(found[-1] * WIDTH_STEP))))
    return found


# ---- timing


def _timed_batch(built: _Built, queries: np.ndarray, k: int, point: SearchParameters) -> tuple[float, float]:
    """Microseconds of a query in one batch, and those of them within the index: the least of some rounds, as what else
    runs on a machine only adds."""
    parameters = faiss_parameters(built.index, point)
    fetched = min(k * point.rerank_factor, built.index.ntotal)
    whole_s, index_s = [], []
    for _ in range(TIMED_ROUNDS):
        whole_s.append(_seconds(built.searcher, queries, k, point))
        index_s.append(_elapsed(lambda: built.index.search(built.queries, fetched, params=parameters)))
    whole = min(whole_s)
    return 1e6 * whole / len(queries), 1e6 * min(*index_s, whole) / len(queries)


def _timed_singles(searcher: ShardSearcher, queries: np.ndarray, k: int, point: SearchParameters) -> float:
    """Milliseconds of a single query: the median."""
    seconds = []
    for query in queries[:TIMED_SINGLE_QUERIES]:
        started = time.perf_counter()
        searcher.search(query[None, :], k, point)
        seconds.append(time.perf_counter() - started)
    return 1000 * float(np.median(seconds))


def _seconds(searcher: ShardSearcher, queries: np.ndarray, k: int, point: SearchParameters) -> float:
    return _elapsed(lambda: searcher.search(queries, k, point))


def _elapsed(work: Callable[[], object]) -> float:
    """CPU seconds: what a machine does beside delays a search, and says nothing of the index."""
    started = time.process_time()
    work()
    return time.process_time() - started


# ---- building


def _build(spec: IndexSpec, vectors: np.ndarray, path: Path, most: int | None) -> None:
    """A shard of all the vectors, as a run builds one, but for the iterations of k-means where these are bounded."""
    plant = None if most is None else partial(_hasten, most=most)
    rows = vectors[: spec.training_rows] if requires_training(spec) else vectors[:0]
    trained = train_index(spec, rows, plant=plant)
    builder = ShardBuilder(trained)
    for first in range(0, len(vectors), BUILD_ROWS):
        builder.add(vectors[first : first + BUILD_ROWS])
    builder.write(path)


def _hasten(index: FaissObject, sample: np.ndarray, most: int) -> None:
    limit_iterations(index, most)


def _stored(sample: Sample, path: Path) -> StoredVectors:
    vectors = sample.vectors
    mean = vectors.mean(axis=0) if is_lvq(sample.stored) else None
    with VectorWriter(path, vectors.shape[1], sample.stored, mean) as writer:
        for first in range(0, len(vectors), BUILD_ROWS):
            writer.add(vectors[first : first + BUILD_ROWS])
    return open_vectors(path)


def _row_ids(rows: int) -> pa.Array:
    return pa.array([f"row-{row:09d}" for row in range(rows)], pa.string())


def _row_of(row_id: str | None) -> int:
    return NO_ROW if row_id is None else int(row_id.removeprefix("row-"))
