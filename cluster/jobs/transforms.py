"""Embeddings → the transforms before the codec: fitted to the moments of all rows, stored once."""

import hashlib
import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from penstock.cluster.fragments import ROW_GROUP_ROWS, open_fragment, vectors_of
from penstock.cluster.layout import TRANSFORMS, stage_folder
from penstock.cluster.storage import Store
from penstock.operators.transforms import Chain


class DamagedTransforms(Exception):
    """Transforms that are not what fitting wrote."""


def chain_path(fingerprint: str) -> str:
    return f"{stage_folder(TRANSFORMS, fingerprint)}/transforms.safetensors"


def chain_record_path(fingerprint: str) -> str:
    """The record of fitted transforms: written after them, so that it says that fitting is done."""
    return f"{stage_folder(TRANSFORMS, fingerprint)}/transforms.json"


def write_chain(store: Store, fingerprint: str, chain: Chain) -> None:
    """Store fitted transforms, then the record that says so."""
    data = chain.to_bytes()
    store.write(chain_path(fingerprint), data)
    record = {"sha256": hashlib.sha256(data).hexdigest(), "steps": chain.to_json()}
    store.write(chain_record_path(fingerprint), json.dumps(record).encode())


def read_chain(store: Store, fingerprint: str | None) -> Chain | None:
    """The fitted transforms, their hash checked; None without any.

    Raises:
        DamagedTransforms: other bytes than fitting wrote.
    """
    if fingerprint is None:
        return None
    data = store.read(chain_path(fingerprint))
    record = json.loads(store.read(chain_record_path(fingerprint)))
    found = hashlib.sha256(data).hexdigest()
    if found != record["sha256"]:
        raise DamagedTransforms(
            f"transforms ({chain_path(fingerprint)}) must have sha256 {record['sha256'][:16]}, got {found[:16]}; "
            "remove the two files of their folder and run again"
        )
    return Chain.from_bytes(data)


def vector_batches(store: Store, path: str, chain: Chain | None) -> Iterator[np.ndarray]:
    """The vectors of a fragment in batches that depend on the fragment alone: (n, d) as they are stored, or float32
    behind the transforms."""
    with open_fragment(store, path) as file:
        for batch in file.iter_batches(ROW_GROUP_ROWS, columns=["embedding"]):
            vectors = vectors_of(pa.chunked_array([batch.column(0)]))
            yield chain.apply_documents(vectors) if chain else vectors
