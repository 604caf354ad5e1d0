"""Rows with equal vectors, of which one can stand for all: equal vectors have the same neighbours.

n rows that all mean the same are n^2 / 2 pairs, or n links to the first of them where their vectors are equal bit by
bit. For vectors that are only nearly equal there is no such rule: what is similar to one of two of them need not be
similar to the other, so all their pairs are needed to decide which stay.
"""

import hashlib

import numpy as np

DIGEST_BYTES = 16  # as of texts: among 2^40 vectors two unequal ones share a digest with a probability of 2^-49


def vector_digests(vectors: np.ndarray) -> np.ndarray:
    """The digest uint64 (n, 2) of each row of contiguous float32 (n, d): blake2b of its bytes. Rows need not be held
    together to find equal ones."""
    digests = b"".join(hashlib.blake2b(row, digest_size=DIGEST_BYTES).digest() for row in vectors)
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)


def first_equal(digests: np.ndarray) -> np.ndarray:
    """The number int64 (n,) of the first row that has the digest, uint64 (n, 2), of each row."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    starts = np.flatnonzero(np.insert((ordered[1:] != ordered[:-1]).any(axis=1), 0, True)[: len(order)])
    first = np.empty(len(order), np.int64)
    first[order] = np.repeat(order[starts], np.diff(starts, append=len(order)))
    return first
