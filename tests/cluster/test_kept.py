"""What goes of rows of which many are equal, from the join to the embeddings that stay: against a choice one by one."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy.sparse.csgraph import connected_components

from penstock.cluster import fragments as fragment_files
from penstock.cluster.fragments import Receipt, read_fragment, vector_column, write_fragment
from penstock.cluster.jobs import groups, similarity
from penstock.cluster.jobs.dealt_rows import DealTask, deal_bucket, deal_rows
from penstock.cluster.jobs.groups import group_rows
from penstock.cluster.jobs.kept import KeptJob, KeptTask, keep_rows, links_path
from penstock.cluster.jobs.pair_ends import bucket_of, bucket_range
from penstock.cluster.jobs.removal import RemovalJob, remove_duplicates, removed_of
from penstock.cluster.jobs.shard_rows import FragmentPair, RowSource
from penstock.cluster.jobs.similarity import PAIR_SCHEMA, JoinJob, PartRecord, find_pairs
from penstock.cluster.jobs.standing import Carried, StandingJob, carry_decisions
from penstock.cluster.layout import EMBEDDINGS, PASSAGES, fragment_path
from penstock.cluster.local_store import LocalStore
from penstock.operators.identity import hash_texts
from penstock.operators.independent_set import Keep
from penstock.operators.similar_pairs import Join, unit_rows

from .in_process import InProcess

DIMENSION, SIMILARITY = 8, 0.9
Parts = dict[str, np.ndarray]  # fragment → row numbers int64 (n,)


@dataclass
class Rows:
    """Rows by number: many are equal, and some are near others."""

    vectors: np.ndarray
    hashes: np.ndarray
    tokens: np.ndarray

    @staticmethod
    def of(seed: int, count: int = 240) -> "Rows":
        random = np.random.default_rng(seed)
        base = unit_rows(random.standard_normal((60, DIMENSION)))
        base[20:40] = unit_rows(base[:20] + 0.12 * random.standard_normal((20, DIMENSION)))
        vectors = base[random.integers(0, 60, count)].astype(np.float16)
        hashes = random.integers(0, 2**64, count, dtype=np.uint64)
        return Rows(vectors, hashes, random.integers(1, 4, count).astype(np.int32))

    @property
    def near(self) -> np.ndarray:
        unit = unit_rows(self.vectors).astype(np.float64)
        near: np.ndarray = unit @ unit.T >= SIMILARITY
        np.fill_diagonal(near, False)
        return near

    def write(self, store: LocalStore, parts: Parts) -> None:
        for name, part in parts.items():
            part = part[np.argsort(self.hashes[part])]
            ids, receipt = [f"{row}#0" for row in part], Receipt(name, len(part), len(part))
            own = {"row_hash": self.hashes[part], "passage_id": ids, "text_hash": hash_texts(ids)}
            embedded = pa.table(own | {"embedding": vector_column(self.vectors[part])})
            write_fragment(store, fragment_path(EMBEDDINGS, "e", name), embedded, receipt)
            passages = own | {"document_id": [str(row) for row in part], "tokens": self.tokens[part]}
            write_fragment(store, fragment_path(PASSAGES, "p", name), pa.table(passages), receipt)

    def chosen(self, present: np.ndarray, stands: set[int], gone: set[int]) -> set[int]:
        """What stays by a choice one by one: what stands, then the open ones, the longest first."""
        near, stays = self.near, set(stands)
        opened = set(present.tolist()) - stands - gone
        for row in sorted(opened, key=lambda row: (-self.tokens[row], int(self.hashes[row]))):
            if not near[row, sorted(stays)].any():
                stays.add(row)
        return stays


@dataclass
class Decided:
    """What was decided: rows that stay, what each that went went for, and its group."""

    name: str
    removal: RemovalJob
    stays: set[int] = field(default_factory=set)
    goes: dict[int, int] = field(default_factory=dict)
    groups: dict[int, int] = field(default_factory=dict)
    carried: Carried | None = None


def _joined(root: str, name: str, parts: Parts, standing: str | None) -> list[PartRecord]:
    join = JoinJob(root, f"j-{name}", "e", "c", tuple(sorted(parts)), (0,), Join.EXACT, 0.85, standing)
    return find_pairs(InProcess(), join)


def decide(store: LocalStore, name: str, rows: Rows, parts: Parts, buckets: int, earlier: Decided | None) -> Decided:
    """All jobs of deduplication of rows, in so many buckets."""
    rows.write(store, parts)
    root, fragments, standing, carried = str(store.root), tuple(sorted(parts)), None, None
    if earlier is not None:
        standing = f"s-{name}"
        links = {fragment: f"k{fragment}" for fragment in earlier.removal.fragments}
        job = StandingJob(root, standing, "e", fragments, earlier.name, links, 2)
        carried = carry_decisions(InProcess(), job, lambda receipt: None)
    records = _joined(root, name, parts, standing)
    files, equal = (tuple(path for one in records for path in getattr(one, key)) for key in ("files", "equal_files"))
    removal = RemovalJob(root, f"r-{name}", files, SIMILARITY, Keep.LONGEST, buckets, "p", fragments)
    removal = RemovalJob(**(vars(removal) | {"standing": standing, "fragments": fragments, "equal_files": equal}))
    found = Decided(name, removal, carried=carried)
    removed = remove_duplicates(InProcess(), removal)
    group_rows(InProcess(), removal)
    deal_rows(InProcess(), removal, "e")
    number = {int(row_hash): row for row, row_hash in enumerate(rows.hashes)}
    for fragment in fragments:
        job = KeptJob(RowSource(root, "p", "", "e"), removal, name)
        keep_rows(KeptTask(job, FragmentPair(fragment, fragment, False), f"k{fragment}"))
        kept = read_fragment(store, fragment_path(EMBEDDINGS, name, f"k{fragment}"), ["row_hash"])
        found.stays |= {number[row] for row in kept.column("row_hash").to_pylist()}
        for link in read_fragment(store, links_path(name, f"k{fragment}")).to_pylist():
            found.goes[number[link["row_hash"]]] = number[link["kept_hash"]]
            found.groups[number[link["row_hash"]]] = number[link["group"]]
    assert removed + (carried.gone if carried else 0) == len(found.goes)
    return found


def check(found: Decided, rows: Rows, present: np.ndarray) -> None:
    """Every row stays or went, for one that stays and is similar."""
    assert found.stays | found.goes.keys() == set(present.tolist()) and not found.stays & found.goes.keys()
    assert all(kept in found.stays and rows.near[gone, kept] for gone, kept in found.goes.items())


def test_equal_rows_of_any_bucket_go_from_the_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "PAIRS_PER_FILE", 100)
    rows, results = Rows.of(0), []
    cut = np.array_split(np.arange(180), 4)
    before = {f"{number:032x}": part for number, part in enumerate(cut)}
    after = {f"{number:032x}": part for number, part in enumerate([cut[1], cut[2], np.arange(135, 240)], 10)}
    for buckets in (1, 2, 4):
        store = LocalStore(tmp_path / str(buckets))
        first = decide(store, "one", rows, before, buckets, None)
        check(first, rows, np.arange(180))
        assert first.stays == rows.chosen(np.arange(180), set(), set())
        labels = connected_components(rows.near[:180, :180], directed=False)[1]
        lowest = [min(np.flatnonzero(labels == label), key=lambda row: rows.hashes[row]) for label in labels]
        assert first.groups == {row: lowest[row] for row in first.goes}
        second = decide(store, "two", rows, after, buckets, first)
        present = np.concatenate(list(after.values()))
        stands = first.stays & set(present.tolist())
        gone = {row for row, kept in first.goes.items() if row in present and kept in stands}
        assert second.carried == Carried(len(stands), len(gone), len(present) - len(stands) - len(gone))
        assert second.stays == rows.chosen(present, stands, gone)
        check(second, rows, present)
        results.append((first.stays, first.goes, first.groups, second.stays, second.goes, second.groups))
    assert results[0] == results[1] == results[2]


def test_what_goes_is_stored_by_its_own_hash(tmp_path: Path) -> None:
    rows, store = Rows.of(3), LocalStore(tmp_path)
    found = decide(store, "one", rows, {f"{1:032x}": np.arange(240)}, 4, None)
    links = [row for path in found.removal.equal_files for row in read_fragment(store, path).to_pylist()]
    ends = (np.array([link[side] for link in links], np.uint64) for side in ("left", "right"))
    first, other = (bucket_of(side, 4) for side in ends)
    assert np.count_nonzero(first != other) > 50
    for bucket in range(4):
        removed = removed_of(store, found.removal, bucket).column("removed").to_pylist()
        low, high = bucket_range(bucket, 4)
        assert removed == sorted(removed) and low <= removed[0] and removed[-1] <= high


def test_rows_that_go_and_are_in_no_group_are_refused(tmp_path: Path) -> None:
    rows, store = Rows.of(4), LocalStore(tmp_path)
    found = decide(store, "one", rows, {f"{1:032x}": np.arange(240)}, 1, None)
    path = fragment_path("removal", "r-one", "groups-00000")
    write_fragment(store, path, read_fragment(store, path).slice(3))
    with pytest.raises(ValueError, match=r"rows of removal r-one that go \(\d of \d+ in bucket 0\) must be in groups"):
        deal_bucket(DealTask(found.removal, "e", 0))


def test_a_bucket_reads_the_passages_of_its_own_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fragment_files, "ROW_GROUP_ROWS", 16)
    rows, store, read = Rows.of(5, 2_000), LocalStore(tmp_path), []
    parts = {f"{number:032x}": part for number, part in enumerate(np.array_split(np.arange(2_000), 2))}
    whole = pa.parquet.ParquetFile.read_row_groups

    def counted(self: pa.parquet.ParquetFile, groups: list[int], *args: object, **options: object) -> pa.Table:
        table = whole(self, groups, *args, **options)
        read.append(table.num_rows if "tokens" in table.column_names else 0)
        return table

    rows.write(store, parts)
    records = _joined(str(tmp_path), "one", parts, None)
    files, equal = (tuple(path for one in records for path in getattr(one, key)) for key in ("files", "equal_files"))
    job = RemovalJob(str(tmp_path), "r", files, SIMILARITY, Keep.LONGEST, 8, "p", tuple(parts), equal_files=equal)
    monkeypatch.setattr(pa.parquet.ParquetFile, "read_row_groups", counted)
    remove_duplicates(InProcess(), job)
    # of the rows that are in pairs, and of their equals: two slices of each fragment for each bucket
    assert sum(read) < 2 * (2_000 + 2 * 16 * 2 * 8) < 8 * 2_000


def test_many_links_of_equal_rows_are_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, store = Rows.of(6), LocalStore(tmp_path)
    parts = {f"{1:032x}": np.arange(240)}
    rows.write(store, parts)
    (whole,) = _joined(str(tmp_path), "whole", parts, None)
    monkeypatch.setattr(similarity, "PAIRS_PER_FILE", 50)
    (cut,) = _joined(str(tmp_path), "cut", parts, None)
    assert len(whole.equal_files) == 1 and len(cut.equal_files) == -(-cut.equal // 50) > 2
    tables = [[read_fragment(store, path) for path in one.equal_files] for one in (whole, cut)]
    assert all(0 < len(table) <= 50 for table in tables[1])
    assert len({table.schema.remove_metadata() for table in sum(tables, [])} - {PAIR_SCHEMA}) == 0
    assert pa.concat_tables(tables[0]).equals(pa.concat_tables(tables[1])) and whole.equal == cut.equal


def test_earlier_decisions_are_linked_in_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "FRAGMENTS_PER_TASK", 10)
    rows, store = Rows.of(7), LocalStore(tmp_path)
    parts = {f"{number:032x}": part for number, part in enumerate(np.array_split(np.arange(240), 24))}
    first = decide(store, "one", rows, parts, 2, None)
    read: list[str] = []
    decided = groups.decisions_on
    monkeypatch.setattr(groups, "decisions_on", lambda store, *of: read.append(of[1]) or decided(store, *of))
    second = decide(store, "two", rows, parts, 2, first)
    linked = [name for name in store.names("stages/removal/r-two") if name.startswith("linked-00000-")]
    assert len(linked) == 3 + len(second.removal.files) + len(second.removal.equal_files)
    gone = {name for name, part in parts.items() if first.goes.keys() & set(part.tolist())}
    assert set(read) == gone and (second.stays, second.goes) == (first.stays, first.goes)
