"""The files of a corpus: what a path or a glob pattern names in a local folder or in a bucket."""

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

from penstock.cluster.local_store import LocalStore
from penstock.cluster.storage import ObjectInfo, Store, open_store


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
            store = open_corpus((parent + slash) or ".")
            if info := store.info(name):
                return store, [info]
    store = open_corpus(folder)
    matches = _matcher(wildcard or "**")
    found = (info for info in store.list() if not _is_hidden(info.path) and matches(info.path))
    return store, sorted(found, key=lambda info: info.path)


def open_corpus(folder: str) -> Store:
    """The store at a folder or URL of somebody's corpus: its symbolic links are followed."""
    store = open_store(folder or ".")
    return LocalStore(store.root, follow_links=True) if isinstance(store, LocalStore) else store


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


def _matcher(pattern: str) -> Callable[[str], object]:
    from fsspec.utils import glob_translate

    matcher: Callable[[str], object] = re.compile(glob_translate(pattern)).match
    return matcher


def _is_hidden(path: str) -> bool:
    return any(segment.startswith((".", "_")) for segment in path.split("/"))
