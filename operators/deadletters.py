"""Dead letters: rows that could not be processed, each with its reason."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

DEAD_LETTER_SCHEMA = pa.schema(
    [
        ("stage", pa.string()),
        ("source", pa.string()),
        ("position", pa.int64()),
        ("document_id", pa.string()),
        ("passage_id", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True)
class DeadLetter:
    """One dropped row (or file: position -1). `reason` is one of a few snake_case words; `detail` is for people."""

    stage: str
    source: str
    position: int
    reason: str
    detail: str = ""
    document_id: str | None = None
    passage_id: str | None = None


def dead_letter_table(letters: Sequence[DeadLetter]) -> pa.Table:
    """The letters as a table of DEAD_LETTER_SCHEMA, in the given order."""
    return pa.Table.from_pylist([vars(letter) for letter in letters], schema=DEAD_LETTER_SCHEMA)


def reasons(table: pa.Table) -> dict[str, int]:
    """Rows per reason of a dead letter table, sorted by reason."""
    return dict(sorted(Counter(table.column("reason").to_pylist()).items()))
