"""Earlier decisions, and a corpus that has changed since → what stands, what is still gone, and what is open.

A row keeps its decision as long as its id and its text are the same and, where it went, the row that represents it
still stays. All others are open: rows that are new or changed, and those whose representative is no more. Only
fragments that came or left are compared row by row, in ranges of row hashes.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from penstock.cluster.fragments import Receipt, read_fragment, read_hash_range, read_receipt, write_fragment
from penstock.cluster.layout import EMBEDDINGS, KEPT, STANDING, fragment_path, stage_folder
from penstock.cluster.node import connect
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.operators.identity import TEXT_HASH_TYPE
from penstock.operators.sharding import HASH_SPACE, shard_range
from penstock.operators.sorted_places import places_among

# Rows of one range that came or left: about 60 bytes each while they are compared.
RANGE_ROWS = 4_000_000
OPEN, GONE = "open", "gone"
# kept_hash is the row's own where it stays; it and the similarity are 0 where a passage went with its document and has
# none like it in the one that stays.
STANDING_SCHEMA = pa.schema([("row_hash", pa.uint64()), ("kept_hash", pa.uint64()), ("similarity", pa.float32())])
_TEXT_SCHEMA = pa.schema([("row_hash", pa.uint64()), ("text_hash", TEXT_HASH_TYPE)])


@dataclass(frozen=True)
class StandingJob:
    """Carry earlier decisions over.

    Attributes:
        embeddings_fingerprint, fragments: of the embeddings as they are now.
        earlier: fingerprint of the earlier decisions.
        links: embeddings fragments that these were of → the fragments that hold the links of what went.
        ranges: into which the hashes of rows that came or left are cut.
    """

    root: str
    fingerprint: str
    embeddings_fingerprint: str
    fragments: tuple[str, ...]
    earlier: str
    links: Mapping[str, str]
    ranges: int

    @property
    def left(self) -> list[str]:
        """Earlier fragments that are no more."""
        return sorted(self.links.keys() - set(self.fragments))

    def now(self, fragment: str) -> str:
        """Where row_hash and text_hash of a fragment are that came."""
        return fragment_path(EMBEDDINGS, self.embeddings_fingerprint, fragment)

    def then(self, fragment: str) -> str:
        """Where those of an earlier fragment are."""
        return fragment_path(EMBEDDINGS, self.embeddings_fingerprint, fragment)

    def gone(self, fragment: str) -> str:
        """Where the links of what went of an earlier fragment are."""
        return fragment_path(KEPT, self.earlier, self.links[fragment])


@dataclass(frozen=True)
class RangeTask:
    job: StandingJob
    range: int


@dataclass(frozen=True)
class CarryTask:
    job: StandingJob
    fragment: str
    done: bool


@dataclass(frozen=True)
class Carried:
    """Rows that stand, rows that are still gone, and rows to decide."""

    standing: int = 0
    gone: int = 0
    open: int = 0

    def adding(self, receipt: Receipt) -> "Carried":
        """These and those of a fragment."""
        gone, open_ = receipt.dropped.get(GONE, 0), receipt.dropped.get(OPEN, 0)
        return Carried(self.standing + receipt.rows_out, self.gone + gone, self.open + open_)


def ranges_for(rows: int) -> int:
    """Ranges of hashes for so many rows that came or left."""
    return max(1, -(-rows // RANGE_ROWS))


def carry_decisions(session: Session, job: StandingJob, on_fragment: Callable[[Receipt], None]) -> Carried:
    """Carries over what is not carried yet, telling of each fragment."""
    present = set(connect(job.root).names(stage_folder(STANDING, job.fingerprint)))
    if job.left:
        todo = [RangeTask(job, number) for number in range(job.ranges) if f"lost-{number:05d}.parquet" not in present]
        for _ in session.stream(compare_rows, todo):
            pass
    carried = Carried()
    tasks = [CarryTask(job, fragment, f"{fragment}.parquet" in present) for fragment in job.fragments]
    for receipt in session.stream(carry_fragment, tasks):
        carried = carried.adding(receipt)
        on_fragment(receipt)
    return carried


def compare_rows(task: RangeTask) -> int:
    """Write the decisions on rows of a range that left with one fragment and came with another, and the rows that
    stayed and are no more; returns the number of these."""
    job, store = task.job, connect(task.job.root)
    first, last = shard_range(task.range, job.ranges)
    arrived = sorted(set(job.fragments) - job.links.keys())
    now = pa.concat_tables(
        [_TEXT_SCHEMA.empty_table(), *(_rows(store, job.now(fragment), first, last) for fragment in arrived)]
    )
    then = pa.concat_tables([_decided(store, job, fragment, first, last) for fragment in job.left])
    carried = (
        then.join(now, _TEXT_SCHEMA.names, join_type="left semi").sort_by("row_hash").select(STANDING_SCHEMA.names)
    )
    stayed = then.column("row_hash").filter(pa.array(_stays(then))).to_numpy()
    lost = np.setdiff1d(stayed, carried.column("row_hash").to_numpy(), assume_unique=True)
    write_fragment(store, _path(job, f"carried-{task.range:05d}"), carried.cast(STANDING_SCHEMA))
    write_fragment(store, _path(job, f"lost-{task.range:05d}"), pa.table({"row_hash": pa.array(lost, pa.uint64())}))
    return len(lost)


def carry_fragment(task: CarryTask) -> Receipt:
    """Write the decisions (STANDING_SCHEMA, by row hash) on rows of a fragment that are not open. Memory: the hashes of
    the fragment, and what came or left of one range."""
    job, store = task.job, connect(task.job.root)
    path = _path(job, task.fragment)
    if task.done:
        return read_receipt(store, path)
    if task.fragment in job.links:
        decided = _decided(store, job, task.fragment, 0, HASH_SPACE - 1).select(STANDING_SCHEMA.names)
        rows = decided.num_rows
    else:
        hashes = _rows(store, job.now(task.fragment), 0, HASH_SPACE - 1).column("row_hash").to_numpy()
        decided, rows = _carried(store, job, hashes), len(hashes)
    orphaned = np.zeros(decided.num_rows, bool)
    kept = decided.column("kept_hash").to_numpy()
    for lost in _ranges(store, job, "lost"):
        orphaned |= np.isin(kept, lost.column("row_hash").to_numpy())
    decided = decided.filter(pa.array(~orphaned))
    return write_decisions(store, path, task.fragment, decided, rows)


def write_decisions(store: Store, path: str, fragment: str, decided: pa.Table, rows: int) -> Receipt:
    """Write what is decided (STANDING_SCHEMA) of the rows of a fragment, with a receipt of what is open as well."""
    standing = int(np.count_nonzero(_stays(decided)))
    dropped = {GONE: decided.num_rows - standing, OPEN: rows - decided.num_rows}
    receipt = Receipt(fragment, rows, standing, {reason: count for reason, count in dropped.items() if count})
    write_fragment(store, path, decided.combine_chunks(), receipt)
    return receipt


def decisions_on(
    store: Store, fingerprint: str, fragment: str, first: int = 0, last: int = HASH_SPACE - 1
) -> tuple[pa.Table, pa.Table]:
    """What of a fragment stands and what is gone (STANDING_SCHEMA each, by row hash), by earlier decisions on rows with
    hashes from first to last."""
    path = fragment_path(STANDING, fingerprint, fragment)
    table = read_hash_range(store, path, first, last, STANDING_SCHEMA.names).replace_schema_metadata()
    stays = _stays(table)
    return table.filter(pa.array(stays)), table.filter(pa.array(~stays))


def _stays(table: pa.Table) -> np.ndarray:
    stays: np.ndarray = table.column("kept_hash").to_numpy() == table.column("row_hash").to_numpy()
    return stays


def _rows(store: Store, path: str, first: int, last: int) -> pa.Table:
    table = read_hash_range(store, path, first, last, _TEXT_SCHEMA.names)
    return table.select(_TEXT_SCHEMA.names).replace_schema_metadata()


def _decided(store: Store, job: StandingJob, fragment: str, first: int, last: int) -> pa.Table:
    """The rows of an earlier fragment with what was decided: STANDING_SCHEMA and text_hash, by row hash."""
    rows = _rows(store, job.then(fragment), first, last)
    links = read_hash_range(store, job.gone(fragment), first, last, STANDING_SCHEMA.names)
    hashes = rows.column("row_hash").to_numpy()
    kept, similarity = hashes.copy(), np.ones(len(hashes), np.float32)
    here, place = places_among(hashes, links.column("row_hash").to_numpy())
    kept[place] = pc.fill_null(links.column("kept_hash"), 0).to_numpy()[here]
    similarity[place] = pc.fill_null(links.column("similarity"), 0).to_numpy()[here]
    return rows.append_column("kept_hash", pa.array(kept)).append_column("similarity", pa.array(similarity))


def _carried(store: Store, job: StandingJob, hashes: np.ndarray) -> pa.Table:
    """The decisions on rows of a fragment that came, which were in fragments that left."""
    tables = [STANDING_SCHEMA.empty_table()]
    for table in _ranges(store, job, "carried"):
        tables.append(table.filter(pa.array(np.isin(table.column("row_hash").to_numpy(), hashes))))
    return pa.concat_tables(tables)


def _ranges(store: Store, job: StandingJob, kind: str) -> Iterator[pa.Table]:
    for number in range(job.ranges) if job.left else ():
        yield read_fragment(store, _path(job, f"{kind}-{number:05d}")).replace_schema_metadata()


def _path(job: StandingJob, name: str) -> str:
    return fragment_path(STANDING, job.fingerprint, name)
