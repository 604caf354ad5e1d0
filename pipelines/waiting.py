"""Wait until an index is free: what an upgrade of days does where a run ends at once."""

import time
from collections.abc import Callable
from typing import TypeVar

from penstock.cluster.leases import LeaseHeld, lease_holder
from penstock.cluster.storage import Store
from penstock.operators.identity import fingerprint
from penstock.pipelines.progress import Reporter

LEASE_PAUSE_S = 5.0
ID_HEX_DIGITS = 16

T = TypeVar("T")


def when_free(
    store: Store, index: str, reporter: Reporter, call: Callable[[], T], pause: Callable[[float], None] = time.sleep
) -> T:
    """What a call returns that takes the lease of an index: made when nobody holds that, and again where another run
    takes it first.

    Args:
        call: raises LeaseHeld before it does anything else that counts.
        pause: sleeps, for so many seconds.
    """
    told = False
    while True:
        while (holder := lease_holder(store, index)) is not None:
            if not told:
                reporter.note(f"waiting for {holder} of index {index} to end")
            told = True
            pause(LEASE_PAUSE_S)
        try:
            return call()
        except LeaseHeld:
            continue


def upgrade_lease(index: str) -> str:
    """The lease of the upgrade of an index, held for as long as that works, beside the lease of its single runs."""
    return f"upgrade-{fingerprint(upgrade_of=index)[:ID_HEX_DIGITS]}"
