from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest

from penstock.operators.indexing import (
    FAISS_FAMILIES,
    Codec,
    Family,
    IndexSpec,
    Metric,
    ShardBuilder,
    codecs_of,
    factory_string,
    open_index,
    train_index,
)
from penstock.operators.ranking import exact_similarities
from penstock.operators.searching import (
    Hits,
    SearchParameters,
    ShardSearcher,
    StoredVectors,
    VectorWriter,
    exact_inner_products,
    merge_hits,
    normalize,
    open_vectors,
)
from penstock.operators.vector_codecs import VectorCodec, is_lvq
from penstock.operators.vector_store import ArrayVectors

DIMENSION = 32
ROWS = 2000
VARIANTS = [(family, codec) for family in FAISS_FAMILIES for codec in codecs_of(family, Metric.COSINE)]
PLAIN = SearchParameters()
VECTORS = normalize(np.random.default_rng(3).standard_normal((ROWS, DIMENSION)))
QUERIES = normalize(np.random.default_rng(4).standard_normal((40, DIMENSION)))
IDS = np.array([f"row-{(row * 7919) % ROWS:05}" for row in range(ROWS)], dtype=object)


def _searcher(
    tmp_path: Path,
    family: Family = Family.FLAT,
    codec: Codec = Codec.NONE,
    *,
    rows: slice = slice(None),
    stored: np.ndarray | StoredVectors | None = None,
    metric: Metric = Metric.COSINE,
    vectors: np.ndarray = VECTORS,
    shard: int = 0,
) -> ShardSearcher:
    factory = factory_string(family, codec, DIMENSION, hnsw_m=16, nlist=16)
    spec = IndexSpec(family, codec, metric, DIMENSION, factory, training_rows=ROWS, seed=7)
    builder = ShardBuilder(train_index(spec, vectors))
    builder.add(vectors[rows])
    path = tmp_path / f"shard-{shard}-{family}-{codec}.faiss"
    builder.write(path)
    return ShardSearcher(
        open_index(path, family), pa.array(IDS[: len(vectors)][rows], pa.string()), stored, metric, shard
    )


def _brute_force(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    near = queries.astype(np.float64) @ VECTORS.astype(np.float64).T
    best = np.argsort(-near, axis=1)[:, :k]
    return IDS[best], np.take_along_axis(near, best, axis=1)


def _brute_force_hits(allowed: np.ndarray, k: int) -> Hits:
    """The k most similar allowed rows: every pair multiplied, and sorted by similarity and id."""
    rows = np.flatnonzero(allowed)
    near = exact_similarities(QUERIES, np.tile(rows, (len(QUERIES), 1)), ArrayVectors(VECTORS))
    best = np.array([np.lexsort((IDS[rows], -products))[:k] for products in near])
    missing = ((0, 0), (0, k - best.shape[1]))
    return Hits(
        np.pad(IDS[rows][best], missing, constant_values=None),
        np.pad(np.take_along_axis(near, best, axis=1), missing, constant_values=np.nan),
        np.pad(np.zeros(best.shape, np.int32), missing, constant_values=-1),
        np.pad(rows[best], missing, constant_values=-1),
    )


def _mask(share: float) -> np.ndarray:
    """Allowed rows: a uniform share of all, at least one unless the share is 0."""
    order = np.random.default_rng(11).permutation(ROWS)
    return order < np.ceil(share * ROWS)


def _equal(one: Hits, other: Hits) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name), equal_nan=name == "similarities")
        for name in ("ids", "similarities", "shards", "rows")
    )


def test_flat_equals_brute_force(tmp_path: Path) -> None:
    hits = _searcher(tmp_path).search(QUERIES, 10, PLAIN)
    ids, near = _brute_force(QUERIES, 10)
    assert np.array_equal(hits.ids, ids)
    assert np.allclose(hits.similarities, near, atol=1e-6)
    assert np.array_equal(IDS[hits.rows], ids)
    assert (hits.similarities.dtype, hits.shards.dtype, hits.rows.dtype) == (np.float32, np.int32, np.int64)


@pytest.mark.parametrize(("family", "codec"), VARIANTS)
def test_re_ranking_every_row_is_exact(family: Family, codec: Codec, tmp_path: Path) -> None:
    searcher = _searcher(tmp_path, family, codec, stored=VECTORS)
    everything = {
        Family.FLAT: PLAIN,
        Family.HNSW: SearchParameters(ef_search=ROWS),
        Family.IVF: SearchParameters(nprobe=16),
    }
    knobs = everything[family]
    hits = searcher.search(QUERIES, 10, SearchParameters(knobs.ef_search, knobs.nprobe, rerank_factor=ROWS // 10))
    ids, _ = _brute_force(QUERIES, 10)
    # HNSW offers what its graph reaches; links are bidirectional but pruned, so single rows may be cut off.
    if family is Family.HNSW:
        assert np.mean(hits.ids == ids) > 0.99
    else:
        assert np.array_equal(hits.ids, ids)
    found = VECTORS[hits.rows.ravel()]
    products = exact_inner_products(np.repeat(QUERIES, 10, axis=0).astype(np.float64), found.astype(np.float64))
    assert np.allclose(hits.similarities.ravel(), products, atol=1e-6)


@pytest.mark.parametrize(("family", "codec"), VARIANTS)
def test_similarities_without_stored_vectors_estimate_the_true_ones(
    family: Family, codec: Codec, tmp_path: Path
) -> None:
    searcher = _searcher(tmp_path, family, codec)
    hits = searcher.search(VECTORS[:50], 3, PLAIN)
    true = np.einsum("qd,qkd->qk", VECTORS[:50], VECTORS[hits.rows])
    # Scalar quantizers move each component by up to half a step. One bit per dimension, RaBitQ's as PQ's, errs by about
    # 1 / sqrt(d) = 0.18, five times which leaves room for the upper tail of 2,000 rows that a top 3 is drawn from.
    steps = {Codec.FP16: 2**11, Codec.SQ8: 255, Codec.SQ6: 63, Codec.SQ4: 15}
    if codec is Codec.NONE:
        bound = 1e-6
    elif codec in steps:
        bound = np.ptp(VECTORS, axis=0).max() / steps[codec] / 2 * DIMENSION**0.5
    else:
        bound = 5 / DIMENSION**0.5
    assert np.nanmax(np.abs(hits.similarities - true)) < bound
    assert np.all(np.diff(hits.similarities, axis=1) <= 0)


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_merged_shards_equal_one_shard(shards: int, tmp_path: Path) -> None:
    whole = _searcher(tmp_path, stored=VECTORS).search(QUERIES, 10, PLAIN)
    ends = np.linspace(0, ROWS, shards + 1).astype(int)
    parts = []
    for shard, (first, last) in enumerate(zip(ends, ends[1:], strict=False)):
        rows = slice(first, last)
        searcher = _searcher(tmp_path, rows=rows, stored=VECTORS[rows], shard=shard)
        parts.append(searcher.search(QUERIES, 10, PLAIN))
    merged = merge_hits(parts, 10)
    assert np.array_equal(merged.ids, whole.ids)
    assert np.array_equal(merged.similarities, whole.similarities)
    assert np.array_equal(ends[merged.shards] + merged.rows, whole.rows)
    assert _equal(merge_hits(parts[::-1], 10), merged)
    assert _equal(merge_hits([merge_hits(parts[:1], 10), merge_hits(parts[1:], 10)], 10), merged)


def test_equal_similarities_come_by_ascending_id_across_shards(tmp_path: Path) -> None:
    copies = np.repeat(VECTORS[:1], 9, axis=0)
    parts = [
        _searcher(tmp_path, vectors=copies, rows=slice(shard, None, 3), stored=copies[shard::3], shard=shard)
        for shard in range(3)
    ]
    merged = merge_hits([part.search(VECTORS[:1], 9, PLAIN) for part in parts], 5)
    assert merged.ids[0].tolist() == sorted(IDS[:9])[:5]


@pytest.mark.parametrize(("family", "codec"), VARIANTS)
def test_k_beyond_the_rows_leaves_places_unfilled(family: Family, codec: Codec, tmp_path: Path) -> None:
    searcher = _searcher(tmp_path, family, codec, rows=slice(0, 4))
    knobs = SearchParameters(nprobe=16) if family is Family.IVF else PLAIN
    hits = searcher.search(QUERIES[:3], 9, knobs)
    assert all(set(found[:4]) == set(IDS[:4]) and found[4:] == [None] * 5 for found in hits.ids.tolist())
    assert np.isnan(hits.similarities[:, 4:]).all() and not np.isnan(hits.similarities[:, :4]).any()
    assert np.all(hits.shards[:, 4:] == -1) and np.all(hits.rows[:, 4:] == -1)


def test_an_empty_shard_and_no_queries(tmp_path: Path) -> None:
    empty = _searcher(tmp_path, rows=slice(0, 0), shard=1)
    hits = empty.search(QUERIES, 5, PLAIN)
    assert hits.ids.shape == (40, 5) and not hits.ids.any()
    full = _searcher(tmp_path).search(QUERIES, 5, PLAIN)
    assert _equal(merge_hits([hits, full], 5), full)
    assert _searcher(tmp_path).search(QUERIES[:0], 5, PLAIN).ids.shape == (0, 5)


@pytest.mark.parametrize("family", [Family.HNSW, Family.IVF])
@pytest.mark.parametrize("codec", [Codec.NONE, Codec.RABITQ])
def test_threads_with_different_parameters_get_the_answers_of_serial_searches(
    family: Family, codec: Codec, tmp_path: Path
) -> None:
    searcher = _searcher(tmp_path, family, codec, stored=VECTORS.astype(np.float16))
    grid = [1, 2, 4, 16]
    points = [
        SearchParameters(value, None, factor) if family is Family.HNSW else SearchParameters(None, value, factor)
        for value in grid
        for factor in (1, 3)
    ]
    serial = [searcher.search(QUERIES, 5, point) for point in points]
    assert any(not _equal(serial[0], other) for other in serial)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            together = list(pool.map(lambda point: searcher.search(QUERIES, 5, point), points))
            assert all(_equal(one, other) for one, other in zip(serial, together, strict=True))


@pytest.mark.parametrize(
    ("family", "codec"), [(Family.HNSW, Codec.NONE), (Family.IVF, Codec.SQ8), (Family.IVF, Codec.RABITQ)]
)
def test_search_parameters_reach_faiss(family: Family, codec: Codec, tmp_path: Path) -> None:
    searcher = _searcher(tmp_path, family, codec, stored=VECTORS)
    ids, _ = _brute_force(QUERIES, 1)
    low, high = (
        (SearchParameters(ef_search=1, rerank_factor=4), SearchParameters(ef_search=500, rerank_factor=4))
        if family is Family.HNSW
        else (SearchParameters(nprobe=1, rerank_factor=400), SearchParameters(nprobe=16, rerank_factor=400))
    )
    found_low, found_high = (np.mean(searcher.search(QUERIES, 1, point).ids == ids) for point in (low, high))
    assert found_low < found_high
    assert found_high >= 0.95


def test_inner_product_ranks_by_length_too(tmp_path: Path) -> None:
    vectors = VECTORS * np.linspace(0.1, 3, ROWS, dtype=np.float32)[:, None]
    searcher = _searcher(tmp_path, vectors=vectors, metric=Metric.INNER_PRODUCT)
    hits = searcher.search(QUERIES * 5, 3, PLAIN)
    near = (QUERIES * 5) @ vectors.T
    assert np.array_equal(hits.ids, IDS[np.argsort(-near, axis=1)[:, :3]])


def test_chunked_ids_are_looked_up_by_row(tmp_path: Path) -> None:
    whole = _searcher(tmp_path, stored=VECTORS)
    index = open_index(tmp_path / "shard-0-flat-none.faiss")
    ids = pa.chunked_array([pa.array(part, pa.string()) for part in np.split(IDS, [1, 1, 900])])
    pieces = ShardSearcher(index, ids, VECTORS, Metric.COSINE, 0)
    assert _equal(pieces.search(QUERIES, 7, PLAIN), whole.search(QUERIES, 7, PLAIN))


@pytest.mark.parametrize(("family", "codec"), VARIANTS)
def test_a_search_of_allowed_rows_is_exact_where_it_compares_them_all(
    family: Family, codec: Codec, tmp_path: Path
) -> None:
    searcher = _searcher(tmp_path, family, codec, stored=VECTORS)
    knobs = {Family.HNSW: SearchParameters(ef_search=ROWS), Family.IVF: SearchParameters(nprobe=16)}.get(family, PLAIN)
    point = SearchParameters(knobs.ef_search, knobs.nprobe, ROWS // 10)
    for share in (0.0005, 0.01, 0.2, 0.95, 1.0):
        allowed = _mask(share)
        assert _equal(searcher.search(QUERIES, 10, point, allowed), _brute_force_hits(allowed, 10))


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(("family", "codec"), VARIANTS)
def test_no_query_gets_fewer_hits_than_allowed_rows(family: Family, codec: Codec, stored: bool, tmp_path: Path) -> None:
    searcher = _searcher(tmp_path, family, codec, stored=VECTORS if stored else None)
    knobs = {Family.HNSW: SearchParameters(ef_search=1), Family.IVF: SearchParameters(nprobe=1)}.get(family, PLAIN)
    for share, k in product((0.0, 0.0005, 0.003, 0.3, 0.9), (1, 12, 500)):
        allowed = _mask(share)
        hits = searcher.search(QUERIES, k, knobs, allowed)
        wanted = min(k, int(allowed.sum()))
        assert ((hits.rows >= 0).sum(axis=1) == wanted).all()
        assert allowed[hits.rows[:, :wanted]].all()
        assert all(len(set(rows)) == wanted for rows in hits.rows[:, :wanted].tolist())
        assert np.array_equal(hits.ids[:, :wanted], IDS[hits.rows[:, :wanted]])


@pytest.mark.parametrize(("family", "codec"), VARIANTS)
def test_recall_among_allowed_rows_is_that_among_all(family: Family, codec: Codec, tmp_path: Path) -> None:
    searcher = _searcher(tmp_path, family, codec, stored=VECTORS)
    knobs = {Family.HNSW: (24, None), Family.IVF: (None, 2)}.get(family, (None, None))
    parameters = SearchParameters(*knobs, rerank_factor=8)
    recalls = []
    for share in (1.0, 0.9, 0.7, 0.4, 0.1):
        allowed = _mask(share)
        expected = _brute_force_hits(allowed, 10).ids
        found = searcher.search(QUERIES, 10, parameters, allowed).ids
        recalls.append(np.mean([len(set(one) & set(other)) / 10 for one, other in zip(found, expected, strict=True)]))
    # 400 neighbours, of which nearly all at random: five standard deviations of a share.
    spread = 5 * np.sqrt(recalls[0] * (1 - recalls[0]) / 400)
    assert min(recalls) >= recalls[0] - spread


def test_equal_rows_that_are_allowed_come_by_ascending_id(tmp_path: Path) -> None:
    copies = np.repeat(VECTORS[:1], 300, axis=0)
    searcher = _searcher(tmp_path, vectors=copies, stored=copies)
    allowed = _mask(0.5)[:300]
    assert searcher.search(VECTORS[:1], 9, PLAIN, allowed).ids[0].tolist() == sorted(IDS[:300][allowed])[:9]


def test_allowed_rows_must_be_a_mask_of_the_shard(tmp_path: Path) -> None:
    searcher = _searcher(tmp_path)
    with pytest.raises(
        ValueError, match=r"allowed rows of shard 0 \(bool of shape \(5,\)\) must be bool, one for each of"
    ):
        searcher.search(QUERIES, 3, PLAIN, np.ones(5, bool))
    with pytest.raises(ValueError, match=r"allowed rows of shard 0 \(int64 of shape \(2000,\)\) must be bool"):
        searcher.search(QUERIES, 3, PLAIN, np.arange(ROWS))


@pytest.mark.parametrize("codec", VectorCodec)
def test_stored_codecs_re_rank_as_what_they_decode_to(codec: VectorCodec, tmp_path: Path) -> None:
    path = tmp_path / "vectors"
    with VectorWriter(path, DIMENSION, codec, VECTORS.mean(axis=0) if is_lvq(codec) else None) as writer:
        writer.add(VECTORS)
    stored = open_vectors(path)
    mapped = _searcher(tmp_path, Family.IVF, Codec.PQ, stored=stored)
    decoded = _searcher(tmp_path, Family.IVF, Codec.PQ, stored=stored.take(np.arange(ROWS)))
    point = SearchParameters(nprobe=16, rerank_factor=20)
    assert _equal(mapped.search(QUERIES, 10, point), decoded.search(QUERIES, 10, point))
    hits = mapped.search(QUERIES, 10, point)
    errors = np.abs(hits.similarities - np.einsum("qd,qkd->qk", QUERIES, VECTORS[hits.rows]))
    largest = np.abs(stored.take(np.arange(ROWS)) - VECTORS).max()
    assert (errors <= largest * np.abs(QUERIES).sum(axis=1, keepdims=True) + 1e-6).all()


def test_normalize() -> None:
    unit = normalize(np.array([[3, 4], [0, 1e-30]], np.float32))
    assert np.allclose(unit, [[0.6, 0.8], [0, 1]])
    assert unit.dtype == np.float32
    for bad in (0.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"vector 1 \(length (0.0|nan|inf)\) has no direction"):
            normalize(np.array([[1, 0], [bad, 0]], np.float32))


def test_search_parameters_are_json() -> None:
    for parameters in (PLAIN, SearchParameters(ef_search=64), SearchParameters(nprobe=8, rerank_factor=4)):
        assert SearchParameters.from_json(parameters.to_json()) == parameters
    assert SearchParameters(nprobe=8).to_json() == {"nprobe": 8, "rerank_factor": 1}
    with pytest.raises(ValueError, match=r"search parameter ef \(3\) is none of ef_search, nprobe, rerank_factor"):
        SearchParameters.from_json({"ef": 3})
    with pytest.raises(ValueError, match=r"nprobe \(0\) must be at least 1"):
        SearchParameters(nprobe=0)


def test_errors_name_value_rule_and_remedy(tmp_path: Path) -> None:
    searcher = _searcher(tmp_path)
    with pytest.raises(ValueError, match=r"query 1 \(length 2\) must have length 1 for cosine; normalize"):
        searcher.search(QUERIES[:2] * np.array([[1], [2]], np.float32), 3, PLAIN)
    with pytest.raises(ValueError, match=r"queries \(shape \(40, 8\)\) must have the index's 32 columns"):
        searcher.search(QUERIES[:, :8], 3, PLAIN)
    with pytest.raises(ValueError, match=r"k \(0\)"):
        searcher.search(QUERIES, 0, PLAIN)
    with pytest.raises(ValueError, match=r"rerank_factor \(2\) needs stored vectors, and shard 0 has none"):
        searcher.search(QUERIES, 3, SearchParameters(rerank_factor=2))
    with pytest.raises(ValueError, match=r"nprobe \(2\) is no parameter of IndexFlat"):
        searcher.search(QUERIES, 3, SearchParameters(nprobe=2))
    index = open_index(tmp_path / "shard-0-flat-none.faiss")
    with pytest.raises(ValueError, match=r"ids of shard 4 \(5\) differ from the 2000 rows"):
        ShardSearcher(index, pa.array(IDS[:5]), None, Metric.COSINE, 4)
    with pytest.raises(ValueError, match=r"stored vectors of shard 4 \(2000 of 8 dimensions\) differ .* 2000 of 32"):
        ShardSearcher(index, pa.array(IDS), VECTORS[:, :8], Metric.COSINE, 4)
    with pytest.raises(ValueError, match=r"index of shard 4 \(faiss metric type 1\) holds distances"):
        ShardSearcher(faiss.IndexFlatL2(DIMENSION), pa.array([], pa.string()), None, Metric.INNER_PRODUCT, 4)
    with pytest.raises(ValueError, match="hits to merge answer"):
        merge_hits([searcher.search(QUERIES, 3, PLAIN), searcher.search(QUERIES[:2], 3, PLAIN)], 3)
