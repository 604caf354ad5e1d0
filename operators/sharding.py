"""Which rows belong together: contiguous ranges of the 64-bit hash space, for samples, and for shards unless these own
cells.

Rows are stored sorted by row hash, so a shard is one contiguous slice of every file, for every shard count, and so is a
seeded sample: neither depends on how the corpus was cut into fragments.
"""

import hashlib
from enum import StrEnum
from fractions import Fraction

import numpy as np

HASH_SPACE = 2**64
MOST_SHARDS = 2**31  # keeps the 64-bit halves of the exact product below from overflowing
_HALF_BITS = np.uint64(32)
_LOW_HALF = np.uint64(2**32 - 1)


class Sharding(StrEnum):
    """What decides to which shard a row goes: its hash, or the cell of the index that it lies in."""

    HASH = "hash"
    CLUSTER = "cluster"


def shard_of(row_hashes: np.ndarray, shards: int) -> np.ndarray:
    """floor(row_hash * shards / 2^64), computed exactly: uint64 (N,) to int64 (N,)."""
    _refuse_shard_count(shards)
    count = np.uint64(shards)
    high, low = row_hashes >> _HALF_BITS, row_hashes & _LOW_HALF
    shard: np.ndarray = (high * count + (low * count >> _HALF_BITS)) >> _HALF_BITS
    return shard.astype(np.int64)


def shard_range(shard: int, shards: int) -> tuple[int, int]:
    """The first and the last row hash of a shard, both included."""
    _refuse_shard_count(shards)
    if not 0 <= shard < shards:
        raise ValueError(f"shard ({shard}) must lie in 0..{shards - 1}, as there are {shards} shards")
    return _first_hash(shard, shards), _first_hash(shard + 1, shards) - 1


def hash_range(fraction: float, seed: int) -> list[tuple[int, int]]:
    """One or two ascending ranges [first, last] of the hash space that hold `fraction` of uniform rows.

    The ranges start at a point derived from the seed and wrap around the end of the space. For one seed, a larger
    fraction holds every row of a smaller one.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction ({fraction}) must be above 0 and at most 1: it is the share of rows to sample")
    width = max(1, int(Fraction(fraction) * HASH_SPACE))
    if width == HASH_SPACE:
        return [(0, HASH_SPACE - 1)]
    first = _start(seed)
    last = first + width - 1
    if last < HASH_SPACE:
        return [(first, last)]
    return [(0, last - HASH_SPACE), (first, HASH_SPACE - 1)]


def sample_order(row_hashes: np.ndarray, seed: int) -> np.ndarray:
    """Row numbers from where the seed's ranges begin, uint64 (n,) to int64 (n,): the first of a sample are a smaller
    sample."""
    start = np.uint64(_start(seed))
    return np.argsort(row_hashes - start, kind="stable")  # modulo the hash space


def _start(seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"sample {seed}".encode(), digest_size=8).digest())


def _first_hash(shard: int, shards: int) -> int:
    return -(-shard * HASH_SPACE // shards)


def _refuse_shard_count(shards: int) -> None:
    if not 1 <= shards <= MOST_SHARDS:
        raise ValueError(f"shards ({shards}) must lie in 1..{MOST_SHARDS}")
