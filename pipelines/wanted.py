"""Which documents of a published version are asked for, and which are among the neighbours of many: by searching it."""

import heapq
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from scipy.special import gammaincinv

from penstock.cluster.catalog import Catalog
from penstock.cluster.jobs.evaluation import QueriesInvalid
from penstock.cluster.node import connect
from penstock.pipelines.planning import split_path
from penstock.pipelines.reader import OpenIndex
from penstock.pipelines.version_samples import sampled_vectors

MOST_LOGGED = 10_000  # the queries that are asked most stand for the others
HUB_QUERIES = 1_000
HUB_CHANCE = 0.01
BATCH_QUERIES = 500
K = 10


@dataclass(frozen=True)
class WantedTask:
    """What to search a version for: the queries of a log (JSONL: text, and count if not 1), or a sample of its own
    vectors where there is none."""

    root: str
    index: str
    version: str
    log: str | None
    trust_remote_code: bool


def wanted_documents(task: WantedTask) -> dict[str, float]:
    """How often each document is among the ten nearest: counted by how often queries of the log were asked, divided by
    its rank, as answers are looked at from the first on; or once for each passage of the sample, which does not count
    itself. Memory: the open index, and a document for each answer.

    Raises:
        QueriesInvalid: a log that is none.
    """
    catalog = Catalog(connect(task.root), task.index)
    manifest = catalog.manifest(task.version)
    with OpenIndex(catalog, task.version, manifest, task.trust_remote_code) as index:
        if task.log is not None:
            return _asked(index, most_asked(task.log))
        return _near(index, sampled_vectors(catalog, manifest, HUB_QUERIES))


def hub_occurrences(found: Mapping[str, float], rows: int) -> dict[str, float]:
    """Among the neighbours of how many of all rows each document is at least, by how often it was of a sample of these.

    Counts of all rows stand as they are. Of a sample, the lower confidence bound of a Poisson count (Garwood 1936)
    stands for all: of rows that are no hubs, HUB_CHANCE at most seem to be some. The counts themselves, scaled, would
    make hubs of a quarter of 10,000 rows whose neighbours are drawn at random.
    """
    if rows <= HUB_QUERIES:
        return dict(found)
    least = gammaincinv(np.array(list(found.values()), np.float64), HUB_CHANCE)
    return dict(zip(found, (least * rows / HUB_QUERIES).tolist(), strict=True))


def most_asked(path: str, most: int = MOST_LOGGED) -> dict[str, float]:
    """Text → how often it was asked, of the queries that were asked most. Memory: each text of the log once.

    Raises:
        QueriesInvalid: a line that is no query, or no query at all.
    """
    counts: dict[str, float] = defaultdict(float)
    for number, line in enumerate(_lines(path), 1):
        text, count = _logged(path, number, line)
        counts[text] += count
    if not counts:
        raise QueriesInvalid(f"upgrade.log ({path}) must hold queries, it holds none; leave it out")
    return dict(heapq.nlargest(most, counts.items(), key=lambda one: (one[1], one[0])))


def _asked(index: OpenIndex, queries: dict[str, float]) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    texts = list(queries)
    for start in range(0, len(texts), BATCH_QUERIES):
        batch = texts[start : start + BATCH_QUERIES]
        for text, table in zip(batch, index.search(batch, K, rows=True).rows or [], strict=True):
            for rank, document in enumerate(dict.fromkeys(table.column("document_id").to_pylist()), 1):
                found[document] += queries[text] / rank
    return dict(found)


def _near(index: OpenIndex, vectors: np.ndarray) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for start in range(0, len(vectors), BATCH_QUERIES):
        for table in index.search(vectors[start : start + BATCH_QUERIES], K + 1, rows=True).rows or []:
            for document in table.column("document_id").to_pylist()[1:]:  # the first is the passage itself
                found[document] += 1
    return dict(found)


def _lines(path: str) -> Iterator[bytes]:
    store, name = split_path(path)
    with store.open(name) as stream:
        rest = b""
        while block := bytes(stream.read(1 << 20)):
            *lines, rest = (rest + block).split(b"\n")
            yield from (line for line in lines if line.strip())
        if rest.strip():
            yield rest


def _logged(path: str, number: int, line: bytes) -> tuple[str, float]:
    try:
        record = json.loads(line)
        text, count = record["text"], record.get("count", 1)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        name = PurePosixPath(path).name
        raise QueriesInvalid(
            f'{name}, line {number}: must be a JSON object with a "text"; mend or remove it'
        ) from error
    if not isinstance(text, str) or not isinstance(count, int | float) or isinstance(count, bool) or not count >= 0:
        raise QueriesInvalid(
            f"{path}, line {number}: text must be a text and count ({count!r}) a number that is not negative"
        )
    return text, float(count)
