"""Deduplication of whole documents from the pipeline file to a search."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from penstock.cluster.jobs import removal
from penstock.cluster.session import Session
from penstock.operators.identity import row_hashes
from penstock.pipelines import Pipeline, open_index
from penstock.pipelines.cli import app
from penstock.pipelines.loading import PipelineFileInvalid

from .conftest import Workspace, read_ledger

SIMILARITY, SHARE = 0.93, 0.6
RULE = {"type": "semantic", "similarity": SIMILARITY, "level": "document", "share": SHARE, "keep": "longest"}


def record_of(root: Path) -> dict[str, Any]:
    path = max(root.glob("stages/kept/*/kept.json"), key=lambda path: path.stat().st_mtime_ns)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def made(ray_session: Session, tmp_path_factory: pytest.TempPathFactory, real_texts: list[str]) -> Workspace:
    """Documents of several passages; copies of them, whole, in part and with more than half of something else."""
    workspace = Workspace(tmp_path_factory.mktemp("whole"), {"index": {"family": "flat", "shards": 2, "recall": 1.0}})
    texts = [text for text in real_texts if len(text) > 150]
    base = {f"a{number}": "\n\n".join(texts[4 * number : 4 * number + 4]) for number in range(8)}
    copies = {f"b{number}": base[f"a{number}"] for number in range(3)}
    parts = {f"c{number}": base[f"a{number}"][: len(base[f"a{number}"]) // 2] for number in range(3, 6)}
    mixed = {"m0": "\n\n".join([texts[0], *texts[40:44]])}
    documents = [{"id": key, "text": text, "topic": key[0]} for key, text in (base | copies | parts | mixed).items()]
    workspace.write("one.jsonl", documents[:7])
    workspace.write("two.jsonl", documents[7:])
    report = workspace.pipeline(deduplicate=RULE).run()
    assert report is not None
    return workspace


def passages_of(root: Path) -> dict[str, tuple[str, int]]:
    """Passage id → document and tokens."""
    columns = ["passage_id", "document_id", "tokens"]
    tables = [pq.read_table(path, columns=columns) for path in root.glob("stages/passages/*/*.parquet")]
    return {row["passage_id"]: (row["document_id"], row["tokens"]) for table in tables for row in table.to_pylist()}


def expected(root: Path, similarity: float = SIMILARITY) -> tuple[set[str], dict[tuple[str, str], float]]:
    """The documents that stay by a choice one by one, the longest first, and the share of each that is in another."""
    passages, vectors = passages_of(root), {}
    for path in root.glob(f"stages/embeddings/{_encoded(root)}/*.parquet"):
        table = pq.read_table(path)
        vectors |= dict(zip(table.column("passage_id").to_pylist(), table.column("embedding").to_pylist(), strict=True))
    assert set(vectors) == set(passages)  # passages with the same text were not left out before
    names = sorted({document for document, _ in passages.values()})
    rows = {name: [key for key, (document, _) in passages.items() if document == name] for name in names}
    unit = {key: np.array(row, np.float32) / np.linalg.norm(row) for key, row in vectors.items()}
    stacked = {name: np.stack([unit[key] for key in rows[name]]) for name in names}
    shares = {
        (one, other): float(((stacked[one] @ stacked[other].T).max(axis=1) >= similarity).mean())
        for one in names
        for other in names
        if one != other
    }
    tokens = {name: sum(passages[key][1] for key in rows[name]) for name in names}
    stays: set[str] = set()
    for name in sorted(names, key=lambda name: (-tokens[name], int(row_hashes([name])[0]))):
        if not any(shares[name, other] >= SHARE for other in stays):
            stays.add(name)
    return stays, shares


def _encoded(root: Path) -> str:
    manifest = max(root.glob("indexes/test/versions/*/manifest.json"), key=lambda path: path.stat().st_mtime_ns)
    return str(json.loads(manifest.read_text())["lineage"]["stages"]["encoded"])


def test_documents_stay_or_go_as_a_whole_and_as_a_choice_one_by_one_says(made: Workspace) -> None:
    stays, shares = expected(made.root)
    passages = passages_of(made.root)
    published = set(made.published())
    assert published == {key for key, (document, _) in passages.items() if document in stays}
    gone = {document for document, _ in passages.values()} - stays
    assert {"c3", "c4", "c5"} <= gone and "m0" in stays and len(gone & {"a0", "b0"}) == 1
    assert all(any(shares[one, other] >= SHARE for other in stays) for one in gone)
    record = record_of(made.root)
    assert record["removed_documents"] == len(gone) and record["removed"] == len(passages) - len(published)
    assert read_ledger(made.root)["selection"]["dropped"] == {}
    assert read_ledger(made.root)["kept"]["dropped"] == {"duplicate_meaning": record["removed"]}
    assert made.pipeline(deduplicate=RULE).plan().up_to_date


def test_passages_that_went_are_linked_to_similar_ones_of_one_document(made: Workspace) -> None:
    stays, shares = expected(made.root)
    passages = passages_of(made.root)
    with open_index(str(made.root), "live") as index:
        links = index.duplicates(sorted(made.published())).to_pylist()
    kept_for: dict[str, set[str]] = {}
    for link in links:
        assert link["similarity"] >= np.float32(SIMILARITY) and link["document_id"] not in stays
        kept_for.setdefault(link["document_id"], set()).add(passages[link["represented_by"]][0])
    for one, others in kept_for.items():
        (other,) = others
        count = sum(document == one for document, _ in passages.values())
        linked = sum(link["document_id"] == one for link in links)
        assert shares[one, other] >= SHARE and linked == round(shares[one, other] * count)
    assert set(kept_for) == {document for document, _ in passages.values()} - stays


def decisions(root: Path) -> tuple[set[str], dict[str, str]]:
    """The documents that stay, and each that went with the one that it went for, by the newest decision."""
    kept = max(root.glob("stages/kept/*/kept.json"), key=lambda path: path.stat().st_mtime_ns).parent
    names = sorted({document for document, _ in passages_of(root).values()})
    by_hash = dict(zip(row_hashes(names).tolist(), names, strict=True))
    rows = [row for path in kept.glob("documents-*.parquet") for row in pq.read_table(path).to_pylist()]
    goes = {by_hash[row["row_hash"]]: by_hash[row["kept_hash"]] for row in rows if row["kept_hash"] != row["row_hash"]}
    return {by_hash[row["row_hash"]] for row in rows} - goes.keys(), goes


def test_earlier_decisions_stand_and_what_a_deleted_document_stood_for_comes_back(
    made: Workspace, tmp_path: Path
) -> None:
    shutil.copytree(made.folder, tmp_path / "copy")
    workspace = Workspace(tmp_path / "copy", made.settings)
    stays, goes = decisions(workspace.root)
    before, passages = record_of(workspace.root), passages_of(workspace.root)
    deleted = next(kept for gone, kept in sorted(goes.items()) if gone[0] in "ab" and kept[0] in "ab")
    rows = [json.loads(line) for path in sorted(workspace.corpus.glob("*")) for line in path.read_text().splitlines()]
    longer = {**next(row for row in rows if row["id"] == "a6"), "id": "z0"}
    longer["text"] = f"A word before it.\n\n{longer['text']}"  # which would come first
    workspace.write("three.jsonl", [longer, {"id": "z1", "text": "An elephant never forgets a face.", "topic": "z"}])
    for name in ("one.jsonl", "two.jsonl"):
        lines = (workspace.corpus / name).read_text().splitlines()
        workspace.write(name, [row for row in map(json.loads, lines) if row["id"] != deleted])
    workspace.pipeline(deduplicate=RULE).run()
    now, went = decisions(workspace.root)
    assert now == stays - {deleted} | {"z1", *(gone for gone, kept in goes.items() if kept == deleted)}
    assert went == {gone: kept for gone, kept in goes.items() if kept != deleted} | {"z0": "a6"}
    assert {document_of(name) for name in workspace.published()} == now
    record, counts = (
        record_of(workspace.root),
        Counter(document for document, _ in passages_of(workspace.root).values()),
    )
    open_ = {"z0", "z1", *(gone for gone, kept in goes.items() if kept == deleted)}
    assert record["carried_documents"] == {"standing": len(stays) - 1, "gone": len(went) - 1, "open": len(open_)}
    standing = sum(counts[name] for name in stays - {deleted})
    new = sum(counts[name] for name in open_)
    assert record["carried"]["standing"] == standing and record["carried"]["open"] == new
    assert record["comparisons"] == (new - record["equal_rows"]) * standing + _pairs(new - record["equal_rows"])
    assert before["comparisons"] == _pairs(len(passages) - before["equal_rows"]) and before["carried_documents"] is None
    assert record["removed_documents"] == len(went) and record["removed"] == sum(counts[name] for name in went)
    assert workspace.pipeline(deduplicate=RULE).plan().up_to_date
    max(workspace.root.glob("stages/kept/*/documents-*"), key=lambda path: path.stat().st_mtime_ns).unlink()
    assert not workspace.pipeline(deduplicate=RULE).plan().up_to_date  # which the next decision would need


def document_of(passage: str) -> str:
    return passage.rpartition("#")[0]


def _pairs(rows: int) -> int:
    return rows * (rows - 1) // 2


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"type": "semantic", "share": 0.5}, "share (0.5) belongs to level document, but level is passage"),
        ({"type": "exact", "level": "document"}, "level belongs to type semantic"),
        ({"type": "semantic", "level": "document", "share": 0.0}, "share"),
    ],
)
def test_what_cannot_be_is_refused(made: Workspace, rule: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineFileInvalid) as refused:
        Pipeline.parse(yaml.safe_dump({**yaml.safe_load(made.yaml()), "deduplicate": rule})).plan()
    assert message in str(refused.value)


@pytest.mark.parametrize("judged", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_curve_of_documents_is_what_runs_remove(
    made: Workspace, tmp_path: Path, judged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made.folder, tmp_path / "copy")
    workspace = Workspace(tmp_path / "copy", made.settings)
    if not judged:  # in several buckets, of which lower thresholds would need more
        monkeypatch.setattr(removal, "BUCKET_PAIRS", record_of(workspace.root)["pairs"])
        for stage in ("removal", "document-pairs"):  # in one bucket
            shutil.rmtree(workspace.root / "stages" / stage)
    stays, goes = decisions(workspace.root)
    texts = {
        row["id"]: row["text"]
        for path in workspace.corpus.glob("*")
        for row in map(json.loads, path.read_text().splitlines())
    }
    queries, relevance = tmp_path / "queries.jsonl", tmp_path / "qrels.tsv"
    asked = sorted(goes)
    lines = [json.dumps({"id": f"q{name}", "text": texts[name].split("\n\n")[0]}) for name in asked]
    queries.write_text("\n".join(lines))
    relevance.write_text("".join(f"q{name}\t{name}\t1\n" for name in asked))
    evaluate = {"queries": str(queries), "k": 3} | ({"relevance": str(relevance)} if judged else {})
    drawn, page = tmp_path / "curve.svg", tmp_path / "pairs.html"
    path = workspace.file(deduplicate=RULE, evaluate=evaluate)
    done = CliRunner().invoke(app, ["dedup-curve", str(path), "--plot", str(drawn), "--page", str(page), "--json"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout.strip().splitlines()[-1])
    points = {point["similarity"]: point for point in record["points"]}
    rows, here = passages_of(workspace.root), points[SIMILARITY]
    ends = {path.name.split("-")[1] for path in workspace.root.glob("stages/pairs/*/ends-*-pairs-*")}
    assert ends == {"00001"} if judged else "00001" in ends and len(ends) == 2  # of the run before, and of the curve
    assert record["level"] == "document" and record["rows"] == len(rows)
    assert record["documents"] == len(stays) + len(goes) and here["removed_documents"] == len(goes)
    assert here["removed"] == sum(document in goes for document, _ in rows.values())
    assert here["share"] == round(here["removed"] / len(rows), 6)
    assert here["share_of_documents"] == round(len(goes) / record["documents"], 6)
    assert here["saved_bytes"] == here["removed"] * 384 * 2
    for similarity in (0.85, 0.97):
        left = expected(workspace.root, similarity)[0]
        assert points[similarity]["removed_documents"] == record["documents"] - len(left)
    quality = record["quality"]
    assert quality["queries"] == len(asked) and quality["relevant"] == ("judged" if judged else "nearest")
    if judged:  # none of them is left to be found, and for each its document is
        assert here["recall"] == 0.0 < here["recall_represented"] and here["ndcg"] == 0.0 < here["ndcg_represented"]
        assert here["recall_represented"] == pytest.approx(quality["before"]["recall"], abs=0.15)
    else:
        assert here["recall"] < here["recall_represented"] <= 1.0 == quality["before"]["recall"]
    text = drawn.read_text()
    assert text.count("<polyline") == (6 if judged else 4) and f"{len(goes)} of {record['documents']} documents" in text
    assert "documents removed" in page.read_text() and "by which documents go whole" in page.read_text()
    shown = CliRunner().invoke(app, ["dedup-curve", str(path)])
    assert "Documents go whole" in shown.stdout and f"{here['share_of_documents']:.2%}" in shown.stdout
