"""Versions of a part of the corpus, whose passages have texts in common with passages of other fragments."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.cluster.catalog import Catalog, Reason
from penstock.cluster.fragments import read_fragment
from penstock.cluster.jobs.priorities import PriorityJob
from penstock.cluster.layout import PASSAGES, fragment_path
from penstock.cluster.session import Session
from penstock.cluster.storage import open_store
from penstock.operators.mixed_spaces import QueryMode
from penstock.pipelines import OpenIndex
from penstock.pipelines.backfill_units import find_units, fragments_of
from penstock.pipelines.ledger import StageEntry
from penstock.pipelines.mixed import publish_mixed
from penstock.pipelines.progress import SilentReporter
from penstock.pipelines.running import Part, Report, embed_part, execute, prepare

from .conftest import Workspace

SHARED = "The tide came in over the flats before anybody had thought of the boats that lay there"
OWN = {
    "a": "Grain is milled between two stones of which only the upper one turns all day long",
    "b": "A heron stands in the reeds for hours and then strikes within the blink of an eye",
    "c": "Clockmakers file the teeth of every wheel by hand until the train runs without noise",
    "d": "Nobody knows who first put salt on caramel or why it took them so very long to do",
}
SETTINGS = {
    "passages": {"type": "tokens", "tokens": 12, "overlap": 0},
    "documents__fragment_bytes": 1024,
    "index": {"family": "flat", "shards": 2, "recall": 1.0},
    "evaluate": {"queries": 3},
}


def write(workspace: Workspace, file: int, names: str) -> None:
    """Documents of which a and b begin with the same passages."""
    documents = [document(name, (f"{SHARED}. " if name in "ab" else "") + f"{OWN[name]}.") for name in names]
    workspace.write(f"part-{file}.jsonl", documents)


def document(name: str, text: str) -> dict[str, str]:
    """One that is long enough for its file to be a fragment of its own."""
    return {"id": name, "text": text, "topic": "t", "not kept": "-" * 1024}


def old_version(workspace: Workspace) -> str:
    report = workspace.pipeline(embedding__layers=3, embedding__layers_trained=True).run()
    assert report is not None
    return report.version


def part_version(session: Session, workspace: Workspace, names: str, asked: str = "", **changes: object) -> Report:
    """The version of the new model over the fragments that have passages of these documents, or, where documents are
    asked for, over the slices of fragments with these."""
    pipeline, store = workspace.pipeline(publish={}, **changes), open_store(str(workspace.root))
    plan = pipeline.plan()
    resolved, facts = prepare(plan, pipeline.origin, store, session, SilentReporter())
    stage = resolved.stage_fingerprint(PASSAGES)
    wanted, slices = set(), ()
    if asked:
        job = PriorityJob(store.url, stage, resolved.selection_fingerprint, asked=dict.fromkeys(asked, 1.0))
        units = find_units(session, SilentReporter(), job, facts)
        slices = tuple(unit.facts for unit in units if unit.is_slice)
        wanted = set(fragments_of([unit for unit in units if unit.is_slice]))
    for fact in () if asked else facts:
        table = read_fragment(store, fragment_path(PASSAGES, stage, fact.passages), ["document_id"])
        if set(table.column("document_id").to_pylist()) & set(names):
            wanted.add(fact.passages)
    assert 0 < len(wanted) < len(facts) + len(slices)
    plan, part = replace(plan, resolved=resolved), Part(frozenset(wanted), "upgrades/test/x", slices)
    return execute(plan, pipeline.origin, store, session, SilentReporter(), part)


def texts_of(workspace: Workspace, names: str) -> set[str]:
    """All passages of documents, as the passages stage has them."""
    store, found = open_store(str(workspace.root)), set()
    for path in workspace.root.glob("stages/passages/*/*.parquet"):
        table = read_fragment(store, path.relative_to(workspace.root).as_posix(), ["document_id", "text"])
        found |= {row["text"] for row in table.to_pylist() if row["document_id"] in names}
    return found


@pytest.mark.parametrize(
    ("before", "part", "asked", "answered"),
    [
        # what represents b's passages is embedded, and b is not
        pytest.param("abcd", "ac", "", "abcd", marks=pytest.mark.slow),
        # b is embedded, and what represents some of its passages is not
        pytest.param("abcd", "bd", "", "abcd", marks=pytest.mark.slow),
        ("bcd", "bd", "", "bcd"),  # and nothing in the old version has their text but b itself
        ("abcd", "a", "a", "abcd"),  # a alone, a slice of the only fragment, is embedded: it represents b's passages
    ],
)
def test_no_passage_vanishes_while_its_text_is_in_another_fragment(
    ray_session: Session, tmp_path: Path, before: str, part: str, asked: str, answered: str
) -> None:
    workspace = Workspace(tmp_path, SETTINGS | ({"documents__fragment_bytes": 65_536} if asked else {}))
    for file, names in enumerate(("ac", "bd")):
        write(workspace, file, "".join(name for name in names if name in before))
    old = old_version(workspace)
    write(workspace, 0, "ac")
    catalog = Catalog(open_store(str(workspace.root)), "test")
    new = part_version(ray_session, workspace, part, asked)
    assert new.manifest["part_of"] == "upgrades/test/x" and new.manifest["documents"] == len(part)
    manifest = publish_mixed(ray_session, catalog, "run", old, new.version, None, QueryMode.BOTH)
    with OpenIndex(catalog, "live", manifest) as index:
        rows = index.search("any", 100, rows=True).rows
        assert rows is not None
        found = rows[0].to_pylist()
        links = index.duplicates([row["id"] for row in found]).to_pylist()
    assert len({row["id"] for row in found}) == len(found) == len({row["text"] for row in found})
    assert {row["text"] for row in found} == texts_of(workspace, answered)
    assert manifest["rows"] == len(found) and manifest["duplicates"] == len(links)
    assert manifest["documents"] == len(set(before) | set(part))
    texts = {row["id"]: row["text"] for row in found}
    for link in links:
        assert texts[link["represented_by"]] in texts_of(workspace, link["document_id"])
        assert link["id"] not in texts


def test_fragments_that_are_not_begun_when_the_job_closes_are_left(ray_session: Session, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, dict(SETTINGS))
    for file, names in enumerate(("ac", "bd")):
        write(workspace, file, names)
    pipeline, store = workspace.pipeline(publish={}), open_store(str(workspace.root))
    plan = pipeline.plan()
    resolved, facts = prepare(plan, pipeline.origin, store, ray_session, SilentReporter())
    part = Part(frozenset(fact.passages for fact in facts), "upgrades/test/x")

    def embed(closes_at: float) -> StageEntry:
        resolved_plan = replace(plan, resolved=resolved)
        return embed_part(resolved_plan, pipeline.origin, store, ray_session, SilentReporter(), part, closes_at)

    closed = embed(time.time())
    assert (closed.encoded, closed.rows_out, closed.fragments, closed.fragments_done_before) == (0, 0, 0, 0)
    open_still = embed(time.time() + 600)
    assert open_still.encoded == open_still.rows_out == sum(fact.kept for fact in facts)
    again = embed(time.time())
    kept = sum(fact.kept > 0 for fact in facts)
    assert (again.encoded, again.rows_out, again.fragments_done_before) == (0, open_still.rows_out, kept)


def test_a_part_is_another_version_than_the_whole(ray_session: Session, tmp_path: Path) -> None:
    """Where the fragments outside the part have nothing to embed, vectors are the same, and links are not."""
    workspace = Workspace(tmp_path, dict(SETTINGS))
    write(workspace, 0, "ac")
    workspace.write("part-1.jsonl", [document("z", f"{SHARED}. {OWN['a']}.")])
    whole = workspace.pipeline().run()
    part = part_version(ray_session, workspace, "ac")
    assert whole is not None and whole.version != part.version
    assert whole.manifest["rows"] == part.manifest["rows"]
    assert whole.manifest["duplicates"] > part.manifest["duplicates"] == 0


@pytest.mark.slow
def test_a_part_is_decided_on_by_itself_and_changes_no_later_decision(ray_session: Session, tmp_path: Path) -> None:
    """Deduplication by meaning: the alias points to a mixed version, and the whole is as a fresh run makes it."""
    rule = {"type": "semantic", "similarity": 0.9}
    workspace = Workspace(tmp_path, {**SETTINGS, "deduplicate": rule})
    write(workspace, 0, "ac")
    write(workspace, 1, "bd")
    workspace.write("part-2.jsonl", [document("e", OWN["a"].replace("all day", "every day"))])
    old = old_version(workspace)
    catalog = Catalog(open_store(str(workspace.root)), "test")
    new = part_version(ray_session, workspace, "e")
    mixed = publish_mixed(ray_session, catalog, "run", old, new.version, None, QueryMode.BOTH)
    catalog.move("live", str(mixed["version"]), expected=None, run_id="test", reason=Reason.BACKFILL)
    assert workspace.pipeline().plan().version is None, "nothing is decided about the whole"
    whole = workspace.pipeline().run()
    again = part_version(ray_session, workspace, "e")
    fresh = Workspace(tmp_path, {**workspace.settings, "root": str(tmp_path / "fresh")}).pipeline().run()
    assert whole is not None and fresh is not None
    assert whole.version == fresh.version and again.version == new.version
    assert whole.manifest["lineage"]["stages"] == fresh.manifest["lineage"]["stages"]
