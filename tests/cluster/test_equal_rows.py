"""Rows with equal vectors are joined as one, and decided as each by itself would be."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cluster.fragments import Receipt, read_fragment, vector_column, write_fragment
from penstock.cluster.jobs.clustering import ClusteringJob, start_centroids
from penstock.cluster.jobs.pair_ends import EndsTask, bucket_range, read_ends, write_ends
from penstock.cluster.jobs.part_rows import FIRST_SEED
from penstock.cluster.jobs.removal import RemovalJob, remove_duplicates, removed_rows
from penstock.cluster.jobs.similarity import (
    PAIR_SCHEMA,
    JoinJob,
    PartRecord,
    find_pairs,
    measured_recall,
    stored_pairs,
)
from penstock.cluster.layout import EMBEDDINGS, PASSAGES, fragment_path
from penstock.cluster.local_store import LocalStore
from penstock.operators.clustering import ClusteringSpec
from penstock.operators.equal_rows import first_equal, vector_digests
from penstock.operators.independent_set import Keep, random_keys, ranks
from penstock.operators.similar_pairs import Join, Pairs, pair_similarities, unit_rows

from ..operators.whole_set import independent_set, neighbours_of
from .in_process import InProcess

DIMENSION, CELLS, FLOOR, SEED = 12, 7, 0.85, 4
FRAGMENTS = tuple(f"{number:032x}" for number in range(3))


def _line(steps: int, angle: float, axis: int) -> np.ndarray:
    """Unit rows in one plane, each at an angle to the one before: a chain, or a star if every other angle is large."""
    turned = angle * np.arange(steps)
    rows = np.zeros((steps, DIMENSION))
    rows[:, axis], rows[:, axis + 1] = np.cos(turned), np.sin(turned)
    return rows


def _corpus() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors float16 (n, d), hashes, tokens: chains with equal rows in them, cliques of equal and of nearly equal
    rows, a star, ties in tokens, single rows."""
    random = np.random.default_rng(2)
    chain, other = _line(9, 0.35, 0), _line(7, 0.45, 2)
    star = np.concatenate([unit_rows(_line(1, 0, 4) + 0.45 * axis) for axis in np.eye(DIMENSION)[6:12]])
    near = _line(1, 0, 8) + 0.02 * random.standard_normal((15, DIMENSION))
    single = random.standard_normal((60, DIMENSION))
    parts = [chain, chain[2:6], chain[3:4], other, other[1::2], star, _line(1, 0, 4), star[:2], near, near[:6], single]
    parts += [np.repeat(_line(1, 0, 10), 25, axis=0), np.repeat(single[:3], 4, axis=0)]
    vectors = unit_rows(np.concatenate(parts)).astype(np.float16)
    mixed = random.permutation(len(vectors))
    hashes = random.integers(0, 2**64, len(vectors), dtype=np.uint64)
    return vectors[mixed], hashes, random.integers(1, 4, len(vectors)).astype(np.int32)


VECTORS, HASHES, TOKENS = _corpus()
ROWS = len(VECTORS)


def _brute_pairs(similarity: float) -> Pairs:
    unit = unit_rows(VECTORS)
    left, right = np.triu_indices(ROWS, 1)
    pairs = Pairs(left, right, pair_similarities(unit, left, right))
    return pairs.where(pairs.similarity >= np.float32(similarity))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("equal")
    store = LocalStore(root)
    for fragment, part in zip(FRAGMENTS, np.array_split(np.arange(ROWS), len(FRAGMENTS)), strict=True):
        part = part[np.argsort(HASHES[part])]
        receipt = Receipt(fragment, len(part), len(part))
        embeddings = pa.table({"row_hash": HASHES[part], "embedding": vector_column(VECTORS[part])})
        write_fragment(store, fragment_path(EMBEDDINGS, "e", fragment), embeddings, receipt)
        passages = {
            "row_hash": HASHES[part],
            "tokens": TOKENS[part],
            "source": [f"{row % 3}.txt" for row in part],
            "position": part // 2,
            "ordinal": part % 2,
        }
        write_fragment(store, fragment_path(PASSAGES, "p", fragment), pa.table(passages), receipt)
    spec = ClusteringSpec(CELLS, DIMENSION, True, ROWS, 3)
    start_centroids(ClusteringJob(str(root), "c", "e", FRAGMENTS, ROWS, spec))
    return root


def _join(root: Path, parts: int, join: Join = Join.EXACT) -> tuple[JoinJob, list[PartRecord]]:
    cells = tuple(cell % parts for cell in range(CELLS))
    job = JoinJob(str(root), f"{join}{parts}", "e", "c", FRAGMENTS, cells, join, FLOOR)
    return job, find_pairs(InProcess(), job)


def _rank(keep: Keep, pairs: Pairs) -> np.ndarray:
    row = np.arange(ROWS)
    match keep:
        case Keep.LONGEST:
            return ranks(TOKENS, HASHES, descending=True)
        case Keep.COLUMN:
            return ranks(TOKENS, HASHES)
        case Keep.DENSEST:
            degrees = np.bincount(np.concatenate([pairs.left, pairs.right]), minlength=ROWS)
            return ranks(degrees, HASHES, descending=True)
        case Keep.RANDOM:
            return ranks(random_keys(HASHES, SEED), HASHES)
        case Keep.FIRST:
            return ranks((row % 3) * ROWS + row, HASHES)


@pytest.mark.parametrize("keep", list(Keep))
@pytest.mark.parametrize("similarity", [0.85, 0.92, 0.999, 1.0])
def test_removal_is_that_of_all_pairs(root: Path, keep: Keep, similarity: float) -> None:
    pairs = _brute_pairs(similarity)
    rank = _rank(keep, pairs)
    stays = independent_set(neighbours_of(pairs.left, pairs.right, pairs.similarity, rank), rank)
    near = {
        (int(HASHES[a]), int(HASHES[b])): similar
        for one, other in ((pairs.left, pairs.right), (pairs.right, pairs.left))
        for a, b, similar in zip(one, other, pairs.similarity, strict=True)
    }
    results = []
    for parts, buckets in ((1, 1), (3, 4)):
        _, records = _join(root, parts)
        files = tuple(path for record in records for path in record.files)
        equal = tuple(path for record in records for path in record.equal_files)
        name = f"{keep}-{similarity}-{parts}"
        job = RemovalJob(str(root), name, files, similarity, keep, buckets, "p", FRAGMENTS, "tokens", seed=SEED)
        job = replace(job, equal_files=equal)
        assert remove_duplicates(InProcess(), job) == np.count_nonzero(~stays)
        tables = [table.to_pylist() for table in removed_rows(LocalStore(root), job)]
        assert all([row["removed"] for row in rows] == sorted(row["removed"] for row in rows) for rows in tables)
        results.append(sorted(tuple(row.values()) for rows in tables for row in rows))
    assert results[0] == results[1]
    assert {removed for removed, _, _ in results[0]} == set(HASHES[~stays].tolist())
    assert {kept for _, kept, _ in results[0]} <= set(HASHES[stays].tolist())
    assert all(near[removed, kept] == similar for removed, kept, similar in results[0])


def _first(hashes: set[int]) -> int:
    ordered = np.array(sorted(hashes), np.uint64)
    return int(ordered[np.argmin(random_keys(ordered, FIRST_SEED))])


@pytest.mark.parametrize("join", list(Join))
def test_equal_rows_are_links_and_not_pairs(root: Path, join: Join) -> None:
    first = first_equal(vector_digests(unit_rows(VECTORS)))
    others = np.flatnonzero(first != np.arange(ROWS))
    groups = {int(row): set(HASHES[first == row].tolist()) for row in np.unique(first)}
    job, records = _join(root, 3, join)
    store = LocalStore(root)
    links = [row for record in records for path in record.equal_files for row in read_fragment(store, path).to_pylist()]
    assert sum(record.equal for record in records) == len(links) == len(others) > 40
    for link in links:
        (group,) = [hashes for hashes in groups.values() if link["left"] in hashes]
        assert link["left"] == _first(group) and link["right"] in group and link["similarity"] == 1
    linked = {link["right"] for link in links}
    files = [path for record in records for path in record.files]
    ends = [row for table in stored_pairs(store, files, FLOOR) for row in table.to_pylist()]
    assert not linked & {row[side] for row in ends for side in ("left", "right")}
    measured = measured_recall(InProcess(), job, records, 1.0, 1)
    assert measured.pairs == 2 * len(_brute_pairs(FLOOR))
    assert measured.recall == 1 if join is Join.EXACT else 0.5 < measured.recall <= 1


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 2)), min_size=2, max_size=40),
    st.sampled_from([Keep.RANDOM, Keep.DENSEST]),
    st.integers(1, 3),
    st.sampled_from([0.85, 0.9, 0.95]),
)
def test_any_rows_are_decided_as_without_links(
    values: list[tuple[int, int, int]], keep: Keep, buckets: int, similarity: float
) -> None:
    vectors = unit_rows(np.array(values, np.float32))
    hashes = np.sort(np.random.default_rng(len(values)).integers(0, 2**64, len(values), dtype=np.uint64))
    left, right = np.triu_indices(len(vectors), 1)
    pairs = Pairs(left, right, pair_similarities(vectors, left, right))
    pairs, first = pairs.where(pairs.similarity >= np.float32(FLOOR)), first_equal(vector_digests(vectors))
    near = pairs.where(pairs.similarity >= np.float32(similarity))
    degrees = np.bincount(np.concatenate([near.left, near.right]), minlength=len(vectors))
    rank = ranks(degrees, hashes, True) if keep is Keep.DENSEST else ranks(random_keys(hashes, SEED), hashes)
    stays = independent_set(neighbours_of(near.left, near.right, near.similarity, rank), rank)
    alone = first == np.arange(len(first))
    stored, others = pairs.where(alone[pairs.left] & alone[pairs.right]), np.flatnonzero(~alone)
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(Path(folder))
        links = (hashes[first[others]], hashes[others], np.ones(len(others), np.float32))
        for name, columns in (
            ("pairs", (hashes[stored.left], hashes[stored.right], stored.similarity)),
            ("equal", links),
        ):
            write_fragment(store, f"p/{name}.parquet", pa.table(list(columns), schema=PAIR_SCHEMA))
        job = RemovalJob(folder, "r", ("p/pairs.parquet",), similarity, keep, buckets, seed=SEED)
        job = replace(job, equal_files=("p/equal.parquet",))
        remove_duplicates(InProcess(), job)
        gone = {row for table in removed_rows(store, job) for row in table.column("removed").to_pylist()}
    assert gone == set(hashes[~stays].tolist())


def test_a_clique_of_equal_rows_takes_a_link_each(root: Path) -> None:
    _, records = _join(root, 1)
    assert sum(record.pairs for record in records) < len(_brute_pairs(FLOOR)) - 25 * 24 // 2


def test_ends_of_a_bucket_are_its_own(tmp_path: Path) -> None:
    store, random = LocalStore(tmp_path), np.random.default_rng(5)
    left, right = random.integers(0, 2**64, (2, 500), dtype=np.uint64)
    similarity = random.uniform(0.8, 1, 500).astype(np.float32)
    write_fragment(store, "a/pairs.parquet", pa.table([left, right, similarity], schema=PAIR_SCHEMA))
    assert write_ends(EndsTask(str(tmp_path), "a/pairs.parquet", 3)) == 1_000
    assert write_ends(EndsTask(str(tmp_path), "a/pairs.parquet", 3)) == 0  # it is there
    found = []
    for bucket in range(3):
        ends = read_ends(store, ["a/pairs.parquet"], 3, bucket, 0.9)
        first, last = bucket_range(bucket, 3)
        assert all(first <= row <= last for row in ends.column("row").to_pylist())
        found += [(end["row"], end["neighbour"], end["similarity"]) for end in ends.to_pylist()]
    near = similarity >= np.float32(0.9)
    ends = [(left, right), (right, left)]
    columns = [(one[near].tolist(), other[near].tolist(), similarity[near].tolist()) for one, other in ends]
    assert sorted(found) == sorted(row for column in columns for row in zip(*column, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 1)), max_size=30))
def test_first_of_equal_rows(values: list[tuple[int, int]]) -> None:
    vectors = np.array(values, np.float32).reshape(-1, 2)
    expected = [min(j for j in range(len(values)) if values[j] == row) for row in values]
    assert first_equal(vector_digests(vectors)).tolist() == expected
