import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.operators.identity import row_hashes
from penstock.operators.sharding import HASH_SPACE, MOST_SHARDS, hash_range, sample_order, shard_of, shard_range

HASHES = st.integers(0, HASH_SPACE - 1)
SHARD_COUNTS = st.integers(1, MOST_SHARDS)


@given(st.lists(HASHES, min_size=1, max_size=20), SHARD_COUNTS)
def test_shard_is_the_exact_floor(hashes: list[int], shards: int) -> None:
    found = shard_of(np.array(hashes, dtype=np.uint64), shards)
    assert found.tolist() == [row_hash * shards // HASH_SPACE for row_hash in hashes]
    assert found.dtype == np.int64


@given(SHARD_COUNTS, st.data())
def test_the_ends_of_a_range_belong_to_its_shard_and_ranges_touch(shards: int, data: st.DataObject) -> None:
    shard = data.draw(st.integers(0, shards - 1))
    first, last = shard_range(shard, shards)
    assert shard_of(np.array([first, last], dtype=np.uint64), shards).tolist() == [shard, shard]
    assert first == (0 if shard == 0 else shard_range(shard - 1, shards)[1] + 1)
    assert shard < shards - 1 or last == HASH_SPACE - 1


@settings(max_examples=30)
@given(st.integers(1, 300))
def test_ranges_of_all_shards_partition_the_space(shards: int) -> None:
    ranges = [shard_range(shard, shards) for shard in range(shards)]
    assert sum(last - first + 1 for first, last in ranges) == HASH_SPACE
    widths = [last - first + 1 for first, last in ranges]
    assert max(widths) - min(widths) <= 1


@pytest.mark.parametrize("shards", [1, 2, 7, 64, 1000])
def test_rows_sorted_by_hash_are_contiguous_per_shard(shards: int) -> None:
    hashes = np.sort(row_hashes([f"row {number}" for number in range(5000)]))
    assert np.all(np.diff(shard_of(hashes, shards)) >= 0)


@pytest.mark.parametrize("shards", [3, 16, 100])
def test_shards_of_real_ids_are_uniform(shards: int) -> None:
    rows = 100_000
    sizes = np.bincount(
        shard_of(row_hashes([f"document-{number}#0" for number in range(rows)]), shards), minlength=shards
    )
    expected = rows / shards
    chi_square = float(((sizes - expected) ** 2 / expected).sum())
    freedom = shards - 1
    # Chi-square has mean f and variance 2f; five standard deviations, as the small f here have a longer right tail.
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom) + 5


@given(st.floats(0, 1, exclude_min=True), st.integers())
def test_sample_ranges_have_the_asked_width_and_stay_inside(fraction: float, seed: int) -> None:
    ranges = hash_range(fraction, seed)
    width = sum(last - first + 1 for first, last in ranges)
    assert abs(width - fraction * HASH_SPACE) <= 1 + HASH_SPACE * 2.0**-53
    assert all(0 <= first <= last < HASH_SPACE for first, last in ranges)
    assert all(before[1] < after[0] for before, after in zip(ranges, ranges[1:], strict=False))


@given(st.integers(), st.floats(0.001, 1), st.floats(0.001, 1))
def test_a_larger_sample_of_one_seed_holds_the_smaller(seed: int, one: float, other: float) -> None:
    hashes = row_hashes([f"row {number}" for number in range(200)])
    small, large = (_inside(hashes, hash_range(fraction, seed)) for fraction in sorted([one, other]))
    assert not np.any(small & ~large)


def test_samples_of_different_seeds_differ_and_one_wraps_around() -> None:
    samples = [hash_range(0.3, seed) for seed in range(40)]
    assert len({tuple(ranges) for ranges in samples}) == 40
    assert {len(ranges) for ranges in samples} == {1, 2}
    assert hash_range(0.3, 7) == hash_range(0.3, 7)


def test_a_sample_holds_its_fraction_of_real_ids() -> None:
    rows, fraction = 50_000, 0.2
    hashes = row_hashes([f"document-{number}#0" for number in range(rows)])
    kept = [int(_inside(hashes, hash_range(fraction, seed)).sum()) for seed in range(10)]
    standard_deviation = np.sqrt(rows * fraction * (1 - fraction))
    assert all(abs(count - rows * fraction) < 5 * standard_deviation for count in kept)


def test_errors_name_the_value_and_the_rule() -> None:
    with pytest.raises(ValueError, match=r"shards \(0\) must lie in 1"):
        shard_of(np.zeros(1, dtype=np.uint64), 0)
    with pytest.raises(ValueError, match=r"shard \(4\) must lie in 0..3, as there are 4 shards"):
        shard_range(4, 4)
    with pytest.raises(ValueError, match=r"fraction \(1.5\) must be above 0"):
        hash_range(1.5, 0)


def _inside(hashes: np.ndarray, ranges: list[tuple[int, int]]) -> np.ndarray:
    inside = np.zeros(len(hashes), dtype=bool)
    for first, last in ranges:
        inside |= (hashes >= np.uint64(first)) & (hashes <= np.uint64(last))
    return inside


@given(st.lists(HASHES, min_size=1, max_size=50, unique=True), st.integers(0, 20), st.floats(0.01, 1))
def test_the_first_of_a_sample_are_a_smaller_sample(hashes: list[int], seed: int, share: float) -> None:
    array = np.array(hashes, dtype=np.uint64)
    ordered = [hashes[row] for row in sample_order(array, seed)]
    inside = {one for one in hashes for first, last in hash_range(share, seed) if first <= one <= last}
    assert set(ordered[: len(inside)]) == inside
