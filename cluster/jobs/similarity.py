"""Embeddings → the pairs of similar rows: rows and copies by part of the cells, then the join of each part.

A part is made of whole cells and holds what one process can join. Its rows lie in one file per fragment, sorted by
part, so that the join of a part reads its own rows of each; the pairs that it finds are stored with their similarity
down to a floor, from which every higher threshold is a filter.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import assert_never

import numpy as np
import pyarrow as pa

from penstock.cluster.fragments import (
    ROW_GROUP_ROWS,
    Receipt,
    open_fragment,
    read_fragment,
    read_hash_range,
    read_receipt,
    vector_column,
    vectors_of,
    write_fragment,
)
from penstock.cluster.jobs.clustering import read_centroids
from penstock.cluster.jobs.part_rows import DIGESTS, Block, Part, PartRows
from penstock.cluster.jobs.sampling import sample_vectors
from penstock.cluster.jobs.standing import OPEN, decisions_on
from penstock.cluster.layout import EMBEDDINGS, PAIRS, REPLICAS, STANDING, fragment_path, stage_folder
from penstock.cluster.node import connect
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.operators.cell_sharing import share_cells
from penstock.operators.duplicate_measures import PairRecall, pair_recall, sample_truth, similarity_histogram
from penstock.operators.equal_rows import vector_digests
from penstock.operators.independent_set import random_keys
from penstock.operators.replication import Copies, copies_of
from penstock.operators.sharding import hash_range
from penstock.operators.similar_pairs import Join, Pairs, cell_pairs, graph_pairs, similar_pairs, unit_rows

MOST_COPIES = 4.0  # rows stored for each row, beyond which an exact join costs more than it is worth
GRAPH_COPIES = 2  # parts beside its own in which the graph join looks for neighbours of a row
# Bytes of a row in a join for each of its components: float32, short rows, and the stored form while it is read.
JOIN_BYTES_PER_COMPONENT = 16
JOIN_MEMORY_BYTES = 1 << 30  # of the rows and copies that one process joins at once
# 20 bytes each, three times while they are sorted and written, and 150 where they are dealt out to their rows.
PAIRS_PER_FILE = 2_000_000
PREDICTED_ROWS = 8_192
# True pairs of a sampled row that are looked for among those found, 16 bytes each: a row of a million twins, whose
# pairs are found or lost alike, counts as one of so many. Rows are compared with so many at a time.
TRUTH_PAIRS, TRUTH_ROWS = 1_000, 16_384
SHARED_CELLS = 4  # the nearest cells of a row, which are to lie in one part
LEFT, RIGHT, SIMILARITY = "left", "right", "similarity"
_Sides = tuple[np.ndarray, np.ndarray]
PAIR_SCHEMA = pa.schema([(LEFT, pa.uint64()), (RIGHT, pa.uint64()), (SIMILARITY, pa.float32())])


@dataclass(frozen=True)
class JoinJob:
    """What all tasks of a join share.

    Attributes:
        part_of_cell: the part 0..parts - 1 of each cell of the centroids.
        floor: the least similarity of the pairs that are stored.
        standing: fingerprint of the decisions that were carried over: rows that are gone by them take no part, and only
            pairs with a row that is open are looked for.
        gpus: that a join of a part can have, which then multiplies there; the pairs are the same.
        memory_bytes: for vectors, in the join of a part; the pairs are the same.
    """

    root: str
    fingerprint: str
    embeddings_fingerprint: str
    centroids_fingerprint: str
    fragments: tuple[str, ...]
    part_of_cell: tuple[int, ...]
    join: Join
    floor: float
    standing: str | None = None
    gpus: float = 0.0
    memory_bytes: int = JOIN_MEMORY_BYTES

    @property
    def parts(self) -> int:
        return max(self.part_of_cell) + 1

    @property
    def part_gpus(self) -> float:
        """GPUs that the join of a part takes: the graph is made and searched on the CPU."""
        return 0.0 if self.join is Join.GRAPH else self.gpus

    @property
    def needs_cells(self) -> bool:
        """Whether cells matter: in one part all rows are compared, whatever their cell, but by the join of cells."""
        return self.parts > 1 or self.join is Join.CLUSTER


@dataclass(frozen=True)
class ReplicaTask:
    job: JoinJob
    fragment: str


@dataclass(frozen=True)
class PartTask:
    job: JoinJob
    part: int


@dataclass(frozen=True)
class SampleTask:
    """A seeded share of the hash space, of the rows of a fragment that a join is about."""

    job: JoinJob
    fragment: str
    share: float
    seed: int


@dataclass(frozen=True)
class RecallTask:
    """Sampled rows, uint64 (s,) and unit vectors float32 (s, d), of which pairs with rows of a fragment are looked for:
    all of a row, or a seeded choice of TRUTH_PAIRS."""

    job: JoinJob
    fragment: str
    hashes: np.ndarray
    vectors: np.ndarray
    seed: int


@dataclass(frozen=True)
class FoundTask:
    """A file of stored pairs, among which those of uint64 (w, 2) are looked for, or files of links from the first of
    equal rows, by which rows are named as that."""

    job: JoinJob
    files: tuple[str, ...]
    wanted: np.ndarray


@dataclass(frozen=True)
class FactorTask:
    """A join of which to predict the copies, over so many rows."""

    job: JoinJob
    rows: int
    seed: int


@dataclass(frozen=True)
class PartsTask:
    """A join of so many rows, to be cut into parts."""

    job: JoinJob
    rows: int
    parts: int


@dataclass(frozen=True)
class HistogramTask:
    root: str
    files: tuple[str, ...]
    floor: float
    bins: int


@dataclass(frozen=True)
class PartRecord:
    """A joined part.

    Of rows with equal vectors one alone is in pairs (Part.first). `equal` others are linked to it by pairs (that one as
    left, other as right) in `equal_files`, unless they stood before: each has all pairs of the first.

    Attributes:
        rows: at home in it, of which so many are `open`: new to the join; `copies` are of rows of other parts.
        comparisons: pairs of rows among which those that are similar were looked for.
        pairs: what was found, in `files`.
    """

    part: int
    rows: int
    open: int
    copies: int
    comparisons: int
    pairs: int
    files: tuple[str, ...]
    equal: int = 0
    equal_files: tuple[str, ...] = ()

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()

    @staticmethod
    def from_json(data: bytes) -> "PartRecord":
        fields = json.loads(data)
        return PartRecord(**{**fields, **{name: tuple(fields[name]) for name in ("files", "equal_files")}})


def parts_for(rows: int, dimension: int, memory_bytes: int, join: Join, most: int) -> int:
    """Parts of which each can be joined in about `memory_bytes`, if they hold as many rows each, or `most` where these
    are fewer: larger ones are joined block by block.

    The copies of the exact join do not count: more parts have more copies in turn, while blocks cost little but reading
    them again. Those of the graph join do, which would make a graph of each two blocks anew.
    """
    needed = rows * dimension * JOIN_BYTES_PER_COMPONENT
    if needed > memory_bytes and join is Join.GRAPH:
        needed *= 1 + GRAPH_COPIES
    return max(1, min(most, -(-needed // memory_bytes)))


def cut_into_parts(session: Session, job: JoinJob, rows: int, parts: int, seed: int) -> tuple[JoinJob, float]:
    """The join in so many parts, of `rows` in its fragments, and how many rows it stores for each, by a sample."""
    if parts == 1:
        return replace(job, part_of_cell=(0,) * len(job.part_of_cell)), 1.0
    job = replace(job, part_of_cell=session.run(share_parts, PartsTask(job, rows, parts)))
    return job, 1.0 if job.join is Join.CLUSTER else session.run(predict_factor, FactorTask(job, rows, seed))


def predicted_factor(job: JoinJob, rows: int, seed: int) -> float:
    """How many rows the join stores for each row, from a sample of the `rows` in the fragments."""
    store = connect(job.root)
    paths = [fragment_path(EMBEDDINGS, job.embeddings_fingerprint, fragment) for fragment in job.fragments]
    sample = unit_rows(sample_vectors(store, paths, rows, PREDICTED_ROWS, seed))
    return _copies(store, job, sample).factor


def affordable(join: Join, factor: float) -> Join:
    """The join to use instead of `join` where this would store `factor` rows for each row: beyond MOST_COPIES the graph
    takes the place of the exact one."""
    return Join.GRAPH if join is Join.EXACT and factor > MOST_COPIES else join


def predict_factor(task: FactorTask) -> float:
    """predicted_factor, as a task."""
    return predicted_factor(task.job, task.rows, task.seed)


def share_parts(task: PartsTask) -> tuple[int, ...]:
    """The part of each cell: parts of about equal rows, of cells that lie near one another, so that few rows need
    copies in other parts."""
    job, store = task.job, connect(task.job.root)
    paths = [fragment_path(EMBEDDINGS, job.embeddings_fingerprint, fragment) for fragment in job.fragments]
    centroids = read_centroids(store, job.centroids_fingerprint)
    sample = unit_rows(sample_vectors(store, paths, task.rows, max(PREDICTED_ROWS, len(centroids)), 0))
    near = np.concatenate([_nearest(part, centroids) for part in np.array_split(sample, -(-len(sample) // 1024))])
    shares = share_cells(centroids, np.bincount(near[:, 0], minlength=len(centroids)), task.parts, near)
    return tuple(shares.shard_of_cell.tolist())


def pair_histogram(task: HistogramTask) -> tuple[np.ndarray, np.ndarray]:
    """similarity_histogram of all stored pairs of a join."""
    parts = (table.column(SIMILARITY).to_numpy() for table in stored_pairs(connect(task.root), task.files, task.floor))
    return similarity_histogram(parts, task.floor, task.bins)


def find_pairs(session: Session, job: JoinJob, on_part: Callable[[PartRecord], None] | None = None) -> list[PartRecord]:
    """Replicates and joins what is not done yet, telling of each part; returns the record of each."""
    store = connect(job.root)
    done = read_records(store, job)
    missing = [PartTask(job, part) for part in range(job.parts) if part not in {record.part for record in done}]
    present = set(store.names(stage_folder(REPLICAS, job.fingerprint))) if missing else set()
    todo = [ReplicaTask(job, fragment) for fragment in job.fragments if f"{fragment}.parquet" not in present]
    for _ in session.stream(replicate, todo if missing else []):
        pass
    found = list(done)
    for record in session.stream(join_part, missing, gpus=job.part_gpus):
        found.append(record)
        if on_part:
            on_part(record)
    return sorted(found, key=lambda record: record.part)


def replicate(task: ReplicaTask) -> Receipt:
    """Write the rows of a fragment and their copies sorted by part and row hash: part, native, standing, cell,
    row_hash, DIGESTS and embedding as it is stored, in row groups of a part each where it has many. Memory: the
    fragment in float32, and its copies.

    Raises:
        ValueError: a vector that is zero or not finite, naming fragment and row.
    """
    job, store = task.job, connect(task.job.root)
    path = fragment_path(EMBEDDINGS, job.embeddings_fingerprint, task.fragment)
    fragment = read_fragment(store, path, ["row_hash", "embedding"])
    table, standing = _taking_part(store, job, task.fragment, fragment)
    stored = vectors_of(table.column("embedding"))
    try:
        vectors = unit_rows(stored)
    except ValueError as error:
        raise ValueError(f"fragment {path}: {error}") from error
    copies = _copies(store, job, vectors)
    hashes = table.column("row_hash").to_numpy()
    row = np.concatenate([np.arange(len(stored)), copies.row])
    part = np.concatenate([copies.home, copies.part])
    order = np.lexsort((hashes[row], part))
    replicas = pa.table(
        {
            "part": pa.array(part[order], pa.int32()),
            "native": pa.array(order < len(stored)),
            "standing": pa.array(standing[row[order]]),
            "cell": pa.array(copies.cell[row[order]], pa.int32()),
            "row_hash": pa.array(hashes[row[order]], pa.uint64()),
            **dict(zip(DIGESTS, vector_digests(vectors)[row[order]].T, strict=True)),
            "embedding": vector_column(stored[row[order]]),
        }
    )
    dropped = {"duplicate": fragment.num_rows - len(stored)} if job.standing else {}
    receipt = Receipt(task.fragment, fragment.num_rows, len(stored), dropped)
    write_fragment(store, fragment_path(REPLICAS, job.fingerprint, task.fragment), replicas, receipt, group_by="part")
    return receipt


def join_part(task: PartTask) -> PartRecord:
    """Find and store the pairs of a part: files of pairs sorted by row hashes, then the record that says it is done.

    Memory: that of the job, or JOIN_BYTES_PER_COMPONENT for each component of its rows and copies where this is less;
    70 bytes for each of them, and PAIRS_PER_FILE pairs. Beyond it rows are joined block by block, and read again.
    """
    job, store = task.job, connect(task.job.root)
    part = Part(store, [fragment_path(REPLICAS, job.fingerprint, fragment) for fragment in job.fragments], task.part)
    rows, equal, numbers = part.rows, _equal_links(part), _taking_part_in(job, part)
    folder = stage_folder(PAIRS, job.fingerprint)
    natives, copies = int(rows.native.sum()), int(np.count_nonzero(~rows.native))
    open_ = int(np.count_nonzero(rows.native & ~rows.standing))
    equal_files: list[str] = []
    for start in range(0, len(equal), PAIRS_PER_FILE):
        equal_files.append(f"{folder}/equal-{task.part:05d}-{len(equal_files):05d}.parquet")
        write_fragment(store, equal_files[-1], equal.slice(start, PAIRS_PER_FILE))
    files: list[str] = []
    count = 0
    for pairs in _gathered(_joined(job, part, numbers), PAIRS_PER_FILE):
        path = f"{folder}/pairs-{task.part:05d}-{len(files):05d}.parquet"
        write_fragment(store, path, _pair_table(pairs, rows.hashes))
        files.append(path)
        count += len(pairs)
    comparisons = _comparisons(job, rows.of(numbers))
    record = PartRecord(
        task.part, natives, open_, copies, comparisons, count, tuple(files), equal.num_rows, tuple(equal_files)
    )
    store.write(_record_path(job, task.part), record.to_json())
    return record


def read_records(store: Store, job: JoinJob) -> list[PartRecord]:
    """Records of the parts that are joined."""
    names = set(store.names(stage_folder(PAIRS, job.fingerprint)))
    paths = [_record_path(job, part) for part in range(job.parts)]
    return [PartRecord.from_json(store.read(path)) for path in paths if path.rsplit("/", 1)[1] in names]


def stored_pairs(store: Store, files: Iterable[str], similarity: float) -> Iterator[pa.Table]:
    """The pairs (PAIR_SCHEMA) of files that reach a similarity, row group by row group."""
    for path in files:
        with open_fragment(store, path) as file:
            for batch in file.iter_batches(ROW_GROUP_ROWS * 8):
                reaches = batch.column(SIMILARITY).to_numpy() >= np.float32(similarity)
                yield pa.Table.from_batches([batch.filter(pa.array(reaches))])


def measured_recall(
    session: Session, job: JoinJob, records: Sequence[PartRecord], share: float, seed: int
) -> PairRecall:
    """The share of all pairs of sampled rows with any row that the join found: every open row of a seeded `share` of
    the hash space is compared with all rows that take part.

    Of a row with more than TRUTH_PAIRS pairs a seeded choice of as many counts: memory is bounded by the sample.
    """
    wanted = np.empty((0, 2), np.uint64)
    sample = _sample(session, job, share, seed)
    tasks = [] if sample is None else [RecallTask(job, fragment, *sample, seed) for fragment in job.fragments]
    for part in session.stream(true_pairs, tasks):
        wanted = _capped(np.concatenate([wanted, part]), seed)
    if len(wanted) == 0:
        return pair_recall(np.empty(0, np.int64), np.empty(0, bool))
    wanted = np.unique(wanted, axis=0)
    sampled = wanted[:, 0]
    equal_files = tuple(path for record in records for path in record.equal_files)
    wanted = session.run(as_firsts, FoundTask(job, equal_files, wanted)) if equal_files else wanted
    found = wanted[:, 0] == wanted[:, 1]
    files = [FoundTask(job, (path,), wanted) for record in records for path in record.files]
    for part in session.stream(found_pairs, files):
        found |= part
    return pair_recall(sampled, found)


def true_pairs(task: RecallTask) -> np.ndarray:
    """Pairs uint64 (p, 2) of a sampled row and a row of the fragment, that is another one: of each sampled row those
    TRUTH_PAIRS that come first in a seeded order."""
    job, store = task.job, connect(task.job.root)
    sample_hashes, sample = task.hashes, task.vectors
    found = np.empty((0, 2), np.uint64)
    path = fragment_path(EMBEDDINGS, job.embeddings_fingerprint, task.fragment)
    table, _ = _taking_part(store, job, task.fragment, read_fragment(store, path, ["row_hash", "embedding"]))
    if table.num_rows == 0:
        return found
    vectors, hashes = vectors_of(table.column("embedding")), table.column("row_hash").to_numpy()
    for first in range(0, len(vectors), TRUTH_ROWS):
        pairs = sample_truth(sample, unit_rows(vectors[first : first + TRUTH_ROWS]), job.floor)
        both = np.stack([sample_hashes[pairs.left], hashes[first + pairs.right]], axis=1)
        found = _capped(np.concatenate([found, both[both[:, 0] != both[:, 1]]]), task.seed)
    return found


def as_firsts(task: FoundTask) -> np.ndarray:
    """The pairs with each row as the first of its equals."""
    return _firsts(connect(task.job.root), task.files, task.wanted)


def found_pairs(task: FoundTask) -> np.ndarray:
    """Which of the pairs, in either order, a file of stored ones holds: bool (w,)."""
    found = np.zeros(len(task.wanted), bool)
    for table in stored_pairs(connect(task.job.root), task.files, task.job.floor):
        left, right = (table.column(name).to_numpy() for name in (LEFT, RIGHT))
        for ends in ((left, right), (right, left)):
            found |= _contained(task.wanted, np.stack(ends, axis=1))
    return found


def _taking_part(store: Store, job: JoinJob, fragment: str, table: pa.Table) -> tuple[pa.Table, np.ndarray]:
    """The rows of a fragment (with row_hash) that are not gone, and which of them stand, bool (n,)."""
    if job.standing is None:
        return table, np.zeros(table.num_rows, bool)
    standing, gone = (decided.column("row_hash").to_numpy() for decided in decisions_on(store, job.standing, fragment))
    left = table.filter(pa.array(~np.isin(table.column("row_hash").to_numpy(), gone)))
    return left, np.isin(left.column("row_hash").to_numpy(), standing)


def _nearest(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The SHARED_CELLS nearest cells, int64 (n, .), of unit rows, nearest first."""
    count = min(SHARED_CELLS, len(centroids))
    products = vectors @ centroids.T
    near = np.argpartition(-products, count - 1, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(products, near, axis=1), axis=1, kind="stable")
    return np.take_along_axis(near, order, axis=1)


def _copies(store: Store, job: JoinJob, vectors: np.ndarray) -> Copies:
    if not job.needs_cells:
        nothing = np.empty(0, np.int64)
        return Copies(np.zeros(len(vectors), np.int64), np.zeros(len(vectors), np.int64), nothing, nothing)
    centroids, parts = read_centroids(store, job.centroids_fingerprint), np.array(job.part_of_cell)
    match job.join:
        case Join.EXACT:
            return copies_of(vectors, centroids, parts, job.floor)
        case Join.GRAPH:
            return copies_of(vectors, centroids, parts, job.floor, GRAPH_COPIES)
        case Join.CLUSTER:
            return copies_of(vectors, centroids, parts, job.floor, 0)


def _equal_links(part: Part) -> pa.Table:
    """Links (PAIR_SCHEMA) from rows that are at home here to the first of their equals."""
    others = np.flatnonzero((part.first != np.arange(len(part.first))) & part.rows.native)
    return _pair_table(Pairs(part.first[others], others, np.ones(len(others), np.float32)), part.rows.hashes)


def _firsts(store: Store, files: Iterable[str], hashes: np.ndarray) -> np.ndarray:
    """Row hashes uint64 of any shape, each as that of the first of its equals."""
    result = hashes.copy()
    for table in stored_pairs(store, files, 0.0):
        first, row = (table.column(name).to_numpy() for name in (LEFT, RIGHT))
        order = np.argsort(row)
        place = np.minimum(np.searchsorted(row[order], hashes), len(row) - 1)
        linked = row[order][place] == hashes if len(row) else np.zeros(hashes.shape, bool)
        result[linked] = first[order][place[linked]]
    return result


def _joined(job: JoinJob, part: Part, numbers: np.ndarray) -> Iterator[Pairs]:
    """The pairs of some rows, int64 (m,), by number in the part: of rows at home with each other, and with copies."""
    if job.join is Join.CLUSTER:
        numbers = numbers[np.argsort(part.rows.cell[numbers], kind="stable")]
    for block, later in part.blocks(numbers, _rows_at_once(job, part.dimension)):
        for base, others in _sides(block.rows):
            yield from _against(job, part.rows, (block, base), (block, others))
        for other in later:
            if job.join is Join.CLUSTER and other.rows.cell.min() > block.rows.cell.max():
                break
            for base, others in _sides_across(block.rows, other.rows):
                yield from _against(job, part.rows, (block, base), (other, others))


def _rows_at_once(job: JoinJob, dimension: int) -> int:
    return max(2, job.memory_bytes // (JOIN_BYTES_PER_COMPONENT * max(1, dimension)))


def _sides(rows: PartRows) -> list[_Sides]:
    """Rows and those to compare them with, which are compared with one another as well: open rows that are at home with
    all, and copies of open rows with what stands at home."""
    new, at_home, arrived = _kinds(rows)
    sides = [(~new, new), (at_home, arrived)] if at_home.any() else [(~new, new)]
    return [(np.flatnonzero(base), np.flatnonzero(others)) for base, others in sides]


def _sides_across(rows: PartRows, later: PartRows) -> list[_Sides]:
    """The same of two blocks: rows of one, and those of another to compare them with."""
    (new, at_home, arrived), (new_later, at_home_later, arrived_later) = map(_kinds, (rows, later))
    sides = [
        (np.ones(len(new), bool), new_later),
        (new, ~new_later),
        (at_home, arrived_later),
        (arrived, at_home_later),
    ]
    return [(np.flatnonzero(base), np.flatnonzero(others)) for base, others in sides if base.any()]


def _kinds(rows: PartRows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which rows are open and at home, stand at home, and are copies of open ones: bool (n,) each."""
    return rows.native & ~rows.standing, rows.native & rows.standing, ~rows.native & ~rows.standing


def _taking_part_in(job: JoinJob, part: Part) -> np.ndarray:
    """Numbers of the rows that are compared: of equal ones the first, and in a join of cells those with an open row."""
    rows, alone = part.rows, part.first == np.arange(len(part.first))
    if job.join is Join.CLUSTER:
        alone &= np.isin(rows.cell, rows.cell[alone & ~rows.standing])
    return np.flatnonzero(alone)


def _comparisons(job: JoinJob, rows: PartRows) -> int:
    """Pairs of rows among which the join of a part looks."""
    if job.join is Join.CLUSTER:
        cells, place = np.unique(rows.cell, return_inverse=True)
        counts = [np.bincount(part, minlength=len(cells)) for part in (place, place[rows.standing])]
        in_cell, known = (int((count * (count - 1) // 2).sum()) for count in counts)
        return in_cell - known
    sizes = [(len(base), len(others)) for base, others in _sides(rows)]
    return sum(others * base + others * (others - 1) // 2 for base, others in sizes)


def _gathered(parts: Iterable[Pairs], most: int) -> Iterator[Pairs]:
    """Pairs in parts of about `most`."""
    waiting: list[Pairs] = []
    for part in parts:
        waiting.append(part)
        if sum(map(len, waiting)) >= most:
            yield Pairs.joined(waiting)
            waiting = []
    if any(map(len, waiting)):
        yield Pairs.joined(waiting)


def _against(
    job: JoinJob, rows: PartRows, one: tuple[Block, np.ndarray], other: tuple[Block, np.ndarray]
) -> Iterator[Pairs]:
    """The pairs by number of `rows` of some rows of a block with those of another, and in one block of these with each
    other."""
    (block, base), (later, others) = one, other
    if len(others) == 0 or (block is not later and len(base) == 0):
        return
    numbers = np.concatenate([block.numbers[base], later.numbers[others]])
    vectors, first = _gathered_vectors(one, other), len(base)
    for pairs in _similar(job, vectors, rows.cell[numbers], first, block is later):
        if block is not later:
            pairs = pairs.where((pairs.left < first) & (pairs.right >= first))
        left, right = numbers[pairs.left], numbers[pairs.right]
        wanted = (rows.native[left] | rows.native[right]) & ~(rows.standing[left] & rows.standing[right])
        yield Pairs(np.minimum(left, right), np.maximum(left, right), pairs.similarity).where(wanted)


def _similar(job: JoinJob, vectors: np.ndarray, cells: np.ndarray, first: int, within: bool) -> Iterator[Pairs]:
    """The pairs of rows, but of those below `first` with one another."""
    device = "cuda" if job.part_gpus else "cpu"
    match job.join:
        case Join.EXACT:
            return similar_pairs(vectors, job.floor, first, device)
        case Join.CLUSTER:
            return cell_pairs(vectors, cells, job.floor, device, first)
        case Join.GRAPH:  # of two blocks each row looks for its nearest: so none is lost that it has among all rows
            return graph_pairs(vectors, job.floor, first if within else 0)
        case _:
            assert_never(job.join)


def _gathered_vectors(one: tuple[Block, np.ndarray], other: tuple[Block, np.ndarray]) -> np.ndarray:
    """The vectors of some rows of two blocks, one after the other; without a copy where they are all of one."""
    (block, base), (later, others) = one, other
    if len(base) == 0 and len(others) == len(later.vectors):
        return later.vectors
    vectors = np.empty((len(base) + len(others), later.vectors.shape[1]), np.float32)
    np.take(block.vectors, base, axis=0, out=vectors[: len(base)], mode="clip")  # which needs no buffer
    np.take(later.vectors, others, axis=0, out=vectors[len(base) :], mode="clip")
    return vectors


def _pair_table(pairs: Pairs, hashes: np.ndarray) -> pa.Table:
    """PAIR_SCHEMA: rows are numbered by hash, so that the lower of two numbers has the lower hash."""
    columns = [pa.array(hashes[pairs.left]), pa.array(hashes[pairs.right]), pa.array(pairs.similarity)]
    return pa.table(columns, schema=PAIR_SCHEMA)


def _record_path(job: JoinJob, part: int) -> str:
    return f"{stage_folder(PAIRS, job.fingerprint)}/part-{part:05d}.json"


def _sample(session: Session, job: JoinJob, share: float, seed: int) -> tuple[np.ndarray, np.ndarray] | None:
    """What sampled_rows gives, of all fragments; None without a row."""
    tasks = [SampleTask(job, fragment, share, seed) for fragment in job.fragments]
    found = [part for part in session.stream(sampled_rows, tasks) if len(part[0])]
    return (np.concatenate([one for one, _ in found]), np.concatenate([rows for _, rows in found])) if found else None


def sampled_rows(task: SampleTask) -> tuple[np.ndarray, np.ndarray]:
    """Hashes uint64 (s,) and unit vectors float32 (s, d) of the sampled rows of a fragment that are open. Vectors are
    read from the first of them to the last alone."""
    job, store = task.job, connect(task.job.root)
    path = fragment_path(EMBEDDINGS, job.embeddings_fingerprint, task.fragment)
    hashes, vectors = [np.empty(0, np.uint64)], [np.empty((0, 0), np.float32)]
    for first, last in hash_range(task.share, task.seed):
        own = _open_hashes(store, job, task.fragment, first, last)
        if len(own):
            table = read_hash_range(store, path, int(own[0]), int(own[-1]), ["embedding"])
            table = table.filter(pa.array(np.isin(table.column("row_hash").to_numpy(), own)))
            hashes.append(own)
            vectors.append(unit_rows(vectors_of(table.column("embedding"))))
    return np.concatenate(hashes), np.concatenate(vectors[1:] or vectors)


def _open_hashes(store: Store, job: JoinJob, fragment: str, first: int, last: int) -> np.ndarray:
    """Hashes uint64 (n,) from first to last of the rows of a fragment that are open, ascending; none are looked for
    where its receipt counts none."""
    if job.standing is not None:
        receipt = read_receipt(store, fragment_path(STANDING, job.standing, fragment))
        if not receipt.dropped.get(OPEN, 0):
            return np.empty(0, np.uint64)
    path = fragment_path(EMBEDDINGS, job.embeddings_fingerprint, fragment)
    table, standing = _taking_part(store, job, fragment, read_hash_range(store, path, first, last, []))
    hashes: np.ndarray = table.column("row_hash").to_numpy()[~standing]
    return hashes


def _capped(pairs: np.ndarray, seed: int) -> np.ndarray:
    """Of the pairs uint64 (p, 2) of each left row those TRUTH_PAIRS that come first in a seeded order."""
    order = np.lexsort((random_keys(pairs[:, 0] ^ random_keys(pairs[:, 1], seed), seed), pairs[:, 0]))
    left = pairs[order, 0]
    place = np.arange(len(left)) - np.searchsorted(left, left)
    capped: np.ndarray = pairs[order[place < TRUTH_PAIRS]]
    return capped


def _contained(wanted: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Which of some pairs uint64 (w, 2) are among others (p, 2): bool (w,)."""
    likely = np.ascontiguousarray(pairs[np.isin(pairs[:, 0], wanted[:, 0])])
    both = np.dtype([("one", np.uint64), ("other", np.uint64)])
    found: np.ndarray = np.isin(np.ascontiguousarray(wanted).view(both)[:, 0], likely.view(both).reshape(-1))
    return found
