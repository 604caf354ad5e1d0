"""What encoders made is counted, and what an earlier fragment holds is not made again: with a tiny real model."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from penstock.cluster.fragments import write_fragment
from penstock.cluster.jobs.embeddings import (
    EmbeddingJob,
    EmbeddingTask,
    KnownTask,
    encode_passages,
    find_known,
    load_passages,
    store_embeddings,
)
from penstock.cluster.jobs.encoded_texts import EncodedTexts, TextsTask, count_encoded, distinct_texts
from penstock.cluster.layout import EMBEDDINGS, PASSAGES, fragment_path
from penstock.cluster.local_store import LocalStore
from penstock.operators.encoder_process import IsolatedEncoder, ProcessOptions
from penstock.operators.encoding import Encoder, encoder_for
from penstock.operators.identity import hash_texts, row_hashes
from penstock.operators.models import read_model_card

from ..operators.test_encoder_worker import TEXTS, build_model
from .in_process import InProcess

ONE, TWO = TEXTS[:3], [*TEXTS[1:4], TEXTS[3], TEXTS[4]]  # the second has two texts of the first, and one twice
FRAGMENTS = ("one", "two")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = build_model(tmp_path_factory.mktemp("tiny"))
    card = read_model_card(str(folder), folder)
    return encoder_for(card, prompt="", dimension=card.dimension, normalize=True, batch_tokens=256)


@pytest.fixture(scope="module")
def worker(encoder: Encoder) -> Iterator[IsolatedEncoder]:
    with IsolatedEncoder(encoder, Path(encoder.model), ProcessOptions(threads=1)) as found:
        yield found


@pytest.fixture
def job(encoder: Encoder, tmp_path: Path) -> EmbeddingJob:
    """Two fragments of passages in a store."""
    store = LocalStore(tmp_path / "root")
    for name, texts in zip(FRAGMENTS, (ONE, TWO), strict=True):
        ids = [f"{name}{number}#0" for number in range(len(texts))]
        columns = {
            "passage_id": pa.array(ids),
            "row_hash": pa.array(row_hashes(ids)),
            "text_hash": hash_texts(texts),
            "text": pa.array(texts),
            "source": pa.array(["s"] * len(ids)),
            "position": pa.array(range(len(ids)), pa.int64()),
            "document_id": pa.array(ids),
        }
        write_fragment(store, fragment_path(PASSAGES, "p", name), pa.table(columns).sort_by("row_hash"))
    return EmbeddingJob(store.url, "p", "s", "e", encoder, "float16", 1, "cpu")


def embed(job: EmbeddingJob, worker: IsolatedEncoder, fragment: str, donors: tuple[str, ...] = ()) -> None:
    """One fragment as a run does it, which takes over what these fragments hold."""
    paths = tuple(fragment_path(EMBEDDINGS, job.fingerprint, name) for name in donors)
    known, _ = find_known(KnownTask(job, f"run-{fragment}", (fragment,), paths, 0, 1))
    job = replace(job, known=(known,) if known else ())
    table = load_passages(job, EmbeddingTask(fragment, fragment, has_exclusions=False))
    store_embeddings(job, encode_passages(job, worker, table))


def counted(job: EmbeddingJob, *fragments: str) -> EncodedTexts:
    return count_encoded(InProcess(), job.root, job.fingerprint, fragments)


def test_texts_that_are_taken_over_are_not_encoded(job: EmbeddingJob, worker: IsolatedEncoder) -> None:
    embed(job, worker, "one")
    assert counted(job, "one") == EncodedTexts(encoded=3, texts=3)
    embed(job, worker, "two", donors=("one",))
    assert counted(job, *FRAGMENTS) == EncodedTexts(encoded=5, texts=5)


def test_a_break_of_donors_is_seen_though_the_vectors_are_the_same(job: EmbeddingJob, worker: IsolatedEncoder) -> None:
    for fragment in FRAGMENTS:
        embed(job, worker, fragment)
    assert counted(job, *FRAGMENTS) == EncodedTexts(encoded=7, texts=5)


def test_buckets_add_up_and_no_fragments_hold_no_texts(job: EmbeddingJob, worker: IsolatedEncoder) -> None:
    for fragment in FRAGMENTS:
        embed(job, worker, fragment)
    parts = [distinct_texts(TextsTask(job.root, job.fingerprint, FRAGMENTS, bucket, 4)) for bucket in range(4)]
    assert sum(parts) == 5 and max(parts) < 5
    assert counted(job) == EncodedTexts(encoded=0, texts=0)
