from pathlib import Path

import faiss
import numpy as np
import pytest

from penstock.operators.indexing import (
    BATCH_ROWS,
    COARSE_GRAPH_EF_SEARCH,
    COARSE_GRAPH_LISTS,
    FAISS_CODECS,
    FAISS_FAMILIES,
    RANGE_TRAINING_ROWS,
    TRAINING_ROWS_PER_CENTROID,
    Codec,
    Family,
    FixedBatches,
    IndexSpec,
    Metric,
    ShardBuilder,
    bytes_per_vector,
    codecs_of,
    core_index,
    factory_string,
    faiss_metric,
    fewest_training_rows,
    nlist_of,
    open_index,
    parse_factory,
    requires_training,
    similarities,
    train_index,
    training_rows_needed,
)
from penstock.operators.searching import normalize

DIMENSION = 32
ROWS = 1500
VARIANTS = [(family, codec) for family in FAISS_FAMILIES for codec in codecs_of(family, Metric.COSINE)]


def _spec(family: Family, codec: Codec, metric: Metric = Metric.COSINE, seed: int = 7) -> IndexSpec:
    factory = factory_string(family, codec, DIMENSION, hnsw_m=16, nlist=16, rabitq_bits=4)
    return IndexSpec(family, codec, metric, DIMENSION, factory, training_rows=ROWS, seed=seed)


def _vectors(rows: int, seed: int = 0) -> np.ndarray:
    return normalize(np.random.default_rng(seed).standard_normal((rows, DIMENSION)))


@pytest.mark.parametrize(("family", "codec"), VARIANTS)
def test_training_is_deterministic_quiet_and_seeded(
    family: Family, codec: Codec, capfd: pytest.CaptureFixture[str]
) -> None:
    sample = _vectors(ROWS)
    first, second, other = (train_index(_spec(family, codec, seed=seed), sample) for seed in (7, 7, 8))
    assert first == second
    learns_at_random = family is Family.IVF or codec in (Codec.PQ, Codec.PQFS, Codec.RABITQ, Codec.RABITQFS)
    assert (first != other) == learns_at_random
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("family", "codec"), VARIANTS)
def test_a_shard_round_trips_and_finds_its_own_rows(family: Family, codec: Codec, tmp_path: Path) -> None:
    vectors = _vectors(ROWS)
    spec = _spec(family, codec)
    builder = ShardBuilder(train_index(spec, vectors))
    for first in range(0, ROWS, 400):
        builder.add(vectors[first : first + 400])
    builder.write(tmp_path / "shard.faiss")
    answers = []
    for opened_as, mmap in [(family, True), (None, True), (family, False)]:
        index = open_index(tmp_path / "shard.faiss", opened_as, mmap=mmap)
        assert (index.ntotal, builder.ntotal, index.d) == (ROWS, ROWS, DIMENSION)
        assert index.metric_type == faiss_metric(family, codec, Metric.COSINE)
        answers.append(index.search(vectors[:100], 5))
    for distances, rows in answers:
        assert np.array_equal(rows, answers[0][1])
        assert np.array_equal(distances, answers[0][0])
    # 4 bytes for 32 dimensions confuse a few of 1,500 rows; every other code tells a row from its neighbours.
    assert np.mean(answers[0][1][:, 0] == np.arange(100)) >= (0.9 if codec is Codec.PQ else 1.0)


@pytest.mark.parametrize(("family", "codec"), [(Family.HNSW, Codec.NONE), (Family.IVF, Codec.SQ8)])
def test_a_shard_does_not_depend_on_the_batches_it_was_given(family: Family, codec: Codec, tmp_path: Path) -> None:
    rows = BATCH_ROWS + 500
    vectors = _vectors(rows)
    trained = train_index(_spec(family, codec), vectors)
    files = []
    for batch_rows in (rows, 999):
        builder = ShardBuilder(trained)
        for first in range(0, rows, batch_rows):
            builder.add(vectors[first : first + batch_rows])
        builder.write(tmp_path / f"{batch_rows}.faiss")
        files.append((tmp_path / f"{batch_rows}.faiss").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize(("family", "codec"), VARIANTS)
def test_bytes_per_vector_is_what_files_grow_by(family: Family, codec: Codec, tmp_path: Path) -> None:
    spec = _spec(family, codec)
    trained = train_index(spec, _vectors(ROWS))
    sizes = []
    for rows in (992, 2976):  # whole blocks of fast-scan codes
        builder = ShardBuilder(trained)
        builder.add(_vectors(rows))
        builder.write(tmp_path / "shard.faiss")
        sizes.append((tmp_path / "shard.faiss").stat().st_size)
    # The levels of HNSW are drawn: with 1,984 rows at m=16 their sum varies by about 4.3 of 133 links, or 1 byte a row.
    # The last blocks of 16 lists are as full as chance has it.
    fast_scan = codec in (Codec.PQFS, Codec.RABITQFS) and family is Family.IVF
    within = 2 if family is Family.HNSW else 0.05 * bytes_per_vector(spec) if fast_scan else 0
    assert (sizes[1] - sizes[0]) / 1984 == pytest.approx(bytes_per_vector(spec), abs=within)


@pytest.mark.parametrize(("factory", "rows"), [("PQ8x4fs", 33), ("IVF16,PQ8x4fs", 3000), ("IVF256,RaBitQfs4", 3000)])
def test_bytes_per_vector_counts_the_padding_of_a_shard(factory: str, rows: int, tmp_path: Path) -> None:
    spec = parse_factory(factory, DIMENSION, Metric.COSINE, 7, training_rows=3000)
    trained = train_index(spec, _vectors(3000))
    builder = ShardBuilder(trained)
    builder.add(_vectors(rows, seed=1))
    builder.write(tmp_path / "shard.faiss")
    grown = ((tmp_path / "shard.faiss").stat().st_size - len(trained)) / rows
    assert grown == pytest.approx(bytes_per_vector(spec, rows), rel=0.1 if nlist_of(spec) else 0)
    assert bytes_per_vector(spec, rows) > bytes_per_vector(spec)


def test_an_empty_shard_opens(tmp_path: Path) -> None:
    for family in FAISS_FAMILIES:
        ShardBuilder(train_index(_spec(family, Codec.NONE), _vectors(ROWS))).write(tmp_path / "shard.faiss")
        assert open_index(tmp_path / "shard.faiss", family).ntotal == 0


def test_ef_construction_reaches_the_index_and_survives_the_file(tmp_path: Path) -> None:
    factory = factory_string(Family.HNSW, Codec.RABITQ, DIMENSION)
    spec = IndexSpec(Family.HNSW, Codec.RABITQ, Metric.COSINE, DIMENSION, factory, ROWS, 7, ef_construction=33)
    ShardBuilder(train_index(spec, _vectors(ROWS))).write(tmp_path / "shard.faiss")
    index = open_index(tmp_path / "shard.faiss")
    assert core_index(index).hnsw.efConstruction == 33


def test_training_reads_no_more_than_its_rows() -> None:
    spec = _spec(Family.IVF, Codec.SQ8)
    sample = _vectors(ROWS)
    assert train_index(spec, np.concatenate([sample, _vectors(500, seed=1)])) == train_index(spec, sample)


def test_factory_strings() -> None:
    assert factory_string(Family.FLAT, Codec.NONE, 384) == "Flat"
    assert factory_string(Family.FLAT, Codec.PQ, 384) == "PQ48"
    assert factory_string(Family.FLAT, Codec.RABITQ, 384) == "RR384,RaBitQ"
    assert factory_string(Family.HNSW, Codec.NONE, 384) == "HNSW32"
    assert factory_string(Family.HNSW, Codec.SQ8, 384, hnsw_m=16) == "HNSW16_SQ8"
    assert factory_string(Family.HNSW, Codec.RABITQ, 384) == "RR384,HNSW32_RaBitQ"
    assert factory_string(Family.IVF, Codec.NONE, 384, nlist=64) == "IVF64,Flat"
    assert factory_string(Family.IVF, Codec.RABITQ, 384, nlist=64, rabitq_bits=4) == "RR384,IVF64,RaBitQ4"
    assert factory_string(Family.IVF, Codec.RABITQFS, 384, nlist=64, rabitq_bits=1) == "RR384,IVF64,RaBitQfs"
    assert factory_string(Family.HNSW, Codec.FP16, 384) == "HNSW32_SQfp16"
    assert factory_string(Family.IVF, Codec.SQ6, 384, nlist=64) == "IVF64,SQ6"
    assert factory_string(Family.FLAT, Codec.SQ4, 384, rotate=True) == "RR384,SQ4"
    assert factory_string(Family.IVF, Codec.PQFS, 384, nlist=64) == "IVF64,PQ96x4fs"
    assert factory_string(Family.IVF, Codec.PQFS, 384, nlist=64, pq_bytes=64) == "IVF64,PQ128x4fs"
    assert factory_string(Family.HNSW, Codec.PQ, 384, opq=True) == "OPQ48_384,HNSW32_PQ48"
    assert factory_string(Family.FLAT, Codec.PQFS, 384, opq=True, opq_dimension=192) == "OPQ48_192,PQ48x4fs"


def test_a_graph_finds_the_lists_when_there_are_many() -> None:
    below, there = (
        factory_string(Family.IVF, Codec.SQ8, 384, nlist=nlist)
        for nlist in (COARSE_GRAPH_LISTS - 1, COARSE_GRAPH_LISTS)
    )
    assert (below, there) == ("IVF65535,SQ8", "IVF65536_HNSW32,SQ8")
    index = IndexSpec(Family.IVF, Codec.SQ8, Metric.COSINE, 384, there, COARSE_GRAPH_LISTS, 7)
    assert nlist_of(index) == fewest_training_rows(index) == COARSE_GRAPH_LISTS


def test_a_graph_over_centroids_finds_nearly_the_rows_that_comparing_all_centroids_finds(tmp_path: Path) -> None:
    vectors, found = _vectors(4000), []
    for factory in ("IVF256_HNSW32,Flat", "IVF256,Flat"):
        spec = parse_factory(factory, DIMENSION, Metric.INNER_PRODUCT, 7, training_rows=4000, ef_construction=33)
        builder = ShardBuilder(train_index(spec, vectors))
        builder.add(vectors)
        builder.write(tmp_path / "shard.faiss")
        index = open_index(tmp_path / "shard.faiss", Family.IVF)
        found.append(index.search(vectors[:200], 10, params=faiss.SearchParametersIVF(nprobe=16))[1])
        if factory == "IVF256_HNSW32,Flat":
            graph = faiss.downcast_index(core_index(index).quantizer).hnsw
            assert (graph.efConstruction, graph.efSearch) == (33, COARSE_GRAPH_EF_SEARCH)
    # Its centroids come from k-means by distance and not by inner product, so the lists are not the same.
    assert np.mean([len(set(one) & set(other)) / 10 for one, other in zip(*found, strict=True)]) > 0.5


@pytest.mark.parametrize(
    ("factory", "metric", "family", "codec"),
    [
        ("Flat", Metric.INNER_PRODUCT, Family.FLAT, Codec.NONE),
        ("IVF64_HNSW16,SQfp16", Metric.INNER_PRODUCT, Family.IVF, Codec.FP16),
        ("HNSW16,SQ6", Metric.INNER_PRODUCT, Family.HNSW, Codec.SQ6),
        ("OPQ8_16,HNSW16,PQ8x6", Metric.COSINE, Family.HNSW, Codec.PQ),
        ("PCAR16,IVF64,PQ8x4fsr", Metric.COSINE, Family.IVF, Codec.PQFS),
        ("Pad64,RR64,HNSW16_RaBitQ3", Metric.COSINE, Family.HNSW, Codec.RABITQ),
        ("HR32,RaBitQfs2", Metric.COSINE, Family.FLAT, Codec.RABITQFS),
    ],
)
def test_family_and_codec_of_a_factory_string_are_those_of_what_is_built(
    factory: str, metric: Metric, family: Family, codec: Codec
) -> None:
    spec = parse_factory(factory, DIMENSION, metric, seed=7)
    assert (spec.family, spec.codec, spec.factory, spec.seed) == (family, codec, factory, 7)
    assert spec.training_rows == training_rows_needed(spec)
    assert parse_factory(factory, DIMENSION, metric, 7, training_rows=500).training_rows == 500


def test_pca_keeps_the_order_of_inner_products(tmp_path: Path) -> None:
    vectors = _vectors(500) + np.float32(0.3)
    spec = parse_factory(f"PCA{DIMENSION},Flat", DIMENSION, Metric.INNER_PRODUCT, 7)
    builder = ShardBuilder(train_index(spec, vectors))
    builder.add(vectors)
    builder.write(tmp_path / "shard.faiss")
    distances, _ = open_index(tmp_path / "shard.faiss").search(vectors[:9], 5)
    assert np.allclose(distances, -np.sort(-vectors[:9] @ vectors.T, axis=1)[:, :5], atol=1e-4)


def test_opq_codes_err_less() -> None:
    # Parts of unequal variance, which a rotation evens out.
    vectors = _vectors(3000) * np.geomspace(4, 0.1, DIMENSION, dtype=np.float32)
    errors = []
    for factory in ("PQ8x4fs", "OPQ8,PQ8x4fs"):
        trained = train_index(parse_factory(factory, DIMENSION, Metric.INNER_PRODUCT, 7), vectors)
        index = faiss.deserialize_index(np.frombuffer(trained, np.uint8))
        errors.append(np.square(index.sa_decode(index.sa_encode(vectors)) - vectors).sum())
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("rows", [0, 1, 39, 1000, 24_336, 1_000_000])
def test_derived_lists_follow_the_rows_and_are_never_starved(rows: int) -> None:
    factory = factory_string(Family.IVF, Codec.NONE, DIMENSION, rows=rows)
    lists = int(factory.removeprefix("IVF").removesuffix(",Flat"))
    assert lists == 1 or lists * TRAINING_ROWS_PER_CENTROID <= rows
    assert lists <= max(1, round(4 * rows**0.5))


def test_training_rows() -> None:
    assert not requires_training(_spec(Family.FLAT, Codec.NONE))
    assert training_rows_needed(_spec(Family.HNSW, Codec.NONE)) == 0
    assert training_rows_needed(_spec(Family.IVF, Codec.NONE)) == 16 * TRAINING_ROWS_PER_CENTROID
    assert training_rows_needed(_spec(Family.IVF, Codec.PQ)) == 256 * TRAINING_ROWS_PER_CENTROID
    assert training_rows_needed(_spec(Family.FLAT, Codec.PQFS)) == 16 * TRAINING_ROWS_PER_CENTROID
    assert training_rows_needed(parse_factory("OPQ8,PQ8x4fs", DIMENSION, Metric.COSINE, 7)) == RANGE_TRAINING_ROWS
    assert fewest_training_rows(parse_factory("PCA16,Flat", DIMENSION, Metric.COSINE, 7)) == 16
    assert not requires_training(parse_factory(f"RR{DIMENSION},HNSW16_SQfp16", DIMENSION, Metric.COSINE, 7))
    assert not requires_training(_spec(Family.FLAT, Codec.FP16)) and requires_training(_spec(Family.IVF, Codec.FP16))
    assert fewest_training_rows(_spec(Family.IVF, Codec.SQ8)) == 16
    assert train_index(_spec(Family.FLAT, Codec.NONE), np.empty((0, DIMENSION), np.float32))


def test_the_fewest_training_rows_do_and_one_less_is_an_error() -> None:
    read = [
        parse_factory(factory, DIMENSION, Metric.COSINE, 7) for factory in ("OPQ8,PQ8x4fs", "OPQ8,SQ8", "PCA16,SQ8")
    ]
    for spec in [*(_spec(family, codec) for family, codec in VARIANTS), *read]:
        fewest = fewest_training_rows(spec)
        assert train_index(spec, _vectors(fewest) if fewest else np.empty((0, DIMENSION), np.float32))
        if fewest:
            with pytest.raises(ValueError, match=rf"training sample \({fewest - 1} rows\) .* at least {fewest} rows"):
                train_index(spec, _vectors(fewest)[1:])


def test_similarities_are_inner_products_under_both_metrics() -> None:
    vectors = _vectors(50)
    expected = vectors @ vectors.T
    squared = ((vectors[:, None] - vectors[None]) ** 2).sum(axis=2)
    assert np.allclose(similarities(squared, faiss.METRIC_L2), expected, atol=1e-6)
    assert np.array_equal(similarities(expected, faiss.METRIC_INNER_PRODUCT), expected)


@pytest.mark.parametrize("family", FAISS_FAMILIES)
@pytest.mark.parametrize("codec", FAISS_CODECS)
def test_inner_product_is_indexed_as_such_or_refused(family: Family, codec: Codec) -> None:
    if codec not in codecs_of(family, Metric.INNER_PRODUCT):
        with pytest.raises(ValueError, match=r"(metric|codec) \(\w+\) cannot be searched with family hnsw.* sq8, "):
            _spec(family, codec, Metric.INNER_PRODUCT)
        return
    trained = train_index(_spec(family, codec, Metric.INNER_PRODUCT), _vectors(ROWS))
    index = faiss.deserialize_index(np.frombuffer(trained, dtype=np.uint8))
    assert index.metric_type == core_index(index).metric_type == faiss.METRIC_INNER_PRODUCT


def test_fixed_batches_keep_all_rows_in_order() -> None:
    batches = FixedBatches(10, 1, np.float32)
    rows = np.arange(57, dtype=np.float32)[:, None]
    full = [batch.copy() for part in np.split(rows, [3, 3, 30, 31]) for batch in batches.push(part)]
    assert [len(batch) for batch in full] == [10] * 5
    assert np.array_equal(np.concatenate([*full, batches.rest()]), rows)
    assert len(batches.rest()) == 0


@pytest.mark.parametrize(
    ("family", "codec"), [(Family.FLAT, Codec.NONE), (Family.HNSW, Codec.SQ8), (Family.IVF, Codec.RABITQ)]
)
@pytest.mark.parametrize("kept_fraction", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_an_error_that_names_it(
    family: Family, codec: Codec, kept_fraction: float, tmp_path: Path
) -> None:
    builder = ShardBuilder(train_index(_spec(family, codec), _vectors(ROWS)))
    builder.add(_vectors(ROWS))
    path = tmp_path / "shard.faiss"
    builder.write(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept_fraction)])
    for mmap in (True, False):
        with pytest.raises(ValueError, match=r"shard.faiss \(\d+ bytes\) is not a complete faiss index: .*sha256"):
            open_index(path, family, mmap=mmap)


def test_a_file_of_something_else_and_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"PAR1 and more bytes than a header has")
    with pytest.raises(ValueError, match="not a complete faiss index"):
        open_index(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        open_index(tmp_path / "absent")


def test_writing_into_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    builder = ShardBuilder(train_index(_spec(Family.FLAT, Codec.NONE), _vectors(1)))
    with pytest.raises(OSError, match=r"absent/shard.faiss \(0 rows\) could not be written"):
        builder.write(tmp_path / "absent" / "shard.faiss")


def test_errors_name_value_rule_and_remedy() -> None:
    with pytest.raises(ValueError, match=r"pq_bytes \(5\) must divide the dimension \(32\); .* 1, 2, 4, 8, 16, 32"):
        factory_string(Family.FLAT, Codec.PQ, 32, pq_bytes=5)
    with pytest.raises(ValueError, match=r"pq_bytes \(12\) must divide the dimension \(100\)"):
        factory_string(Family.FLAT, Codec.PQ, 100)
    with pytest.raises(ValueError, match=r"pq_bytes \(12\) must divide half the dimension \(50\); take one of 1, 2, 5"):
        factory_string(Family.FLAT, Codec.PQFS, 100)
    with pytest.raises(ValueError, match=r"pq_bytes \(3\) must divide half the dimension \(12.5\); take codec pq"):
        factory_string(Family.FLAT, Codec.PQFS, 25)
    with pytest.raises(ValueError, match=r"opq \(true\) belongs to codecs pq, pqfs, got codec sq8"):
        factory_string(Family.FLAT, Codec.SQ8, 32, opq=True)
    with pytest.raises(ValueError, match=r"opq_dimension \(16\) is kept by OPQ, which is off"):
        factory_string(Family.FLAT, Codec.PQ, 32, opq_dimension=16)
    with pytest.raises(ValueError, match=r"opq_dimension \(64\) must lie in 1..32"):
        factory_string(Family.FLAT, Codec.PQ, 32, opq=True, opq_dimension=64)
    with pytest.raises(ValueError, match=r"rotate \(true\) adds nothing before OPQ"):
        factory_string(Family.FLAT, Codec.PQ, 32, opq=True, rotate=True)
    with pytest.raises(ValueError, match=r"rabitq_bits \(10\) must lie in 1..9"):
        factory_string(Family.FLAT, Codec.RABITQ, 32, rabitq_bits=10)
    with pytest.raises(ValueError, match=r"nlist \(0\) must be at least 1"):
        factory_string(Family.IVF, Codec.NONE, 32, nlist=0)
    with pytest.raises(ValueError, match=r"give nlist or rows"):
        factory_string(Family.IVF, Codec.NONE, 32)
    with pytest.raises(ValueError, match=r"factory \(IVF64,Flat\) is not one of family hnsw .* but of ivf with none"):
        IndexSpec(Family.HNSW, Codec.NONE, Metric.COSINE, 32, "IVF64,Flat", 100, 0)
    with pytest.raises(ValueError, match=r"training_rows \(100\) is below the 256 rows that PQ4 .*9984 train it well"):
        IndexSpec(Family.FLAT, Codec.PQ, Metric.COSINE, 32, "PQ4", 100, 0)
    with pytest.raises(ValueError, match=r"seed \(-1\)"):
        IndexSpec(Family.FLAT, Codec.NONE, Metric.COSINE, 32, "Flat", 0, -1)
    with pytest.raises(ValueError, match=r"ef_construction \(0\)"):
        IndexSpec(Family.FLAT, Codec.NONE, Metric.COSINE, 32, "Flat", 0, 0, ef_construction=0)
    with pytest.raises(ValueError, match=r"training sample \(shape \(5, 8\)\) must be rows of the index's 32"):
        train_index(_spec(Family.FLAT, Codec.NONE), np.zeros((5, 8), np.float32))
    with pytest.raises(ValueError, match=r"rows \(0\) of a shard must be at least 1"):
        bytes_per_vector(_spec(Family.FLAT, Codec.PQFS), rows=0)
    with pytest.raises(ValueError, match=r"threads \(0\)"):
        ShardBuilder(train_index(_spec(Family.FLAT, Codec.NONE), _vectors(1)), threads=0)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("foo", r"\(foo\) must be a string of which faiss builds .* 32 dimensions .*, got: could not parse .* foo;"),
        ("PQ7", r"\(PQ7\) .*, got: The dimension of the vector \(d\) should be a multiple"),
        ("IVF99999999999,Flat", r"must hold no number beyond 16777216, got 99999999999"),
        ("IMI2x4,PQ8", r"must have lists found by Flat or HNSW"),
        ("IVF16,PQ16x4fs,RFlat", r"with codec none, fp16, .*, got IndexRefineFlat; leave out what re-ranks"),
        ("IDMap,Flat", r"got IndexIDMap"),
        ("IVF16,FlatDedup", r"got IndexIVFFlatDedup"),
        ("SQbf16", r"got IndexScalarQuantizer"),
        ("L2norm,Flat", r"must keep inner products, and its NormalizationTransform changes them; take RR"),
        ("PCAW16,Flat", r"its PCAMatrix changes them"),
        ("IVF0,Flat", r"must have at least 1 list"),
        ("IVF16(IVF4,Flat),Flat", r"must have lists found by Flat or HNSW"),
        ("HNSW1,Flat", r"must have at least 2 links"),
        ("PQ8x0", r"must have at least 1 bit"),
        ("RR0,Flat", r"must have transforms to at least 1 component"),
        ("PCA64,Flat", r"must have no more components of PCA than of the vectors"),
        ("OPQ7,PQ8", r"must have parts of OPQ that divide its components"),
    ],
)
def test_a_factory_string_that_cannot_be_used_is_an_error_that_says_why(factory: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"factory .*{message}"):
        parse_factory(factory, 32, Metric.COSINE, 7)


def test_a_factory_string_of_distances_is_no_index_of_inner_products() -> None:
    with pytest.raises(ValueError, match=r"metric \(inner_product\) cannot be searched with family hnsw over codec pq"):
        parse_factory("HNSW16_PQ8", 32, Metric.INNER_PRODUCT, 7)


@pytest.mark.parametrize(("family", "codec"), VARIANTS)
def test_codes_stay_in_the_file_but_for_fast_scan(family: Family, codec: Codec, tmp_path: Path) -> None:
    builder = ShardBuilder(train_index(_spec(family, codec), _vectors(ROWS)))
    builder.add(_vectors(ROWS))
    path = tmp_path / "mapped.faiss"
    builder.write(path)
    index = open_index(path, family)
    mapped = str(path) in Path("/proc/self/maps").read_text()
    assert mapped == (codec not in (Codec.PQFS, Codec.RABITQFS))
    assert index.ntotal == ROWS
