"""When deduplication clusters as the index would."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.cluster.jobs.similarity import JOIN_MEMORY_BYTES
from penstock.pipelines.config import Index
from penstock.pipelines.shared_centroids import (
    CELLS_PER_PART,
    FEWEST_ROWS_PER_SHARED_CELL,
    MOST_CELLS,
    MOST_ROWS_PER_SHARED_CELL,
    ROWS_PER_CELL,
    SAMPLE_BYTES_PER_COMPONENT,
    Clustering,
    index_clustering,
    join_clustering,
    most_parts,
    most_stay,
    most_training_rows,
    shared_clustering,
    suits_join,
)

IVF: dict[str, Any] = {"family": "ivf", "nlist": 200}
ROWS, DIMENSION = 100_000, 384
OWN = Clustering(200, 7_800)


def index(**changes: Any) -> Index:  # noqa: ANN401
    return Index.model_validate({**IVF, **changes})


def test_deduplication_trains_as_many_cells_on_as_many_rows_as_the_index_would() -> None:
    assert index_clustering(index(), ROWS) == join_clustering(index(), ROWS, 4, DIMENSION) == Clustering(200, 51_200)
    assert join_clustering(index(training_rows=40_000, codec="pq"), ROWS, 4, DIMENSION) == Clustering(200, 40_000)
    assert join_clustering(index(nlist=100, sharding="cluster", shards=4), 50_000, 1, DIMENSION) == Clustering(
        100, 25_600
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"transforms": [{"type": "centring"}]},
        {"iterations": 3},
        {"nlist": None},
        {"family": "auto", "nlist": None},
        {"family": "hnsw", "nlist": None},
        {"family": "auto", "nlist": None, "factory": "IVF200,SQ8"},
        {"training_rows": 199},
    ],
)
def test_an_index_of_another_kind_shares_no_centroids(changes: dict[str, Any]) -> None:
    given_ = {name: value for name, value in {**IVF, **changes}.items() if value is not None}
    other = Index.model_validate(given_)
    assert index_clustering(other, ROWS) is None and join_clustering(other, ROWS, 4, DIMENSION) == OWN


@pytest.mark.parametrize("nlist", [ROWS // MOST_ROWS_PER_SHARED_CELL - 1, ROWS // FEWEST_ROWS_PER_SHARED_CELL + 1])
def test_cells_that_do_not_suit_the_join_are_not_taken(nlist: int) -> None:
    assert join_clustering(index(nlist=nlist), ROWS, 4, DIMENSION) == OWN


@given(st.integers(1, 5_000_000), st.integers(1, 64), st.integers(1, 20_000))
def test_a_join_has_cells_that_rows_can_train(rows: int, parts: int, nlist: int) -> None:
    found = join_clustering(index(nlist=nlist), rows, parts, DIMENSION)
    assert 1 <= found.cells <= found.training_rows <= rows and found.cells <= MOST_CELLS
    if found.cells == nlist and nlist != rows // ROWS_PER_CELL and suits_join(nlist, rows, parts):
        assert found == index_clustering(index(nlist=nlist), rows)
    assert Clustering.from_json(found.to_json()) == found


def test_centroids_are_shared_where_nine_rows_of_ten_stay() -> None:
    assert most_stay(1_000, 900) and not most_stay(1_000, 899)


def test_k_means_is_trained_on_what_the_memory_of_a_join_takes() -> None:
    sample = most_training_rows(4_096)
    assert sample * 4_096 * SAMPLE_BYTES_PER_COMPONENT <= JOIN_MEMORY_BYTES < 39 * MOST_CELLS * 4_096 * 10
    assert join_clustering(index(), 50_000_000, 8, 4_096) == Clustering(MOST_CELLS, sample)
    assert join_clustering(index(), 50_000_000, 8, 384) == Clustering(MOST_CELLS, 39 * MOST_CELLS)
    assert join_clustering(index(), ROWS, 4, 4_096) == OWN  # whose 51,200 rows are too many
    assert shared_clustering(index(), ROWS, 4, 4_096) is None != shared_clustering(index(), ROWS, 4, 1_024)


@given(st.integers(0, 10_000_000), st.sampled_from([None, 200, 4_000]))
def test_there_are_cells_for_all_parts(rows: int, nlist: int | None) -> None:
    parts = most_parts(rows)
    asked = index(nlist=nlist) if nlist else index(family="flat", nlist=None)
    assert parts <= join_clustering(asked, rows, parts, DIMENSION).cells and parts <= MOST_CELLS // CELLS_PER_PART
