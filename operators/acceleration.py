"""Make a loaded model faster on CPU without changing what it computes.

Three things, each of which leaves the model's modules and weights what they are:

- memory that a batch frees is kept for the next one, instead of page-faulted in again for each activation;
- attention over short sequences as blocked matrix products and a softmax (registered as a transformers attention
  implementation): for 64 to 256 tokens half the time of torch's own CPU kernel;
- the weights of linear layers prepacked for oneDNN, with a following erf-GELU fused into the product.

`accelerate` proves on a probe that the model still gives the same vectors, and takes everything back otherwise.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

ATTENTION = "penstock_blocked"
LONGEST_BLOCKED = 1024  # beyond it the scores of one head alone leave the cache
BLOCK_BYTES = 1 << 20  # scores of one block, so that softmax finds them in the cache
PACKED_FOR_ROWS = 4096  # oneDNN chooses a weight's layout for about so many tokens at a time
LEAST_AGREEMENT = 1 - 1e-5
LEAST_AGREEMENT_NARROW = 0.999
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h

Probe = Callable[[], np.ndarray]


def keep_freed_memory() -> None:
    """Let this process's allocator keep what is freed (glibc): for a process that does nothing but encode.

    Activations of a batch are tens of MB; by default each is mapped, zeroed page by page and unmapped again, which
    took
    up to half of the time of bfloat16 batches. The most that is kept is what one batch needs at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


def release_freed_memory() -> None:
    """Give back what the C library keeps of freed batches: 260 MiB after 1,600 texts in batches of many shapes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, others need it less
    if trim is not None:
        trim(0)


def accelerate(model: SentenceTransformer, probe: Probe, reload: Callable[[], SentenceTransformer]) -> tuple[Any, bool]:
    """The model with faster CPU kernels, and whether they are in use.

    `probe` gives vectors (N, d) of the current model for a few texts, `reload` loads it anew. Kernels that raise, or
    whose vectors have a cosine below 0.99999 (0.999 in half precision) to those of the plain model, are not used.
    """
    import torch

    with torch.inference_mode():
        expected = probe()
        try:
            changed = [_use_blocked_attention(model), _pack_linear_layers(model)]
            if not any(changed):
                return model, False
            found = probe()
        except Exception as error:  # whatever a model makes of kernels that it does not expect
            logger.info("plain kernels: %s", error)
            return reload(), False
    if _least_cosine(expected, found) < _least_agreement(model):
        return reload(), False
    return model, True


def _least_agreement(model: SentenceTransformer) -> float:
    return LEAST_AGREEMENT if str(model.dtype) == "torch.float32" else LEAST_AGREEMENT_NARROW


def _least_cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = (a * b).sum(axis=1) / norms
    return float(np.nan_to_num(cosines, nan=-1.0).min(initial=1.0))


# ---- attention


def _use_blocked_attention(model: SentenceTransformer) -> bool:
    transformer = model.transformers_model
    if transformer is None or getattr(transformer.config, "_attn_implementation", None) != "sdpa":
        return False
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, blocked_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    transformer.set_attn_implementation(ATTENTION)
    return True


def blocked_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,  # noqa: ANN401
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """softmax(scaling * Q K^T + mask) V over (batch, heads, tokens, d), as transformers calls an attention function.

    Returns (batch, tokens, heads, d) and no weights. What it is not made for (grouped heads, causal models, position
    biases, long sequences) goes to torch's own kernel.
    """
    batch, heads, tokens, width = query.shape
    unknown = any(more.get(name) is not None for name in ("position_bias", "softcap", "cache", "s_aux"))
    causal = attention_mask is None and (more.get("is_causal") or getattr(module, "is_causal", False))
    plain = key.shape == query.shape == value.shape and tokens <= LONGEST_BLOCKED
    if unknown or causal or not plain or scaling is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        result: tuple[torch.Tensor, torch.Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
        return result
    import torch

    queries, keys, values = (one.reshape(batch * heads, tokens, width) for one in (query, key, value))
    mask = _additive(attention_mask, query, batch, heads)
    attended = torch.empty_like(queries)
    block = max(1, BLOCK_BYTES // (query.element_size() * tokens * tokens))
    for start in range(0, batch * heads, block):
        part = slice(start, start + block)
        added = mask[part] if mask is not None else queries.new_zeros(1, 1, 1)
        scores = torch.baddbmm(added, queries[part], keys[part].transpose(1, 2), alpha=scaling)
        torch.bmm(torch.softmax(scores, -1), values[part], out=attended[part])
    return attended.view(batch, heads, tokens, width).transpose(1, 2), None


def _additive(mask: torch.Tensor | None, query: torch.Tensor, batch: int, heads: int) -> torch.Tensor | None:
    """A boolean or additive mask (batch, 1 or heads, rows, tokens) as (batch * heads, 1 or tokens, tokens)."""
    import torch

    if mask is None:
        return None
    if mask.dtype == torch.bool:
        if bool((mask == mask[:, :, :1]).all()):  # padding alone is the same for every query
            mask = mask[:, :, :1]
        least = torch.finfo(query.dtype).min
        mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, least)
    mask = mask.to(query.dtype).expand(batch, heads, *mask.shape[2:])
    return mask.reshape(batch * heads, *mask.shape[2:])


# ---- linear layers


def _pack_linear_layers(model: SentenceTransformer) -> bool:
    import torch

    class PackedLinear(torch.nn.Module):
        """A linear layer (in, out) whose weight lies in oneDNN's own layout; with `gelu`, erf-GELU follows within."""

        def __init__(self, layer: torch.nn.Linear, gelu: bool) -> None:
            super().__init__()
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), PACKED_FOR_ROWS)
            self.register_buffer("weight", packed, persistent=False)
            self.register_buffer("bias", None if layer.bias is None else layer.bias.detach(), persistent=False)
            self.in_features, self.out_features = layer.in_features, layer.out_features
            self._post: tuple[Any, ...] = ("gelu", [], "none") if gelu else ("none", [], "")

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            outputs: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, *self._post)
            return outputs

    transformer = model.transformers_model
    if transformer is None or not computes_fast(_dtype_name(transformer)):
        return False
    packed = False
    for parent in list(transformer.modules()):
        fused = _fuse_gelu(parent)
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(parent, name, PackedLinear(child, gelu=name == fused))
                packed = True
    return packed


def computes_fast(dtype: str) -> bool:
    """Whether oneDNN computes linear layers of this type ("float32", "bfloat16", "float16") at speed on this CPU."""
    import torch

    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    match dtype:
        case "float32":
            return True
        case "bfloat16":
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        case "float16":
            return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return False


def _dtype_name(module: torch.nn.Module) -> str:
    return str(next(module.parameters()).dtype).removeprefix("torch.")


def _fuse_gelu(parent: torch.nn.Module) -> str | None:
    """The name of the linear layer of an intermediate block (BERT and its relatives) whose output goes straight into
    erf-GELU; the block's own activation becomes the identity."""
    import torch
    from transformers.activations import GELUActivation

    activation = getattr(parent, "intermediate_act_fn", None)
    layers = [name for name, _ in parent.named_children() if name != "intermediate_act_fn"]
    packed = type(getattr(parent, "dense", None)) is torch.nn.Linear
    if not type(parent).__name__.endswith("Intermediate") or layers != ["dense"] or not packed:
        return None
    exact = isinstance(activation, GELUActivation) and activation.act is torch.nn.functional.gelu
    if not exact and not (isinstance(activation, torch.nn.GELU) and activation.approximate == "none"):
        return None
    parent.intermediate_act_fn = torch.nn.Identity()
    return "dense"
