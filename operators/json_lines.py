"""JSONL: one JSON object per line, also from the middle of a file."""

import json
from collections.abc import Iterator

from penstock.operators.documents import DocumentReader, SourcePart
from penstock.operators.rows import ABSENT, BadRow, Reason, Row
from penstock.operators.streams import BOM, READ_BYTES, CappedStream, WatchedStream, decoded


def jsonl_rows(reader: DocumentReader, part: SourcePart, watched: WatchedStream) -> Iterator[Row | BadRow]:
    """The lines of a source part, blank ones skipped; position = byte offset of the line."""
    for position, line in _jsonl_lines(reader, part, watched):
        if line.strip():
            yield _jsonl_row(reader, position, line)


def first_object(stream: CappedStream) -> dict[str, object]:
    """The first line that holds an object; {} when none does."""
    for _, line in _lines(stream, 0):
        try:
            value = json.loads(line.decode())
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    return {}


def _jsonl_row(reader: DocumentReader, position: int, line: bytes) -> Row | BadRow:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadRow(position, Reason.INVALID_UTF8, str(error))
    except (ValueError, RecursionError) as error:
        return BadRow(position, Reason.INVALID_JSON, str(error))
    if not isinstance(value, dict):
        return BadRow(position, Reason.NOT_AN_OBJECT, f"the line holds a {type(value).__name__}")
    document_id = None if reader.id is None else value.get(reader.id, ABSENT)
    texts = [value.get(column, ABSENT) for column in reader.text]
    return Row(position, texts, document_id, [value.get(column) for column, _ in reader.keep])


def _jsonl_lines(reader: DocumentReader, part: SourcePart, watched: WatchedStream) -> Iterator[tuple[int, bytes]]:
    if part.start is None or part.end is None:
        yield from _lines(decoded(part.path, watched, reader.max_bytes), 0)
        return
    start = _first_line_start(watched, part.start, part.end)
    if start is None:
        return
    watched.seek(start)
    cap_bytes = reader.max_bytes + READ_BYTES  # the last read may reach into the next part
    for position, line in _lines(CappedStream(watched, cap_bytes), start):
        if position >= part.end:
            return
        yield position, line


def _first_line_start(watched: WatchedStream, start: int, end: int) -> int | None:
    """Offset of the first line that begins in [start, end), None when a longer line spans it."""
    if start == 0:
        return 0
    watched.seek(start - 1)
    offset = start - 1
    while offset < end - 1:
        chunk = watched.read(min(READ_BYTES, end - 1 - offset))
        if not chunk:
            return None
        newline = chunk.find(b"\n")
        if newline >= 0:
            return offset + newline + 1
        offset += len(chunk)
    return None


def _lines(stream: CappedStream, start: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line without its newline and without the file's BOM) from a stream that stands at a line's start."""
    pieces: list[bytes] = []
    while chunk := stream.read(READ_BYTES):
        first, *rest = chunk.split(b"\n")
        pieces.append(first)
        for following in rest:
            line = b"".join(pieces)
            yield start, line.removeprefix(BOM) if start == 0 else line
            start += len(line) + 1
            pieces = [following]
    if last := b"".join(pieces):
        yield start, last.removeprefix(BOM) if start == 0 else last
