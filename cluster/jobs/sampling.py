"""A uniform, seeded sample of stored embeddings, the same for any cut into fragments."""

from collections.abc import Sequence

import numpy as np

from penstock.cluster.fragments import read_hash_range, vectors_of
from penstock.cluster.storage import Store
from penstock.operators.sharding import hash_range

# A range of hashes holds about as many rows as asked for: ask for more, then cut.
OVERSAMPLING = 1.3
OVERSAMPLED_ROWS = 64


def oversampled_share(wanted: int, rows: int) -> float:
    """The share of the hash space that nearly surely holds `wanted` of so many rows."""
    return min(1.0, (wanted * OVERSAMPLING + OVERSAMPLED_ROWS) / max(rows, 1))


def sample_vectors(store: Store, paths: Sequence[str], rows: int, wanted: int, seed: int) -> np.ndarray:
    """`wanted` of the `rows` vectors in embeddings fragments as float32 (n, d), all of them if there are fewer: a
    contiguous, seeded range of the hash space, in the order of hashes, so that the sample is uniform, bounded, the
    same for any cut into fragments, and little else is read."""
    share = oversampled_share(wanted, rows)
    parts: list[np.ndarray] = []
    hashes: list[np.ndarray] = []
    for first, last in hash_range(share, seed):
        for path in paths:
            table = read_hash_range(store, path, first, last, ["embedding"])
            parts.append(vectors_of(table.column("embedding")).copy())  # lets go of the row groups around the range
            hashes.append(table.column("row_hash").to_numpy())
    order = np.argsort(np.concatenate(hashes), kind="stable")[:wanted]
    sample = np.empty((len(order), parts[0].shape[1]), np.float32)
    place = np.full(sum(map(len, parts)), -1, np.int64)
    place[order] = np.arange(len(order))
    first = 0
    while parts:  # which are let go of one by one
        part = parts.pop(0)
        own = place[first : first + len(part)]
        sample[own[own >= 0]] = part[own >= 0]
        first += len(part)
    return sample
