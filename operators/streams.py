"""The bytes of a source file: decompressed, capped, and with the stream's own failures told from damaged content."""

import csv
import io
from typing import BinaryIO, Protocol

import pyarrow as pa

from penstock.operators.rows import Reason, UnusableFile

READ_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"
CODECS = {".gz": "gzip", ".zst": "zstd"}

# What damaged content makes pyarrow raise. ArrowMemoryError: a damaged length field asks for more than there is.
CONTENT_ERRORS = (
    pa.ArrowInvalid,
    pa.ArrowKeyError,
    pa.ArrowIndexError,
    pa.ArrowTypeError,
    pa.ArrowCapacityError,
    pa.ArrowMemoryError,
    pa.ArrowNotImplementedError,
    pa.ArrowSerializationError,
    OSError,
    EOFError,
    UnicodeError,
    csv.Error,
)


class WatchedStream:
    """Remembers what the stream itself raised: that is no fault of the content, whatever pyarrow makes of it."""

    closed = False

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.failure: Exception | None = None

    def read(self, size_bytes: int = -1) -> bytes:
        try:
            return self._stream.read(size_bytes)
        except Exception as error:
            self.failure = error
            raise

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return self._stream.seek(offset, whence)
        except Exception as error:
            self.failure = error
            raise

    def tell(self) -> int:
        return self._stream.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def close(self) -> None:
        """Leaves the stream open: it belongs to the caller."""


class _Readable(Protocol):
    def read(self, size_bytes: int, /) -> bytes: ...


class CappedStream:
    """Decoded bytes, up to a cap: beyond it the file is refused, so a decompression bomb stops here."""

    def __init__(self, stream: _Readable, cap_bytes: int) -> None:
        self._stream = stream
        self._cap_bytes = cap_bytes
        self._decoded_bytes = 0

    def read(self, size_bytes: int, /) -> bytes:
        data = self._stream.read(size_bytes)
        self._decoded_bytes += len(data)
        refuse_beyond(self._cap_bytes, self._decoded_bytes)
        return data

    def read_all(self) -> bytes:
        return b"".join(iter(lambda: self.read(READ_BYTES), b""))


def refuse_beyond(cap_bytes: int, size_bytes: int) -> None:
    """UnusableFile when that many decoded bytes are more than the cap."""
    if size_bytes > cap_bytes:
        detail = f"decodes to {size_bytes} bytes or more, the cap is {cap_bytes}; raise it or split the file"
        raise UnusableFile(Reason.FILE_TOO_LARGE, detail)


def codec_of(path: str) -> str | None:
    """The compression that the name of a file tells, in pyarrow's words."""
    return next((codec for suffix, codec in CODECS.items() if path.endswith(suffix)), None)


def decoded(path: str, watched: WatchedStream, cap_bytes: int) -> CappedStream:
    """The file from its beginning, decompressed."""
    watched.seek(0)
    codec = codec_of(path)
    if codec is None:
        return CappedStream(watched, cap_bytes)
    return CappedStream(pa.CompressedInputStream(pa.PythonFile(watched, mode="r"), codec), cap_bytes)
