"""Requests to an S3 bucket through s3fs: time-outs, and the repetition of what failed for a while only.

Which errors are transient is decided in one place, `s3_errors.trouble_of`; nothing below it retries by itself.
"""

import itertools
import logging
import math
import os
import random
import time
from asyncio import AbstractEventLoop
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, assert_never

from penstock.cluster.s3_errors import Trouble, describe, s3_errors, trouble_of
from penstock.cluster.storage import StorageUnavailable, StoreUnsuitable

SLOWEST_UPLOAD_BYTES_PER_S = 2**20
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.1, 10.0


@dataclass(frozen=True)
class S3Limits:
    """Time-outs of one request, the deadline of one operation with all its tries, and the size of an upload's parts."""

    connect_timeout_s: float = 5.0
    read_timeout_s: float = 60.0
    deadline_s: float = 180.0  # two slow replies and their repetition
    part_bytes: int = 32 * 2**20


class _S3FileSystem(Protocol):
    """What is used of s3fs: one operation of the S3 client, on the event loop that it runs in."""

    loop: AbstractEventLoop
    retries: int

    async def _call_s3(self, operation: str, **arguments: object) -> dict[str, Any]: ...


class S3Client:
    """Requests to one bucket. It can be pickled (it connects at first use) and used from several threads.

    s3fs and botocore each have their own retries; both are off, so that `request` alone decides, within one deadline.
    """

    def __init__(self, bucket: str, url: str, limits: S3Limits) -> None:
        self.bucket = bucket
        self.url = url  # the store's, for error texts
        self.limits = limits
        self._connection: tuple[int, _S3FileSystem] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None}

    def request(self, what: str, operation: str, **arguments: object) -> dict[str, Any]:
        """One S3 operation, repeated with back-off and jitter while its failure is transient and the deadline is far.

        Raises:
            FileNotFoundError, FileExistsError: absent object; failed precondition.
            StoreUnsuitable, StorageUnavailable, OSError: no access or bucket; deadline passed; anything else.
        """
        from fsspec.asyn import sync

        started_s = time.monotonic()
        client = self._connected()
        for attempt in itertools.count(1):
            left_s = self.limits.deadline_s - (time.monotonic() - started_s)
            try:
                timeout_s = min(left_s, self._longest_try_s(arguments.get("Body")))
                reply: dict[str, Any] = sync(
                    client.loop, _call, client, operation, {"Bucket": self.bucket, **arguments}, timeout=timeout_s
                )
                return reply
            except s3_errors().every as error:
                self._raise_permanent(what, error)
                spent_s = time.monotonic() - started_s
                wait_s = min(FIRST_BACKOFF_S * 2**attempt, LONGEST_BACKOFF_S) * random.uniform(0.5, 1.0)
                if spent_s + wait_s >= self.limits.deadline_s:
                    raise StorageUnavailable(
                        f"{what} in {self.url}: failed {attempt} times in {spent_s:.1f} s, last with "
                        f"{describe(error)}; check endpoint and network, then run the same command again"
                    ) from None
                time.sleep(wait_s)
        raise AssertionError("itertools.count ended")

    def _raise_permanent(self, what: str, error: Exception) -> None:
        """Raise our own error for a failure that a repetition cannot heal; return when it is transient.

        `from None`: the original text may hold an endpoint with a password, and everything useful is repeated here.
        """
        text = f"{what} in {self.url}: {describe(error)}"
        trouble = trouble_of(error)
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

    def _connected(self) -> _S3FileSystem:
        """The connection of this process: after a fork the parent's event loop does not run in the child."""
        if self._connection is None or self._connection[0] != os.getpid():
            self._connection = (os.getpid(), _connect(self.limits))
        return self._connection[1]


def _connect(limits: S3Limits) -> _S3FileSystem:
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
    client: _S3FileSystem = s3fs.S3FileSystem(
        session=session, skip_instance_cache=True, use_listings_cache=False, config_kwargs=config
    )
    client.retries = 1
    return client


@cache
def _api_descriptions() -> object:
    """botocore's description of S3. Reading it is 0.14 of the 0.16 s of CPU time that a new client takes."""
    from botocore.loaders import create_loader

    return create_loader()


async def _call(client: _S3FileSystem, operation: str, arguments: dict[str, object]) -> dict[str, Any]:
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
