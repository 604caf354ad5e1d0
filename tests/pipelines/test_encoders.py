"""What a pipeline does with its encoder: precision, dimension, layers, prompts, similarity, poison."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from penstock.operators.models import resolve_model
from penstock.pipelines import open_index
from penstock.pipelines.history import Status
from penstock.pipelines.loading import PipelineFileInvalid
from penstock.pipelines.running import Report

from .conftest import MODEL, Document, Workspace

pytestmark = pytest.mark.usefixtures("ray_session")
FRAGILE = """
import os

import torch


class Fragile(torch.nn.Module):
    '''Passes features through, but for one token id it aborts, and for another it raises.'''

    def forward(self, features, **kwargs):
        ids = features["input_ids"]
        if (ids == {crash}).any():
            os.abort()
        if (ids == {fail}).any():
            raise ValueError("this token is refused")
        return features

    def save(self, *args, **kwargs):
        pass

    @classmethod
    def load(cls, *args, **kwargs):
        return cls()
"""


def published(workspace: Workspace, **changes: Any) -> Report:  # noqa: ANN401
    report = workspace.pipeline(**changes).run()
    assert report is not None and report.status is Status.PUBLISHED
    return report


def model_copy(folder: Path, **configuration: object) -> Path:
    """The model's folder with other settings in config_sentence_transformers.json."""
    shutil.copytree(resolve_model(MODEL), folder, copy_function=os.symlink)
    path = folder / "config_sentence_transformers.json"
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(configuration))
    return folder


def settings(**changes: object) -> dict[str, object]:
    return {"model": MODEL, "precision": "float32", "batch_tokens": 2048, "workers": {"count": 1}, **changes}


def test_auto_decides_once_and_keeps_to_it(workspace: Workspace, documents: list[Document]) -> None:
    auto = {"embedding": settings(precision="auto")}
    plan = workspace.pipeline(**auto).plan()
    assert next(stage for stage in plan.stages if stage.name == "embeddings").fingerprint is None
    report = published(workspace, **auto)
    (record,) = [json.loads(path.read_text()) for path in (workspace.root / "encoders").iterdir()]
    assert report.agreement == record
    chosen = next(one for one in record["candidates"] if one["precision"] == record["chosen"])
    agreeing = [one for one in record["candidates"] if one["agrees"]]
    assert chosen["tokens_per_s"] == max(one["tokens_per_s"] for one in agreeing)
    assert chosen["mean_cosine"] >= 0.9999 and chosen["min_cosine"] >= 0.999
    assert report.manifest["model"]["precision"] == record["chosen"]
    (stage_record,) = (workspace.root / "stages/embeddings").glob("*/record.json")
    assert json.loads(stage_record.read_text())["agreement"] == record

    assert workspace.pipeline(**auto).run() is None
    changed = [dict(document) for document in documents[:20]]
    changed[3]["text"] = "Another sentence, of which the decision is not made anew."
    workspace.write("part-0.jsonl", changed)
    again = published(workspace, **auto)
    assert again.agreement == record
    assert next(entry for entry in again.entries if entry.stage == "embeddings").encoded == 1


def test_float32_runs_no_check(workspace: Workspace) -> None:
    assert published(workspace).agreement is None
    assert not (workspace.root / "encoders").exists()


@pytest.mark.slow
def test_shorter_vectors_are_taken_from_stored_ones(workspace: Workspace) -> None:
    published(workspace, embedding=settings(store="float32"))
    full = workspace.published()
    report = published(workspace, embedding=settings(store="float32", dimension=64))
    entry = next(entry for entry in report.entries if entry.stage == "embeddings")
    assert (entry.encoded, entry.reused) == (0, len(full))
    for name, vector in workspace.published().items():
        shorter = np.array(full[name][:64])
        assert np.allclose(vector, shorter / np.linalg.norm(shorter), atol=1e-6)
    assert report.agreement is not None
    assert 0.1 < report.agreement["dimension_overlap_at_10"] < 1.0
    longer = published(workspace, embedding=settings(store="float32", dimension=65))
    assert next(entry for entry in longer.entries if entry.stage == "embeddings").encoded == 0
    assert len(open_index(str(workspace.root), "live").encode(["a query"])[0]) == 65


def test_layers_need_a_word_that_they_were_trained(workspace: Workspace) -> None:
    with pytest.raises(PipelineFileInvalid, match=r"layers \(3\) gives useless vectors"):
        workspace.pipeline(embedding=settings(layers=3))
    with pytest.raises(PipelineFileInvalid, match=r"embedding.layers: \(7\) must be at most the model's 6"):
        workspace.pipeline(embedding=settings(layers=7, layers_trained=True)).plan()


@pytest.mark.slow
def test_fewer_layers_are_another_space(workspace: Workspace) -> None:
    published(workspace)
    whole = workspace.published()
    report = published(workspace, embedding=settings(layers=3, layers_trained=True))
    assert report.manifest["model"]["layers"] == 3
    assert next(entry for entry in report.entries if entry.stage == "embeddings").encoded == len(whole)
    assert all(np.dot(vector, whole[name]) < 0.99 for name, vector in workspace.published().items())


def test_prompts_are_taken_by_the_names_that_the_model_gives_them(workspace: Workspace, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    prompts = {"query": "find: ", "code": "a piece of code: ", "text": "a piece of text: "}
    model = model_copy(tmp_path / "model", prompts=prompts)
    names = {"document": "text", "query": "code"}
    with pytest.raises(PipelineFileInvalid, match=r"\(texts\) must be a prompt of the model, which has: code, query"):
        workspace.pipeline(embedding=settings(model=str(model), prompt_names={"document": "texts"})).plan()
    report = published(workspace, embedding=settings(model=str(model), prompt_names=names, store="float32"))
    assert report.manifest["model"]["document_prompt"] == prompts["text"]
    index = open_index(str(workspace.root), "live")
    plain = SentenceTransformer(str(model), device="cpu")
    expected = plain.encode(["what is said here"], prompt_name="code", normalize_embeddings=True)
    assert np.allclose(index.encode(["what is said here"]), expected, atol=2e-6)
    found = index.search("what is said here", k=1, rows=True)
    assert found.rows is not None
    text = found.rows[0].column("text")[0].as_py()
    vector = plain.encode([text], prompt_name="text", normalize_embeddings=True)[0]
    assert np.allclose(workspace.published()[found.ids[0][0]], vector, atol=2e-6)


def test_the_models_own_similarity_is_the_default(workspace: Workspace, tmp_path: Path) -> None:
    model = model_copy(tmp_path / "model", similarity_fn_name="dot")
    assert workspace.pipeline(embedding=settings(model=str(model))).plan().resolved.metric.value == "inner_product"
    other = model_copy(tmp_path / "other", similarity_fn_name="euclidean")
    plan = workspace.pipeline(embedding=settings(model=str(other))).plan()
    assert plan.resolved.metric.value == "cosine"
    assert any("states euclidean distance" in warning for warning in plan.resolved.warnings)


@pytest.mark.slow
def test_a_pool_that_may_shrink_gives_the_same_vectors(workspace: Workspace) -> None:
    published(workspace)
    fixed = workspace.published()
    report = published(workspace, embedding=settings(workers={"min": 1, "max": 2, "timeout_s": 60.0}, store="float32"))
    assert report.encoder is not None and report.encoder["tokens"] > 0
    assert all(np.allclose(vector, fixed[name], atol=1e-3) for name, vector in workspace.published().items())


def test_texts_that_break_the_model_are_dead_letters_and_their_neighbours_are_embedded(
    workspace: Workspace, documents: list[Document], tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    source = resolve_model(MODEL)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    crash, fail = (tokenizer.token_to_id(word) for word in ("volcano", "harbour"))
    model = model_copy(tmp_path / "model")
    modules = json.loads((model / "modules.json").read_text())
    (model / "modules.json").unlink()
    modules.append({"idx": 9, "name": "9", "path": "9_Fragile", "type": "fragile.Fragile"})
    (model / "9_Fragile").mkdir()
    (model / "modules.json").write_text(json.dumps(modules))
    (model / "fragile.py").write_text(FRAGILE.format(crash=crash, fail=fail))
    assert not any(word in document["text"].lower() for document in documents for word in ("volcano", "harbour"))
    poison = [
        {"id": "crashes", "text": "A volcano takes the whole house with it.", "topic": "x"},
        {"id": "fails", "text": "The harbour is refused.", "topic": "x"},
    ]
    workspace.write("part-9.jsonl", poison)
    report = published(
        workspace,
        embedding=settings(model=str(model), trust_remote_code=True),
        gate={"recall": 1.0, "max_dropped_fraction": 0.5},
    )
    entry = next(entry for entry in report.entries if entry.stage == "embeddings")
    assert entry.dropped == {"encoder_crash": 1, "encoder_error": 1}
    assert {name.rpartition("#")[0] for name in workspace.published()} == {document["id"] for document in documents}
    (path,) = workspace.root.glob(f"runs/{report.run_id}/dead-letters.parquet")
    letters = {row["document_id"]: row for row in pq.read_table(path).to_pylist()}
    assert "SIGABRT" in letters["crashes"]["detail"]
    assert "this token is refused" in letters["fails"]["detail"]
    assert report.encoder is not None and report.encoder["restarts"] >= 1
