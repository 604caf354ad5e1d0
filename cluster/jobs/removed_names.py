"""Links of what went by meaning → a table to read: the id of each passage that went, of the one that stays for it, and
their similarity."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from penstock.cluster.fragments import read_fragment, read_hash_range, write_fragment
from penstock.cluster.jobs.kept import links_path
from penstock.cluster.layout import EMBEDDINGS, KEPT, fragment_path
from penstock.cluster.node import connect
from penstock.cluster.storage import Store
from penstock.operators.sharding import shard_range

# Of one file: 16 bytes, and two ids, each.
NAMED_ROWS = 2_000_000
# kept_id and similarity are null where a passage went with its document and has none like it in the one that stays.
NAMES_SCHEMA = pa.schema([("removed_id", pa.string()), ("kept_id", pa.string()), ("similarity", pa.float32())])
_STAY_SCHEMA = pa.schema([("row_hash", pa.uint64()), ("passage_id", pa.string())])


@dataclass(frozen=True)
class NamesTask:
    """The rows that went of one of some ranges of row hashes, by the links in the fragments of a decision."""

    root: str
    kept: str
    fragments: tuple[str, ...]
    range: int
    ranges: int


def name_ranges(removed: int) -> int:
    return max(1, -(-removed // NAMED_ROWS))


def write_names(task: NamesTask) -> int:
    """Write the names (NAMES_SCHEMA, by row hash) of a range; returns their number. Reads the links of the range, and
    the ids of all that stays. Memory: NAMED_ROWS rows, and the ids of a fragment.

    Raises:
        ValueError: a link names a row that does not stay.
    """
    store = connect(task.root)
    first, last = shard_range(task.range, task.ranges)
    columns = ["id", "kept_hash", "similarity"]
    paths = [links_path(task.kept, fragment) for fragment in task.fragments]
    links = pa.concat_tables([read_hash_range(store, path, first, last, columns) for path in paths])
    links = links.replace_schema_metadata().sort_by("row_hash")
    wanted = np.unique(links.column("kept_hash").drop_null().to_numpy())
    stays = pa.concat_tables(
        [_STAY_SCHEMA.empty_table(), *(_named(store, task, one, wanted) for one in task.fragments)]
    )
    place = pc.index_in(links.column("kept_hash"), stays.column("row_hash").combine_chunks(), skip_nulls=True)
    if place.null_count > links.column("kept_hash").null_count:
        lost = place.null_count - links.column("kept_hash").null_count
        raise ValueError(f"links of {task.kept} ({lost} rows) must be to rows that stay, these are not; run again")
    kept = stays.column("passage_id").take(place)
    table = pa.table([links.column("id"), kept, links.column("similarity")], schema=NAMES_SCHEMA)
    write_fragment(store, fragment_path(KEPT, task.kept, f"removed-{task.range:05d}"), table)
    return len(table)


def _named(store: Store, task: NamesTask, fragment: str, wanted: np.ndarray) -> pa.Table:
    """Those of the wanted rows that stay of a fragment, with their ids."""
    rows = read_fragment(store, fragment_path(EMBEDDINGS, task.kept, fragment), _STAY_SCHEMA.names)
    rows = rows.replace_schema_metadata().select(_STAY_SCHEMA.names)
    return rows.filter(pa.array(np.isin(rows.column("row_hash").to_numpy(), wanted)))
