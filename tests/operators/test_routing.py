import re
from functools import cache

import faiss
import numpy as np
import pytest

from penstock.operators.indexing import Codec, Family, IndexSpec, Metric, factory_string, train_index
from penstock.operators.routing import (
    CellOwners,
    Probes,
    Router,
    Routing,
    index_cells,
    index_centroids,
    only_cells,
    plant_centroids,
    search_cells,
    transformed,
)
from penstock.operators.searching import SearchParameters, normalize

DIMENSION, ROWS, CELLS, SHARDS, K = 32, 2_000, 24, 5, 10
FACTORIES = ["IVF24,Flat", "IVF24,SQ8", "IVF24,PQ8", "RR32,IVF24,RaBitQ4", "RR32,IVF24,RaBitQ", "PCA16,IVF24,SQfp16"]
FACTORIES += ["IVF24,PQ16x4fs", "RR32,IVF24,RaBitQfs"]


def _vectors(rows: int, seed: int = 0) -> np.ndarray:
    """Clustered unit rows float32 (n, d)."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((40, DIMENSION))
    return normalize(centres[random.integers(0, 40, rows)] + 0.6 * random.standard_normal((rows, DIMENSION)))


def _untrained(factory: str) -> faiss.Index:
    index = faiss.index_factory(DIMENSION, factory, faiss.METRIC_INNER_PRODUCT)
    core = faiss.downcast_index(faiss.extract_index_ivf(index))
    core.cp.min_points_per_centroid = 1
    if hasattr(core, "do_polysemous_training"):
        core.do_polysemous_training = False  # takes seconds, for codes ordered as no search here uses
    return index


@cache
def _trained(factory: str) -> np.ndarray:
    """A trained empty index, serialized."""
    index = _untrained(factory)
    index.train(_vectors(ROWS, seed=1))
    return faiss.serialize_index(index)


def route(index: faiss.Index, queries: np.ndarray, nprobe: int, owners: CellOwners, coverage: float = 1.0) -> Routing:
    return Router(index, owners).route(queries, SearchParameters(nprobe=nprobe, coverage=coverage))


def _owning(trained: np.ndarray, cells: np.ndarray) -> faiss.Index:
    return faiss.deserialize_index(np.frombuffer(only_cells(trained.tobytes(), cells), np.uint8))


@pytest.mark.parametrize("nprobe", [1, 4, CELLS])
@pytest.mark.parametrize("factory", FACTORIES)
def test_routed_shards_give_the_hits_of_one_index(factory: str, nprobe: int) -> None:
    trained = _trained(factory)
    vectors, queries = _vectors(ROWS), _vectors(50, seed=2)
    whole = faiss.deserialize_index(trained)
    cells = index_cells(whole, vectors)
    whole.add(vectors)
    faiss.extract_index_ivf(whole).nprobe = nprobe
    expected_near, expected_rows = whole.search(queries, K)

    shard_of_cell = np.random.default_rng(6).integers(0, SHARDS, CELLS).astype(np.int32)
    shard_of_cell[0] = SHARDS - 1
    owners = CellOwners(shard_of_cell, SHARDS)
    routing = route(faiss.deserialize_index(trained), queries, nprobe, owners)
    near, rows = np.full((len(queries), 0), 0, np.float32), np.full((len(queries), 0), 0, np.int64)
    for shard in range(SHARDS):
        inside = np.flatnonzero(shard_of_cell[cells] == shard)
        index = _owning(trained, owners.cells_of(shard))
        index.add(vectors[inside])
        asked = np.flatnonzero(routing.shards[:, shard])
        found_near, found = search_cells(index, routing.probes(shard, asked), K)
        part_near, part = np.full((len(queries), K), -np.inf, np.float32), np.full((len(queries), K), -1)
        part_near[asked] = np.where(found >= 0, found_near, -np.inf)
        part[asked] = np.where(found >= 0, inside[found], -1)
        near, rows = np.hstack([near, part_near]), np.hstack([rows, part])
    best = np.argsort(-near, axis=1, kind="stable")[:, :K]
    near, rows = np.take_along_axis(near, best, 1), np.take_along_axis(rows, best, 1)
    filled = expected_rows >= 0
    assert np.array_equal(rows >= 0, filled)
    if transformed(whole, queries) is not queries:  # a product of matrices is rounded otherwise for fewer rows at once
        rounded_together = factory.endswith("RaBitQfs") and nprobe > 1  # the tables of the cells searched together
        np.testing.assert_allclose(near[filled], expected_near[filled], atol=1e-2 if rounded_together else 1e-4)
        same = [len(set(a) & set(b)) / K for a, b in zip(rows, expected_rows, strict=True)]
        assert np.mean(same) > (0.9 if rounded_together else 0.99)
    else:
        assert np.array_equal(near[filled], expected_near[filled])
        assert np.array_equal(rows[filled], expected_rows[filled])
    assert 1 <= routing.mean_shards() <= min(nprobe, SHARDS)


@pytest.mark.parametrize("factory", FACTORIES)
def test_rows_go_to_their_own_cell_among_those_of_their_shard(factory: str) -> None:
    trained, vectors = _trained(factory), _vectors(500)
    owned = np.arange(0, CELLS, 3)
    cells = index_cells(faiss.deserialize_index(trained), vectors)
    inside = np.isin(cells, owned)
    index = _owning(trained, owned)
    assert np.array_equal(owned[index_cells(index, vectors[inside])], cells[inside])
    whole = faiss.deserialize_index(trained)
    assert np.array_equal(index_centroids(index), index_centroids(whole)[owned])
    index.add(vectors[inside])
    again = faiss.deserialize_index(faiss.serialize_index(index))
    assert again.ntotal == inside.sum() and faiss.extract_index_ivf(again).nlist == len(owned)


def test_cells_are_numbered_within_their_shard() -> None:
    owners = CellOwners(np.array([1, 0, 1, 1, 0], np.int32), 3)
    assert owners.numbers.tolist() == [0, 0, 1, 2, 1]
    assert [owners.cells_of(shard).tolist() for shard in range(3)] == [[1, 4], [0, 2, 3], []]


@pytest.mark.parametrize("factory", FACTORIES)
def test_less_coverage_searches_the_cells_of_the_heaviest_shards(factory: str) -> None:
    index, vectors, queries = faiss.deserialize_index(_trained(factory)), _vectors(ROWS), _vectors(50, seed=2)
    shard_of_cell = (np.arange(CELLS) % SHARDS).astype(np.int32)
    owners = CellOwners(shard_of_cell, SHARDS)
    cells = index_cells(index, vectors)
    index.add(vectors)
    whole, fewer, one = (route(index, queries, 12, owners, coverage) for coverage in (1.0, 0.7, 1e-9))
    assert (fewer.shards <= whole.shards).all() and 1 == one.mean_shards() < fewer.mean_shards() < whole.mean_shards()
    for query in range(len(queries)):
        weights = np.zeros(SHARDS)
        for rank, cell in enumerate(whole.cells[query], start=1):
            weights[shard_of_cell[cell]] += 1 / rank
        chosen = np.flatnonzero(fewer.shards[query])
        left = np.flatnonzero(~fewer.shards[query])
        assert weights[chosen].min() >= weights[left].max()
        assert weights[chosen].sum() >= 0.7 * weights.sum() > weights[chosen].sum() - weights[chosen].min()
        kept = fewer.cells[query][fewer.cells[query] >= 0]
        assert set(kept) == {cell for cell in whole.cells[query] if fewer.shards[query, shard_of_cell[cell]]}
    _, rows = search_cells(index, Probes(fewer.vectors, fewer.cells, fewer.distances), K)
    allowed = np.take_along_axis(fewer.shards, shard_of_cell[cells[rows]], axis=1)
    assert allowed[rows >= 0].all()


def test_shards_are_those_of_the_nearest_cells() -> None:
    index, queries = faiss.deserialize_index(_trained("IVF24,Flat")), _vectors(30, seed=3)
    shard_of_cell = (np.arange(CELLS) % SHARDS).astype(np.int32)
    owners = CellOwners(shard_of_cell, SHARDS)
    routing = route(index, queries, 3, owners)
    order = np.argsort(-(queries @ index_centroids(index).T), axis=1)[:, :3]
    assert np.array_equal(routing.cells, order)
    for shards, cells in zip(routing.shards, order, strict=True):
        assert set(np.flatnonzero(shards)) == set(shard_of_cell[cells])
    assert routing.mean_shards() == routing.shards.sum() / 30
    assert route(index, queries, 10 * CELLS, owners).shards.all()


@pytest.mark.parametrize("factory", ["IVF24,Flat", "RR32,IVF24,RaBitQ4", "PCA16,IVF24,SQ8"])
def test_planted_centroids_stay(factory: str) -> None:
    sample, centroids = _vectors(ROWS, seed=1), _vectors(CELLS, seed=4)
    index = _untrained(factory)
    plant_centroids(index, centroids, sample)
    index.train(sample)
    assert index.is_trained
    np.testing.assert_allclose(index_centroids(index), transformed(index, centroids), atol=1e-6)
    index.add(sample)
    assert index.ntotal == ROWS


def test_owners_of_another_number_of_cells_are_refused() -> None:
    index = faiss.deserialize_index(_trained("IVF24,Flat"))
    with pytest.raises(ValueError, match=re.escape("owners of cells (shape (3,)) must name a shard for each of 24")):
        Router(index, CellOwners(np.zeros(3, np.int32), 1))


def test_centroids_of_another_shape_are_refused() -> None:
    index = _untrained("IVF24,Flat")
    with pytest.raises(ValueError, match=re.escape("centroids (shape (3, 32)) must be 24 of 32 components")):
        plant_centroids(index, _vectors(3), _vectors(100))


def test_an_index_without_cells_is_refused() -> None:
    factory = factory_string(Family.FLAT, Codec.NONE, DIMENSION)
    spec = IndexSpec(Family.FLAT, Codec.NONE, Metric.COSINE, DIMENSION, factory, 10, 0)
    index = faiss.deserialize_index(np.frombuffer(train_index(spec, _vectors(10)), np.uint8))
    with pytest.raises(
        ValueError, match=re.escape("index (IndexFlatIP) has no cells; cluster sharding needs family ivf")
    ):
        index_cells(index, _vectors(2))
