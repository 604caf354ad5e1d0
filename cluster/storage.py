"""Object storage: one small interface over a local folder and over an S3 bucket.

Coordination rests on `create` alone (create if absent); everything else is whole-object reads and atomic replacement.
A reply can be lost after the store has applied a request, so a created object carries a unique commit id, and a
refusal, a time-out or a dropped connection is settled by reading the object back.
"""

import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from penstock.cluster.local_files import COPY_CHUNK_BYTES, replacing

PROBE_FOLDER = "probes"
CREATE_TRIES = 5  # an object that refuses our creation and is gone when we read it back was deleted in between
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


class AlreadyExists(Exception):
    """`create` found an object of that name. `record` is the record that is there ({} when it is not a JSON object)."""

    def __init__(self, path: str, record: dict[str, Any]) -> None:
        super().__init__(path, record)
        self.path = path
        self.record = record

    def __str__(self) -> str:
        return f"object `{self.path}` exists already, with commit id {self.record.get('commit_id')}"


class StoreUnsuitable(Exception):
    """The store cannot be used as it is (no such bucket, no access, preconditions ignored): trying again is no help."""


class StorageUnavailable(Exception):
    """Transient failures went on until the deadline; whether the last request was applied is unknown."""


@dataclass(frozen=True)
class ObjectInfo:
    """What a store says about one object. `modified` is aware UTC on the store's clock, never on the local one."""

    path: str
    size_bytes: int
    modified: datetime
    etag: str | None


class Store(ABC):
    """Objects under one root. Paths are relative to it and '/'-separated; a path that could leave it is refused.

    A store can be pickled (it connects at first use) and used from several threads.
    """

    url: str

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    @abstractmethod
    def open(self, path: str) -> BinaryIO:
        """A seekable reader of one object; FileNotFoundError when it is absent."""

    @abstractmethod
    def info(self, path: str) -> ObjectInfo | None:
        """Size and time of one object; None when it is absent."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object below the folder `prefix` ("" is the root), recursively, in no promised order."""

    @abstractmethod
    def names(self, folder: str) -> set[str]:
        """Names of the objects directly in a folder; empty when there is no such folder."""

    @abstractmethod
    def folders(self, folder: str) -> set[str]:
        """Names of the folders directly in a folder."""

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Create or replace an object in one atomic step."""

    @abstractmethod
    def upload(self, local: Path, path: str) -> None:
        """Create or replace an object of any size with a local file's bytes, in one atomic step."""

    @abstractmethod
    def copy(self, source: str, target: str) -> None:
        """Create or replace `target` with the bytes of `source` without moving them through this process."""

    @abstractmethod
    def delete(self, paths: Iterable[str]) -> None:
        """Delete objects; absent ones are no error."""

    @abstractmethod
    def clock(self) -> datetime:
        """The store's present time, comparable with `ObjectInfo.modified`."""

    @abstractmethod
    def remove_leftovers(self, grace_s: float) -> int:
        """Remove what killed writers left (temporary files, unfinished uploads) older than `grace_s`; their number."""

    @abstractmethod
    def _write_if_absent(self, path: str, data: bytes) -> bool:
        """True when this call created the object, False when one was there (perhaps our own, its reply lost)."""

    def read(self, path: str) -> bytes:
        """All bytes of one object; FileNotFoundError when it is absent."""
        with self.open(path) as file:
            return file.read()

    def download(self, path: str, local: Path) -> None:
        """Write an object to a local file in one atomic step."""
        with self.open(path) as source, replacing(local) as target:
            shutil.copyfileobj(source, target, COPY_CHUNK_BYTES)

    def create(self, path: str, record: dict[str, object]) -> dict[str, Any]:
        """Create a small JSON object if there is none of that name; of several callers exactly one succeeds.

        Returns:
            The record as stored: `record` and its unique `commit_id`.

        Raises:
            AlreadyExists: with the record that is there.
            StorageUnavailable: the outcome is unknown; a later call tells.
        """
        stored = {**record, "commit_id": uuid4().hex}
        data = json.dumps(stored, indent=1, allow_nan=False).encode()
        for _ in range(CREATE_TRIES):
            present = stored if self._write_if_absent(path, data) else self._record_at(path)
            if present is None:
                continue
            if present.get("commit_id") != stored["commit_id"]:
                raise AlreadyExists(path, present)
            return stored
        raise StorageUnavailable(
            f"object `{path}` of {self.url}: {CREATE_TRIES} times it existed at creation and was gone when read back; "
            "look for another process that creates and deletes it"
        )

    def probe(self) -> None:
        """Prove that the store creates only what is absent.

        Raises:
            StoreUnsuitable: it refuses to create objects, or creates one twice.
        """
        path = f"{PROBE_FOLDER}/{uuid4().hex}.json"
        try:
            self.create(path, {"probe": "first"})
        except OSError as error:
            raise StoreUnsuitable(
                f"store {self.url} refuses to create an object if absent ({error}); check that it can be written to, "
                "and that it knows If-None-Match (object store) or hard links (file system)"
            ) from error
        try:
            self.create(path, {"probe": "second"})
        except AlreadyExists:
            return
        finally:
            self.delete([path])
        raise StoreUnsuitable(
            f"store {self.url} created one object twice: it ignores `If-None-Match: *`, so two publishers would "
            "overwrite each other; use a store with conditional writes (AWS S3, MinIO, Ceph, R2, a local folder)"
        )

    def _record_at(self, path: str) -> dict[str, Any] | None:
        """The JSON object at a path; {} when it is something else, None when there is nothing."""
        try:
            record = json.loads(self.read(path))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return record if isinstance(record, dict) else {}

    def _missing(self, path: str) -> FileNotFoundError:
        return FileNotFoundError(f"object `{path}` of {self.url} does not exist")


def open_store(url: str) -> Store:
    """The store at a local folder (absolute, relative or file://) or at s3://bucket/prefix. Connects at first use."""
    from penstock.cluster.local_store import LocalStore

    if "://" not in url:
        if not url or "\0" in url:
            raise ValueError(f"store ({url!r}): a store is a folder or s3://bucket/prefix; name one")
        return LocalStore(Path(url).expanduser())
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path:
        return LocalStore(Path(unquote(parts.path)))
    if parts.scheme == "s3":
        return _open_s3(url)
    raise ValueError(
        f"store ({redact(url)}): a store is a local folder, file:///folder or s3://bucket/prefix, got "
        f"{parts.scheme}://; copy the data to one of these, or serve it through an S3 gateway"
    )


def _open_s3(url: str) -> Store:
    from penstock.cluster.s3_store import S3Store

    # never echo what stands before an '@' or behind a '?': people paste keys and signed URLs there
    match = re.fullmatch(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{1,254})(?:/([^?#@]*))?", url)
    if match is None:
        raise ValueError(
            f"store ({redact(url)}): an S3 store is s3://bucket/prefix without user, password, query or fragment; "
            "give credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, an endpoint in AWS_ENDPOINT_URL_S3"
        )
    return S3Store(match[1], (match[2] or "").rstrip("/"))


def check_name(kind: str, name: str) -> str:
    """The name, when it can be one segment of a path everywhere; `kind` is what the error text calls it."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{kind} ({name!r}): a name is 1 to 63 of a-z, 0-9, '.', '_' and '-' and begins with a letter or a digit; "
            "rename it"
        )
    return name


def checked_path(path: str) -> str:
    """The path, when it cannot leave the root of a store."""
    if "\\" in path or "\0" in path or any(segment in ("", ".", "..") for segment in path.split("/")):
        raise ValueError(
            f"object path ({path!r}): a path is relative, '/'-separated, and has no '..', '.', empty segment, "
            "backslash or NUL; correct what names it"
        )
    return path


def leftover_limit(now: datetime, grace_s: float) -> datetime:
    """What is older than this was left by a killed writer."""
    if grace_s <= 0:
        raise ValueError(f"grace ({grace_s} s): positive, or files in flight would be removed; an hour is a good value")
    return now - timedelta(seconds=grace_s)


def redact(text: str) -> str:
    """The text without passwords in URLs and without the parameters of signed URLs."""
    text = re.sub(r"//(?:[^/@\s]*|[^/:@\s]*:[^@\s]*)@", "//***@", text)
    return re.sub(r"([?&][\w-]*(?:signature|credential|token|key)[\w-]*)=[^&\s\"']*", r"\1=***", text, flags=re.I)
