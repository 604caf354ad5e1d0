"""Deduplication of whole documents from the pipeline file to a search."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from penstock.cluster.session import Session
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


def expected(root: Path) -> tuple[set[str], dict[tuple[str, str], float]]:
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
        (one, other): float(((stacked[one] @ stacked[other].T).max(axis=1) >= SIMILARITY).mean())
        for one in names
        for other in names
        if one != other
    }
    tokens = {name: sum(passages[key][1] for key in rows[name]) for name in names}
    from penstock.operators.identity import row_hashes

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


@pytest.mark.slow
def test_a_new_document_is_judged_with_all_others(made: Workspace, tmp_path: Path) -> None:
    shutil.copytree(made.folder, tmp_path / "copy")
    workspace = Workspace(tmp_path / "copy", made.settings)
    row = json.loads((workspace.corpus / "one.jsonl").read_text().splitlines()[5])
    workspace.write("three.jsonl", [{**row, "id": "z0"}])
    workspace.pipeline(deduplicate={**RULE, "keep": "first"}).run()
    record = record_of(workspace.root)
    assert record["carried"]["open"] == record["rows"] and record["earlier"] is None
    documents = {passages_of(workspace.root)[key][0] for key in workspace.published()}
    assert "z0" not in documents and row["id"] in documents


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


def test_there_is_no_curve_of_documents(made: Workspace) -> None:
    refused = CliRunner().invoke(app, ["dedup-curve", str(made.file(deduplicate=RULE))])
    assert isinstance(refused.exception, PipelineFileInvalid) and "(document) must be passage" in str(refused.exception)
