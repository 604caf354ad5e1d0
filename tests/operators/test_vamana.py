"""Vamana shards of svs, behind the searches that faiss shards have. Without svs only what needs none is tested."""

import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from penstock.operators import vamana
from penstock.operators.evaluation import exact_neighbours, operating_points, recall_at_k
from penstock.operators.indexing import (
    LEANVEC_CODECS,
    VAMANA_CODES,
    Codec,
    Family,
    IndexSpec,
    Metric,
    bytes_per_vector,
    factory_string,
    faiss_metric,
    fewest_training_rows,
    open_shard,
    parse_factory,
    requires_training,
    shard_builder,
    train_index,
)
from penstock.operators.ranking import exact_inner_products
from penstock.operators.searching import SearchParameters, ShardSearcher, normalize
from penstock.operators.vamana import (
    VamanaBuilder,
    VamanaIndex,
    VamanaLayout,
    cpu_vendor,
    open_vamana,
    refuse_unusable,
    svs_version,
)

DIMENSION, ROWS, K = 32, 3000, 10
TOPICS = np.random.default_rng(0).standard_normal((40, DIMENSION)) + 1
COMPRESSED = [codec for codec in VAMANA_CODES if codec not in (Codec.NONE, Codec.FP16)]
# Of ten neighbours. LVQ4x4 keeps 8 bits of 32 components; LeanVec searches half of the components first.
LEAST_RECALL = {Codec.NONE: 0.99, Codec.FP16: 0.98, Codec.LVQ4X8: 0.95}
needs_svs = pytest.mark.skipif(svs_version() is None, reason="svs is not installed")
needs_intel = pytest.mark.skipif(cpu_vendor() != "GenuineIntel", reason="LVQ and LeanVec run on Intel CPUs only")
BUILDABLE = [
    pytest.param(codec, marks=[needs_svs, *([needs_intel] if codec in COMPRESSED else [])]) for codec in VAMANA_CODES
]


def _clustered(rows: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return normalize(TOPICS[generator.integers(0, 40, rows)] + generator.standard_normal((rows, DIMENSION)))


VECTORS, QUERIES = _clustered(ROWS, seed=1), _clustered(50, seed=2)
LONG_AND_SHORT = VECTORS * np.linspace(0.7, 1.4, ROWS, dtype=np.float32)[:, None]
IDS = pa.array([f"row-{(row * 7919) % ROWS:05}" for row in range(ROWS)])


def _spec(codec: Codec = Codec.NONE, metric: Metric = Metric.COSINE) -> IndexSpec:
    factory = factory_string(Family.VAMANA, codec, DIMENSION, degree=16)
    return IndexSpec(Family.VAMANA, codec, metric, DIMENSION, factory, 0, 0, ef_construction=50)


def _built(path: Path, vectors: np.ndarray, spec: IndexSpec, batch_rows: int = 700, threads: int = 1) -> Path:
    builder = shard_builder(spec, train_index(spec, vectors[:0]), threads)
    for first in range(0, len(vectors), batch_rows):
        builder.add(vectors[first : first + batch_rows])
    builder.write(path)
    assert builder.ntotal == len(vectors)
    return path


def _opened(path: Path) -> VamanaIndex:
    index = open_shard(path, Family.VAMANA)
    assert isinstance(index, VamanaIndex)
    return index


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> VamanaIndex:
    if svs_version() is None:
        pytest.skip("svs is not installed")
    return _opened(_built(tmp_path_factory.mktemp("vamana") / "shard.svs.tar", VECTORS, _spec()))


# ---- what needs no svs


@pytest.mark.parametrize("codec", VAMANA_CODES)
def test_factory_strings_are_read_back(codec: Codec) -> None:
    factory = factory_string(Family.VAMANA, codec, DIMENSION, degree=24)
    assert factory == "SVSVamana24" + {"": ""}.get(VAMANA_CODES[codec], f",{VAMANA_CODES[codec]}") + (
        "_16" if codec in LEANVEC_CODECS else ""
    )
    spec = parse_factory(factory, DIMENSION, Metric.COSINE, seed=0)
    assert (spec.family, spec.codec, spec.factory) == (Family.VAMANA, codec, factory)
    assert not requires_training(spec) and fewest_training_rows(spec) == 0
    assert train_index(spec, VECTORS[:0]) == factory.encode()


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("SVSVamana", r"factory \(SVSVamana\) must be SVSVamana with its links"),
        ("SVSVamana32,SQ8", r"factory \(SVSVamana32,SQ8\) must be .* one of FP16, LVQ8, LVQ4x4, LVQ4x8, LeanVec4x8"),
        ("SVSVamana1", r"factory \(SVSVamana1\) must have at least 2 links, got 1"),
        ("SVSVamana32,LVQ8_16", r"must name components \(16\) with LeanVec only"),
        ("SVSVamana32,LeanVec4x8_33", r"must name 1 to 32 components, those of the vectors, got 33"),
        ("SVSVamana32,LeanVec4x8_0", r"must name 1 to 32 components, those of the vectors, got 0"),
    ],
)
def test_factory_strings_that_svs_cannot_build_are_refused(factory: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_factory(factory, DIMENSION, Metric.COSINE, seed=0)


@pytest.mark.parametrize(
    ("family", "codec"), [(Family.VAMANA, Codec.SQ8), (Family.HNSW, Codec.LVQ8), (Family.FLAT, Codec.LEANVEC4X8)]
)
def test_codes_of_the_other_library_are_refused(family: Family, codec: Codec) -> None:
    with pytest.raises(ValueError, match=rf"codec \({codec}\) is not built with family {family}, as codes of svs"):
        faiss_metric(family, codec, Metric.COSINE)


def test_a_dimension_for_leanvec_belongs_to_its_codecs() -> None:
    with pytest.raises(ValueError, match=r"leanvec_dimension \(8\) belongs to codecs leanvec4x8, leanvec8x8, got lvq8"):
        factory_string(Family.VAMANA, Codec.LVQ8, DIMENSION, leanvec_dimension=8)


def test_without_svs_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vamana, "PACKAGE", "a-package-that-is-not-installed")
    message = r"family \(vamana\) needs the package scalable-vs, .* pip install 'penstock\[svs\]'"
    for needed in (
        lambda: refuse_unusable(""),
        lambda: VamanaBuilder("SVSVamana16", DIMENSION, 50),
        lambda: open_vamana(tmp_path / "shard.svs.tar"),
    ):
        with pytest.raises(ValueError, match=message):
            needed()


@needs_svs
def test_compressed_codes_are_refused_where_svs_would_end_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    facts = tmp_path / "cpuinfo"
    facts.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\n")
    monkeypatch.setattr(vamana, "CPU_FACTS", facts)
    refuse_unusable("FP16")
    for code in ("LVQ8", "LeanVec4x8"):
        with pytest.raises(ValueError, match=rf"code \({code}\) .* needs an Intel CPU, .* got AuthenticAMD"):
            refuse_unusable(code)
    monkeypatch.setattr(vamana, "CPU_FACTS", tmp_path / "none")
    with pytest.raises(ValueError, match="got unknown"):
        refuse_unusable("LVQ8")


def test_bytes_of_codes_as_published() -> None:
    expected = {"": 1536, "FP16": 768, "LVQ8": 388, "LVQ4x4": 388, "LVQ4x8": 580, "LeanVec4x8": 488, "LeanVec8x8": 584}
    for code, size in expected.items():
        factory = f"SVSVamana32,{code}" if code else "SVSVamana32"
        layout = VamanaLayout.parse(factory, 384)
        assert (layout.code_bytes, layout.graph_bytes) == (size, 132), code


def test_operating_points_widen_the_window_cheapest_first() -> None:
    plain = operating_points(_spec(), 10**6, rerank=True)
    windows = [point.ef_search for point in plain]
    assert windows[:3] == [10, 11, 12] and windows[-1] == 512 and windows == sorted(windows)
    assert {point.rerank_factor for point in plain} == {1}
    assert {point.rerank_factor for point in operating_points(_spec(Codec.FP16), 10**6, rerank=True)} > {1, 2}


# ---- building


@pytest.mark.parametrize("codec", BUILDABLE)
def test_a_shard_round_trips_and_finds_the_nearest(codec: Codec, tmp_path: Path) -> None:
    index = _opened(_built(tmp_path / "shard.svs.tar", VECTORS, _spec(codec)))
    assert (index.ntotal, index.d) == (ROWS, DIMENSION)
    hits = ShardSearcher(index, IDS, None, Metric.COSINE, 3).search(QUERIES, K, SearchParameters(ef_search=200))
    truth = exact_neighbours(QUERIES, [(IDS, VECTORS)], K, Metric.COSINE, [None] * len(QUERIES))
    assert np.mean(recall_at_k(hits.ids, truth, K)) >= LEAST_RECALL.get(codec, 0.85)
    exact = exact_inner_products(QUERIES[:, None, :], VECTORS[hits.rows])
    assert np.allclose(hits.similarities, exact, atol=1e-5 if codec is Codec.NONE else 0.05)


@needs_svs
def test_bytes_per_vector_is_what_files_grow_by(tmp_path: Path) -> None:
    for codec in (Codec.NONE, Codec.FP16):
        few, many = (_built(tmp_path / f"{rows}", VECTORS[:rows], _spec(codec)).stat().st_size for rows in (512, 2560))
        # A tar file ends at a multiple of 10 KiB.
        assert abs((many - few) / 2048 - bytes_per_vector(_spec(codec))) <= 10_240 / 2048


@needs_svs
def test_a_shard_is_the_same_however_often_it_is_built(tmp_path: Path) -> None:
    files = [_built(tmp_path / f"{rows}", VECTORS, _spec(), batch_rows=rows).read_bytes() for rows in (ROWS, 999, 999)]
    assert files[0] == files[1] == files[2]


@needs_svs
def test_nothing_is_left_behind_and_nothing_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    for folder in ("temporary", "scratch"):
        (tmp_path / folder).mkdir()
    path = _built(tmp_path / "shard.svs.tar", VECTORS[:100], _spec())
    open_vamana(path, tmp_path / "scratch")
    assert not list((tmp_path / "temporary").iterdir()) and not list((tmp_path / "scratch").iterdir())
    assert capfd.readouterr() == ("", "")


@needs_svs
def test_an_empty_shard_finds_nothing(tmp_path: Path) -> None:
    index = _opened(_built(tmp_path / "shard.svs.tar", VECTORS[:0], _spec()))
    assert (index.ntotal, index.d) == (0, DIMENSION)
    hits = ShardSearcher(index, IDS[:0], None, Metric.COSINE, 0).search(QUERIES, K, SearchParameters())
    assert (hits.rows == -1).all()


@needs_svs
@pytest.mark.parametrize("rows", [1, 3])
def test_a_shard_of_few_rows_finds_them_all(rows: int, tmp_path: Path) -> None:
    index = _opened(_built(tmp_path / "shard.svs.tar", VECTORS[:rows], _spec()))
    hits = ShardSearcher(index, IDS[:rows], None, Metric.COSINE, 0).search(QUERIES, K, SearchParameters())
    assert [set(row) for row in hits.rows.tolist()] == [{-1, *range(rows)}] * len(QUERIES)


@needs_svs
def test_places_that_svs_fills_with_row_0_are_no_hits(index: VamanaIndex, tmp_path: Path) -> None:
    few = _opened(_built(tmp_path / "shard.svs.tar", VECTORS[:4], _spec()))
    near, rows = few.search(QUERIES, 9)
    assert [sorted(row) for row in rows.tolist()] == [[-1] * 5 + [0, 1, 2, 3]] * len(QUERIES)
    assert np.allclose(near[:, 0], (QUERIES @ VECTORS[:4].T).max(axis=1), atol=1e-5)


@needs_svs
def test_vectors_of_another_dimension_are_refused() -> None:
    builder = VamanaBuilder("SVSVamana16", DIMENSION, 50)
    with pytest.raises(
        ValueError, match=r"vectors to add \(shape \(2, 31\)\) must be rows of the index's 32 dimensions"
    ):
        builder.add(np.zeros((2, DIMENSION - 1), np.float32))


@needs_svs
def test_files_that_are_no_index_are_refused(tmp_path: Path) -> None:
    whole = _built(tmp_path / "shard.svs.tar", VECTORS[:100], _spec()).read_bytes()
    other = io.BytesIO()
    with tarfile.open(fileobj=other, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("vamana.json"), io.BytesIO())
    damaged = {
        "short": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"not a tar file" * 100,
        "other": other.getvalue(),
    }
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name} \({len(data)} bytes\) is not a complete svs index: .*; compare"):
            open_vamana(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        open_vamana(tmp_path / "missing")


@needs_svs
def test_members_outside_of_the_index_are_refused(tmp_path: Path) -> None:
    path = _built(tmp_path / "shard.svs.tar", VECTORS[:100], _spec())
    with tarfile.open(path, "a") as archive:
        archive.addfile(tarfile.TarInfo("data/../../escaped"), io.BytesIO())
    with pytest.raises(ValueError, match=r"not a complete svs index: it holds 'data/\.\./\.\./escaped'"):
        open_vamana(path, tmp_path)
    assert not (tmp_path / "escaped").exists()


@needs_svs
def test_a_shard_that_svs_cannot_save_is_an_error_of_the_system(tmp_path: Path) -> None:
    builder = VamanaBuilder("SVSVamana16", DIMENSION, 50)
    builder.add(VECTORS[:10])
    builder._rows_file.write(b"half a row")
    builder._rows_file.flush()
    with pytest.raises(OSError, match=r"shard .* \(10 rows\) could not be built by svs"):
        builder.write(tmp_path / "shard.svs.tar")


# ---- searching


@needs_svs
def test_inner_products_of_long_and_short_vectors(tmp_path: Path) -> None:
    spec = _spec(metric=Metric.INNER_PRODUCT)
    opened = _opened(_built(tmp_path / "shard.svs.tar", LONG_AND_SHORT, spec))
    searcher = ShardSearcher(opened, IDS, None, Metric.INNER_PRODUCT, 0)
    hits = searcher.search(2 * QUERIES, K, SearchParameters(ef_search=300))
    truth = exact_neighbours(2 * QUERIES, [(IDS, LONG_AND_SHORT)], K, Metric.INNER_PRODUCT, [None] * len(QUERIES))
    assert np.mean(recall_at_k(hits.ids, truth, K)) >= 0.95
    assert np.allclose(
        hits.similarities, exact_inner_products(2 * QUERIES[:, None], LONG_AND_SHORT[hits.rows]), atol=1e-4
    )


def test_a_wider_window_finds_more(index: VamanaIndex) -> None:
    truth = exact_neighbours(QUERIES, [(IDS, VECTORS)], K, Metric.COSINE, [None] * len(QUERIES))
    searcher = ShardSearcher(index, IDS, None, Metric.COSINE, 0)
    recalls = [
        np.mean(recall_at_k(searcher.search(QUERIES, K, SearchParameters(ef_search=ef)).ids, truth, K))
        for ef in (K, 40, 400)
    ]
    assert recalls[0] < recalls[1] <= recalls[2] and recalls[2] >= 0.99


def test_answers_do_not_depend_on_the_batch_of_queries(index: VamanaIndex) -> None:
    searcher = ShardSearcher(index, IDS, None, Metric.COSINE, 0)
    whole = searcher.search(QUERIES, K, SearchParameters(ef_search=30))
    for query in range(5):
        one = searcher.search(QUERIES[query : query + 1], K, SearchParameters(ef_search=30))
        assert one.rows[0].tolist() == whole.rows[query].tolist()


def test_candidates_are_compared_again_by_stored_vectors(index: VamanaIndex) -> None:
    halves = VECTORS.astype(np.float16)
    searcher = ShardSearcher(index, IDS, halves, Metric.COSINE, 0)
    hits = searcher.search(QUERIES, K, SearchParameters(ef_search=100, rerank_factor=3))
    exact = exact_inner_products(QUERIES[:, None, :], halves.astype(np.float32)[hits.rows])
    assert np.allclose(hits.similarities, exact, atol=1e-6)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("count", [0, 3, 40, 400, 2000, ROWS])
def test_filters_find_k_allowed_rows_and_the_nearest_of_them(index: VamanaIndex, count: int, stored: bool) -> None:
    allowed = np.zeros(ROWS, bool)
    allowed[np.random.default_rng(count).permutation(ROWS)[:count]] = True
    searcher = ShardSearcher(index, IDS, VECTORS if stored else None, Metric.COSINE, 0)
    hits = searcher.search(QUERIES, K, SearchParameters(ef_search=20), allowed)
    assert ((hits.rows >= 0).sum(axis=1) == min(K, count)).all()
    assert allowed[hits.rows[hits.rows >= 0]].all()
    if count:
        kept = np.flatnonzero(allowed)
        truth = exact_neighbours(
            QUERIES, [(IDS.take(pa.array(kept)), VECTORS[kept])], K, Metric.COSINE, [None] * len(QUERIES)
        )
        recall = np.mean(recall_at_k(hits.ids, truth, K))
        assert recall == 1 if count <= 640 else recall >= 0.9  # up to 32 rows for each of a window of 20, one by one


def test_filters_that_the_graph_leads_past_are_searched_one_by_one(index: VamanaIndex) -> None:
    """The allowed rows are those that are farthest from the query, so that the graph's answers hold none of them."""
    query = QUERIES[:1]
    order = np.argsort(query[0] @ VECTORS.T)
    allowed = np.zeros(ROWS, bool)
    allowed[order[:1500]] = True
    hits = ShardSearcher(index, IDS, None, Metric.COSINE, 0).search(query, K, SearchParameters(), allowed)
    assert hits.rows[0].tolist() == order[:1500][::-1][:K].tolist()


def test_threads_with_windows_of_their_own_get_their_own_answers(index: VamanaIndex) -> None:
    searcher = ShardSearcher(index, IDS, None, Metric.COSINE, 0)
    windows = [K, 20, 60, 200] * 10
    alone = {window: searcher.search(QUERIES, K, SearchParameters(ef_search=window)).rows for window in set(windows)}
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda ef: searcher.search(QUERIES, K, SearchParameters(ef_search=ef)).rows, windows))
    for window, rows in zip(windows, together, strict=True):
        assert np.array_equal(rows, alone[window])


def test_parameters_of_other_families_are_refused(index: VamanaIndex) -> None:
    searcher = ShardSearcher(index, IDS, None, Metric.COSINE, 0)
    with pytest.raises(ValueError, match=r"nprobe \(4\) is no parameter of VamanaIndex, but of IndexIVF"):
        searcher.search(QUERIES, K, SearchParameters(nprobe=4))
    with pytest.raises(ValueError, match=r"rerank_factor \(2\) needs stored vectors"):
        searcher.search(QUERIES, K, SearchParameters(rerank_factor=2))
