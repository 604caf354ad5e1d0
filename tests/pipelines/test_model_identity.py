"""How models are told apart in messages."""

from dataclasses import replace

import pytest

from penstock.operators.encoding import Backend, Encoder, Precision
from penstock.pipelines.model_identity import identity_words, model_facts

ENCODER = Encoder("one", "a" * 64, "b" * 64, "c" * 64, 128, 2, 32, "", normalize=True)
OTHERS: list[dict[str, object]] = [
    {"weights_hash": "d" * 64},
    {"tokenizer_hash": "d" * 64},
    {"configuration_hash": "d" * 64},
    {"max_tokens": 64},
    {"max_tokens": None},
    {"dimension": 16},
    {"prompt": "passage: "},
    {"normalize": False},
    {"precision": Precision.BFLOAT16},
    {"layers": 3},
    {"backend": Backend.OPENVINO},
]


def words(encoder: Encoder) -> str:
    """Without the fingerprint of the space, which nobody can read."""
    return identity_words({**model_facts(encoder, replace(encoder, task="query")), "space": "s"})


@pytest.mark.parametrize("change", OTHERS, ids=str)
def test_every_field_of_a_space_is_named(change: dict[str, object]) -> None:
    assert words(replace(ENCODER, **change)) != words(ENCODER)  # type: ignore[arg-type]


def test_all_fields_of_a_space_are_tried() -> None:
    tried = {name.removesuffix("_hash") for change in OTHERS for name in change}
    assert ENCODER.parameters().keys() - {"operator", "version", "task"} == tried
