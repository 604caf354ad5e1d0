"""Pairs of similar passages near a threshold, with their texts: for people to judge the threshold by."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from penstock.cluster.fragments import read_fragment
from penstock.cluster.jobs.similarity import LEFT, RIGHT, SIMILARITY, stored_pairs
from penstock.cluster.layout import PASSAGES, fragment_path
from penstock.cluster.node import connect
from penstock.operators.independent_set import random_keys

TEXT_COLUMNS = ("row_hash", "passage_id", "text")


@dataclass(frozen=True)
class NearTask:
    """Of the pairs in files, at most `count` whose similarity lies within `margin` of a threshold, chosen by a seed."""

    root: str
    files: tuple[str, ...]
    threshold: float
    margin: float
    count: int
    seed: int


@dataclass(frozen=True)
class TextsTask:
    """The passages of a fragment with some row hashes, uint64 (n,)."""

    root: str
    passages_fingerprint: str
    fragment: str
    hashes: np.ndarray


def near_pairs(task: NearTask) -> pa.Table:
    """The chosen pairs (left, right, similarity), the least similar first. Memory: one row group, and `count` pairs."""
    best = pa.table(
        {LEFT: pa.array([], pa.uint64()), RIGHT: pa.array([], pa.uint64()), SIMILARITY: pa.array([], pa.float32())}
    )
    for table in stored_pairs(connect(task.root), task.files, task.threshold - task.margin):
        near = np.abs(table.column(SIMILARITY).to_numpy() - np.float32(task.threshold)) <= task.margin
        both = pa.concat_tables([best, table.filter(pa.array(near))]).combine_chunks()
        keys = random_keys(both.column(LEFT).to_numpy() ^ both.column(RIGHT).to_numpy(), task.seed)
        best = both.take(pa.array(np.argsort(keys, kind="stable")[: task.count]))
    return best.sort_by([(SIMILARITY, "ascending"), (LEFT, "ascending"), (RIGHT, "ascending")])


def texts_of(task: TextsTask) -> pa.Table:
    """Hashes, ids and texts of the passages that the fragment has."""
    path = fragment_path(PASSAGES, task.passages_fingerprint, task.fragment)
    table = read_fragment(connect(task.root), path, TEXT_COLUMNS).replace_schema_metadata()
    found = table.filter(pa.array(np.isin(table.column("row_hash").to_numpy(), task.hashes)))
    return found.select(TEXT_COLUMNS).combine_chunks()
