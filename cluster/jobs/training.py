"""A sample of the embeddings → the trained, empty index that every shard is built from."""

from dataclasses import dataclass

import numpy as np

from penstock.cluster.fragments import read_hash_range, vectors_of
from penstock.cluster.layout import EMBEDDINGS, TRAINING, fragment_path, stage_folder
from penstock.cluster.node import connect
from penstock.operators.indexing import IndexSpec, train_index
from penstock.operators.sharding import hash_range


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


def train(task: TrainingTask) -> int:
    """Read the sample, train, store the empty index; returns the rows trained on. Memory: the sample in float32."""
    sample = sample_vectors(
        task.root, task.embeddings_fingerprint, task.fragments, task.rows, task.spec.training_rows, task.spec.seed
    )
    trained = train_index(task.spec, sample[: task.spec.training_rows])
    connect(task.root).write(trained_path(task.fingerprint), trained)
    return len(sample)


def sample_vectors(
    root: str, fingerprint: str, fragments: tuple[str, ...], rows: int, wanted: int, seed: int
) -> np.ndarray:
    """About `wanted` of `rows` stored vectors as float32 (n, d): a contiguous, seeded range of the hash space, so
    that the
    sample is uniform, bounded and the same for any cut into fragments, and little else is read."""
    store = connect(root)
    parts: list[np.ndarray] = []
    hashes: list[np.ndarray] = []
    for first, last in hash_range(min(1.0, wanted / max(rows, 1)), seed):
        for fragment in fragments:
            table = read_hash_range(store, fragment_path(EMBEDDINGS, fingerprint, fragment), first, last, ["embedding"])
            if table.num_rows:
                parts.append(vectors_of(table.column("embedding")).astype(np.float32))
                hashes.append(table.column("row_hash").to_numpy())
    if not parts:
        raise ValueError(f"a training sample needs at least one of {rows} vectors, got none; raise index.training_rows")
    order = np.argsort(np.concatenate(hashes), kind="stable")
    return np.concatenate(parts)[order]
