"""What an exception of s3fs, botocore or the network means, and how it is told without secrets."""

from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

from penstock.cluster.storage import redact


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
    **dict.fromkeys(("ExpiredToken", "InvalidToken", "ExpiredTokenException"), Trouble.NO_ACCESS),
    **dict.fromkeys(
        ("RequestTimeout", "IncompleteBody", "SlowDown", "InternalError", "ServiceUnavailable"), Trouble.TRANSIENT
    ),
}
TROUBLE_BY_STATUS = {
    **dict.fromkeys((401, 403), Trouble.NO_ACCESS),
    **dict.fromkeys((408, 409, 429, 500, 502, 503, 504), Trouble.TRANSIENT),
}


def trouble_of(error: Exception) -> Trouble:
    """What kind of failure an exception of s3fs, botocore or the network is."""
    response = _response(error)
    if response is not None:
        code, status = response["Error"].get("Code", ""), response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return TROUBLE_BY_CODE.get(code, TROUBLE_BY_STATUS.get(status, Trouble.OTHER))
    if isinstance(error, s3_errors().no_access):
        return Trouble.NO_ACCESS
    return Trouble.TRANSIENT if isinstance(error, s3_errors().transient) else Trouble.OTHER


def describe(error: Exception) -> str:
    """The failure in a few words, without secrets."""
    response = _response(error)
    if isinstance(error, TimeoutError):
        return "no reply in time"
    if response is None:
        return f"{type(error).__name__}: {redact(str(error))}"
    return f"{response['Error'].get('Code')}: {redact(str(response['Error'].get('Message', '')))}"


@dataclass(frozen=True)
class S3Errors:
    """Exceptions of a request; `every` holds the others too."""

    transient: tuple[type[Exception], ...]
    no_access: tuple[type[Exception], ...]
    every: tuple[type[Exception], ...]


@cache
def s3_errors() -> S3Errors:
    """The exceptions that requests raise. s3fs is an optional extra, so nothing of it is imported with this module."""
    import botocore.exceptions as boto
    from s3fs.core import S3_RETRYABLE_ERRORS

    network = (boto.ConnectionError, boto.IncompleteReadError, boto.ChecksumError, ConnectionError, TimeoutError)
    return S3Errors(
        transient=(*S3_RETRYABLE_ERRORS, *network),
        no_access=(boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError),
        every=(*S3_RETRYABLE_ERRORS, boto.BotoCoreError, boto.ClientError, OSError),
    )


def _response(error: Exception) -> dict[str, Any] | None:
    """The server's answer: s3fs turns a ClientError into a Python error and keeps the ClientError as its cause."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict) and "Error" in response:
            return response
    return None
