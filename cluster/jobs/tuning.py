"""A sample of the embeddings → how candidates for the index do on it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from penstock.cluster.jobs.sampling import sample_vectors
from penstock.cluster.layout import EMBEDDINGS, fragment_path
from penstock.cluster.node import connect
from penstock.operators.indexing import Metric
from penstock.operators.moments import Moments, moments_of
from penstock.operators.searching import normalize
from penstock.operators.transform_fitting import fit_chain
from penstock.operators.transforms import Chain, Step
from penstock.operators.tuning import Budget, Candidate, Trial, make_sample, measure, screening_sample
from penstock.operators.vector_codecs import VectorCodec


@dataclass(frozen=True)
class TuningJob:
    """What all candidates share. Without `queries`, float32 (q, d), some of the sampled vectors are held out.

    `steps` are transforms in front of every candidate, fitted to the sample and to `query_moments`; `stored` is how
    vectors for re-ranking are kept.
    """

    root: str
    embeddings_fingerprint: str
    fragments: tuple[str, ...]
    rows: int
    shard_rows: int
    budget: Budget
    metric: Metric
    seed: int
    training_rows: int
    held_out: int
    queries: np.ndarray | None = None
    steps: tuple[Step, ...] = ()
    query_moments: Moments | None = None
    stored: VectorCodec = VectorCodec.FLOAT16


@dataclass(frozen=True)
class TuningTask:
    """Candidates to measure on `sample_rows` vectors, those with one index together; in full, or to screen them."""

    job: TuningJob
    sample_rows: int
    groups: tuple[tuple[Candidate, ...], ...]
    screening: bool = False


def measure_candidates(task: TuningTask) -> Sequence[Trial]:
    """Read the sample, build each index, search it; on one thread. Memory: the sample twice, and one index."""
    job = task.job
    held_out = job.held_out if job.queries is None else 0
    paths = [fragment_path(EMBEDDINGS, job.embeddings_fingerprint, fragment) for fragment in job.fragments]
    vectors = sample_vectors(connect(job.root), paths, job.rows, task.sample_rows + held_out, job.seed)
    if job.metric is Metric.COSINE:
        vectors = normalize(vectors)
    queries = job.queries
    if queries is None:
        queries, vectors = vectors[:held_out], vectors[held_out:]
    make = screening_sample if task.screening else make_sample
    sample = make(vectors, queries, job.metric, job.budget.k, _fitted(job, vectors), job.stored)
    shard_rows = max(job.shard_rows, len(vectors))
    trials: list[Trial] = []
    for group in task.groups:
        trials += measure(sample, group, job.budget, job.seed, job.training_rows, shard_rows)
    return trials


def _fitted(job: TuningJob, vectors: np.ndarray) -> Chain | None:
    """The transforms in front of every candidate, fitted to the sample."""
    if not job.steps:
        return None
    documents = moments_of(vectors, vectors.mean(axis=0, dtype=np.float64))
    return fit_chain(job.steps, vectors.shape[1], documents, job.query_moments)
