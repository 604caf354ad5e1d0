"""The catalog of one index: immutable versions, and aliases that point to them.

A version exists when its manifest does, which is the last object written. An alias is a log of create-only objects,
`indexes/<index>/aliases/<alias>/00000012.json`: the highest number is where it points, of two publishers one creates
that number and the other is told, and a rollback appends.
"""

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from penstock.cluster.storage import AlreadyExists, Store, check_name

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
ENTRY_NAME = re.compile(r"(\d{8})\.json")


class Reason(StrEnum):
    """Why an alias moved."""

    PUBLISH = "publish"
    PROMOTE = "promote"
    ROLLBACK = "rollback"
    BACKFILL = "backfill"  # to a version of which a part is in the old model's space: the next move takes its place
    UPGRADE = "upgrade"  # to a version of another model


@dataclass(frozen=True)
class AliasEntry:
    """One move of an alias. `previous` is the version that it pointed to before; `modified` is on the store's clock."""

    alias: str
    number: int
    version: str
    run_id: str
    commit_id: str
    previous: str | None
    reason: Reason
    modified: datetime


class PublishConflict(Exception):
    """Another publisher moved the alias first. Look at what it published before trying again."""


class Catalog:
    """Versions and aliases of the index `index` in a store."""

    def __init__(self, store: Store, index: str) -> None:
        self.store = store
        self.index = check_name("index", index)
        self.folder = f"indexes/{index}"

    def version_folder(self, version: str) -> str:
        """The folder of a version's files, whether it is published or not."""
        return f"{self.folder}/versions/{check_name('version', version)}"

    def versions(self) -> list[str]:
        """Published versions, oldest first by the time of their manifests on the store's clock."""
        found = []
        for version in self.store.folders(f"{self.folder}/versions"):
            info = self.store.info(f"{self.folder}/versions/{version}/{MANIFEST}")
            if info is not None and self.has_manifest(version):
                found.append((info.modified, version))
        return [version for _, version in sorted(found)]

    def has_manifest(self, version: str) -> bool:
        """Whether the version is published: its manifest is there and can be read; a damaged one is told and passed
        over."""
        try:
            self.manifest(version)
        except FileNotFoundError:
            return False
        except ValueError as error:
            logger.warning("%s", error)
            return False
        return True

    def manifest(self, version: str) -> dict[str, Any]:
        """The manifest as stored; FileNotFoundError when the version is not published."""
        path = self._manifest_path(version)
        data = self.store.read(path)
        try:
            manifest = json.loads(data)
        except ValueError as error:
            raise ValueError(f"manifest `{path}` is damaged ({error}); restore it from a copy or remove it") from error
        if not isinstance(manifest, dict):
            raise ValueError(f"manifest `{path}`: a JSON object, got {type(manifest).__name__}; restore it or drop it")
        return manifest

    def publish_manifest(self, version: str, manifest: dict[str, object]) -> dict[str, Any]:
        """Make a version exist: its last object, created only if absent.

        Returns:
            The manifest that is stored: this one with its commit id, or an earlier one. The caller compares.
        """
        try:
            return self.store.create(self._manifest_path(version), manifest)
        except AlreadyExists as present:
            return present.record

    def aliases(self) -> list[str]:
        """Names of the aliases, sorted."""
        return sorted(self.store.folders(f"{self.folder}/aliases"))

    def alias(self, name: str) -> AliasEntry | None:
        """Where the alias points: the highest entry that can be read and whose version is published; None without one.

        An entry that fails either test (cut off, copied by hand, its version removed) is skipped with a warning.
        """
        return self._newest_valid(name, self._numbers(name))

    def history(self, name: str) -> list[AliasEntry]:
        """Every entry that can be read, oldest first, those of removed versions included."""
        entries = (self._entry(name, number) for number in self._numbers(name))
        return [entry for entry in entries if entry is not None]

    def move(self, name: str, version: str, *, expected: int | None, run_id: str, reason: Reason | str) -> AliasEntry:
        """Point an alias to a published version.

        Args:
            expected: number of the entry that the caller decided upon, 0 for none, None for whatever there is.

        Raises:
            PublishConflict: the alias has moved since, or another publisher was faster just now.
            ValueError: the version is not published.
        """
        if not self.has_manifest(version):
            raise ValueError(
                f"version ({version}) of index {self.index}: an alias points to a published version, got one without "
                f"{MANIFEST}; finish its run first"
            )
        numbers = self._numbers(name)
        present = self._newest_valid(name, numbers)
        present_number = present.number if present else 0
        if expected is not None and present_number != expected:
            raise self._conflict(name, expected + 1, vars(present) if present else {})
        record: dict[str, object] = {
            "version": version,
            "run_id": run_id,
            "previous": present.version if present else None,
            "reason": Reason(reason),
        }
        # unreadable entries above the present one keep their numbers for ever: the next is above them
        number = numbers[-1] + 1 if numbers else 1
        try:
            self.store.create(self._entry_path(name, number), record)
        except AlreadyExists as winner:
            raise self._conflict(name, number, winner.record) from None
        entry = self._entry(name, number)
        if entry is None:
            raise ValueError(f"alias {name}, entry {number}: it was written and cannot be read back; run again")
        return entry

    def rollback(self, name: str, run_id: str) -> AliasEntry:
        """Point an alias to the published version before its present one, like an undo.

        After publishing a, b, c: the first rollback goes to b, the second to a, and never forth to c again. What is
        published afterwards starts from there: publishing d after the first rollback and rolling back returns to b.
        """
        present = self.alias(name)
        earlier = [version for version in undo_stack(self.history(name)) if self.has_manifest(version)][:-1]
        if present is None or not earlier:
            raise ValueError(
                f"alias ({name}) of index {self.index}: a rollback needs an earlier published version, got none; "
                "promote a version by name"
            )
        return self.move(name, earlier[-1], expected=present.number, run_id=run_id, reason=Reason.ROLLBACK)

    def _newest_valid(self, name: str, numbers: Iterable[int]) -> AliasEntry | None:
        for number in sorted(numbers, reverse=True):
            entry = self._entry(name, number)
            if entry and self.has_manifest(entry.version):
                return entry
            logger.warning(
                "alias entry `%s` skipped: %s; the entry before it is served",
                self._entry_path(name, number),
                f"version {entry.version} has no manifest" if entry else "it is not a valid entry",
            )
        return None

    def _entry(self, name: str, number: int) -> AliasEntry | None:
        """One entry; None when it is not what `move` writes."""
        path = self._entry_path(name, number)
        info = self.store.info(path)
        if info is None:
            return None
        try:
            record = json.loads(self.store.read(path))
            previous = record["previous"]
            return AliasEntry(
                alias=name,
                number=number,
                version=check_name("version", record["version"]),
                run_id=str(record["run_id"]),
                commit_id=str(record["commit_id"]),
                previous=None if previous is None else check_name("version", previous),
                reason=Reason(record["reason"]),
                modified=info.modified,
            )
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            return None

    def _numbers(self, name: str) -> list[int]:
        """Numbers of all entries, ascending, the unreadable ones included."""
        found = (ENTRY_NAME.fullmatch(file) for file in self.store.names(self._alias_folder(name)))
        return sorted(int(match[1]) for match in found if match)

    def _alias_folder(self, name: str) -> str:
        return f"{self.folder}/aliases/{check_name('alias', name)}"

    def _entry_path(self, name: str, number: int) -> str:
        return f"{self._alias_folder(name)}/{number:08d}.json"

    def _manifest_path(self, version: str) -> str:
        return f"{self.version_folder(version)}/{MANIFEST}"

    def _conflict(self, name: str, wanted: int, winner: dict[str, Any]) -> PublishConflict:
        return PublishConflict(
            f"alias {name} of index {self.index}: entry {wanted} was wanted, but run {winner.get('run_id')} has "
            f"pointed the alias to version {winner.get('version')}; compare with that version and publish again"
        )


def undo_stack(history: Iterable[AliasEntry]) -> list[str]:
    """The present version last, below it those that rollbacks would visit: a move pushes, a rollback pops; what follows
    a version of a backfill takes its place."""
    stack: list[str] = []
    passing: str | None = None
    for entry in history:
        if passing is not None and stack and stack[-1] == passing:
            stack.pop()
        passing = entry.version if entry.reason == Reason.BACKFILL else None
        if entry.reason == Reason.ROLLBACK and entry.version in stack:
            while stack[-1] != entry.version:
                stack.pop()
        elif not stack or stack[-1] != entry.version:
            stack.append(entry.version)
    return stack
