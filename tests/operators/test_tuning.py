import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from penstock.operators.index_trials import usual_growth
from penstock.operators.indexing import (
    Codec,
    FaissObject,
    Family,
    Metric,
    core_index,
    limit_iterations,
    train_index,
)
from penstock.operators.moments import moments_of
from penstock.operators.searching import SearchParameters
from penstock.operators.transform_fitting import fit_chain
from penstock.operators.transforms import Centring, Fidelity, Pca, Rotation, Step
from penstock.operators.tuning import (
    CLOSE_CODE,
    CLOSE_FAMILY,
    FINALISTS,
    HOPELESS,
    LEADERS,
    LEAST_REDUCED,
    SCREENING_ITERATIONS,
    SCREENING_QUERIES,
    SCREENING_SIZES,
    Budget,
    Candidate,
    Sample,
    Trial,
    candidates,
    choose,
    estimated,
    finalists,
    groups,
    leaders,
    make_sample,
    measure,
    measure_grid,
    pareto,
    representatives,
    screening_sample,
    search_grid,
)
from penstock.operators.vector_codecs import VectorCodec

DIMENSION = 32
BUDGET = Budget(recall=0.9)
FLAT = Candidate(Family.FLAT, Codec.NONE, False)
LISTS = Candidate(Family.IVF, Codec.SQ8, False)
GRAPH = Candidate(Family.HNSW, Codec.NONE, False)
GRAPH16 = replace(GRAPH, hnsw_m=16)
HALF = Candidate(Family.HNSW, Codec.SQ8, True, reduced=16)


def unit(rows: int, seed: int) -> np.ndarray:
    """Clustered unit vectors: neighbours that a coarse quantizer can find."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(1).standard_normal((40, DIMENSION))
    points = centres[random.integers(0, 40, rows)] + 0.4 * random.standard_normal((rows, DIMENSION))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def sample() -> Sample:
    return make_sample(unit(2500, 2), unit(60, 3), Metric.COSINE, 10)


def trial(candidate: Candidate = FLAT, rows: int = 1000, shard_rows: int = 1000, **figures: float) -> Trial:
    values = {"recall": 0.95, "queries_per_s": 1000.0, "latency_ms": 1.0, "bytes_per_vector": 100.0} | figures
    query_us = 1e6 / values["queries_per_s"]
    values = {"shard_recall": values["recall"], "query_us": query_us, "index_us": query_us} | values
    values = {"single_ms": values["latency_ms"]} | values
    return Trial(candidate, "Flat", rows, shard_rows, SearchParameters(), rerank_bytes=0.0, build_s=1.0, **values)


# ---- measuring


def recall_by_hand(sample: Sample, factory: str) -> float:
    import faiss

    index = faiss.index_factory(DIMENSION, factory, faiss.METRIC_INNER_PRODUCT)
    index.add(sample.vectors)
    found = index.search(sample.queries, 10)[1]
    exact = np.argsort(-(sample.queries @ sample.vectors.T), axis=1)[:, :10]
    return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, exact, strict=True)]))


def test_a_trial_is_what_the_index_does(sample: Sample) -> None:
    (found,) = measure(sample, [FLAT], BUDGET, seed=1, training_rows=10_000, shard_rows=2500)
    assert found.recall == recall_by_hand(sample, "Flat") == 1.0
    assert found.factory == "Flat" and found.rows == 2500 and found.parameters == SearchParameters()
    assert found.bytes_per_vector == pytest.approx(4 * DIMENSION, rel=0.01)
    assert found.rerank_bytes == 0 and found.queries_per_s > 0 and found.latency_ms > 0 and found.build_s > 0


def test_the_least_width_of_search_that_reaches_the_recall(sample: Sample) -> None:
    (found,) = measure(
        sample, [Candidate(Family.IVF, Codec.NONE, False)], BUDGET, seed=1, training_rows=10_000, shard_rows=2500
    )
    assert found.recall >= BUDGET.recall and found.parameters.nprobe is not None
    (wider,) = measure(
        sample,
        [Candidate(Family.IVF, Codec.NONE, False)],
        Budget(recall=0.999),
        seed=1,
        training_rows=10_000,
        shard_rows=2500,
    )
    assert wider.parameters.nprobe is not None and wider.parameters.nprobe > found.parameters.nprobe
    assert wider.recall >= 0.999 > found.recall


def test_re_ranking_reaches_what_codes_alone_do_not(sample: Sample) -> None:
    coarse = Candidate(Family.IVF, Codec.RABITQ, False, rabitq_bits=1)
    alone, ranked = measure(
        sample,
        [coarse, replace(coarse, rerank=True)],
        Budget(recall=0.97),
        seed=1,
        training_rows=10_000,
        shard_rows=2500,
    )
    assert alone.recall < 0.97 <= ranked.recall
    assert ranked.parameters.rerank_factor > 1 and alone.parameters.rerank_factor == 1
    assert ranked.rerank_bytes == 2 * DIMENSION and ranked.bytes_per_vector == alone.bytes_per_vector
    assert ranked.build_s == alone.build_s  # one index for both


def test_what_cannot_reach_the_recall_says_how_far_it_comes(sample: Sample) -> None:
    coarse = Candidate(Family.IVF, Codec.RABITQ, False, rabitq_bits=1)
    (found,) = measure(sample, [coarse], Budget(recall=1.0), seed=1, training_rows=10_000, shard_rows=2500)
    assert 0.2 < found.recall < 1.0 and not found.meets(Budget(recall=1.0))


# ---- the grid


def test_candidates_with_one_index_are_measured_together() -> None:
    grid = candidates(384, Metric.COSINE, 100_000, BUDGET, 100_000, 10_000)
    found = groups(grid)
    assert sorted(map(repr, (one for group in found for one in group))) == sorted(map(repr, grid))
    assert all(len({replace(one, rerank=False) for one in group}) == 1 for group in found)
    assert max(map(len, found)) == 2


@pytest.mark.parametrize("limit", [1600.0, 500.0, 120.0])
def test_candidates_that_break_the_bytes_are_not_built(limit: float) -> None:
    every = candidates(384, Metric.COSINE, 100_000, BUDGET, 100_000, 10_000)
    some = candidates(384, Metric.COSINE, 100_000, replace(BUDGET, bytes_per_vector=limit), 100_000, 10_000)
    assert 0 < len(some) < len(every) and set(some) < set(every)


def test_fewer_bytes_than_any_index_takes() -> None:
    with pytest.raises(ValueError, match=r"bytes_per_vector \(4\) is below the \d+ of the smallest index of 384"):
        candidates(384, Metric.COSINE, 100_000, replace(BUDGET, bytes_per_vector=4.0), 100_000, 10_000)


def test_what_faiss_cannot_build_for_the_metric_is_left_out() -> None:
    cosine = candidates(384, Metric.COSINE, 100_000, BUDGET, 100_000, 10_000)
    product = candidates(384, Metric.INNER_PRODUCT, 100_000, BUDGET, 100_000, 10_000)
    assert set(product) <= set(cosine)
    for one in product:
        one.spec(384, Metric.INNER_PRODUCT, 100_000, 1, 100_000)


# ---- choosing


def test_the_fastest_that_keeps_the_budget() -> None:
    fast, slow = trial(queries_per_s=900.0, bytes_per_vector=300.0), trial(queries_per_s=100.0)
    lossy = trial(queries_per_s=5000.0, recall=0.5)
    assert choose([slow, fast, lossy], BUDGET) == fast
    assert choose([slow, fast, lossy], replace(BUDGET, bytes_per_vector=200.0)) == slow
    late = trial(queries_per_s=2000.0, latency_ms=9.0)
    assert choose([late, slow], replace(BUDGET, latency_ms=2.0)) == slow


def test_of_equally_fast_ones_the_smaller() -> None:
    assert choose([trial(), trial(bytes_per_vector=50.0)], BUDGET).bytes_per_vector == 50.0


def test_nothing_keeps_the_budget() -> None:
    near, far = trial(recall=0.85, queries_per_s=1.0), trial(recall=0.3, queries_per_s=9999.0)
    assert choose([far, near], BUDGET) == near
    assert near.misses(BUDGET) == {"recall": pytest.approx(0.05 / 0.9)}
    tight = Budget(recall=0.9, bytes_per_vector=50.0, latency_ms=0.5)
    assert set(near.misses(tight)) == {"recall", "bytes_per_vector", "latency_ms"}


def test_the_pareto_front() -> None:
    a, b = trial(queries_per_s=100.0, bytes_per_vector=10.0), trial(queries_per_s=50.0, bytes_per_vector=5.0)
    worse = trial(queries_per_s=90.0, bytes_per_vector=10.0)
    better_recall = trial(queries_per_s=90.0, bytes_per_vector=10.0, recall=0.99)
    assert pareto([a, b, worse, better_recall]) == [a, b, better_recall]
    assert pareto([a, replace(a)]) == [a, a]


@pytest.mark.parametrize(("family", "expected"), [(Family.FLAT, 100.0), (Family.IVF, 10.0), (Family.HNSW, 1.5)])
def test_how_much_longer_a_query_takes_in_a_hundred_times_as_many_rows(family: Family, expected: float) -> None:
    assert 100 ** usual_growth(family, 10_000, 1_000_000) == pytest.approx(expected)
    assert 5000 ** usual_growth(family, 1, 1) >= 1


def test_only_the_time_in_the_index_grows() -> None:
    small = trial(LISTS, rows=100, shard_rows=10_000, queries_per_s=1e6 / 30, query_us=30.0, index_us=20.0)
    grown = small.grown(0.5)
    assert 1e6 / grown.queries_per_s == pytest.approx(10 + 20 * 10)
    assert grown.latency_ms == pytest.approx(small.latency_ms * 210 / 30)
    assert trial(GRAPH).grown(0.5) == trial(GRAPH)  # as many rows as a shard has
    again = small.grown(1.0).grown(0.5)  # another estimate, of what was measured
    assert (again.queries_per_s, again.latency_ms) == (grown.queries_per_s, grown.latency_ms)


def test_the_figures_of_a_trial_are_for_a_whole_shard(sample: Sample) -> None:
    (found,) = measure(sample, [FLAT], BUDGET, seed=1, training_rows=10_000, shard_rows=2500 * 10**6)
    assert found.rows == 2500 and found.shard_rows == 2500 * 10**6
    assert found.latency_ms > 1000 and found.queries_per_s < 100  # a million times as many rows to compare


def test_finalists_are_the_fastest_that_keep_recall_and_bytes() -> None:
    slow, fast = trial(LISTS, queries_per_s=100.0), trial(GRAPH, queries_per_s=9000.0)
    assert finalists([slow, fast], BUDGET) == [GRAPH]
    lossy = trial(LISTS, recall=0.4, queries_per_s=90_000.0)
    large = trial(GRAPH, bytes_per_vector=900.0, queries_per_s=80_000.0)
    small = trial(FLAT, bytes_per_vector=90.0)
    assert finalists([lossy, large, small], Budget(recall=0.9, bytes_per_vector=100.0)) == [FLAT]
    assert finalists([lossy], BUDGET) == [LISTS]
    many = [trial(replace(GRAPH, hnsw_m=links)) for links in range(2, 20)]
    assert len(finalists(many, BUDGET)) == FINALISTS
    other = trial(LISTS, queries_per_s=1001.0 / CLOSE_FAMILY[Family.IVF])
    assert finalists([*many, other], BUDGET)[-1] == LISTS  # another family, nearly as fast


def test_what_few_rows_flatter_must_come_closer() -> None:
    """Graphs of few rows lie in the cache, and exact search is estimated well."""
    others = [replace(one, queries_per_s=1000 / 1.3) for one in (trial(GRAPH), trial(LISTS), trial(HALF))]
    assert set(finalists([trial(FLAT), *others], BUDGET)) == {FLAT, LISTS, HALF}
    slow = [trial(FLAT, queries_per_s=600.0), trial(LISTS, queries_per_s=600.0), trial(HALF, queries_per_s=600.0)]
    assert finalists([trial(GRAPH), *slow], BUDGET) == [GRAPH, LISTS]


def test_the_best_codes_of_each_family_lead() -> None:
    graphs = [trial(replace(GRAPH, hnsw_m=links), queries_per_s=2000.0 + links) for links in range(2, 6)]
    lists = [trial(replace(LISTS, nlist=n), queries_per_s=1500.0 + n) for n in (1, 2, 3)]
    chosen = leaders([*lists, *graphs, trial()], BUDGET)
    assert [one.hnsw_m for one in chosen if one.family is Family.HNSW] == [5, 4]
    assert [one.nlist for one in chosen if one.family is Family.IVF] == [3, 2]
    assert FLAT in chosen and len(chosen) == 2 * LEADERS + 1
    far = [trial(LISTS), trial(replace(LISTS, codec=Codec.SQ4), queries_per_s=999 / CLOSE_CODE)]
    assert leaders([*far, trial(HALF, queries_per_s=500.0)], BUDGET) == [LISTS, HALF]
    assert FLAT not in leaders([*graphs, trial(queries_per_s=1900 / HOPELESS)], BUDGET)


def test_an_answer_in_time_comes_before_a_faster_batch() -> None:
    late = trial(replace(LISTS, nlist=9), queries_per_s=1100.0, latency_ms=9.0)
    assert finalists([late, trial(LISTS)], replace(BUDGET, latency_ms=2.0))[0] == LISTS


def test_how_time_grows_is_measured_between_two_sizes() -> None:
    """Lists that take twice as long in four times the rows take eight times as long in 64 times the rows."""
    other = replace(LISTS, nlist=7)
    small = trial(LISTS, 100, 25_600, queries_per_s=1e5, index_us=8.0)
    large = trial(LISTS, 400, 25_600, queries_per_s=1e6 / 18, index_us=16.0)
    beside = trial(other, 400, 25_600, queries_per_s=1e6 / 12, index_us=10.0)
    found = estimated([[small], [large, beside]])
    assert 1e6 / found[0].queries_per_s == pytest.approx(2 + 16 * 8)
    assert 1e6 / found[1].queries_per_s == pytest.approx(2 + 10 * 8)
    assert estimated([[small]]) == [small]


class Shop:
    """Trials of candidates with known speeds, and what was asked for."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.asked: list[tuple[int, tuple[Candidate, ...]]] = []
        self.screenings: list[bool] = []

    def measure(self, some: Sequence[Candidate], size: int, screening: bool) -> list[Trial]:
        self.asked.append((size, tuple(some)))
        self.screenings.append(screening)
        return [trial(one, size, self.rows, query_us=self.us(one, size), index_us=self.us(one, size)) for one in some]

    def us(self, one: Candidate, size: int) -> float:
        """Graphs are the fastest on few rows, and half as many lists as the first of the grid on many."""
        match one.family:
            case Family.FLAT:
                return size / 10
            case Family.HNSW:
                return 5 * (size / 1000) ** 0.5
            case _:
                code = 1.0 if one.codec is Codec.PQFS else 3.0
                return 10 * code * (size / 1000) ** 0.25 * (1 + 0.01 * (one.nlist or 1) / size**0.5)


def test_the_choice_of_the_whole_grid_is_found_with_few_measurements() -> None:
    rows = 200_000
    shop, every = Shop(rows), Shop(rows)
    grid = candidates(384, Metric.COSINE, rows, BUDGET, 100_000, SCREENING_SIZES[0])

    def projected(shop: Shop) -> Callable[[Sequence[Candidate], int, bool], list[Trial]]:
        return lambda some, size, screening: [one.grown(0.25) for one in shop.measure(some, size, screening)]

    found = search_grid(grid, rows, BUDGET, projected(shop))
    best = measure_grid(grid, rows, BUDGET, projected(every))
    assert found.chosen.candidate == best.chosen.candidate and found.chosen.candidate.codec is Codec.PQFS
    assert [size for size, _ in shop.asked] == [*SCREENING_SIZES, rows]
    assert shop.screenings == [True, True, False] and every.screenings == [False]
    first, second, last = (len(some) for _, some in shop.asked)
    assert last <= FINALISTS + 1 < second < first == len(representatives(grid)) < len(grid) / 2
    assert len(found.screened) == first + second


def test_a_reduced_graph_that_leads_keeps_no_links_of_whole_ones_from_being_tried() -> None:
    grid = [GRAPH16, replace(GRAPH16, hnsw_m=32), HALF]
    asked: list[Sequence[Candidate]] = []

    def speeds(some: Sequence[Candidate], size: int, screening: bool) -> list[Trial]:
        asked.append(some)
        return [trial(one, size, 100_000, queries_per_s=1010.0 if one is HALF else 1000.0) for one in some]

    search_grid(grid, 100_000, BUDGET, speeds)
    assert set(asked[0]) == {GRAPH16, HALF} and set(asked[1]) == set(grid)


def test_a_small_shard_is_measured_at_once() -> None:
    shop = Shop(4000)
    grid = candidates(384, Metric.COSINE, 4000, BUDGET, 100_000, SCREENING_SIZES[0])
    found = search_grid(grid, 4000, BUDGET, shop.measure)
    assert shop.asked == [(4000, tuple(grid))] and not found.screened


def test_what_so_few_rows_cannot_train_is_left_out() -> None:
    """Codes of 4 bits need 16 rows, a list one."""
    enough = candidates(384, Metric.COSINE, 400, BUDGET, 10_000, 16)
    short = candidates(384, Metric.COSINE, 400, BUDGET, 10_000, 15)
    assert any(one.codec is Codec.PQFS for one in enough) and all(one.codec is not Codec.PQFS for one in short)
    starved = candidates(384, Metric.COSINE, 100_000, BUDGET, 10, 10_000)
    assert starved and all(one.family is not Family.IVF for one in starved)


def test_a_sample_has_fewer_lists_than_a_shard() -> None:
    whole = replace(LISTS, nlist=400)
    assert whole.of_sample(10_000, 1_000_000).nlist == 40
    assert whole.of_sample(10_000, 10_000) == whole and LISTS.of_sample(10, 1000) == LISTS
    assert replace(LISTS, nlist=4000).of_sample(780, 1000).nlist == 20  # 39 rows train a list
    (found,) = groups([whole])
    assert found[0].spec(DIMENSION, Metric.COSINE, 1_000_000, 1, 10_000).factory == "IVF400,SQ8"


def test_the_recall_of_each_factor_is_that_of_a_search(sample: Sample) -> None:
    """Widths are found from candidates alone; the point that is chosen keeps the recall when it is searched."""
    code = Candidate(Family.IVF, Codec.PQFS, True, pq_bytes=4, nlist=20)
    (found,) = measure(sample, [code], Budget(recall=0.93), seed=1, training_rows=10_000, shard_rows=2500)
    assert found.recall >= 0.93 and found.parameters.rerank_factor > 1
    assert found.shard_recall == found.recall and 0 < found.index_us <= found.query_us
    (part,) = measure(sample, [code], Budget(recall=0.93), seed=1, training_rows=10_000, shard_rows=10_000)
    assert part.recall >= 0.93 and part.shard_recall != part.recall


def test_screening_asks_and_trains_less() -> None:
    vectors, queries = unit(1500, 2), unit(SCREENING_QUERIES + 30, 3)
    rough, fine = (make(vectors, queries, Metric.COSINE, 10) for make in (screening_sample, make_sample))
    assert len(rough.queries) == SCREENING_QUERIES and len(fine.queries) == len(queries)
    code = Candidate(Family.IVF, Codec.PQFS, True, pq_bytes=4, nlist=20)
    assert of(rough, code, shard_rows=1500)[0].recall >= 0.9 <= of(fine, code, shard_rows=1500)[0].recall
    spec = code.spec(DIMENSION, Metric.COSINE, 1500, 1, 1500)
    found: list[int] = []

    def look(index: FaissObject, sample: np.ndarray) -> None:
        limit_iterations(index, SCREENING_ITERATIONS)
        found.extend([core_index(index).cp.niter, core_index(index).pq.cp.niter])

    train_index(spec, vectors, plant=look)
    assert found == [SCREENING_ITERATIONS, SCREENING_ITERATIONS]


def test_a_recall_of_zero_is_always_kept() -> None:
    assert trial(recall=0.0).meets(Budget(recall=0.0))


def test_a_candidate_comes_back_from_its_record() -> None:
    for one in candidates(384, Metric.COSINE, 100_000, BUDGET, 100_000, 10_000):
        assert Candidate.from_json(trial(one).to_json()) == one
    older = {"family": "ivf", "codec": "sq8", "rerank": True, "hnsw_m": 32, "rabitq_bits": 1, "nlist": 7}
    assert Candidate.from_json(older) == Candidate(Family.IVF, Codec.SQ8, True, nlist=7)


def test_bytes_are_those_of_a_whole_shard(sample: Sample) -> None:
    """Centroids and rotation weigh less on each of more rows."""
    coarse = [Candidate(Family.IVF, Codec.RABITQ, False)]
    (here,) = measure(sample, coarse, BUDGET, seed=1, training_rows=10_000, shard_rows=2500)
    (there,) = measure(sample, coarse, BUDGET, seed=1, training_rows=10_000, shard_rows=250_000)
    per_row = DIMENSION / 8 + 8 + 8  # a bit for each component, two factors, the id in its list
    assert per_row < there.bytes_per_vector < per_row + 3 < here.bytes_per_vector


# ---- fewer dimensions, and what the pipeline puts in front


def of(sample: Sample, *some: Candidate, recall: float = 0.9, shard_rows: int = 2500) -> list[Trial]:
    return measure(sample, some, Budget(recall), seed=1, training_rows=10_000, shard_rows=shard_rows)


def recall_of_half(sample: Sample, factor: int) -> float:
    """Exact search of the leading components by numpy, the first of which are compared in full."""
    vectors = sample.vectors.astype(np.float64)
    leading = np.linalg.eigh(vectors.T @ vectors)[1][:, ::-1][:, : DIMENSION // 2]
    near = np.argsort(-(sample.queries @ leading) @ (vectors @ leading).T, axis=1)[:, : 10 * factor]
    exact = np.argsort(-(sample.queries @ sample.vectors.T), axis=1)[:, :10]
    return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(near, exact, strict=True)]))


def test_reduced_vectors_are_found_by_their_leading_components_and_ranked_by_all(sample: Sample) -> None:
    half = Candidate(Family.FLAT, Codec.NONE, False, reduced=DIMENSION // 2)
    alone, ranked = of(sample, half, replace(half, rerank=True), recall=0.99)
    assert alone.recall == pytest.approx(recall_of_half(sample, 1), abs=0.002)
    factor = ranked.parameters.rerank_factor
    assert ranked.recall == pytest.approx(recall_of_half(sample, factor), abs=0.002) and ranked.recall > alone.recall
    assert alone.factory == "PCA16,Flat" and alone.candidate == half
    assert ranked.rerank_bytes == 2 * DIMENSION


def test_the_transforms_count_as_those_of_a_shard(sample: Sample) -> None:
    half = Candidate(Family.FLAT, Codec.NONE, False, reduced=16)
    chain = sample.chain_of(half)
    assert chain is not None and chain.output_dimension == 16
    for rows in (2500, 250_000):
        (found,) = of(sample, half, shard_rows=rows)
        assert found.bytes_per_vector == pytest.approx(4 * 16 + len(chain.to_bytes()) / rows, abs=0.1)


def test_components_of_fewer_dimensions_are_the_first_of_those_of_more(sample: Sample) -> None:
    few, many = (sample.chain_of(replace(HALF, reduced=dimension)) for dimension in (5, 20))
    assert few is not None and many is not None
    moments = moments_of(sample.vectors, sample.vectors.mean(axis=0, dtype=np.float64))
    assert few.content_hash() == fit_chain([Pca(5)], DIMENSION, moments).content_hash()
    np.testing.assert_array_equal(few.steps[0].arrays["matrix"], many.steps[0].arrays["matrix"][:5])
    assert sample.chain_of(FLAT) is None


@pytest.mark.parametrize("step", [Rotation(3), Centring(), Pca(24)])
def test_transforms_of_the_pipeline_come_before_every_index(step: Step) -> None:
    vectors, queries = unit(1500, 2), unit(40, 3)
    chain = fit_chain([step], DIMENSION, moments_of(vectors, vectors.mean(axis=0, dtype=np.float64)))
    made = make_sample(vectors, queries, Metric.COSINE, 10, chain, VectorCodec.LVQ8)
    assert made.space == (chain.output_dimension, chain.metric_after(Metric.COSINE))
    flat, ranked = of(made, FLAT, replace(FLAT, rerank=True), recall=0.93)
    expected = 4 * chain.output_dimension + len(chain.to_bytes()) / 2500
    assert flat.bytes_per_vector == pytest.approx(expected, abs=0.1)
    assert ranked.recall >= 0.93 and ranked.rerank_bytes == DIMENSION + 4
    if chain.fidelity is Fidelity.EXACT:
        assert flat.recall == 1.0


def test_reduced_graphs_are_offered_where_half_the_dimensions_are_enough() -> None:
    def reduced(dimension: int, **options: bool) -> set[int | None]:
        found = candidates(dimension, Metric.COSINE, 100_000, BUDGET, 100_000, 10_000, **options)
        return {one.reduced for one in found} - {None}

    assert reduced(384) == {192} and reduced(2 * LEAST_REDUCED) == {LEAST_REDUCED}
    assert reduced(2 * LEAST_REDUCED - 2) == set() and reduced(384, reduce=False) == set()


def test_growth_is_that_of_a_kind() -> None:
    whole = [trial(GRAPH, rows, 100_000, query_us=us, index_us=us) for rows, us in ((100, 10.0), (10_000, 100.0))]
    half = [trial(HALF, rows, 100_000, query_us=us, index_us=us) for rows, us in ((100, 10.0), (10_000, 40.0))]
    found = estimated([[whole[0], half[0]], [whole[1], half[1]]])
    assert 1e6 / found[0].queries_per_s == pytest.approx(100 * 10**0.5)
    assert 1e6 / found[1].queries_per_s == pytest.approx(40 * 10 ** (math.log(4) / math.log(100)))
