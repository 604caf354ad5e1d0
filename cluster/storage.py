"""Object storage: one small interface over a local folder and over an S3 bucket.

Coordination rests on `create` alone (create if absent); everything else is whole-object reads and atomic replacement.
A reply can be lost after the store has applied a request, so a created object carries a unique commit id, and a
refusal, a time-out or a dropped connection is settled by reading the object back. Which errors are transient is decided
in one place, `_trouble`; nothing below it retries by itself.
"""

import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import time
from abc import ABC, abstractmethod
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from functools import cache
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, assert_never
from urllib.parse import unquote, urlsplit
from uuid import uuid4

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

TEMPORARY_PREFIX = ".penstock-"  # local names under which an object is written before it takes its own name
PROBE_FOLDER = "probes"
CREATE_TRIES = 5  # an object that refuses our creation and is gone when we read it back was deleted in between
FOLDER_TRIES = 20  # a folder may be pruned as empty between its creation and that of the first file in it
COPY_CHUNK_BYTES = 16 * 2**20
READ_AHEAD_BYTES = 2**20  # a Parquet footer and the page index before it fit; larger reads go through unbuffered
S3_COPY_LIMIT_BYTES = 5 * 2**30  # one CopyObject request
S3_MAX_PARTS = 10_000
S3_DELETE_BATCH = 1000
UPLOAD_THREADS = 4
SLOWEST_UPLOAD_BYTES_PER_S = 2**20
LARGEST_READ_BYTES = 32 * 2**20  # of one request: a larger read is several, each with its own deadline
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.1, 10.0
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
        with self.open(path) as source, _replacing(local) as target:
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
        with _replacing(self._locate(path)) as file:
            file.write(data)

    def upload(self, local: Path, path: str) -> None:
        with local.open("rb") as source, _replacing(self._locate(path)) as target:
            shutil.copyfileobj(source, target, COPY_CHUNK_BYTES)

    def copy(self, source: str, target: str) -> None:
        """As in Store. Where hard links work both names share one file, and `modified` of both becomes the present."""
        origin, goal = self._locate(source), self._locate(target)
        if not origin.is_file():
            raise self._missing(source)
        with _temporary(goal.parent) as temporary:
            _link_or_copy(origin, temporary)
            os.utime(temporary)
            temporary.replace(goal)
        _sync_folder(goal.parent)

    def delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            target = self._locate(path)
            target.unlink(missing_ok=True)
            self._prune_empty(target.parent)

    def clock(self) -> datetime:
        with _temporary(self.root) as file:
            return _utc(file.stat().st_mtime)

    def remove_leftovers(self, grace_s: float) -> int:
        before = _leftover_limit(self.clock(), grace_s)
        removed = 0
        for file in self.root.rglob(f"{TEMPORARY_PREFIX}*"):
            with suppress(FileNotFoundError):  # its writer has just finished
                if _utc(file.lstat().st_mtime) < before:
                    file.unlink()
                    removed += 1
        return removed

    def _write_if_absent(self, path: str, data: bytes) -> bool:
        target = self._locate(path)
        with _temporary(target.parent) as temporary:
            with temporary.open("wb") as file:
                _write_synced(file, data)
            try:
                target.hardlink_to(temporary)
            except FileExistsError:
                return False
        _sync_folder(target.parent)
        return True

    def _locate(self, path: str) -> Path:
        target = self.root / _checked_path(path)
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


@dataclass(frozen=True)
class S3Limits:
    """Time-outs of one request, the deadline of one operation with all its tries, and the size of an upload's parts."""

    connect_timeout_s: float = 5.0
    read_timeout_s: float = 60.0
    deadline_s: float = 180.0  # two slow replies and their repetition
    part_bytes: int = 32 * 2**20


class S3Store(Store):
    """A prefix of a bucket, through s3fs. Endpoint, region and credentials come from the environment or the cloud.

    s3fs and botocore each have their own retries; both are off, so that `_request` alone decides, within one deadline.
    """

    def __init__(self, bucket: str, prefix: str = "", limits: S3Limits | None = None) -> None:
        self.bucket = bucket
        self.prefix = f"{_checked_path(prefix)}/" if prefix else ""
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self.limits = limits if limits is not None else S3Limits()
        self._connection: tuple[int, _Client] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None}

    def open(self, path: str) -> BinaryIO:
        info = self.info(path)
        if info is None:
            raise self._missing(path)
        return BufferedReader(_RangeReader(self, info), READ_AHEAD_BYTES)

    def read(self, path: str) -> bytes:
        body: bytes = self._request(f"reading `{path}`", "get_object", Key=self._key(path))["Body"]
        return body

    def info(self, path: str) -> ObjectInfo | None:
        try:
            head = self._request(f"looking up `{path}`", "head_object", Key=self._key(path))
        except FileNotFoundError:
            return None
        return ObjectInfo(path, head["ContentLength"], head["LastModified"].astimezone(UTC), head["ETag"].strip('"'))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for page in self._pages("list_objects_v2", Prefix=self._folder_key(prefix)):
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):  # a console's marker of an empty folder
                    path = entry["Key"].removeprefix(self.prefix)
                    modified = entry["LastModified"].astimezone(UTC)
                    yield ObjectInfo(path, entry["Size"], modified, entry["ETag"].strip('"'))

    def names(self, folder: str) -> set[str]:
        key = self._folder_key(folder)
        pages = self._pages("list_objects_v2", Prefix=key, Delimiter="/")
        return {entry["Key"].removeprefix(key) for page in pages for entry in page.get("Contents", ())} - {""}

    def folders(self, folder: str) -> set[str]:
        key = self._folder_key(folder)
        pages = self._pages("list_objects_v2", Prefix=key, Delimiter="/")
        found = (entry["Prefix"] for page in pages for entry in page.get("CommonPrefixes", ()))
        return {name.removeprefix(key).rstrip("/") for name in found}

    def write(self, path: str, data: bytes) -> None:
        self._request(f"writing `{path}`", "put_object", Key=self._key(path), Body=data)

    def upload(self, local: Path, path: str) -> None:
        size_bytes = local.stat().st_size
        if size_bytes <= self.limits.part_bytes:
            return self.write(path, local.read_bytes())

        def send(upload: dict[str, str], number: int, start: int, stop: int) -> str:
            with local.open("rb") as file:
                file.seek(start)
                body = file.read(stop - start)
            part = self._request(
                f"uploading part {number} of `{path}`", "upload_part", **upload, PartNumber=number, Body=body
            )
            return str(part["ETag"])

        self._send_parts(path, size_bytes, send)

    def copy(self, source: str, target: str) -> None:
        what, origin = f"copying `{source}` to `{target}`", {"Bucket": self.bucket, "Key": self._key(source)}
        target_key, info = self._key(target), self.info(source)
        if info is None:
            raise self._missing(source)
        if info.size_bytes <= S3_COPY_LIMIT_BYTES:
            self._request(what, "copy_object", Key=target_key, CopySource=origin)
            return

        def send(upload: dict[str, str], number: int, start: int, stop: int) -> str:
            extent = f"bytes={start}-{stop - 1}"
            part = self._request(
                what, "upload_part_copy", **upload, PartNumber=number, CopySource=origin, CopySourceRange=extent
            )
            return str(part["CopyPartResult"]["ETag"])

        self._send_parts(target, info.size_bytes, send)

    def delete(self, paths: Iterable[str]) -> None:
        keys = [{"Key": self._key(path)} for path in paths]
        for start in range(0, len(keys), S3_DELETE_BATCH):
            batch = keys[start : start + S3_DELETE_BATCH]
            arguments = {"Objects": batch, "Quiet": True}
            self._request(f"deleting {len(batch)} objects", "delete_objects", Delete=arguments)

    def clock(self) -> datetime:
        reply = self._request("asking for the time", "list_objects_v2", Prefix=self.prefix, MaxKeys=1)
        date = reply["ResponseMetadata"]["HTTPHeaders"].get("date")
        if date is None:
            raise StoreUnsuitable(
                f"store {self.url}: replies carry a Date header, got none; check its proxy or gateway"
            )
        return parsedate_to_datetime(date).astimezone(UTC)

    def remove_leftovers(self, grace_s: float) -> int:
        before = _leftover_limit(self.clock(), grace_s)
        removed = 0
        for page in self._pages("list_multipart_uploads", Prefix=self.prefix):
            for upload in page.get("Uploads", ()):
                if upload["Initiated"].astimezone(UTC) < before:
                    self._abort({"Key": upload["Key"], "UploadId": upload["UploadId"]})
                    removed += 1
        return removed

    def _write_if_absent(self, path: str, data: bytes) -> bool:
        try:
            self._request(f"creating `{path}`", "put_object", Key=self._key(path), Body=data, IfNoneMatch="*")
        except FileExistsError:
            return False
        except StorageUnavailable:
            if self.info(path) is None:  # else `create` reads whose it is
                raise
            return False
        return True

    def _send_parts(self, path: str, size_bytes: int, send: Callable[[dict[str, str], int, int, int], str]) -> None:
        """A multipart upload: `send(upload, number, start, stop)` stores one part and returns its ETag."""
        token, key = uuid4().hex, self._key(path)
        what = f"uploading `{path}`"
        started = self._request(what, "create_multipart_upload", Key=key, Metadata={"penstock-upload": token})
        upload = {"Key": key, "UploadId": started["UploadId"]}
        step = max(self.limits.part_bytes, math.ceil(size_bytes / S3_MAX_PARTS))
        starts = range(0, size_bytes, step)
        try:
            with ThreadPoolExecutor(UPLOAD_THREADS) as threads:
                tags = threads.map(lambda part: send(upload, *part), _extents(starts, step, size_bytes))
                parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]
            self._complete(what, upload, parts, token)
        except BaseException:
            self._abort(upload)
            raise

    def _complete(self, what: str, upload: dict[str, str], parts: Sequence[dict[str, object]], token: str) -> None:
        try:
            self._request(what, "complete_multipart_upload", **upload, MultipartUpload={"Parts": parts})
        except FileNotFoundError:  # no such upload: an earlier try may have completed it and its reply been lost
            head = self._request(what, "head_object", Key=upload["Key"])
            if head["Metadata"].get("penstock-upload") != token:
                raise

    def _abort(self, upload: dict[str, str]) -> None:
        with suppress(FileNotFoundError, StorageUnavailable):  # what remains is found by remove_leftovers
            self._request(f"aborting the upload of `{upload['Key']}`", "abort_multipart_upload", **upload)

    def _key(self, path: str) -> str:
        return self.prefix + _checked_path(path)

    def _folder_key(self, folder: str) -> str:
        return f"{self._key(folder)}/" if folder else self.prefix

    def _pages(self, operation: str, **arguments: object) -> Iterator[dict[str, Any]]:
        what = f"listing `{arguments['Prefix']}`"
        following: dict[str, object] = {}
        while True:
            page = self._request(what, operation, **arguments, **following)
            yield page
            if not page.get("IsTruncated"):
                return
            if operation == "list_multipart_uploads":
                following = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
            else:
                following = {"ContinuationToken": page["NextContinuationToken"]}

    def _request(self, what: str, operation: str, **arguments: object) -> dict[str, Any]:
        """One S3 operation, repeated with back-off and jitter while its failure is transient and the deadline is far.

        Raises:
            FileNotFoundError, FileExistsError: absent object; failed precondition.
            StoreUnsuitable, StorageUnavailable, OSError: no access or bucket; deadline passed; anything else.
        """
        from fsspec.asyn import sync

        started_s = time.monotonic()
        client = self._client()
        for attempt in itertools.count(1):
            left_s = self.limits.deadline_s - (time.monotonic() - started_s)
            try:
                timeout_s = min(left_s, self._longest_try_s(arguments.get("Body")))
                reply: dict[str, Any] = sync(
                    client.loop, _call, client, operation, {"Bucket": self.bucket, **arguments}, timeout=timeout_s
                )
                return reply
            except _s3_errors().every as error:
                self._raise_permanent(what, error)
                spent_s = time.monotonic() - started_s
                wait_s = min(FIRST_BACKOFF_S * 2**attempt, LONGEST_BACKOFF_S) * random.uniform(0.5, 1.0)
                if spent_s + wait_s >= self.limits.deadline_s:
                    raise StorageUnavailable(
                        f"{what} in {self.url}: failed {attempt} times in {spent_s:.1f} s, last with "
                        f"{_describe(error)}; check endpoint and network, then run the same command again"
                    ) from None
                time.sleep(wait_s)
        raise AssertionError("itertools.count ended")

    def _raise_permanent(self, what: str, error: Exception) -> None:
        """Raise our own error for a failure that a repetition cannot heal; return when it is transient.

        `from None`: the original text may hold an endpoint with a password, and everything useful is repeated here.
        """
        text = f"{what} in {self.url}: {_describe(error)}"
        trouble = _trouble(error)
        match trouble:
            case Trouble.TRANSIENT:
                return
            case Trouble.PRECONDITION:
                raise FileExistsError(text) from None
            case Trouble.ABSENT:
                raise FileNotFoundError(text) from None
            case Trouble.NO_BUCKET:
                raise StoreUnsuitable(f"{text}; create the bucket `{self.bucket}` or correct the URL") from None
            case Trouble.NO_ACCESS:
                raise StoreUnsuitable(
                    f"{text}; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN (or the machine's "
                    f"role), and that they may read, write and list `{self.bucket}`"
                ) from None
            case Trouble.OTHER:
                raise OSError(text) from None
            case _:
                assert_never(trouble)

    def _longest_try_s(self, body: object) -> float:
        """How long one try may take. aiohttp 3.14 does not time the reply to a body sent after `100 Continue`."""
        if not isinstance(body, bytes):
            return math.inf
        return self.limits.connect_timeout_s + self.limits.read_timeout_s + len(body) / SLOWEST_UPLOAD_BYTES_PER_S

    def _client(self) -> "_Client":
        """The connection of this process: after a fork the parent's event loop does not run in the child."""
        if self._connection is None or self._connection[0] != os.getpid():
            self._connection = (os.getpid(), _connect(self.limits))
        return self._connection[1]


class Trouble(StrEnum):
    """Kinds of failure that callers treat differently."""

    TRANSIENT = "transient"
    PRECONDITION = "precondition"
    ABSENT = "absent"
    NO_BUCKET = "no bucket"
    NO_ACCESS = "no access"
    OTHER = "other"


# S3 error codes by kind: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html. A HEAD has no body, so
# its code is the status. 409 is neither a win nor a loss of a conditional write: another one was in flight.
TROUBLE_BY_CODE = {
    **dict.fromkeys(("PreconditionFailed", "412"), Trouble.PRECONDITION),
    **dict.fromkeys(("NoSuchKey", "NoSuchUpload", "404"), Trouble.ABSENT),
    "NoSuchBucket": Trouble.NO_BUCKET,
    **dict.fromkeys(
        ("RequestTimeout", "IncompleteBody", "SlowDown", "InternalError", "ServiceUnavailable"), Trouble.TRANSIENT
    ),
}
TROUBLE_BY_STATUS = {
    **dict.fromkeys((401, 403), Trouble.NO_ACCESS),
    **dict.fromkeys((408, 409, 429, 500, 502, 503, 504), Trouble.TRANSIENT),
}


def _trouble(error: Exception) -> Trouble:
    """What kind of failure an exception of s3fs, botocore or the network is."""
    response = _response(error)
    if response is not None:
        code, status = response["Error"].get("Code", ""), response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return TROUBLE_BY_CODE.get(code, TROUBLE_BY_STATUS.get(status, Trouble.OTHER))
    if isinstance(error, _s3_errors().no_access):
        return Trouble.NO_ACCESS
    return Trouble.TRANSIENT if isinstance(error, _s3_errors().transient) else Trouble.OTHER


def _response(error: Exception) -> dict[str, Any] | None:
    """The server's answer: s3fs turns a ClientError into a Python error and keeps the ClientError as its cause."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict) and "Error" in response:
            return response
    return None


def _describe(error: Exception) -> str:
    response = _response(error)
    if isinstance(error, TimeoutError):
        return "no reply in time"
    if response is None:
        return f"{type(error).__name__}: {_redact(str(error))}"
    return f"{response['Error'].get('Code')}: {_redact(str(response['Error'].get('Message', '')))}"


def _redact(text: str) -> str:
    """The text without passwords in URLs and without the parameters of signed URLs."""
    text = re.sub(r"//[^/@\s]*@", "//***@", text)
    return re.sub(r"([?&][\w-]*(?:signature|credential|token|key)[\w-]*)=[^&\s\"']*", r"\1=***", text, flags=re.I)


@dataclass(frozen=True)
class _S3Errors:
    transient: tuple[type[Exception], ...]
    no_access: tuple[type[Exception], ...]
    every: tuple[type[Exception], ...]


@cache
def _s3_errors() -> _S3Errors:
    """The exceptions that requests raise. s3fs is an optional extra, so nothing of it is imported with this module."""
    import botocore.exceptions as boto  # type: ignore[import-untyped]  # ships no types
    from s3fs.core import S3_RETRYABLE_ERRORS

    network = (boto.ConnectionError, boto.IncompleteReadError, boto.ChecksumError, ConnectionError, TimeoutError)
    return _S3Errors(
        transient=(*S3_RETRYABLE_ERRORS, *network),
        no_access=(boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError),
        every=(*S3_RETRYABLE_ERRORS, boto.BotoCoreError, boto.ClientError, OSError),
    )


class _Client(Protocol):
    """What is used of s3fs: one operation of the S3 client, on the event loop that it runs in."""

    loop: AbstractEventLoop
    retries: int

    async def _call_s3(self, operation: str, **arguments: object) -> dict[str, Any]: ...


def _connect(limits: S3Limits) -> _Client:
    try:
        import aiobotocore.session
        import s3fs
    except ImportError as error:
        raise StoreUnsuitable("s3:// needs the S3 libraries: pip install 'penstock[s3]'") from error
    # at DEBUG these write signed headers, and with them a session token, into the log
    for name in ("botocore.auth", "botocore.endpoint", "botocore.hooks", "botocore.parsers"):
        logging.getLogger(name).setLevel(logging.INFO)
    config = {
        "connect_timeout": limits.connect_timeout_s,
        "read_timeout": limits.read_timeout_s,
        "retries": {"max_attempts": 0},
    }
    session = aiobotocore.session.AioSession()
    session.register_component("data_loader", _api_descriptions())
    client: _Client = s3fs.S3FileSystem(
        session=session, skip_instance_cache=True, use_listings_cache=False, config_kwargs=config
    )
    client.retries = 1
    return client


@cache
def _api_descriptions() -> object:
    """botocore's description of S3. Reading it is 0.14 of the 0.16 s of CPU time that a new client takes."""
    from botocore.loaders import create_loader  # type: ignore[import-untyped]  # ships no types

    return create_loader()


async def _call(client: _Client, operation: str, arguments: dict[str, object]) -> dict[str, Any]:
    """One operation of the S3 client; a body is read to its end here, so that its failures are retried as well."""
    reply = await client._call_s3(operation, **arguments)
    if "Body" in reply:
        async with reply["Body"] as body:
            reply["Body"] = await body.read()
    if reply.get("Errors"):  # of delete_objects, which answers 200 all the same
        raise _partial_failure(reply["Errors"][0], operation)
    return reply


def _partial_failure(first: dict[str, str], operation: str) -> Exception:
    from botocore.exceptions import ClientError

    status = 403 if first.get("Code") == "AccessDenied" else 400
    error: Exception = ClientError({"Error": first, "ResponseMetadata": {"HTTPStatusCode": status}}, operation)
    return error


class _RangeReader(RawIOBase):
    """Random access to one S3 object. Each read is one ranged request with its own retries."""

    def __init__(self, store: S3Store, info: ObjectInfo) -> None:
        super().__init__()
        self._store, self._info, self._position = store, info, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._info.size_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"position ({base + offset}) in `{self._info.path}`: positions are not negative")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), self._info.size_bytes - self._position, LARGEST_READ_BYTES)
        if wanted <= 0:
            return 0
        extent = f"bytes={self._position}-{self._position + wanted - 1}"
        key = self._store._key(self._info.path)
        reply = self._store._request(f"reading `{self._info.path}`", "get_object", Key=key, Range=extent)
        if reply["ETag"].strip('"') != self._info.etag:
            raise OSError(f"object `{self._info.path}` of {self._store.url} was replaced during a read; read it again")
        data: bytes = reply["Body"]
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


def open_store(url: str) -> Store:
    """The store at a local folder (absolute, relative or file://) or at s3://bucket/prefix. Connects at first use."""
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
        f"store ({_redact(url)}): a store is a local folder, file:///folder or s3://bucket/prefix, got "
        f"{parts.scheme}://; copy the data to one of these, or serve it through an S3 gateway"
    )


def _open_s3(url: str) -> S3Store:
    # never echo what stands before an '@' or behind a '?': people paste keys and signed URLs there
    match = re.fullmatch(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{1,254})(?:/([^?#@]*))?", url)
    if match is None:
        raise ValueError(
            f"store ({_redact(url)}): an S3 store is s3://bucket/prefix without user, password, query or fragment; "
            "give credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, an endpoint in AWS_ENDPOINT_URL_S3"
        )
    return S3Store(match[1], (match[2] or "").rstrip("/"))


def glob_objects(pattern: str) -> tuple[Store, list[ObjectInfo]]:
    """The files that a local or s3:// pattern matches, sorted by path, and a store rooted above them.

    `*` and `?` stay within one segment, `**` as a whole segment spans any number; a plain path is that file, or every
    file below that folder. The root is the longest folder prefix without a wildcard, and paths are relative to it.
    Below the root, files and folders whose names begin with '.' or '_' are skipped. No match gives an empty list.
    """
    folder, wildcard = _split_pattern(pattern)
    if not wildcard:
        parent, slash, name = folder.rpartition("/")
        if name not in ("", ".", "..") and not parent.endswith(":/"):  # s3://bucket has no parent
            store = _open_corpus((parent + slash) or ".")
            if info := store.info(name):
                return store, [info]
    store = _open_corpus(folder)
    matches = _matcher(wildcard or "**")
    found = (info for info in store.list() if not _is_hidden(info.path) and matches(info.path))
    return store, sorted(found, key=lambda info: info.path)


def _split_pattern(pattern: str) -> tuple[str, str]:
    """The folder before the first segment with a wildcard, and the rest: ("/data", "*/x.parquet"); ("/data/x", "")."""
    path = unquote(pattern.removeprefix("file://")) if pattern.startswith("file://") else pattern
    if not path:
        raise ValueError(f"pattern ({pattern!r}): a path, a folder or a glob, got nothing; name the files to read")
    segments = path.rstrip("/").split("/")
    is_plain = "://" not in path and Path(path).exists()  # a local name may hold such a character itself
    count = next((i for i, segment in enumerate(segments) if re.search(r"[*?\[]", segment) and not is_plain), None)
    folder = "/".join(segments[:count])
    return folder or ("/" if path.startswith("/") else "."), "" if count is None else "/".join(segments[count:])


def _open_corpus(folder: str) -> Store:
    store = open_store(folder or ".")
    return LocalStore(store.root, follow_links=True) if isinstance(store, LocalStore) else store


def _matcher(pattern: str) -> Callable[[str], object]:
    from fsspec.utils import glob_translate

    matcher: Callable[[str], object] = re.compile(glob_translate(pattern)).match
    return matcher


def _is_hidden(path: str) -> bool:
    return any(segment.startswith((".", "_")) for segment in path.split("/"))


def check_name(kind: str, name: str) -> str:
    """The name, when it can be one segment of a path everywhere; `kind` is what the error text calls it."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{kind} ({name!r}): a name is 1 to 63 of a-z, 0-9, '.', '_' and '-' and begins with a letter or a digit; "
            "rename it"
        )
    return name


def _checked_path(path: str) -> str:
    if "\\" in path or "\0" in path or any(segment in ("", ".", "..") for segment in path.split("/")):
        raise ValueError(
            f"object path ({path!r}): a path is relative, '/'-separated, and has no '..', '.', empty segment, "
            "backslash or NUL; correct what names it"
        )
    return path


def _extents(starts: range, step: int, size_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(part number, first byte, byte after the last) of each part."""
    for number, start in enumerate(starts, 1):
        yield number, start, min(start + step, size_bytes)


def _leftover_limit(now: datetime, grace_s: float) -> datetime:
    if grace_s <= 0:
        raise ValueError(f"grace ({grace_s} s): positive, or files in flight would be removed; an hour is a good value")
    return now - timedelta(seconds=grace_s)


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


@contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    """A file that takes the target's name when the block ends well and leaves nothing behind when it does not."""
    with _temporary(target.parent) as temporary:
        with temporary.open("wb") as file:
            yield file
            _write_synced(file, b"")
        temporary.replace(target)
    _sync_folder(target.parent)


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A fresh empty file in a folder; whatever still has its name at the end is removed."""
    temporary = folder / f"{TEMPORARY_PREFIX}{uuid4().hex}"
    for _ in range(FOLDER_TRIES):
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            temporary.touch(exist_ok=False)
            break
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _link_or_copy(origin: Path, temporary: Path) -> None:
    linked = temporary.with_suffix(".link")  # a link cannot take a name that exists
    try:
        linked.hardlink_to(origin)
    except OSError:  # another device, or a file system without hard links
        shutil.copyfile(origin, temporary)
    else:
        linked.replace(temporary)


def _write_synced(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
