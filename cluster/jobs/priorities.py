"""Passages fragments → how much each is asked for, which decides in what order they are embedded again."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from penstock.cluster.fragments import open_fragment
from penstock.cluster.layout import PASSAGES, fragment_path
from penstock.cluster.node import connect

BATCH_ROWS = 16_384


@dataclass(frozen=True)
class PriorityTask:
    """What to sum over the passages of some fragments.

    Attributes:
        traffic: a kept column of numbers, or None.
        asked, found: how often documents are asked for, and how often they are among the neighbours of others, by id.
    """

    root: str
    passages_fingerprint: str
    fragments: tuple[str, ...]
    traffic: str | None
    asked: Mapping[str, float]
    found: Mapping[str, float]


@dataclass(frozen=True)
class FragmentPriority:
    """The sums over the passages of a fragment."""

    fragment: str
    traffic: float
    occurrences: float


def fragment_priorities(task: PriorityTask) -> list[FragmentPriority]:
    """The sums of each fragment. Memory: one batch of rows, and the counted documents.

    Raises:
        ValueError: traffic that is no number.
    """
    return [_priority(task, fragment) for fragment in task.fragments]


def _priority(task: PriorityTask, fragment: str) -> FragmentPriority:
    traffic = occurrences = 0.0
    for batch in _batches(task, fragment):
        documents = batch.column("document_id")
        if task.traffic is not None:
            traffic += _traffic(batch.column(task.traffic), task.traffic)
        traffic += _counted(documents, task.asked)
        occurrences += _counted(documents, task.found)
    return FragmentPriority(fragment, traffic, occurrences)


def _batches(task: PriorityTask, fragment: str) -> Iterator[pa.RecordBatch]:
    columns = ["document_id", *([task.traffic] if task.traffic is not None else [])]
    store = connect(task.root)
    with open_fragment(store, fragment_path(PASSAGES, task.passages_fingerprint, fragment)) as file:
        yield from file.iter_batches(BATCH_ROWS, columns=columns)


def _traffic(column: pa.Array, name: str) -> float:
    """The sum of a column; rows without a value, and negative ones, count as 0."""
    if not pa.types.is_integer(column.type) and not pa.types.is_floating(column.type):
        raise ValueError(f"upgrade.traffic ({name}) must be a column of numbers, got {column.type}; name another")
    values = np.nan_to_num(pc.fill_null(column, 0).to_numpy(zero_copy_only=False).astype(np.float64))
    return float(np.maximum(values, 0).sum())


def _counted(documents: pa.Array, counts: Mapping[str, float]) -> float:
    if not counts:
        return 0.0
    known = documents.filter(pc.is_in(documents, pa.array(list(counts), pa.string())))
    return sum(counts[name] for name in known.to_pylist())
