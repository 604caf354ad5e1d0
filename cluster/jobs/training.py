"""A sample of the embeddings → the trained, empty index that every shard is built from."""

import hashlib
import json
from dataclasses import dataclass
from functools import partial

import numpy as np

from penstock.cluster.jobs.clustering import read_centroids
from penstock.cluster.jobs.sampling import sample_vectors
from penstock.cluster.jobs.transforms import read_chain
from penstock.cluster.layout import EMBEDDINGS, TRAINING, fragment_path, stage_folder
from penstock.cluster.node import connect
from penstock.cluster.storage import Store
from penstock.operators.indexing import IndexSpec, requires_training, train_index
from penstock.operators.routing import plant_centroids


class DamagedTraining(Exception):
    """A trained index that is not what training wrote."""


@dataclass(frozen=True)
class TrainingTask:
    """What to train, on vectors behind the transforms of a fingerprint; with centroids of another one as those of its
    cells; and whether to record the mean of the sampled vectors, which codecs of stored vectors subtract."""

    root: str
    embeddings_fingerprint: str
    fragments: tuple[str, ...]
    rows: int
    spec: IndexSpec
    fingerprint: str
    transforms: str | None = None
    centroids: str | None = None
    with_mean: bool = False


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


def read_mean(store: Store, fingerprint: str) -> np.ndarray:
    """The mean of the vectors sampled for training, float32 (d,), before transforms.

    Raises:
        KeyError: training did not record it.
    """
    record = json.loads(store.read(training_record_path(fingerprint)))
    return np.array(record["mean"], np.float32)


def train(task: TrainingTask) -> int:
    """Read the sample, train, store the empty index; returns the rows trained on. Memory: the sample in float32,
    three times."""
    store = connect(task.root)
    chain = read_chain(store, task.transforms)
    learns = requires_training(task.spec)
    sample = _sample(task) if learns or task.with_mean else np.empty((0, task.spec.dimension), np.float32)
    mean = sample.mean(axis=0, dtype=np.float64).tolist() if task.with_mean else None
    rows = chain.apply_documents(sample) if chain and learns else sample
    plant = partial(plant_centroids, centroids=read_centroids(store, task.centroids)) if task.centroids else None
    trained = train_index(task.spec, rows if learns else np.empty((0, task.spec.dimension), np.float32), plant=plant)
    store.write(trained_path(task.fingerprint), trained)
    record = {"sha256": hashlib.sha256(trained).hexdigest(), "rows": len(sample) if learns else 0}
    if mean is not None:
        record["mean"] = mean
    store.write(training_record_path(task.fingerprint), json.dumps(record).encode())
    return len(sample)


def _sample(task: TrainingTask) -> np.ndarray:
    store, spec = connect(task.root), task.spec
    paths = [fragment_path(EMBEDDINGS, task.embeddings_fingerprint, fragment) for fragment in task.fragments]
    return sample_vectors(store, paths, task.rows, spec.training_rows, spec.seed)
