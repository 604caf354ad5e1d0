"""Work that waits for other runs of an index."""

from pathlib import Path

from penstock.cluster.leases import Lease, LeaseHeld, acquire
from penstock.cluster.local_store import LocalStore
from penstock.pipelines.progress import SilentReporter
from penstock.pipelines.waiting import LEASE_PAUSE_S, upgrade_lease, when_free


def test_a_run_that_is_faster_is_waited_for_as_one_that_was_there(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    held = [acquire(store, "test", "first")]
    pauses: list[float] = []
    calls: list[int] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        held.pop().release()

    def call() -> Lease:
        calls.append(len(held))
        if len(calls) == 1:  # another run takes the lease when it was seen to be free
            held.append(acquire(store, "test", "faster"))
        return acquire(store, "test", "upgrade")

    with when_free(store, "test", SilentReporter(), call, pause) as lease:
        assert lease.run_id == "upgrade" and lease.number == 3
    assert calls == [0, 0] and pauses == [LEASE_PAUSE_S] * 2


def test_the_lease_of_an_upgrade_is_beside_that_of_runs(tmp_path: Path) -> None:
    """Whatever the index is called, up to the longest name that it may have."""
    store = LocalStore(tmp_path)
    for index in ("a", "a" * 63):
        with acquire(store, index, "run"), acquire(store, upgrade_lease(index), "upgrade"):
            try:
                acquire(store, upgrade_lease(index), "other")
            except LeaseHeld as held:
                assert "run upgrade" in str(held)
            else:
                raise AssertionError("two upgrades of an index at once")
