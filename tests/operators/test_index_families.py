"""What every index keeps to: exact with enough candidates, the same bytes, one answer from shards."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import faiss
import numpy as np
import pyarrow as pa
import pytest

from penstock.operators.indexing import (
    FAISS_FAMILIES,
    Codec,
    Family,
    IndexSpec,
    Metric,
    ShardBuilder,
    codecs_of,
    factory_string,
    open_index,
    parse_factory,
    train_index,
)
from penstock.operators.searching import Hits, SearchParameters, ShardSearcher, merge_hits, normalize

DIMENSION = 64
ROWS = 3000
LISTS = 16
K = 10


@dataclass(frozen=True)
class Case:
    """One row of the table: how the index is made."""

    factory: str
    metric: Metric = Metric.COSINE

    def __str__(self) -> str:
        return f"{self.factory}-{self.metric}"

    @property
    def vectors(self) -> np.ndarray:
        return VECTORS if self.metric is Metric.COSINE else LONG_AND_SHORT

    @property
    def merges_exactly(self) -> bool:
        """BLAS rounds a row by its place in the batch; RaBitQ of more bits skips rows by an estimate."""
        return not re.search("RR|OPQ|PCA|RaBitQ(fs)?[2-9]", self.factory)

    @property
    def spec(self) -> IndexSpec:
        return parse_factory(self.factory, DIMENSION, self.metric, seed=7)


def _clustered(rows: int, seed: int) -> np.ndarray:
    """Unit vectors as embeddings lie: near 40 topics, in a space with a common direction."""
    topics = np.random.default_rng(0).standard_normal((40, DIMENSION)) + 1
    generator = np.random.default_rng(seed)
    return normalize(topics[generator.integers(0, 40, rows)] + generator.standard_normal((rows, DIMENSION)))


VECTORS = _clustered(ROWS, seed=1)
LONG_AND_SHORT = VECTORS * np.linspace(0.7, 1.4, ROWS, dtype=np.float32)[:, None]
QUERIES = _clustered(50, seed=2)
IDS = np.array([f"row-{(row * 7919) % ROWS:05}" for row in range(ROWS)], dtype=object)
BUILT = [
    Case(factory_string(family, codec, DIMENSION, hnsw_m=16, nlist=LISTS, rabitq_bits=bits))
    for family in FAISS_FAMILIES
    for codec in codecs_of(family, Metric.COSINE)
    for bits in ((1, 4) if codec in (Codec.RABITQ, Codec.RABITQFS) else (1,))
]
INNER_PRODUCT = [
    Case(factory_string(family, codec, DIMENSION, hnsw_m=16, nlist=LISTS), Metric.INNER_PRODUCT)
    for family, codec in [
        (Family.FLAT, Codec.PQFS),
        (Family.HNSW, Codec.SQ6),
        (Family.IVF, Codec.SQ8),
        (Family.IVF, Codec.RABITQFS),
    ]
]
ROTATED = [
    Case(factory_string(Family.FLAT, Codec.PQFS, DIMENSION, opq=True)),
    Case(factory_string(Family.IVF, Codec.PQFS, DIMENSION, nlist=LISTS, opq=True, opq_dimension=32)),
    Case(factory_string(Family.FLAT, Codec.NONE, DIMENSION, rotate=True)),
    Case(factory_string(Family.IVF, Codec.SQ4, DIMENSION, nlist=LISTS, rotate=True)),
]
WRITTEN = [
    Case("IVF16_HNSW8,SQ8"),
    Case("IVF16_HNSW8,PQ16x4fs"),
    Case("IVF16,PQ16x4fsr"),
    Case("PCA32,IVF16,SQ8"),
    Case("HR64,IVF16,RaBitQfs"),
    Case("HR64,IVF16,RaBitQfs3"),
    Case("PQ8x6"),
    Case("OPQ8,HNSW16_PQ8x4"),
]
CASES = [*BUILT, *INNER_PRODUCT, *ROTATED, *WRITTEN]
MERGED = [case for case in CASES if case.spec.family is not Family.HNSW]


@cache
def _trained(case: Case) -> bytes:
    return train_index(case.spec, case.vectors)


@cache
def _built(case: Case, first_row: int = 0, end_row: int = ROWS, batch_rows: int = ROWS) -> bytes:
    builder, vectors = ShardBuilder(_trained(case)), case.vectors[first_row:end_row]
    for first in range(0, len(vectors), batch_rows):
        builder.add(vectors[first : first + batch_rows])
    with TemporaryDirectory() as folder:
        builder.write(f"{folder}/shard")
        return Path(f"{folder}/shard").read_bytes()


def _searcher(
    case: Case, folder: Path, rows: tuple[int, int] = (0, ROWS), *, shard: int = 0, rerank: bool = False
) -> ShardSearcher:
    path, part = folder / f"{shard}.faiss", slice(*rows)
    path.write_bytes(_built(case, *rows))
    stored = case.vectors[part] if rerank else None
    return ShardSearcher(open_index(path, case.spec.family), pa.array(IDS[part]), stored, case.metric, shard)


def _all_of(case: Case, factor: int = 1) -> SearchParameters:
    match case.spec.family:
        case Family.FLAT:
            return SearchParameters(rerank_factor=factor)
        case Family.HNSW:
            return SearchParameters(ef_search=ROWS, rerank_factor=factor)
        case Family.IVF:
            return SearchParameters(nprobe=LISTS, rerank_factor=factor)


def _exact(case: Case) -> np.ndarray:
    near = QUERIES.astype(np.float64) @ case.vectors.T.astype(np.float64)
    return IDS[np.argsort(-near, axis=1)[:, :K]]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_with_every_row_a_candidate_the_answer_is_exact(case: Case, tmp_path: Path) -> None:
    hits = _searcher(case, tmp_path, rerank=True).search(QUERIES, K, _all_of(case, factor=ROWS // K))
    # Links of an HNSW graph are pruned, which may cut off single rows.
    assert np.mean(hits.ids == _exact(case)) >= (0.99 if case.spec.family is Family.HNSW else 1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_rows_make_the_same_bytes_whatever_the_batches(case: Case) -> None:
    assert train_index(case.spec, case.vectors) == _trained(case)
    whole = _built(case, 0, ROWS)
    assert _built(case, 0, ROWS, batch_rows=701) == whole
    # A graph orders each batch by level, BLAS rounds the rows of a rotation by their place: so batches have one size.
    if case.merges_exactly and case.spec.family is not Family.HNSW:
        index = faiss.deserialize_index(np.frombuffer(_trained(case), np.uint8))
        for first in range(0, ROWS, 701):
            index.add(case.vectors[first : first + 701])
        assert faiss.serialize_index(index).tobytes() == whole


@pytest.mark.parametrize("case", MERGED, ids=str)
def test_merged_shards_answer_as_one_index(case: Case, tmp_path: Path) -> None:
    whole = _searcher(case, tmp_path).search(QUERIES, K, _all_of(case))
    cut = [(0, 1234), (1234, ROWS)]
    parts = [_searcher(case, tmp_path, rows, shard=shard) for shard, rows in enumerate(cut)]
    merged = merge_hits([part.search(QUERIES, K, _all_of(case)) for part in parts], K)
    if case.merges_exactly:
        assert np.allclose(merged.similarities, whole.similarities, atol=1e-6)
        assert all(_above_last(merged, query) == _above_last(whole, query) for query in range(len(QUERIES)))
    else:
        assert _overlap(merged.ids, whole.ids) >= 0.98


def _above_last(hits: Hits, query: int) -> set[str]:
    """Ids of the hits that are more similar than the last; which of several as similar as it are found is arbitrary."""
    return set(hits.ids[query, hits.similarities[query] > hits.similarities[query, -1] + 2e-6])


def test_more_bits_find_more(tmp_path: Path) -> None:
    factories = ["RR64,RaBitQ", "SQ4", "SQ6", "SQ8", "SQfp16", "Flat"]
    recalls = [_recall(Case(factory), tmp_path) for factory in factories]
    assert recalls == sorted(recalls)
    assert recalls[-1] == 1
    bits = [_recall(Case(f"RR64,RaBitQ{bits}"), tmp_path) for bits in (2, 4, 8)]
    assert recalls[0] < bits[0] < bits[1] < bits[2]


def _recall(case: Case, folder: Path) -> float:
    return _overlap(_searcher(case, folder).search(QUERIES, K, _all_of(case)).ids, _exact(case))


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.mean([len(set(found) & set(true)) / K for found, true in zip(one, other, strict=True)]))
