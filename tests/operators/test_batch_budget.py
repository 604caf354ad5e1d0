import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.operators.batch_budget import (
    ACCELERATOR_BUDGETS,
    CPU_BUDGETS,
    ROUNDS,
    WORTHWHILE,
    BudgetCache,
    find_budget,
)

KEY: dict[str, object] = {"model": "abc", "device": "cpu", "threads": 2}


def steady(seconds: tuple[float, ...], budgets: tuple[int, ...] = CPU_BUDGETS) -> Callable[[int], float]:
    """A machine on which each budget always takes the same time per token."""
    return dict(zip(budgets, seconds, strict=True)).__getitem__


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ((1.0, 1.0, 1.0, 1.0), 1024),
        ((1.0, 0.96, 0.96, 0.955), 1024),
        ((1.0, 0.9, 0.87, 0.86), 2048),
        ((1.0, 0.5, 0.3, 0.2), 8192),
        ((1.0, 0.5, 0.2, 0.3), 4096),
        ((1.0, 2.0, 0.1, 0.1), 4096),
        ((1.0, 0.955, 0.94, 0.94), 2048),  # 1.6 % more than the fastest, and half of its memory
    ],
)
def test_the_smallest_budget_that_is_about_as_fast_as_the_fastest(seconds: tuple[float, ...], expected: int) -> None:
    assert find_budget(steady(seconds), accelerator=False) == expected


@given(st.lists(st.integers(900, 1000), min_size=4, max_size=4))
def test_any_times(seconds: list[int]) -> None:
    limit = min(seconds) / WORTHWHILE
    expected = next(budget for budget, time in zip(CPU_BUDGETS, seconds, strict=True) if time <= limit)
    assert find_budget(steady(tuple(seconds)), accelerator=False) == expected


def test_accelerators_have_larger_budgets() -> None:
    asked: Counter[int] = Counter()

    def falling(budget: int) -> float:
        asked[budget] += 1
        return 1 / budget

    assert find_budget(falling, accelerator=True) == ACCELERATOR_BUDGETS[-1]
    assert asked == dict.fromkeys(ACCELERATOR_BUDGETS, 1 + ROUNDS)


def test_the_first_round_only_warms_up() -> None:
    """The largest budget is slow for once when it is first run, the smallest is fast for once."""
    seen: set[int] = set()

    def warming(budget: int) -> float:
        first = budget not in seen
        seen.add(budget)
        return {1024: 0.01 if first else 1.0, 8192: 9.0 if first else 0.5}.get(budget, 1.0)

    assert find_budget(warming, accelerator=False) == 8192


def test_disturbances_do_not_count() -> None:
    """The least time of each budget counts, whatever else the machine does in between."""
    rounds: dict[int, Iterator[float]] = {
        1024: iter([1.0, 1.0, 1.0, 1.0]),
        2048: iter([1.0, 5.0, 0.6, 5.0]),
        4096: iter([1.0, 0.6, 9.0, 9.0]),
        8192: iter([1.0, 9.0, 9.0, 0.65]),
    }
    assert find_budget(lambda budget: next(rounds[budget]), accelerator=False) == 2048


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_budgets_end_where_memory_does(error: type[Exception]) -> None:
    tried: list[int] = []

    def small(budget: int) -> float:
        tried.append(budget)
        if budget > 2048:
            raise error(f"out of memory for {budget}")
        return 1 / budget

    assert find_budget(small, accelerator=False) == 2048
    assert tried.count(4096) == 1 and 8192 not in tried


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_without_memory_for_the_smallest_budget_it_is_still_where_to_begin(error: type[Exception]) -> None:
    def none(budget: int) -> float:
        raise error(f"out of memory for {budget}")

    assert find_budget(none, accelerator=False) == CPU_BUDGETS[0]


def test_memory_for_the_smallest_budget_that_is_gone_in_the_second_round() -> None:
    ran: Counter[int] = Counter()

    def shared(budget: int) -> float:
        ran[budget] += 1
        if ran[budget] > 1:
            raise RuntimeError("out of memory")
        return 1 / budget

    assert find_budget(shared, accelerator=False) == CPU_BUDGETS[0]


def test_memory_that_others_take_later_only_ends_the_budgets() -> None:
    """Workers that share a device measure at the same time: what fitted in the first round may not fit in the next."""
    ran: Counter[int] = Counter()

    def shared(budget: int) -> float:
        ran[budget] += 1
        if budget == 8192 and ran[budget] > 1:
            raise RuntimeError("out of memory")
        return 1 / budget

    assert find_budget(shared, accelerator=False) == 4096


def test_other_errors_are_raised() -> None:
    def broken(budget: int) -> float:
        raise KeyError(budget)

    with pytest.raises(KeyError):
        find_budget(broken, accelerator=False)


# ---- the cache


def test_a_budget_is_found_again(tmp_path: Path) -> None:
    cache = BudgetCache(tmp_path / "new" / "folder", KEY)
    assert cache.load() is None
    cache.save(4096)
    assert cache.load() == 4096
    assert BudgetCache(tmp_path / "new" / "folder", dict(reversed(KEY.items()))).load() == 4096
    cache.save(2048)
    assert cache.load() == 2048
    assert len(list((tmp_path / "new" / "folder").iterdir())) == 1  # nothing partial stays


@pytest.mark.parametrize(("name", "value"), [("model", "abd"), ("device", "cuda"), ("threads", 3), ("more", None)])
def test_other_models_and_devices_have_their_own(tmp_path: Path, name: str, value: object) -> None:
    BudgetCache(tmp_path, KEY).save(4096)
    other = BudgetCache(tmp_path, {**KEY, name: value})
    assert other.load() is None
    other.save(1024)
    assert BudgetCache(tmp_path, KEY).load() == 4096 and other.load() == 1024


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"batch_tokens": 40',
        b"\xff\xfe\x00",
        b"[1024]",
        b"null",
        b'"1024"',
        b"{}",
        json.dumps({"batch_tokens": "1024"}).encode(),
        json.dumps({"batch_tokens": 1024.5}).encode(),
        json.dumps({"batch_tokens": None}).encode(),
        json.dumps({"batch_tokens": 0}).encode(),
        json.dumps({"batch_tokens": -1024}).encode(),
    ],
)
def test_a_damaged_file_is_no_budget(tmp_path: Path, content: bytes) -> None:
    cache = BudgetCache(tmp_path, KEY)
    cache.save(4096)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(content)
    assert cache.load() is None
    cache.save(2048)
    assert cache.load() == 2048


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = BudgetCache(None, KEY)
    cache.save(4096)
    assert cache.load() is None and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_measurement(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    below_a_file = BudgetCache(tmp_path / "file" / "cache", KEY)
    below_a_file.save(4096)
    assert below_a_file.load() is None
    in_the_way = BudgetCache(tmp_path / "folder", KEY)
    in_the_way.save(4096)
    (kept,) = (tmp_path / "folder").iterdir()
    kept.unlink()
    kept.mkdir()
    in_the_way.save(1024)
    assert in_the_way.load() is None
