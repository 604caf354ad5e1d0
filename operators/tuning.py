"""A budget in, an index configuration out: candidates are built and searched on samples of the vectors.

Small samples show which codes are fast, and how the time of each family grows with the rows; what promises most at the
size of a shard is then built and measured on as many vectors. Recall is against exact search of the same sample, at the
operating point that reaches it with the least work.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, TypeAlias, TypeVar

import numpy as np

from penstock.operators.index_trials import Budget as Budget
from penstock.operators.index_trials import Candidate as Candidate
from penstock.operators.index_trials import Sample as Sample
from penstock.operators.index_trials import Trial as Trial
from penstock.operators.index_trials import groups as groups
from penstock.operators.index_trials import make_sample as make_sample
from penstock.operators.index_trials import measure as measure
from penstock.operators.indexing import (
    TRAINING_ROWS_PER_CENTROID,
    Codec,
    Family,
    Metric,
    bytes_per_vector,
    fewest_training_rows,
)
from penstock.operators.transforms import Chain
from penstock.operators.vector_codecs import VectorCodec

# Sizes of the sample on which candidates are screened; a size is left out where all there is is not WORTH_SCREENING
# times as much.
SCREENING_SIZES = (2_500, 10_000)
WORTH_SCREENING = 2
SCREENING_QUERIES = 200  # of 500 they take two thirds of the time, and all but exact search the same order
# Of k-means; code books of 25 were found by the same widths and factors, and took twice the time to build and search.
SCREENING_ITERATIONS = 6
LINKS = (16, 32)
# Reduced graphs are of half the dimensions and from as many on; of fewer, links are most of what a search reads. Of
# 99,000 x 384 real vectors in 8 bits one answers 1.26 times as many queries as the graph of all dimensions, in 0.64 of
# its bytes; of 20,000 it is slower. Lists of 4-bit codes were 0.9 as fast for fewer dimensions in as many bytes, lists
# of 8-bit codes never as fast as those of 4 bits, and graphs of a quarter of the dimensions lost the recall.
LEAST_REDUCED = 128
# Lists per root of the rows. Queries of one batch share the lists that they scan, so that fewer are faster than the 4
# of the faiss wiki: 28,000 queries/s with 0.5, 25,500 with 1, 19,900 with 4 (39,000 x 384, 4-bit PQ, re-ranked).
LISTS_PER_ROOT_ROW = (1, 0.5, 2, 4)
LEADERS = 2  # codes of each family that go on from the first sample
FINALISTS = 3
# What is estimated to be so many times slower than the best does not go on: after the first sample, after it than the
# best of the same kind, after the second, and after the second in another kind than the best. The order within a
# family is estimated to a fifth: numbers of lists that are twice each other's changed places. That of families is not:
# from 10,000 rows, which lie in the cache, a graph was estimated to be 1.5 times as fast at 39,000 and 99,000 rows as
# lists that proved 1.2 and 1.6 times as fast as it. Fewer dimensions help a graph the more the larger it is.
HOPELESS, CLOSE_CODE, CLOSE = 6.0, 1.15, 1.2
CLOSE_FAMILY = {Family.FLAT: 1.5, Family.HNSW: 1.2, Family.IVF: 2.5}
CLOSE_REDUCED = 1.5
LIST_STEP = 2  # numbers of lists or links that are further from those of a leader are measured exhaustively only
# Powers of the rows between which the time in an index of a family grows; measured on the way, and kept within these.
GROWTH_BOUNDS = {Family.FLAT: (1.0, 1.0), Family.IVF: (0.2, 0.7), Family.HNSW: (0.3, 0.6)}

T = TypeVar("T")
Measure: TypeAlias = Callable[[Sequence[Candidate], int, bool], Sequence[Trial]]
Kind: TypeAlias = tuple[Family, bool]


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
    dimension: int,
    metric: Metric,
    rows: int,
    budget: Budget,
    training_rows: int,
    sample_rows: int,
    reduce: bool = True,
) -> list[Candidate]:
    """The grid, but for what faiss cannot build for this metric, what breaks the budget of bytes unbuilt, and what so
    few rows cannot train.

    Args:
        rows: of a shard.
        sample_rows: of the smallest sample that the candidates are measured on.
        reduce: also offer indexes of fewer components.

    Raises:
        ValueError: no configuration can meet the bytes, whatever its recall.
    """
    grid = [
        (one, _index_bytes(one, dimension, metric, rows, min(training_rows, rows)))
        for one in _grid(dimension, rows, reduce)
        if _trainable(one, dimension, metric, sample_rows, training_rows, rows)
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


def screening_sample(
    vectors: np.ndarray,
    queries: np.ndarray,
    metric: Metric,
    k: int,
    chain: Chain | None = None,
    stored: VectorCodec = VectorCodec.FLOAT16,
) -> Sample:
    """As make_sample, on which candidates are measured roughly: with fewer queries, and fewer iterations of k-means."""
    return make_sample(vectors, queries[:SCREENING_QUERIES], metric, k, chain, stored, SCREENING_ITERATIONS)


def search_grid(grid: Sequence[Candidate], rows: int, budget: Budget, measure: Measure) -> Tuned:
    """Screen the grid on samples of growing size, measure on `rows` vectors what promises most, and choose.

    The first sample sees one candidate of each code, the next ones the best of these with their other numbers of lists
    or links. How the time of each family grows with the rows is measured between two sizes.

    Args:
        measure: trials of candidates on so many rows; whether on a `screening_sample`.
    """
    sizes = _screening_sizes(rows)
    found: list[Sequence[Trial]] = []
    remaining = list(representatives(grid)) if sizes else list(grid)
    for number, size in enumerate(sizes):
        found.append(measure(remaining, size, True))
        estimates = estimated(found)
        remaining = _with_variants(leaders(estimates, budget), grid) if number == 0 else finalists(estimates, budget)
    trials = sorted(estimated([*found, measure(remaining, rows, False)]), key=lambda trial: -trial.queries_per_s)
    screened = [trial for earlier in found for trial in earlier]
    return Tuned(budget, choose(trials, budget), tuple(trials), tuple(screened))


def measure_grid(grid: Sequence[Candidate], rows: int, budget: Budget, measure: Measure) -> Tuned:
    """Measure every candidate in full, and choose."""
    trials = sorted(measure(grid, rows, False), key=lambda trial: -trial.queries_per_s)
    return Tuned(budget, choose(trials, budget), tuple(trials), ())


def representatives(grid: Sequence[Candidate]) -> list[Candidate]:
    """The first of those candidates that differ in numbers of lists or links alone."""
    found: dict[Candidate, Candidate] = {}
    for one in grid:
        found.setdefault(_code(one), one)
    return list(found.values())


def estimated(rounds: Sequence[Sequence[Trial]]) -> list[Trial]:
    """The trials of the last round for a whole shard, by the growth that was measured between the last two."""
    last = list(rounds[-1])
    powers = _growth(rounds[-2], last) if len(rounds) > 1 else {}
    return [trial.grown(powers[_kind(trial)]) if _kind(trial) in powers else trial for trial in last]


def leaders(estimates: Sequence[Trial], budget: Budget) -> list[Candidate]:
    """Of candidates measured on few rows, the LEADERS fastest of each kind that keep recall and bytes (or, where none
    does, all the same), as far as they are close: which kind is the fastest, few rows do not tell."""
    ranked = _within_reach(_ranked(estimates, budget), HOPELESS)
    kinds = _unique(map(_kind, ranked))
    own = [[trial for trial in ranked if _kind(trial) == kind] for kind in kinds]
    return [trial.candidate for trials in own for trial in _within_reach(trials, CLOSE_CODE)[:LEADERS]]


def finalists(estimates: Sequence[Trial], budget: Budget) -> list[Candidate]:
    """The FINALISTS that are worth measuring in full, and the best of any other kind that comes close."""
    ranked = _ranked(estimates, budget)
    close = _within_reach(ranked, CLOSE)[:FINALISTS]
    best_of_kind = {_kind(one): one for one in reversed(ranked)}
    others = [one for kind, one in best_of_kind.items() if one in _within_reach(ranked, _reach(kind))]
    return _unique(one.candidate for one in (*close, *others))


def _kind(trial: Trial) -> Kind:
    return _kind_of(trial.candidate)


def _kind_of(one: Candidate) -> Kind:
    """What time grows alike for: the family, and whether dimensions are fewer."""
    return one.family, one.reduced is not None


def _reach(kind: Kind) -> float:
    family, reduced = kind
    return CLOSE_REDUCED if reduced else CLOSE_FAMILY[family]


def _within_reach(ranked: Sequence[Trial], factor: float) -> list[Trial]:
    return [one for one in ranked if one.queries_per_s * factor >= ranked[0].queries_per_s]


def _screening_sizes(rows: int) -> list[int]:
    return [size for size in SCREENING_SIZES if size * WORTH_SCREENING <= rows]


def _ranked(estimates: Sequence[Trial], budget: Budget) -> list[Trial]:
    """Those that keep recall and bytes, else all; first those of the asked latency, which few rows tell roughly."""
    fit = [trial for trial in estimates if trial.meets(replace(budget, latency_ms=None))] or list(estimates)
    return sorted(fit, key=lambda trial: (not trial.meets(budget), -trial.queries_per_s))


def _with_variants(chosen: Sequence[Candidate], grid: Sequence[Candidate]) -> list[Candidate]:
    """The chosen, and for the first of each kind what differs from it by a step in lists or links alone."""
    first = {_kind_of(one): one for one in reversed(chosen)}
    return _unique([*chosen, *(one for one in grid if _kind_of(one) in first and _near(one, first[_kind_of(one)]))])


def _near(one: Candidate, other: Candidate) -> bool:
    more, fewer = max(one.nlist or 1, other.nlist or 1), min(one.nlist or 1, other.nlist or 1)
    return _code(one) == _code(other) and more <= LIST_STEP * (fewer + 1)


def _code(one: Candidate) -> Candidate:
    return replace(one, hnsw_m=LINKS[0], nlist=None)


def _growth(earlier: Sequence[Trial], later: Sequence[Trial]) -> dict[Kind, float]:
    """For each kind the power of the rows with which the time in an index grew, of the candidates in both rounds."""
    before = {trial.candidate: trial for trial in earlier}
    pairs = [(before[trial.candidate], trial) for trial in later if trial.candidate in before]
    kinds = _unique(_kind(later) for _, later in pairs)
    return {
        kind: _within(GROWTH_BOUNDS[kind[0]], median(_power(*pair) for pair in pairs if _kind(pair[1]) == kind))
        for kind in kinds
    }


def _power(small: Trial, large: Trial) -> float:
    return math.log(large.index_us / small.index_us) / math.log(large.rows / small.rows)


def _within(bounds: tuple[float, float], value: float) -> float:
    return min(max(value, bounds[0]), bounds[1])


def _unique(values: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(values))


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


def _grid(dimension: int, rows: int, reduce: bool) -> list[Candidate]:
    """Families x codecs x lists x dimensions x re-ranking, as far as each can be the best for some budget: of two that
    take the same bytes, only the one that measured faster."""
    eighth = dimension // 8
    grid = [Candidate(Family.FLAT, codec, False) for codec in (Codec.NONE, Codec.FP16)]
    grid += [Candidate(Family.FLAT, Codec.PQFS, True, pq_bytes=eighth)]
    graphs = [(Codec.NONE, False), (Codec.SQ8, False), (Codec.SQ8, True), (Codec.SQ4, True)]
    grid += [Candidate(Family.HNSW, codec, rerank, hnsw_m=links) for links in LINKS for codec, rerank in graphs]
    if reduce and dimension // 2 >= LEAST_REDUCED:
        grid.append(Candidate(Family.HNSW, Codec.SQ8, True, hnsw_m=LINKS[0], reduced=dimension // 2))
    for nlist in [_lists(rows, per_root_row) for per_root_row in LISTS_PER_ROOT_ROW]:
        grid += [Candidate(Family.IVF, codec, rerank, nlist=nlist) for codec, rerank in graphs]
        sizes = (eighth // 2, eighth, 2 * eighth)
        grid += [Candidate(Family.IVF, Codec.PQFS, True, pq_bytes=size, nlist=nlist) for size in sizes]
        grid += [Candidate(Family.IVF, Codec.RABITQFS, True, nlist=nlist)]
    return _unique(grid)


def _lists(rows: int, per_root_row: float) -> int:
    return max(1, min(round(per_root_row * math.sqrt(rows)), rows // TRAINING_ROWS_PER_CENTROID))


def _index_bytes(one: Candidate, dimension: int, metric: Metric, rows: int, training_rows: int) -> float | None:
    """Bytes that a row takes in the index, None where faiss cannot build it for this metric, dimension or size."""
    try:
        return bytes_per_vector(one.spec(dimension, metric, rows, 0, training_rows))
    except ValueError:
        return None


def _trainable(one: Candidate, dimension: int, metric: Metric, rows: int, training_rows: int, shard_rows: int) -> bool:
    """Whether so many rows train the index that they get."""
    try:
        small = one.of_sample(rows, max(rows, shard_rows))
        spec = small.spec(dimension, metric, rows, 0, min(training_rows, rows))
    except ValueError:
        return False
    return fewest_training_rows(spec) <= min(training_rows, rows)
