"""Checks of what a reader was answered during an upgrade: places filled by the rule, and quality that held."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from penstock.operators.backfill_order import has_fallen


def follows_places(
    ids: Sequence[str],
    old: Mapping[str, float],
    new: Mapping[str, float],
    superseded: Collection[str],
    k: int,
    close: float,
) -> bool:
    """Whether an answer without similarities is one that the rule of places allows.

    Passages that are embedded again must be among the k nearest of the new space, all others among the k nearest of the
    old one and not superseded, each in the order of its own space; and as many of the former are there as superseded
    rows are among the k nearest of the old space.

    Args:
        ids: the answer, best first.
        old, new: similarity of the query to every row of the old version and of the new part, by id.
        close: by how much two similarities may differ that count as equal.
    """
    stayed = [name for name in ids if name not in new]
    taken = [new[name] for name in ids if name in new]
    if len(set(ids)) != len(ids) or any(name in superseded or name not in old for name in stayed):
        return False
    if not _descends(taken, close) or not _descends([old[name] for name in stayed], close):
        return False
    if len(new) < k or len(old) < k:
        return True
    last_old, last_new = (sorted(space.values(), reverse=True)[k - 1] for space in (old, new))
    if any(old[name] < last_old - close for name in stayed) or any(one < last_new - close for one in taken):
        return False
    surely = sum(old[name] > last_old + close for name in superseded)
    perhaps = sum(old[name] >= last_old - close for name in superseded)
    return surely <= len(taken) <= perhaps


def _descends(values: Sequence[float], close: float) -> bool:
    return all(later <= earlier + close for earlier, later in zip(values, values[1:], strict=False))


def fallen(
    answered: Mapping[str, tuple[np.ndarray, np.ndarray]], floors: Mapping[str, np.ndarray], seed: int
) -> list[str]:
    """The versions whose answers were worse than the worse of the old version and the bridge, beyond the confidence
    interval of the difference, query by query.

    Args:
        answered: version → the queries that it was asked, int64 (n,), and what each answer was worth, float64 (n,).
        floors: the old version and the one that answers through the bridge → what their answers to all queries are
            worth, float64 (q,).
    """
    floor = min(floors.values(), key=lambda worth: float(worth.mean()))
    found = []
    for version, (rows, worth) in answered.items():
        asked, place = np.unique(rows, return_inverse=True)
        mean = np.bincount(place, weights=worth) / np.bincount(place)
        if has_fallen(floor[asked], mean, seed):
            found.append(version)
    return found
