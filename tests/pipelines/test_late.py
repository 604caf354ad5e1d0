"""`passages.type: late` from the corpus to the published index."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from penstock.operators.models import resolve_model
from penstock.pipelines.history import Status
from penstock.pipelines.loading import PipelineFileInvalid

from .conftest import MODEL, Document, Workspace, read_ledger

pytestmark = pytest.mark.usefixtures("ray_session")
LATE = {"type": "late", "tokens": 64, "overlap": 8}
WINDOW = 254  # tokens of the model beside its special ones


def run(workspace: Workspace, **changes: object) -> dict[str, dict[str, object]]:
    report = workspace.pipeline(**changes).run()
    assert report is not None and report.status is Status.PUBLISHED
    return read_ledger(workspace.root)


def by_hand(text: str, start: int, end: int) -> np.ndarray:
    """The mean over the tokens within [start, end) of their vectors in the whole document, of length 1."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = resolve_model(MODEL)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    found = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
    spans, ids = found.pop("offset_mapping")[0], found["input_ids"][0]
    assert len(ids) <= WINDOW + 2
    with torch.inference_mode():
        hidden = model(**found).last_hidden_state[0]
    inside = (spans[:, 0] >= start) & (spans[:, 1] <= end) & (spans[:, 1] > 0)
    mean = hidden[inside].mean(dim=0).numpy()
    vector: np.ndarray = mean / np.linalg.norm(mean)
    return vector


def test_late_chunking_end_to_end(workspace: Workspace, documents: list[Document]) -> None:
    long = " ".join(document["text"] for document in documents[:12])  # beyond the model's window
    workspace.write("part-3.jsonl", [{"id": "long", "text": long, "topic": "t0"}])
    plain = run(workspace)
    plain_vectors = workspace.published()

    # Another type embeds everything again: the passages are the same, their vectors are others.
    plan = workspace.pipeline(passages=LATE).plan()
    assert [stage.why for stage in plan.stages if stage.name == "embeddings"] == [
        "changed parameter: passages.type none → late"
    ]
    late = run(workspace, passages=LATE)
    vectors = workspace.published()
    assert set(vectors) == set(plain_vectors)
    assert late["embeddings"]["encoded"] == late["embeddings"]["rows_out"] == len(vectors)
    assert late["embeddings"]["truncated_tokens"] == 0
    assert plain["embeddings"]["encoded"] == len(plain_vectors)

    # The published vectors are those that transformers gives.
    rows = [row for path in workspace.root.glob("stages/passages/*/*.documents.parquet") for row in rows_beside(path)]
    texts = {document["id"]: document["text"] for document in documents} | {"long": long}
    assert {row["document_id"] for row in rows} == set(texts)
    parts = [row for row in rows if row["document_id"] != "long" and row["ordinal"] == 1][:5]
    assert parts
    for row in parts:
        expected = by_hand(texts[row["document_id"]], row["start"], row["end"])
        found = np.array(vectors[row["passage_id"]])
        assert np.abs(found - expected).max() < 1e-3  # stored in float16
        assert found @ plain_vectors[row["passage_id"]] < 0.999
    assert sum(name.startswith("long#") for name in vectors) > 8

    # A second run has nothing to do.
    assert workspace.pipeline(passages=LATE).plan().up_to_date
    assert workspace.pipeline(passages=LATE).run() is None

    # A change anywhere in a document is one of the context of all its passages, and of no other's.
    changed = [dict(document) for document in documents[20:40]]
    changed[7]["text"] += " And one more sentence."
    workspace.write("part-1.jsonl", changed)
    again = run(workspace, passages=LATE, documents__fragment_bytes=1_000_000)  # other fragments take known vectors
    own = [name for name in workspace.published() if name.rpartition("#")[0] == changed[7]["id"]]
    assert again["embeddings"]["encoded"] == len(own)
    assert again["embeddings"]["reused"] == again["embeddings"]["rows_out"] - len(own)


def rows_beside(path: Path) -> list[dict[str, object]]:
    """The passages whose documents lie in this file."""
    return pq.read_table(path.with_name(path.name.replace(".documents", ""))).to_pylist()  # type: ignore[no-any-return]


def test_a_model_without_mean_pooling_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(resolve_model(MODEL), model, copy_function=os.symlink)
    (model / "1_Pooling/config.json").unlink()
    pooling = {"word_embedding_dimension": 384, "pooling_mode_cls_token": True}
    (model / "1_Pooling/config.json").write_text(json.dumps(pooling))
    with pytest.raises(
        PipelineFileInvalid, match=r"passages.type: \(late\) needs a model of Transformer, Pooling\(mean"
    ):
        workspace.pipeline(passages=LATE, embedding__model=str(model)).plan()
    workspace.pipeline(embedding__model=str(model)).plan()


def test_windows_beyond_the_model_are_no_reason_to_warn(workspace: Workspace) -> None:
    wide = {"type": "late", "tokens": 400}
    assert not workspace.pipeline(passages=wide).plan().resolved.warnings
    assert workspace.pipeline(passages={**wide, "type": "tokens"}).plan().resolved.warnings
