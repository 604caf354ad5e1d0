"""What thresholds of deduplication by meaning remove: the points of the curve."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from penstock.cluster.jobs.document_pairs import DocumentJob
from penstock.cluster.jobs.stay_search import CountTask, count_gone
from penstock.cluster.session import Session
from penstock.pipelines.evaluating import EXACT_FRAGMENTS
from penstock.pipelines.planning import Embedded
from penstock.pipelines.progress import Reporter


def passage_points(
    thresholds: Sequence[float], removed: Sequence[int], rows: int, row_bytes: int
) -> list[dict[str, Any]]:
    """The passages of `rows` that each threshold removes, their share, and the bytes of their vectors."""
    return [
        {
            "similarity": threshold,
            "removed": gone,
            "share": round(gone / max(rows, 1), 6),
            "saved_bytes": gone * row_bytes,
        }
        for threshold, gone in zip(thresholds, removed, strict=True)
    ]


def count_documents(
    session: Session, reporter: Reporter, root: str, embedded: Embedded, choices: Sequence[DocumentJob]
) -> np.ndarray:
    """Documents int64 (t + 1, 2) and their passages: all, and those that each choice removed."""
    fragments = sorted(embedded.embeddings.values())
    groups = [tuple(fragments[i : i + EXACT_FRAGMENTS]) for i in range(0, len(fragments), EXACT_FRAGMENTS)]
    tasks = [CountTask(root, embedded.embeddings_fingerprint, group, tuple(choices)) for group in groups]
    counts = np.zeros((len(choices) + 1, 2), np.int64)
    with reporter.stage("documents", len(tasks), "tasks") as advance:
        for found in session.stream(count_gone, tasks):
            counts += found
            advance(1, f"{counts[0, 0]:,} documents")
    return counts


def document_points(thresholds: Sequence[float], counts: np.ndarray, row_bytes: int) -> list[dict[str, Any]]:
    """passage_points, with the documents that each threshold removes and their share."""
    documents, rows = counts[0].tolist()
    points = passage_points(thresholds, counts[1:, 1].tolist(), rows, row_bytes)
    for point, gone in zip(points, counts[1:, 0].tolist(), strict=True):
        point |= {"removed_documents": gone, "share_of_documents": round(gone / max(documents, 1), 6)}
    return points
