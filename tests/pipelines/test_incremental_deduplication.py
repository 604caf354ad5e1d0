"""Deduplication by meaning of a corpus that changes: earlier decisions stand, and only what is open is compared."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from penstock.cluster.catalog import Catalog
from penstock.cluster.session import Session
from penstock.cluster.storage import open_store
from penstock.pipelines.cleanup import collect_garbage
from penstock.pipelines.running import Report

from .conftest import Workspace, read_ledger

SIMILARITY = 0.93
RULE = {"type": "semantic", "similarity": SIMILARITY, "keep": "longest"}
DAY_NS = 86_400 * 10**9
Documents = dict[str, str]


def reworded(text: str, more: str = "") -> str:
    """A text that says the same in a few other words."""
    return text.replace("the ", "this ", 1).replace("Return", "Give back", 1).replace(".", " .", 1) + more


def write(workspace: Workspace, name: str, documents: Documents) -> None:
    rows = [{"id": key, "text": text, "topic": name} for key, text in documents.items()]
    workspace.write(f"{name}.jsonl", rows)


def run(workspace: Workspace, **rule: Any) -> Report:  # noqa: ANN401
    report = workspace.pipeline(deduplicate={**RULE, **rule}).run()
    assert report is not None
    return report


class Decided:
    """What the newest version decided, and the vectors that it decided on."""

    def __init__(self, root: Path) -> None:
        catalog = Catalog(open_store(str(root)), "test")
        self.stages = catalog.manifest(catalog.versions()[-1])["lineage"]["stages"]
        self.kept = self.stages["kept"]
        self.record = json.loads((root / f"stages/kept/{self.kept}/kept.json").read_text())
        self.vectors: dict[str, np.ndarray] = {}
        for name in self.record["encoded"].values():
            self.vectors |= _vectors(root / f"stages/embeddings/{self.stages['encoded']}/{name}.parquet")
        self.stays: set[str] = set()
        for path in (root / f"stages/embeddings/{self.kept}").glob("*.parquet"):
            self.stays |= set(_vectors(path))
        links: list[dict[str, Any]] = []
        names: list[dict[str, Any]] = []
        for path in (root / f"stages/kept/{self.kept}").glob("*.parquet"):
            (names if path.name.startswith("removed-") else links).extend(pq.read_table(path).to_pylist())
        self.links = {row["id"]: row for row in links}
        self.names = {row["removed_id"]: row["kept_id"] for row in names}

    def check(self) -> None:
        """No two rows that stay are similar; every row that went has one that stays; the links are true."""
        names = sorted(self.stays)
        near = np.stack([self.vectors[name] for name in names])
        assert (near @ near.T - np.eye(len(names), dtype=np.float32)).max() < SIMILARITY
        assert set(self.links) == set(self.vectors) - self.stays
        for name in self.links:
            assert (near @ self.vectors[name]).max() >= SIMILARITY - 1e-6
        hashes = {row: name for name, row in _hashes(names).items()}
        assert self.names == {name: hashes[link["kept_hash"]] for name, link in self.links.items()}
        for name, link in self.links.items():
            measured = float(self.vectors[name] @ self.vectors[hashes[link["kept_hash"]]])
            assert link["similarity"] == pytest.approx(measured, abs=1e-3) and measured >= SIMILARITY - 1e-3
        assert self.record["removed"] == len(self.links) and self.record["rows"] == len(self.vectors)


def _hashes(names: list[str]) -> dict[str, int]:
    from penstock.operators.identity import row_hashes

    return dict(zip(names, row_hashes(names).tolist(), strict=True))


def _rows(path: Path) -> int:
    return int(pq.read_metadata(path).num_rows)


def _vectors(path: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(path)
    column = table.column("embedding")
    vectors = np.array(column.to_pylist(), np.float32).reshape(table.num_rows, column.type.list_size)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return dict(zip(table.column("passage_id").to_pylist(), vectors / lengths, strict=True))


@pytest.fixture(scope="module")
def base(real_texts: list[str], tmp_path_factory: pytest.TempPathFactory, ray_session: Session) -> Workspace:
    """40 texts, 15 of them also in other words, in two files, decided on; tests work on copies."""
    workspace = Workspace(tmp_path_factory.mktemp("incremental"), {"index": {"family": "flat", "recall": 1.0}})
    write(workspace, "one", {f"d{number:02d}": real_texts[number] for number in range(40)})
    write(workspace, "two", {f"e{number:02d}": reworded(real_texts[number]) for number in range(15)})
    run(workspace)
    return workspace


@pytest.fixture
def workspace(base: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(base.folder, tmp_path / "copy")
    return Workspace(tmp_path / "copy", base.settings)


def test_new_documents_are_compared_with_what_stays_and_change_no_decision(
    workspace: Workspace, real_texts: list[str]
) -> None:
    before = Decided(workspace.root)
    before.check()
    longer = {f"f{number:02d}": reworded(real_texts[number], " Please note.") for number in range(10, 25)}
    write(workspace, "three", {**longer, "g0": "An elephant never forgets a face.", "g1": "An elephant never forgets."})
    planned = next(stage for stage in workspace.pipeline(deduplicate=RULE).plan().stages if stage.name == "passages")
    assert planned.todo == 1
    run(workspace)
    after = Decided(workspace.root)
    after.check()
    assert before.stays < after.stays and set(before.links) < set(after.links)
    new, standing = len(after.vectors) - len(before.vectors), len(before.stays)
    assert after.record["carried"] == {"standing": standing, "gone": len(before.links), "open": new}
    one, all_ = new - after.record["equal_rows"], len(before.vectors) - before.record["equal_rows"]  # of equal vectors
    assert after.record["comparisons"] == one * standing + one * (one - 1) // 2
    assert before.record["comparisons"] == all_ * (all_ - 1) // 2
    assert after.record["earlier"] == before.kept and after.record["pair_recall"]["recall"] == 1.0
    assert sum(name.startswith("f") for name in after.links) >= 10  # longer, and yet they go
    assert read_ledger(workspace.root)["kept"]["dropped"] == {"duplicate_meaning": len(after.links)}
    assert workspace.pipeline(deduplicate=RULE).plan().up_to_date
    assert workspace.pipeline(deduplicate=RULE).run() is None


def test_rows_whose_representative_is_deleted_are_decided_again(workspace: Workspace, real_texts: list[str]) -> None:
    before = Decided(workspace.root)
    names = {row: name for name, row in _hashes(sorted(before.stays)).items()}
    keepers = {names[link["kept_hash"]].partition("#")[0] for link in before.links.values()}
    keeper = min(name for name in keepers if name.startswith("d"))
    left = {f"d{number:02d}": real_texts[number] for number in range(40) if f"d{number:02d}" != keeper}
    write(workspace, "one", left)
    run(workspace)
    after = Decided(workspace.root)
    after.check()
    gone = {name for name in before.vectors if name.partition("#")[0] == keeper}
    assert before.stays - gone <= after.stays and not gone & set(after.vectors)
    came = set(after.vectors) - set(before.vectors)  # had the text of a passage that is gone
    revived = after.stays - before.stays - came
    assert revived and revived <= set(before.links)
    lost = {link["id"] for link in before.links.values() if names[link["kept_hash"]] in gone} - gone
    assert revived <= lost and after.record["carried"]["open"] == len(lost | came)
    assert after.record["carried"]["standing"] == len(before.stays - gone)


def test_a_document_with_another_text_is_new_and_the_rest_of_its_fragment_is_not(
    workspace: Workspace, real_texts: list[str]
) -> None:
    before = Decided(workspace.root)
    texts = {f"d{number:02d}": real_texts[number] for number in range(40)}
    write(workspace, "one", {**texts, "d20": "Whales sing songs that travel for hundreds of miles under water."})
    run(workspace)
    after = Decided(workspace.root)
    after.check()
    old = {name for name in before.stays if not name.startswith("d20#")}
    assert old <= after.stays and "d20#0" in after.stays
    orphans = sum(link["kept_hash"] in _hashes(["d20#0"]).values() for link in before.links.values())
    assert after.record["carried"]["open"] == 1 + orphans and after.record["carried"]["standing"] == len(old)


@pytest.mark.slow
def test_only_deleting_what_nothing_depends_on_compares_nothing(workspace: Workspace) -> None:
    before = Decided(workspace.root)
    (workspace.corpus / "two.jsonl").unlink()
    kept_of_two = {name for name in before.stays if name.startswith("e")}
    run(workspace)
    after = Decided(workspace.root)
    after.check()
    assert before.stays - kept_of_two <= after.stays
    if not any(link["kept_hash"] in _hashes(sorted(kept_of_two)).values() for link in before.links.values()):
        assert after.record["comparisons"] == 0 and after.record["carried"]["open"] == 0


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_ends_the_same(workspace: Workspace, real_texts: list[str]) -> None:
    write(workspace, "three", {f"f{number:02d}": reworded(real_texts[number]) for number in range(20, 30)})
    other = Workspace(workspace.folder.parent / "other", workspace.settings)
    shutil.copytree(workspace.folder, other.folder)
    run(workspace)
    run(other)
    done = Decided(other.root)
    for version in (other.root / "indexes/test/versions").iterdir():
        if json.loads((version / "manifest.json").read_text())["lineage"]["stages"]["kept"] == done.kept:
            shutil.rmtree(version)
    (other.root / f"stages/kept/{done.kept}/kept.json").unlink()
    (path,) = (other.root / "stages/standing").glob("*")
    for one in sorted(path.glob("*.parquet"))[:1]:
        one.unlink()
    shutil.rmtree(other.root / f"stages/removal/{done.stages['removal']}")
    plan = next(stage for stage in other.pipeline(deduplicate=RULE).plan().stages if stage.name == "kept")
    stay = len(Decided(other.root).stays)
    assert plan.todo and plan.why == f"10 passages of new or changed fragments to compare with {stay} that stay"
    run(other)
    again, whole = Decided(other.root), Decided(workspace.root)
    assert again.stays == whole.stays == done.stays and again.links == whole.links
    assert again.kept == done.kept


@pytest.mark.slow
def test_clean_up_leaves_what_the_next_decision_builds_upon(workspace: Workspace, real_texts: list[str]) -> None:
    write(workspace, "three", {f"f{number:02d}": reworded(real_texts[number]) for number in range(20, 30)})
    run(workspace)
    before = Decided(workspace.root)
    (workspace.root / "indexes/test/aliases/live/00000001.json").unlink()  # what a rollback would return to
    for path in workspace.root.rglob("*"):
        if path.is_file():
            os.utime(path, ns=(0, path.stat().st_mtime_ns - DAY_NS))
    collect_garbage(open_store(str(workspace.root)), 1, 1.0, dry_run=False)
    assert len(list((workspace.root / "stages/kept").glob("*/kept.json"))) == 1
    assert workspace.pipeline(deduplicate=RULE).plan().up_to_date
    write(workspace, "four", {"h0": reworded(real_texts[39]), "h1": "Honey does not spoil."})
    run(workspace)
    after = Decided(workspace.root)
    after.check()
    assert after.record["earlier"] == before.kept and after.record["carried"]["open"] == 2
    assert before.stays < after.stays


@pytest.mark.slow
def test_a_decision_about_vectors_that_clean_up_took_is_not_built_upon(workspace: Workspace) -> None:
    before = Decided(workspace.root)
    folder = workspace.root / f"stages/embeddings/{before.stages['encoded']}"
    of_two, of_one = sorted((folder / f"{name}.parquet" for name in before.record["encoded"].values()), key=_rows)
    assert _rows(of_two) < _rows(of_one)
    (workspace.corpus / "two.jsonl").unlink()
    of_two.unlink()  # what left cannot be compared with what came
    run(workspace)
    after = Decided(workspace.root)
    after.check()
    assert after.record["earlier"] is None and after.record["carried"]["open"] == len(after.vectors)


@pytest.mark.slow
def test_another_seed_decides_on_the_whole_corpus(workspace: Workspace, real_texts: list[str]) -> None:
    write(workspace, "three", {f"f{number:02d}": reworded(real_texts[number], " Please note.") for number in range(15)})
    run(workspace)
    grown = Decided(workspace.root)
    run(workspace, seed=7)
    fresh = Decided(workspace.root)
    assert fresh.record["earlier"] is None and fresh.record["carried"]["open"] == len(fresh.vectors)
    assert fresh.stays != grown.stays and any(name.startswith("f") for name in fresh.stays)
    plan = workspace.pipeline(deduplicate=RULE).plan()
    assert plan.published and next(stage for stage in plan.stages if stage.name == "kept").fingerprint == grown.kept
