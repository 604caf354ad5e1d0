"""Whole documents in a corpus that changes: earlier decisions stand, against a choice one by one in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from penstock.cluster.fragments import Receipt, read_fragment, vector_column, write_fragment
from penstock.cluster.jobs.dealt_rows import DEALT_SCHEMA, deal_rows
from penstock.cluster.jobs.document_pairs import DocumentJob, remove_documents
from penstock.cluster.jobs.document_standing import (
    DECIDED_SCHEMA,
    DocumentCarry,
    carry_documents,
    decided_path,
    keep_documents,
    standing_documents,
)
from penstock.cluster.jobs.groups import group_rows
from penstock.cluster.jobs.kept import LINK_SCHEMA, KeptJob, KeptTask, keep_rows, links_path
from penstock.cluster.jobs.removal import RemovalJob
from penstock.cluster.jobs.shard_rows import FragmentPair, RowSource
from penstock.cluster.jobs.similarity import JoinJob, find_pairs
from penstock.cluster.jobs.standing import STANDING_SCHEMA, Carried, StandingJob
from penstock.cluster.layout import EMBEDDINGS, PASSAGES, STANDING, fragment_path
from penstock.cluster.local_store import LocalStore
from penstock.operators.identity import fingerprint, hash_texts, row_hashes
from penstock.operators.independent_set import Keep
from penstock.operators.similar_pairs import Join, unit_rows

from .in_process import InProcess

DIMENSION, SIMILARITY, SHARE = 24, 0.9, 0.6
Documents = dict[str, np.ndarray]  # name → float16 (passages, DIMENSION)


def corpus(random: np.random.Generator, names: list[str], sources: Documents) -> Documents:
    """Documents of which most take some passages from others: as they are, or a little changed."""
    known = dict(sources)
    for name in names:
        own = unit_rows(random.standard_normal((random.integers(1, 4), DIMENSION)))
        if known and random.random() < 0.7:
            source = known[sorted(known)[random.integers(len(known))]]
            taken = source[random.random(len(source)) < random.choice([0.6, 1.0])].astype(np.float64)
            noise = random.choice([0.0, 0.03]) * random.standard_normal(taken.shape)
            own = np.concatenate([own[: random.integers(0, 3)], taken + noise])
        rows = own if len(own) else random.standard_normal((1, DIMENSION))
        known[name] = unit_rows(rows).astype(np.float16)
    return {name: known[name] for name in names}


def write(store: LocalStore, parts: list[Documents]) -> dict[str, str]:
    """Embeddings fragment → passages fragment of each part, named by what is in it."""
    names = {}
    for part in parts:
        ids = [f"{name}#{number}" for name in part for number in range(len(part[name]))]
        vectors, hashes = np.concatenate(list(part.values())), row_hashes(ids)
        order = np.argsort(hashes)
        ids = [ids[row] for row in order]
        documents = [name.partition("#")[0] for name in ids]
        own = {"row_hash": hashes[order], "passage_id": pa.array(ids)}
        own["text_hash"] = hash_texts([row.tobytes().hex() for row in vectors[order]])
        name = fingerprint(of=[ids, [value.as_py().hex() for value in own["text_hash"]]])
        names[name], receipt = f"{name[::-1]}", Receipt(name, len(ids), len(ids))
        embedded = pa.table(own | {"embedding": vector_column(vectors[order])})
        write_fragment(store, fragment_path(EMBEDDINGS, "e", name), embedded, receipt)
        columns = {
            "document_id": pa.array(documents),
            "document_hash": row_hashes(documents),
            "tokens": pa.array([10 + len(name) % 3 for name in ids], pa.int32()),
        }
        write_fragment(store, fragment_path(PASSAGES, "p", names[name]), pa.table(own | columns), receipt)
    return names


@dataclass
class Decided:
    """What was decided: each document that went and the one that it went for, links of passages, and what it took."""

    kept: str
    fragments: dict[str, str]
    stays: set[str]
    goes: dict[str, str]
    links: dict[str, int | None]
    comparisons: int
    equal: int
    carried: Carried | None = None
    whole: Carried | None = None

    @property
    def earlier(self) -> Mapping[str, str]:
        return {name: f"k{name}" for name in self.fragments}


def decide(store: LocalStore, kept: str, parts: list[Documents], earlier: Decided | None = None) -> Decided:
    """All jobs of deduplication of whole documents."""
    root, session, fragments = str(store.root), InProcess(), write(store, parts)
    standing, carried = None, (None, None)
    if earlier is not None:
        standing = f"s-{kept}"
        job = StandingJob(root, standing, "e", tuple(fragments), earlier.kept, earlier.earlier, 2)
        carry = DocumentCarry(job, "p", fragments)
        carried = carry_documents(session, carry, lambda receipt: None)
        assert carry_documents(session, carry, lambda receipt: None) == carried
    join = JoinJob(root, f"j-{kept}", "e", "c", tuple(fragments), (0,), Join.EXACT, 0.85, standing)
    records = find_pairs(session, join)
    files, equal = (tuple(path for one in records for path in getattr(one, key)) for key in ("files", "equal_files"))
    rows = RemovalJob(
        root,
        f"r-{kept}",
        files,
        SIMILARITY,
        Keep.LONGEST,
        3,
        passages_fingerprint="p",
        passages=tuple(fragments.values()),
        standing=standing,
        fragments=tuple(fragments),
        equal_files=equal,
    )
    documents = DocumentJob(f"d-{kept}", rows, SHARE, standing and standing_documents(standing))
    remove_documents(session, documents)
    group_rows(session, rows)
    deal_rows(session, rows, "e", documents)
    keep = KeptJob(RowSource(root, "p", "", "e"), rows, kept, documents)
    for name, passages in fragments.items():
        keep_rows(KeptTask(keep, FragmentPair(passages, name, False), f"k{name}"))
    stays = {
        name.partition("#")[0]
        for one in fragments
        for name in read_fragment(store, fragment_path(EMBEDDINGS, kept, f"k{one}")).column("passage_id").to_pylist()
    }
    names = {int(row_hashes([name])[0]): name for part in parts for name in part}
    tables = [read_fragment(store, decided_path(kept, f"k{one}")) for one in fragments]
    assert all(table.schema.remove_metadata() == DECIDED_SCHEMA for table in tables)
    table = pa.concat_tables(tables).to_pylist()
    goes = {names[row["row_hash"]]: names[row["kept_hash"]] for row in table if row["kept_hash"] != row["row_hash"]}
    links = pa.concat_tables(
        [read_fragment(store, links_path(kept, f"k{one}"), LINK_SCHEMA.names) for one in fragments]
    )
    linked = {row["id"]: row["kept_hash"] for row in links.to_pylist()}
    found = (sum(one.comparisons for one in records), sum(one.equal for one in records))
    return Decided(kept, fragments, stays, goes, linked, *found, *carried)


def shares_of(documents: Documents) -> dict[tuple[str, str], float]:
    """The share of the passages of one document that are similar to some of another."""
    unit = {name: unit_rows(rows).astype(np.float64) for name, rows in documents.items()}
    return {
        (one, other): float(((unit[one] @ unit[other].T).max(axis=1) >= SIMILARITY).mean())
        for one in unit
        for other in unit
        if one != other
    }


def chosen(now: Documents, stands: set[str], gone: set[str]) -> set[str]:
    """What stays by a choice one by one: what stands, then the open ones, the longest first."""
    tokens = {name: sum(10 + len(f"{name}#{row}") % 3 for row in range(len(rows))) for name, rows in now.items()}
    shares, stays = shares_of(now), set(stands)
    for name in sorted(now.keys() - stands - gone, key=lambda name: (-tokens[name], int(row_hashes([name])[0]))):
        if not any(np.float32(shares[name, other]) >= np.float32(SHARE) for other in stays):
            stays.add(name)
    return stays


def dealt(documents: Documents, count: int) -> list[Documents]:
    """Documents in so many parts."""
    names = list(documents)
    return [{name: documents[name] for name in names[number::count]} for number in range(count) if names[number::count]]


def same(one: np.ndarray, other: np.ndarray | None) -> bool:
    return other is not None and np.array_equal(one, other)


def check(found: Decided, now: Documents) -> None:
    """Every document that went is covered by one that stays, and its passages are linked to similar ones of it."""
    shares = shares_of(now)
    assert found.stays | found.goes.keys() == now.keys() and not found.stays & found.goes.keys()
    vectors = {f"{name}#{row}": unit_rows(rows)[row] for name, rows in now.items() for row in range(len(rows))}
    hashes = dict(zip(row_hashes(list(vectors)).tolist(), vectors, strict=True))
    assert set(found.links) == {name for name in vectors if name.partition("#")[0] in found.goes}
    for gone, kept in found.goes.items():
        assert kept in found.stays and shares[gone, kept] >= SHARE - 1e-6
        own = {name: found.links[name] for name in found.links if name.partition("#")[0] == gone}
        linked = {name: hashes[kept_hash] for name, kept_hash in own.items() if kept_hash is not None}
        assert len(linked) == round(shares[gone, kept] * len(own))
        for name, other in linked.items():
            assert other.partition("#")[0] == kept and vectors[name] @ vectors[other] >= SIMILARITY - 1e-5


@pytest.mark.parametrize("seed", range(2))
def test_decisions_on_documents_stand_while_their_corpus_changes(tmp_path: Path, seed: int) -> None:
    random, store = np.random.default_rng(seed), LocalStore(tmp_path)
    before = corpus(random, [f"a{number:02d}" for number in range(60)], {})
    first = decide(store, "one", dealt(before, 4))
    assert first.stays == chosen(before, set(), set()) and len(first.goes) > 8
    check(first, before)

    keeper, changed = sorted(set(first.goes.values()))[:2]
    now = {name: rows for name, rows in before.items() if name not in (keeper, "a07")}
    now[changed] = np.concatenate([now[changed], corpus(random, ["x"], {})["x"]])  # one passage more
    now |= corpus(random, [f"b{number:02d}" for number in range(15)], before)
    parts = dealt({name: rows for name, rows in now.items() if name in before}, 4)[1:]  # others than they were
    rest = {name: rows for name, rows in now.items() if not any(name in part for part in parts)}
    second = decide(store, "two", [*parts, *dealt(rest, 3)], first)
    remain = {name for name, rows in now.items() if same(rows, before.get(name))}
    stands, gone = remain & first.stays, {name for name in remain & first.goes.keys() if first.goes[name] in remain}
    assert second.whole == Carried(len(stands), len(gone), len(now) - len(stands) - len(gone))
    assert {name: second.goes[name] for name in gone} == {name: first.goes[name] for name in gone}
    assert second.stays == chosen(now, stands, gone) > stands
    check(second, now)
    orphans = {name for name in remain & first.goes.keys() if first.goes[name] in (keeper, changed)}
    assert orphans and orphans <= second.stays | second.goes.keys()

    rows = {kind: sum(len(now[name]) for name in names) for kind, names in (("standing", stands), ("gone", gone))}
    assert second.carried == Carried(rows["standing"], rows["gone"], sum(map(len, now.values())) - sum(rows.values()))
    new = second.carried.open - second.equal  # of passages with equal vectors the first alone is compared
    assert second.comparisons == new * rows["standing"] + new * (new - 1) // 2

    third = decide(store, "three", dealt(dict(sorted(now.items(), reverse=True)), 5), second)  # moved, not changed
    assert third.comparisons == 0 and (third.stays, third.goes) == (second.stays, second.goes)
    assert third.links == second.links


def test_what_stays_of_documents_depends_on_neither_their_order_nor_their_fragments(tmp_path: Path) -> None:
    random, store = np.random.default_rng(9), LocalStore(tmp_path)
    before = corpus(random, [f"a{number:02d}" for number in range(40)], {})
    now = before | corpus(random, [f"b{number:02d}" for number in range(12)], before)
    del now["a03"]
    results = []
    for count in (1, 3):
        shuffled = {name: before[name] for name in random.permutation(sorted(before)).tolist()}
        first = decide(store, f"one-{count}", dealt(shuffled, count))
        shuffled = {name: now[name] for name in random.permutation(sorted(now)).tolist()}
        second = decide(store, f"two-{count}", dealt(shuffled, count + 1), first)
        results.append((first.stays, first.goes, first.links, second.stays, second.goes, second.links))
    assert results[0] == results[1]


@pytest.mark.parametrize("lost", [0, 50])
def test_a_decision_on_a_document_that_is_no_more_says_nothing_of_others(tmp_path: Path, lost: int) -> None:
    store = LocalStore(tmp_path)
    decided = pa.table([sorted([lost, 20]), [99, 99], [0.75, 0.75]], schema=STANDING_SCHEMA)
    write_fragment(store, fragment_path(STANDING, "s", "one"), decided)
    rows = RemovalJob(str(tmp_path), "r", (), SIMILARITY, Keep.RANDOM, 1)
    passages = {"row_hash": [1, 2, 3], "document_hash": [30, 10, 20]}
    table = pa.table({name: pa.array(column, pa.uint64()) for name, column in passages.items()})
    table = table.append_column("text_hash", hash_texts(["a", "b", "c"]))
    job = DocumentJob("d", rows, SHARE, "s")
    goes = keep_documents(store, job, "one", "kept.parquet", table, DEALT_SCHEMA.empty_table())
    assert goes.tolist() == [False, False, True]
    found = read_fragment(store, "kept.parquet").to_pylist()
    assert {row["row_hash"]: row["kept_hash"] for row in found} == {10: 10, 20: 99, 30: 30}


def test_a_fragment_is_kept_by_what_was_dealt_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random, store = np.random.default_rng(3), LocalStore(tmp_path)
    read: list[str] = []
    reading = LocalStore.open
    documents = corpus(random, [f"a{number:02d}" for number in range(40)], {})
    first = decide(store, "one", dealt(documents, 3))
    monkeypatch.setattr(LocalStore, "open", lambda self, path: read.append(path) or reading(self, path))
    name, passages = next(iter(first.fragments.items()))
    (store.root / decided_path("one", f"k{name}")).unlink()
    rows = RemovalJob(str(tmp_path), "r-one", (), SIMILARITY, Keep.LONGEST, 3, fragments=tuple(first.fragments))
    keep = KeptJob(RowSource(str(tmp_path), "p", "", "e"), rows, "one", DocumentJob("d-one", rows, SHARE))
    keep_rows(KeptTask(keep, FragmentPair(passages, name, False), f"k{name}"))
    stages = [path.split("/", 1)[1] for path in read]
    assert sorted(path for path in stages if path.startswith(("removal", "document-pairs"))) == [
        f"removal/r-one/dealt-{bucket:05d}.parquet" for bucket in range(3)
    ]
