"""A new model tried on a published index: the sample, the bridges, and what they say, with real models."""

import json
import re
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from penstock.cluster.layout import EMBEDDINGS, PASSAGES
from penstock.cluster.session import Session
from penstock.cluster.storage import open_store
from penstock.operators.bridging import Direction, WrongSpace
from penstock.operators.encoding import ModelMismatch
from penstock.operators.models import resolve_model
from penstock.pipelines import Pipeline, canary_sample
from penstock.pipelines.bridges import answers_through_bridge, bridge_paths, fit_bridges, read_bridge, sample_residuals
from penstock.pipelines.canary import canary
from penstock.pipelines.canary_sample import Canary, TakenSample
from penstock.pipelines.cli import EXIT_GATE, app
from penstock.pipelines.history import new_run_id
from penstock.pipelines.model_pair import ModelPair, published_manifest, refuse_other_model
from penstock.pipelines.planning import make_plan, resolve
from penstock.pipelines.progress import SilentReporter
from penstock.pipelines.running import Run
from penstock.pipelines.upgrade_pages import canary_page

from .conftest import MODEL, Workspace, published_vectors

DOCUMENTS, QUERIES, DRAWN, DIMENSION = 150, 60, 110, 32
SEED = 3


@pytest.fixture(scope="module")
def rotated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, the components that are kept of its vectors rotated by a layer of its own: the same space up to
    rotation."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense

    folder = tmp_path_factory.mktemp("rotated") / "model"
    model = SentenceTransformer(str(resolve_model(MODEL)), device="cpu")
    turn = np.eye(384, dtype=np.float32)
    turn[:DIMENSION, :DIMENSION] = np.linalg.qr(np.random.default_rng(0).normal(size=(DIMENSION, DIMENSION)))[0]
    dense = Dense(384, 384, bias=False, activation_function=torch.nn.Identity())
    dense.linear.weight.data = torch.tensor(turn)
    modules = list(model)
    SentenceTransformer(modules=[*modules[:2], dense, *modules[2:]]).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def made(ray_session: Session, tmp_path_factory: pytest.TempPathFactory, real_texts: list[str]) -> Workspace:
    """A published index of docstrings, the first lines of some of which ask for the rest."""
    workspace = Workspace(tmp_path_factory.mktemp("upgrade"))
    heads: dict[str, str] = {}
    for text in real_texts:
        head, _, rest = text.strip().partition("\n")
        if rest.strip() and len(head.split()) > 2:
            heads.setdefault(head, rest.strip())
    items = list({rest: (head, rest) for head, rest in heads.items()}.values())[:DOCUMENTS]
    documents = [{"id": f"d{row:03d}", "text": rest, "topic": "t"} for row, (_, rest) in enumerate(items)]
    for part in range(3):
        workspace.write(f"part-{part}.jsonl", documents[part::3])
    workspace.write("part-3.jsonl", [{**documents[0], "id": "z-copy"}])  # which is left out
    queries = [{"id": f"q{row}", "text": head} for row, (head, _) in enumerate(items[:QUERIES])]
    (workspace.folder / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    (workspace.folder / "judged.tsv").write_text("".join(f"q{row}\td{row:03d}\t1\n" for row in range(QUERIES)))
    workspace.settings = {
        "evaluate__queries": str(workspace.folder / "queries.jsonl"),
        "evaluate__relevance": str(workspace.folder / "judged.tsv"),
        "passages__tokens": 48,
        "embedding__dimension": DIMENSION,
        "documents__fragment_bytes": 1_000_000,
    }
    assert workspace.pipeline().run() is not None
    return workspace


def taking(made: Workspace, session: Session, new: Pipeline) -> Canary:
    store, old = open_store(str(made.root)), made.pipeline()
    before = resolve(old.config, old.origin)
    plan = make_plan(resolve(new.config, new.origin), store, 0)
    run = Run(plan.resolved, new.origin, store, session, SilentReporter(), new_run_id("test"))
    _, facts = run.prepare()
    pair = ModelPair(before, run.resolved, published_manifest(before, store))
    return Canary(session, store, SilentReporter(), new.origin, run.run_id, pair, facts, DRAWN, SEED)


@pytest.fixture(scope="module")
def taken(made: Workspace, ray_session: Session, rotated: Path) -> TakenSample:
    return taking(made, ray_session, made.pipeline(embedding__model=str(rotated))).take()


@pytest.fixture(scope="module")
def bridges(made: Workspace, ray_session: Session, taken: TakenSample) -> dict[str, Any]:
    return fit_bridges(ray_session, open_store(str(made.root)), SilentReporter(), taken)


def embedded(root: Path) -> dict[str, list[int]]:
    """Embeddings stage → rows of its fragments."""
    return {
        folder.name: sorted(pq.read_metadata(path).num_rows for path in folder.glob("*.parquet"))
        for folder in (root / "stages/embeddings").iterdir()
    }


def test_the_sample_is_drawn_by_hash_and_holds_judged_documents(
    made: Workspace, ray_session: Session, taken: TakenSample
) -> None:
    about, paired = taken.about, taken.paired
    assert about["drawn"] == DRAWN and about["without_vector"] == 0
    published = {name.partition("#")[0] for name in published_vectors(made.root)}
    judged = {f"d{row:03d}" for row in range(QUERIES)} & published  # a text that is there twice stays once
    assert set(paired.query_ids) == {f"q{int(name[1:])}" for name in judged} and len(judged) > QUERIES - 5
    halves = len(judged) // 2, len(judged) - len(judged) // 2
    told = about["queries"]
    assert told == {"from": "evaluate.queries", "judged": True, "fitting": halves[0], "judging": halves[1]}
    assert judged <= set(paired.document_ids) <= published
    assert len(paired.document_ids) == DRAWN + about["of_judged_documents"] < about["of_passages"]
    assert paired.old.documents.shape == (len(paired.document_ids), DIMENSION)
    lengths = np.linalg.norm(paired.new.documents, axis=1)
    assert np.allclose(lengths, 1, atol=1e-6)


def test_both_models_vectors_are_of_the_same_texts(taken: TakenSample) -> None:
    """A rotation keeps all products: any row out of place would change one."""
    old, new = taken.paired.old, taken.paired.new
    assert np.allclose(old.documents @ old.documents.T, new.documents @ new.documents.T, atol=3e-3)
    assert np.allclose(old.queries @ old.documents.T, new.queries @ new.documents.T, atol=3e-3)
    assert not np.allclose(old.documents, new.documents, atol=0.1)


def test_nothing_is_embedded_twice(
    made: Workspace, ray_session: Session, rotated: Path, taken: TakenSample, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = embedded(made.root)
    again = taking(made, ray_session, made.pipeline(embedding__model=str(rotated)))
    repeated = again.take()
    assert repeated.fingerprint == taken.fingerprint and embedded(made.root) == before
    assert repeated.about["throughput"] == taken.about["throughput"]
    assert repeated.paired.document_ids == taken.paired.document_ids
    assert np.array_equal(repeated.paired.new.documents, taken.paired.new.documents)
    rates = taken.about["throughput"]
    assert rates["encoded"] == len(taken.paired.document_ids) and rates["tokens_per_s_by_worker"] > 0


@pytest.mark.slow
def test_a_later_run_takes_the_samples_vectors(made: Workspace, rotated: Path, taken: TakenSample) -> None:
    report = made.pipeline(embedding__model=str(rotated), publish__alias="next").run()
    assert report is not None
    entry = next(one for one in report.entries if one.stage == EMBEDDINGS)
    assert entry.reused == len(taken.paired.document_ids)
    assert entry.encoded == entry.rows_in - entry.reused > 0


@pytest.mark.slow
def test_pairs_are_of_the_same_text_where_models_cut_texts_into_other_windows(
    made: Workspace, ray_session: Session, tmp_path: Path
) -> None:
    """The new model has another tokenizer, of whole words, and other windows: each row's two vectors are nearest to
    those of one passage of the new pipeline, and of the document that the row names."""
    words = words_model(tmp_path / "words", made)
    new = made.pipeline(embedding__model=str(words), passages={"type": "tokens", "tokens": 24, "overlap": 4})
    found = taking(made, ray_session, new).take()
    resolved = resolve(new.config, new.origin)
    stage = f"stages/passages/{resolved.stage_fingerprint(PASSAGES)}"
    assert resolved.stage_fingerprint(PASSAGES) != made_stage(made)
    fragments = [path for path in (made.root / stage).glob("*.parquet") if "." not in path.stem]
    tables = [pq.read_table(path, columns=["document_id", "text"]) for path in fragments]
    passages = {row["text"]: row["document_id"] for table in tables for row in table.to_pylist()}
    texts, sides = list(passages), (found.paired.old, found.paired.new)
    names = [names_of(texts, side.documents, model) for side, model in zip(sides, (MODEL, str(words)), strict=True)]
    assert names[0] == names[1] and len(set(names[0])) == len(names[0]) == len(found.paired.document_ids)
    assert tuple(passages[name] for name in names[0]) == found.paired.document_ids
    assert found.about["of_passages"] > len(made.published()) and found.about["without_vector"] == 0
    judged = {f"d{row:03d}" for row in range(QUERIES)}
    assert len(judged & set(found.paired.document_ids)) > QUERIES - 5


def words_model(folder: Path, made: Workspace) -> Path:
    """A static table of random vectors of the corpus' words, which are its tokens."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    lines = [json.loads(line) for path in made.corpus.glob("*.jsonl") for line in path.read_text().splitlines()]
    split = pre_tokenizers.Whitespace()
    words = {word for line in lines for word, _ in split.pre_tokenize_str(line["text"])}
    tokenizer = Tokenizer(
        models.WordLevel({"[UNK]": 0} | {word: n + 1 for n, word in enumerate(sorted(words))}, "[UNK]")
    )
    tokenizer.pre_tokenizer = split
    table = np.random.default_rng(0).normal(size=(len(words) + 1, DIMENSION)).astype(np.float32)
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=table)]).save_pretrained(str(folder))
    return folder


def made_stage(made: Workspace) -> str:
    pipeline = made.pipeline()
    return resolve(pipeline.config, pipeline.origin).stage_fingerprint(PASSAGES)


def names_of(texts: list[str], vectors: np.ndarray, model: str) -> list[str]:
    """The text whose vector is nearest to each, by the model itself."""
    from sentence_transformers import SentenceTransformer

    known = SentenceTransformer(str(resolve_model(model)), device="cpu").encode(texts)[:, :DIMENSION]
    known /= np.linalg.norm(known, axis=1, keepdims=True)
    return [texts[row] for row in (vectors @ known.T).argmax(axis=1)]


def test_a_rotated_model_passes_its_gate(made: Workspace, bridges: dict[str, Any], taken: TakenSample) -> None:
    store = open_store(str(made.root))
    assert answers_through_bridge(bridges) and not bridges["skipped"] and not bridges["compatible"]
    for direction, (source, target) in {
        Direction.QUERIES_TO_OLD: (taken.paired.new, taken.paired.old),
        Direction.DOCUMENTS_TO_NEW: (taken.paired.old, taken.paired.new),
    }.items():
        assert bridges["directions"][direction]["files"] == list(bridge_paths(bridges["fingerprint"], direction))
        found = read_bridge(store, bridges["fingerprint"], direction)
        assert found is not None
        adapter, record = found
        assert record.to_json() == bridges["directions"][direction]["record"]
        record.refuse_other(adapter, source.identity.space, target.identity.space)
        cosines = np.einsum("nd,nd->n", adapter.apply(source.documents), target.documents)
        assert cosines.mean() > 0.99 and 0.98 < record.length <= 1
    residuals = sample_residuals(store, bridges["fingerprint"], taken.paired)
    assert residuals.keys() == set(taken.paired.document_ids[:DRAWN])
    distances = np.sqrt(2 - 2 * cosines[:DRAWN])  # of the last direction, between vectors of unit length
    by_document = {name: distances[[one == name for one in taken.paired.document_ids[:DRAWN]]] for name in residuals}
    assert residuals == {name: pytest.approx(found.mean(), abs=1e-3) for name, found in by_document.items()}


def test_bridges_are_fitted_once(made: Workspace, ray_session: Session, bridges: dict[str, Any]) -> None:
    """The record that is there is given back: nothing else of the sample is even looked at."""
    store = open_store(str(made.root))
    record = json.loads(store.read(f"bridges/{bridges['fingerprint']}/record.json"))
    assert record == bridges
    assert sorted(store.names(f"bridges/{bridges['fingerprint']}")) == sorted(
        ["record.json", *(path.rpartition("/")[2] for one in Direction for path in bridge_paths("", one))]
    )


def test_shuffled_pairs_leave_nothing_but_the_refusal(
    made: Workspace, ray_session: Session, taken: TakenSample
) -> None:
    store, paired = open_store(str(made.root)), taken.paired
    random = np.random.default_rng(5)
    other = replace(
        paired.new, documents=random.permutation(paired.new.documents), queries=random.permutation(paired.new.queries)
    )
    wrong = TakenSample(replace(paired, new=other), "shuffled", taken.about)
    found = fit_bridges(ray_session, store, SilentReporter(), wrong)
    assert sample_residuals(store, found["fingerprint"], wrong.paired) == {}
    assert not answers_through_bridge(found)
    assert sorted(store.names(f"bridges/{found['fingerprint']}")) == ["record.json"]
    for direction in Direction:
        one = found["directions"][direction]
        assert one["files"] == [] and not one["stored"]
        assert re.search(r"it recovers 0\.\d+ of the reference, at least 0\.\d+ .*asks for 0\.9", one["refused"])
        assert read_bridge(store, found["fingerprint"], direction) is None
    page = canary_page(canary(ray_session, wrong, found))
    assert "refused: it recovers" in page


def test_compatible_models_need_no_bridge_only_where_measured(
    made: Workspace, ray_session: Session, taken: TakenSample
) -> None:
    store, paired = open_store(str(made.root)), taken.paired
    declared = fit_bridges(ray_session, store, SilentReporter(), taken, declared_compatible=True)
    assert not declared["skipped"] and set(declared["directions"]) == set(Direction)
    noisy = paired.old.queries + 0.4 * np.random.default_rng(1).normal(size=paired.old.queries.shape)
    noisy /= np.linalg.norm(noisy, axis=1, keepdims=True)
    better = TakenSample(
        replace(paired, old=replace(paired.old, queries=noisy.astype(np.float32)), new=paired.old),
        "better",
        taken.about,
    )
    found = fit_bridges(ray_session, store, SilentReporter(), better, declared_compatible=True)
    assert found["skipped"] and found["directions"] == {} and answers_through_bridge(found)
    assert "None is needed" in canary_page(canary(ray_session, better, found))


def test_the_report_and_its_page(ray_session: Session, taken: TakenSample, bridges: dict[str, Any]) -> None:
    record = json.loads(json.dumps(canary(ray_session, taken, bridges), allow_nan=False))
    pairings = record["pairings"]
    assert set(pairings) == {"old_to_old", "new_to_new", "new_to_old", "bridged_to_old"}
    assert pairings["new_to_new"]["ndcg"] == pytest.approx(pairings["old_to_old"]["ndcg"], abs=0.02)
    assert pairings["new_to_old"]["ndcg"]["high"] < pairings["bridged_to_old"]["ndcg"]["low"]
    assert record["neighbour_overlap"]["estimate"] > 0.97
    page = canary_page(record)
    assert "<script" not in page and page.count("<svg") == 3
    for picture in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        xml.etree.ElementTree.fromstring(picture)
    for words in ("new queries, bridged to the old index", "effective rank", "110 of", "tokens a second and worker"):
        assert words in page


@pytest.mark.slow
def test_passages_stand_in_for_queries(made: Workspace, ray_session: Session, rotated: Path) -> None:
    new = made.pipeline(embedding__model=str(rotated), evaluate={"queries": 20})
    found = taking(made, ray_session, new).take()
    assert found.about["queries"] == {
        "from": "passages",
        "judged": False,
        "why": "evaluate.queries names no file",
        "fitting": 11,
        "judging": 11,
    }
    assert len(found.paired.document_ids) == DRAWN - 22 == found.paired.drawn
    store = open_store(str(made.root))
    record = canary(ray_session, found, fit_bridges(ray_session, store, SilentReporter(), found))
    assert record["bridges"]["compatibility"] is None
    page = canary_page(record)
    assert "Passages stand in as queries" in page and "There are no judgements" in page


def test_a_small_sample_is_refused(
    made: Workspace, ray_session: Session, rotated: Path, taken: TakenSample, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = len(taken.paired.document_ids)
    monkeypatch.setattr(canary_sample, "FEWEST_PASSAGES", found + 1)
    with pytest.raises(
        ValueError, match=rf"sample \({found} passages with vectors of both models\) must hold at least"
    ):
        taking(made, ray_session, made.pipeline(embedding__model=str(rotated))).take()


def test_passages_within_documents_are_not_compared_with_others(made: Workspace, ray_session: Session) -> None:
    late, plain = (
        made.pipeline(passages__type="late"),
        made.pipeline(embedding__layers=3, embedding__layers_trained=True),
    )
    before, after = (resolve(one.config, one.origin) for one in (late, plain))
    store = open_store(str(made.root))
    pair = ModelPair(before, after, published_manifest(before, store))
    with pytest.raises(ValueError, match=r"passages.type \(tokens\) of the new pipeline must be late, as that of"):
        Canary(ray_session, store, SilentReporter(), plain.origin, "run", pair, []).take()


def test_other_models_are_refused(made: Workspace, taken: TakenSample) -> None:
    store, pipeline = open_store(str(made.root)), made.pipeline()
    resolved = resolve(pipeline.config, pipeline.origin)
    manifest = published_manifest(resolved, store)
    with pytest.raises(ValueError, match=r"model \(package:.*\) is the one that version [0-9a-f]{16} was made with"):
        ModelPair(resolved, resolved, manifest)
    shorter = made.pipeline(embedding__dimension=64)
    prompted = made.pipeline(embedding__prompts={"query": "ask: ", "document": ""})
    for pipeline, words in ((shorter, "dimension 64, prompts '' and ''"), (prompted, "prompts '' and 'ask: '")):
        both = rf"model \(package:.* \(space .*{words}\) must be the one that version .*, prompts '' and ''; give the"
        with pytest.raises(ModelMismatch, match=both):
            refuse_other_model(resolve(pipeline.config, pipeline.origin), manifest)
    nowhere = made.pipeline(publish__alias="nowhere")
    with pytest.raises(ValueError, match=r"publish.alias \(nowhere\) of index test must point to a published version"):
        published_manifest(resolve(nowhere.config, nowhere.origin), store)


def test_a_bridge_whose_files_disagree_is_refused(made: Workspace, bridges: dict[str, Any]) -> None:
    store = open_store(str(made.root))
    adapter, record = bridge_paths("mixed-up", Direction.QUERIES_TO_OLD)
    other, _ = bridge_paths(bridges["fingerprint"], Direction.DOCUMENTS_TO_NEW)
    _, own = bridge_paths(bridges["fingerprint"], Direction.QUERIES_TO_OLD)
    store.write(adapter, store.read(other))
    store.write(record, store.read(own))
    with pytest.raises(WrongSpace, match="which the record is of"):
        read_bridge(store, "mixed-up", Direction.QUERIES_TO_OLD)


def test_the_command_prints_verdicts(made: Workspace, rotated: Path, bridges: dict[str, Any], tmp_path: Path) -> None:
    file, page = made.file(), tmp_path / "canary.html"
    sample = ["--passages", str(DRAWN), "--seed", str(SEED)]
    told = CliRunner().invoke(app, ["bridge", str(file), "--model", str(rotated), "--page", str(page), *sample])
    assert told.exit_code == 0, told.output
    assert "new queries, old index as it is" in told.output and "chosen" in told.output
    assert "find each other among all" in " ".join(told.output.split())
    shown = told.output.partition("new queries to the old index: ")[2]
    assert (
        shown.startswith("passes, recovers") and bridge_paths(bridges["fingerprint"], next(iter(Direction)))[0] in shown
    )
    assert page.read_text().startswith("<!doctype html>")
    again = CliRunner().invoke(app, ["bridge", str(file), "--model", str(rotated), *sample, "--json"])
    record = json.loads(again.stdout.splitlines()[-1])
    assert record["bridges"] == bridges and record["likeness"]["mean_cosine"] > 0.99
    same = CliRunner().invoke(app, ["bridge", str(file), "--model", MODEL])
    assert isinstance(same.exception, ValueError) and "name another" in str(same.exception)


def test_the_command_fails_with_the_gate(
    made: Workspace, rotated: Path, bridges: dict[str, Any], taken: TakenSample
) -> None:
    """The record of the sample, as a gate would leave it that nothing passes."""
    store, path = open_store(str(made.root)), f"bridges/{bridges['fingerprint']}/record.json"
    kept = store.read(path)
    refused = json.loads(kept)
    refused["directions"]["queries_to_old"] |= {"stored": False, "refused": "it recovers nothing", "files": []}
    store.write(path, json.dumps(refused).encode())
    sample = ["--passages", str(DRAWN), "--seed", str(SEED)]
    told = CliRunner().invoke(app, ["bridge", str(made.file()), "--model", str(rotated), *sample])
    store.write(path, kept)
    assert told.exit_code == EXIT_GATE and "refused, it recovers nothing" in told.output
