"""How many padded tokens a batch should have: measured once per device and model, and remembered on the node."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from penstock.operators.identity import fingerprint

CPU_BUDGETS = (1024, 2048, 4096, 8192)
ACCELERATOR_BUDGETS = (4096, 8192, 16384, 32768, 65536, 131072, 262144)
ROUNDS = 3
TIME_LIMIT_S = 4.0
# A larger batch must be faster by this much: it takes more memory and has more padding.
WORTHWHILE = 0.95


class BudgetCache:
    """The budget of one model on one device, in a file of the node's cache; without a folder, nothing is kept."""

    def __init__(self, folder: Path | None, key: dict[str, object]) -> None:
        self._path = folder / f"{fingerprint(**key)}.json" if folder else None

    def load(self) -> int | None:
        """The budget found before, None when there is none that can be used."""
        if self._path is None:
            return None
        try:
            budget = json.loads(self._path.read_text())["batch_tokens"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return budget if isinstance(budget, int) and budget > 0 else None

    def save(self, batch_tokens: int) -> None:
        """Keep a budget. A cache that cannot be written only costs the next start its measurement."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial = self._path.with_name(f"{self._path.name}.{os.getpid()}")
            partial.write_text(json.dumps({"batch_tokens": batch_tokens}))
            partial.replace(self._path)
        except OSError:
            pass


def find_budget(seconds_per_token: Callable[[int], float], accelerator: bool) -> int:
    """The smallest budget that is about as fast as the fastest.

    `seconds_per_token` runs one batch of a budget. The first round warms up, and ends where memory or TIME_LIMIT_S
    does; in the others all budgets take turns, so that what else the machine does strikes all alike, and the least time
    of each counts. Where memory is too short for the smallest, that is the budget: batches get smaller as they fail.
    """
    started = 0.0
    candidates = ACCELERATOR_BUDGETS if accelerator else CPU_BUDGETS
    least: dict[int, float] = {}
    for budget in candidates:
        if _timed(seconds_per_token, budget) is None:
            break
        least[budget] = float("inf")
        started = started or time.monotonic()  # the very first batch also loads kernels
        if time.monotonic() - started > TIME_LIMIT_S:
            break
    for _ in range(ROUNDS):
        for budget in list(least):
            seconds = _timed(seconds_per_token, budget)
            if seconds is None:  # others on the device may take memory meanwhile
                least = {one: known for one, known in least.items() if one < budget}
                break
            least[budget] = min(least[budget], seconds)
        if time.monotonic() - started > TIME_LIMIT_S:
            break
    enough = min(least.values(), default=0.0) / WORTHWHILE
    return next((budget for budget, seconds in least.items() if seconds <= enough), candidates[0])


def _timed(seconds_per_token: Callable[[int], float], budget: int) -> float | None:
    """Seconds per token, None where memory is too short for the budget."""
    try:
        return seconds_per_token(budget)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of memory, of a device or of the host."""
    import torch

    words = str(error).lower()
    host = "can't allocate memory" in words or "not enough memory" in words or "out of memory" in words
    host = host or "status_alloc_failed" in words
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (isinstance(error, RuntimeError) and host)
