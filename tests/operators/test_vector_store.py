from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest

from penstock.operators.vector_codecs import VectorCodec, decode_lvq, encode_lvq, is_lvq, stored_bytes
from penstock.operators.vector_store import STORED_BATCH_ROWS, ArrayVectors, VectorWriter, open_vectors

DIMENSION = 9
ROWS = 2 * STORED_BATCH_ROWS + 700
VECTORS = np.random.default_rng(5).standard_normal((ROWS, DIMENSION)).astype(np.float32)
MEAN = VECTORS.mean(axis=0)
FLOATS = [VectorCodec.FLOAT16, VectorCodec.FLOAT32]


def _write(path: Path, codec: VectorCodec, vectors: np.ndarray = VECTORS, batch_rows: int = ROWS) -> Path:
    with VectorWriter(path, vectors.shape[1], codec, MEAN if is_lvq(codec) else None) as writer:
        for first in range(0, len(vectors), batch_rows):
            writer.add(vectors[first : first + batch_rows])
    return path


def _expected(codec: VectorCodec) -> np.ndarray:
    if not is_lvq(codec):
        return VECTORS.astype(codec.value).astype(np.float32)
    decoded = np.empty_like(VECTORS)
    decode_lvq(encode_lvq(VECTORS, MEAN, codec), MEAN, codec, decoded)
    return decoded


@pytest.mark.parametrize("codec", VectorCodec)
def test_vectors_round_trip_memory_mapped(codec: VectorCodec, tmp_path: Path) -> None:
    one = _write(tmp_path / "one", codec)
    assert one.read_bytes() == _write(tmp_path / "other", codec, batch_rows=999).read_bytes()
    allocated_bytes = pa.total_allocated_bytes()
    stored = open_vectors(one)
    assert pa.total_allocated_bytes() == allocated_bytes
    edges = [ROWS - 1, 0, STORED_BATCH_ROWS, STORED_BATCH_ROWS - 1, 0]
    for rows in (np.array(edges), np.random.default_rng(1).integers(0, ROWS, 1000), np.array([], np.int64)):
        taken = stored.take(rows)
        assert taken.dtype == np.float32 and np.array_equal(taken, _expected(codec)[rows])
    assert (len(stored), stored.dimension) == (ROWS, DIMENSION)
    batches = list(stored.batches())
    assert [len(batch) for batch in batches] == [STORED_BATCH_ROWS, STORED_BATCH_ROWS, 700]
    assert np.array_equal(np.concatenate(batches).astype(np.float32), _expected(codec))
    assert batches[0].dtype == (np.float32 if is_lvq(codec) else codec.value)


@pytest.mark.parametrize("codec", FLOATS)
def test_float_files_are_plain_arrow_lists(codec: VectorCodec, tmp_path: Path) -> None:
    values = VECTORS.astype(codec.value)
    kind = pa.list_(pa.float16() if codec is VectorCodec.FLOAT16 else pa.float32(), DIMENSION)
    with pa.OSFile(str(tmp_path / "arrow"), "wb") as file:
        with pa.ipc.new_file(file, pa.schema([("vector", kind)])) as writer:
            for first in range(0, ROWS, STORED_BATCH_ROWS):
                part = pa.array(values[first : first + STORED_BATCH_ROWS].reshape(-1))
                column = pa.FixedSizeListArray.from_arrays(part, DIMENSION)
                writer.write_batch(pa.record_batch([column], names=["vector"]))
    assert _write(tmp_path / "ours", codec).read_bytes() == (tmp_path / "arrow").read_bytes()
    with VectorWriter(tmp_path / "typed", DIMENSION, np.dtype(codec.value).type) as writer:
        writer.add(VECTORS)
    assert (tmp_path / "typed").read_bytes() == (tmp_path / "arrow").read_bytes()


@pytest.mark.parametrize("codec", VectorCodec)
def test_a_file_holds_what_its_codec_says(codec: VectorCodec, tmp_path: Path) -> None:
    one = _write(tmp_path / "one", codec, VECTORS[:STORED_BATCH_ROWS])
    two = _write(tmp_path / "two", codec, VECTORS[: 2 * STORED_BATCH_ROWS])
    added = two.stat().st_size - one.stat().st_size
    assert 0 <= added - STORED_BATCH_ROWS * stored_bytes(codec, DIMENSION) < 1024  # a batch has a header


@pytest.mark.parametrize("codec", VectorCodec)
def test_an_empty_vector_file_keeps_its_dimension(codec: VectorCodec, tmp_path: Path) -> None:
    stored = open_vectors(_write(tmp_path / "empty", codec, VECTORS[:0]))
    assert (len(stored), stored.dimension, stored.take(np.array([], np.int64)).shape) == (0, 9, (0, 9))
    assert list(stored.batches()) == []


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_an_array_is_read_like_a_file(kind: type[np.floating]) -> None:
    stored = ArrayVectors(VECTORS.astype(kind))
    rows = np.array([5, 0, 5])
    assert np.array_equal(stored.take(rows), VECTORS.astype(kind)[rows].astype(np.float32))
    assert stored.take(rows).dtype == np.float32
    assert (len(stored), stored.dimension, len(next(stored.batches()))) == (ROWS, DIMENSION, ROWS)


@pytest.mark.parametrize("codec", [VectorCodec.FLOAT32, VectorCodec.LVQ4X8])
def test_damaged_vector_files_are_errors_that_name_them(codec: VectorCodec, tmp_path: Path) -> None:
    path = _write(tmp_path / "shard-0.vectors.arrow", codec, VECTORS[:100])
    whole = path.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"vector file .*shard-0.vectors.arrow is damaged .*sha256"):
            open_vectors(path)
    with pytest.raises(FileNotFoundError):
        open_vectors(tmp_path / "absent")


def _foreign(path: Path, table: pa.Table, compression: str | None = None) -> Path:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema, options=options) as writer:
        writer.write_table(table)
    return path


def test_foreign_files_are_errors(tmp_path: Path) -> None:
    lvq = pa.ipc.open_file(str(_write(tmp_path / "lvq", VectorCodec.LVQ8, VECTORS[:10]))).read_all()
    metadata = lvq.schema.metadata
    foreign = [
        pa.table({"vector": [1.0, 2.0]}),
        pa.table({"vector": pa.array([[1.0, 2.0]], pa.list_(pa.float64(), 2))}),
        pa.table({"other": [1.0]}),
        lvq.replace_schema_metadata(None),
        lvq.replace_schema_metadata({**metadata, b"codec": b"lvq4x8"}),
        lvq.replace_schema_metadata({**metadata, b"codec": b"float16"}),
        lvq.replace_schema_metadata({**metadata, b"dimension": b"8"}),
        lvq.replace_schema_metadata({**metadata, b"dimension": b"nine"}),
        lvq.drop_columns(["scale"]),
    ]
    for number, table in enumerate(foreign):
        with pytest.raises(
            ValueError, match="must hold one column vector of fixed size lists .* of codec lvq8 or lvq4x8"
        ):
            open_vectors(_foreign(tmp_path / str(number), table))
    assert len(open_vectors(_foreign(tmp_path / "copy", lvq))) == 10
    with pytest.raises(ValueError, match="is compressed; write it uncompressed"):
        open_vectors(_foreign(tmp_path / "compressed", lvq, "lz4"))


def test_a_writer_left_by_an_exception_leaves_no_file_that_opens(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="vector 2 for .* is not finite as float16"),
        VectorWriter(tmp_path / "half", 2, np.float16) as writer,
    ):
        writer.add(np.zeros((1, 2), np.float32))
        writer.add(np.array([[0, 1], [70_000, 0]], np.float32))
    with pytest.raises(ValueError, match="is damaged"):
        open_vectors(tmp_path / "half")


@pytest.mark.parametrize("value", [np.nan, -np.inf, 65_600.0])
def test_lvq_refuses_what_its_offset_cannot_hold(value: float, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="vector 1 for .* is not finite as lvq8; drop the row"),
        VectorWriter(tmp_path / "lvq", 2, VectorCodec.LVQ8, np.zeros(2)) as writer,
    ):
        writer.add(np.array([[0, 1], [value, 0]], np.float32))


def test_errors_name_value_rule_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(ValueError, match=r"codec \(float64\) of .* must be one of float16, float32, lvq8, lvq4x8"):
        VectorWriter(path, 8, np.float64)
    with pytest.raises(ValueError, match=r"mean of .* \(none\) must be 8 finite values for codec lvq8"):
        VectorWriter(path, 8, VectorCodec.LVQ8)
    with pytest.raises(ValueError, match=r"mean of .* \(shape \(3,\), 1 not finite\) must be 8 finite values"):
        VectorWriter(path, 8, VectorCodec.LVQ4X8, np.array([1, np.nan, 2]))
    with pytest.raises(ValueError, match=r"mean of .* \(8 values\) is nothing that codec float16 subtracts"):
        VectorWriter(path, 8, VectorCodec.FLOAT16, np.zeros(8))
    with VectorWriter(path, 8, VectorCodec.FLOAT32) as writer:
        with pytest.raises(ValueError, match=r"vectors \(shape \(2, 3\)\) for .* must have 8 columns"):
            writer.add(np.zeros((2, 3), np.float32))
