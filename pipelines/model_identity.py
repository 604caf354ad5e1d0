"""What tells the models of versions apart, as manifests name it."""

from collections.abc import Mapping
from typing import Any

from penstock.operators.encoding import Encoder

PROMPTS = ("document_prompt", "query_prompt")
MODEL_FIELDS = ("weights_sha256", "tokenizer_sha256", "configuration_sha256", "normalize", "layers", *PROMPTS)
DIMENSION = "dimension"


def model_identity(encoder: Encoder, query_encoder: Encoder) -> dict[str, Any]:
    """What tells spaces apart, by the names in manifests, of the encoders of documents and of queries: the model, its
    prompts and the dimension. Precision does not, which only decides how exactly vectors are met."""
    return {
        "weights_sha256": encoder.weights_hash,
        "tokenizer_sha256": encoder.tokenizer_hash,
        "configuration_sha256": encoder.configuration_hash,
        DIMENSION: encoder.dimension,
        "normalize": encoder.normalize,
        "layers": encoder.layers,
        "document_prompt": encoder.prompt,
        "query_prompt": query_encoder.prompt,
    }


def model_facts(encoder: Encoder, query_encoder: Encoder) -> dict[str, Any]:
    """The model as a reader must load it to ask in the same space, by the names in manifests."""
    return {
        "reference": encoder.model,
        "weights_sha256": encoder.weights_hash,
        "tokenizer_sha256": encoder.tokenizer_hash,
        "configuration_sha256": encoder.configuration_hash,
        "space": encoder.space,
        "max_tokens": encoder.max_tokens,
        "special_tokens": encoder.special_tokens,
        DIMENSION: encoder.dimension,
        "normalize": encoder.normalize,
        "precision": encoder.precision.value,
        "layers": encoder.layers,
        "backend": encoder.backend.value,
        "document_prompt": encoder.prompt,
        "query_prompt": query_encoder.prompt,
        "trust_remote_code": encoder.trust_remote_code,
    }


def is_same_model(identity: Mapping[str, Any], stated: Mapping[str, Any]) -> bool:
    """Whether an identity, or the `model` of a manifest, is of the model and the prompts of another manifest's `model`,
    whatever the dimension and the precision."""
    return all(identity[name] == stated[name] for name in MODEL_FIELDS)


def is_same_dimension(identity: Mapping[str, Any], stated: Mapping[str, Any]) -> bool:
    """Whether, beside the model and the prompts, the dimension is that of a manifest's `model`."""
    return is_same_model(identity, stated) and bool(identity[DIMENSION] == stated[DIMENSION])


def is_one_space(model: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether similarities to vectors of two versions, by the `model` of their manifests, compare with each other: they
    were made by the same encoder, with the same prompts, which `space` leaves out."""
    return all(model[name] == other[name] for name in ("space", *PROMPTS))


def identity_words(model: Mapping[str, Any]) -> str:
    """The `model` of a manifest with all that its space is of, for messages; pooling is part of the configuration."""
    hashes = ", ".join(f"{kind} {model[f'{kind}_sha256'][:16]}" for kind in ("weights", "tokenizer", "configuration"))
    prompts = " and ".join(repr(model[name]) for name in PROMPTS)
    lengths = "vectors of length 1" if model["normalize"] else "vectors as the model makes them"
    layers = "all layers" if model["layers"] is None else f"the first {model['layers']} layers"
    window = "no window" if model["max_tokens"] is None else f"window {model['max_tokens']} tokens"
    return (
        f"{model['reference']} (space {model['space'][:16]}), {hashes}, {lengths}, {layers}, {window}, precision "
        f"{model['precision']} on {model['backend']}, dimension {model[DIMENSION]}, prompts {prompts}"
    )
