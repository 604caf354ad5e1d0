"""The node's cache of files from object storage: named by their sha256, verified, within a size limit.

Its processes and threads agree through the kernel's file locks, which end with whoever holds them: a reader has a
shared lock on each file that it has open, and a file is only removed by somebody who gets the exclusive one. A download
goes into a file of another name, which takes its own when all bytes are there and right.
"""

import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from penstock.cluster.jobs.shards import FileRecord
from penstock.cluster.local_files import COPY_CHUNK_BYTES
from penstock.cluster.storage import Store

LOCKS = ".locks"
ROOM_LOCK = "room"
DOWNLOAD_LOCK_DIGITS = 2  # of the sha256: 256 locks, so that two files at once rarely share one
PARTIAL = ".partial"

logger = logging.getLogger(__name__)


class DamagedFile(Exception):
    """A published file is not what its manifest says."""


@dataclass(frozen=True)
class FileCache:
    """Files in `folder`, at most `limit_bytes` unless more are open at once; the least recently opened go first."""

    folder: Path
    limit_bytes: int

    @contextmanager
    def hold(self, store: Store, place: str, record: FileRecord) -> Iterator[Path]:
        """The local path of the object at `place`, whose sha256 was just checked; it stays until the block is left.

        Raises:
            DamagedFile: the object is missing, or has other bytes than its record says.
        """
        with self._held(record) or self._fetched(store, place, record):
            yield self._path(record)

    def _held(self, record: FileRecord) -> BufferedReader | None:
        """The cached file, open and locked against removal; None where it is absent or damaged."""
        try:
            file = self._path(record).open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        # without a name it was removed between the opening and the lock
        if os.fstat(file.fileno()).st_nlink and sha256_of(file) == record.sha256:
            os.utime(file.fileno())
            return file
        file.close()
        return None

    def _fetched(self, store: Store, place: str, record: FileRecord) -> BinaryIO:
        """As `_held`, of a file that was not there; of several who want it one fetches it."""
        with self._lock(record.sha256[:DOWNLOAD_LOCK_DIGITS]):
            held = self._held(record)
            if held is not None:
                return held
            file = self._reserve(record)
            try:
                self._fill(file, store, place, record)
            except BaseException:
                file.close()
                with self._lock(ROOM_LOCK):
                    self._partial(record).unlink(missing_ok=True)
                raise
            with self._lock(ROOM_LOCK):
                self._partial(record).replace(self._path(record))
            return file

    def _reserve(self, record: FileRecord) -> BinaryIO:
        """A locked file of the record's size under the name of a partial one, what a killed process left there gone."""
        with self._lock(ROOM_LOCK):
            self._make_room(record.size_bytes)
            file = self._partial(record).open("w+b")
            fcntl.flock(file, fcntl.LOCK_SH)
            file.truncate(record.size_bytes)  # counts as taken from now on
            return file

    def _fill(self, file: BinaryIO, store: Store, place: str, record: FileRecord) -> None:
        try:
            with store.open(place) as source:
                found = _copy(source, file, record.size_bytes)
        except FileNotFoundError as error:
            raise damaged(place, record, "no file") from error
        file.flush()
        if found != record.sha256:
            raise damaged(place, record, found)

    def _make_room(self, needed_bytes: int) -> None:
        """Removes files that nobody holds, partial ones first, until so many bytes fit; under the lock for names."""
        paths = [path for path in self.folder.iterdir() if path.is_file()]
        files = sorted((path.suffix != PARTIAL, path.stat().st_mtime_ns, path) for path in paths)
        excess_bytes = sum(path.stat().st_size for path in paths) + needed_bytes - self.limit_bytes
        for _, _, path in files:
            if excess_bytes <= 0:
                return
            excess_bytes -= _remove_if_free(path)
        if excess_bytes > 0:
            logger.warning(
                "cache %s goes beyond its limit of %d bytes by %d, as the files in it are open; raise the limit",
                self.folder,
                self.limit_bytes,
                excess_bytes,
            )

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Of all processes and threads on this node one at a time."""
        folder = self.folder / LOCKS
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _path(self, record: FileRecord) -> Path:
        return self.folder / record.sha256

    def _partial(self, record: FileRecord) -> Path:
        return self.folder / f"{record.sha256}{PARTIAL}"


def sha256_of(file: BufferedReader) -> str:
    """Hexadecimal sha256 of an open file."""
    return hashlib.file_digest(file, "sha256").hexdigest()


def damaged(place: str, record: FileRecord, found: str) -> DamagedFile:
    """The error for a file of another hash than `record` says."""
    return DamagedFile(
        f"published file ({place}) must have sha256 {record.sha256[:16]}, got {found[:16]}; "
        "restore it from a copy, or roll the alias back and run the pipeline again"
    )


def _copy(source: BinaryIO, target: BinaryIO, size_bytes: int) -> str:
    """Copies one byte more than there should be at most, which shows that there is more; the sha256 of the copy."""
    digest, left_bytes = hashlib.sha256(), size_bytes + 1
    while left_bytes and (chunk := source.read(min(left_bytes, COPY_CHUNK_BYTES))):
        digest.update(chunk)
        target.write(chunk)
        left_bytes -= len(chunk)
    return digest.hexdigest()


def _remove_if_free(path: Path) -> int:
    """Removes a file unless somebody holds it; the bytes that this frees."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        path.unlink()
        return os.fstat(file.fileno()).st_size
