"""Passages → embeddings: read and tokenise, take the vectors that are known, encode the rest on a pool, write.

A vector's identity is (encoder, hash of the passage text; with late chunking, hash of that and its place in which
document). Whatever an earlier fragment of the same encoder holds (or of one that differs only in keeping more
components) is taken from there by a join on that hash; only texts that nobody encoded before reach the model, each once
per fragment.
"""

import contextlib
import hashlib
import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from penstock.cluster.fragments import (
    Receipt,
    Work,
    read_fragment,
    vector_column,
    vectors_of,
    write_fragment,
)
from penstock.cluster.jobs.selection import kept_rows
from penstock.cluster.layout import EMBEDDINGS, PASSAGES, dead_letter_path, documents_path, fragment_path, run_folder
from penstock.cluster.node import cache_folder, connect, document_tokenizer, model_folder, text_tokenizer
from penstock.cluster.session import Session, reraise
from penstock.cluster.storage import Store
from penstock.operators.agreement import Agreement, compare_precisions
from penstock.operators.deadletters import DeadLetter, dead_letter_table, reasons
from penstock.operators.deduplication import bucket_of, hash_prefix
from penstock.operators.encoder_process import IsolatedEncoder, ProcessOptions, call_in_process
from penstock.operators.encoding import Effort, Encoded, Encoder, Precision, padded_lengths, unit_length, vector_faults
from penstock.operators.identity import TEXT_HASH_TYPE
from penstock.operators.late_chunking import Windows, windows_of, windows_table
from penstock.operators.tokenizing import TOKENIZER_ERROR, Fault, Tokenized

KNOWN_SCHEMA = pa.schema(
    [("fragment", pa.string()), ("text_hash", TEXT_HASH_TYPE), ("donor", pa.string()), ("donor_row", pa.int64())]
)
BUDGETS = "batch-budgets"  # folder of the node's cache
SAMPLE_TEXTS = 512
LIVE_INTERVAL_S = 1.0
TOKENIZER_COLUMNS = ("token_ids", "token_length", "token_fault")
WINDOW_COLUMNS = ("windows", "pieces", "token_fault")  # instead of these, for late chunking
CONSTANT_COLUMNS = ("output", "ids_digest", "bytes_read")
PASSAGE_COLUMNS = ["passage_id", "row_hash", "text_hash", "text", "source", "position", "document_id"]
# Reading and writing need little CPU, and must find a place beside encoders that fill all CPUs.
IO_CPUS = 0.01


class RowsLost(Exception):
    """A 1:1 stage gave back other rows than it was given."""


@dataclass(frozen=True)
class EmbeddingJob:
    """What all fragments of the stage share. `known` are the paths of tables of known vectors (KNOWN_SCHEMA); `late`
    says that passages are embedded within their documents; from `closes_at` on, in seconds since the epoch, no fragment
    is begun."""

    root: str
    passages_fingerprint: str
    selection_fingerprint: str
    fingerprint: str
    encoder: Encoder
    store_format: str
    threads: int
    device: str
    timeout_s: float = 600.0
    known: tuple[str, ...] = ()
    late: bool = False
    closes_at: float = math.inf

    @property
    def closed(self) -> bool:
        """Whether it is too late to begin a fragment."""
        return time.time() >= self.closes_at

    def process_options(self) -> ProcessOptions:
        """How an encoder's process is set up on the node that asks."""
        return ProcessOptions(self.threads, self.device, cache_folder() / BUDGETS, self.timeout_s)


@dataclass(frozen=True)
class EmbeddingTask:
    """A passages fragment, the embeddings fragment to make of it, and whether any of its passages are excluded."""

    passages: str
    output: str
    has_exclusions: bool


@dataclass(frozen=True)
class KnownTask:
    """One bucket of the join of pending fragments with the embeddings files (`donors`, by path) that are there."""

    job: EmbeddingJob
    run_id: str
    pending: tuple[str, ...]
    donors: tuple[str, ...]
    bucket: int
    buckets: int


@dataclass(frozen=True)
class Pool:
    """Encoder workers: how many, at least and at most, and what each takes of the cluster."""

    least: int
    most: int
    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class AgreementTask:
    """The check of precisions: fragments to sample texts from, and the precision to use whatever the check says."""

    job: EmbeddingJob
    full_dimension: int
    fragments: tuple[str, ...]
    wanted: Precision | None


@dataclass
class Live:
    """What the encoders are doing, summed over the pool: rows and tokens encoded, padded tokens, seconds that encoders
    computed, operations; `rows` by fragment."""

    rows: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    padded_tokens: int = 0
    busy_s: float = 0.0
    flops: float = 0.0
    workers: int = 0
    peak_flops: float = 0.0


def check_agreement(task: AgreementTask) -> Agreement:
    """Compare precisions on texts of the corpus, in a process of its own."""
    job = task.job
    store = connect(job.root)
    parts: list[list[str]] = []
    for fragment in task.fragments:  # rows lie in the order of a hash: the first ones are a random sample
        path = fragment_path(PASSAGES, job.passages_fingerprint, fragment)
        table = read_fragment(store, path, ["text"])
        parts.append(table.column("text").slice(0, -(-SAMPLE_TEXTS // len(task.fragments))).to_pylist())
    texts = [text for turn in itertools.zip_longest(*parts) for text in turn if text is not None]
    options = job.process_options()
    arguments = (job.encoder, task.full_dimension, model_folder(job.encoder.model), texts, task.wanted)
    found: Agreement = call_in_process(
        compare_precisions, *arguments, options.threads, options.device, options.cache, options=options
    )
    return found


def find_known(task: KnownTask) -> tuple[str, int]:
    """Join this bucket of the pending passages' text hashes with the donors' and write what is known.

    Returns the table's path ("" when nothing is known) and its rows. Memory: 28 bytes for each donor row of the bucket.
    """
    store = connect(task.job.root)
    hashes, owners, rows = _donor_hashes(store, task)
    order = np.argsort(hashes, kind="stable")
    hashes, owners, rows = hashes[order], owners[order], rows[order]
    tables = [KNOWN_SCHEMA.empty_table()]
    for fragment in task.pending:
        column = read_fragment(
            store, fragment_path(PASSAGES, task.job.passages_fingerprint, fragment), ["text_hash"]
        ).column("text_hash")
        tables.append(_matches(task, fragment, column, hashes, owners, rows))
    table = pa.concat_tables(tables)
    if table.num_rows == 0:
        return "", 0
    path = f"{run_folder(task.run_id)}/known-{task.bucket:05d}.parquet"
    write_fragment(store, path, table)
    return path, table.num_rows


def load_passages(job: EmbeddingJob, task: EmbeddingTask) -> pa.Table:
    """The passages of a fragment that stay, with the vectors that are known; what travels to an encoder."""
    store = connect(job.root)
    path = fragment_path(PASSAGES, job.passages_fingerprint, task.passages)
    read_paths = [path, documents_path(job.passages_fingerprint, task.passages)] if job.late else [path]
    found = [store.info(one) for one in read_paths]
    table = read_fragment(store, path, PASSAGE_COLUMNS + (["start", "end"] if job.late else []))
    if task.has_exclusions:
        table = kept_rows(store, table, job.selection_fingerprint, task.passages)
    table = table.combine_chunks().append_column("vector", _known_vectors(store, job, task.passages, table))
    table = _with_windows(job, read_fragment(store, read_paths[1]), table) if job.late else _with_token_ids(job, table)
    constants = {
        "output": pa.array([task.output] * table.num_rows),
        "ids_digest": pa.array([ids_digest(table)] * table.num_rows),
        "bytes_read": pa.array([sum(info.size_bytes for info in found if info)] * table.num_rows),
    }
    for name, column in constants.items():
        table = table.append_column(name, column)
    return table


def rows_to_encode(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows without a vector; the first row of each text among them; and for each of the former its place in the
    latter."""
    missing = np.flatnonzero(pc.is_null(table.column("vector")).to_numpy(zero_copy_only=False))
    hashes = np.array(table.column("text_hash").take(pa.array(missing)).to_pylist(), dtype=object)
    _, first, back = np.unique(hashes, return_index=True, return_inverse=True)
    return missing, missing[first], back


def encode_passages(
    job: EmbeddingJob,
    worker: IsolatedEncoder,
    table: pa.Table,
    on_rows: Callable[[np.ndarray, float], None] | None = None,
) -> pa.Table:
    """Fill in the vectors that are not known, encoding each text once; text goes, counts and faults come."""
    missing, unique_rows, back = rows_to_encode(table)
    encoded = _encode(job, worker, table, unique_rows, on_rows)
    stored = np.dtype(job.store_format)
    vectors = _filled(table, job, missing, encoded.vectors, back)
    by_row = _faults_by_row(encoded, back, stored)
    faults = {int(missing[i]): fault for i, fault in by_row.items()}
    additions = {
        "vector": vector_column(vectors),
        "fault": pa.array([faults[row].reason if row in faults else None for row in range(len(table))], pa.string()),
        "fault_detail": pa.array([faults[r].detail if r in faults else None for r in range(len(table))], pa.string()),
        "tokens": _scattered(table.num_rows, unique_rows, encoded.tokens),
        "truncated_tokens": _scattered(table.num_rows, unique_rows, encoded.truncated_tokens),
        "encoded": pa.array(np.isin(np.arange(table.num_rows), unique_rows)),
        "effort": pa.array([json.dumps(asdict(encoded.effort))] * table.num_rows),
        "worker": pa.array([json.dumps(worker.figures)] * table.num_rows),
    }
    table = table.select([*(name for name in PASSAGE_COLUMNS if name != "text"), *CONSTANT_COLUMNS])
    for name, column in additions.items():
        table = table.append_column(name, column)
    return table


def _encode(
    job: EmbeddingJob,
    worker: IsolatedEncoder,
    table: pa.Table,
    rows: np.ndarray,
    on_rows: Callable[[np.ndarray, float], None] | None,
) -> Encoded:
    """Encode the texts of some rows, alone or within their documents."""
    if job.late:
        encoded = worker.encode_spans(_windows(table, rows), on_rows)
        return replace(encoded, faults=encoded.faults | _tokenizer_faults(table.column("token_fault"), rows))
    texts = table.column("text").take(pa.array(rows)).to_pylist()
    return worker.encode_tokens(_tokenized(table, rows), texts, on_rows)


def store_embeddings(job: EmbeddingJob, table: pa.Table) -> Work:
    """Prove that the rows are those that were read, split off faulty ones and write the fragment."""
    output = table.column("output")[0].as_py()
    if ids_digest(table) != table.column("ids_digest")[0].as_py():
        raise RowsLost(
            f"embeddings fragment ({output}) must hold the passages it was read with, in their order; it does not"
        )
    faulty = pc.is_valid(table.column("fault"))
    letters = _dead_letters(table.filter(faulty))
    good = table.filter(pc.invert(faulty))
    receipt = Receipt(
        fragment=output,
        rows_in=table.num_rows,
        rows_out=good.num_rows,
        dropped=reasons(letters),
        passages=good.num_rows,
        encoded=_total(good, "encoded"),
    )
    store = connect(job.root)
    effort = Effort(**json.loads(table.column("effort")[0].as_py()))
    written = 0
    if letters.num_rows:
        written += write_fragment(store, dead_letter_path(EMBEDDINGS, job.fingerprint, output), letters)
    columns = good.select(["passage_id", "row_hash", "text_hash", "vector"]).rename_columns(
        ["passage_id", "row_hash", "text_hash", "embedding"]
    )
    written += write_fragment(store, fragment_path(EMBEDDINGS, job.fingerprint, output), columns, receipt)
    return Work(
        Receipt(
            **{
                **vars(receipt),
                "tokens": _total(table, "tokens"),
                "truncated_tokens": _total(table, "truncated_tokens"),
            }
        ),
        encoded=_total(table, "encoded"),
        reused=table.num_rows - _total(table, "encoded"),
        busy_s=effort.busy_s,
        bytes_read=table.column("bytes_read")[0].as_py(),
        bytes_written=written,
        padded_tokens=effort.padded_tokens,
        encoded_tokens=effort.tokens,
        flops=effort.flops,
        budget_halvings=effort.budget_halvings,
        restarts=effort.restarts,
        worker=table.column("worker")[0].as_py(),
    )


class EncodeFragments:
    """The actor of the pool: loads the model once, then encodes one fragment per call, and tells `live` how far it
    is."""

    def __init__(self, job: EmbeddingJob, live: Any) -> None:  # noqa: ANN401
        self._job, self._live = job, live
        self._failure: Exception | None = None
        self._told_s = 0.0
        self._untold = Live()
        try:
            self._worker = IsolatedEncoder(job.encoder, model_folder(job.encoder.model), job.process_options())
            peak = self._worker.figures["peak_flops"] or 0.0
            live.add.remote(Live(workers=1, peak_flops=peak))
        except Exception as error:  # raised by the first call: an actor whose constructor raises loses the reason
            self._failure = error

    def __call__(self, table: pa.Table) -> pa.Table:
        if self._failure is not None:
            raise self._failure
        if self._job.closed:  # while the fragment waited for an encoder
            return table.slice(0, 0)
        output = table.column("output")[0].as_py()
        lengths, passages = _rows_at_work(self._job, table)

        def tell(rows: np.ndarray, seconds: float) -> None:
            tokens = lengths[rows]
            told = self._untold
            told.rows[output] = told.rows.get(output, 0) + int(passages[rows].sum())
            told.tokens += int(tokens.sum())
            told.padded_tokens += int(self._padded(tokens).max(initial=0)) * len(rows)
            told.busy_s += seconds
            told.flops += self._flops(tokens)
            if time.monotonic() - self._told_s >= LIVE_INTERVAL_S:
                self._live.add.remote(told)
                self._untold, self._told_s = Live(), time.monotonic()

        return encode_passages(self._job, self._worker, table, tell)

    def _padded(self, tokens: np.ndarray) -> np.ndarray:
        """The lengths that the rows of a batch are padded to, each for itself."""
        evenly = self._worker.figures["pads_evenly"]
        return padded_lengths(tokens, self._job.encoder.max_tokens) if evenly else tokens

    def _flops(self, tokens: np.ndarray) -> float:
        figures, lengths = self._worker.figures, tokens.astype(np.float64)
        return float(figures["flops_per_token"] * lengths.sum() + figures["attention_flops"] * (lengths**2).sum())


class LiveFigures:
    """Where all encoders of a run say how far they are; one small actor."""

    def __init__(self) -> None:
        self._total = Live()

    def add(self, more: Live) -> None:
        total = self._total
        for fragment, rows in more.rows.items():
            total.rows[fragment] = total.rows.get(fragment, 0) + rows
        total.tokens += more.tokens
        total.padded_tokens += more.padded_tokens
        total.busy_s += more.busy_s
        total.flops += more.flops
        total.workers += more.workers
        total.peak_flops += more.peak_flops

    def read(self) -> Live:
        return self._total


def embed_fragments(
    session: Session,
    job: EmbeddingJob,
    tasks: list[EmbeddingTask],
    pool: Pool,
    on_live: Callable[[Live], None] | None = None,
) -> Iterator[Work]:
    """Stream fragments through read and tokenise → encode → write; what was done for each comes back as it is written.
    Fragments that are not begun when the job closes are left out.

    `on_live` hears about once a second, from a thread of its own, what the encoders are at.
    """
    session.start()
    import ray
    import ray.data
    import ray.exceptions

    def read(block: pa.Table) -> pa.Table:
        if job.closed:
            return block.slice(0, 0)
        row = block.to_pylist()[0]
        return load_passages(job, EmbeddingTask(row["passages"], row["output"], row["has_exclusions"]))

    def write(block: pa.Table) -> pa.Table:
        work = store_embeddings(job, block)
        fields = {**vars(work), "receipt": work.receipt.to_json()}
        return pa.Table.from_pylist([fields])

    def encode_options() -> dict[str, Any]:
        strategy = ray.data.ActorPoolStrategy(min_size=pool.least, max_size=pool.most, initial_size=pool.most)
        options: dict[str, Any] = {"compute": strategy, "num_cpus": pool.cpus}
        return options | ({"num_gpus": pool.gpus} if pool.gpus else {})

    whole: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
    live: Any = ray.remote(num_cpus=0)(LiveFigures).remote()
    data: ray.data.Dataset = ray.data.from_arrow([pa.Table.from_pylist([vars(task)]) for task in tasks])
    # One reader and one writer for each encoder keep it fed; every one more is a process that takes seconds to start.
    at_once = min(pool.most, len(tasks))
    data = data.map_batches(read, num_cpus=IO_CPUS, concurrency=at_once, **whole)
    data = data.map_batches(EncodeFragments, fn_constructor_args=(job, live), **encode_options(), **whole)
    data = data.map_batches(write, num_cpus=IO_CPUS, concurrency=at_once, **whole)
    try:
        with _listening(live, on_live):
            for batch in data.iter_batches(prefetch_batches=0, **whole):
                for fields in pa.table(batch).to_pylist():
                    yield Work(**{**fields, "receipt": Receipt.from_json(fields["receipt"])})
    except (ray.exceptions.RayError, RuntimeError) as error:
        reraise(error)
    finally:
        ray.kill(live)


@contextlib.contextmanager
def _listening(live: Any, on_live: Callable[[Live], None] | None) -> Iterator[None]:  # noqa: ANN401
    """Ask the live figures once in LIVE_INTERVAL_S, in a thread, until the work is done."""
    import ray
    import ray.exceptions

    done = threading.Event()

    def listen() -> None:
        while not done.wait(LIVE_INTERVAL_S):
            try:
                figures = ray.get(live.read.remote(), timeout=5)
            except ray.exceptions.RayError:  # figures are a courtesy: the work goes on without them
                continue
            if on_live and not done.is_set():
                on_live(figures)

    thread = threading.Thread(target=listen, name="live-figures", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(10)


def ids_digest(table: pa.Table) -> str:
    """Digest of the passages of a table, ids and texts, in their order: equal only when none was lost, added or
    moved."""
    digest = hashlib.blake2b(digest_size=16)
    for row_id, text_hash in zip(
        table.column("passage_id").to_pylist(), table.column("text_hash").to_pylist(), strict=True
    ):
        digest.update(row_id.encode() + b"\0" + text_hash)
    return digest.hexdigest()


def _donor_hashes(store: Store, task: KnownTask) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    hashes, owners, rows = [np.empty(0, np.uint64)], [np.empty(0, np.int32)], [np.empty(0, np.int64)]
    for number, donor in enumerate(task.donors):
        values = hash_prefix(read_fragment(store, donor, ["text_hash"]).column("text_hash"))
        inside = np.flatnonzero(bucket_of(values, task.buckets) == task.bucket)
        hashes.append(values[inside])
        owners.append(np.full(len(inside), number, np.int32))
        rows.append(inside)
    return np.concatenate(hashes), np.concatenate(owners), np.concatenate(rows)


def _matches(
    task: KnownTask, fragment: str, column: pa.ChunkedArray, hashes: np.ndarray, owners: np.ndarray, rows: np.ndarray
) -> pa.Table:
    """Rows of KNOWN_SCHEMA for one fragment. The join is on 64 bits; the reader compares all 128 before it takes a
    vector."""
    values = hash_prefix(column)
    inside = np.flatnonzero(bucket_of(values, task.buckets) == task.bucket)
    places = np.searchsorted(hashes, values[inside])
    hit = (
        (places < len(hashes)) & (hashes[np.minimum(places, len(hashes) - 1)] == values[inside]) if len(hashes) else []
    )
    inside, places = inside[hit], places[hit]
    return pa.table(
        {
            "fragment": pa.array([fragment] * len(inside), pa.string()),
            "text_hash": column.take(pa.array(inside)),
            "donor": pa.array([task.donors[owner] for owner in owners[places]], pa.string()),
            "donor_row": pa.array(rows[places]),
        },
        schema=KNOWN_SCHEMA,
    )


def _known_vectors(store: Store, job: EmbeddingJob, fragment: str, table: pa.Table) -> pa.Array:
    """The known vectors of a fragment's rows as a column with nulls for those that are not known."""
    found = _known_by_hash(store, job, fragment, set(table.column("text_hash").to_pylist()))
    dimension = job.encoder.dimension
    vectors = np.zeros((table.num_rows, dimension), dtype=job.store_format)
    unknown = np.ones(table.num_rows, dtype=bool)
    for row, text_hash in enumerate(table.column("text_hash").to_pylist()):
        vector = found.get(text_hash)
        if vector is not None:
            vectors[row], unknown[row] = vector, False
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dimension, mask=pa.array(unknown))


def _known_by_hash(store: Store, job: EmbeddingJob, fragment: str, wanted: set[bytes]) -> dict[bytes, np.ndarray]:
    found: dict[bytes, np.ndarray] = {}
    for path in job.known:
        with store.open(path) as stream:
            known = pq.read_table(stream, filters=[("fragment", "==", fragment)], page_checksum_verification=True)
        for donor in pc.unique(known.column("donor")).to_pylist():
            rows = known.filter(pc.equal(known.column("donor"), donor)).column("donor_row")
            held = read_fragment(store, donor, ["text_hash", "embedding"]).take(rows.combine_chunks())
            vectors = _shortened(vectors_of(held.column("embedding")), job)
            for text_hash, vector in zip(held.column("text_hash").to_pylist(), vectors, strict=True):
                if text_hash in wanted and vector.any():
                    found[text_hash] = vector
    return found


def _shortened(vectors: np.ndarray, job: EmbeddingJob) -> np.ndarray:
    """Stored vectors in the dimension of the job: longer ones are truncated, and normalised again where it says so."""
    dimension = job.encoder.dimension
    if vectors.shape[1] == dimension:
        return vectors
    shorter = vectors[:, :dimension].astype(np.float32)
    return unit_length(shorter) if job.encoder.normalize else shorter


def _with_token_ids(job: EmbeddingJob, table: pa.Table) -> pa.Table:
    """Add the token ids of the texts to encode; other rows have none."""
    encoder = job.encoder
    _, rows, _ = rows_to_encode(table)
    tokenizer = text_tokenizer(
        encoder.model, encoder.tokenizer_hash, encoder.prompt, encoder.max_tokens, encoder.special_tokens
    )
    tokenized = tokenizer.tokenize(table.column("text").take(pa.array(rows)).to_pylist())
    details = [tokenized.faults[row].detail if row in tokenized.faults else None for row in range(len(rows))]
    columns = (tokenized.ids, pa.array(tokenized.lengths), pa.array(details, pa.string()))
    for name, column in zip(TOKENIZER_COLUMNS, columns, strict=True):
        table = table.append_column(name, _placed(column, rows.tolist(), table.num_rows))
    return table.set_column(
        table.column_names.index("token_length"), "token_length", pc.fill_null(table.column("token_length"), 0)
    )


def _tokenized(table: pa.Table, rows: np.ndarray) -> Tokenized:
    taken = table.select(TOKENIZER_COLUMNS).take(pa.array(rows))
    faults = _tokenizer_faults(table.column("token_fault"), rows)
    return Tokenized(_one_array(taken.column("token_ids")), taken.column("token_length").to_numpy(), faults)


def _tokenizer_faults(details: pa.ChunkedArray, rows: np.ndarray) -> dict[int, Fault]:
    told = enumerate(details.take(pa.array(rows)).to_pylist())
    return {row: Fault(TOKENIZER_ERROR, detail) for row, detail in told if detail}


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _with_windows(job: EmbeddingJob, documents: pa.Table, table: pa.Table) -> pa.Table:
    """Add the macro windows of the documents to encode, each in the row of its first passage, and the pieces in them of
    each passage to encode."""
    rows_of: dict[tuple[str, int], list[int]] = {}
    rows = np.sort(rows_to_encode(table)[1])
    for row, place in zip(rows.tolist(), _places(table.take(pa.array(rows))), strict=True):
        rows_of.setdefault(place, []).append(row)
    texts = dict(zip(_places(documents), documents.column("text").to_pylist(), strict=True))
    spans = list(zip(table.column("start").to_pylist(), table.column("end").to_pylist(), strict=True))
    encoder, owned, faults = job.encoder, list(rows_of.values()), dict[int, Fault]()
    tokenizer = document_tokenizer(encoder.model, encoder.tokenizer_hash, encoder.prompt, encoder.max_tokens)
    cut = tokenizer.cut([texts[place] for place in rows_of], [[spans[row] for row in some] for some in owned], faults)
    done = sorted(cut)
    windows, pieces = windows_table([cut[number] for number in done])
    details = pa.array([faults[number].detail for number in faults for _ in owned[number]], pa.string())
    columns = (
        (windows, [owned[number][0] for number in done]),
        (pieces, [row for number in done for row in owned[number]]),
        (details, [row for number in faults for row in owned[number]]),
    )
    for name, (values, places) in zip(WINDOW_COLUMNS, columns, strict=True):
        table = table.append_column(name, _placed(values, places, table.num_rows))
    return table


def _places(table: pa.Table) -> list[tuple[str, int]]:
    return list(zip(table.column("source").to_pylist(), table.column("position").to_pylist(), strict=True))


def _placed(values: pa.Array, rows: Sequence[int], count: int) -> pa.Array:
    """An array of `count` with these values in these rows, null elsewhere."""
    place = np.full(count, -1, np.int64)
    place[rows] = np.arange(len(rows))
    return values.take(pa.array(place, mask=place < 0))


def _windows(table: pa.Table, rows: np.ndarray) -> Windows:
    return windows_of(_one_array(table.column("windows")), _one_array(table.column("pieces").take(pa.array(rows))))


def _rows_at_work(job: EmbeddingJob, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Of each row that an encoder is given for a fragment: its tokens, and the passages that are done with it."""
    _, rows, _ = rows_to_encode(table)
    if job.late:
        windows = _windows(table, rows)
        return windows.lengths, windows.completed_by()
    lengths = table.column("token_length").to_numpy()[rows]
    return np.minimum(lengths, job.encoder.max_tokens or int(lengths.max(initial=1))), np.ones(len(rows), np.int64)


def _filled(table: pa.Table, job: EmbeddingJob, missing: np.ndarray, fresh: np.ndarray, back: np.ndarray) -> np.ndarray:
    column = table.column("vector").combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0)
    dimension = job.encoder.dimension
    start = column.offset * dimension
    flat = column.values.to_numpy(zero_copy_only=False)[start : start + len(column) * dimension]
    vectors: np.ndarray = flat.reshape(-1, dimension).copy()
    if len(missing):
        with np.errstate(over="ignore", invalid="ignore"):
            vectors[missing] = fresh[back].astype(job.store_format)
    return vectors


def _faults_by_row(encoded: Encoded, back: np.ndarray, stored: np.dtype[Any]) -> dict[int, Fault]:
    """Faults of the rows to encode: those that the encoder named, and vectors that cannot be stored."""
    faults = dict(encoded.faults)
    for row, reason in (vector_faults(encoded.vectors, stored) if len(encoded.vectors) else {}).items():
        faults.setdefault(row, Fault(reason, "the model's vector for this passage cannot be stored"))
    return {row: faults[int(unique)] for row, unique in enumerate(back) if int(unique) in faults}


def _scattered(rows: int, at: np.ndarray, values: np.ndarray) -> pa.Array:
    result = np.zeros(rows, dtype=np.int64)
    result[at] = values
    return pa.array(result)


def _total(table: pa.Table, column: str) -> int:
    return int(pc.sum(pc.cast(table.column(column), pa.int64())).as_py() or 0)


def _dead_letters(rows: pa.Table) -> pa.Table:
    letters = [
        DeadLetter(
            stage=EMBEDDINGS,
            source=row["source"],
            position=row["position"],
            reason=row["fault"],
            detail=row["fault_detail"],
            document_id=row["document_id"],
            passage_id=row["passage_id"],
        )
        for row in rows.select(["source", "position", "fault", "fault_detail", "document_id", "passage_id"]).to_pylist()
    ]
    return dead_letter_table(letters)
