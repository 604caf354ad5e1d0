"""Joins and removal over fragments, parts and buckets: what one process finds and decides over all rows."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components

from penstock.cluster import fragments
from penstock.cluster.fragments import (
    Receipt,
    open_fragment,
    read_fragment,
    read_receipt,
    vector_column,
    vectors_of,
    write_fragment,
)
from penstock.cluster.jobs import similarity
from penstock.cluster.jobs.clustering import ClusteringJob, start_centroids
from penstock.cluster.jobs.groups import group_rows, read_groups
from penstock.cluster.jobs.pair_ends import EndsTask, write_ends
from penstock.cluster.jobs.part_rows import DIGESTS, Part, row_blocks
from penstock.cluster.jobs.removal import (
    BucketTask,
    RemovalJob,
    buckets_for,
    decide,
    order_neighbours,
    remove_duplicates,
    removed_rows,
    represent,
    send_keys,
)
from penstock.cluster.jobs.similarity import (
    JOIN_BYTES_PER_COMPONENT,
    JoinJob,
    PartTask,
    ReplicaTask,
    SampleTask,
    affordable,
    cut_into_parts,
    find_pairs,
    join_part,
    measured_recall,
    parts_for,
    read_records,
    replicate,
    sampled_rows,
    stored_pairs,
)
from penstock.cluster.jobs.standing import STANDING_SCHEMA, write_decisions
from penstock.cluster.layout import EMBEDDINGS, PASSAGES, fragment_path
from penstock.cluster.local_store import LocalStore
from penstock.cluster.session import Session
from penstock.operators.clustering import ClusteringSpec
from penstock.operators.duplicate_measures import PairRecall
from penstock.operators.equal_rows import vector_digests
from penstock.operators.independent_set import Keep, random_keys, ranks
from penstock.operators.similar_pairs import Join, Pairs, similar_pairs, unit_rows

from ..operators.whole_set import independent_set, neighbours_of
from .in_process import InProcess, R, T

DIMENSION, CELLS, FLOOR = 16, 9, 0.85
FRAGMENT_ROWS = (500, 0, 350, 1)
FRAGMENTS = tuple(f"{number:032x}" for number in range(len(FRAGMENT_ROWS)))
ROWS = sum(FRAGMENT_ROWS)


def _corpus() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors float16 (n, d), unique hashes and tokens of all rows, fragment after fragment."""
    random = np.random.default_rng(1)
    centres = random.standard_normal((70, DIMENSION))
    spread = random.uniform(0.02, 0.5, (ROWS, 1))
    vectors = centres[random.integers(0, 70, ROWS)] + spread * random.standard_normal((ROWS, DIMENSION))
    hashes = random.integers(0, 2**64, ROWS, dtype=np.uint64)
    return unit_rows(vectors).astype(np.float16), hashes, random.integers(5, 12, ROWS).astype(np.int32)


def _write(root: Path) -> LocalStore:
    store = LocalStore(root)
    vectors, hashes, tokens = _corpus()
    start = 0
    for fragment, rows in zip(FRAGMENTS, FRAGMENT_ROWS, strict=True):
        part = start + np.argsort(hashes[start : start + rows])
        table = pa.table({"row_hash": pa.array(hashes[part]), "embedding": vector_column(vectors[part])})
        write_fragment(store, fragment_path(EMBEDDINGS, "e", fragment), table, Receipt(fragment, rows, rows))
        passages = {
            "row_hash": pa.array(hashes[part]),
            "tokens": pa.array(tokens[part]),
            "source": pa.array([f"{row % 3}.txt" for row in part], pa.string()),
            "position": pa.array(part // 2),
            "ordinal": pa.array(part % 2),
        }
        write_fragment(store, fragment_path(PASSAGES, "p", fragment), pa.table(passages), Receipt(fragment, rows, rows))
        start += rows
    spec = ClusteringSpec(CELLS, DIMENSION, True, ROWS, 3)
    start_centroids(ClusteringJob(str(root), "c", "e", FRAGMENTS, ROWS, spec))
    return store


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("similarity")
    _write(root)
    return root


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session() as made:
        yield made


def _job(root: Path, name: str, parts: int = 3, join: Join = Join.EXACT, standing: str | None = None) -> JoinJob:
    cells = tuple(cell % parts for cell in range(CELLS))
    return JoinJob(str(root), name, "e", "c", FRAGMENTS, cells, join, FLOOR, standing)


def _by_hash(store: LocalStore, job: JoinJob) -> dict[tuple[int, int], float]:
    files = [path for record in read_records(store, job) for path in record.files]
    tables = list(stored_pairs(store, files, job.floor))
    rows = [row for table in tables for row in table.to_pylist()]
    assert all(row["left"] < row["right"] for row in rows)
    found = {(row["left"], row["right"]): row["similarity"] for row in rows}
    assert len(found) == len(rows)
    return found


def _expected() -> dict[tuple[int, int], float]:
    vectors, hashes, _ = _corpus()
    pairs = Pairs.joined(list(similar_pairs(unit_rows(vectors), FLOOR)))
    ends = zip(hashes[pairs.left].tolist(), hashes[pairs.right].tolist(), pairs.similarity.tolist(), strict=True)
    return {(min(a, b), max(a, b)): near for a, b, near in ends}


def test_exact_pairs_are_the_same_for_any_parts(root: Path) -> None:
    store, expected = LocalStore(root), _expected()
    for parts in (1, 2, 9):
        job = _job(root, f"x{parts}", parts)
        records = find_pairs(InProcess(), job)
        assert _by_hash(store, job) == expected
        assert sum(record.rows for record in records) == ROWS
        assert sum(record.pairs for record in records) == len(expected)
        assert (sum(record.copies for record in records) > 0) == (parts > 1)


def test_a_cluster_runs_the_join_and_does_nothing_twice(root: Path, session: Session) -> None:
    job, store = _job(root, "ray"), LocalStore(root)
    records = find_pairs(session, job)
    assert _by_hash(store, job) == _expected()
    written = {path: store.read(path) for record in records for path in record.files}
    for path in written:
        store.write(path, b"untouched")
    assert find_pairs(session, job) == records
    assert all(store.read(path) == b"untouched" for path in written)


def test_a_damaged_part_is_found_again_from_its_task(root: Path) -> None:
    job, store = _job(root, "again"), LocalStore(root)
    records = find_pairs(InProcess(), job)
    before = {path: store.read(path) for record in records for path in record.files}
    assert [join_part(PartTask(job, record.part)) for record in records] == records
    assert {path: store.read(path) for path in before} == before


class _Asked(InProcess):
    """Notes the GPUs that tasks take."""

    def __init__(self) -> None:
        super().__init__()
        self.gpus: dict[str, float] = {}

    def stream(
        self, function: Callable[[T], R], tasks: Iterable[T], *, cpus: float = 1, gpus: float = 0
    ) -> Iterator[R]:
        self.gpus[function.__name__] = gpus
        return super().stream(function, [], cpus=cpus, gpus=gpus)


def test_joins_take_the_gpus_of_their_job(root: Path) -> None:
    session = _Asked()
    find_pairs(session, replace(_job(root, "gpu"), gpus=0.5))
    assert session.gpus == {"replicate": 0, "join_part": 0.5}
    find_pairs(session, replace(_job(root, "gpu", join=Join.GRAPH), gpus=0.5))
    assert session.gpus == {"replicate": 0, "join_part": 0}


def test_cluster_and_graph_find_true_pairs_and_their_recall_is_measured(root: Path) -> None:
    store, expected = LocalStore(root), _expected()
    for join in (Join.CLUSTER, Join.GRAPH):
        job = _job(root, join.value, 3, join)
        records = find_pairs(InProcess(), job)
        found = _by_hash(store, job)
        assert found.items() <= expected.items()
        measured = measured_recall(InProcess(), job, records, 1.0, 1)
        assert measured.recall == len(found) / len(expected) and measured.pairs == 2 * len(expected)
        assert measured.at_least <= measured.recall
        assert sum(record.copies for record in records) == 0 or join is Join.GRAPH
    exact = _job(root, "x1", 1)
    measured = measured_recall(InProcess(), exact, find_pairs(InProcess(), exact), 0.3, 5)
    assert measured.recall == 1 and 0.9 < measured.at_least < 1


def test_a_row_of_many_twins_counts_as_one_of_a_few(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "TRUTH_PAIRS", 3)
    monkeypatch.setattr(similarity, "TRUTH_ROWS", 100)
    ends = np.array([end for pair in _expected() for end in pair])
    of_rows = np.unique(ends, return_counts=True)[1]
    for join in (Join.EXACT, Join.CLUSTER):
        job = _job(root, f"capped-{join}", 3, join)
        records = find_pairs(InProcess(), job)
        measured = measured_recall(InProcess(), job, records, 1.0, 1)
        assert (measured.rows, measured.pairs) == (len(of_rows), int(np.minimum(of_rows, 3).sum()))
        assert measured == measured_recall(InProcess(), replace(job, fragments=FRAGMENTS[::-1]), records, 1.0, 1)
        share = len(_by_hash(LocalStore(root), job)) / len(_expected())
        assert measured.recall == 1 if join is Join.EXACT else abs(measured.recall - share) < 0.2 < measured.recall < 1


def _decided(root: Path, name: str, stands: set[int], gone: set[int]) -> None:
    """Decisions that were carried over: rows that stand, and rows that are gone."""
    _, hashes, _ = _corpus()
    start = 0
    for fragment, rows in zip(FRAGMENTS, FRAGMENT_ROWS, strict=True):
        own = [row for row in sorted(hashes[start : start + rows].tolist()) if row in stands | gone]
        kept = [row if row in stands else 0 for row in own]
        columns = [pa.array(own, pa.uint64()), pa.array(kept, pa.uint64()), pa.array([1.0] * len(own), pa.float32())]
        table = pa.table(columns, schema=STANDING_SCHEMA)
        write_decisions(LocalStore(root), fragment_path("standing", name, fragment), fragment, table, rows)
        start += rows


def test_rows_that_stand_are_joined_with_open_ones_only(root: Path) -> None:
    _, hashes, _ = _corpus()
    old = set(hashes[:500].tolist()) | set(hashes[600:620].tolist())
    expected = {pair: near for pair, near in _expected().items() if not (pair[0] in old and pair[1] in old)}
    _decided(root, "old", old, set())
    for join, parts in ((Join.EXACT, 3), (Join.EXACT, 1), (Join.CLUSTER, 3)):
        job = _job(root, f"standing-{join}-{parts}", parts, join, standing="old")
        records = find_pairs(InProcess(), job)
        found = _by_hash(LocalStore(root), job)
        assert found == expected if join is Join.EXACT else found.items() < expected.items()
        assert sum(record.open for record in records) == ROWS - len(old)
        measured = measured_recall(InProcess(), job, records, 1.0, 1)
        assert measured.recall == 1 if join is Join.EXACT else 0 < measured.recall < 1
    new, (whole,) = ROWS - len(old), find_pairs(InProcess(), _job(root, "x1", 1))
    (part,) = find_pairs(InProcess(), _job(root, "standing-exact-1", 1, standing="old"))
    assert part.comparisons == new * len(old) + new * (new - 1) // 2 < whole.comparisons == ROWS * (ROWS - 1) // 2


def _small(job: JoinJob, name: str, rows: int) -> JoinJob:
    """The same join in the memory of so many rows."""
    return replace(job, fingerprint=name, memory_bytes=rows * DIMENSION * JOIN_BYTES_PER_COMPONENT)


@pytest.mark.parametrize(("parts", "standing"), [(1, "cut"), (3, None)])
def test_a_part_beyond_memory_has_the_same_pairs(root: Path, parts: int, standing: str | None) -> None:
    _, hashes, _ = _corpus()
    _decided(root, "cut", set(hashes[:500].tolist()), set(hashes[700:720].tolist()))
    store = LocalStore(root)
    for join in Join:
        job = _job(root, f"whole-{join}-{parts}-{standing}", parts, join, standing)
        whole = find_pairs(InProcess(), job)
        cut = _small(job, f"{job.fingerprint}-cut", 150)
        records = find_pairs(InProcess(), cut)
        if join is Join.GRAPH:
            assert _by_hash(store, job).items() <= _by_hash(store, cut).items()
        else:
            assert _by_hash(store, cut) == _by_hash(store, job)
        facts = [(one.rows, one.open, one.copies, one.comparisons, one.equal) for one in whole]
        assert facts == [(one.rows, one.open, one.copies, one.comparisons, one.equal) for one in records]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.integers(2, 50))
def test_every_two_rows_meet_within_memory(rows: int, most: int) -> None:
    met: list[tuple[int, int]] = []
    for held, later in row_blocks(np.arange(rows), most):
        met += [(int(one), int(other)) for one in held for other in held if one < other]
        for passing in later:
            assert len(held) + len(passing) <= most
            met += [(int(one), int(other)) for one in held for other in passing]
        assert len(held) <= most
    assert sorted(met) == [(one, other) for one in range(rows) for other in range(one + 1, rows)]


def test_rows_that_are_equal_take_no_memory_of_the_join(tmp_path: Path) -> None:
    store, random = LocalStore(tmp_path), np.random.default_rng(7)
    single = unit_rows(random.standard_normal((40, DIMENSION))).astype(np.float16)
    vectors = np.concatenate([np.repeat(single[:2], 3_000, axis=0), single])[random.permutation(6_040)]
    hashes = np.sort(random.integers(0, 2**64, len(vectors), dtype=np.uint64))
    for number, fragment in enumerate(FRAGMENTS[:2]):
        table = pa.table({"row_hash": hashes[number::2], "embedding": vector_column(vectors[number::2])})
        write_fragment(store, fragment_path(EMBEDDINGS, "e", fragment), table, Receipt(fragment, len(table), 0))
    job = _small(JoinJob(str(tmp_path), "p", "e", "c", FRAGMENTS[:2], (0,), Join.EXACT, FLOOR), "p", 50)
    for fragment in FRAGMENTS[:2]:
        replicate(ReplicaTask(job, fragment))
    part = Part(store, [fragment_path("replicas", "p", fragment) for fragment in FRAGMENTS[:2]], 0)
    numbers = np.flatnonzero(part.first == np.arange(len(part.first)))
    assert len(numbers) == 40 and len(list(part.blocks(numbers, 50))) == 1
    (record,) = find_pairs(InProcess(), job)
    assert record.equal == 6_000 and record.comparisons == 40 * 39 // 2
    expected = sum(map(len, similar_pairs(unit_rows(single), FLOOR)))
    assert record.pairs == expected


def test_a_fragment_named_twice_is_refused(root: Path) -> None:
    job = replace(_job(root, "twice", 1), fragments=(FRAGMENTS[0], FRAGMENTS[0]))
    replicate(ReplicaTask(job, FRAGMENTS[0]))
    with pytest.raises(ValueError, match=r"row hashes of part 0 \(1000 rows\) must be unique, got 500: no pair could"):
        join_part(PartTask(job, 0))


@pytest.mark.parametrize(("join", "parts"), [(Join.EXACT, 9), (Join.EXACT, 4), (Join.GRAPH, 9), (Join.CLUSTER, 4)])
def test_the_factor_is_that_of_the_join_that_is_done(root: Path, join: Join, parts: int) -> None:
    job, factor = cut_into_parts(InProcess(), _job(root, f"cut-{join}-{parts}", 1, join), ROWS, parts, 1)
    assert job.parts == parts
    records = find_pairs(InProcess(), job)
    stored = sum(record.rows + record.copies for record in records) / ROWS
    assert factor == pytest.approx(stored, rel=0.01) and (factor > 1) == (join is not Join.CLUSTER)


def test_a_join_of_one_part_stores_each_row_once(root: Path) -> None:
    assert cut_into_parts(InProcess(), _job(root, "one", 3), ROWS, 1, 1) == (_job(root, "one", 1), 1.0)
    assert affordable(Join.EXACT, 4.1) is Join.GRAPH and affordable(Join.EXACT, 4.0) is Join.EXACT
    assert affordable(Join.CLUSTER, 9.0) is Join.CLUSTER


def test_parts_fit_into_memory_as_far_as_there_are_cells() -> None:
    assert (
        parts_for(1_000_000, 384, 2 << 30, Join.EXACT, 512) == parts_for(1_000_000, 384, 2 << 30, Join.CLUSTER, 9) == 3
    )
    assert parts_for(1_000_000, 384, 2 << 30, Join.GRAPH, 512) == 9  # two copies of each row
    assert parts_for(100_000, 384, 1 << 30, Join.GRAPH, 512) == parts_for(0, 384, 1 << 30, Join.EXACT, 1) == 1
    assert parts_for(100_000_000, 1_024, 1 << 30, Join.EXACT, 512) == 512


def test_a_vector_without_direction_names_its_fragment(tmp_path: Path) -> None:
    store = _write(tmp_path)
    vectors = vector_column(np.zeros((2, DIMENSION), np.float16))
    table = pa.table({"row_hash": pa.array([1, 2], pa.uint64()), "embedding": vectors})
    path = fragment_path(EMBEDDINGS, "e", FRAGMENTS[3])
    write_fragment(store, path, table, Receipt(FRAGMENTS[3], 2, 2))
    with pytest.raises(ValueError, match=rf"fragment {path}: vector 0 \(length 0.0\) must be finite and not zero"):
        replicate(ReplicaTask(_job(tmp_path, "zero"), FRAGMENTS[3]))


def _removal(root: Path, name: str, keep: Keep, buckets: int, similarity: float = 0.9) -> RemovalJob:
    records = find_pairs(InProcess(), _job(root, "x3"))
    files = tuple(path for record in records for path in record.files)
    return RemovalJob(str(root), name, files, similarity, keep, buckets, "p", FRAGMENTS, "tokens", seed=4)


def _order(keep: Keep, degrees: np.ndarray) -> np.ndarray:
    _, hashes, tokens = _corpus()
    row = np.arange(ROWS)
    match keep:
        case Keep.LONGEST:
            return ranks(tokens, hashes, descending=True)
        case Keep.COLUMN:
            return ranks(tokens, hashes)
        case Keep.DENSEST:
            return ranks(degrees, hashes, descending=True)
        case Keep.RANDOM:
            return ranks(random_keys(hashes, 4), hashes)
        case Keep.FIRST:
            return ranks((row % 3) * ROWS + row, hashes)


@pytest.mark.parametrize("keep", list(Keep))
def test_removal_is_that_of_one_process_for_any_buckets(root: Path, keep: Keep) -> None:
    vectors, hashes, _ = _corpus()
    pairs = Pairs.joined(list(similar_pairs(unit_rows(vectors), 0.9)))
    rank = _order(keep, np.bincount(np.concatenate([pairs.left, pairs.right]), minlength=ROWS))
    stays = independent_set(neighbours_of(pairs.left, pairs.right, pairs.similarity, rank), rank)
    expected, near = set(hashes[~stays].tolist()), _expected()
    results = []
    for buckets in (1, 5):
        job = _removal(root, f"{keep}-{buckets}", keep, buckets)
        assert remove_duplicates(InProcess(), job) == len(expected) > 30
        rows = [row for table in removed_rows(LocalStore(root), job) for row in table.to_pylist()]
        assert {row["removed"] for row in rows} == expected
        assert not {row["kept"] for row in rows} & expected
        for row in rows:
            ends = sorted((row["removed"], row["kept"]))
            assert near[ends[0], ends[1]] == row["similarity"] >= np.float32(0.9)
        results.append(sorted(tuple(row.values()) for row in rows))
    assert results[0] == results[1]


def test_removal_goes_on_where_it_stopped(root: Path, session: Session) -> None:
    done = _removal(root, "whole", Keep.LONGEST, 3)
    rows = remove_duplicates(session, done)
    job = _removal(root, "stopped", Keep.LONGEST, 3)
    for path in job.files:
        write_ends(EndsTask(job.root, path, 3))
    for bucket in range(3):
        send_keys(BucketTask(job, bucket))
    for bucket in range(3):
        order_neighbours(BucketTask(job, bucket))
    first = [decide(BucketTask(job, bucket)) for bucket in range(3)]
    assert sum(first) > 0 and [decide(BucketTask(job, bucket)) for bucket in range(3)] == first
    assert remove_duplicates(session, job) == rows
    tables = [list(removed_rows(LocalStore(root), each)) for each in (done, job)]
    assert pa.concat_tables(tables[0]).equals(pa.concat_tables(tables[1]))


def test_rows_that_are_gone_are_not_joined_again(root: Path) -> None:
    _, hashes, _ = _corpus()
    old, gone = set(hashes[:480].tolist()), set(hashes[480:600].tolist())
    _decided(root, "earlier", old, gone)
    job = _job(root, "kept", standing="earlier")
    records = find_pairs(InProcess(), job)
    expected = {pair for pair in _expected() if not gone & set(pair) and not old >= set(pair)}
    assert set(_by_hash(LocalStore(root), job)) == expected and expected
    receipt = read_receipt(LocalStore(root), fragment_path("replicas", "kept", FRAGMENTS[0]))
    assert receipt.rows_in == receipt.rows_out + receipt.dropped["duplicate"] > receipt.rows_out
    assert measured_recall(InProcess(), job, records, 1.0, 1).recall == 1


def test_where_nothing_is_open_there_is_no_recall_to_lose(root: Path) -> None:
    _, hashes, _ = _corpus()
    _decided(root, "all", set(hashes.tolist()), set())
    job = _job(root, "all-stand", standing="all")
    assert measured_recall(InProcess(), job, [], 1.0, 1) == PairRecall(1.0, 0.0, 0, 0, 0)
    unread = replace(job, embeddings_fingerprint="none")  # of which no vector is there
    assert measured_recall(InProcess(), unread, [], 1.0, 1) == PairRecall(1.0, 0.0, 0, 0, 0)
    assert sum(record.comparisons + record.pairs for record in find_pairs(InProcess(), job)) == 0


def test_only_fragments_with_open_rows_are_sampled(root: Path) -> None:
    vectors, hashes, _ = _corpus()
    open_ = set(hashes[520:540].tolist())
    _decided(root, "few", set(hashes.tolist()) - open_, set())
    job = _job(root, "few-open", standing="few")
    parts = [sampled_rows(SampleTask(job, fragment, 1.0, 3)) for fragment in FRAGMENTS]
    assert [len(found) for found, _ in parts] == [0, 0, 20, 0] and set(parts[2][0].tolist()) == open_
    place = {int(row): number for number, row in enumerate(hashes)}
    assert np.array_equal(parts[2][1], unit_rows(vectors[[place[int(row)] for row in parts[2][0]]]))
    some = [sampled_rows(SampleTask(job, FRAGMENTS[2], share, 3))[0] for share in (0.1, 0.5)]
    assert len(some[0]) <= len(some[1]) < 20 and set(some[1].tolist()) < open_
    other = replace(job, embeddings_fingerprint="none")  # of which no fragment is there
    assert [len(sampled_rows(SampleTask(other, FRAGMENTS[place], 1.0, 3))[0]) for place in (0, 1, 3)] == [0, 0, 0]


@pytest.mark.parametrize("keep", [Keep.LONGEST, Keep.DENSEST])
def test_rows_that_stand_stay_whatever_the_order(root: Path, keep: Keep) -> None:
    vectors, hashes, _ = _corpus()
    unit = unit_rows(vectors).astype(np.float64)
    similar = unit @ unit.T >= 0.9
    stands: list[int] = []
    for row in range(400):
        if not similar[row, stands].any():
            stands.append(row)
    gone = set(range(400)) - set(stands)
    _decided(root, f"stands-{keep}", set(hashes[stands].tolist()), set(hashes[sorted(gone)].tolist()))
    join = _job(root, f"join-{keep}", standing=f"stands-{keep}")
    files = tuple(path for record in find_pairs(InProcess(), join) for path in record.files)
    base = _removal(root, f"decide-{keep}", keep, 3)
    job = replace(base, files=files, standing=f"stands-{keep}", fragments=FRAGMENTS)
    remove_duplicates(InProcess(), job)
    removed = {row for table in removed_rows(LocalStore(root), job) for row in table.column("removed").to_pylist()}
    assert removed and not removed & set(hashes[:400].tolist())
    stays = [row for row in range(ROWS) if row not in gone and int(hashes[row]) not in removed]
    assert similar[np.ix_(stays, stays)].sum() == len(stays)
    assert all(similar[row, stays].any() for row in range(400, ROWS))


def test_no_pairs_remove_nothing(root: Path) -> None:
    job = _removal(root, "none", Keep.FIRST, 2, similarity=1.0)
    assert remove_duplicates(InProcess(), job) == 0
    assert represent(BucketTask(job, 0, 1)) == 0
    assert buckets_for(0) == 1 and buckets_for(2_000_001) == 2


def test_rows_that_the_passages_lack_are_counted(root: Path) -> None:
    job = _removal(root, "lacking", Keep.LONGEST, 1)
    job = replace(job, passages=FRAGMENTS[:1])
    for path in job.files:
        write_ends(EndsTask(job.root, path, 1))
    with pytest.raises(
        ValueError, match=r"passages \(\d+ of \d+ rows with pairs, \d+ in all\) must hold each row once"
    ):
        send_keys(BucketTask(job, 0))


def test_replicas_are_sorted_by_part_and_keep_what_is_stored(root: Path) -> None:
    job = _job(root, "sorted")
    receipt = replicate(ReplicaTask(job, FRAGMENTS[0]))
    table = read_fragment(LocalStore(root), fragment_path("replicas", "sorted", FRAGMENTS[0]))
    assert receipt.rows_out == FRAGMENT_ROWS[0] == table.column("native").to_numpy().sum() < table.num_rows
    assert (np.diff(table.column("part").to_numpy()) >= 0).all()
    assert table.schema.field("embedding").type == pa.list_(pa.float16(), DIMENSION)
    digests = vector_digests(unit_rows(vectors_of(table.column("embedding"))))
    assert np.array_equal(np.stack([table.column(name).to_numpy() for name in DIGESTS], axis=1), digests)


def test_a_part_reads_no_rows_of_others_and_facts_without_vectors(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fragments, "LEAST_GROUP_ROWS", 1)
    job, store = _job(root, "grouped"), LocalStore(root)
    path = fragment_path("replicas", "grouped", FRAGMENTS[0])
    replicate(ReplicaTask(job, FRAGMENTS[0]))
    with open_fragment(store, path) as file:
        groups = [file.read_row_group(group).column("part").unique().to_pylist() for group in range(3)]
        chunk = file.metadata.row_group(1).column(len(file.schema.names) - 1)
        place = chunk.data_page_offset
    assert groups == [[0], [1], [2]]
    whole = {number: Part(store, [path], number) for number in (0, 1, 2)}
    data = bytearray(store.read(path))
    data[place + 40 : place + 60] = bytes(20)
    store.write(path, bytes(data))
    for number, part in whole.items():
        again = Part(store, [path], number)  # which reads no vector, so that the damage is not noticed
        assert np.array_equal(again.rows.hashes, part.rows.hashes) and again.dimension == DIMENSION
    assert len(Part(store, [path], 2).block(np.arange(5)).vectors) == 5
    with pytest.raises(OSError, match=r"CRC|checksum"):
        Part(store, [path], 1).block(np.arange(5))


def test_groups_are_the_components_of_pairs_and_of_links_before(root: Path) -> None:
    vectors, hashes, _ = _corpus()
    unit = unit_rows(vectors).astype(np.float64)
    similar = unit @ unit.T >= 0.9
    before = {3: 700, 4: 700, 5: 5}  # rows 3 and 4 went for 700, row 5 stays
    old = {int(hashes[row]): int(hashes[kept]) for row, kept in before.items()}
    _decided(root, "links", set(), set())
    columns = [sorted(old), [old[row] for row in sorted(old)], [0.9] * len(old)]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, STANDING_SCHEMA, strict=True)]
    table = pa.table(arrays, schema=STANDING_SCHEMA)
    write_decisions(LocalStore(root), fragment_path("standing", "links", FRAGMENTS[0]), FRAGMENTS[0], table, 500)
    similar[3, 700] = similar[4, 700] = similar[700, 3] = similar[700, 4] = True
    count, labels = connected_components(similar, directed=False)
    lowest = [int(hashes[labels == label].min()) for label in range(count)]
    for buckets in (1, 4):
        job = _removal(root, f"groups-{buckets}", Keep.FIRST, buckets)
        job = replace(job, standing="links", fragments=FRAGMENTS)
        assert group_rows(InProcess(), job) == sum(np.bincount(labels) > 1)
        tables = [read_groups(LocalStore(root), job, bucket).to_pylist() for bucket in range(buckets)]
        assert all(rows == sorted(rows, key=lambda row: row["row_hash"]) for rows in tables)
        found = {row["row_hash"]: row["group"] for rows in tables for row in rows}
        assert [found.get(row, row) for row in hashes.tolist()] == [lowest[label] for label in labels]
        assert group_rows(InProcess(), job) == sum(np.bincount(labels) > 1)  # nothing is done twice
