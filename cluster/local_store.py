"""A local folder as a store."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from penstock.cluster.local_files import (
    COPY_CHUNK_BYTES,
    TEMPORARY_PREFIX,
    link_or_copy,
    replacing,
    sync_folder,
    temporary_file,
    write_synced,
)
from penstock.cluster.storage import ObjectInfo, Store, checked_path, leftover_limit


class LocalStore(Store):
    """A folder. Creation is a hard link to a complete, synced file: atomic on every POSIX file system, and on NFS.

    Symbolic links below the root that lead out of it are refused, unless `follow_links` says that the folder is
    somebody's corpus and not our own store.
    """

    def __init__(self, root: Path, follow_links: bool = False) -> None:
        self.root = root.absolute()
        self.url = str(self.root)
        self.follow_links = follow_links

    def open(self, path: str) -> BinaryIO:
        try:
            return self._locate(path).open("rb")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise self._missing(path) from None

    def info(self, path: str) -> ObjectInfo | None:
        target = self._locate(path)
        return _file_info(path, target) if target.is_file() else None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder = self._locate_folder(prefix)
        for parent, _, names in os.walk(folder, followlinks=self.follow_links):
            for name in names:
                file = Path(parent, name)
                if self._is_object(name, file.is_symlink()) and (
                    info := _file_info(file.relative_to(self.root).as_posix(), file)
                ):
                    yield info

    def names(self, folder: str) -> set[str]:
        return {
            entry.name
            for entry in _entries(self._locate_folder(folder))
            if self._is_object(entry.name, entry.is_symlink()) and entry.is_file()
        }

    def folders(self, folder: str) -> set[str]:
        return {
            entry.name
            for entry in _entries(self._locate_folder(folder))
            if entry.is_dir(follow_symlinks=self.follow_links)
        }

    def write(self, path: str, data: bytes) -> None:
        with replacing(self._locate(path)) as file:
            file.write(data)

    def upload(self, local: Path, path: str) -> None:
        with local.open("rb") as source, replacing(self._locate(path)) as target:
            shutil.copyfileobj(source, target, COPY_CHUNK_BYTES)

    def copy(self, source: str, target: str) -> None:
        """As in Store. Where hard links work both names share one file, and `modified` of both becomes the present."""
        origin, goal = self._locate(source), self._locate(target)
        if not origin.is_file():
            raise self._missing(source)
        with temporary_file(goal.parent) as temporary:
            link_or_copy(origin, temporary)
            os.utime(temporary)
            temporary.replace(goal)
        sync_folder(goal.parent)

    def delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            target = self._locate(path)
            target.unlink(missing_ok=True)
            self._prune_empty(target.parent)

    def clock(self) -> datetime:
        with temporary_file(self.root) as file:
            return _utc(file.stat().st_mtime)

    def remove_leftovers(self, grace_s: float) -> int:
        before = leftover_limit(self.clock(), grace_s)
        removed = 0
        for file in self.root.rglob(f"{TEMPORARY_PREFIX}*"):
            with suppress(FileNotFoundError):  # its writer has just finished
                if _utc(file.lstat().st_mtime) < before:
                    file.unlink()
                    removed += 1
        return removed

    def _write_if_absent(self, path: str, data: bytes) -> bool:
        target = self._locate(path)
        with temporary_file(target.parent) as temporary:
            with temporary.open("wb") as file:
                write_synced(file, data)
            try:
                target.hardlink_to(temporary)
            except FileExistsError:
                return False
        sync_folder(target.parent)
        return True

    def _locate(self, path: str) -> Path:
        target = self.root / checked_path(path)
        if not self.follow_links and not Path(os.path.realpath(target)).is_relative_to(os.path.realpath(self.root)):
            raise ValueError(
                f"object path ({path!r}): a path stays below its root, got a symbolic link that leads out of "
                f"{self.url}; replace the link by the file"
            )
        return target

    def _locate_folder(self, folder: str) -> Path:
        return self._locate(folder) if folder else self.root

    def _is_object(self, name: str, is_link: bool) -> bool:
        return not name.startswith(TEMPORARY_PREFIX) and (self.follow_links or not is_link)

    def _prune_empty(self, folder: Path) -> None:
        with suppress(OSError):  # not empty, or pruned by another process: both end the climb
            while folder != self.root:
                folder.rmdir()
                folder = folder.parent


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        yield from entries


def _file_info(path: str, file: Path) -> ObjectInfo | None:
    try:
        status = file.stat()
    except FileNotFoundError:  # deleted since it was listed
        return None
    return ObjectInfo(path, status.st_size, _utc(status.st_mtime), None)


def _utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
