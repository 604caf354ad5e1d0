from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest

from penstock.operators.indexing import (
    Codec,
    Family,
    IndexSpec,
    Metric,
    ShardBuilder,
    factory_string,
    open_index,
    train_index,
)
from penstock.operators.searching import (
    STORED_BATCH_ROWS,
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

DIMENSION = 32
ROWS = 2000
VARIANTS = [(family, codec) for family in Family for codec in Codec]
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
    assert np.array_equal(hits.similarities.ravel(), exact_inner_products(np.repeat(QUERIES, 10, axis=0), found))


@pytest.mark.parametrize(("family", "codec"), VARIANTS)
def test_similarities_without_stored_vectors_estimate_the_true_ones(
    family: Family, codec: Codec, tmp_path: Path
) -> None:
    searcher = _searcher(tmp_path, family, codec)
    hits = searcher.search(VECTORS[:50], 3, PLAIN)
    true = np.einsum("qd,qkd->qk", VECTORS[:50], VECTORS[hits.rows])
    # SQ8 moves each component by up to half a step. One bit per dimension, RaBitQ's as PQ's, errs by about
    # 1 / sqrt(d) = 0.18, five times which leaves room for the upper tail of 2,000 rows that a top 3 is drawn from.
    steps = np.ptp(VECTORS, axis=0).max() / 255
    bound = {
        Codec.NONE: 1e-6,
        Codec.SQ8: steps / 2 * DIMENSION**0.5,
        Codec.PQ: 5 / DIMENSION**0.5,
        Codec.RABITQ: 5 / DIMENSION**0.5,
    }[codec]
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


def test_chunked_ids_and_pieces_of_vectors_are_looked_up_by_row(tmp_path: Path) -> None:
    whole = _searcher(tmp_path, stored=VECTORS)
    index = open_index(tmp_path / "shard-0-flat-none.faiss")
    ids = pa.chunked_array([pa.array(part, pa.string()) for part in np.split(IDS, [1, 1, 900])])
    stored = StoredVectors(np.split(VECTORS, [13, 13, 1999]), DIMENSION)
    pieces = ShardSearcher(index, ids, stored, Metric.COSINE, 0)
    assert _equal(pieces.search(QUERIES, 7, PLAIN), whole.search(QUERIES, 7, PLAIN))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_vectors_round_trip_memory_mapped(dtype: type[np.floating], tmp_path: Path) -> None:
    vectors = np.random.default_rng(5).standard_normal((STORED_BATCH_ROWS + 700, 8)).astype(np.float32)
    for name, batch_rows in [("one", len(vectors)), ("other", 999)]:
        with VectorWriter(tmp_path / name, 8, dtype) as writer:
            for first in range(0, len(vectors), batch_rows):
                writer.add(vectors[first : first + batch_rows])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    allocated_bytes = pa.total_allocated_bytes()
    stored = open_vectors(tmp_path / "one")
    assert pa.total_allocated_bytes() == allocated_bytes
    rows = np.array([len(vectors) - 1, 0, STORED_BATCH_ROWS, STORED_BATCH_ROWS - 1, 0])
    assert np.array_equal(stored.take(rows), vectors.astype(dtype)[rows].astype(np.float32))
    assert [len(batch) for batch in stored.batches()] == [STORED_BATCH_ROWS, 700]
    assert (len(stored), stored.dimension) == (len(vectors), 8)


def test_an_empty_vector_file_keeps_its_dimension(tmp_path: Path) -> None:
    with VectorWriter(tmp_path / "empty", 8, np.float16):
        pass
    stored = open_vectors(tmp_path / "empty")
    assert (len(stored), stored.dimension, stored.take(np.array([], np.int64)).shape) == (0, 8, (0, 8))


def test_damaged_or_foreign_vector_files_are_errors_that_name_them(tmp_path: Path) -> None:
    path = tmp_path / "shard-0.vectors.arrow"
    with VectorWriter(path, 8, np.float32) as writer:
        writer.add(np.ones((100, 8), np.float32))
    whole = path.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"vector file .*shard-0.vectors.arrow is damaged .*sha256"):
            open_vectors(path)
    table = pa.table({"vector": [1.0, 2.0]})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as foreign:
        foreign.write_table(table)
    with pytest.raises(ValueError, match="must hold one column vector of fixed size lists"):
        open_vectors(path)
    with pytest.raises(FileNotFoundError):
        open_vectors(tmp_path / "absent")


def test_a_writer_left_by_an_exception_leaves_no_file_that_opens(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="vector 2 for .* is not finite as float16"),
        VectorWriter(tmp_path / "half", 2, np.float16) as writer,
    ):
        writer.add(np.zeros((1, 2), np.float32))
        writer.add(np.array([[0, 1], [70_000, 0]], np.float32))
    with pytest.raises(ValueError, match="is damaged"):
        open_vectors(tmp_path / "half")


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
    with pytest.raises(ValueError, match=r"dtype \(float64\) of .* must be float16 or float32"):
        VectorWriter(tmp_path / "double", 8, np.float64)
