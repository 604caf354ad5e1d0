"""The ledger of a run: rows in, out and dropped by reason, per stage; sums that must agree; what it cost."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from penstock.cluster.fragments import write_fragment
from penstock.cluster.layout import run_folder
from penstock.cluster.storage import Store

DOCUMENTS = "documents"
# Each of these takes all the passages that the one before gave.
PASSAGE_STAGES = ("selection", "embeddings", "kept", "shards")
WANTED_LESS = ("selection", "kept")  # what the file asked to leave out


class LedgerDisagrees(Exception):
    """Rows went missing, or came from nowhere, between or within stages."""


@dataclass(frozen=True)
class StageEntry:
    """One stage of a run. Rows are documents in the first stage and passages after it, and cover the whole corpus;
    encoded, reused, seconds and bytes are what this run did."""

    stage: str
    rows_in: int
    rows_out: int
    dropped: dict[str, int] = field(default_factory=dict)
    fragments: int = 0
    fragments_done_before: int = 0
    tokens: int = 0
    truncated_tokens: int = 0
    encoded: int = 0
    reused: int = 0
    seconds: float = 0.0
    busy_s: float = 0.0
    idle_s: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def check_sums(entries: Sequence[StageEntry]) -> None:
    """Every stage's rows add up, and each took what the one before gave (documents become passages at the second).

    Raises:
        LedgerDisagrees: naming stage and figures.
    """
    for entry in entries:
        dropped = sum(entry.dropped.values())
        if entry.rows_in != entry.rows_out + dropped:
            raise LedgerDisagrees(
                f"stage {entry.stage}: rows in ({entry.rows_in}) must equal rows out ({entry.rows_out}) plus dropped "
                f"({dropped}); nothing was published"
            )
    counted = [entry for entry in entries if entry.stage in PASSAGE_STAGES]
    for before, after in zip(counted, counted[1:], strict=False):
        if before.rows_out != after.rows_in:
            raise LedgerDisagrees(
                f"stage {after.stage}: rows in ({after.rows_in}) must equal rows out of {before.stage} "
                f"({before.rows_out}); nothing was published"
            )


def dropped_fraction(entries: Sequence[StageEntry]) -> float:
    """Dead letters as a share of documents. Duplicates that the file asked to leave out are no dead letters."""
    documents = next(entry for entry in entries if entry.stage == DOCUMENTS)
    letters = sum(documents.dropped.values())
    letters += sum(sum(entry.dropped.values()) for entry in entries if entry.stage not in (DOCUMENTS, *WANTED_LESS))
    return letters / documents.rows_in if documents.rows_in else 0.0


def write_ledger(store: Store, run_id: str, entries: Sequence[StageEntry]) -> None:
    """Write ledger.parquet of a run; `dropped` is a JSON object of reasons and rows."""
    rows = [{**vars(entry), "dropped": json.dumps(entry.dropped, sort_keys=True)} for entry in entries]
    write_fragment(store, f"{run_folder(run_id)}/ledger.parquet", pa.Table.from_pylist(rows))
