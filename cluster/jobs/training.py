"""A sample of the embeddings → the trained, empty index that every shard is built from."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from penstock.cluster.fragments import read_hash_range, vectors_of
from penstock.cluster.layout import EMBEDDINGS, TRAINING, fragment_path, stage_folder
from penstock.cluster.node import connect
from penstock.cluster.storage import Store
from penstock.operators.indexing import IndexSpec, requires_training, train_index
from penstock.operators.sharding import hash_range

# A range of hashes holds about as many rows as asked for: ask for more, then cut.
OVERSAMPLING = 1.3
OVERSAMPLED_ROWS = 64


class DamagedTraining(Exception):
    """A trained index that is not what training wrote."""


@dataclass(frozen=True)
class TrainingTask:
    root: str
    embeddings_fingerprint: str
    fragments: tuple[str, ...]
    rows: int
    spec: IndexSpec
    fingerprint: str


def trained_path(fingerprint: str) -> str:
    return f"{stage_folder(TRAINING, fingerprint)}/trained.faiss"


def training_record_path(fingerprint: str) -> str:
    """The record of a trained index: written after it, so that it says that training is done."""
    return f"{stage_folder(TRAINING, fingerprint)}/trained.json"


def read_trained(store: Store, fingerprint: str) -> bytes:
    """The trained index, its hash checked before anybody opens it.

    Raises:
        DamagedTraining: other bytes than training wrote.
    """
    data = store.read(trained_path(fingerprint))
    record = json.loads(store.read(training_record_path(fingerprint)))
    found = hashlib.sha256(data).hexdigest()
    if found != record["sha256"]:
        raise DamagedTraining(
            f"trained index ({trained_path(fingerprint)}) must have sha256 {record['sha256'][:16]}, got {found[:16]}; "
            "remove the two files of its folder and run again"
        )
    return data


def train(task: TrainingTask) -> int:
    """Read the sample, train, store the empty index; returns the rows trained on. Memory: the sample in float32,
    twice."""
    sample = _sample(task) if requires_training(task.spec) else np.empty((0, task.spec.dimension), np.float32)
    trained = train_index(task.spec, sample)
    store = connect(task.root)
    store.write(trained_path(task.fingerprint), trained)
    record = {"sha256": hashlib.sha256(trained).hexdigest(), "rows": len(sample)}
    store.write(training_record_path(task.fingerprint), json.dumps(record).encode())
    return len(sample)


def _sample(task: TrainingTask) -> np.ndarray:
    store, spec = connect(task.root), task.spec
    paths = [fragment_path(EMBEDDINGS, task.embeddings_fingerprint, fragment) for fragment in task.fragments]
    return sample_vectors(store, paths, task.rows, spec.training_rows, spec.seed)


def sample_vectors(store: Store, paths: Sequence[str], rows: int, wanted: int, seed: int) -> np.ndarray:
    """`wanted` of the `rows` vectors in embeddings fragments as float32 (n, d), all of them if there are fewer: a
    contiguous, seeded range of the hash space, in the order of hashes, so that the sample is uniform, bounded, the
    same for any cut into fragments, and little else is read."""
    share = min(1.0, (wanted * OVERSAMPLING + OVERSAMPLED_ROWS) / max(rows, 1))
    parts: list[np.ndarray] = []
    hashes: list[np.ndarray] = []
    for first, last in hash_range(share, seed):
        for path in paths:
            table = read_hash_range(store, path, first, last, ["embedding"])
            parts.append(vectors_of(table.column("embedding")))
            hashes.append(table.column("row_hash").to_numpy())
    order = np.argsort(np.concatenate(hashes), kind="stable")[:wanted]
    sample: np.ndarray = np.concatenate(parts)[order].astype(np.float32)
    return sample
