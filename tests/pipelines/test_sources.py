import datetime
import json
import os
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.cluster.jobs.passages import PassageJob, PassageTask, make_passages
from penstock.cluster.layout import PASSAGES, fragment_path
from penstock.operators.chunking import Chunker, PassageType
from penstock.operators.documents import DocumentReader, SourcePart, SourceType
from penstock.operators.models import hash_tokenizer, resolve_model
from penstock.operators.reading import read_documents
from penstock.pipelines.loading import PipelineFileInvalid, Problem, parse_pipeline
from penstock.pipelines.sources import Fragment, SourceFile, cut_fragments, document_reader, find_files

from .conftest import MODEL

FRAGMENT_BYTES = 2048
SMALL_BYTES = FRAGMENT_BYTES // 4 - 1
STAGE = "0" * 32
DOCUMENTS_LINE = 3  # of the pipelines below, where the keys of `documents` begin on the next line


def _pipeline(documents: str) -> str:
    indented = "".join(f"  {line}\n" for line in documents.strip().splitlines())
    return f"name: tiny\nroot: here\ndocuments:\n{indented}embedding: {{model: mine}}\n"


def _found(documents: str) -> list[SourceFile]:
    pipeline, origin = parse_pipeline(_pipeline(documents), "p.yaml")
    return find_files(pipeline.documents, origin)


def _reader(documents: str) -> DocumentReader:
    pipeline, origin = parse_pipeline(_pipeline(documents), "p.yaml")
    return document_reader(pipeline.documents, find_files(pipeline.documents, origin), origin)


def _problems(documents: str) -> list[Problem]:
    with pytest.raises(PipelineFileInvalid) as caught:
        _reader(documents)
    return caught.value.problems


def _fragments(documents: str) -> list[Fragment]:
    source_type = SourceType(documents.split()[1])
    return cut_fragments(_found(documents), source_type, FRAGMENT_BYTES, STAGE)


def _identities(documents: str) -> set[str]:
    fragments = _fragments(documents)
    identities = {fragment.fingerprint for fragment in fragments}
    assert len(identities) == len(fragments)
    return identities


def _jsonl(path: Path, size_bytes: int, word: str = "a") -> None:
    """A JSONL file of about this size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = json.dumps({"text": word * 40}) + "\n"
    path.write_text(row * max(1, size_bytes // len(row)))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Twelve small files, a middle one and a large one."""
    folder = tmp_path / "corpus"
    for number in range(12):
        _jsonl(folder / f"small-{number:02}.jsonl", 200, str(number))
    _jsonl(folder / "sub/middle.jsonl", FRAGMENT_BYTES - 200)
    _jsonl(folder / "sub/large.jsonl", 5 * FRAGMENT_BYTES)
    return folder


def _of(corpus: Path) -> str:
    return f"type: jsonl\npath: {corpus}"


# ---- fragments


def test_every_byte_lies_in_one_fragment(corpus: Path) -> None:
    fragments = _fragments(_of(corpus))
    pieces: dict[str, list[tuple[int, int]]] = {}
    for fragment in fragments:
        assert fragment.size_bytes == sum(part.bytes_to_read for part in fragment.parts)
        assert fragment.size_bytes <= 2 * FRAGMENT_BYTES
        for item in fragment.parts:
            stop = item.size_bytes if item.part.end is None else item.part.end
            pieces.setdefault(item.part.path, []).append((item.part.start or 0, stop))
    files = {str(path.relative_to(corpus)): path.stat().st_size for path in corpus.rglob("*.jsonl")}
    assert set(pieces) == set(files)
    for path, ranges in pieces.items():
        starts, stops = zip(*sorted(ranges), strict=True)
        assert [*starts, files[path]] == [0, *stops]
    assert len(pieces["sub/large.jsonl"]) == 5


def test_fragments_are_in_the_order_of_their_sources(corpus: Path) -> None:
    firsts = [(fragment.parts[0].part.path, fragment.parts[0].part.start or 0) for fragment in _fragments(_of(corpus))]
    assert firsts == sorted(firsts)


def test_a_new_file_of_its_own_makes_one_fragment(corpus: Path) -> None:
    before = _identities(_of(corpus))
    _jsonl(corpus / "another.jsonl", FRAGMENT_BYTES // 2)
    after = _identities(_of(corpus))
    assert before < after and len(after - before) == 1


def test_a_new_small_file_changes_one_fragment(corpus: Path) -> None:
    before = _identities(_of(corpus))
    _jsonl(corpus / "another.jsonl", 100)
    after = _identities(_of(corpus))
    assert len(after - before) == 1 and len(before - after) <= 1


@pytest.mark.parametrize("name", ["small-03.jsonl", "sub/middle.jsonl"])
def test_other_content_changes_one_fragment(corpus: Path, name: str) -> None:
    before = _identities(_of(corpus))
    (corpus / name).write_text((corpus / name).read_text().replace("{", " {", 1))
    after = _identities(_of(corpus))
    assert len(after - before) == len(before - after) == 1


def test_a_renamed_file_is_another(corpus: Path) -> None:
    before = _identities(_of(corpus))
    (corpus / "sub/middle.jsonl").rename(corpus / "sub/renamed.jsonl")
    after = _identities(_of(corpus))
    assert len(after - before) == len(before - after) == 1


def test_a_touched_or_moved_corpus_has_the_same_fragments(corpus: Path) -> None:
    before = _identities(_of(corpus))
    for path in corpus.rglob("*.jsonl"):
        os.utime(path, (1, 1))
    assert _identities(_of(corpus)) == before
    corpus.rename(corpus.with_name("moved"))
    assert _identities(_of(corpus.with_name("moved"))) == before


def test_a_file_that_is_gone_takes_no_other_with_it(corpus: Path) -> None:
    before = _identities(_of(corpus))
    (corpus / "sub/large.jsonl").unlink()
    after = _identities(_of(corpus))
    assert after < before and len(before - after) == 5


def test_the_stage_is_part_of_the_identity(corpus: Path) -> None:
    files = _found(_of(corpus))
    cut = [cut_fragments(files, SourceType.JSONL, FRAGMENT_BYTES, stage) for stage in ("a", "b")]
    assert not {item.fingerprint for item in cut[0]} & {item.fingerprint for item in cut[1]}


SIZES = st.lists(st.integers(0, 3 * FRAGMENT_BYTES), min_size=1, max_size=40)


def _files(sizes: list[int]) -> list[SourceFile]:
    return [
        SourceFile("here", f"file-{number}", f"file-{number}", size, "state", f"content {number}")
        for number, size in enumerate(sizes)
    ]


@given(SIZES, st.randoms())
def test_the_order_of_the_listing_does_not_matter(sizes: list[int], random: Random) -> None:
    files = _files(sizes)
    expected = cut_fragments(files, SourceType.TEXT, FRAGMENT_BYTES, STAGE)
    random.shuffle(files)
    assert cut_fragments(files, SourceType.TEXT, FRAGMENT_BYTES, STAGE) == expected
    assert sorted(item.path for fragment in expected for item in fragment.parts) == sorted(file.path for file in files)


@given(st.lists(st.integers(1, SMALL_BYTES), min_size=1, max_size=60), st.integers(1, SMALL_BYTES))
def test_small_files_move_only_as_the_whole_doubles(sizes: list[int], more: int) -> None:
    before = _groups(_files(sizes))
    after = _groups(_files([*sizes, more]))
    if _buckets(sizes) == _buckets([*sizes, more]):
        assert len(after - before) == 1
    else:
        newest = f"file-{len(sizes)}"
        assert all(any(group - {newest} <= old for old in before) for group in after)


def _groups(files: list[SourceFile]) -> set[frozenset[str]]:
    fragments = cut_fragments(files, SourceType.TEXT, FRAGMENT_BYTES, STAGE)
    return {frozenset(item.path for item in fragment.parts) for fragment in fragments}


def _buckets(sizes: list[int]) -> int:
    """The least power of two of fragments that hold the whole."""
    buckets = 1
    while buckets * FRAGMENT_BYTES < sum(sizes):
        buckets *= 2
    return buckets


def test_a_large_parquet_file_is_cut_between_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "large.parquet"
    pq.write_table(pa.table({"text": [os.urandom(32).hex() for _ in range(600)]}), path, row_group_size=40)
    fragments = _fragments(f"type: parquet\npath: {path}")
    runs = [(item.part.start, item.part.end) for fragment in fragments for item in fragment.parts]
    assert len(runs) > 5 and all(fragment.size_bytes <= 2 * FRAGMENT_BYTES for fragment in fragments)
    starts, stops = zip(*runs, strict=True)
    assert [*starts, 15] == [0, *stops]


def test_a_file_that_cannot_be_cut_is_one_fragment(tmp_path: Path) -> None:
    (tmp_path / "large.csv").write_text("text\n" + "a row\n" * 2000)
    (tmp_path / "large.parquet").write_bytes(b"PAR1" + b"damaged" * 1000)
    for name in ("csv", "parquet"):
        (fragment,) = _fragments(f"type: {name}\npath: {tmp_path}/large.{name}")
        assert [(item.part.start, item.part.end) for item in fragment.parts] == [(None, None)]


# ---- patterns


def test_files_are_found_sorted_and_hidden_ones_are_not(corpus: Path) -> None:
    for name in (".hidden.jsonl", "_SUCCESS", ".git/config.jsonl", "_temporary/0.jsonl"):
        _jsonl(corpus / name, 10)
    sources = [file.source for file in _found(f"type: jsonl\npath: {corpus}/**/*.jsonl")]
    assert sources == [*(f"small-{number:02}.jsonl" for number in range(12)), "sub/large.jsonl", "sub/middle.jsonl"]
    assert [file.source for file in _found(_of(corpus))] == sources
    assert [file.source for file in _found(f"type: jsonl\npath: {corpus}/sub/mid*")] == ["middle.jsonl"]
    assert [file.source for file in _found(f"type: jsonl\npath: {corpus}/sub/middle.jsonl")] == ["middle.jsonl"]


def test_files_behind_links_that_lead_out_of_the_corpus_are_read(tmp_path: Path) -> None:
    _jsonl(tmp_path / "outside/file.jsonl", 10, "file")
    _jsonl(tmp_path / "outside/folder/other.jsonl", 10, "folder")
    corpus, root = tmp_path / "corpus", tmp_path / "root"
    corpus.mkdir()
    (corpus / "file.jsonl").symlink_to(tmp_path / "outside/file.jsonl")
    (corpus / "folder").symlink_to(tmp_path / "outside/folder")
    documents = f"type: jsonl\npath: {corpus}\ntext: text"
    job = PassageJob(
        str(root),
        STAGE,
        _reader(documents),
        Chunker(PassageType.WHOLE, 0, 0),
        MODEL,
        hash_tokenizer(resolve_model(MODEL)),
    )
    texts = set()
    for fragment in _fragments(documents):
        make_passages(PassageTask(job, fragment.fingerprint, fragment.parts))
        texts.update(pq.read_table(root / fragment_path(PASSAGES, STAGE, fragment.fingerprint))["text"].to_pylist())
    assert texts == {"file" * 40, "folder" * 40}


def test_several_patterns_name_files_with_their_folders(tmp_path: Path) -> None:
    _jsonl(tmp_path / "one/a.jsonl", 10)
    _jsonl(tmp_path / "two/a.jsonl", 10)
    files = _found(f"type: jsonl\npath: [{tmp_path}/two, '{tmp_path}/one/*.jsonl']")
    assert [file.source for file in files] == ["one/a.jsonl", "two/a.jsonl"]


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for side in ("left", "right"):
        _jsonl(tmp_path / side / "data/a.jsonl", 10)
    (problem,) = _problems(f"type: jsonl\npath: [{tmp_path}/left/data, {tmp_path}/right/data]")
    assert "two files are both known as data/a.jsonl" in problem.message
    assert (problem.file, problem.line, problem.location) == ("p.yaml", DOCUMENTS_LINE + 2, "documents.path")


@pytest.mark.parametrize("pattern", ["nothing/*.jsonl", "missing.jsonl", "missing", "corpus/*.parquet", "corpus/[a-"])
def test_a_pattern_that_matches_nothing_is_a_problem(corpus: Path, pattern: str) -> None:
    (problem,) = _problems(f"type: jsonl\npath: {corpus.parent}/{pattern}")
    assert f"({corpus.parent}/{pattern}) must match at least one file, got none" in problem.message
    assert (problem.line, problem.location) == (DOCUMENTS_LINE + 2, "documents.path")


@pytest.mark.parametrize("path", ["gs://bucket/x", "http://host/x", '"a\\0b"', "s3://"])
def test_a_path_that_is_no_place_is_a_problem(path: str) -> None:
    (problem,) = _problems(f"type: jsonl\npath: {path}")
    assert (problem.line, problem.location) == (DOCUMENTS_LINE + 2, "documents.path")


def test_docstring_sources_are_named_from_the_import_name() -> None:
    files = _found("type: docstrings\npackages: [fsspec, typing_extensions]")
    sources = [file.source for file in files]
    assert "fsspec/implementations/local.py" in sources and "typing_extensions.py" in sources
    assert sources == sorted(sources) and all(source.endswith(".py") for source in sources)


def test_a_package_that_is_not_installed_is_a_problem() -> None:
    (problem,) = _problems("type: docstrings\npackages: [fsspec, no_such_package_here]")
    assert "no_such_package_here" in problem.message
    assert (problem.line, problem.location) == (DOCUMENTS_LINE + 2, "documents.packages")


# ---- columns


@pytest.fixture
def typed(tmp_path: Path) -> Path:
    day = datetime.date(2026, 1, 2)
    table = pa.table(
        {
            "id": pa.array(["1", "2"]),
            "text": pa.array(["one", "two"]),
            "small": pa.array([1, 2], pa.int32()),
            "unsigned": pa.array([1, 2], pa.uint32()),
            "single": pa.array([0.5, 1.5], pa.float32()),
            "half": pa.array([0.5, 1.5], pa.float16()),
            "flag": pa.array([True, False]),
            "day": pa.array([day, day], pa.date32()),
            "moment": pa.array([day, day], pa.date32()).cast(pa.timestamp("ms")),
            "long": pa.array(["a", "b"], pa.large_string()),
            "words": pa.array([["a"], ["b"]]),
            "huge": pa.array([1, 2], pa.uint64()),
            "money": pa.array([1, 2], pa.decimal128(10, 2)),
            "category": pa.array(["a", "b"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "typed.parquet")
    return tmp_path / "typed.parquet"


def test_kept_types_are_those_of_the_parquet_columns_and_can_be_read(typed: Path) -> None:
    names = ["small", "unsigned", "single", "half", "flag", "day", "moment", "long", "category"]
    reader = _reader(f"type: parquet\npath: {typed}\nid: id\nkeep: [{', '.join(names)}]")
    types = ["int64", "int64", "float64", "float64", "bool", "timestamp", "timestamp", "string", "string"]
    assert reader.keep == tuple(zip(names, types, strict=True))
    with typed.open("rb") as stream:
        documents = read_documents(reader, SourcePart("typed.parquet"), stream, typed.stat().st_size)
    assert documents.dropped.to_pylist() == []
    row = documents.table.to_pylist()[1]
    assert (row["small"], row["half"], row["flag"], row["long"], row["category"]) == (2, 1.5, False, "b", "b")
    assert row["day"] == row["moment"] == datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)


@pytest.mark.parametrize(("column", "kind"), [("words", "list"), ("huge", "uint64"), ("money", "decimal128")])
def test_a_type_that_cannot_be_kept_is_a_problem(typed: Path, column: str, kind: str) -> None:
    (problem,) = _problems(f"type: parquet\npath: {typed}\nkeep: [{column}]")
    assert problem.message.startswith(f"({column}) has type {kind}") and "leave it out or convert it" in problem.message
    assert (problem.line, problem.location) == (DOCUMENTS_LINE + 3, "documents.keep")


def test_types_that_are_stated_are_taken(typed: Path) -> None:
    reader = _reader(f"type: parquet\npath: {typed}\nkeep: {{small: float64, day: string}}")
    assert reader.keep == (("small", "float64"), ("day", "string"))


def test_all_columns_that_are_missing_are_named_at_once(typed: Path) -> None:
    problems = _problems(f"type: parquet\npath: {typed}\ntext: [text, body]\nid: key\nkeep: [small, year]")
    assert [(problem.location, problem.line) for problem in problems] == [
        ("documents.text", DOCUMENTS_LINE + 3),
        ("documents.id", DOCUMENTS_LINE + 4),
        ("documents.keep", DOCUMENTS_LINE + 5),
    ]
    for problem, name in zip(problems, ["body", "key", "year"], strict=True):
        assert problem.message.startswith(
            f"({name}) must be a column of typed.parquet; its columns are id, text, small"
        )


def test_kept_columns_of_jsonl_may_be_missing_in_the_first_row(corpus: Path) -> None:
    assert _reader(f"{_of(corpus)}\nkeep: [year]").keep == (("year", "string"),)
    (problem,) = _problems(f"{_of(corpus)}\nid: key")
    assert problem.message == "(key) must be a column of small-00.jsonl; its columns are text"


def test_reserved_and_repeated_names_are_problems(typed: Path) -> None:
    for kept in ("[text]", "[small, small]"):
        (problem,) = _problems(f"type: parquet\npath: {typed}\nkeep: {kept}")
        assert (problem.line, problem.location) == (DOCUMENTS_LINE + 3, "documents.keep")


@pytest.mark.parametrize(("source_type", "first"), [("parquet", b"PAR1damaged"), ("csv", b""), ("jsonl", b"{broken\n")])
def test_a_damaged_first_file_does_not_stop_its_neighbours(tmp_path: Path, source_type: str, first: bytes) -> None:
    (tmp_path / f"a.{source_type}").write_bytes(first)
    good = tmp_path / f"b.{source_type}"
    match source_type:
        case "parquet":
            pq.write_table(pa.table({"text": ["one"], "year": [1]}), good)
        case "csv":
            good.write_text("text,year\none,1\n")
        case _:
            good.write_text('{"text": "one", "year": 1}\n')
    reader = _reader(f"type: {source_type}\npath: {tmp_path}\nkeep: [year]")
    assert reader.keep == (("year", "int64" if source_type == "parquet" else "string"),)


@pytest.mark.parametrize(("source_type", "content"), [("parquet", b"no parquet"), ("csv", b""), ("jsonl", b"no json")])
def test_a_corpus_without_a_readable_file_is_a_problem(tmp_path: Path, source_type: str, content: bytes) -> None:
    for name in "abc":
        (tmp_path / f"{name}.{source_type}").write_bytes(content)
    (problem,) = _problems(f"type: {source_type}\npath: {tmp_path}")
    assert f"a.{source_type}" in problem.message and problem.message.endswith("check the type")
    assert (problem.line, problem.location) == (DOCUMENTS_LINE + 1, "documents.type")
