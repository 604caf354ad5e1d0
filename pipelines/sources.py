"""The documents section → source files with content identities → fragments by a stable rule.

A large file is cut into parts, a file of middle size is a fragment, small files share fragments by a hash of their
path: a new file makes or changes one fragment and moves none.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

import pyarrow as pa

from penstock.cluster.corpus_files import glob_objects
from penstock.cluster.jobs.passages import FilePart, source_state
from penstock.cluster.node import connect_corpus
from penstock.cluster.storage import ObjectInfo, Store
from penstock.operators.docstrings import package_folders
from penstock.operators.documents import DocumentReader, SourcePart, SourceType
from penstock.operators.identity import fingerprint
from penstock.operators.metadata import KEEP_TYPES
from penstock.operators.reading import probe_columns, split_source
from penstock.pipelines.config import DocstringDocuments, Documents, TabularDocuments, TextDocuments
from penstock.pipelines.loading import Origin, PipelineFileInvalid

# Files below this share of fragment_bytes are gathered; larger ones are fragments of their own.
SMALL_FILE_SHARE = 0.25
HASHING_THREADS = 4
HASHING_GROUP = 64
PROBED_FILES = 16  # a corpus whose first files are all damaged is rather of another type


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus: `source` is its name in rows, `content` identifies its bytes (sha256, or the ETag)."""

    store_url: str
    path: str
    source: str
    size_bytes: int
    state: str
    content: str


@dataclass(frozen=True)
class Fragment:
    """The unit of work, of retry and of durability: parts of files, identified by what is in them."""

    fingerprint: str
    parts: tuple[FilePart, ...]
    size_bytes: int


def find_files(documents: Documents, origin: Origin) -> list[SourceFile]:
    """All files of the corpus with their identities, sorted by source.

    Raises:
        PipelineFileInvalid: a pattern matches nothing, a package is not installed, or two files share a name.
    """
    found = _listed(documents, origin)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        # In groups: handing over single small files costs more than hashing them.
        groups = [found[i : i + HASHING_GROUP] for i in range(0, len(found), HASHING_GROUP)]
        files = [file for group in pool.map(_identified_all, groups) for file in group]
    files.sort(key=lambda file: file.source)
    for one, other in zip(files, files[1:], strict=False):
        if one.source == other.source:
            rule = f"two files are both known as {one.source}; name a folder above both, with one pattern"
            raise PipelineFileInvalid([origin.problem("documents.path", rule)])
    return files


def document_reader(documents: Documents, files: list[SourceFile], origin: Origin) -> DocumentReader:
    """The descriptor of how documents are read, its columns checked against the first file that can be read.

    Raises:
        PipelineFileInvalid: columns that this file does not have.
    """
    match documents:
        case DocstringDocuments() | TextDocuments():
            keep: tuple[tuple[str, str], ...] = tuple((name, "string") for name in documents.keep)
            return DocumentReader(SourceType(documents.type), (), None, keep, documents.max_file_bytes)
        case TabularDocuments():
            columns = _first_columns(documents, files, origin)
            text = (documents.text,) if isinstance(documents.text, str) else documents.text
            keep = _kept(documents, columns, origin)
            try:
                return DocumentReader(SourceType(documents.type), text, documents.id, keep, documents.max_file_bytes)
            except ValueError as error:
                raise PipelineFileInvalid([origin.problem("documents.keep", str(error))]) from error
        case _:
            assert_never(documents)


def cut_fragments(
    files: list[SourceFile], source_type: SourceType, fragment_bytes: int, stage_fingerprint: str
) -> list[Fragment]:
    """Fragments of a corpus for a stage, in the order of their first source."""
    files = sorted(files, key=lambda file: file.source)
    small = [file for file in files if file.size_bytes < SMALL_FILE_SHARE * fragment_bytes]
    large = [file for file in files if file.size_bytes >= SMALL_FILE_SHARE * fragment_bytes]
    groups = [
        *_gathered(small, fragment_bytes),
        *(parts for file in large for parts in _cut(file, source_type, fragment_bytes)),
    ]
    groups.sort(key=lambda parts: (parts[0].part.path, parts[0].part.start or 0))
    return [_fragment(parts, stage_fingerprint) for parts in groups]


def _listed(documents: Documents, origin: Origin) -> list[tuple[Store, ObjectInfo, str]]:
    match documents:
        case DocstringDocuments():
            try:
                folders = package_folders(documents.packages)
            except ValueError as error:
                raise PipelineFileInvalid([origin.problem("documents.packages", str(error))]) from error
            return [item for name, place in sorted(folders.items()) for item in _package_files(name, Path(place))]
        case TabularDocuments() | TextDocuments():
            patterns = (documents.path,) if isinstance(documents.path, str) else documents.path
            return [item for pattern in patterns for item in _matching(pattern, len(patterns) > 1, origin)]
        case _:
            assert_never(documents)


def _package_files(name: str, place: Path) -> Iterator[tuple[Store, ObjectInfo, str]]:
    """Python files of a package, named from its import name; `place` is its folder, or its only file."""
    if place.is_file():
        store = connect_corpus(str(place.parent))
        info = store.info(place.name)
        yield from [(store, info, place.name)] if info else []
        return
    store = connect_corpus(str(place))
    for info in store.list(""):
        if info.path.endswith(".py"):
            yield store, info, f"{name}/{info.path}"


def _matching(pattern: str, several: bool, origin: Origin) -> list[tuple[Store, ObjectInfo, str]]:
    try:
        store, infos = glob_objects(pattern)
    except ValueError as error:
        raise PipelineFileInvalid([origin.problem("documents.path", str(error))]) from error
    if not infos:
        rule = f"({pattern}) must match at least one file, got none; check the path, or the credentials for it"
        raise PipelineFileInvalid([origin.problem("documents.path", rule)])
    prefix = f"{os.path.basename(store.url.rstrip('/'))}/" if several else ""
    return [(store, info, prefix + info.path) for info in infos]


def _identified_all(found: list[tuple[Store, ObjectInfo, str]]) -> list[SourceFile]:
    return [_identified(*item) for item in found]


def _identified(store: Store, info: ObjectInfo, source: str) -> SourceFile:
    state = source_state(info.etag, info.size_bytes, info.modified.timestamp())
    content = info.etag or _content_hash(store, info.path)
    return SourceFile(store.url, info.path, source, info.size_bytes, state, content)


def _content_hash(store: Store, path: str) -> str:
    with store.open(path) as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _first_columns(
    documents: TabularDocuments, files: list[SourceFile], origin: Origin
) -> dict[str, pa.DataType | None]:
    first, columns = _first_readable(SourceType(documents.type), files, origin)
    text = [documents.text] if isinstance(documents.text, str) else list(documents.text)
    wanted = [("documents.text", name) for name in text]
    wanted += [("documents.id", documents.id)] if documents.id else []
    wanted += [("documents.keep", name) for name in documents.keep] if documents.type != "jsonl" else []
    problems = [
        origin.problem(place, f"({name}) must be a column of {first.source}; its columns are {', '.join(columns)}")
        for place, name in wanted
        if name not in columns
    ]
    if problems:
        raise PipelineFileInvalid(problems)
    return columns


def _first_readable(
    source_type: SourceType, files: list[SourceFile], origin: Origin
) -> tuple[SourceFile, dict[str, pa.DataType | None]]:
    """The first file with columns, and these; damaged and empty files before it become dead letters when read."""
    problems = []
    for file in files[:PROBED_FILES]:
        try:
            with connect_corpus(file.store_url).open(file.path) as stream:
                columns = probe_columns(source_type, file.path, stream)
        except ValueError as error:
            problems.append(origin.problem("documents.type", str(error)))
            continue
        if columns:
            return file, columns
        rule = f"({source_type}) no row with columns in {file.source}; check the type"
        problems.append(origin.problem("documents.type", rule))
    raise PipelineFileInvalid(problems[:1])


def _kept(
    documents: TabularDocuments, columns: dict[str, pa.DataType | None], origin: Origin
) -> tuple[tuple[str, str], ...]:
    if isinstance(documents.keep, dict):
        return tuple(documents.keep.items())
    return tuple((name, _type_name(name, columns.get(name), origin)) for name in documents.keep)


def _type_name(column: str, found: pa.DataType | None, origin: Origin) -> str:
    """The declared name of a Parquet column's own type; formats without types keep strings."""
    if found is not None and pa.types.is_dictionary(found):
        return _type_name(column, found.value_type, origin)
    if (
        found is None
        or pa.types.is_null(found)
        or pa.types.is_string(found)
        or pa.types.is_large_string(found)
        or pa.types.is_string_view(found)
    ):
        return "string"
    if pa.types.is_integer(found) and not pa.types.is_uint64(found):
        return "int64"
    if pa.types.is_floating(found):
        return "float64"
    if pa.types.is_boolean(found):
        return "bool"
    if pa.types.is_timestamp(found) or pa.types.is_date(found):
        return "timestamp"
    rule = f"({column}) has type {found}; kept columns are {', '.join(KEEP_TYPES)}: leave it out or convert it"
    raise PipelineFileInvalid([origin.problem("documents.keep", rule)])


def _gathered(files: list[SourceFile], fragment_bytes: int) -> list[list[FilePart]]:
    """Small files by buckets of the hash of their path; the number of buckets, a power of two, changes only as the
    whole doubles or halves."""
    total = sum(file.size_bytes for file in files)
    buckets = 1 << max(0, (max(total, 1) - 1) // fragment_bytes).bit_length()
    groups: dict[int, list[FilePart]] = {}
    for file in files:
        bucket = int.from_bytes(hashlib.blake2b(file.source.encode(), digest_size=8).digest()) % buckets
        groups.setdefault(bucket, []).append(_part(file, SourcePart(file.source), file.size_bytes))
    return list(groups.values())


def _cut(file: SourceFile, source_type: SourceType, fragment_bytes: int) -> list[list[FilePart]]:
    if source_type is SourceType.PARQUET and file.size_bytes > fragment_bytes:
        with connect_corpus(file.store_url).open(file.path) as stream:
            parts = split_source(source_type, file.source, file.size_bytes, stream, fragment_bytes)
    else:
        parts = split_source(source_type, file.source, file.size_bytes, None, fragment_bytes)
    share = file.size_bytes // len(parts)
    return [[_part(file, part, share)] for part in parts]


def _part(file: SourceFile, part: SourcePart, bytes_to_read: int) -> FilePart:
    return FilePart(file.store_url, file.path, part, file.size_bytes, bytes_to_read, file.state, file.content)


def _fragment(parts: list[FilePart], stage_fingerprint: str) -> Fragment:
    identity = [[item.part.path, item.content, item.part.start, item.part.end] for item in parts]
    size_bytes = sum(item.bytes_to_read for item in parts)
    return Fragment(fingerprint(stage=stage_fingerprint, parts=identity), tuple(parts), size_bytes)
