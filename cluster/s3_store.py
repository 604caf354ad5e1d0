"""A prefix of an S3 bucket as a store."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from uuid import uuid4

from penstock.cluster.s3_client import S3Client, S3Limits
from penstock.cluster.storage import (
    ObjectInfo,
    StorageUnavailable,
    Store,
    StoreUnsuitable,
    checked_path,
    leftover_limit,
)

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

READ_AHEAD_BYTES = 2**20  # a Parquet footer and the page index before it fit; larger reads go through unbuffered
S3_COPY_LIMIT_BYTES = 5 * 2**30  # one CopyObject request
S3_MAX_PARTS = 10_000
S3_DELETE_BATCH = 1000
UPLOAD_THREADS = 4
LARGEST_READ_BYTES = 32 * 2**20  # of one request: a larger read is several, each with its own deadline


class S3Store(Store):
    """A prefix of a bucket, through s3fs. Endpoint, region and credentials come from the environment or the cloud."""

    def __init__(self, bucket: str, prefix: str = "", limits: S3Limits | None = None) -> None:
        self.bucket = bucket
        self.prefix = f"{checked_path(prefix)}/" if prefix else ""
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self.limits = limits if limits is not None else S3Limits()
        self._client = S3Client(bucket, self.url, self.limits)

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
        before = leftover_limit(self.clock(), grace_s)
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
        return self.prefix + checked_path(path)

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
        return self._client.request(what, operation, **arguments)


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


def _extents(starts: range, step: int, size_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(part number, first byte, byte after the last) of each part."""
    for number, start in enumerate(starts, 1):
        yield number, start, min(start + step, size_bytes)
