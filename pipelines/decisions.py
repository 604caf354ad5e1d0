"""What deduplication by meaning decided before: the records that later decisions build upon."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from penstock.cluster.catalog import Catalog
from penstock.cluster.jobs.document_standing import decided_path
from penstock.cluster.layout import EMBEDDINGS, KEPT, stage_folder
from penstock.cluster.storage import Store
from penstock.operators.identity import fingerprint
from penstock.pipelines.records import read_json

RECORD = "kept.json"


@dataclass(frozen=True)
class Decision:
    """Which rows stay of the embeddings of a corpus.

    Attributes:
        kept: fingerprint of the stage.
        record: what was found, and the rows that stay: written last.
    """

    kept: str
    record: dict[str, Any]

    @property
    def earlier(self) -> str | None:
        """The decision that this one built upon."""
        earlier: str | None = self.record["earlier"]
        return earlier

    @property
    def rows(self) -> dict[str, int]:
        """Passages fragment → rows that stay."""
        rows: dict[str, int] = self.record["fragments"]
        return rows

    @property
    def encoded(self) -> dict[str, str]:
        """Passages fragment → the embeddings fragment that was decided on."""
        encoded: dict[str, str] = self.record["encoded"]
        return encoded

    @property
    def links(self) -> dict[str, str]:
        """Embeddings fragment that was decided on → the fragment of what stays of it, and of the links of the rest."""
        return {name: fragment_of(self.kept, name) for name in self.encoded.values()}


def fragment_of(kept: str, embeddings: str) -> str:
    """The fragment of what stays of an embeddings fragment."""
    return fingerprint(stage=kept, embeddings=embeddings)


def record_path(kept: str) -> str:
    """What deduplication by meaning found, and the rows that stay of each fragment: written last."""
    return f"{stage_folder(KEPT, kept)}/{RECORD}"


def read_decision(store: Store, kept: str) -> Decision | None:
    """A finished decision; None where it is not, or where some of it is gone."""
    record = read_json(store, record_path(kept))
    found = None if record is None else Decision(kept, record)
    return found if found is not None and _is_whole(store, found) else None


def earlier_decisions(store: Store, index: str, rule: str) -> Iterator[Decision]:
    """The decisions that versions of an index were made of, by a rule: those of the newest version first. Versions of
    a part of the corpus are passed over, and so are mixed ones, which are made of versions and not of stages."""
    catalog = Catalog(store, index)
    for version in reversed(catalog.versions()):
        manifest = catalog.manifest(version)
        kept = None if "part_of" in manifest else manifest["lineage"].get("stages", {}).get(KEPT)
        if kept is not None and _rule_of(store, kept) == rule:
            found = read_decision(store, kept)
            if found is not None:
                yield found


def can_build_upon(store: Store, found: Decision, encoded: str, fragments: Collection[str]) -> bool:
    """Whether what came and left since a decision can be compared: the embeddings fragments that it was about, of the
    stage `encoded`, are there or are of the corpus still, whose `fragments` are embedded again where they are not."""
    left = {f"{name}.parquet" for name in found.links.keys() - set(fragments)}
    return left <= store.names(stage_folder(EMBEDDINGS, encoded))


def _rule_of(store: Store, kept: str) -> str | None:
    record = read_json(store, record_path(kept)) or {}
    rule: str | None = record.get("rule")
    return rule


def _is_whole(store: Store, found: Decision) -> bool:
    stays = {f"{found.links[name]}.parquet" for passages, name in found.encoded.items() if found.rows[passages]}
    links = {f"{name}.parquet" for name in found.links.values()}
    if found.record["removed_documents"] is not None:
        links |= {decided_path(found.kept, name).rsplit("/", 1)[1] for name in found.links.values()}
    return stays <= store.names(stage_folder(EMBEDDINGS, found.kept)) and links <= store.names(
        stage_folder(KEPT, found.kept)
    )
