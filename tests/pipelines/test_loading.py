import importlib.util
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.pipelines import library
from penstock.pipelines.config import PipelineFile, TabularDocuments
from penstock.pipelines.loading import (
    MAX_DEPTH,
    MAX_FILE_BYTES,
    Origin,
    PipelineFileInvalid,
    Problem,
    load_pipeline,
    parse_pipeline,
)

QUICKSTART = Path(next(iter(library.__path__))) / "quickstart.yaml"
SECRET = "hunter2-canary"
BASE = """\
name: tiny
root: here
documents:
  type: jsonl
  path: corpus
embedding:
  model: mine
"""
DOCSTRINGS = BASE.replace("jsonl", "docstrings").replace("path: corpus", "package: x\n  packages: [x]")
AFTER = BASE.count("\n") + 1  # the line of what follows BASE


def _parsed(text: str, *overrides: str) -> PipelineFile:
    return parse_pipeline(text, "p.yaml", overrides)[0]


def _problems(text: str, *overrides: str) -> list[Problem]:
    with pytest.raises(PipelineFileInvalid) as caught:
        parse_pipeline(text, "p.yaml", overrides)
    assert str(caught.value) == "\n".join(str(problem) for problem in caught.value.problems)
    return caught.value.problems


def _problem(text: str, *overrides: str) -> Problem:
    (problem,) = _problems(text, *overrides)
    return problem


def _file_problem(path: Path) -> Problem:
    with pytest.raises(PipelineFileInvalid) as caught:
        load_pipeline(path)
    (problem,) = caught.value.problems
    assert problem.file == str(path)
    return problem


# ---- the YAML itself


def test_the_quickstart_loads() -> None:
    pipeline, origin = load_pipeline(QUICKSTART)
    assert pipeline.name == "quickstart" and pipeline.publish.alias == "live"
    assert origin.problem("index.shards", "x").line == QUICKSTART.read_text().splitlines().index("  shards: 2") + 1


def test_what_is_left_out_has_its_default_and_the_tree_is_frozen() -> None:
    pipeline = _parsed(BASE)
    assert isinstance(pipeline.documents, TabularDocuments) and pipeline.documents.text == "text"
    assert (pipeline.gate, pipeline.index.shards) == (None, 1)
    with pytest.raises(ValueError, match="frozen"):
        pipeline.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "line", "rule"),
    [
        ("name: &anchor tiny\nroot: x\n", 1, "anchors and aliases are not allowed"),
        ("name: tiny\nroot: *missing\n", 2, "anchors and aliases are not allowed"),
        ("a: &a {x: 1}\nb:\n  <<: *a\n", 1, "anchors and aliases are not allowed"),
        ("name: tiny\nb:\n  <<: {x: 1}\n", 3, "tag tag:yaml.org,2002:merge is not allowed"),
        ("name: tiny\nroot: !!python/object/apply:os.system [id]\n", 2, "tag tag:yaml.org,2002:python/object/apply"),
        ("name: tiny\nroot: !!python/object:x.Y {a: 1}\n", 2, "tag tag:yaml.org,2002:python/object:x.Y is not"),
        ("name: tiny\nroot: !!python/name:os.system ''\n", 2, "tag tag:yaml.org,2002:python/name:os.system is not"),
        ("name: tiny\nroot: !!binary aGk=\n", 2, "tag tag:yaml.org,2002:binary is not allowed"),
        ("name: tiny\nroot: !!set {a}\n", 2, "tag tag:yaml.org,2002:set is not allowed"),
        ("name: tiny\nroot: !mine x\n", 2, "tag !mine is not allowed"),
        ("name: tiny\n? {a: 1}\n: 2\n", 2, "tag tag:yaml.org,2002:map is not allowed here"),
        ("name: tiny\n? [a]\n: 2\n", 2, "tag tag:yaml.org,2002:seq is not allowed here"),
        ("name: tiny\n!!binary aGk=: 2\n", 2, "tag tag:yaml.org,2002:binary is not allowed here"),
        ("name: tiny\n\troot: here\n", 2, "is not valid YAML: found character '\\t'"),
        ("name: tiny\nroot: 'here\n", 3, "is not valid YAML"),
        ("name: tiny\nroot: [1, 2\nx: y\n", 3, "is not valid YAML"),
        ("name: tiny\n---\nname: other\n", 2, "is not valid YAML: but found another document"),
        ("name: tiny\nroot: a\0b\n", 2, "character U+0000 is not allowed"),
        ("name: tiny\nroot: !!int abc\n", 2, "('abc') is no valid YAML int"),
        ("name: tiny\nroot: !!float abc\n", 2, "('abc') is no valid YAML float"),
        ("name: tiny\nroot: !!bool abc\n", 2, "('abc') is no valid YAML bool"),
        ("name: tiny\nroot: 0b_\n", 2, "('0b_') is no valid YAML int"),
        (f"name: tiny\nroot: {'9' * 5000}\n", 2, "is no valid YAML int"),
        ('name: "\\UFFFFFFFF"\n', 0, "is not valid YAML"),
        ("", 1, "must be a mapping of sections"),
        ("# nothing\n", 1, "must be a mapping of sections"),
        ("- name: tiny\n", 1, "must be a mapping of sections"),
        ("tiny\n", 1, "must be a mapping of sections"),
        ("null\n", 1, "must be a mapping of sections"),
    ],
)
def test_yaml_beyond_plain_data_is_refused_with_its_line(text: str, line: int, rule: str) -> None:
    problem = _problem(text)
    assert rule in problem.message
    assert (problem.file, problem.line) == ("p.yaml", line)
    assert str(problem).startswith(f"p.yaml:{line}: " if line else "p.yaml: ")


def test_keys_that_are_there_twice_are_refused_at_any_depth() -> None:
    text = BASE + "name: again\nindex:\n  shards: 2\n  shards: 3\nembedding:\n  model: other\n"
    text = text.replace("  path: corpus", "  path: corpus\n  keep: {year: int64, year: string}")
    assert [(problem.line, problem.location, problem.message) for problem in _problems(text)] == [
        (6, "documents.keep.year", "is there already (line 6); keep one of them"),
        (9, "name", "is there already (line 1); keep one of them"),
        (12, "index.shards", "is there already (line 11); keep one of them"),
        (13, "embedding", "is there already (line 7); keep one of them"),
    ]


def test_an_alias_bomb_is_refused_at_its_first_anchor() -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    assert _problem("\n".join(rows)).line == 1


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ("{a: ", "}"), ("[", ""), ("- ", "")])
def test_deep_nesting_is_refused_and_takes_no_time(opening: str, closing: str) -> None:
    problem = _problem(f"x:\n  {opening * 20_000}1{closing * 20_000}")
    assert problem.line == 2 and f"nests deeper than {MAX_DEPTH} levels" in problem.message


def test_dates_and_yaml_words_stay_text_where_text_is_due() -> None:
    assert _parsed(BASE.replace("tiny", "2026-01-02")).name == "2026-01-02"
    assert _parsed(BASE.replace("tiny", "2026-99-99")).name == "2026-99-99"
    assert "must be a valid string" in _problem(BASE.replace("tiny", "no")).message
    assert "must be a valid string" in _problem(BASE.replace("tiny", "2026")).message


@pytest.mark.parametrize("prefix", ["", "\ufeff"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_files_of_other_systems_are_read(tmp_path: Path, prefix: str, line_end: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_bytes((prefix + BASE + "shards: 2\n").replace("\n", line_end).encode())
    problem = _file_problem(path)
    assert (problem.line, problem.location) == (AFTER, "shards")


def test_files_that_cannot_be_a_pipeline_are_refused(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory); check the path" in _file_problem(tmp_path / "no.yaml").message
    assert "cannot be read (Is a directory)" in _file_problem(tmp_path).message
    assert "cannot be read (embedded null byte)" in _file_problem(Path("a\0b")).message
    (tmp_path / "latin.yaml").write_bytes("name: tiny\nroot: caf\u00e9\n".encode("latin-1"))
    problem = _file_problem(tmp_path / "latin.yaml")
    assert problem.line == 2 and "must be a UTF-8 text file" in problem.message
    (tmp_path / "wide.yaml").write_text(BASE, "utf-16")
    assert "must be a UTF-8 text file" in _file_problem(tmp_path / "wide.yaml").message
    (tmp_path / "model.yaml").write_bytes(pickle.dumps({"name": "tiny"}))
    assert _file_problem(tmp_path / "model.yaml")


def test_a_file_above_the_cap_is_refused_and_one_at_the_cap_is_not(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(BASE + "#" * (MAX_FILE_BYTES - len(BASE)))
    assert load_pipeline(path)[0].name == "tiny"
    path.write_text(BASE + "#" * (MAX_FILE_BYTES - len(BASE) + 1))
    assert f"has at most {MAX_FILE_BYTES} bytes, got more" in _file_problem(path).message
    assert "got more" in _file_problem(Path("/dev/zero")).message


@settings(max_examples=200)
@given(st.text(st.sampled_from("ab: \n-[]{}&*!|>'\"#%@`,?0.\t\\~<=_e"), max_size=40))
def test_no_text_does_anything_but_load_or_name_problems(text: str) -> None:
    with pytest.raises(PipelineFileInvalid) as caught:
        parse_pipeline(text)
    assert caught.value.problems


# ---- keys and values


def test_five_mistakes_are_five_problems_with_their_lines() -> None:
    text = """\
name: Not A Name
documents:
  type: jsonl
  path: 5
  txet: body
embedding:
  model: mine
  workers:
    cpus: zero
"""
    assert [(problem.line, problem.location) for problem in sorted(_problems(text), key=lambda item: item.line)] == [
        (1, "name"),
        (1, "root"),
        (4, "documents.path"),
        (5, "documents.txet"),
        (9, "embedding.workers.cpus"),
    ]


@pytest.mark.parametrize(
    ("text", "location", "near"),
    [
        (BASE + "indx: {}\n", "indx", "index"),
        (BASE.replace("  path", "  pth: x\n  path"), "documents.pth", "path"),
        (BASE.replace("  path", "  duplicate_id: x\n  path"), "documents.duplicate_id", "duplicate_ids"),
        (BASE + "passages: {token: 9}\n", "passages.token", "tokens"),
        (BASE + "  dimensions: 9\n", "embedding.dimensions", "dimension"),
        (BASE + "  workers: {cpu: 1}\n", "embedding.workers.cpu", "cpus"),
        (BASE + "  prompts: {querry: x}\n", "embedding.prompts.querry", "query"),
        (BASE + "deduplicate: {typ: none}\n", "deduplicate.typ", "type"),
        (BASE + "index: {familly: flat}\n", "index.familly", "family"),
        (BASE + "evaluate: {query: 9}\n", "evaluate.query", "queries"),
        (BASE + "gate: {recal: 0.5}\n", "gate.recal", "recall"),
        (BASE + "publish: {aliass: live}\n", "publish.aliass", "alias"),
        (BASE.replace("jsonl", "text").replace("  path", "  keeep: x\n  path"), "documents.keeep", "keep"),
        (DOCSTRINGS, "documents.package", "packages"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(text: str, location: str, near: str) -> None:
    problem = _problem(text)
    assert (problem.location, problem.message) == (location, f"is not a key here; did you mean {near}?")
    assert location.split(".")[-1] in text.splitlines()[problem.line - 1]


def test_an_unknown_key_like_no_other_names_all() -> None:
    rule = "is not a key here; known keys: count, cpus, gpus, max, min, timeout_s"
    assert _problem(BASE + "  workers: {zzz: 1}\n").message == rule


@pytest.mark.parametrize(
    ("section", "rule"),
    [
        ("index: {shards: '4'}", "('4') must be a valid integer"),
        ("index: {shards: true}", "(True) must be a valid integer"),
        ("index: {shards: 4.0}", "(4.0) must be a valid integer"),
        ("index: {shards: 0}", "(0) must be greater than or equal to 1"),
        ("index: {shards: -3}", "(-3) must be greater than or equal to 1"),
        ("index: {seed: -1}", "(-1) must be greater than or equal to 0"),
        ("index: {shards: null}", "(None) must be a valid integer"),
        ("index: {recall: 1.5}", "(1.5) must be less than or equal to 1"),
        ("index: {recall: .nan}", "(nan) must be"),
        ("index: {family: tree}", "('tree') must be 'flat', 'hnsw', 'ivf' or 'vamana'"),
        ("index: {rabitq_bits: 9, codec: rabitq}", "(9) must be less than or equal to 8"),
        ("index: 5", "(5) must be a mapping of keys to values"),
        ("index: [a]", "(['a']) must be a mapping of keys to values"),
        ("index:", "(None) must be a mapping of keys to values"),
        ("passages: {tokens: 7}", "(7) must be greater than or equal to 8"),
        ("passages: {type: sentences}", "('sentences') must be 'tokens', 'whole' or 'late'"),
        ("evaluate: {queries: 0}", "(0) must be greater than or equal to 1 or be a valid string"),
        ("publish: {alias: Live!}", "('Live!') must match pattern"),
        ("publish: {keep: 0}", "(0) must be greater than or equal to 1"),
    ],
)
def test_a_wrong_value_is_shown_with_its_rule(section: str, rule: str) -> None:
    problem = _problem(BASE + section + "\n")
    assert problem.message.startswith(rule)
    assert problem.line == AFTER


@pytest.mark.parametrize(
    ("documents", "location", "line", "rule"),
    [
        ("docs", "", 3, "('docs') must be a mapping of keys to values"),
        ("{path: x}", "", 3, "needs a type: one of parquet, jsonl, csv, text, docstrings"),
        (
            "{type: jsnol, path: x}",
            ".type",
            3,
            "('jsnol') must be one of parquet, jsonl, csv, text, docstrings; did you",
        ),
        ("{type: 5, path: x}", ".type", 3, "(5) must be one of parquet, jsonl, csv, text, docstrings"),
        ("{type: jsonl}", ".path", 3, "is required; add it"),
        ("\n  type: csv\n  path: 5", ".path", 5, "(5) must be a valid string or be a list"),
        ("\n  type: csv\n  path: ''", ".path", 5, "('') must have at least 1 character or be a list"),
        ("\n  type: csv\n  path: x\n  text:\n    - a\n    - 5", ".text.1", 8, "(5) must be a valid string"),
        (
            "\n  type: csv\n  path: x\n  keep: {y: number}",
            ".keep.y",
            6,
            "('number') must be 'string', 'int64', 'float64'",
        ),
        (
            "\n  type: csv\n  path: x\n  fragment_bytes: 9",
            ".fragment_bytes",
            6,
            "(9) must be greater than or equal to 1024",
        ),
        (
            "\n  type: csv\n  path: x\n  duplicate_ids: keep",
            ".duplicate_ids",
            6,
            "('keep') must be 'error', 'first' or",
        ),
        ("\n  type: docstrings\n  packages: numpy", ".packages", 5, "('numpy') must be a list"),
        ("\n  type: docstrings\n  packages: []", ".packages", 5, "([]) must have at least 1 item"),
    ],
)
def test_problems_of_documents_are_at_their_keys(documents: str, location: str, line: int, rule: str) -> None:
    problem = _problem(f"name: tiny\nroot: here\ndocuments: {documents}\nembedding: {{model: mine}}\n")
    assert (problem.location, problem.line) == (f"documents{location}", line)
    assert problem.message.startswith(rule)


def test_a_text_source_with_a_text_key_and_a_wrong_path_has_both_named() -> None:
    text = BASE.replace("jsonl", "text").replace("path: corpus", "text: body\n  path: 5")
    assert {(problem.location, problem.line) for problem in _problems(text)} == {
        ("documents.text", 5),
        ("documents.path", 6),
    }


@pytest.mark.parametrize(
    ("section", "line", "rule"),
    [
        ("passages:\n  tokens: 64\n  overlap: 32", 3, r"overlap \(32\) must be below half of tokens \(64\)"),
        ("passages:\n  type: whole\n  tokens: 64", 3, "tokens and overlap have no meaning with type whole"),
        ("index:\n  family: hnsw\n  nlist: 64", 3, r"nlist \(64\) belongs to ivf, but family is hnsw"),
        ("index:\n  family: ivf\n  hnsw_m: 8", 3, r"hnsw_m \(8\) belongs to hnsw"),
        ("index:\n  family: hnsw\n  codec: sq8\n  pq_bytes: 8", 4, r"pq_bytes \(8\) belongs to pq and pqfs"),
        (
            "index:\n  family: ivf\n  codec: pq\n  rabitq_bits: 4",
            4,
            r"rabitq_bits \(4\) belongs to rabitq and rabitqfs",
        ),
        (
            "index:\n  family: hnsw\n  metric: inner_product\n  codec: pq",
            4,
            r"codec \(pq\) is not built with family hnsw for metric inner_product; choose family ivf, or one of none",
        ),
        ("index:\n  family: hnsw\n  codec: pqfs", 3, r"codec \(pqfs\) is not built with family hnsw for metric cosine"),
        ("index:\n  factory: Flat\n  codec: sq8", 3, r"codec \(sq8\) follows from factory"),
        ("index:\n  factory: Flat\n  family: flat", 3, r"family \(flat\) follows from factory"),
        ("index:\n  factory: Flat\n  latency_ms: 2", 3, r"latency_ms \(2.0\) follows from factory"),
        ("index:\n  codec: sq8", 2, r"codec \(sq8\) is chosen by family auto"),
        ("evaluate:\n  k: 5\n  relevance: qrels.tsv", 3, "relevance needs a file of queries with ids"),
        ("publish:\n  alias: live", 2, "publish.alias needs a gate"),
        ("evaluate:\n  queries: q.jsonl\ngate:\n  ndcg: 0.5", 4, "gate.ndcg and gate.mrr need judgements"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(section: str, line: int, rule: str) -> None:
    problem = _problem(BASE + section + "\n")
    assert re.search(rule, problem.message)
    assert problem.line == AFTER + line - 1


def test_combinations_that_make_sense_are_taken() -> None:
    sections = [
        "passages: {tokens: 64, overlap: 31}",
        "passages: {type: whole}",
        "index: {family: ivf, codec: pq, metric: inner_product, nlist: 4, pq_bytes: 8}",
        "index: {family: ivf, codec: pqfs, opq: true, pq_bytes: 8}",
        "index: {factory: 'OPQ16_64,IVF16,PQ16x4fs', rerank: true}",
        "index: {recall: 0.9, bytes_per_vector: 64, latency_ms: 2, memory_gib: 1}",
        "gate: {recall: 0.9}\npublish: {alias: live}",
        "evaluate: {queries: q.jsonl, relevance: q.tsv}\ngate: {ndcg: 0.5, mrr: 0.1}",
    ]
    for section in sections:
        assert _parsed(BASE + section + "\n")


# ---- --set


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("index.shards=4", "index.shards", 4),
        ("index.recall=0.5", "index.recall", 0.5),
        ("embedding.trust_remote_code=true", "embedding.trust_remote_code", True),
        ("name=other", "name", "other"),
        ("root=s3://bucket/a=b", "root", "s3://bucket/a=b"),
        ("root='it''s: here # not'", "root", "it's: here # not"),
        ("documents.path=[a, b]", "documents.path", ("a", "b")),
        ("documents.keep={year: int64}", "documents.keep", {"year": "int64"}),
        ("documents.keep.year=int64", "documents.keep", {"year": "int64"}),
        ("gate.recall=0.5", "gate.recall", 0.5),
        ("gate={recall: 0.5}", "gate.recall", 0.5),
        ("embedding.workers.cpus=2", "embedding.workers.cpus", 2),
        ("passages.tokens=null", "passages.tokens", None),
    ],
)
def test_overrides_set_values_lists_mappings_and_new_sections(override: str, path: str, value: object) -> None:
    found: Any = _parsed(BASE, override)
    for key in path.split("."):
        found = getattr(found, key)
    assert found == value


def test_the_last_override_of_a_key_stands_and_a_section_is_replaced_whole() -> None:
    assert _parsed(BASE, "index.shards=2", "index.shards=3").index.shards == 3
    replaced = _parsed(BASE + "index: {shards: 5, recall: 0.5}\n", "index={shards: 2}")
    assert (replaced.index.shards, replaced.index.recall) == (2, 0.95)


@pytest.mark.parametrize(
    ("override", "location", "rule"),
    [
        ("index.shards", "", "('index.shards') must read key.key=value, as in index.shards=4"),
        ("=4", "", "('=4') must read key.key=value"),
        ("index..shards=4", "", "('index..shards=4') must read key.key=value"),
        ("index.shards=0", "index.shards", "(0) must be greater than or equal to 1"),
        ("index.shards=", "index.shards", "(None) must be a valid integer"),
        ("index.shard=4", "index.shard", "is not a key here; did you mean shards?"),
        ("index={shards: 0}", "index.shards", "(0) must be greater than or equal to 1"),
        ("index={shard: 1}", "index.shard", "is not a key here; did you mean shards?"),
        ("index=[1", "index", "is not valid YAML"),
        ("name=a: b", "name", "is not valid YAML: mapping values are not allowed here"),
        ("name=*x", "name", "anchors and aliases are not allowed"),
        ("name=!!python/name:os.system x", "name", "tag tag:yaml.org,2002:python/name:os.system is not allowed"),
        ("name=x\nroot: y", "name", "must be one value; repeat --set for each key"),
        ("root.x=1", "root.x", "root has a value, not keys; set that value as a whole"),
        ("documents.path.0=z", "documents.path.0", "documents.path has a value, not keys"),
        ("root=${PENSTOCK_NOT_SET}", "root", "environment variable PENSTOCK_NOT_SET is not set; export it"),
        ("index.hnsw_m=8", "index", "hnsw_m (8) belongs to hnsw, but family is flat"),
        ("publish.alias=live", "", "publish.alias needs a gate"),
    ],
)
def test_problems_of_an_override_name_it(override: str, location: str, rule: str) -> None:
    text = BASE + "index:\n  family: flat\n  shards: 2\n"
    problem = _problem(text, override)
    assert rule in problem.message
    assert (problem.file, problem.line, problem.location) == ("--set", 0, location)
    assert str(problem).startswith(f"--set: {location}")


def test_problems_of_overrides_and_of_the_file_come_together() -> None:
    problems = _problems(BASE + "index: {shards: 0}\n", "gate.recall=2", "nonsense", "root=${PENSTOCK_NOT_SET}")
    assert {(problem.file, problem.line, problem.location) for problem in problems} == {
        ("p.yaml", AFTER, "index.shards"),
        ("--set", 0, "gate.recall"),
        ("--set", 0, ""),
        ("--set", 0, "root"),
    }


def test_later_problems_point_to_where_a_key_was_written() -> None:
    _, origin = parse_pipeline(BASE, "p.yaml", ["index.family=flat", "embedding.model=other"])
    places = {
        "documents.path": ("p.yaml", 5),
        "documents.text": ("p.yaml", 3),
        "embedding.model": ("--set", 0),
        "embedding.workers": ("p.yaml", 6),
        "index.family": ("--set", 0),
        "index": ("--set", 0),
        "publish": ("p.yaml", 1),
    }
    for location, place in places.items():
        problem = origin.problem(location, "rule")
        assert ((problem.file, problem.line), problem.location) == (place, location)
    assert Origin("<pipeline>", {}).problem("root", "rule") == Problem("<pipeline>", 0, "root", "rule")


# ---- environment and secrets


def test_variables_are_taken_in_paths_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_TEST", "a/${b}")
    text = """\
name: tiny
root: s3://${PENSTOCK_TEST}/x
documents: {type: jsonl, path: ["${PENSTOCK_TEST}", plain]}
embedding: {model: "${PENSTOCK_TEST}"}
evaluate: {queries: "${PENSTOCK_TEST}.jsonl", relevance: "${PENSTOCK_TEST}-${PENSTOCK_TEST}"}
"""
    pipeline = _parsed(text)
    assert isinstance(pipeline.documents, TabularDocuments)
    assert (pipeline.root, pipeline.documents.path) == ("s3://a/${b}/x", ("a/${b}", "plain"))
    assert (pipeline.embedding.model, pipeline.evaluate.queries) == ("a/${b}", "a/${b}.jsonl")
    assert pipeline.evaluate.relevance == "a/${b}-a/${b}"
    for elsewhere in ("name: ${PENSTOCK_TEST}", "documents: {type: jsonl, path: x, text: '${PENSTOCK_TEST}'}"):
        key = elsewhere.split(":")[0]
        changed = "\n".join(elsewhere if line.startswith(key) else line for line in text.splitlines())
        messages = [problem.message for problem in _problems(changed)]
        assert any("environment variables are only allowed in root, documents.path" in text for text in messages)


@pytest.mark.parametrize("value", ["${}", "${A-B}", "${1}", "${PATH", "x${", "${PATH}${"])
def test_a_malformed_variable_is_no_path(value: str) -> None:
    problem = _problem(BASE.replace("here", f"'{value}'"))
    assert problem.message.startswith(f"({value!r}) a variable must read ${{NAME}}")
    assert (problem.line, problem.location) == (2, "root")


def test_each_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_TEST", raising=False)
    problems = _problems(BASE.replace("here", "${PENSTOCK_TEST}").replace("mine", "/models/${PENSTOCK_TEST}"))
    assert [(problem.line, problem.location) for problem in problems] == [(2, "root"), (7, "embedding.model")]
    assert all("variable PENSTOCK_TEST is not set; export it" in problem.message for problem in problems)


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (BASE.replace("here", f"s3://me:{SECRET}@bucket/x"), ()),
        (BASE.replace("here", f"[s3://me:{SECRET}@bucket/x]"), ()),
        (BASE.replace("here", "s3://me:${PENSTOCK_SECRET}@bucket"), ()),
        (BASE.replace("here", f"s3://me:{SECRET}@${{PENSTOCK_NOT_SET}}"), ()),
        (BASE.replace("corpus", f"[x, 's3://me:{SECRET}@bucket/*.jsonl']"), ()),
        (BASE.replace("mine", f"https://me:{SECRET}@host/model"), ()),
        (BASE.replace("tiny", f"s3://me:{SECRET}@bucket"), ()),
        (BASE, (f"root=s3://me:{SECRET}@bucket",)),
        (BASE, (f"rootts3://me:{SECRET}@bucket",)),
        (BASE.replace("tiny", f"'https://host/x?X-Amz-Signature={SECRET}'"), ()),
    ],
)
def test_passwords_are_refused_and_never_shown(
    text: str, overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_SECRET", SECRET)
    with pytest.raises(PipelineFileInvalid) as caught:
        parse_pipeline(text, "p.yaml", overrides)
    assert SECRET not in str(caught.value) and SECRET not in repr(caught.value.problems)


def test_a_password_in_a_url_is_refused_with_the_way_to_give_it() -> None:
    problem = _problem(BASE.replace("here", "s3://me:word@bucket"))
    assert problem.message.startswith("('s3://***@bucket') a URL must not hold a user or password")
    assert "AWS_SECRET_ACCESS_KEY" in problem.message and problem.line == 2


def test_a_secret_key_with_a_slash_is_refused_and_not_shown() -> None:
    problem = _problem(BASE.replace("here", "s3://AKIA:wJalr/XUtnFEMI@bucket/x"))
    assert "must not hold a user or password" in problem.message and "FEMI" not in str(problem)


def test_at_signs_that_are_no_password_are_taken() -> None:
    assert _parsed(BASE.replace("mine", "someone/model@main")).embedding.model == "someone/model@main"
    assert _parsed(BASE.replace("here", "s3://bucket/a@b")).root == "s3://bucket/a@b"


def test_a_long_value_is_shown_in_part() -> None:
    assert len(_problem(BASE.replace("tiny", "X" * 100_000)).message) < 400


# ---- the schema for editors


@pytest.mark.skipif(importlib.util.find_spec("jsonschema") is None, reason="jsonschema is not installed")
def test_the_json_schema_takes_what_loads_and_refuses_what_does_not() -> None:
    import jsonschema

    schema = PipelineFile.model_json_schema()
    validator = jsonschema.validators.validator_for(schema)
    validator.check_schema(schema)
    check = validator(schema).is_valid
    assert check(yaml.safe_load(QUICKSTART.read_text())) and check(yaml.safe_load(BASE))
    assert not check({**yaml.safe_load(BASE), "indx": {}})
    assert not check(yaml.safe_load(BASE + "index: {shards: 0}\n"))
    assert not check(yaml.safe_load(BASE.replace("jsonl", "jsnol")))


def test_the_json_schema_describes_every_section() -> None:
    schema = PipelineFile.model_json_schema()
    assert set(schema["properties"]) == set(PipelineFile.model_fields)
    assert schema["additionalProperties"] is False
