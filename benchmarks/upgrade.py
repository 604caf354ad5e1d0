"""What a change of the model costs in answers: adapters between real models, and orders of embedding again.

    python benchmarks/upgrade.py [--data FOLDER] [--work FOLDER] [--corpora scifact arxiv docstrings] [--merge FILE]
        [--json]

FOLDER of --data holds scifact (laid out as BEIR's corpora are) and arxiv_abstracts_60k (corpus.parquet); docstrings are
those of the installed packages. Models and corpora are those of model_pairs.py. For each pair of an old and a new model
an adapter of new queries to the old index is chosen by judgements of the queries to fit on, and measured on the others,
whose documents it was not fitted to either. Vectors are kept in --work and encoded once.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from model_pairs import Space, Texts, arxiv, docstrings, load_spaces, scifact

from penstock.operators.adapter_fitting import Pairs
from penstock.operators.adapters import Adapter, Ridge, method_to_json
from penstock.operators.backfill_order import (
    Priorities,
    adapter_residuals,
    area_under_quality,
    backfill_order,
    first_wanted,
    fragment_order,
)
from penstock.operators.bridging import (
    Direction,
    Fit,
    Sample,
    Trial,
    Verdict,
    agreement,
    choose_fit,
    judge_bridge,
    mean_cosine,
)
from penstock.operators.confidence import Interval, mean_interval
from penstock.operators.evaluation import exact_neighbours, ndcg_at_k
from penstock.operators.identity import row_hashes
from penstock.operators.indexing import Metric
from penstock.operators.mixed_spaces import AdaptedVectors
from penstock.operators.vector_store import ArrayVectors

K = 10
SEED = 7
LINEAR_VARIANCE = 0.9  # of held-out queries' vectors that an affine map explains: such a pair is linearly related
LEAST_RECOVERY = 0.95
MOST_MICROSECONDS = 50.0
ROUNDS, CALLS = 15, 200
DOCUMENTS, QUERIES = 2_000, 400
SCIFACT_DOCUMENTS = 4_000
LOG_EXPONENT = 1.0  # a query's share of the log falls with its rank to this power: Zipf's law
SHARES = np.linspace(0, 1, 11)
FRAGMENTS, RANDOM_ORDERS = 40, 5
SAMPLED = 0.1  # of the rows that a canary embeds with both models
COSINE = Metric.COSINE
LIVE = ("reader_errors", "mixed_answers", "wasted_embeddings", "quality_falls", "kills_missed")  # each must be 0
LEAST_KILLS = 10  # of a whole upgrade; the short one here has SHORT_KILLS
SHORT_KILLS = 2
PAIRS = (
    ("dims256", "full"),
    ("full", "dims256"),
    ("cls", "full"),
    ("full", "cls"),
    ("layers3", "full"),
    ("full", "layers3"),
    ("static", "full"),
    ("full", "static"),
)

Judged = Sequence[Sequence[int]]


@dataclass(frozen=True)
class BridgeResult:
    """One pair of models on one corpus: recall@K by judgements, and what share of the old model's an adapter keeps."""

    pair: str
    method: str
    explained_variance: float
    old: float
    new: float
    bridged: float
    agreement: float
    recovery: Interval
    control: float
    passes: bool
    peers: dict[str, float]
    us_per_query: float

    @property
    def linear(self) -> bool:
        return self.explained_variance >= LINEAR_VARIANCE

    @property
    def recovered(self) -> float:
        return self.recovery.estimate

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {"linear": self.linear}


@dataclass(frozen=True)
class Curve:
    """Quality against the share of rows that are embedded again."""

    shares: list[float]
    qualities: list[float]

    @property
    def area(self) -> float:
        return area_under_quality(np.array(self.shares), np.array(self.qualities))


@dataclass(frozen=True)
class OrderResult:
    """A backfill of FRAGMENTS fragments on one corpus, in which documents lie at random.

    Attributes:
        sliced: in the order of a backfill. random: of fragments at random. whole: of fragments by their traffic.
        single: of documents by their traffic. residual: of fragments by the adapter's residuals of a sample.
    """

    pair: str
    sliced: Curve
    random: list[Curve]
    whole: Curve
    single: Curve
    residual: Curve

    @property
    def random_area(self) -> float:
        return statistics.mean(curve.area for curve in self.random)

    def gains(self) -> dict[str, float]:
        """Mean quality over the backfill, less that of random order, of each order."""
        curves = {name: getattr(self, name) for name in ("sliced", "whole", "single", "residual")}
        return {name: curve.area - self.random_area for name, curve in curves.items()}


# ---- peers: what one writes by hand


def by_hand(method: str, source: np.ndarray, target: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """One method, as its paper states it, with a fixed parameter: all pairs weigh the same."""
    mean, other_mean = source.mean(axis=0), target.mean(axis=0)
    x, y = source - mean, target - other_mean
    if method == "procrustes":
        left, _, right = np.linalg.svd(x.T @ y, full_matrices=False)
        matrix = left @ right
    else:
        own = x.T @ x
        matrix = np.linalg.solve(own + 1e-2 * np.trace(own) / len(own) * np.eye(len(own)), x.T @ y)
    if method == "low rank":
        right = np.linalg.svd(x @ matrix, full_matrices=False)[2][:64]
        matrix = matrix @ right.T @ right

    def mapped(queries: np.ndarray) -> np.ndarray:
        rows = (queries - mean) @ matrix + other_mean
        unit: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return unit

    return mapped


PEERS = ("procrustes", "ridge", "low rank")


# ---- quality


def answers(queries: np.ndarray, documents: np.ndarray) -> list[list[str]]:
    """The ids, numbers of rows, of the K nearest documents of each query: exact."""
    batches = [(pa.array([str(row) for row in range(len(documents))]), documents)]
    found = exact_neighbours(queries, batches, K, Metric.INNER_PRODUCT, [None] * len(queries))
    ids: list[list[str]] = found.ids.tolist()
    return ids


def recall(queries: np.ndarray, documents: np.ndarray, judged: Judged) -> np.ndarray:
    """The share of relevant documents, K at most, among the first K: float64 (q,)."""
    found = answers(queries, documents)
    hits = [len(set(ids) & {str(row) for row in rows}) for ids, rows in zip(found, judged, strict=True)]
    shares: np.ndarray = np.array(hits) / [max(1, min(K, len(rows))) for rows in judged]
    return shares


def ndcg(queries: np.ndarray, documents: np.ndarray, judged: Judged) -> np.ndarray:
    return ndcg_at_k(answers(queries, documents), [{str(row): 1.0 for row in rows} for rows in judged], K)


# ---- bridges


def bridge(pair: tuple[str, str], old: Space, new: Space, texts: Texts) -> BridgeResult:
    """Fit, choose and measure adapters of new queries to the old index, and the peers."""
    held_out = {row for rows in texts.relevant for row in rows}
    kept = np.array([row for row in range(len(texts.documents)) if row not in held_out])
    sample = Sample(Pairs(new.documents[kept], old.documents[kept]), Pairs(new.fitting_queries, old.fitting_queries))

    def quality(adapter: Adapter, rows: np.ndarray) -> np.ndarray:
        judged = [texts.fitting_relevant[row] for row in rows]
        return ndcg(adapter.apply(new.fitting_queries[rows]), old.documents, judged)

    asked = Trial(Direction.QUERIES_TO_OLD, Pairs(new.fitting_queries, old.fitting_queries), old.documents)
    chosen, _ = choose_fit(Direction.QUERIES_TO_OLD, sample, quality, COSINE, SEED, partial(agreement, trial=asked))
    adapter = chosen.adapter(sample, COSINE)
    reference = recall(old.queries, old.documents, texts.relevant)
    bridged = recall(adapter.apply(new.queries), old.documents, texts.relevant)
    verdict, control = _judged(chosen, sample, (reference, bridged), (old, new), texts)
    trial = Trial(Direction.QUERIES_TO_OLD, Pairs(new.queries, old.queries), old.documents)
    together = sample.weighed(1.0)
    peers = {
        name: by_hand(name, together.source.astype(np.float64), together.target.astype(np.float64))(new.queries)
        for name in PEERS
    }
    return BridgeResult(
        pair=" to ".join(pair),
        method=_described(chosen),
        explained_variance=explained_variance(sample, old, new),
        old=float(reference.mean()),
        new=float(recall(new.queries, new.documents, texts.relevant).mean()),
        bridged=float(bridged.mean()),
        agreement=float(agreement(adapter, None, trial).mean()),
        recovery=verdict.recovery,
        control=control,
        passes=verdict.passes,
        peers={
            name: float(recall(mapped, old.documents, texts.relevant).mean() / reference.mean())
            for name, mapped in peers.items()
        },
        us_per_query=microseconds_per_query(adapter, new.queries),
    )


def _judged(
    chosen: Fit,
    sample: Sample,
    recalls: tuple[np.ndarray, np.ndarray],
    spaces: tuple[Space, Space],
    texts: Texts,
) -> tuple[Verdict, float]:
    """The gate's verdict, and the recall of the same fit to shuffled pairs."""
    old, new = spaces
    control = chosen.adapter(sample.shuffled(SEED), COSINE).apply(new.queries)
    found = recall(control, old.documents, texts.relevant)
    reference, bridged = recalls
    return judge_bridge(bridged, reference, found, SEED), float(found.mean())


def explained_variance(sample: Sample, old: Space, new: Space) -> float:
    """The share of the variance of held-out queries' old vectors that an affine map of the new ones explains."""
    mapped = Fit(Ridge(1e-3)).adapter(sample, Metric.INNER_PRODUCT).apply(new.queries)
    missed = np.sum((old.queries - mapped) ** 2)
    return float(1 - missed / np.sum((old.queries - old.queries.mean(axis=0)) ** 2))


def microseconds_per_query(adapter: Adapter, queries: np.ndarray) -> float:
    """CPU time to adapt one query by itself: the median of ROUNDS means."""
    one = np.ascontiguousarray(queries[:1])
    rounds = []
    for _ in range(ROUNDS):
        started = time.process_time()
        for _ in range(CALLS):
            adapter.apply(one)
        rounds.append((time.process_time() - started) / CALLS * 1e6)
    return statistics.median(rounds)


def _described(fit: Fit) -> str:
    parameters = method_to_json(fit.method)
    words = ", ".join(f"{name} {value:g}" for name, value in parameters.items() if name not in ("type", "seed"))
    return f"{parameters['type']}{f' ({words})' if words else ''}, a query weighs {fit.query_weight:g}"


# ---- orders


def orders(pair: tuple[str, str], old: Space, new: Space, texts: Texts) -> OrderResult:
    """nDCG of new queries, weighed by a skewed log, while rows of the old space are embedded again.

    Traffic is what the log finds with the old model, by rank, as `penstock upgrade` counts it. Documents not yet
    embedded again are mapped into the new space by an adapter that was not fitted to answers of the log.
    """
    held_out = {row for rows in texts.relevant for row in rows}
    kept = np.array([row for row in range(len(texts.documents)) if row not in held_out])
    fit = Fit(Ridge(1e-2))
    adapter = fit.adapter(Sample(Pairs(old.documents[kept], new.documents[kept])), COSINE)
    unseen = np.array(sorted(held_out))
    length = mean_cosine(adapter, Pairs(old.documents[unseen], new.documents[unseen]))
    mapped = AdaptedVectors(ArrayVectors(old.documents), adapter, length).take(np.arange(len(old.documents)))
    asked = np.random.default_rng(SEED).permutation(1 / np.arange(1, len(texts.queries) + 1) ** LOG_EXPONENT)

    def curve(units: Sequence[np.ndarray]) -> Curve:
        rows, ends = np.concatenate(units), np.cumsum([len(unit) for unit in units])
        quality = {}
        for share in SHARES:
            end = int(ends[np.searchsorted(ends, share * len(rows))]) if share else 0
            mixed = mapped.copy()
            mixed[rows[:end]] = new.documents[rows[:end]]
            found = ndcg(new.queries, mixed, texts.relevant)
            quality[end / len(rows)] = float(np.average(found, weights=asked))
        return Curve(list(quality), list(quality.values()))

    traffic = found_traffic(np.array(answers(old.queries, old.documents)).astype(np.int64), asked, len(mapped))
    hashes = row_hashes([str(row) for row in range(len(mapped))])
    residuals = adapter_residuals(adapter.apply(old.documents), new.documents)
    fragments = np.array_split(np.random.default_rng(SEED).permutation(len(mapped)), FRAGMENTS)
    scattered = [np.random.default_rng(seed).permutation(FRAGMENTS) for seed in range(RANDOM_ORDERS)]
    return OrderResult(
        " to ".join(pair),
        curve(product_order(fragments, traffic, hashes)),
        [curve([fragments[one] for one in order]) for order in scattered],
        curve(whole_order(fragments, traffic)),
        curve([np.array([row]) for row in backfill_order(Priorities(hashes, traffic))]),
        curve(residual_order(fragments, residuals)),
    )


def found_traffic(found: np.ndarray, asked: np.ndarray, rows: int) -> np.ndarray:
    """What each row is worth by what a log finds, int64 (q, k): how often the query was asked, divided by the rank."""
    worth = asked[:, None] / np.arange(1, found.shape[1] + 1)
    return np.bincount(found.reshape(-1), weights=worth.reshape(-1), minlength=rows)


def product_order(fragments: Sequence[np.ndarray], traffic: np.ndarray, hashes: np.ndarray) -> list[np.ndarray]:
    """The rows of slices and rests of fragments, as a backfill orders them; each row a document."""
    units = []
    for rows in fragments:
        every = np.ones(len(rows), bool)
        wanted = first_wanted(Priorities(hashes[rows], traffic[rows]), every.astype(np.int64), every)
        units += [part for part in (rows[wanted], rows[~wanted]) if len(part)]
    return whole_order(units, traffic)


def whole_order(units: Sequence[np.ndarray], traffic: np.ndarray) -> list[np.ndarray]:
    """Units by their traffic."""
    rows = np.array([len(unit) for unit in units])
    return [units[one] for one in fragment_order(rows, np.array([traffic[unit].sum() for unit in units]))]


def residual_order(fragments: Sequence[np.ndarray], residuals: np.ndarray) -> list[np.ndarray]:
    """Fragments by the residuals of a random sample of rows alone."""
    drawn = np.random.default_rng(SEED).random(len(residuals)) < SAMPLED
    means = np.array([residuals[rows[drawn[rows]]].mean() if drawn[rows].any() else np.nan for rows in fragments])
    return [fragments[one] for one in fragment_order(np.array([len(rows) for rows in fragments]), residuals=means)]


# ---- a whole upgrade


def live_figures(merge: Path | None) -> dict[str, object]:
    """The last line of `upgrade_live.py --json`, of a file or of a short run now."""
    if merge is not None:
        printed = merge.read_text("utf-8")
    else:
        program = Path(__file__).with_name("upgrade_live.py")
        command = [sys.executable, str(program), "--documents", "150", "--kills", str(SHORT_KILLS), "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        printed = done.stdout
    if not printed.strip():
        raise SystemExit("a whole upgrade printed no figures: it ended before its reader was asked what it saw")
    found: dict[str, object] = json.loads(printed.splitlines()[-1])
    return found | ({"kills_missed": max(0, LEAST_KILLS - int(str(found["kills"])))} if merge is not None else {})


# ---- report

HEADER = """
## {corpus}

| old to new | chosen | variance explained | recall@10 old | new | bridged | recovery [95 %] | old neighbours kept \
| shuffled pairs | gate | best by hand | µs a query |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


ORDERS_HEADER = """
nDCG@10 weighed by the log, mean over the backfill

| old to new | random fragments | slices and fragments | fragments | documents | fragments by residual |
|---|---|---|---|---|---|
"""


def table_row(one: BridgeResult) -> str:
    name, share = max(one.peers.items(), key=lambda item: item[1])
    recovery = f"{one.recovery.estimate:.3f} [{one.recovery.low:.3f}, {one.recovery.high:.3f}]"
    cells = [one.pair, one.method, f"{one.explained_variance:.3f}", f"{one.old:.4f}", f"{one.new:.4f}"]
    cells += [f"{one.bridged:.4f}", recovery, f"{one.agreement:.3f}", f"{one.control:.4f}"]
    cells += ["passes" if one.passes else "fails", f"{share:.3f} ({name})", f"{one.us_per_query:.0f}"]
    return f"| {' | '.join(cells)} |\n"


def best_peer(results: Sequence[BridgeResult]) -> str:
    """The single method with the highest mean recovery over all pairs and corpora."""
    return max(PEERS, key=lambda name: statistics.mean(one.peers[name] for one in results))


def misses(results: Sequence[BridgeResult], ordered: Sequence[OrderResult], live: Mapping[str, object]) -> list[str]:
    """What was promised and is not so."""
    peer = best_peer(results)
    missed = [
        f"{one.pair}: an adapter between linearly related spaces recovers {one.recovered:.3f}"
        for one in results
        if one.linear and one.recovered < LEAST_RECOVERY
    ]
    missed += [
        f"{one.pair}: recovers {one.recovered:.3f}, {peer} by hand {one.peers[peer]:.3f}"
        for one in results
        if one.recovered < one.peers[peer]
    ]
    missed += [
        f"{one.pair}: {one.us_per_query:.0f} µs a query" for one in results if one.us_per_query > MOST_MICROSECONDS
    ]
    missed += [
        f"{one.pair}: random order is better by {-one.gains()['sliced']:.4f}"
        for one in ordered
        if one.gains()["sliced"] <= 0
    ]
    missed += [f"a whole upgrade: {name} {live[name]}" for name in LIVE if live[name]]
    return missed


def figures(corpora: dict[str, list[BridgeResult]], ordered: dict[str, list[OrderResult]]) -> dict[str, object]:
    results = [one for found in corpora.values() for one in found]
    every = [one for found in ordered.values() for one in found]
    gains = {name: np.array([one.gains()[name] for one in every]) for name in every[0].gains()}
    intervals = {name: mean_interval(values, SEED).to_json() for name, values in gains.items()}
    return {
        "bridge_recovery": {name: {one.pair: one.recovered for one in found} for name, found in corpora.items()},
        "bridge_us_per_query": max(one.us_per_query for one in results),
        "best_peer": best_peer(results),
        "bridges": {name: [one.to_json() for one in found] for name, found in corpora.items()},
        "auc_priority_over_random": intervals["sliced"],
        **{f"auc_{name}_over_random": intervals[name] for name in ("whole", "single", "residual")},
        "orders": {name: [asdict(one) for one in found] for name, found in ordered.items()},
    }


def _say(words: str) -> None:
    sys.stdout.write(words)
    sys.stdout.flush()


def _note(words: str) -> None:
    sys.stderr.write(words + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with scifact and arxiv")
    parser.add_argument("--work", type=Path, default=Path("upgrade-vectors"), help="folder where vectors are kept")
    parser.add_argument("--corpora", nargs="+", default=["scifact", "arxiv", "docstrings"])
    parser.add_argument("--merge", type=Path, help="output of upgrade_live.py --json; without it, that runs, short")
    parser.add_argument("--json", action="store_true", help="print one last line of JSON")
    arguments = parser.parse_args()
    makers: dict[str, Callable[[], Texts]] = {
        "scifact": lambda: scifact(arguments.data / "scifact", SCIFACT_DOCUMENTS),
        "arxiv": lambda: arxiv(arguments.data / "arxiv_abstracts_60k", DOCUMENTS, QUERIES),
        "docstrings": lambda: docstrings(DOCUMENTS, QUERIES),
    }
    bridges: dict[str, list[BridgeResult]] = {}
    ordered: dict[str, list[OrderResult]] = {}
    for corpus in arguments.corpora:
        texts = makers[corpus]()
        spaces = load_spaces(texts, arguments.work / corpus, _note)
        _say(HEADER.format(corpus=corpus))
        bridges[corpus], ordered[corpus] = [], []
        for pair in PAIRS:
            old, new = (spaces[name] for name in pair)
            bridges[corpus].append(bridge(pair, old, new, texts))
            _say(table_row(bridges[corpus][-1]))
            if pair[1] == "full":
                ordered[corpus].append(orders(pair, old, new, texts))
        _say(ORDERS_HEADER)
        for one in ordered[corpus]:
            gains = " | ".join(f"{gain:+.4f}" for gain in one.gains().values())
            _say(f"| {one.pair} | {one.random_area:.4f} | {gains} |\n")
    live = live_figures(arguments.merge)
    _say("\na whole upgrade: " + ", ".join(f"{name} {live[name]}" for name in ("kills", *LIVE)) + "\n")
    missed = misses(
        [one for found in bridges.values() for one in found], [o for found in ordered.values() for o in found], live
    )
    _say("\nbars: " + ("met\n" if not missed else "MISSED\n" + "".join(f"- {one}\n" for one in missed)))
    if arguments.json:
        _say(json.dumps(figures(bridges, ordered) | {name: live[name] for name in LIVE} | {"live": live}) + "\n")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
