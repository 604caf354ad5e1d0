"""The independent set: what deciding row by row gives, for any pairs and any order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.operators import independent_set as module
from penstock.operators.independent_set import (
    GOES,
    STAYS,
    UNDECIDED,
    component_labels,
    random_keys,
    ranks,
    representatives,
    settle,
)

from .whole_set import independent_set, neighbours_of

Links = list[tuple[int, int]]


def arrays(links: Links) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    both = np.array(sorted({(min(a, b), max(a, b)) for a, b in links if a != b}), np.int64).reshape(-1, 2)
    similarity = 0.9 + (both.sum(axis=1) % 10).astype(np.float32) / 100
    return both[:, 0], both[:, 1], similarity.astype(np.float32)


def one_by_one(links: Links, rank: np.ndarray, standing: set[int] | None = None) -> np.ndarray:
    near: dict[int, set[int]] = {}
    for a, b in links:
        near.setdefault(a, set()).add(b)
        near.setdefault(b, set()).add(a)
    stays = np.zeros(len(rank), bool)
    stays[list(standing or ())] = True
    for row in np.argsort(rank):
        stays[row] |= not any(stays[other] for other in near.get(int(row), set()) if other != row)
    return stays


def check(links: Links, rank: np.ndarray) -> np.ndarray:
    left, right, similarity = arrays(links)
    neighbours = neighbours_of(left, right, similarity, rank)
    stays = independent_set(neighbours, rank)
    assert np.array_equal(stays, one_by_one(links, rank))
    assert not (stays[left] & stays[right]).any()
    gone, kept, near = representatives(neighbours, np.where(stays, STAYS, GOES))
    assert np.array_equal(gone, np.flatnonzero(~stays)) and stays[kept].all() and (near >= 0.9).all()
    return stays


graphs = st.integers(1, 25).flatmap(
    lambda rows: st.tuples(
        st.lists(st.tuples(st.integers(0, rows - 1), st.integers(0, rows - 1)), max_size=60).map(
            lambda links: [(a, b) for a, b in links if a != b]
        ),
        st.permutations(range(rows)),
    )
)


@given(graphs)
def test_rounds_decide_as_row_by_row(graph: tuple[Links, list[int]]) -> None:
    check(graph[0], np.array(graph[1]))


@given(graphs, st.integers(0, 1000))
def test_rows_dealt_out_to_processes_end_the_same(graph: tuple[Links, list[int]], seed: int) -> None:
    links, rank = graph[0], np.array(graph[1])
    neighbours = neighbours_of(*arrays(links), rank)
    owner = np.random.default_rng(seed).integers(0, 3, len(rank))
    states = np.zeros(len(rank), np.uint8)
    for _ in range(len(rank)):
        told = [states.copy() for _ in range(3)]
        for process in range(3):
            settle(neighbours, rank, told[process], owner == process)
            assert np.array_equal(told[process][owner != process], states[owner != process])
        states = np.choose(owner, told)
    assert np.array_equal(states == STAYS, one_by_one(links, rank)) and (states != UNDECIDED).all()


def test_chains_stars_and_cliques() -> None:
    chain = [(row, row + 1) for row in range(8)]
    assert check(chain, np.arange(9)).tolist() == [True, False] * 4 + [True]
    star = [(0, row) for row in range(1, 9)]
    assert check(star, np.arange(9)).sum() == 1
    assert check(star, np.arange(9)[::-1]).sum() == 8
    clique = [(a, b) for a in range(9) for b in range(a)]
    assert np.flatnonzero(check(clique, np.roll(np.arange(9), 4))).tolist() == [4]


def test_a_chain_longer_than_the_rounds_is_decided_row_by_row() -> None:
    rows = 10 * module.MOST_ROUNDS
    stays = check([(row, row + 1) for row in range(rows)], np.arange(rows + 1))
    assert stays[::2].all() and not stays[1::2].any()


@pytest.mark.parametrize("more", range(-3, 4))
def test_a_chain_may_end_with_the_last_round(more: int) -> None:
    rows = module.MOST_ROUNDS + more
    chain = [(row, row + 1) for row in range(rows - 1)]
    assert np.array_equal(check(chain, np.arange(rows)), np.arange(rows) % 2 == 0)


def test_the_order_of_pairs_and_rows_does_not_matter() -> None:
    random = np.random.default_rng(3)
    links = [(int(a), int(b)) for a, b in random.integers(0, 200, (400, 2)) if a != b]
    hashes = random.integers(0, 2**63, 200, dtype=np.uint64)
    keys = random.integers(0, 5, 200)
    left, right, similarity = arrays(links)
    stays = hashes[independent_set(neighbours_of(left, right, similarity, ranks(keys, hashes)), ranks(keys, hashes))]
    mixed, pairs = random.permutation(200), random.permutation(len(left))
    place = np.argsort(mixed)
    rank = ranks(keys[mixed], hashes[mixed])
    turned = neighbours_of(place[right[pairs]], place[left[pairs]], similarity[pairs], rank)
    assert set(hashes[mixed][independent_set(turned, rank)].tolist()) == set(stays.tolist())


def test_ranks_order_by_key_then_hash_and_nulls_last() -> None:
    import pyarrow as pa

    hashes = np.array([9, 8, 7, 6], np.uint64)
    assert ranks(np.array([2, 1, 1, 5]), hashes).tolist() == [2, 1, 0, 3]
    assert ranks(np.array([2, 1, 1, 5]), hashes, descending=True).tolist() == [1, 3, 2, 0]
    assert ranks(pa.array(["b", None, "a", "b"]), hashes).tolist() == [2, 3, 0, 1]
    with pytest.raises(ValueError, match=r"hashes \(2 rows\) must be unique to order rows, got 1"):
        ranks(np.array([1, 2]), np.array([5, 5], np.uint64))


def test_random_keys_depend_on_hash_and_seed_and_spread() -> None:
    hashes = np.arange(10_000, dtype=np.uint64)
    keys = random_keys(hashes, 1)
    assert np.array_equal(keys[5:9], random_keys(hashes[5:9], 1)) and not np.array_equal(keys, random_keys(hashes, 2))
    assert len(np.unique(keys)) == 10_000 and abs((keys < 2**63).mean() - 0.5) < 0.02


def test_the_most_similar_earlier_row_represents() -> None:
    rank = np.arange(4)
    neighbours = neighbours_of(np.array([0, 1, 2]), np.array([3, 3, 3]), np.array([0.9, 0.95, 0.95], np.float32), rank)
    states = np.array([STAYS, STAYS, STAYS, GOES], np.uint8)
    assert [item.tolist() for item in representatives(neighbours, states)[:2]] == [[3], [1]]


@given(graphs)
def test_components_are_named_by_their_lowest_row(graph: tuple[Links, list[int]]) -> None:
    links, rows = graph[0], len(graph[1])
    left, right, _ = arrays(links)
    labels = component_labels(left, right, rows)
    expected = list(range(rows))
    for _ in range(rows):
        for a, b in links:
            expected[a] = expected[b] = min(expected[a], expected[b])
    assert labels.tolist() == expected


@given(graphs, st.integers(0, 25))
def test_rows_that_stand_come_first_and_stay(graph: tuple[Links, list[int]], old: int) -> None:
    links, order = graph[0], np.array(graph[1])
    old = min(old, len(order))
    stood = one_by_one([pair for pair in links if max(pair) < old], order[:old])
    standing = set(np.flatnonzero(stood).tolist())
    relevant = [(a, b) for a, b in links if all(end >= old or end in standing for end in (a, b))]
    rank = np.where([row in standing for row in range(len(order))], order, order + len(order))
    stays = check(relevant, rank)
    assert stays[sorted(standing)].all()
    assert np.array_equal(stays[old:], one_by_one(relevant, rank, standing)[old:])
