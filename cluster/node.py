"""What a node keeps between tasks: connections to stores, model folders and tokenizers, each made once per process."""

import functools
import os
from pathlib import Path

from penstock.cluster.corpus_files import open_corpus
from penstock.cluster.storage import Store, open_store
from penstock.operators.chunking import PassageTokenizer
from penstock.operators.encoding import ModelMismatch
from penstock.operators.late_chunking import DocumentTokenizer
from penstock.operators.models import ModelUnavailable, hash_tokenizer, resolve_model, tokenizer_folder
from penstock.operators.tokenizing import TextTokenizer

CACHE_VARIABLE = "PENSTOCK_CACHE"
CACHE_LIMIT_VARIABLE = "PENSTOCK_CACHE_BYTES"
DEFAULT_CACHE_BYTES = 20 * 2**30
S3_PREFIX = "s3://"


def cache_folder() -> Path:
    """The node's cache: PENSTOCK_CACHE, or `penstock` in the user's cache folder."""
    base = os.environ.get(CACHE_VARIABLE)
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penstock"


def cache_limit_bytes() -> int:
    """What published files may take in the node's cache: PENSTOCK_CACHE_BYTES, or DEFAULT_CACHE_BYTES.

    Raises:
        ValueError: the variable is no positive number.
    """
    value = os.environ.get(CACHE_LIMIT_VARIABLE, str(DEFAULT_CACHE_BYTES))
    if not value.isdecimal() or int(value) == 0:
        raise ValueError(
            f"{CACHE_LIMIT_VARIABLE} ({value}) must be a number of bytes above 0; {DEFAULT_CACHE_BYTES} are 20 GiB"
        )
    return int(value)


@functools.cache
def connect(url: str) -> Store:
    """The store at `url`, one connection per process."""
    return open_store(url)


@functools.cache
def connect_corpus(url: str) -> Store:
    """The store at `url` as a corpus: symbolic links that its listing followed are followed by workers too."""
    return open_corpus(url)


@functools.cache
def model_folder(reference: str) -> Path:
    """The folder of a model on this node; a model on S3 is copied into the node's cache, by ETag, once."""
    if reference.startswith(S3_PREFIX):
        return _fetch_model(reference)
    return resolve_model(reference)


@functools.cache
def tokenizer(reference: str, expected_hash: str) -> PassageTokenizer:
    """The tokenizer of a model on this node, which must be the one that the plan was made with."""
    return PassageTokenizer(_tokenizer_folder(reference, expected_hash))


@functools.cache
def text_tokenizer(
    reference: str, expected_hash: str, prompt: str, window: int | None, special_tokens: int
) -> TextTokenizer:
    """The tokenizer that makes an encoder's token ids on this node, which must be the one of the plan."""
    return TextTokenizer(_tokenizer_folder(reference, expected_hash), prompt, window, special_tokens)


@functools.cache
def document_tokenizer(reference: str, expected_hash: str, prompt: str, window: int | None) -> DocumentTokenizer:
    """The tokenizer that cuts documents into an encoder's macro windows on this node."""
    return DocumentTokenizer(_tokenizer_folder(reference, expected_hash), prompt, window)


def _tokenizer_folder(reference: str, expected_hash: str) -> Path:
    folder = model_folder(reference)
    found = hash_tokenizer(folder)
    if found != expected_hash:
        raise ModelMismatch(
            f"tokenizer of the model ({reference}) must be {expected_hash[:16]}, which the run was planned with, got "
            f"{found[:16]} on this node; pin the model's revision, or give all nodes the same folder"
        )
    return tokenizer_folder(folder)


def _fetch_model(reference: str) -> Path:
    store = connect(reference)
    objects = sorted(store.list(""), key=lambda info: info.path)
    if not objects:
        raise ModelUnavailable(f"embedding.model ({reference}): no objects there; upload the model's folder")
    for info in objects:
        target = _model_cache(reference) / info.path
        mark = target.with_name(target.name + ".etag")
        if target.exists() and mark.exists() and mark.read_text() == str(info.etag):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        store.download(info.path, target)
        mark.write_text(str(info.etag))
    return _model_cache(reference)


def _model_cache(reference: str) -> Path:
    name = reference.removeprefix(S3_PREFIX).strip("/").replace("/", "--")
    return cache_folder() / "models" / name
