"""One run at a time for each name, fenced.

A lease is a create-only object `leases/<name>/00000007.json`. Its number is the fence: whoever takes over creates the
next number, and the late holder finds out at `check`, before it publishes. Beside it lie `.heartbeat`, overwritten
while the holder lives, and `.released`. Heartbeats decide only how soon a dead holder is succeeded: when two callers
disagree about that, the creation of the next number still has one winner.
"""

import json
import logging
import os
import re
import socket
import threading
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from penstock.cluster.storage import AlreadyExists, StorageUnavailable, Store, StoreUnsuitable, check_name

logger = logging.getLogger(__name__)

DEFAULT_TTL_S = 60.0
BEATS_PER_TTL = 4  # three may fail before anybody takes the lease for stale
KEPT_LEASES = 10
SAME_START_S = 2.0  # the boot time that start times are taken from is known to the second
LEASE_NAME = re.compile(r"(\d{8})\.json")
LEASE_FILE = re.compile(r"(\d{8})\.(?:json|heartbeat|released)")


class LeaseHeld(Exception):
    """Another run holds the lease."""


class LeaseLost(Exception):
    """This run no longer holds its lease and must not publish."""


@dataclass(frozen=True)
class Holder:
    """Who took a lease. `machine` is one boot of a machine and one process namespace: there a pid means something."""

    run_id: str
    host: str
    pid: int
    started_s: float  # of the process, since the boot: does not move when the clock is set
    machine: str
    ttl_s: float


class Lease:
    """A held lease: a context manager with a heartbeat in the background. `number` grows with every holder."""

    def __init__(self, store: Store, name: str, number: int, run_id: str, ttl_s: float) -> None:
        self.store, self.name, self.number, self.run_id, self.ttl_s = store, name, number, run_id, ttl_s
        self._ended = threading.Event()
        self._beaten_s = time.monotonic()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._beat, name=f"lease-{name}-{number}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.release()
        except (StorageUnavailable, StoreUnsuitable, OSError):
            if error is None:
                raise
            logger.warning("lease %s of run %s was not released; it ends in %.0f s", self.name, self.run_id, self.ttl_s)

    def check(self) -> None:
        """Prove that nobody has taken over; call it right before a publish.

        Raises:
            LeaseLost: a higher number exists, the lease was released, or no heartbeat could be written for a whole ttl.
        """
        newest = max(_numbers(self.store, self.name), default=0)
        if newest > self.number:
            winner = _described(self.store, self.name, newest)
            raise LeaseLost(
                f"lease {self.name} ({self.number}) of run {self.run_id}: {winner} took it over as number {newest}; "
                "do not publish, look at that run"
            )
        silent_s = time.monotonic() - self._beaten_s
        if self._ended.is_set():
            raise LeaseLost(f"lease {self.name} ({self.number}) of run {self.run_id} was released; take a new one")
        if silent_s > self.ttl_s:
            raise LeaseLost(
                f"lease {self.name} ({self.number}) of run {self.run_id}: a heartbeat is due in {self.ttl_s:.0f} s, "
                f"got none for {silent_s:.0f} s ({self._failure}); check the store and run the command again"
            )

    def release(self) -> None:
        """Let the next run in at once. Releasing twice is no error."""
        self._ended.set()
        if self._thread is not threading.current_thread():
            self._thread.join(self.ttl_s)
        try:
            self.store.create(_path(self.name, self.number, "released"), {"run_id": self.run_id})
        except AlreadyExists:
            logger.debug("lease %s (%d) was released before", self.name, self.number)

    def _beat(self) -> None:
        path = _path(self.name, self.number, "heartbeat")
        while not self._ended.wait(self.ttl_s / BEATS_PER_TTL):
            try:
                self.store.write(path, self.run_id.encode())
            except (StorageUnavailable, StoreUnsuitable, OSError) as error:
                self._failure = error
            else:
                self._beaten_s = time.monotonic()


def acquire(store: Store, name: str, run_id: str, ttl_s: float = DEFAULT_TTL_S) -> Lease:
    """Take the lease `name`, from nobody or from a holder that released it, died, or was silent for its whole ttl.

    Raises:
        LeaseHeld: another run holds it, or was faster.
    """
    if ttl_s <= 0:
        raise ValueError(f"ttl ({ttl_s} s) of lease {name}: positive; {DEFAULT_TTL_S:.0f} s is a good value")
    newest = max(_numbers(store, name), default=0)
    if newest and not _is_over(store, name, newest):
        raise _held(store, name, newest)
    number = newest + 1
    try:
        store.create(_path(name, number, "json"), asdict(_this_process(run_id, ttl_s)))
    except AlreadyExists:
        raise _held(store, name, number) from None
    numbers = _numbers(store, name)
    if max(numbers) > number:  # we slept since the first look, and `number` had been used and pruned
        raise _held(store, name, max(numbers))
    _prune(store, name, number - KEPT_LEASES)
    return Lease(store, name, number, run_id, ttl_s)


def lease_holder(store: Store, name: str) -> str | None:
    """Who holds the lease `name` now, in words; None where nobody does."""
    newest = max(_numbers(store, name), default=0)
    return _described(store, name, newest) if newest and not _is_over(store, name, newest) else None


def _is_over(store: Store, name: str, number: int) -> bool:
    """Whether the holder released the lease, is a dead process of this machine, or was silent for its ttl."""
    if store.info(_path(name, number, "released")) is not None:
        return True
    holder = _holder(store, name, number)
    if holder is not None and _has_died(holder):
        return True
    ttl_s = DEFAULT_TTL_S if holder is None else holder.ttl_s
    signs = (store.info(_path(name, number, suffix)) for suffix in ("json", "heartbeat"))
    modified = [info.modified for info in signs if info is not None]
    # both times are the store's: the local clock may be off by a day
    return not modified or (store.clock() - max(modified)).total_seconds() > ttl_s


def _has_died(holder: Holder) -> bool:
    """Whether the holder is known to be gone; False when it runs elsewhere, or when that cannot be told."""
    if holder.machine != _this_machine():
        return False
    try:
        return abs(_started_s(holder.pid) - holder.started_s) > SAME_START_S
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def _this_process(run_id: str, ttl_s: float) -> Holder:
    pid = os.getpid()
    return Holder(run_id, socket.gethostname(), pid, _started_s(pid), _this_machine(), ttl_s)


def _started_s(pid: int) -> float:
    """Start of a process in seconds since the boot; a zombie has ended."""
    process = psutil.Process(pid)
    if process.status() == psutil.STATUS_ZOMBIE:
        raise psutil.NoSuchProcess(pid)
    return process.create_time() - psutil.boot_time()


@cache
def _this_machine() -> str:
    """This boot of this machine, and the process namespace: containers on one machine count pids on their own."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if boot.exists() and namespace.is_symlink():
        return f"{boot.read_text().strip()} {os.readlink(namespace)}"
    return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def _holder(store: Store, name: str, number: int) -> Holder | None:
    """Who took a lease; None when that record is gone or not what `acquire` writes."""
    try:
        record: dict[str, Any] = json.loads(store.read(_path(name, number, "json")))
        return Holder(
            run_id=str(record["run_id"]),
            host=str(record["host"]),
            pid=int(record["pid"]),
            started_s=float(record["started_s"]),
            machine=str(record["machine"]),
            ttl_s=float(record["ttl_s"]),
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _held(store: Store, name: str, number: int) -> LeaseHeld:
    return LeaseHeld(
        f"lease {name} ({number}) is held by {_described(store, name, number)}; wait for it to finish, or stop it: the "
        "lease is free as soon as it ends, or at the latest when its heartbeats have failed for its ttl"
    )


def _described(store: Store, name: str, number: int) -> str:
    holder, info = _holder(store, name, number), store.info(_path(name, number, "json"))
    who = "an unknown run" if holder is None else f"run {holder.run_id} (host {holder.host}, pid {holder.pid})"
    return who if info is None else f"{who} since {info.modified:%Y-%m-%d %H:%M:%S} UTC"


def _numbers(store: Store, name: str) -> list[int]:
    return [int(match[1]) for file in store.names(_folder(name)) if (match := LEASE_NAME.fullmatch(file))]


def _prune(store: Store, name: str, last: int) -> None:
    """Remove the leases up to number `last`. The newest stay, so that no number is used twice."""
    files = ((file, LEASE_FILE.fullmatch(file)) for file in store.names(_folder(name)))
    store.delete(f"{_folder(name)}/{file}" for file, match in files if match and int(match[1]) <= last)


def _folder(name: str) -> str:
    return f"leases/{check_name('lease', name)}"


def _path(name: str, number: int, suffix: str) -> str:
    return f"{_folder(name)}/{number:08d}.{suffix}"
