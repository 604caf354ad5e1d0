"""Take the sample that a new model is tried on: passages and queries, embedded with the old model and the new.

The passages of the sample become fragments of the stages that a run with the new model has: their vectors are not made
twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from penstock.cluster.fragments import read_fragment, vectors_of
from penstock.cluster.jobs.canary_sample import (
    CanarySampleJob,
    CanarySampleTask,
    SampledPassages,
    SampleFragment,
    first_drawn,
    sample_passages,
    write_sample_fragments,
)
from penstock.cluster.jobs.evaluation import EncodeQueriesTask, Queries, encode_queries, read_relevance
from penstock.cluster.layout import EMBEDDINGS, PASSAGES, fragment_path
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.operators.bridging import SpaceIdentity
from penstock.operators.chunking import PassageType
from penstock.operators.identity import fingerprint
from penstock.operators.indexing import Metric
from penstock.operators.lengths import normalize
from penstock.operators.paired_samples import PairedSample, SampledSpace, relevant
from penstock.pipelines.embedding import Embedding
from penstock.pipelines.loading import Origin
from penstock.pipelines.model_pair import ModelPair
from penstock.pipelines.planning import FragmentFacts, Resolved, content_of, finished_fragments, split_path
from penstock.pipelines.progress import Reporter
from penstock.pipelines.records import read_json, write_json

SAMPLE_PASSAGES = 4_000
FEWEST_PASSAGES = 50  # neighbours of fewer say nothing
FEWEST_QUERIES = 20  # of which half choose, and half judge
MOST_QUERIES = 2_000  # each is searched for by some hundred adapters
STAND_INS = 500
STAND_IN_SHARE = 5  # at most one passage of the sample in so many stands in as a query


@dataclass(frozen=True, eq=False)
class TakenSample:
    """A sample in both spaces.

    Attributes:
        fingerprint: of the two models, the texts, the judgements and the seed.
        about: where it comes from, as JSON: counts, queries, throughput of the new model.
    """

    paired: PairedSample
    fingerprint: str
    about: dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """The evaluation queries in both spaces and their judgements; none where documents stand in."""

    ids: tuple[str, ...]
    old: np.ndarray
    new: np.ndarray
    relevance: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def judged_documents(self) -> frozenset[str]:
        return frozenset(name for query in self.ids for name in relevant(self.relevance.get(query, {})))


@dataclass
class Canary:
    """Takes the sample.

    Attributes:
        facts: of the new pipeline's finished selection.
        passages: how many to draw.
    """

    session: Session
    store: Store
    reporter: Reporter
    origin: Origin
    run_id: str
    pair: ModelPair
    facts: Sequence[FragmentFacts]
    passages: int = SAMPLE_PASSAGES
    seed: int = 0

    def take(self) -> TakenSample:
        """The sample, embedded with both models; what is there already is not made again.

        Vectors of the new model become fragments of its embeddings stage, those of the old one of its own, whose
        vectors are nearly all known.

        Raises:
            ValueError: fewer than FEWEST_PASSAGES passages have vectors of both models, or the old model's need
                documents that the sample lacks.
            QueriesInvalid: the file of queries or judgements cannot be used.
        """
        _refuse_lost_documents(self.pair)
        asked = self._asked()
        parts = self._sampled(asked.judged_documents)
        drawn = first_drawn(parts.drawn, self.passages, self.seed)
        seen = pc.is_in(parts.judged.column("passage_id"), drawn.column("passage_id").combine_chunks())
        groups = [self._fragments(table, parts.documents) for table in (drawn, parts.judged.filter(pc.invert(seen)))]
        both = [fragment for group in groups for fragment in group]
        self._embed(self.pair.old, both)
        throughput = self._throughput(self._fingerprint(both), self._embed(self.pair.new, both))
        vectors = [self._vectors(group) for group in groups]
        paired, queries = self._paired(asked, vectors)
        about = {
            "drawn": vectors[0].passages,
            "of_judged_documents": vectors[1].passages,
            "without_vector": sum(fragment.passages for fragment in both) - sum(part.passages for part in vectors),
            "of_passages": sum(fact.kept for fact in self.facts),
            "documents": len(set(paired.document_ids)),
            "queries": queries,
            "throughput": throughput,
        }
        return TakenSample(paired, self._fingerprint(both), about)

    def _fingerprint(self, fragments: Sequence[SampleFragment]) -> str:
        evaluate = self.pair.new.pipeline.evaluate
        paths = [path for path in (evaluate.queries, evaluate.relevance) if isinstance(path, str)]
        return fingerprint(
            stage="canary",
            models=[ModelPair.encoders(self.pair.old), ModelPair.encoders(self.pair.new)],
            metrics=[self.pair.old.metric.value, self.pair.new.metric.value],
            stored=[one.pipeline.embedding.store for one in self.pair.both],
            fragments=[fragment.name for fragment in fragments],
            queries=[content_of(path) for path in paths],
            k=evaluate.k,
            seed=self.seed,
        )

    def _asked(self) -> Asked:
        evaluate = self.pair.new.pipeline.evaluate
        if not isinstance(evaluate.queries, str):
            nothing = [np.empty((0, one.encoder.dimension), np.float32) for one in self.pair.both]
            return Asked((), nothing[0], nothing[1])
        store, path = split_path(evaluate.queries)
        found: list[Queries] = []
        with self.reporter.stage("queries", 2, "models") as advance:
            for resolved in self.pair.both:
                task = EncodeQueriesTask(store.url, path, resolved.query_encoder)
                found.append(self.session.run(encode_queries, task))
                advance(1, resolved.encoder.model)
        relevance: dict[str, dict[str, float]] = {}
        if evaluate.relevance is not None:
            judged_store, name = split_path(evaluate.relevance)
            relevance = read_relevance(judged_store.url, name)
        old, new = (
            _fit(one.vectors[:MOST_QUERIES], resolved.metric)
            for one, resolved in zip(found, self.pair.both, strict=True)
        )
        return Asked(found[0].ids[:MOST_QUERIES], old, new, relevance)

    def _sampled(self, judged: frozenset[str]) -> SampledPassages:
        new = self.pair.new
        kept = [fact for fact in self.facts if fact.kept]
        job = CanarySampleJob(
            self.store.url,
            new.stage_fingerprint(PASSAGES),
            new.selection_fingerprint,
            sum(fact.kept for fact in kept),
            self.passages,
            self.seed,
            judged,
            new.chunker.kind is PassageType.LATE,
        )
        found: list[SampledPassages] = []
        with self.reporter.stage("sample", len(kept), "fragments") as advance:
            tasks = [CanarySampleTask(job, fact.passages, fact.kept < fact.passages_in) for fact in kept]
            for part in self.session.stream(sample_passages, tasks):
                found.append(part)
                advance(1, part.fragment[:12])
        return SampledPassages.joined(found)

    def _fragments(self, table: pa.Table, documents: pa.Table | None) -> list[SampleFragment]:
        """The passages as fragments of both pipelines' stages, which may be one."""
        stages = sorted({one.stage_fingerprint(PASSAGES) for one in self.pair.both})
        return [write_sample_fragments(self.store, stage, table, documents) for stage in stages][0]

    def _embed(self, resolved: Resolved, fragments: Sequence[SampleFragment]) -> dict[str, Any] | None:
        """Embed fragments that are not embedded; what the workers did, where anything was encoded."""
        stage = resolved.stage_fingerprint(EMBEDDINGS)
        names = _embeddings_names(resolved, fragments)
        done = finished_fragments(self.store, EMBEDDINGS, stage)
        todo = [sample_facts(fragment) for fragment in fragments if names[fragment.name] not in done]
        if not todo:
            return None
        embedding = Embedding(self.session, self.store, self.reporter, resolved, self.origin, self.run_id)
        works, summary = embedding.embed(stage, names, todo, embedding.pool(len(todo)))
        encoded = sum(work.encoded for work in works)
        return summary | {"encoded": encoded} if summary is not None and encoded else None

    def _throughput(self, sample: str, summary: dict[str, Any] | None) -> dict[str, Any] | None:
        """What the new model's workers did, measured once for a sample; None where all its vectors were known."""
        path = f"canaries/{sample}/throughput.json"
        if summary is None:
            return read_json(self.store, path)
        rates, workers = summary["rates"], summary["workers"]
        record = {
            "passages_per_s": rates["passages_per_s"],
            "tokens_per_s": rates["tokens_per_s"],
            "workers": workers,
            "passages_per_s_by_worker": round(rates["passages_per_s"] / workers, 2),
            "tokens_per_s_by_worker": round(rates["tokens_per_s"] / workers, 1),
            "encoded": summary["encoded"],
            "tokens": summary["tokens"],
            "seconds": rates["seconds"],
        }
        write_json(self.store, path, record)
        return record

    def _vectors(self, fragments: Sequence[SampleFragment]) -> "_Vectors":
        parts = [self._fragment_vectors(fragment) for fragment in fragments]
        dimensions = [one.encoder.dimension for one in self.pair.both]
        nothing = _Vectors((), *(np.empty((0, dimension), np.float32) for dimension in dimensions))
        return _Vectors(
            tuple(name for part in parts for name in part.documents),
            np.concatenate([nothing.old, *(part.old for part in parts)]),
            np.concatenate([nothing.new, *(part.new for part in parts)]),
        )

    def _fragment_vectors(self, fragment: SampleFragment) -> "_Vectors":
        """The passages of a fragment that have a vector of both models."""
        path = fragment_path(PASSAGES, self.pair.new.stage_fingerprint(PASSAGES), fragment.name)
        passages = read_fragment(self.store, path, ["passage_id", "document_id"])
        document_of = dict(zip(*(passages.column(name).to_pylist() for name in passages.column_names), strict=True))
        tables = [self._embedded(resolved, fragment) for resolved in self.pair.both]
        places = [{name: row for row, name in enumerate(table.column("passage_id").to_pylist())} for table in tables]
        shared = [name for name in document_of if all(name in place for place in places)]
        vectors = [
            _fit(vectors_of(table.column("embedding"))[[place[name] for name in shared]], resolved.metric)
            for table, place, resolved in zip(tables, places, self.pair.both, strict=True)
        ]
        return _Vectors(tuple(document_of[name] for name in shared), vectors[0], vectors[1])

    def _embedded(self, resolved: Resolved, fragment: SampleFragment) -> pa.Table:
        name = _embeddings_names(resolved, [fragment])[fragment.name]
        path = fragment_path(EMBEDDINGS, resolved.stage_fingerprint(EMBEDDINGS), name)
        return read_fragment(self.store, path, ["passage_id", "embedding"])

    def _paired(self, asked: Asked, groups: Sequence["_Vectors"]) -> tuple[PairedSample, dict[str, Any]]:
        """The sample with its queries, and what these are."""
        whole, drawn = _Vectors.joined(groups), groups[0].passages
        if whole.passages < FEWEST_PASSAGES:
            raise ValueError(
                f"sample ({whole.passages} passages with vectors of both models) must hold at least {FEWEST_PASSAGES} "
                "to compare two models by; a corpus of so few is embedded again in no time"
            )
        kept, relevance = _judged(asked, set(whole.documents))
        about: dict[str, Any] = {"from": "evaluate.queries", "judged": relevance is not None}
        if len(kept) < FEWEST_QUERIES:
            about = {"from": "passages", "judged": False, "why": _why_stand_ins(len(asked.ids))}
            asked, whole = _stand_ins(whole, drawn, self.seed)
            drawn, kept, relevance = drawn - len(asked.ids), np.arange(len(asked.ids)), None
        paired = PairedSample(
            self._space(self.pair.old, whole.old, asked.old[kept]),
            self._space(self.pair.new, whole.new, asked.new[kept]),
            whole.documents,
            drawn,
            tuple(asked.ids[row] for row in kept.tolist()),
            relevance,
            self.pair.new.pipeline.evaluate.k,
            self.seed,
        )
        fitting, judging = (len(half) for half in paired.halves)
        return paired, about | {"fitting": fitting, "judging": judging}

    def _space(self, resolved: Resolved, documents: np.ndarray, queries: np.ndarray) -> SampledSpace:
        return SampledSpace(SpaceIdentity.of(resolved.encoder), resolved.metric, documents, queries)


@dataclass(frozen=True, eq=False)
class _Vectors:
    """Of n passages the documents and the vectors of both models, float32 (n, d)."""

    documents: tuple[str, ...]
    old: np.ndarray
    new: np.ndarray

    @property
    def passages(self) -> int:
        return len(self.documents)

    def take(self, rows: np.ndarray) -> "_Vectors":
        return _Vectors(tuple(self.documents[row] for row in rows.tolist()), self.old[rows], self.new[rows])

    @staticmethod
    def joined(parts: Sequence["_Vectors"]) -> "_Vectors":
        return _Vectors(
            tuple(name for part in parts for name in part.documents),
            np.concatenate([part.old for part in parts]),
            np.concatenate([part.new for part in parts]),
        )


def sample_facts(fragment: SampleFragment) -> FragmentFacts:
    """A fragment of chosen passages as selection would have it: nothing of it is left out."""
    return FragmentFacts(
        passages=fragment.name,
        documents_in=fragment.documents,
        documents_out=fragment.documents,
        dropped={},
        passages_in=fragment.passages,
        tokens=fragment.tokens,
        duplicate_ids=0,
        duplicate_texts=0,
        digest=0,
    )


def _refuse_lost_documents(pair: ModelPair) -> None:
    old, new = (one.chunker.kind for one in pair.both)
    if old is PassageType.LATE and new is not PassageType.LATE:
        raise ValueError(
            f"passages.type ({new}) of the new pipeline must be late, as that of version {pair.manifest['version']}, "
            "whose model embeds passages within their documents: a sample of other passages has none; keep it, and "
            "change it with `penstock reindex` afterwards"
        )


def _embeddings_names(resolved: Resolved, fragments: Sequence[SampleFragment]) -> dict[str, str]:
    stage = resolved.stage_fingerprint(EMBEDDINGS)
    return {fragment.name: sample_facts(fragment).embeddings_fragment(stage) for fragment in fragments}


def _fit(vectors: np.ndarray, metric: Metric) -> np.ndarray:
    """float32, under cosine of exactly unit length, which stored float16 vectors are only nearly."""
    single: np.ndarray = vectors.astype(np.float32)
    return normalize(single) if metric is Metric.COSINE and len(single) else single


def _judged(asked: Asked, present: set[str]) -> tuple[np.ndarray, tuple[Mapping[str, float], ...] | None]:
    """The queries to use, int64 (q,), and their judgements of documents that are in the sample: those that have a
    relevant one; all queries and None where these are too few."""
    judgements = [
        {name: value for name, value in asked.relevance.get(query, {}).items() if name in present}
        for query in asked.ids
    ]
    judged = np.array([row for row, found in enumerate(judgements) if relevant(found)], np.int64)
    if len(judged) >= FEWEST_QUERIES:
        return judged, tuple(judgements[row] for row in judged.tolist())
    return np.arange(len(asked.ids)), None


def _stand_ins(whole: _Vectors, drawn: int, seed: int) -> tuple[Asked, _Vectors]:
    """Passages, of those drawn at random, that are asked for instead of queries; and the others."""
    count = min(STAND_INS, max(FEWEST_QUERIES, drawn // STAND_IN_SHARE), drawn // 2)
    rows = np.sort(np.random.default_rng(seed).permutation(drawn)[:count])
    names = tuple(f"passage {row}" for row in rows.tolist())
    return Asked(names, whole.old[rows], whole.new[rows]), whole.take(np.setdiff1d(np.arange(whole.passages), rows))


def _why_stand_ins(queries: int) -> str:
    if not queries:
        return "evaluate.queries names no file"
    return f"evaluate.queries holds {queries} queries, fewer than {FEWEST_QUERIES}"
