import gzip
import hashlib
import io
import json
import math
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.operators.deadletters import DEAD_LETTER_SCHEMA, reasons
from penstock.operators.documents import DocumentReader, Documents, SourcePart, SourceType, documents_schema
from penstock.operators.identity import canonical_json
from penstock.operators.reading import probe_columns, read_documents, split_source
from penstock.operators.streams import READ_BYTES
from penstock.operators.tabular import BATCH_ROWS

CAP_BYTES = 64 << 20
Keep = tuple[tuple[str, str], ...]


def reader_of(
    source_type: SourceType,
    text: tuple[str, ...] = ("text",),
    id: str | None = "id",
    keep: Keep = (),
    max_bytes: int = CAP_BYTES,
) -> DocumentReader:
    return DocumentReader(source_type, text, id, keep, max_bytes)


def read(reader: DocumentReader, data: bytes, path: str = "part", part: SourcePart | None = None) -> Documents:
    documents = read_documents(reader, part or SourcePart(path), io.BytesIO(data), len(data))
    assert documents.rows_in == documents.table.num_rows + documents.dropped.num_rows
    assert documents.table.schema == documents_schema(reader)
    assert documents.dropped.schema == DEAD_LETTER_SCHEMA
    assert set(documents.dropped["stage"].to_pylist()) <= {"documents"}
    documents.table.validate(full=True)
    return documents


def read_jsonl(*lines: object, keep: Keep = (), text: tuple[str, ...] = ("text",), id: str | None = "id") -> Documents:
    data = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    return read(reader_of(SourceType.JSONL, text, id, keep), data)


def parquet_bytes(table: pa.Table, **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, write_page_checksum=True, **options)
    return sink.getvalue()


def read_parquet(table: pa.Table, keep: Keep = (), id: str | None = "id") -> Documents:
    return read(reader_of(SourceType.PARQUET, ("text",), id, keep), parquet_bytes(table))


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


def refusal(documents: Documents) -> str:
    """The reason of a file that was refused as a whole."""
    assert documents.table.num_rows == 0 and documents.rows_in == 1
    assert documents.dropped["position"].to_pylist() == [-1]
    return str(documents.dropped["reason"][0].as_py())


# ---- rows of every format


def test_the_reader_is_plain_data() -> None:
    reader = reader_of(SourceType.JSONL, keep=(("year", "int64"),))
    assert pickle.loads(pickle.dumps(reader)) == reader


@pytest.mark.parametrize("encode", [bytes, gzip.compress, zstd], ids=["plain", "gzip", "zstd"])
def test_jsonl(encode: Callable[[bytes], bytes]) -> None:
    lines = b'{"id": "a", "text": "one"}\n\n  \r\n{"id": 7, "text": "two"}\r\n{"id": "c", "text": "three"}'
    suffix = {bytes: "", gzip.compress: ".gz", zstd: ".zst"}[encode]
    documents = read(reader_of(SourceType.JSONL), encode(lines), f"a.jsonl{suffix}")
    assert documents.table.select(["document_id", "text", "position"]).to_pydict() == {
        "document_id": ["a", "7", "c"],
        "text": ["one", "two", "three"],
        "position": [0, lines.index(b'{"id": 7'), lines.index(b'{"id": "c"')],
    }
    assert set(documents.table["source"].to_pylist()) == {f"a.jsonl{suffix}"}
    assert documents.rows_in == 3


@pytest.mark.parametrize("encode", [bytes, gzip.compress, zstd], ids=["plain", "gzip", "zstd"])
def test_csv(encode: Callable[[bytes], bytes]) -> None:
    suffix = {bytes: "", gzip.compress: ".gz", zstd: ".zst"}[encode]
    data = b'id,year,text\r\n1,1999,"a ""quoted""\nline"\n\n2,,NULL\n3,20x0,"x"\n'
    documents = read(reader_of(SourceType.CSV, keep=(("year", "int64"),)), encode(data), f"a.csv{suffix}")
    assert documents.table.drop_columns("source").to_pylist() == [
        {"document_id": "1", "text": 'a "quoted"\nline', "position": 0, "year": 1999},
        {"document_id": "2", "text": "NULL", "position": 1, "year": None},
    ]
    (letter,) = documents.dropped.to_pylist()
    assert (letter["position"], letter["reason"], letter["document_id"]) == (2, "invalid_metadata", "3")


def test_csv_rows_of_another_width_are_dropped_alone() -> None:
    documents = read(reader_of(SourceType.CSV), b"id,text\n1,a\n2,b,c\n3\n4,d\n5,\xff\n6,\n,g\n")
    assert documents.table.select(["document_id", "position"]).to_pydict() == {
        "document_id": ["1", "4"],
        "position": [0, 3],
    }
    found = list(zip(documents.dropped["position"].to_pylist(), documents.dropped["reason"].to_pylist(), strict=True))
    assert found == [
        (1, "invalid_csv_row"),
        (2, "invalid_csv_row"),
        (4, "invalid_utf8"),
        (5, "empty_text"),
        (6, "null_id"),
    ]


def test_parquet_reads_row_groups_and_numbers_rows_in_the_file() -> None:
    rows = 3 * BATCH_ROWS
    table = pa.table({"id": range(rows), "text": [f"text {n}" for n in range(rows)], "unused": [b"x"] * rows})
    data = parquet_bytes(table, row_group_size=BATCH_ROWS + 10)
    whole = read(reader_of(SourceType.PARQUET), data)
    assert whole.table["document_id"].to_pylist() == [str(n) for n in range(rows)]
    assert whole.table["position"].to_pylist() == list(range(rows))
    parts = [SourcePart("part", start, start + 1) for start in range(3)]
    pieces = [read(reader_of(SourceType.PARQUET), data, part=part).table for part in parts]
    assert pa.concat_tables(pieces).equals(whole.table)


def test_text_files_are_one_document() -> None:
    reader = DocumentReader(SourceType.TEXT, (), None, (("path", "string"),), CAP_BYTES)
    documents = read(reader, b"\xef\xbb\xbf# Title\r\n\x00body\n", "notes/a.md")
    assert documents.table.to_pylist() == [
        {"document_id": "notes/a.md", "text": "# Title\r\n\x00body\n", "source": "notes/a.md", "position": 0}
        | {"path": "notes/a.md"}
    ]
    assert reasons(read(reader, b"").dropped) == {"empty_text": 1}
    assert reasons(read(reader, b"ok \xff").dropped) == {"invalid_utf8": 1}


def test_docstrings_are_documents_with_module_and_kind() -> None:
    keep = (("module", "string"), ("kind", "string"))
    reader = DocumentReader(SourceType.DOCSTRINGS, (), None, keep, CAP_BYTES)
    source = b'"""Top."""\nclass A:\n    """Class."""\n    def f(self): "Function."\n    def g(self): "\\ud800"\n'
    documents = read(reader, source, "pkg/sub/__init__.py")
    rows = documents.table.to_pylist()
    assert [(row["document_id"], row["text"], row["position"], row["kind"]) for row in rows] == [
        ("pkg.sub", "Top.", 0, "module"),
        ("pkg.sub.A", "Class.", 1, "class"),
        ("pkg.sub.A.f", "Function.", 2, "function"),
    ]
    assert {row["module"] for row in rows} == {"pkg.sub"}
    assert reasons(documents.dropped) == {"invalid_unicode": 1}
    assert refusal(read(reader, b"def f(:", "pkg/broken.py")) == "unreadable_file"
    assert read(reader, b"x = 1\n").rows_in == 0


def test_text_columns_are_joined_and_blank_ones_skipped() -> None:
    lines = [
        {"id": "1", "a": "x", "b": "y"},
        {"id": "2", "a": " ", "b": "y"},
        {"id": "3", "b": "y", "a": None},
        {"id": "4", "a": "x"},
    ]
    assert read_jsonl(*lines, text=("a", "b")).table["text"].to_pylist() == ["x\ny", "y", "y", "x"]


def test_content_derived_ids_depend_on_text_and_kept_values_alone() -> None:
    keep = (("year", "int64"),)
    expected = hashlib.blake2b(canonical_json({"text": "one", "keep": {"year": "1999"}}), digest_size=16).hexdigest()
    from_json = read_jsonl({"text": "one", "year": 1999, "other": 1}, keep=keep, id=None)
    from_csv = read(reader_of(SourceType.CSV, id=None, keep=keep), b"year,text\n1999,one\n")
    from_parquet = read_parquet(pa.table({"text": ["one"], "year": pa.array([1999], pa.int16())}), keep, id=None)
    for documents in (from_json, from_csv, from_parquet):
        assert documents.table["document_id"].to_pylist() == [expected]
    assert read_jsonl({"text": "one", "year": 2000}, keep=keep, id=None).table["document_id"][0].as_py() != expected


# ---- every dead letter reason


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b"9" * 5_000, "invalid_json"),
        (b"[1]", "not_an_object"),
        (b"null", "not_an_object"),
        (b'{"id": "a", "text": "\xff"}', "invalid_utf8"),
        (b'{"id": "a", "text": "\\ud800"}', "invalid_unicode"),
        (b'{"id": "\\udfff", "text": "x"}', "invalid_unicode"),
        (b'{"id": "a", "text": 5}', "text_not_a_string"),
        (b'{"id": "a", "text": ["x"]}', "text_not_a_string"),
        (b'{"id": "a", "text": null}', "empty_text"),
        (b'{"id": "a", "text": ""}', "empty_text"),
        (b'{"id": "a", "text": " \\u3000\\n"}', "empty_text"),
        (b'{"id": "a"}', "missing_column"),
        (b'{"text": "x"}', "missing_column"),
        (b'{"id": null, "text": "x"}', "null_id"),
        (b'{"id": "", "text": "x"}', "null_id"),
        (b'{"id": 1.5, "text": "x"}', "schema_mismatch"),
        (b'{"id": true, "text": "x"}', "schema_mismatch"),
        (b'{"id": "a", "text": "x", "year": "MCM"}', "invalid_metadata"),
        (b'{"id": "a", "text": "x", "year": {"y": 1}}', "invalid_metadata"),
    ],
)
def test_a_bad_json_line_is_dropped_alone_with_its_place(line: bytes, reason: str) -> None:
    good = b'{"id": "good", "text": "fine"}'
    documents = read(reader_of(SourceType.JSONL, keep=(("year", "int64"),)), good + b"\n" + line + b"\n" + good)
    assert documents.table["text"].to_pylist() == ["fine", "fine"]
    assert reasons(documents.dropped) == {reason: 1}
    assert documents.dropped["position"].to_pylist() == [len(good) + 1]


def test_invalid_metadata_names_column_and_value() -> None:
    documents = read_jsonl({"id": "a", "text": "x", "year": "MCM"}, keep=(("year", "int64"),))
    (letter,) = documents.dropped.to_pylist()
    assert "year" in letter["detail"] and "'MCM'" in letter["detail"] and "int64" in letter["detail"]
    assert letter["document_id"] == "a"


KEPT_VALUES: list[tuple[str, object, object]] = [
    ("string", "as is", "as is"),
    ("string", 1.5, "1.5"),
    ("string", True, "true"),
    ("string", {"a": ["é"]}, '{"a": ["é"]}'),
    ("string", None, None),
    ("int64", 5, 5),
    ("int64", "-5", -5),
    ("int64", 5.0, 5),
    ("float64", 2, 2.0),
    ("float64", "1e3", 1000.0),
    ("bool", True, True),
    ("bool", "False", False),
    ("timestamp", "2024-02-29", datetime(2024, 2, 29, tzinfo=UTC)),
    ("timestamp", "2024-02-29T12:00:00+02:00", datetime(2024, 2, 29, 10, tzinfo=UTC)),
    ("timestamp", "2024-02-29 12:00:00.000001Z", datetime(2024, 2, 29, 12, 0, 0, 1, UTC)),
]


@pytest.mark.parametrize(("type_name", "value", "expected"), KEPT_VALUES)
def test_kept_json_values(type_name: str, value: object, expected: object) -> None:
    documents = read_jsonl({"id": "a", "text": "x", "kept": value}, keep=(("kept", type_name),))
    assert documents.table["kept"].to_pylist() == [expected]


@pytest.mark.parametrize(
    ("type_name", "value"),
    [
        ("string", ["\ud800"]),
        ("int64", 1.5),
        ("int64", 2**63),
        ("int64", True),
        ("int64", "1_000"),
        ("int64", ""),
        ("int64", math.inf),
        ("float64", "1_0"),
        ("float64", False),
        ("float64", 10**400),
        ("bool", 1),
        ("bool", "yes"),
        ("timestamp", 1700000000),
        ("timestamp", "yesterday"),
        ("timestamp", "0001-01-01T00:00:00+14:00"),
    ],
)
def test_kept_values_that_do_not_fit_are_refused(type_name: str, value: object) -> None:
    documents = read_jsonl({"id": "a", "text": "x", "kept": value}, keep=(("kept", type_name),))
    assert set(reasons(documents.dropped)) <= {"invalid_metadata", "invalid_unicode"}
    assert documents.dropped.num_rows == 1


@pytest.mark.parametrize(
    ("values", "type_name", "expected"),
    [
        (pa.array([3], pa.uint8()), "int64", 3),
        (pa.array([2**63], pa.uint64()), "int64", None),
        (pa.array([1.5]), "int64", None),
        (pa.array([1.5]), "string", "1.5"),
        (pa.array(["12"]), "int64", 12),
        (pa.array(["x"]).dictionary_encode(), "string", "x"),
        (pa.array([Decimal("1.50")]), "string", "1.50"),
        (pa.array([Decimal("1.50")]), "float64", 1.5),
        (pa.array([True]), "bool", True),
        (pa.array([date(2024, 1, 2)]), "timestamp", datetime(2024, 1, 2, tzinfo=UTC)),
        (pa.array([1], pa.timestamp("s")), "timestamp", datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)),
        (pa.array([1], pa.timestamp("us", "Europe/Paris")), "timestamp", datetime(1970, 1, 1, 0, 0, 0, 1, UTC)),
        (pa.array([1_000], pa.timestamp("ns")), "timestamp", datetime(1970, 1, 1, 0, 0, 0, 1, UTC)),
        (pa.array([2**50], pa.timestamp("s")), "timestamp", None),
        (pa.array([date(2024, 1, 2)]), "string", "2024-01-02"),
        (pa.nulls(1), "int64", "null"),
    ],
)
def test_kept_parquet_values(values: pa.Array, type_name: str, expected: object) -> None:
    table = pa.table({"id": ["a"], "text": ["x"], "kept": values})
    documents = read_parquet(table, (("kept", type_name),))
    if expected is None:
        assert reasons(documents.dropped) == {"invalid_metadata": 1}
    else:
        assert documents.table["kept"].to_pylist() == [None if expected == "null" else expected]


# ---- schema drift


@pytest.mark.parametrize(
    ("table", "outcome"),
    [
        ({"id": ["a"], "text": ["x"], "year": [1]}, "read"),
        ({"year": [1], "text": ["x"], "extra": [b"y"], "id": ["a"]}, "read"),
        ({"id": [1], "text": ["x"], "year": ["1"]}, "read"),
        ({"id": ["a"], "text": pa.array(["x"], pa.large_string()), "year": [1.0]}, "read"),
        ({"id": ["a"], "text": pa.array(["x"]).dictionary_encode(), "year": pa.nulls(1)}, "read"),
        ({"id": pa.nulls(1), "text": ["x"], "year": [1]}, "null_id"),
        ({"id": ["a"], "text": pa.nulls(1), "year": [1]}, "empty_text"),
        ({"id": ["a"], "body": ["x"], "year": [1]}, "missing_column"),
        ({"text": ["x"], "year": [1]}, "missing_column"),
        ({"id": ["a"], "text": ["x"]}, "missing_column"),
        ({"id": [1.5], "text": ["x"], "year": [1]}, "schema_mismatch"),
        ({"id": ["a"], "text": [b"x"], "year": [1]}, "schema_mismatch"),
        ({"id": ["a"], "text": [["x"]], "year": [1]}, "schema_mismatch"),
        ({"id": ["a"], "text": [7], "year": [1]}, "schema_mismatch"),
        ({"id": ["a"], "text": ["x"], "year": [True]}, "schema_mismatch"),
        ({"id": ["a"], "text": ["x"], "year": [{"y": 1}]}, "schema_mismatch"),
    ],
)
def test_parquet_schema_drift_is_read_or_refused_by_name(table: dict[str, object], outcome: str) -> None:
    documents = read_parquet(pa.table(table), (("year", "int64"),))
    if outcome == "read":
        assert documents.table["text"].to_pylist() == ["x"] and documents.dropped.num_rows == 0
    elif outcome in ("null_id", "empty_text"):
        assert reasons(documents.dropped) == {outcome: 1}
    else:
        assert refusal(documents) == outcome


def test_a_refusal_names_the_column_and_what_there_is() -> None:
    detail = read_parquet(pa.table({"id": ["a"], "body": ["x"]})).dropped["detail"][0].as_py()
    assert "text" in detail and "id, body" in detail


def test_columns_that_appear_twice_are_refused() -> None:
    twice = pa.table([["a"], ["x"], ["y"]], names=["id", "text", "text"])
    assert refusal(read_parquet(twice)) == "schema_mismatch"
    assert refusal(read(reader_of(SourceType.CSV), b"id,text,text\n1,2,3\n")) == "schema_mismatch"


def test_csv_without_a_needed_column_or_header_is_refused() -> None:
    assert refusal(read(reader_of(SourceType.CSV), b"id,body\n1,2\n")) == "missing_column"
    assert refusal(read(reader_of(SourceType.CSV), b"")) == "unreadable_file"
    assert read(reader_of(SourceType.CSV), b"id,text\n").rows_in == 0


# ---- text survives


@pytest.mark.parametrize("source_type", [SourceType.JSONL, SourceType.CSV, SourceType.TEXT])
def test_the_byte_order_mark_of_a_file_is_no_part_of_its_text(source_type: SourceType) -> None:
    contents = {
        SourceType.JSONL: '\ufeff{"id": "1", "text": "\ufeffx"}\n',
        SourceType.CSV: "\ufeffid,text\n1,\ufeffx\n",
        SourceType.TEXT: "\ufeff\ufeffx",
    }
    documents = read(reader_of(source_type), contents[source_type].encode())
    assert documents.table["text"].to_pylist() == ["\ufeffx"]
    assert documents.table["position"].to_pylist() == [0]


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1), st.text(st.characters(codec="utf-8"), min_size=1))
def test_text_and_id_survive_byte_exactly(text: str, document_id: str) -> None:
    row = {"id": document_id, "text": text}
    csv_text, csv_id = (value.replace('"', '""') for value in (text, document_id))
    tables = [
        read_jsonl(row),
        read_parquet(pa.table({"id": [document_id], "text": [text]})),
        read(reader_of(SourceType.CSV), f'id,text\n"{csv_id}","{csv_text}"\n'.encode()),
    ]
    for documents in tables:
        if text.strip():
            assert documents.table.select(["document_id", "text"]).to_pylist() == [
                {"document_id": document_id, "text": text}
            ]
        else:
            assert reasons(documents.dropped) == {"empty_text": 1}


def test_invalid_utf8_in_a_parquet_string_column_is_dropped_by_row() -> None:
    raw = pa.array([b"fine", b"bad \xff", b"\xed\xa0\x80", "e\u0301\x00\u200f".encode()])
    strings = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    documents = read_parquet(pa.table({"id": ["a", "b", "c", "d"], "text": strings}))
    assert documents.table["document_id"].to_pylist() == ["a", "d"]
    assert documents.table["text"][1].as_py() == "e\u0301\x00\u200f"
    assert reasons(documents.dropped) == {"invalid_utf8": 2}


# ---- damaged files

DAMAGED = pa.table(
    {
        "id": [f"id-{n}" for n in range(400)],
        "text": [f"the text of document {n} " * (1 + n % 7) for n in range(400)],
        "year": pa.array([1900 + n % 120 if n % 5 else None for n in range(400)], pa.int64()),
    }
)


@pytest.mark.parametrize("options", [{}, {"compression": "zstd", "use_dictionary": False, "row_group_size": 100}])
def test_truncated_or_flipped_parquet_is_equal_or_refused(options: dict[str, object]) -> None:
    data = parquet_bytes(DAMAGED, **options)
    reader = reader_of(SourceType.PARQUET, keep=(("year", "int64"),))
    intact = read(reader, data).table
    generator = random.Random(15)
    offsets = sorted(generator.sample(range(len(data)), 100)) + list(range(len(data) - 60, len(data)))
    refused = 0
    for offset in offsets:
        flipped = bytearray(data)
        flipped[offset] ^= 1 << generator.randrange(8)
        for damaged in (bytes(flipped), data[:offset]):
            documents = read(reader, damaged)
            assert documents.table.equals(intact) or refusal(documents)
            refused += documents.dropped.num_rows
    assert refused > len(offsets)


def test_damaged_parquet_without_checksums_never_raises() -> None:
    sink = io.BytesIO()
    pq.write_table(DAMAGED, sink, compression="none", row_group_size=50)
    data, generator = sink.getvalue(), random.Random(17)
    for _ in range(300):
        flipped = bytearray(data)
        for _ in range(generator.choice([1, 1, 3, 20])):
            flipped[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        read(reader_of(SourceType.PARQUET, keep=(("year", "int64"),)), bytes(flipped))  # checks that rows add up
        split_source(SourceType.PARQUET, "part", len(data), io.BytesIO(flipped), 1_000)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_breaks_is_refused_as_a_whole(suffix: str) -> None:
    lines = b"".join(json.dumps({"id": n, "text": f"text {n}"}).encode() + b"\n" for n in range(20_000))
    data = gzip.compress(lines) if suffix == ".gz" else zstd(lines)
    for damaged in (data[:-3], data[: len(data) // 2], data + b"trailing"):
        assert refusal(read(reader_of(SourceType.JSONL), damaged, f"a.jsonl{suffix}")) == "unreadable_file"
    csv_data = gzip.compress(b"id,text\n1,x\n")
    assert refusal(read(reader_of(SourceType.CSV), csv_data[:-1], "a.csv.gz")) == "unreadable_file"


def test_what_the_stream_raises_is_not_the_content() -> None:
    class Unreachable(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise ConnectionResetError("the store does not answer")

    for source_type in SourceType:
        reader = reader_of(source_type)
        with pytest.raises(ConnectionResetError, match="does not answer"):
            read_documents(reader, SourcePart("a.jsonl.gz"), Unreachable(b"x" * 100), 100)


def test_the_stream_stays_open() -> None:
    stream = io.BytesIO(parquet_bytes(DAMAGED))
    read_documents(reader_of(SourceType.PARQUET), SourcePart("a"), stream, len(stream.getvalue()))
    assert not stream.closed


# ---- bombs

BOMB_SCRIPT = """
import io, resource, sys
import pyarrow as pa, pyarrow.parquet as pq
from penstock.operators.documents import DocumentReader, SourcePart, SourceType
from penstock.operators.reading import read_documents
path = sys.argv[1]
source_type = SourceType.PARQUET if path.endswith(".parquet") else SourceType.JSONL
reader = DocumentReader(source_type, ("text",), None, (), 64 << 20)
data = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
documents = read_documents(reader, SourcePart(path), io.BytesIO(data), len(data))
grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
sys.stdout.write(f"{documents.dropped['reason'][0]} {documents.rows_in} {grown_mib}")
"""


def repeated_value_parquet(rows: int, value: str) -> bytes:
    sink = io.BytesIO()
    indices = pa.array([0], pa.int32()).take(pa.array([0] * (rows // 64), pa.int32()))
    batch = pa.table({"text": pa.DictionaryArray.from_arrays(indices, [value])})
    with pq.ParquetWriter(sink, batch.schema) as writer:
        writer.write_table(pa.concat_tables([batch] * 64), row_group_size=rows)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("bomb.jsonl.gz", gzip.compress(b"x" * (512 << 20), 1)),
        ("bomb.jsonl.zst", zstd(b"x" * (512 << 20))),
        ("long-values.parquet", repeated_value_parquet(64_000, "x" * 1_000_000)),
        ("many-rows.parquet", repeated_value_parquet(32_000_000, "x")),
    ],
    ids=["gzip", "zstd", "values", "rows"],
)
def test_a_bomb_is_refused_within_bounded_memory(path: str, data: bytes) -> None:
    assert len(data) < 8 << 20
    script = [sys.executable, "-c", BOMB_SCRIPT, path]
    reason, rows_in, grown_mib = subprocess.run(script, input=data, capture_output=True, check=True).stdout.split()
    assert (reason, rows_in) == (b"file_too_large", b"1")
    assert int(grown_mib) < 400


def test_files_beyond_the_cap_are_refused_before_they_are_read() -> None:
    for source_type in (SourceType.JSONL, SourceType.CSV, SourceType.TEXT):
        reader = reader_of(source_type, max_bytes=10)
        assert refusal(read(reader, b"x" * 11)) == "file_too_large"
    reader = reader_of(SourceType.PARQUET, max_bytes=1_000)
    documents = read(reader, parquet_bytes(DAMAGED))
    assert refusal(documents) == "file_too_large"
    assert "1000" in documents.dropped["detail"][0].as_py()


# ---- parts


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from([b'{"id": 1, "text": "x"}', b"", b"{", b'{"id": "\xc3\xa9", "text": "longer text"}']),
        max_size=8,
    ),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.integers(1, 60),
)
def test_jsonl_parts_together_equal_the_whole(lines: list[bytes], newline: bytes, ends: bool, part_bytes: int) -> None:
    data = newline.join(lines) + (newline if ends else b"")
    reader = reader_of(SourceType.JSONL)
    whole = read(reader, data, "a.jsonl")
    parts = split_source(SourceType.JSONL, "a.jsonl", len(data), io.BytesIO(data), part_bytes)
    pieces = [read(reader, data, part=part) for part in parts]
    assert pa.concat_tables([piece.table for piece in pieces]).equals(whole.table)
    assert pa.concat_tables([piece.dropped for piece in pieces]).equals(whole.dropped)


def test_jsonl_lines_longer_than_a_read_and_than_a_part() -> None:
    texts = ["a" * (2 * READ_BYTES + 3), "b", "c" * READ_BYTES, "d" * (READ_BYTES + 1)]
    data = b"\n".join(json.dumps({"id": n, "text": text}).encode() for n, text in enumerate(texts))
    reader = reader_of(SourceType.JSONL)
    assert read(reader, data).table["text"].to_pylist() == texts
    parts = split_source(SourceType.JSONL, "part", len(data), None, READ_BYTES // 3)
    assert len(parts) > 10
    assert pa.concat_tables([read(reader, data, part=part).table for part in parts])["text"].to_pylist() == texts


def test_a_line_beyond_the_cap_refuses_only_the_part_it_begins_in() -> None:
    good = b'{"id": "1", "text": "x"}\n'
    data = good * 10 + b'{"id": "2", "text": "' + b"x" * (3 * READ_BYTES) + b'"}\n' + good
    reader = reader_of(SourceType.JSONL, max_bytes=1000)
    parts = split_source(SourceType.JSONL, "part", len(data), None, 500)
    results = [read(reader, data, part=part) for part in parts]
    assert [result.table.num_rows for result in results if result.table.num_rows] == [1]
    assert refusal(results[0]) == "file_too_large"
    assert sum(result.dropped.num_rows for result in results) == 1


@pytest.mark.parametrize("part_bytes", [1, 3_000, 10_000, 10**9])
def test_parquet_parts_together_equal_the_whole(part_bytes: int) -> None:
    data = parquet_bytes(DAMAGED, row_group_size=37, compression="none")
    reader = reader_of(SourceType.PARQUET)
    whole = read(reader, data)
    parts = split_source(SourceType.PARQUET, "part", len(data), io.BytesIO(data), part_bytes)
    assert parts == split_source(SourceType.PARQUET, "part", len(data), io.BytesIO(data), part_bytes)
    assert pa.concat_tables([read(reader, data, part=part).table for part in parts]).equals(whole.table)
    assert (len(parts) == 1) == (part_bytes == 10**9)


def test_a_part_beyond_the_row_groups_of_a_file_is_refused() -> None:
    documents = read(reader_of(SourceType.PARQUET), parquet_bytes(DAMAGED), part=SourcePart("part", 1, 3))
    assert refusal(documents) == "unreadable_file"
    assert "part 1 to 3" in documents.dropped["detail"][0].as_py()


def test_what_cannot_be_split_is_one_part() -> None:
    whole = [SourcePart("a.jsonl.gz")]
    assert split_source(SourceType.JSONL, "a.jsonl.gz", 100, None, 10) == whole
    assert split_source(SourceType.CSV, "a.csv", 100, None, 10) == [SourcePart("a.csv")]
    assert split_source(SourceType.PARQUET, "a", 100, io.BytesIO(b"x" * 100), 10) == [SourcePart("a")]
    with pytest.raises(ValueError, match=r"part_bytes \(0\) must be positive"):
        split_source(SourceType.JSONL, "a", 100, None, 0)


# ---- columns


def test_probe_columns() -> None:
    parquet = io.BytesIO(parquet_bytes(DAMAGED))
    types = {"id": pa.string(), "text": pa.string(), "year": pa.int64()}
    assert probe_columns(SourceType.PARQUET, "a.parquet", parquet) == types
    assert probe_columns(SourceType.CSV, "a.csv", io.BytesIO(b'\xef\xbb\xbfid,"te\nxt"\n1,2\n')) == {
        "id": None,
        "te\nxt": None,
    }
    lines = gzip.compress(b'\n{bad\n{"id": 1, "text": "x"}\n')
    assert probe_columns(SourceType.JSONL, "a.jsonl.gz", io.BytesIO(lines)) == {"id": None, "text": None}
    assert probe_columns(SourceType.DOCSTRINGS, "a.py", io.BytesIO(b"")) == {"module": pa.string(), "kind": pa.string()}


@pytest.mark.parametrize("source_type", [SourceType.PARQUET, SourceType.CSV])
def test_probing_what_is_not_of_the_type_names_the_file(source_type: SourceType) -> None:
    with pytest.raises(ValueError, match=f"columns of a/b cannot be read as {source_type}"):
        probe_columns(source_type, "a/b", io.BytesIO(b""))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": ()}, "text columns of a jsonl source are empty"),
        ({"keep": (("x", "int32"),)}, r"keep column x has type \(int32\), known are string"),
        ({"keep": (("position", "int64"),)}, r"keep column \(position\) has a reserved name"),
        ({"keep": (("x", "int64"), ("x", "string"))}, r"keep columns \(x\) are named twice"),
        ({"max_bytes": 0}, r"max_bytes \(0\) must be positive"),
    ],
)
def test_a_reader_that_cannot_work_is_refused_when_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(reader_of(SourceType.JSONL), **arguments)


def test_text_and_docstrings_offer_only_their_own_metadata() -> None:
    with pytest.raises(ValueError, match="docstrings offers module, kind"):
        DocumentReader(SourceType.DOCSTRINGS, (), None, (("path", "string"),), 1)
