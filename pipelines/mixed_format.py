"""What the manifest of a mixed version says: of which versions it consists, and what of the old one still counts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penstock.cluster.jobs.shards import FileRecord
from penstock.cluster.jobs.superseded import LINKS, NAMES, SUPERSEDED
from penstock.cluster.layout import shard_file
from penstock.operators.bridging import Direction
from penstock.operators.mixed_spaces import QueryMode
from penstock.pipelines.publishing import checked_file

MIXED_FORMAT = "penstock-mixed/1"
ADAPTER_KINDS = ("safetensors", "json")


class MixedUnsupported(Exception):
    """Something was asked of a mixed version that only an ordinary one can answer."""


@dataclass(frozen=True)
class LeftOfShard:
    """What counts of an old shard: `rows` less the `superseded` ones; `files` where anything is superseded."""

    shard: int
    rows: int
    superseded: int
    standing_in: int
    files: tuple[FileRecord, ...]

    @property
    def live(self) -> int:
        return self.rows - self.superseded

    def file(self, kind: str) -> FileRecord | None:
        """One of its files: SUPERSEDED, LINKS or NAMES; None where the old version's own hold."""
        return next((file for file in self.files if file.name == shard_file(self.shard, kind)), None)


@dataclass(frozen=True)
class MixedParts:
    """A mixed version as its manifest has it: the old version, the new one unless nothing is embedded yet."""

    old: str
    new: str | None
    old_live: int
    new_live: int
    queries: QueryMode
    shards: tuple[LeftOfShard, ...]
    files: tuple[FileRecord, ...]

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> "MixedParts":
        """Read from storage, a manifest is not trusted.

        Raises:
            ValueError: a file name or hash that this format does not have.
        """
        parts = {part["role"]: part for part in manifest["parts"]}
        new = parts.get("new")
        return cls(
            str(parts["old"]["version"]),
            None if new is None else str(new["version"]),
            int(parts["old"]["rows"]),
            0 if new is None else int(new["rows"]),
            QueryMode(manifest["queries"]),
            tuple(_left_of(shard) for shard in manifest["shards"]),
            tuple(checked_file(file, _adapter_files(), "a mixed version") for file in manifest["files"]),
        )

    @property
    def versions(self) -> tuple[str, ...]:
        return (self.old,) if self.new is None else (self.old, self.new)

    def adapter_files(self, direction: Direction) -> tuple[FileRecord, FileRecord] | None:
        """The adapter of a direction and its record; None where there is none."""
        found = {file.name: file for file in self.files}
        names = [adapter_file(direction, kind) for kind in ADAPTER_KINDS]
        return (found[names[0]], found[names[1]]) if names[0] in found else None


def is_mixed(manifest: Mapping[str, Any]) -> bool:
    return bool(manifest["format"] == MIXED_FORMAT)


def parts_of(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """The versions that a version refers to: none but for a mixed one."""
    return MixedParts.of(manifest).versions if is_mixed(manifest) else ()


def refuse_mixed(manifest: Mapping[str, Any], what: str) -> None:
    """Refuse what needs the shards of one version.

    Raises:
        MixedUnsupported: naming the versions to ask instead.
    """
    if is_mixed(manifest):
        raise MixedUnsupported(
            f"version {manifest['version']} of index {manifest['index']} is mixed of "
            f"{' and '.join(parts_of(manifest))}: {what} one of these"
        )


def adapter_file(direction: Direction, kind: str) -> str:
    return f"{direction.value}.{kind}"


def _adapter_files() -> set[str]:
    return {adapter_file(direction, kind) for direction in Direction for kind in ADAPTER_KINDS}


def _left_of(shard: Mapping[str, Any]) -> LeftOfShard:
    number = int(shard["shard"])
    known = {shard_file(number, kind) for kind in (SUPERSEDED, LINKS, NAMES)}
    files = tuple(checked_file(file, known, f"shard {number} of a mixed version") for file in shard["files"])
    return LeftOfShard(number, int(shard["rows"]), int(shard["superseded"]), int(shard["standing_in"]), files)
