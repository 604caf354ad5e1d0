"""The model that a version's queries are encoded with, loaded at the first text."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from penstock.cluster.node import model_folder
from penstock.operators.encoder_worker import QUERY_BATCH_TOKENS, EncoderWorker
from penstock.operators.encoding import Backend, Encoder, Precision


class CodeNotTrusted(Exception):
    """The model of an index wants to run code that the reader did not agree to."""


class QueryEncoder:
    """Encodes queries as the manifest's `model` says; threads take turns."""

    def __init__(self, model: dict[str, Any], trust_remote_code: bool) -> None:
        self.model = model
        self._trust_remote_code = trust_remote_code
        self._lock = threading.Lock()
        self._worker: EncoderWorker | None = None

    @property
    def loaded(self) -> bool:
        return self._worker is not None

    def load(self) -> None:
        """Load the model, if that was not done before.

        Raises:
            ModelMismatch: the model at hand is not the one the index was made with.
            ModelUnavailable: there is none.
            CodeNotTrusted: it wants to run code of its own.
        """
        with self._lock:
            self._loaded()

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Query vectors float32 (q, d) of texts; raises as `load` does."""
        with self._lock:
            return self._loaded().encode(list(texts)).require()

    def _loaded(self) -> EncoderWorker:
        if self._worker is None:
            encoder = query_encoder(self.model, self._trust_remote_code)
            self._worker = EncoderWorker(replace(encoder, batch_tokens=QUERY_BATCH_TOKENS), model_folder(encoder.model))
        return self._worker


def query_encoder(model: dict[str, Any], trust_remote_code: bool) -> Encoder:
    """The encoder of queries that a manifest's `model` describes.

    Whoever wrote the manifest cannot make a reader run code: that takes the reader's own word.
    """
    if model["trust_remote_code"] and not trust_remote_code:
        raise CodeNotTrusted(
            f"model ({model['reference']}) runs code of its own, which needs your word: open the index with "
            "trust_remote_code=True (--trust-remote-code), or ask with vectors"
        )
    return Encoder(
        model=model["reference"],
        weights_hash=model["weights_sha256"],
        tokenizer_hash=model["tokenizer_sha256"],
        configuration_hash=model["configuration_sha256"],
        max_tokens=model["max_tokens"],
        special_tokens=model["special_tokens"],
        dimension=model["dimension"],
        prompt=model["query_prompt"],
        normalize=model["normalize"],
        precision=Precision(model["precision"]),
        trust_remote_code=trust_remote_code,
        layers=model.get("layers"),
        backend=Backend(model.get("backend", Backend.TORCH)),
        task="query",
    )
