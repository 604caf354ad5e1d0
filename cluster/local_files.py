"""Local files that appear whole under their name, or not at all: written under a temporary name, synced, renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

TEMPORARY_PREFIX = ".penstock-"  # local names under which an object is written before it takes its own name
FOLDER_TRIES = 20  # a folder may be pruned as empty between its creation and that of the first file in it
COPY_CHUNK_BYTES = 16 * 2**20


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A file that takes the target's name when the block ends well and leaves nothing behind when it does not."""
    with temporary_file(target.parent) as temporary:
        with temporary.open("wb") as file:
            yield file
            write_synced(file, b"")
        temporary.replace(target)
    sync_folder(target.parent)


@contextmanager
def temporary_file(folder: Path) -> Iterator[Path]:
    """A fresh empty file in a folder; whatever still has its name at the end is removed."""
    temporary = folder / f"{TEMPORARY_PREFIX}{uuid4().hex}"
    for _ in range(FOLDER_TRIES):
        # Somebody may prune the empty folder between the two, and also within mkdir, which then takes it for a file.
        with suppress(FileNotFoundError, FileExistsError):
            folder.mkdir(parents=True, exist_ok=True)
            temporary.touch(exist_ok=False)
            break
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def link_or_copy(origin: Path, temporary: Path) -> None:
    """Give `temporary` the content of `origin`, by a hard link where that works."""
    linked = temporary.with_suffix(".link")  # a link cannot take a name that exists
    try:
        linked.hardlink_to(origin)
    except OSError:  # another device, or a file system without hard links
        shutil.copyfile(origin, temporary)
    else:
        linked.replace(temporary)


def write_synced(file: BinaryIO, data: bytes) -> None:
    """Write, and wait until all of the file is on the disk."""
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
