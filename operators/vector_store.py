"""Files of vectors to compare candidates with: written once in a storage codec, read by row through a memory map."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa

from penstock.operators.indexing import FixedBatches
from penstock.operators.vector_codecs import (
    HALF_LARGEST,
    LvqCodes,
    VectorCodec,
    code_bytes,
    decode_lvq,
    encode_lvq,
    half_to_single,
    is_lvq,
)

VECTOR_COLUMN = "vector"
CODES_COLUMN, OFFSET_COLUMN, SCALE_COLUMN = "codes", "offset", "scale"
CODEC_KEY, DIMENSION_KEY, MEAN_KEY = b"codec", b"dimension", b"mean"
FLOAT_TYPES: dict[VectorCodec, tuple[type[np.floating[Any]], pa.DataType]] = {
    VectorCodec.FLOAT16: (np.float16, pa.float16()),
    VectorCodec.FLOAT32: (np.float32, pa.float32()),
}
MEAN_TYPE = np.dtype("<f4")
HALF_BYTES = 2
STORED_BATCH_ROWS = 16_384  # 32 MiB of 1,024 float16; the file does not depend on the batches it was given
DECODED_ROWS = 512  # decoded at once: 768 KiB of 384 float32, which stay in the cache from step to step


class StoredVectors(ABC):
    """Vectors by row, whatever they are stored as."""

    dimension: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, rows: np.ndarray) -> np.ndarray:
        """The rows (n,) int64 in the order asked for, as float32 (n, d)."""

    @abstractmethod
    def batches(self) -> Iterator[np.ndarray]:
        """All vectors in row order: floating point (n, d) pieces, memory-mapped where nothing needs decoding."""


class ArrayVectors(StoredVectors):
    """Finite vectors in one floating point array (n, d)."""

    def __init__(self, vectors: np.ndarray) -> None:
        self._vectors = vectors
        self.dimension = vectors.shape[1]

    def __len__(self) -> int:
        return len(self._vectors)

    def take(self, rows: np.ndarray) -> np.ndarray:
        return _single(self._vectors[rows])

    def batches(self) -> Iterator[np.ndarray]:
        yield self._vectors


class MappedVectors(StoredVectors):
    """Vectors of an opened file. Memory: what is taken, and DECODED_ROWS rows."""

    def __init__(self, columns: "Mapping[str, _MappedColumn]", batch_rows: np.ndarray, layout: "_Layout") -> None:
        self._columns, self._layout = columns, layout
        self._ends = np.cumsum(batch_rows, dtype=np.int64)
        self._firsts = self._ends - batch_rows
        self.dimension = layout.dimension

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def take(self, rows: np.ndarray) -> np.ndarray:
        taken = np.empty((len(rows), self.dimension), np.float32)
        for first in range(0, len(rows), DECODED_ROWS):
            part = slice(first, first + DECODED_ROWS)
            self._decode(rows[part], taken[part])
        return taken

    def batches(self) -> Iterator[np.ndarray]:
        for batch, (first, end) in enumerate(zip(self._firsts, self._ends, strict=True)):
            if is_lvq(self._layout.codec):
                yield self.take(np.arange(first, end))
            else:
                stored = self._columns[VECTOR_COLUMN].batch(batch, int(end - first))
                yield stored.view(FLOAT_TYPES[self._layout.codec][0])

    def _decode(self, rows: np.ndarray, out: np.ndarray) -> None:
        batch_of = np.searchsorted(self._ends, rows, side="right")
        within = rows - self._firsts[batch_of]
        raw = {name: column.take(batch_of, within) for name, column in self._columns.items()}
        match self._layout.codec:
            case VectorCodec.FLOAT16:
                half_to_single(raw[VECTOR_COLUMN].view(np.float16), out)
            case VectorCodec.FLOAT32:
                np.copyto(out, raw[VECTOR_COLUMN].view(np.float32))
            case VectorCodec.LVQ8 | VectorCodec.LVQ4X8 as codec:
                offsets, scales = (raw[name].view(np.float16)[:, 0] for name in (OFFSET_COLUMN, SCALE_COLUMN))
                decode_lvq(LvqCodes(raw[CODES_COLUMN], offsets, scales), self._layout.mean, codec, out)


class VectorWriter:
    """Writes vectors as an Arrow IPC file that open_vectors opens.

    float16 and float32 have one column `vector`: fixed_size_list<halffloat or float>[dimension]. LVQ has the columns
    `codes`: fixed_size_binary, `offset` and `scale`: halffloat, and the mean in the metadata of the schema.

    A context manager: the file is complete once it is left without an exception. Memory: one batch.

    Args:
        codec: a VectorCodec, or the numpy type of one.
        mean: of all vectors, floating point (d,); LVQ needs it, and the others have no use for it.
    """

    def __init__(
        self,
        path: str | Path,
        dimension: int,
        codec: VectorCodec | type[np.floating[Any]],
        mean: np.ndarray | None = None,
    ) -> None:
        named = _codec_named(path, codec)
        self._layout = _Layout(named, dimension, _checked_mean(path, dimension, named, mean))
        self._schema = self._layout.schema()
        self._batches = FixedBatches(STORED_BATCH_ROWS, dimension, self._layout.buffered_type())
        self._path = path
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, self._schema)
        self.rows = 0

    def add(self, vectors: np.ndarray) -> None:
        """Appends floating point (n, d) rows.

        Raises:
            ValueError: for another dimension, or a value that the codec cannot hold.
        """
        dimension = self._layout.dimension
        if vectors.ndim != 2 or vectors.shape[1] != dimension:
            raise ValueError(f"vectors (shape {vectors.shape}) for {self._path} must have {dimension} columns")
        with np.errstate(over="ignore"):
            stored = vectors.astype(self._layout.buffered_type())
        fit = self._layout.fit(stored)
        if not fit.all():
            raise ValueError(
                f"vector {self.rows + int(np.argmin(fit))} for {self._path} is not finite as {self._layout.codec}; "
                "drop the row, or store float32"
            )
        for batch in self._batches.push(stored):
            self._write(batch)
        self.rows += len(vectors)

    def close(self) -> None:
        """Writes what is left and the footer, without which the file cannot be opened."""
        rest = self._batches.rest()
        if len(rest):
            self._write(rest)
        self._writer.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()

    def _write(self, batch: np.ndarray) -> None:
        self._writer.write_batch(pa.record_batch(self._layout.arrays(batch), schema=self._schema))


def open_vectors(path: str | Path) -> StoredVectors:
    """Memory-maps what VectorWriter wrote; nothing is copied until rows are taken.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged or holds something else.
    """
    try:
        mapped = pa.memory_map(str(path)).read_buffer()
        reader = pa.ipc.open_file(pa.BufferReader(mapped))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(
            f"vector file {path} is damaged ({error}); compare its sha256 with the manifest and fetch it again"
        ) from error
    layout = _layout_of(path, reader.schema)
    filled = [batch for batch in batches if len(batch)]
    columns = {
        name: _MappedColumn(path, mapped, [batch.column(name) for batch in filled], width)
        for name, width in layout.widths().items()
    }
    return MappedVectors(columns, np.array([len(batch) for batch in filled], np.int64), layout)


@dataclass(frozen=True, eq=False)
class _Layout:
    """What the columns of a file are. `mean` is float32 (d,), zero where the codec subtracts none."""

    codec: VectorCodec
    dimension: int
    mean: np.ndarray

    def schema(self) -> pa.Schema:
        if not is_lvq(self.codec):
            return pa.schema([(VECTOR_COLUMN, pa.list_(FLOAT_TYPES[self.codec][1], self.dimension))])
        codes = pa.binary(code_bytes(self.codec, self.dimension))
        metadata = {
            CODEC_KEY: self.codec.encode(),
            DIMENSION_KEY: str(self.dimension).encode(),
            MEAN_KEY: self.mean.astype(MEAN_TYPE).tobytes(),
        }
        fields = [(CODES_COLUMN, codes), (OFFSET_COLUMN, pa.float16()), (SCALE_COLUMN, pa.float16())]
        return pa.schema(fields, metadata=metadata)

    def widths(self) -> dict[str, int]:
        """Bytes of one row in each column."""
        codes = code_bytes(self.codec, self.dimension)
        if not is_lvq(self.codec):
            return {VECTOR_COLUMN: codes}
        return {CODES_COLUMN: codes, OFFSET_COLUMN: HALF_BYTES, SCALE_COLUMN: HALF_BYTES}

    def buffered_type(self) -> type[np.floating[Any]]:
        """What rows wait as until their batch is full."""
        return np.float32 if is_lvq(self.codec) else FLOAT_TYPES[self.codec][0]

    def fit(self, vectors: np.ndarray) -> np.ndarray:
        """bool (n,): which rows, of the buffered type, the codec can hold."""
        fits = np.abs(vectors - self.mean) <= HALF_LARGEST if is_lvq(self.codec) else np.isfinite(vectors)
        fit: np.ndarray = fits.all(axis=1)
        return fit

    def arrays(self, batch: np.ndarray) -> list[pa.Array]:
        """The columns of a batch, in the order of the schema."""
        if not is_lvq(self.codec):
            return [pa.FixedSizeListArray.from_arrays(pa.array(batch.reshape(-1)), self.dimension)]
        encoded = encode_lvq(batch, self.mean, self.codec)
        kind = pa.binary(encoded.codes.shape[1])
        codes = pa.Array.from_buffers(kind, len(batch), [None, pa.py_buffer(np.ascontiguousarray(encoded.codes))])
        return [codes, pa.array(encoded.offsets), pa.array(encoded.scales)]


class _MappedColumn:
    """Rows of one width, wherever their batches lie in the mapped file."""

    def __init__(self, path: str | Path, mapped: pa.Buffer, parts: list[pa.Array], width: int) -> None:
        data = [part.buffers()[-1] for part in parts]
        starts = [
            buffer.address - mapped.address + part.offset * width for buffer, part in zip(data, parts, strict=True)
        ]
        lengths = [len(part) * width for part in parts]
        if any(start < 0 or start + length > mapped.size for start, length in zip(starts, lengths, strict=True)):
            raise ValueError(
                f"vector file {path} is compressed; write it uncompressed, so that it can be memory-mapped"
            )
        self._bytes = np.frombuffer(mapped, np.uint8)
        self._starts, self._width = np.array(starts, np.int64), width
        # A row may begin at any byte of the file. Without rows the file may be shorter than one.
        self._windows = np.lib.stride_tricks.sliding_window_view(self._bytes, width if starts else 1)

    def take(self, batch_of: np.ndarray, within: np.ndarray) -> np.ndarray:
        """uint8 (n, width): for each row the batch that holds it, and its place there."""
        taken: np.ndarray = self._windows[self._starts[batch_of] + within * self._width]
        return taken

    def batch(self, number: int, rows: int) -> np.ndarray:
        """uint8 (rows, width) of one batch, mapped."""
        start = self._starts[number]
        return self._bytes[start : start + rows * self._width].reshape(rows, self._width)


def _single(vectors: np.ndarray) -> np.ndarray:
    """Finite floating point (n, d) as float32."""
    if vectors.dtype != np.float16:
        return vectors.astype(np.float32, copy=False)
    single = np.empty(vectors.shape, np.float32)
    half_to_single(vectors, single)
    return single


def _codec_named(path: str | Path, codec: VectorCodec | type[np.floating[Any]]) -> VectorCodec:
    name = codec if isinstance(codec, VectorCodec) else np.dtype(codec).name
    if name not in list(VectorCodec):
        raise ValueError(f"codec ({name}) of {path} must be one of {', '.join(VectorCodec)}")
    return VectorCodec(name)


def _checked_mean(path: str | Path, dimension: int, codec: VectorCodec, mean: np.ndarray | None) -> np.ndarray:
    if not is_lvq(codec):
        if mean is not None:
            raise ValueError(
                f"mean of {path} ({len(mean)} values) is nothing that codec {codec} subtracts; leave it out"
            )
        return np.zeros(dimension, np.float32)
    if mean is None or mean.shape != (dimension,) or not np.isfinite(mean).all():
        got = "none" if mean is None else f"shape {mean.shape}, {np.count_nonzero(~np.isfinite(mean))} not finite"
        raise ValueError(
            f"mean of {path} ({got}) must be {dimension} finite values for codec {codec}; fit it on the rows"
        )
    return mean.astype(np.float32)


def _layout_of(path: str | Path, schema: pa.Schema) -> _Layout:
    layout = _float_layout(schema) if schema.names == [VECTOR_COLUMN] else _lvq_layout(schema)
    if layout is None or not layout.schema().equals(schema):
        raise ValueError(
            f"vector file {path} (columns {schema.to_string(show_field_metadata=False)}) must hold one column "
            f"{VECTOR_COLUMN} of fixed size lists of halffloat or float, or {CODES_COLUMN}, {OFFSET_COLUMN} and "
            f"{SCALE_COLUMN} of codec {VectorCodec.LVQ8} or {VectorCodec.LVQ4X8} with its dimension and mean"
        )
    return layout


def _float_layout(schema: pa.Schema) -> _Layout | None:
    kind = schema.field(0).type
    codecs = {stored: codec for codec, (_, stored) in FLOAT_TYPES.items()}
    if not isinstance(kind, pa.FixedSizeListType) or kind.value_type not in codecs:
        return None
    return _Layout(codecs[kind.value_type], kind.list_size, np.zeros(kind.list_size, np.float32))


def _lvq_layout(schema: pa.Schema) -> _Layout | None:
    metadata = schema.metadata or {}
    codec, dimension = metadata.get(CODEC_KEY, b"").decode(), metadata.get(DIMENSION_KEY, b"").decode()
    mean = metadata.get(MEAN_KEY, b"")
    if codec not in list(VectorCodec) or not dimension.isdecimal() or len(mean) != int(dimension) * MEAN_TYPE.itemsize:
        return None
    return _Layout(VectorCodec(codec), int(dimension), np.frombuffer(mean, MEAN_TYPE).astype(np.float32))
