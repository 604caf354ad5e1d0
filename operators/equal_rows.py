"""Rows with equal vectors, of which one can stand for all: equal vectors have the same neighbours.

n rows that all mean the same are n^2 / 2 pairs, or n links to the first of them where their vectors are equal bit by
bit. For vectors that are only nearly equal there is no such rule: what is similar to one of two of them need not be
similar to the other, so all their pairs are needed to decide which stay.
"""

import numpy as np

COMPARED_ROWS = 16_384  # 24 MiB of 384 float32
KEY_SEED = 9


def first_equal(vectors: np.ndarray) -> np.ndarray:
    """The number int64 (n,) of the first row that is equal to each row of contiguous float32 (n, d), bit by bit.

    Rows are found by a random linear combination of their bits, and compared. Memory: 24 bytes for each row, and
    COMPARED_ROWS rows.
    """
    first = np.arange(len(vectors))
    bits = vectors.view(np.uint32)
    keys = _keys(bits)
    ordered = np.argsort(keys, kind="stable")
    same = keys[ordered[1:]] == keys[ordered[:-1]]
    left = np.sort(ordered[np.append(same, False) | np.insert(same, 0, False)]) if len(vectors) > 1 else first[:0]
    while len(left):  # twice only where unequal rows have the same key
        _, start, place = np.unique(keys[left], return_index=True, return_inverse=True)
        leader = left[start][place]
        equal = _equal(bits, left, leader)
        first[left[equal]] = leader[equal]
        left = left[~equal]
    return first


def _keys(bits: np.ndarray) -> np.ndarray:
    factors = np.random.default_rng(KEY_SEED).integers(0, 2**64, bits.shape[1], dtype=np.uint64)
    parts = [bits[part].astype(np.uint64) @ factors for part in _chunks(len(bits))]
    return np.concatenate([*parts, np.empty(0, np.uint64)])


def _equal(bits: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    parts = [(bits[one[part]] == bits[other[part]]).all(axis=1) for part in _chunks(len(one))]
    return np.concatenate(parts)


def _chunks(rows: int) -> list[slice]:
    return [slice(start, start + COMPARED_ROWS) for start in range(0, rows, COMPARED_ROWS)]
