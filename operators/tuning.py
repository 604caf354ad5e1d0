"""A budget in, an index configuration out: candidates are built and searched on a sample of the vectors.

First every candidate is built on a small part of the sample, and its seconds per query at the size of a shard are
estimated from how its family scales; then the most promising are built and measured on the whole sample. Recall is
against exact search of the same sample, at the operating point that reaches it with the least work.
"""

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import pyarrow as pa

from penstock.operators.evaluation import TIE_ROOM, Neighbours, exact_neighbours, recall_at_k
from penstock.operators.indexing import (
    Codec,
    Family,
    IndexSpec,
    Metric,
    ShardBuilder,
    bytes_per_vector,
    factory_string,
    faiss_threads,
    fewest_training_rows,
    nlist_of,
    open_index,
    requires_training,
    train_index,
)
from penstock.operators.searching import SearchParameters, ShardSearcher, StoredVectors, VectorWriter, open_vectors

SCREENING_ROWS = 10_000  # of the sample that all candidates are measured on
FINALISTS = 4
# A candidate is measured in full when its estimate is at most this many times the best one's.
PROMISING = 2.5
TIMED_ROUNDS = 3
TIMED_SINGLE_QUERIES = 100
RERANK_FACTORS = (1, 2, 4, 8, 16)
# Widths of search (ef_search, nprobe) that are tried lie this factor apart: queries per second are known to 10 %.
WIDTH_STEP = 1.15
LEAST_EF, MOST_EF = 10, 1024
BUILD_ROWS = 8192
CENTROID_BYTES = 4.0  # of a component
STORED_BYTES = 2.0  # of a component of a stored vector


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
    """An index configuration, but for what follows from the number of rows."""

    family: Family
    codec: Codec
    rerank: bool
    hnsw_m: int = 32
    pq_bytes: int | None = None
    rabitq_bits: int = 1
    opq: bool = False

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Candidate":
        """The candidate of a trial's record."""
        options = {name: record[name] for name in ("hnsw_m", "pq_bytes", "rabitq_bits", "opq") if name in record}
        return cls(Family(record["family"]), Codec(record["codec"]), bool(record["rerank"]), **options)

    def spec(self, dimension: int, metric: Metric, rows: int, seed: int, training_rows: int) -> IndexSpec:
        """The index of a shard of `rows` vectors."""
        factory = factory_string(
            self.family,
            self.codec,
            dimension,
            hnsw_m=self.hnsw_m,
            rows=rows,
            pq_bytes=self.pq_bytes,
            rabitq_bits=self.rabitq_bits,
            opq=self.opq,
        )
        return IndexSpec(self.family, self.codec, metric, dimension, factory, training_rows, seed)


@dataclass(frozen=True)
class Trial:
    """A candidate as measured on `rows` vectors at the operating point that reaches the recall with least work.

    Queries are timed in one batch, `latency_ms` one by one, both on one thread; both figures are for a shard of
    `shard_rows`, by how its family scales. `bytes_per_vector` is of the index file of a whole shard; stored vectors for
    re-ranking are `rerank_bytes`.
    """

    candidate: Candidate
    factory: str
    rows: int
    shard_rows: int
    parameters: SearchParameters
    recall: float
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

    def to_json(self) -> dict[str, Any]:
        candidate = {name: value for name, value in asdict(self.candidate).items() if value is not None}
        figures = {
            "recall": round(self.recall, 5),
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


@dataclass(frozen=True)
class Sample:
    """Rows of the corpus and held-out queries, float32 (n, d) and (q, d), with the exact neighbours of the latter."""

    vectors: np.ndarray
    queries: np.ndarray
    truth: Neighbours
    metric: Metric


def make_sample(vectors: np.ndarray, queries: np.ndarray, metric: Metric, k: int) -> Sample:
    """A sample with the exact neighbours of its queries."""
    batch = [(_row_ids(len(vectors)), vectors)]
    return Sample(
        vectors, queries, exact_neighbours(queries, batch, k + TIE_ROOM, metric, [None] * len(queries)), metric
    )


@dataclass(frozen=True)
class Tuned:
    """What was tried, and what was chosen: the fastest of those that meet the budget, else the one that comes
    nearest. `screened` were measured on a part of the sample only."""

    budget: Budget
    chosen: Trial
    trials: tuple[Trial, ...]
    screened: tuple[Trial, ...]

    @property
    def met(self) -> bool:
        return self.chosen.meets(self.budget)

    def to_json(self) -> dict[str, Any]:
        return {
            "budget": asdict(self.budget),
            "met": self.met,
            "misses": {name: round(share, 4) for name, share in self.chosen.misses(self.budget).items()},
            "chosen": self.chosen.to_json(),
            "trials": [trial.to_json() for trial in self.trials],
            "pareto": [trial.to_json() for trial in pareto(self.trials)],
            "screened": [trial.to_json() for trial in self.screened],
        }


def candidates(
    dimension: int, metric: Metric, rows: int, budget: Budget, training_rows: int, sample_rows: int
) -> list[Candidate]:
    """The grid, but for what faiss cannot build for this metric, what breaks the budget of bytes unbuilt, and what so
    few rows cannot train.

    Args:
        rows: of a shard.
        sample_rows: of the smallest sample that the candidates are measured on.

    Raises:
        ValueError: no configuration can meet the bytes, whatever its recall.
    """
    grid = [
        (one, _index_bytes(one, dimension, metric, rows, min(training_rows, rows)))
        for one in _grid(dimension)
        if _trainable(one, dimension, metric, sample_rows, training_rows)
    ]
    limit = math.inf if budget.bytes_per_vector is None else budget.bytes_per_vector
    fit = [one for one, size in grid if size is not None and size <= limit]
    if not fit:
        least = min(size for _, size in grid if size is not None)
        raise ValueError(
            f"bytes_per_vector ({limit:g}) is below the {least:.0f} of the smallest index of {dimension} dimensions; "
            "raise it, or lower embedding.dimension"
        )
    return fit


def groups(grid: Sequence[Candidate]) -> list[tuple[Candidate, ...]]:
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
        built = _built(sample, group, seed, training_rows, Path(place))
        with faiss_threads(1):
            return [_trial(sample, one, budget, shard_rows) for one in built]


def finalists(screened: Sequence[Trial], budget: Budget) -> list[Candidate]:
    """Of candidates measured on few rows, those that are worth measuring on many: with most queries per second in a
    shard, if their bytes fit and they reach the recall (or, where none does, all the same)."""
    fit = [trial for trial in screened if trial.meets(replace(budget, latency_ms=None))] or list(screened)
    enough = max(trial.queries_per_s for trial in fit) / PROMISING
    promising = sorted(
        (trial for trial in fit if trial.queries_per_s >= enough), key=lambda trial: -trial.queries_per_s
    )
    return [trial.candidate for trial in promising[:FINALISTS]]


def choose(trials: Sequence[Trial], budget: Budget) -> Trial:
    """The one with most queries per second of those that meet the budget; else the one whose largest miss is least."""
    meeting = [trial for trial in trials if trial.meets(budget)]
    if meeting:
        return max(meeting, key=lambda trial: (trial.queries_per_s, -trial.bytes_per_vector))
    return min(trials, key=lambda trial: (max(trial.misses(budget).values()), -trial.queries_per_s))


def pareto(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other one beats in queries per second, bytes and recall at once."""
    return [one for one in trials if not any(_dominates(other, one) for other in trials)]


def _dominates(a: Trial, b: Trial) -> bool:
    figures = [(t.queries_per_s, -t.bytes_per_vector, t.recall, -t.rerank_bytes) for t in (a, b)]
    return all(x >= y for x, y in zip(*figures, strict=True)) and figures[0] != figures[1]


@dataclass(frozen=True)
class _Built:
    """A candidate's index, opened as a reader opens it."""

    candidate: Candidate
    spec: IndexSpec
    searcher: ShardSearcher
    index_bytes: int
    build_s: float


def _built(sample: Sample, group: Sequence[Candidate], seed: int, training_rows: int, place: Path) -> Iterator[_Built]:
    rows, dimension = sample.vectors.shape
    spec = group[0].spec(dimension, sample.metric, rows, seed, training_rows)
    path = place / "index.faiss"
    started = time.perf_counter()
    _build(spec, sample.vectors, path)
    build_s = time.perf_counter() - started
    index = open_index(path, spec.family)
    for one in group:
        stored = _stored(sample.vectors, place / "vectors.arrow") if one.rerank else None
        searcher = ShardSearcher(index, _row_ids(rows), stored, sample.metric, 0)
        yield _Built(one, spec, searcher, path.stat().st_size, build_s)


def _trial(sample: Sample, built: _Built, budget: Budget, shard_rows: int) -> Trial:
    point, recall = _operating_point(sample, built, budget)
    queries_per_s, latency_ms = _timed(built.searcher, sample.queries, budget.k, point)
    rows, dimension = sample.vectors.shape
    growth = _growth(built.candidate.family, rows, shard_rows)
    return Trial(
        candidate=built.candidate,
        factory=built.spec.factory,
        rows=rows,
        shard_rows=shard_rows,
        parameters=point,
        recall=recall,
        queries_per_s=queries_per_s / growth,
        latency_ms=latency_ms * growth,
        bytes_per_vector=_bytes_in_shard(built, sample, shard_rows),
        rerank_bytes=STORED_BYTES * dimension if built.candidate.rerank else 0.0,
        build_s=built.build_s,
    )


def _bytes_in_shard(built: _Built, sample: Sample, shard_rows: int) -> float:
    """Bytes per vector of a whole shard: what a row adds, and its part of what every index holds (centroids, code
    books, rotation), of which centroids become more with the rows."""
    rows, dimension = sample.vectors.shape
    spec = built.candidate.spec(dimension, sample.metric, shard_rows, built.spec.seed, built.spec.training_rows)
    whole: float = built.index_bytes - bytes_per_vector(built.spec, rows) * rows
    more_centroids = (nlist_of(spec) - nlist_of(built.spec)) * CENTROID_BYTES * dimension
    return float(bytes_per_vector(spec, shard_rows) + (whole + more_centroids) / shard_rows)


def _operating_point(sample: Sample, built: _Built, budget: Budget) -> tuple[SearchParameters, float]:
    """The fastest point that reaches the recall, else the one with the highest recall. For each factor of re-ranking,
    the least width of search that suffices is found by bisection: recall grows with the width."""
    reached: list[tuple[float, SearchParameters, float]] = []
    missed: list[tuple[float, SearchParameters]] = []
    for factor in RERANK_FACTORS if built.candidate.rerank else RERANK_FACTORS[:1]:
        widths = _widths(built.spec, len(sample.vectors), factor)
        point, recall = _narrowest(sample, built, budget, widths)
        if recall < budget.recall:
            missed.append((recall, point))
            continue
        started = time.perf_counter()
        built.searcher.search(sample.queries, budget.k, point)
        reached.append((time.perf_counter() - started, point, recall))
    if reached:
        _, point, recall = min(reached, key=lambda one: one[0])
        return point, recall
    recall, point = max(missed, key=lambda one: one[0])
    return point, recall


def _narrowest(
    sample: Sample, built: _Built, budget: Budget, widths: Sequence[SearchParameters]
) -> tuple[SearchParameters, float]:
    """The first of ascending widths that reaches the recall, and its recall; the last where none does."""
    low, high = 0, len(widths) - 1
    recall = _recall(sample, built, budget.k, widths[high])
    while low < high and recall >= budget.recall:
        middle = (low + high) // 2
        found = _recall(sample, built, budget.k, widths[middle])
        if found >= budget.recall:
            high, recall = middle, found
        else:
            low = middle + 1
    return widths[high], recall


def _recall(sample: Sample, built: _Built, k: int, point: SearchParameters) -> float:
    hits = built.searcher.search(sample.queries, k, point)
    exact = hits.similarities if built.candidate.rerank else None
    return float(np.nanmean(recall_at_k(hits.ids, sample.truth, k, exact)))


def _timed(searcher: ShardSearcher, queries: np.ndarray, k: int, point: SearchParameters) -> tuple[float, float]:
    """Queries per second of a batch, and milliseconds of a single query: medians."""
    batch_s, single_s = [], []
    for _ in range(TIMED_ROUNDS):
        started = time.perf_counter()
        searcher.search(queries, k, point)
        batch_s.append(time.perf_counter() - started)
    for query in queries[:TIMED_SINGLE_QUERIES]:
        started = time.perf_counter()
        searcher.search(query[None, :], k, point)
        single_s.append(time.perf_counter() - started)
    return len(queries) / float(np.median(batch_s)), 1000 * float(np.median(single_s))


def _widths(spec: IndexSpec, rows: int, factor: int) -> list[SearchParameters]:
    """Search parameters from narrow to wide: ef_search or nprobe in steps of about WIDTH_STEP, up to all there is."""
    match spec.family:
        case Family.FLAT:
            return [SearchParameters(rerank_factor=factor)]
        case Family.HNSW | Family.VAMANA:
            most = max(LEAST_EF, min(MOST_EF, rows))
            return [SearchParameters(ef_search=ef, rerank_factor=factor) for ef in _steps(LEAST_EF, most)]
        case Family.IVF:
            most = max(1, nlist_of(spec) // 2)
            return [SearchParameters(nprobe=nprobe, rerank_factor=factor) for nprobe in _steps(1, most)]
        case _:
            assert_never(spec.family)


def _steps(first: int, last: int) -> list[int]:
    found = [first]
    while found[-1] < last:
        found.append(min(last, max(found[-1] + 1, round(found[-1] * WIDTH_STEP))))
    return found


def _build(spec: IndexSpec, vectors: np.ndarray, path: Path) -> None:
    """A shard of all the vectors, as a run builds one."""
    trained = train_index(spec, vectors[: spec.training_rows] if requires_training(spec) else vectors[:0])
    builder = ShardBuilder(trained)
    for first in range(0, len(vectors), BUILD_ROWS):
        builder.add(vectors[first : first + BUILD_ROWS])
    builder.write(path)


def _stored(vectors: np.ndarray, path: Path) -> StoredVectors:
    with VectorWriter(path, vectors.shape[1], np.float16) as writer:
        for first in range(0, len(vectors), BUILD_ROWS):
            writer.add(vectors[first : first + BUILD_ROWS])
    return open_vectors(path)


def _row_ids(rows: int) -> pa.Array:
    return pa.array([f"row-{row:09d}" for row in range(rows)], pa.string())


def _growth(family: Family, rows: int, larger: int) -> float:
    """How many times longer a query takes in `larger` rows: all of them are compared, about their root of the lists'
    (nlist grows with the root of the rows), or a number that grows with the logarithm."""
    rows, larger = max(rows, 2), max(larger, 2)
    match family:
        case Family.FLAT:
            return larger / rows
        case Family.IVF:
            return math.sqrt(larger / rows)
        case Family.HNSW | Family.VAMANA:
            return math.log(larger) / math.log(rows)
        case _:
            assert_never(family)


def _grid(dimension: int) -> list[Candidate]:
    """Families x codecs x re-ranking, as far as each can be the best for some budget: of two that take the same bytes,
    only the one that measured faster."""
    exact = [(Codec.NONE, False), (Codec.FP16, False), (Codec.SQ8, True)]
    graphs = [(Codec.NONE, False), (Codec.SQ8, False), (Codec.SQ8, True), (Codec.SQ4, True)]
    lists = [(Codec.NONE, False), (Codec.SQ8, False), (Codec.SQ8, True), (Codec.SQ4, True)]
    grid = [Candidate(Family.FLAT, codec, rerank) for codec, rerank in exact]
    grid += [Candidate(Family.HNSW, codec, rerank, hnsw_m=links) for links in (16, 32) for codec, rerank in graphs]
    grid += [Candidate(Family.IVF, codec, rerank) for codec, rerank in lists]
    for size in (dimension // 16, dimension // 8, dimension // 4):
        grid += [Candidate(Family.IVF, Codec.PQFS, True, pq_bytes=size)]
    grid += [Candidate(Family.IVF, Codec.PQFS, True, pq_bytes=dimension // 8, opq=True)]
    for bits in (1, 2, 4):
        grid += [Candidate(Family.IVF, Codec.RABITQFS, True, rabitq_bits=bits)]
    return [*grid, Candidate(Family.IVF, Codec.RABITQFS, False, rabitq_bits=4)]


def _index_bytes(one: Candidate, dimension: int, metric: Metric, rows: int, training_rows: int) -> float | None:
    """Bytes that a row takes in the index, None where faiss cannot build it for this metric, dimension or size."""
    try:
        return bytes_per_vector(one.spec(dimension, metric, rows, 0, training_rows))
    except ValueError:
        return None


def _trainable(one: Candidate, dimension: int, metric: Metric, rows: int, training_rows: int) -> bool:
    """Whether so many rows train the index that they get."""
    try:
        spec = one.spec(dimension, metric, rows, 0, min(training_rows, rows))
    except ValueError:
        return False
    return fewest_training_rows(spec) <= min(training_rows, rows)
