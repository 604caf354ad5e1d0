"""Documents that go because one that stays covers them, against a choice document by document in memory."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from penstock.cluster.fragments import Receipt, vector_column, write_fragment
from penstock.cluster.jobs import document_pairs
from penstock.cluster.jobs.clustering import ClusteringJob, start_centroids
from penstock.cluster.jobs.document_pairs import (
    DocumentJob,
    IncidencesTask,
    count_incidences,
    passage_links,
    remove_documents,
)
from penstock.cluster.jobs.removal import RemovalJob, removed_rows
from penstock.cluster.jobs.similarity import JoinJob, find_pairs
from penstock.cluster.layout import EMBEDDINGS, PASSAGES, fragment_path
from penstock.cluster.local_store import LocalStore
from penstock.operators.clustering import ClusteringSpec
from penstock.operators.independent_set import Keep, random_keys, ranks
from penstock.operators.similar_pairs import Join, unit_rows

from .in_process import InProcess

DIMENSION, DOCUMENTS, SIMILARITY = 24, 90, 0.92
FRAGMENTS = tuple(f"{number:032x}" for number in range(4))


class Corpus:
    """Documents of which some take passages from others: as they are, a little changed, all or some of them."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        passages: list[np.ndarray] = []
        for number in range(DOCUMENTS):
            own = unit_rows(random.standard_normal((random.integers(1, 6), DIMENSION)))
            if number and random.random() < 0.7:
                source = passages[random.integers(number)]
                taken = source[random.random(len(source)) < random.choice([0.5, 0.9])]
                noise = random.choice([0.0, 0.03]) * random.standard_normal(taken.shape)
                own = np.concatenate([own[: random.integers(0, 3)], taken + noise])
            passages.append(unit_rows(own if len(own) else source))
        self.document = np.repeat(np.arange(DOCUMENTS), [len(part) for part in passages])
        vectors = np.concatenate(passages)
        self.rows = len(vectors)
        self.hashes = random.integers(0, 2**64, self.rows, dtype=np.uint64)
        self.names = random.integers(0, 2**64, DOCUMENTS, dtype=np.uint64)
        self.tokens = random.integers(5, 30, self.rows)
        self.topics = random.integers(0, 4, DOCUMENTS)
        self.stored = vectors.astype(np.float16)
        unit = unit_rows(self.stored).astype(np.float64)
        self.products = unit @ unit.T

    def write(self, root: Path) -> LocalStore:
        store = LocalStore(root)
        for number, fragment in enumerate(FRAGMENTS):
            part = np.flatnonzero(self.document % len(FRAGMENTS) == number)
            part = part[np.argsort(self.hashes[part])]
            hashes, receipt = pa.array(self.hashes[part]), Receipt(fragment, len(part), len(part))
            table = pa.table({"row_hash": hashes, "embedding": vector_column(self.stored[part])})
            write_fragment(store, fragment_path(EMBEDDINGS, "e", fragment), table, receipt)
            columns = {
                "row_hash": hashes,
                "document_hash": pa.array(self.names[self.document[part]]),
                "tokens": pa.array(self.tokens[part], pa.int32()),
                "source": pa.array([f"{row % 3}.txt" for row in self.document[part]], pa.string()),
                "position": pa.array(self.document[part]),
                "topic": pa.array(self.topics[self.document[part]]),
            }
            write_fragment(store, fragment_path(PASSAGES, "p", fragment), pa.table(columns), receipt)
        start_centroids(
            ClusteringJob(str(root), "c", "e", FRAGMENTS, self.rows, ClusteringSpec(6, DIMENSION, True, self.rows, 3))
        )
        return store

    def shares(self) -> np.ndarray:
        """float32 (documents, documents): the share of the passages of one that are similar to some of the other."""
        found = np.zeros((DOCUMENTS, DOCUMENTS), np.float32)
        for one in range(DOCUMENTS):
            for other in range(DOCUMENTS):
                near = self.products[np.ix_(self.document == one, self.document == other)]
                found[one, other] = 0 if one == other else (near.max(axis=1) >= SIMILARITY).mean()
        return found

    def rank(self, keep: Keep) -> np.ndarray:
        number = np.arange(DOCUMENTS)
        match keep:
            case Keep.LONGEST:
                return ranks(np.bincount(self.document, self.tokens), self.names, descending=True)
            case Keep.FIRST:
                return ranks((number % 3) * DOCUMENTS + number, self.names)
            case Keep.DENSEST:
                return ranks((self.shares() > 0).sum(axis=1), self.names, descending=True)
            case Keep.RANDOM:
                return ranks(random_keys(self.names, 4), self.names)
            case Keep.COLUMN:
                return ranks(self.topics, self.names, descending=True)

    def staying(self, shares: np.ndarray, rank: np.ndarray, share: float) -> list[int]:
        stays: list[int] = []
        for document in np.argsort(rank).tolist():
            if not any(shares[document, other] >= np.float32(share) for other in stays):
                stays.append(document)
        return stays


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, Path]:
    root, made = tmp_path_factory.mktemp("documents"), Corpus(5)
    made.write(root)
    return made, root


def _job(root: Path, name: str, keep: Keep, share: float, buckets: int) -> DocumentJob:
    join = JoinJob(str(root), "pairs", "e", "c", FRAGMENTS, (0, 0, 1, 1, 0, 1), Join.EXACT, 0.85)
    records = find_pairs(InProcess(), join)
    files, equal = ([path for record in records for path in paths(record)] for paths in (_files, _equal))
    rows = RemovalJob(str(root), f"r-{name}", tuple(files), SIMILARITY, keep, buckets)
    rows = replace(rows, passages_fingerprint="p", passages=FRAGMENTS, column="topic", descending=True, seed=4)
    return DocumentJob(name, replace(rows, equal_files=tuple(equal)), share)


def _files(record: object) -> tuple[str, ...]:
    return record.files  # type: ignore[attr-defined]


def _equal(record: object) -> tuple[str, ...]:
    return record.equal_files  # type: ignore[attr-defined]


@pytest.mark.parametrize("keep", list(Keep))
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_what_goes_is_what_a_choice_one_by_one_says(corpus: tuple[Corpus, Path], keep: Keep, share: float) -> None:
    made, root = corpus
    shares, rank = made.shares(), made.rank(keep)
    stays = made.staying(shares, rank, share)
    number = {int(name): document for document, name in enumerate(made.names)}
    row_of = {int(hash_): row for row, hash_ in enumerate(made.hashes)}
    results = []
    for buckets in (1, 5):
        job = _job(root, f"{keep}-{share}-{buckets}", keep, share, buckets)
        assert job.rows.equal_files
        assert remove_documents(InProcess(), job) == DOCUMENTS - len(stays) > 5
        removed = pa.concat_tables(removed_rows(LocalStore(root), job.removal)).to_pylist()
        goes = {number[row["removed"]]: number[row["kept"]] for row in removed}
        assert set(goes) == set(range(DOCUMENTS)) - set(stays) and set(goes.values()) <= set(stays)
        for row in removed:
            one, other = number[row["removed"]], number[row["kept"]]
            assert row["similarity"] == np.float32(shares[one, other]) >= np.float32(share)
            assert rank[other] < rank[one]
        links = pa.concat_tables(passage_links(LocalStore(root), job)).to_pylist()
        for link in links:
            gone, twin = row_of[link["removed"]], row_of[link["kept"]]
            assert goes[made.document[gone]] == made.document[twin]
            best = made.products[gone, made.document == made.document[twin]].max()
            assert link["similarity"] == pytest.approx(best, abs=1e-5) and best >= SIMILARITY
        covered = {document: shares[document, kept] for document, kept in goes.items()}
        for document, part in covered.items():
            linked = sum(made.document[row_of[link["removed"]]] == document for link in links)
            assert linked == round(part * (made.document == document).sum())
        results.append((sorted(goes.items()), sorted(tuple(link.values()) for link in links)))
    assert results[0] == results[1]


def test_no_document_that_stays_is_covered_by_one_that_is_preferred(tmp_path: Path) -> None:
    for seed in range(3):
        made, root = Corpus(seed), tmp_path / str(seed)
        made.write(root)
        job = _job(root, "one", Keep.LONGEST, 0.6, 2)
        remove_documents(InProcess(), job)
        gone = {row["removed"] for table in removed_rows(LocalStore(root), job.removal) for row in table.to_pylist()}
        stays = np.array([int(name) not in gone for name in made.names])
        shares, rank = made.shares(), made.rank(Keep.LONGEST)
        covers = (shares >= np.float32(0.6)) & (rank[None, :] < rank[:, None]) & stays[None, :]
        assert np.array_equal(covers.any(axis=1), ~stays)


def test_files_of_few_incidences_lead_to_the_same_choice(
    corpus: tuple[Corpus, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, root = corpus
    found = []
    for most in (document_pairs.INCIDENCES_PER_FILE, 5):
        monkeypatch.setattr(document_pairs, "INCIDENCES_PER_FILE", most)
        job = _job(root, f"most-{most}", Keep.LONGEST, 0.5, 2)
        remove_documents(InProcess(), job)
        store = LocalStore(root)
        tables = [*removed_rows(store, job.removal), *passage_links(store, job)]
        found.append(pa.concat_tables(tables).to_pylist())
        files = [path.name for path in (root / "stages/document-pairs" / job.fingerprint).glob("incidences-*")]
        assert (len(files) == job.buckets) == (most > 5)
    assert found[0] == found[1]


def test_equal_passages_are_counted_with_all_their_twins(corpus: tuple[Corpus, Path]) -> None:
    made, root = corpus
    job = _job(root, "counted", Keep.LONGEST, 0.5, 1)
    near = made.products >= SIMILARITY
    np.fill_diagonal(near, False)
    task = IncidencesTask(str(root), job.rows.files, job.rows.equal_files, SIMILARITY)
    assert count_incidences(task) == near.sum()
    assert count_incidences(replace(task, equal_files=())) < near.sum()


def test_it_goes_on_where_it_stopped_and_ends_the_same(corpus: tuple[Corpus, Path]) -> None:
    _, root = corpus
    job = _job(root, "stopped", Keep.LONGEST, 0.5, 3)
    count = remove_documents(InProcess(), job)
    folder = root / "stages/document-pairs/stopped"
    before = {path.name: path.read_bytes() for path in folder.glob("*.parquet")}
    for name in ("incidences-00001", "links-00002", "pairs-00000", "facts-00003"):
        (folder / f"{name}.parquet").unlink()
    assert remove_documents(InProcess(), job) == count
    assert {path.name: path.read_bytes() for path in folder.glob("*.parquet")} == before
