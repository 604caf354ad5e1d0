"""What a run would do: each stage's identity, what of it is done, what is to do, and why. Reads names and records
only."""

import hashlib
import importlib.util
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from penstock.cluster.catalog import Catalog, Reason
from penstock.cluster.fragments import read_fragment
from penstock.cluster.jobs.clustering import ClusteringJob
from penstock.cluster.jobs.selection import OPERATOR_VERSION as SELECTION_VERSION
from penstock.cluster.jobs.shards import ShardRecord, shard_record_path
from penstock.cluster.jobs.training import training_record_path
from penstock.cluster.layout import (
    CENTROIDS,
    EMBEDDINGS,
    EVALUATION,
    KEPT,
    PAIRS,
    PASSAGES,
    REMOVAL,
    SELECTION,
    SHARDS,
    STANDING,
    TRAINING,
    TRANSFORMS,
    shard_file,
    stage_folder,
)
from penstock.cluster.node import connect, model_folder
from penstock.cluster.storage import Store
from penstock.operators.chunking import Chunker, PassageType
from penstock.operators.documents import DocumentReader, SourceType
from penstock.operators.encoding import Backend, Encoder, Precision, encoder_for
from penstock.operators.identity import fingerprint, fingerprint_set
from penstock.operators.indexing import (
    DEFAULT_DEGREE,
    OPQ_CODECS,
    ROTATED_CODECS,
    Family,
    IndexSpec,
    Metric,
    factory_string,
    faiss_metric,
    fewest_training_rows,
    nlist_of,
    parse_factory,
    refuse_missing_engine,
)
from penstock.operators.late_chunking import can_pool_late
from penstock.operators.models import ModelCard, ModelUnavailable, read_model_card, read_module_stack
from penstock.operators.searching import SearchParameters
from penstock.operators.sharding import Sharding
from penstock.operators.similar_pairs import Join
from penstock.operators.transforms import metric_after, output_dimension, step_to_json
from penstock.operators.tuning import SCREENING_SIZES, Budget, Candidate, candidates
from penstock.operators.vamana import svs_version
from penstock.operators.vector_codecs import VectorCodec, is_lvq
from penstock.pipelines.config import Level, PipelineFile, Transform
from penstock.pipelines.decisions import can_build_upon, earlier_decisions, fragment_of, read_decision
from penstock.pipelines.history import PastRun, last_run
from penstock.pipelines.loading import Origin, PipelineFileInvalid, Problem
from penstock.pipelines.model_identity import (
    identity_words,
    is_same_dimension,
    is_same_model,
    model_facts,
    model_identity,
)
from penstock.pipelines.records import read_json
from penstock.pipelines.shared_centroids import Clustering, index_clustering, most_stay, shared_clustering
from penstock.pipelines.sources import Fragment, SourceFile, cut_fragments, document_reader, find_files

PASSAGES_VERSION = 1
TRANSFORMS_VERSION = 1
TRAINING_VERSION = 2
KEPT_VERSION = 5
ENCODED = "encoded"  # in a lineage: the embeddings that deduplication by meaning read
SHARDS_VERSION = 1
EVALUATION_VERSION = 2
TUNING = "tuning"
TUNING_VERSION = 2
HELD_OUT_QUERIES = 500
LEAST_ROWS = 20  # below, nothing could be measured, nor would it matter
LARGE_SHARD = 1_000_000  # rows: no configuration takes fewer bytes per vector in a smaller one
OF_THE_CHOICE = {"recall", "bytes_per_vector", "memory_gib", "latency_ms", "seed", "training_rows", "sharding"}
# What a trained index does not depend on, or depends on only through the configuration that was chosen by it.
NUMBERS = ("int64", "float64")  # types of kept columns
NOT_OF_TRAINING = {"recall", "shards", "rerank", "metric", "bytes_per_vector", "memory_gib", "latency_ms"} | {
    "sharding",
    "transforms",
    "queries",
    "rerank_codec",
}
VERSION_HEX_DIGITS = 16
DECIDED_MOVES = (Reason.BACKFILL, Reason.UPGRADE, Reason.PROMOTE)  # of an alias, not by a run of a pipeline file
DEFAULT_OVERLAP_SHARE = 8  # an eighth of the window
DEFAULT_RABITQ_BITS = 4
DEFAULT_EF_CONSTRUCTION = {Family.VAMANA: 200}  # candidates while a graph is built, where these are not 100
STAGES = (PASSAGES, SELECTION, EMBEDDINGS, TRAINING, SHARDS, EVALUATION)


@dataclass(frozen=True)
class Resolved:
    """A pipeline file with everything looked up that its identities depend on: files, columns, model."""

    pipeline: PipelineFile
    files: tuple[SourceFile, ...]
    reader: DocumentReader
    card: ModelCard
    chunker: Chunker
    encoder: Encoder
    query_encoder: Encoder
    warnings: tuple[str, ...]
    metric: Metric
    decided: bool
    tuned_point: SearchParameters | None = None

    @cached_property
    def decision_fingerprint(self) -> str:
        """Identity of the choice of precision: the encoder, less precision and dimension, so that shorter vectors can
        be taken from longer ones."""
        return fingerprint(**{**self.encoder.parameters(), "precision": "auto", "dimension": self.card.dimension})

    @property
    def stored(self) -> VectorCodec | None:
        """How vectors are stored for re-ranking; None where they are not."""
        index = self.pipeline.index
        return index.rerank_codec if index.rerank else None

    @property
    def index_dimension(self) -> int:
        """Dimensions of the index, behind the transforms."""
        dimension = self.encoder.dimension
        for step in self.pipeline.index.steps():
            dimension = output_dimension(step, dimension)
        return dimension

    @property
    def index_metric(self) -> Metric:
        """What the index compares by, behind the transforms."""
        dimension, metric = self.encoder.dimension, self.metric
        for step in self.pipeline.index.steps():
            metric, dimension = metric_after(step, dimension, metric), output_dimension(step, dimension)
        return metric

    @property
    def index_chosen(self) -> bool:
        """Whether family and codec are known: named by the file, or chosen by a run."""
        return self.pipeline.index.family != "auto"

    def with_index(self, chosen: Candidate, point: SearchParameters | None) -> "Resolved":
        """With the index that family `auto` came to mean, and the search parameters that were best for it."""
        options: dict[str, Any] = {"codec": chosen.codec, "rerank": chosen.rerank, "family": chosen.family}
        if chosen.reduced is not None:
            options["transforms"] = (Transform(type="pca", dimension=chosen.reduced),)
        if chosen.family is Family.HNSW:
            options["hnsw_m"] = chosen.hnsw_m
        if chosen.codec in OPQ_CODECS:
            options["pq_bytes"] = chosen.pq_bytes
        if chosen.family is Family.IVF:
            options["nlist"] = chosen.nlist
        if chosen.codec in ROTATED_CODECS:
            options["rabitq_bits"] = chosen.rabitq_bits
        index = self.pipeline.index.model_copy(update=options)
        return replace(self, pipeline=self.pipeline.model_copy(update={"index": index}), tuned_point=point)

    def budget(self, rows: int) -> Budget:
        """What the index may take and must reach, for a corpus of so many passages."""
        index = self.pipeline.index
        limits = [] if index.bytes_per_vector is None else [index.bytes_per_vector]
        if index.memory_gib is not None:  # for as many rows as the choice is kept for
            parts = 1 if index.sharding is Sharding.CLUSTER else index.shards
            limits.append(index.memory_gib * 2**30 / (parts * 2 ** searched_rows(self, rows).bit_length()))
        return Budget(index.recall, self.pipeline.evaluate.k, min(limits, default=None), index.latency_ms)

    def choice_fingerprint(self, rows: int) -> str:
        """Identity of the choice of an index: what it is to do for which vectors, and the size of a shard to within a
        factor of two, so that a corpus that grows a little keeps its index."""
        index = self.pipeline.index
        asked = index.model_dump(mode="json", include=OF_THE_CHOICE)
        if index.rerank_codec is not VectorCodec.FLOAT16:
            asked["rerank_codec"] = index.rerank_codec.value
        if index.transforms:
            asked["transforms"] = _transforming(self)
        return fingerprint(
            stage=TUNING,
            version=TUNING_VERSION,
            shards=index.shards if index.memory_gib is not None else None,
            queries=_evaluation_inputs(self) if isinstance(self.pipeline.evaluate.queries, str) else [],
            embeddings=self.stage_fingerprint(EMBEDDINGS),
            metric=self.metric.value,
            k=self.pipeline.evaluate.k,
            magnitude=searched_rows(self, rows).bit_length(),
            **asked,
        )

    def with_precision(self, precision: Precision) -> "Resolved":
        """With the precision that `auto` came to mean."""
        encoders = (replace(one, precision=precision) for one in (self.encoder, self.query_encoder))
        encoder, query_encoder = encoders
        return replace(self, encoder=encoder, query_encoder=query_encoder, decided=True)

    @cached_property
    def parameters(self) -> dict[str, dict[str, Any]]:
        """The parameters of each stage, by the names of the pipeline file: what its fingerprint is made of."""
        pipeline = self.pipeline
        index = pipeline.index.model_dump(mode="json", exclude=NOT_OF_TRAINING, exclude_none=True)
        steps = [step_to_json(step) for step in pipeline.index.steps()]
        return {
            PASSAGES: {
                "documents.type": self.reader.type.value,
                "documents.text": list(self.reader.text),
                "documents.id": self.reader.id,
                "documents.keep": [list(column) for column in self.reader.keep],
                "documents.max_file_bytes": self.reader.max_bytes,
                "passages.type": self.chunker.kind.value,
                "passages.tokens": self.chunker.tokens,
                "passages.overlap": self.chunker.overlap,
                "embedding.model (tokenizer)": self.card.tokenizer_hash,
                "version": PASSAGES_VERSION,
            },
            SELECTION: {
                "documents.duplicate_ids": pipeline.documents.duplicate_ids.value,
                "deduplicate.type": "exact" if pipeline.deduplicate.by_text else "none",
                "version": SELECTION_VERSION,
            },
            EMBEDDINGS: self.encoder.parameters()
            | {"embedding.store": pipeline.embedding.store}
            | ({"passages.type": self.chunker.kind.value} if self.chunker.kind is PassageType.LATE else {}),
            KEPT: self._kept_parameters(),
            TRANSFORMS: {"index.transforms": steps, "index.queries": pipeline.index.queries},
            TRAINING: {f"index.{name}": value for name, value in index.items()}
            | {"index.metric": self.metric.value, "version": TRAINING_VERSION}
            | {"index.transforms": steps}
            | {"mean of stored vectors": self.stored is not None and is_lvq(self.stored)}
            | ({"svs": svs_version()} if pipeline.index.family == Family.VAMANA else {}),
            SHARDS: {
                "index.shards": pipeline.index.shards,
                "index.sharding": pipeline.index.sharding.value,
                "index.rerank": pipeline.index.rerank,
                "index.rerank_codec": self.stored.value if self.stored else None,
                "version": SHARDS_VERSION,
            },
            EVALUATION: {f"evaluate.{name}": value for name, value in pipeline.evaluate.model_dump(mode="json").items()}
            | {"index.recall": pipeline.index.recall, "version": EVALUATION_VERSION}
            | ({"index tuned": self.tuned_point.to_json()} if self.tuned_point else {}),
        }

    def _kept_parameters(self) -> dict[str, Any]:
        deduplicate = self.pipeline.deduplicate
        if deduplicate.type != "semantic":
            return {"deduplicate.type": "exact"}
        names = ("similarity", "keep", "join", "seed")
        options = {f"deduplicate.{name}": getattr(deduplicate, name) for name in names}
        return {
            "deduplicate.type": "semantic",
            **options,
            "deduplicate.floor": deduplicate.least,
            **self._level(),
            "version": KEPT_VERSION,
        }

    def _level(self) -> dict[str, Any]:
        deduplicate = self.pipeline.deduplicate
        if deduplicate.level is Level.PASSAGE:
            return {}
        return {"deduplicate.level": deduplicate.level.value, "deduplicate.share": deduplicate.covered_share}

    def stage_fingerprint(self, stage: str) -> str:
        """Fingerprint of a map stage: its parameters alone; its fragments add their inputs."""
        return fingerprint(stage=stage, **self.parameters[stage])

    @cached_property
    def fragments(self) -> tuple[Fragment, ...]:
        documents = self.pipeline.documents
        return tuple(
            cut_fragments(
                list(self.files), SourceType(documents.type), documents.fragment_bytes, self.stage_fingerprint(PASSAGES)
            )
        )

    @cached_property
    def selection_fingerprint(self) -> str:
        members = fingerprint_set([fragment.fingerprint for fragment in self.fragments])
        return fingerprint(stage=SELECTION, passages=members, **self.parameters[SELECTION])


@dataclass(frozen=True)
class FragmentFacts:
    """What selection knows of one passages fragment."""

    passages: str
    documents_in: int
    documents_out: int
    dropped: dict[str, int]
    passages_in: int
    tokens: int
    duplicate_ids: int
    duplicate_texts: int
    digest: int

    @property
    def kept(self) -> int:
        return self.passages_in - self.duplicate_ids - self.duplicate_texts

    def embeddings_fragment(self, stage_fingerprint: str) -> str:
        """The embeddings fragment made of this one: it changes with the passages and with the set of those left out."""
        return fingerprint(
            stage=stage_fingerprint, passages=self.passages, excluded=[self.digest, self.passages_in - self.kept]
        )


FACTS_SCHEMA = pa.schema(
    [
        ("passages", pa.string()),
        ("documents_in", pa.int64()),
        ("documents_out", pa.int64()),
        ("dropped", pa.string()),
        ("passages_in", pa.int64()),
        ("tokens", pa.int64()),
        ("duplicate_ids", pa.int64()),
        ("duplicate_texts", pa.int64()),
        ("digest", pa.uint64()),
    ]
)


@dataclass(frozen=True)
class Embedded:
    """The identities that follow from selection alone: the embeddings fragments."""

    facts: tuple[FragmentFacts, ...]
    embeddings_fingerprint: str
    embeddings: dict[str, str]
    rows: int
    encoded: "Embedded | None" = None
    deduplicated: "Deduplicated | None" = None


@dataclass(frozen=True)
class Deduplicated:
    """The identities of deduplication by meaning: centroids, pairs, what goes, and the embeddings that stay.

    Pairs of an exact join are kept whatever the cells they were found by: these are decided with the first join. Other
    joins find others by other cells: `index_cells` is the k-means of the index, which theirs is where it suits.
    `clustering` says by which cells pairs were found, once there is a decision, and None where there were none.
    """

    centroids: str
    pairs: str
    removals: dict[str, Any]
    kept: str
    join: Join
    floor: float
    similarity: float
    seed: int
    rule: str
    earlier: str | None = None
    index_cells: Clustering | None = None
    clustering: Clustering | None = None

    @classmethod
    def of(cls, resolved: Resolved, embedded: Embedded, earlier: str | None = None) -> "Deduplicated":
        """Those of the embeddings of a pipeline file: of the whole corpus, or of what is to decide since an earlier
        decision."""
        asked, dimension = resolved.pipeline.deduplicate, resolved.encoder.dimension
        cells = shared_clustering(resolved.pipeline.index, embedded.rows, 1, dimension)
        return cls.by_cells(resolved, embedded, earlier, None if asked.join is Join.EXACT else cells)

    @classmethod
    def by_cells(
        cls, resolved: Resolved, embedded: Embedded, earlier: str | None, index_cells: Clustering | None
    ) -> "Deduplicated":
        """Those where the index had other cells to share."""
        asked = resolved.pipeline.deduplicate
        members = fingerprint_set(list(embedded.embeddings.values()))
        centroids = fingerprint(stage=CENTROIDS, of=PAIRS, version=KEPT_VERSION, embeddings=members, seed=asked.seed)
        since: dict[str, Any] = {} if earlier is None else {"since": earlier}
        since |= {} if index_cells is None else {"index_cells": index_cells.to_json()}
        pairs = fingerprint(stage=PAIRS, centroids=centroids, join=asked.join.value, floor=asked.least, **since)
        rule = {"pairs": pairs, "selection": resolved.selection_fingerprint, "keep": asked.keep, "seed": asked.seed}
        if asked.level is Level.DOCUMENT:
            rule |= {"level": asked.level.value, "share": asked.covered_share}
        kept = fingerprint(stage=KEPT, similarity=asked.similarity, **rule)
        found = centroids, pairs, rule, kept, asked.join, asked.least, asked.similarity, asked.seed
        return cls(*found, rule=_rule(resolved), earlier=earlier, index_cells=index_cells)

    def centroids_of(self, clustering: Clustering) -> str:
        """The centroids of a k-means."""
        return fingerprint(stage=CENTROIDS, of=self.centroids, **clustering.to_json())

    @property
    def standing(self) -> str | None:
        """What is carried over of an earlier decision."""
        return None if self.earlier is None else fingerprint(stage=STANDING, pairs=self.pairs)

    @property
    def removal(self) -> str:
        """What goes at the similarity of the file."""
        return self.removal_at(self.similarity)

    def removal_at(self, similarity: float) -> str:
        """What goes from a similarity on."""
        return fingerprint(stage=REMOVAL, similarity=similarity, **self.removals)

    def fragment(self, embeddings: str) -> str:
        """The fragment of what stays of an embeddings fragment."""
        return fragment_of(self.kept, embeddings)


def centroids_job(
    root: str, plan: Deduplicated, encoded: Embedded, clustering: Clustering, dimension: int
) -> ClusteringJob:
    """What finds the centroids that deduplication of some embeddings joins by."""
    return ClusteringJob(
        root,
        plan.centroids_of(clustering),
        encoded.embeddings_fingerprint,
        tuple(sorted(encoded.embeddings.values())),
        encoded.rows,
        clustering.spec(dimension, plan.seed),
    )


def pair_recall_path(pairs: str) -> str:
    """What a join found of all pairs: written when all its parts are joined."""
    return f"{stage_folder(PAIRS, pairs)}/recall.json"


def _rule(resolved: Resolved) -> str:
    """Identity of what decides, whatever the corpus: the vectors and the parameters."""
    return fingerprint(stage=KEPT, embeddings=resolved.stage_fingerprint(EMBEDDINGS), **resolved.parameters[KEPT])


def deduplication_of(resolved: Resolved, embedded: Embedded, store: Store) -> Deduplicated:
    """The decision of the newest version of the index by the same rule, where that is of this corpus; else the one
    that builds upon it, if what it was about is still there; where there is none, one about the whole corpus. About a
    part of it is decided by itself."""
    if part_of_corpus(resolved, embedded.facts) is not None:
        return Deduplicated.of(resolved, embedded)
    for found in earlier_decisions(store, resolved.pipeline.name, _rule(resolved)):
        cells = Clustering.from_json(found.record["index_cells"])  # a decision stands whatever the index is since
        again = Deduplicated.by_cells(resolved, embedded, found.earlier, cells)
        if again.kept == found.kept:
            return again
        if can_build_upon(store, found, embedded.embeddings_fingerprint, embedded.embeddings.values()):
            return Deduplicated.of(resolved, embedded, found.kept)
    return Deduplicated.of(resolved, embedded)


@dataclass(frozen=True, kw_only=True)
class Chain(Embedded):
    """And those of the index and its version, once it is known which index."""

    spec: IndexSpec
    transforms_fingerprint: str | None
    shared_centroids: str | None
    training_fingerprint: str
    shards_fingerprint: str
    evaluation_fingerprint: str
    version: str

    def stages(self, resolved: Resolved) -> dict[str, str]:
        """Fingerprints of all stages, by name."""
        return {
            PASSAGES: resolved.stage_fingerprint(PASSAGES),
            SELECTION: resolved.selection_fingerprint,
            EMBEDDINGS: self.embeddings_fingerprint,
            TRAINING: self.training_fingerprint,
            SHARDS: self.shards_fingerprint,
            EVALUATION: self.evaluation_fingerprint,
            **({} if self.transforms_fingerprint is None else {TRANSFORMS: self.transforms_fingerprint}),
            **({} if self.shared_centroids is None else {CENTROIDS: self.shared_centroids}),
            **self._deduplication(),
        }

    def _deduplication(self) -> dict[str, str]:
        if self.encoded is None or self.deduplicated is None:
            return {}
        found = self.deduplicated
        return {
            ENCODED: self.encoded.embeddings_fingerprint,
            PAIRS: found.pairs,
            REMOVAL: found.removal,
            KEPT: found.kept,
        }


@dataclass(frozen=True)
class StagePlan:
    """One stage: what is done and what is to do, in fragments; rows and bytes to read; None where it is not known
    yet."""

    name: str
    fingerprint: str | None
    done: int | None
    todo: int | None
    rows: int | None = None
    bytes_to_read: int | None = None
    why: str = ""


@dataclass(frozen=True)
class Plan:
    """What a run would do. `version` is None until selection is done, since what stays decides it. A run that `covers`
    compares its version, row by row, with what should be in it."""

    resolved: Resolved
    stages: tuple[StagePlan, ...]
    version: str | None
    published: bool
    alias_moves: bool
    alias_head: int
    notes: tuple[str, ...] = field(default=())
    covers: bool = False

    @property
    def up_to_date(self) -> bool:
        return self.published and not self.alias_moves

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.resolved.pipeline.name,
            "stages": [vars(stage) for stage in self.stages],
            "version": self.version,
            "published": self.published,
            "alias_moves": self.alias_moves,
            "up_to_date": self.up_to_date,
            "warnings": list(self.resolved.warnings),
            "notes": list(self.notes),
        }


def resolve(pipeline: PipelineFile, origin: Origin) -> Resolved:
    """Look up files, columns and model.

    Raises:
        PipelineFileInvalid: something that the file names is not there, or does not fit the model.
    """
    card = _model_card(pipeline, origin)
    warnings = _check_model(pipeline, card, origin)
    files = find_files(pipeline.documents, origin)
    reader = document_reader(pipeline.documents, files, origin)
    _check_traffic(pipeline, reader, origin)
    dimension = pipeline.embedding.dimension or card.dimension
    metric = pipeline.index.metric or _own_metric(card, warnings)
    auto = pipeline.embedding.precision == "auto"
    shared: dict[str, Any] = {
        "dimension": dimension,
        "normalize": metric is Metric.COSINE,
        "precision": Precision.FLOAT32 if auto else pipeline.embedding.precision,
        "batch_tokens": pipeline.embedding.batch_tokens,
        "trust_remote_code": pipeline.embedding.trust_remote_code,
        "layers": pipeline.embedding.layers,
        "backend": pipeline.embedding.backend,
    }
    encoder = encoder_for(card, prompt=_prompt(pipeline, card, "document"), **shared)
    query_encoder = encoder_for(card, prompt=_prompt(pipeline, card, "query"), task="query", **shared)
    chunker = _chunker(pipeline, card, encoder)
    pipeline = _with_known_index(pipeline, metric, dimension, origin)
    _check_evaluation(pipeline, origin)
    found = tuple(files), reader, card, chunker, encoder, query_encoder, tuple(warnings), metric
    return Resolved(pipeline, *found, decided=not auto)


def alias_head(pipeline: PipelineFile, store: Store) -> int:
    """Number of the alias entry that a plan starts from; 0 without one. Read before the corpus is looked at, so that
    whoever
    publishes a later state of it meanwhile is not undone."""
    name = pipeline.publish.alias
    entry = Catalog(store, pipeline.name).alias(name) if name else None
    return entry.number if entry else 0


def make_plan(resolved: Resolved, store: Store, head: int) -> Plan:
    """The plan against what is in the store; starts nothing, reads no rows of data."""
    resolved = decided_before(resolved, store)
    past = last_run(store, resolved.pipeline.name)
    passages = plan_passages(resolved, store, past)
    facts = read_facts(store, resolved.selection_fingerprint)
    selection = _selection_plan(resolved, facts, past, passages)
    embedded = embedded_of(resolved, facts) if facts is not None and resolved.decided else None
    asked = resolved  # a run chooses the index by itself, and says how
    kept = deduplicated_of(resolved, embedded, store) if embedded is not None else None
    if kept is not None:
        resolved = chosen_before(resolved, store, kept.rows)
    if kept is None or not resolved.index_chosen:
        known = [_embeddings_plan(resolved, embedded, store, past)] if embedded else []
        known += _kept_plan(resolved, embedded, kept, store) if embedded else []
        later = known + [_unknown_plan(name, resolved, past) for name in STAGES[2 + bool(embedded) :]]
        return Plan(asked, (passages, selection, *later), None, False, True, head)
    chain = make_chain(resolved, kept)
    catalog = Catalog(store, resolved.pipeline.name)
    published = catalog.has_manifest(chain.version)
    later = [
        _embeddings_plan(resolved, chain.encoded or chain, store, past),
        *_kept_plan(resolved, chain.encoded or chain, chain, store),
        _training_plan(resolved, chain, store, past),
        _shards_plan(resolved, chain, store, past, published),
        _evaluation_plan(resolved, chain, store, past),
    ]
    moves, note = alias_moves(resolved, catalog, chain.version)
    return Plan(asked, (passages, selection, *later), chain.version, published, moves, head, (note,) if note else ())


def _unknown_plan(stage: str, resolved: Resolved, past: PastRun | None) -> StagePlan:
    """A stage whose inputs are not known before selection: what has changed for it all the same."""
    if stage == EMBEDDINGS and not resolved.decided:
        return StagePlan(stage, None, None, None, why="precision auto: chosen by the run, on texts of the corpus")
    if stage != EMBEDDINGS and not resolved.index_chosen:
        return StagePlan(stage, None, None, None, why="index auto: chosen by the run, on vectors of the corpus")
    stage_fingerprint = resolved.stage_fingerprint(stage) if stage == EMBEDDINGS else None
    changed = differences(past.parameters.get(stage, {}), resolved.parameters[stage]) if past else ""
    why = f"changed parameter: {changed}" if changed else "follows from selection"
    return StagePlan(stage, stage_fingerprint, None, None, why=why)


def plan_passages(resolved: Resolved, store: Store, past: PastRun | None) -> StagePlan:
    stage_fingerprint = resolved.stage_fingerprint(PASSAGES)
    todo = pending_passages(resolved, store)
    size_bytes = sum(fragment.size_bytes for fragment in todo)
    why = _why_passages(resolved, past, len(todo))
    done = len(resolved.fragments) - len(todo)
    return StagePlan(PASSAGES, stage_fingerprint, done, len(todo), None, size_bytes, why)


def pending_passages(resolved: Resolved, store: Store) -> list[Fragment]:
    done = finished_fragments(store, PASSAGES, resolved.stage_fingerprint(PASSAGES))
    return [fragment for fragment in resolved.fragments if fragment.fingerprint not in done]


def finished_fragments(store: Store, stage: str, stage_fingerprint: str) -> set[str]:
    """Fingerprints of the fragments of a stage that exist."""
    names = store.names(stage_folder(stage, stage_fingerprint))
    return {name.removesuffix(".parquet") for name in names if name.endswith(".parquet") and name.count(".") == 1}


def facts_path(selection_fingerprint: str) -> str:
    """The table of facts per fragment: written last, so that it says that selection is done."""
    return f"{stage_folder(SELECTION, selection_fingerprint)}/fragments.parquet"


def read_facts(store: Store, selection_fingerprint: str) -> list[FragmentFacts] | None:
    """Facts per fragment of a finished selection, None when it is not finished."""
    try:
        table = read_fragment(store, facts_path(selection_fingerprint))
    except FileNotFoundError:
        return None
    rows = table.select(FACTS_SCHEMA.names).to_pylist()
    return [FragmentFacts(**{**row, "dropped": json.loads(row["dropped"])}) for row in rows]


def facts_table(facts: Sequence[FragmentFacts]) -> pa.Table:
    rows = [{**vars(fact), "dropped": json.dumps(fact.dropped, sort_keys=True)} for fact in facts]
    return pa.Table.from_pylist(rows, schema=FACTS_SCHEMA)


def embedded_of(resolved: Resolved, facts: Sequence[FragmentFacts]) -> Embedded:
    """The embeddings fragments of a finished selection."""
    stage = resolved.stage_fingerprint(EMBEDDINGS)
    kept = [fact for fact in facts if fact.kept]
    embeddings = {fact.passages: fact.embeddings_fragment(stage) for fact in kept}
    return Embedded(tuple(facts), stage, embeddings, sum(fact.kept for fact in kept))


def part_of_corpus(resolved: Resolved, facts: Sequence[FragmentFacts]) -> tuple[str, ...] | None:
    """The passages fragments of some facts, sorted, where the corpus has others too; None where these are all."""
    taken = {fact.passages for fact in facts}
    return None if taken >= {fragment.fingerprint for fragment in resolved.fragments} else tuple(sorted(taken))


def deduplicated_of(resolved: Resolved, embedded: Embedded, store: Store) -> Embedded | None:
    """The embeddings that stay: all of them, or those that deduplication by meaning left; None before it is done."""
    if resolved.pipeline.deduplicate.type != "semantic":
        return embedded
    plan = deduplication_of(resolved, embedded, store)
    found = read_decision(store, plan.kept)
    if found is None:
        return None
    names = {passages: plan.fragment(name) for passages, name in embedded.embeddings.items() if found.rows[passages]}
    plan = replace(plan, clustering=Clustering.from_json(found.record["centroids"]))
    return Embedded(embedded.facts, plan.kept, names, sum(found.rows.values()), embedded, plan)


def make_chain(resolved: Resolved, embedded: Embedded) -> Chain:
    """All identities, of an index that is chosen."""
    spec = index_spec(resolved, embedded.rows)
    members = fingerprint_set(list(embedded.embeddings.values()))
    transforms = _transforms_fingerprint(resolved, members)
    shared = _shared_centroids(resolved, embedded)
    training = fingerprint(
        stage=TRAINING,
        embeddings=members,
        transforms=transforms,
        factory=spec.factory,
        built_with=spec.ef_construction,
        **resolved.parameters[TRAINING],
        **({} if shared is None else {"centroids": shared}),
    )
    part = part_of_corpus(resolved, embedded.facts)
    shards = fingerprint(
        stage=SHARDS,
        training=training,
        selection=resolved.selection_fingerprint,
        **resolved.parameters[SHARDS],
        **({} if part is None else {"part": fingerprint_set(part)}),
    )
    evaluation = fingerprint(
        stage=EVALUATION, shards=shards, **resolved.parameters[EVALUATION], inputs=_evaluation_inputs(resolved)
    )
    # The gate is part of a version, so that what its manifest says of it stays true; shards are copied, not built
    # again.
    gate = resolved.pipeline.gate.model_dump(mode="json") if resolved.pipeline.gate else None
    version = fingerprint(evaluation=evaluation, gate=gate)[:VERSION_HEX_DIGITS]
    return Chain(
        **vars(embedded),
        spec=spec,
        transforms_fingerprint=transforms,
        shared_centroids=shared,
        training_fingerprint=training,
        shards_fingerprint=shards,
        evaluation_fingerprint=evaluation,
        version=version,
    )


def _shared_centroids(resolved: Resolved, embedded: Embedded) -> str | None:
    """The centroids of deduplication, where it clustered as the index would and took out little."""
    plan, encoded = embedded.deduplicated, embedded.encoded
    if plan is None or encoded is None or plan.clustering is None or not most_stay(encoded.rows, embedded.rows):
        return None
    wanted = index_clustering(resolved.pipeline.index, encoded.rows)
    return plan.centroids_of(plan.clustering) if plan.clustering == wanted else None


def _transforms_fingerprint(resolved: Resolved, members: str) -> str | None:
    """Identity of the fitted transforms: their steps, the vectors and the queries that they are fitted to."""
    if not resolved.pipeline.index.transforms:
        return None
    return fingerprint(stage=TRANSFORMS, version=TRANSFORMS_VERSION, embeddings=members, **_transforming(resolved))


def _transforming(resolved: Resolved) -> dict[str, Any]:
    """The steps of the transforms, and the queries that they are fitted to."""
    index = resolved.pipeline.index
    queries = [] if index.queries is None else [content_of(index.queries), resolved.query_encoder.fingerprint()]
    return {"steps": [step_to_json(step) for step in index.steps()], "queries": queries}


def shard_rows(resolved: Resolved, rows: int) -> int:
    return max(1, rows // resolved.pipeline.index.shards)


def searched_rows(resolved: Resolved, rows: int) -> int:
    """Rows among which one index searches: those of a shard, or all where shards own cells of one index."""
    return rows if resolved.pipeline.index.sharding is Sharding.CLUSTER else shard_rows(resolved, rows)


def index_spec(resolved: Resolved, rows: int) -> IndexSpec:
    index, family, dimension = resolved.pipeline.index, chosen_family(resolved), resolved.index_dimension
    factory = index.factory or _factory(resolved.pipeline, family, dimension, searched_rows(resolved, rows))
    return IndexSpec(
        family=family,
        codec=index.codec,
        metric=resolved.index_metric,
        dimension=dimension,
        factory=factory,
        training_rows=index.training_rows,
        seed=index.seed,
        ef_construction=index.ef_construction or DEFAULT_EF_CONSTRUCTION.get(family, 100),
    )


def _factory(pipeline: PipelineFile, family: Family, dimension: int, rows: int) -> str:
    index = pipeline.index
    return factory_string(
        family,
        index.codec,
        dimension,
        hnsw_m=index.hnsw_m or 32,
        nlist=index.nlist,
        rows=rows,
        pq_bytes=index.pq_bytes,
        rabitq_bits=index.rabitq_bits or DEFAULT_RABITQ_BITS,
        opq=index.opq,
        degree=index.degree or DEFAULT_DEGREE,
        leanvec_dimension=index.leanvec_dimension,
    )


def index_candidates(resolved: Resolved, rows: int) -> list[Candidate]:
    """The configurations to choose from for a corpus of so many passages; none where they are too few to measure.

    Raises:
        ValueError: none keeps the budget of bytes.
    """
    clustered = resolved.pipeline.index.sharding is Sharding.CLUSTER
    if rows < LEAST_ROWS and not clustered:
        return []
    whole = searched_rows(resolved, rows)
    sample = max(1, min(SCREENING_SIZES[0], whole, rows - held_out_rows(rows)))
    training_rows, reduce = resolved.pipeline.index.training_rows, not resolved.pipeline.index.transforms
    dimension, metric = resolved.index_dimension, resolved.index_metric
    found = candidates(dimension, metric, whole, resolved.budget(rows), training_rows, sample, reduce=reduce)
    if not clustered:
        return found
    cells = [
        one
        for one in found
        if one.family is Family.IVF
        and not _lacks_cells(resolved, nlist_of(one.spec(dimension, metric, whole, 0, min(training_rows, whole))))
    ]
    if not cells:
        raise ValueError(
            f"sharding (cluster) needs an index of family ivf with a cell for each of {resolved.pipeline.index.shards} "
            f"shards at least, which {rows} vectors cannot train; take sharding hash, or fewer shards"
        )
    return cells


def held_out_rows(rows: int) -> int:
    """Vectors of a corpus that serve as queries when an index is chosen."""
    return min(HELD_OUT_QUERIES, max(1, rows // 10))


def check_budget(resolved: Resolved, rows: int, origin: Origin) -> None:
    """Refuse a budget that no index of so many vectors keeps, whatever its recall."""
    try:
        index_candidates(resolved, rows)
    except ValueError as error:
        limit = resolved.pipeline.index.memory_gib
        memory = f"memory_gib ({limit:g}) for {rows:,} vectors: " if limit is not None else ""
        raise PipelineFileInvalid([origin.problem("index", f"{memory}{error}")]) from error


def chosen_family(resolved: Resolved) -> Family:
    """The family of an index that is chosen."""
    family = resolved.pipeline.index.family
    if family == "auto":
        raise ValueError("index.family (auto) must be chosen before the index is named; choose it by a run")
    return family


def finished_shards(store: Store, fingerprint_: str, shards: int) -> dict[int, ShardRecord]:
    """Records of the shards that are built and whose files are where the record says."""
    names = store.names(stage_folder(SHARDS, fingerprint_))
    records = {}
    for shard in range(shards):
        if shard_file(shard, "json") not in names:
            continue
        record = ShardRecord.from_json(store.read(shard_record_path(fingerprint_, shard)))
        present = store.names(record.folder)
        if all(file.name in present for file in record.files):
            records[shard] = record
    return records


def alias_moves(resolved: Resolved, catalog: Catalog, version: str) -> tuple[bool, str]:
    """Whether publishing the version would move the alias, and a note when it deliberately would not.

    A version that people moved an alias away from, by rollback or promote, is not put back by a run that made nothing
    new; nor does a run whose file still names the old model, its prompts or its dimension, undo a move to a version of
    another. A run with the model of that version does move the alias, to a dimension that it never had or another
    precision too.
    """
    name = resolved.pipeline.publish.alias
    if name is None:
        return False, ""
    head = catalog.alias(name)
    if head is not None and head.version == version:
        return False, ""
    if head is not None and head.reason in ("rollback", "promote") and catalog.has_manifest(version):
        if any(entry.version == version for entry in catalog.history(name)):
            return False, (
                f"alias {name} was moved from version {version} to {head.version} by {head.reason}; "
                f"`penstock promote` puts it back"
            )
    if head is not None and head.reason in DECIDED_MOVES:
        identity = model_identity(resolved.encoder, resolved.query_encoder)
        model = catalog.manifest(head.version)["model"]
        if not is_same_model(identity, model) or _was_left(identity, model, catalog, name):
            stated = model_facts(resolved.encoder, resolved.query_encoder)
            own = stated | {"precision": resolved.pipeline.embedding.precision}  # which may be undecided yet
            return False, (
                f"alias {name} was moved to version {head.version} of model {identity_words(model)} by {head.reason}: "
                f"set embedding.model to that, with its prompts and dimension, where the file has "
                f"{identity_words(own)}; `penstock promote` moves the alias to another version"
            )
    return True, ""


def _was_left(identity: Mapping[str, Any], model: Mapping[str, Any], catalog: Catalog, alias: str) -> bool:
    """Whether an identity of the same model has the dimension of the version before the alias came to that of `model`,
    as the file has that an upgrade of the dimension alone began with."""
    if is_same_dimension(identity, model):
        return False
    versions = [entry.version for entry in reversed(catalog.history(alias)) if catalog.has_manifest(entry.version)]
    models = (catalog.manifest(version)["model"] for version in versions)
    left = next((one for one in models if not is_same_dimension(one, model)), None)
    return left is not None and is_same_dimension(identity, left)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What changed between two sets of parameters, for people; empty when nothing did."""
    changed = [name for name in new if old.get(name) != new[name]] + [name for name in old if name not in new]
    return ", ".join(f"{name} {_short(old.get(name))} → {_short(new.get(name))}" for name in changed)


def _model_card(pipeline: PipelineFile, origin: Origin) -> ModelCard:
    reference = pipeline.embedding.model
    try:
        return read_model_card(reference, model_folder(reference))
    except ModelUnavailable as error:
        message = str(error).removeprefix("embedding.model ").strip()
        raise PipelineFileInvalid([origin.problem("embedding.model", message)]) from error


def _check_traffic(pipeline: PipelineFile, reader: DocumentReader, origin: Origin) -> None:
    """Refuse traffic of an upgrade that is no number, long before it is read."""
    column = pipeline.upgrade.traffic
    kept = dict(reader.keep).get(column) if column is not None else None
    if kept not in (None, *NUMBERS):
        rule = (
            f"({column}) must be a column of numbers ({' or '.join(NUMBERS)}), documents.keep has it as {kept}; "
            f"declare its type there ({{{column}: int64}}), or name another"
        )
        raise PipelineFileInvalid([origin.problem("upgrade.traffic", rule)])


def _check_model(pipeline: PipelineFile, card: ModelCard, origin: Origin) -> list[str]:
    """Warnings of a pipeline that asks for more than the model takes; problems when it cannot be done at all."""
    room = _room(pipeline, card)
    problems = _model_problems(pipeline, card, room, origin)
    if problems:
        raise PipelineFileInvalid(problems)
    tokens = pipeline.passages.tokens
    late = pipeline.passages.type == "late"
    if room is not None and tokens and tokens > room and not late:
        return [
            f"passages.tokens ({tokens}) exceeds the {room} tokens that {card.reference} takes beside its special "
            f"tokens and prompt; longer passages will be truncated, and counted: set it to {room} or less"
        ]
    if room is not None and pipeline.passages.type == "whole":
        return [
            f"passages.type whole: documents beyond the {room} tokens that the model takes will be truncated, "
            "and counted"
        ]
    return []


def _model_problems(pipeline: PipelineFile, card: ModelCard, room: int | None, origin: Origin) -> list[Problem]:
    """What the file asks of the model that it cannot do."""
    problems: list[Problem] = []
    names = pipeline.embedding.prompt_names
    for side, name in (("query", names.query), ("document", names.document)) if names else ():
        if name is not None and name not in card.prompts:
            rule = f"({name}) must be a prompt of the model, which has: {', '.join(sorted(card.prompts)) or 'none'}"
            problems.append(origin.problem(f"embedding.prompt_names.{side}", rule))
    if pipeline.embedding.backend is Backend.OPENVINO and importlib.util.find_spec("openvino") is None:
        rule = "(openvino) needs the packages of the extra: pip install 'penstock[openvino]'; or use torch"
        problems.append(origin.problem("embedding.backend", rule))
    layers = pipeline.embedding.layers
    if layers and card.layers is not None and layers > card.layers:
        rule = f"({layers}) must be at most the model's {card.layers}; lower it or leave it out"
        problems.append(origin.problem("embedding.layers", rule))
    dimension = pipeline.embedding.dimension
    if dimension and dimension > card.dimension:
        rule = f"({dimension}) must be at most the model's {card.dimension}; lower it or leave it out"
        problems.append(origin.problem("embedding.dimension", rule))
    if room is not None and room < 8:
        rule = f"the document prompt leaves {room} of the model's {card.max_tokens} tokens for text; shorten it"
        problems.append(origin.problem("embedding.prompts", rule))
    if pipeline.passages.type == "late" and not can_pool_late(stack := read_module_stack(model_folder(card.reference))):
        rule = (
            "(late) needs a model of Transformer, Pooling(mean) and at most Dense, Normalize after them; "
            f"{card.reference} has {', '.join(stack.kinds)}: choose type tokens, or a model with mean pooling"
        )
        problems.append(origin.problem("passages.type", rule))
    return problems


def _room(pipeline: PipelineFile, card: ModelCard) -> int | None:
    """Tokens that a passage may have, beside special tokens and prompt; None when the model has no window."""
    if card.max_tokens is None:
        return None
    from penstock.cluster.node import tokenizer

    prompt = _prompt(pipeline, card, "document")
    used = int(tokenizer(card.reference, card.tokenizer_hash).count([prompt])[0]) if prompt else 0
    return card.max_tokens - card.special_tokens - used


def _chunker(pipeline: PipelineFile, card: ModelCard, encoder: Encoder) -> Chunker:
    passages = pipeline.passages
    if passages.type == "whole":
        return Chunker(PassageType(passages.type), 0, 0)
    tokens = passages.tokens or _room(pipeline, card) or 256
    overlap = passages.overlap if passages.overlap is not None else tokens // DEFAULT_OVERLAP_SHARE
    return Chunker(PassageType(passages.type), tokens, overlap)


def _prompt(pipeline: PipelineFile, card: ModelCard, side: str) -> str:
    """The text put before documents or queries: that of the file, of the name in the file, or the model's own."""
    prompts, names = pipeline.embedding.prompts, pipeline.embedding.prompt_names
    if prompts is not None:
        return str(getattr(prompts, side))
    name = getattr(names, side) if names is not None else None
    if name is not None:
        return card.prompts.get(name, "")
    return card.document_prompt if side == "document" else card.query_prompt


def _own_metric(card: ModelCard, warnings: list[str]) -> Metric:
    """The metric of the similarity function that the model states; distances are served by cosine, with a warning."""
    if card.similarity == "dot":
        return Metric.INNER_PRODUCT
    if card.similarity in ("euclidean", "manhattan"):
        warnings.append(
            f"{card.reference} states {card.similarity} distance as its similarity; the index compares by cosine: "
            "set index.metric to say which you want"
        )
    return Metric.COSINE


def decided_before(resolved: Resolved, store: Store) -> Resolved:
    """With the precision that an earlier run on this root chose for this encoder, where the file leaves it open."""
    if resolved.decided:
        return resolved
    record = read_json(store, precision_path(resolved.decision_fingerprint))
    return resolved if record is None else resolved.with_precision(Precision(record["chosen"]))


def chosen_before(resolved: Resolved, store: Store, rows: int) -> Resolved:
    """With the index that an earlier run on this root chose for such vectors and such a size, unless they have become
    too few to train it."""
    if resolved.index_chosen:
        return resolved
    record = read_json(store, choice_path(resolved.choice_fingerprint(rows)))
    if record is None:
        return resolved
    chosen = record["chosen"]
    point = SearchParameters.from_json(chosen["parameters"]) if "parameters" in chosen else None
    found = resolved.with_index(Candidate.from_json(chosen), point)
    return found if is_trainable(found, rows) else resolved


def choice_path(choice_fingerprint: str) -> str:
    """The record of the choice of an index: made once for an encoder, a budget and a size."""
    return f"tuning/{choice_fingerprint}.json"


def precision_path(decision_fingerprint: str) -> str:
    """The record of the choice of a precision: made once for an encoder, so that all its vectors are of one kind."""
    return f"encoders/{decision_fingerprint}.json"


def _with_known_index(pipeline: PipelineFile, metric: Metric, dimension: int, origin: Origin) -> PipelineFile:
    """The file with the family and codec of its factory string; refuses an index that cannot be built or fit."""
    index = pipeline.index
    try:
        for step in index.steps():
            dimension, metric = output_dimension(step, dimension), metric_after(step, dimension, metric)
        if index.factory is not None:
            spec = parse_factory(index.factory, dimension, metric, index.seed)
            if index.sharding is Sharding.CLUSTER and spec.family is not Family.IVF:
                raise ValueError(
                    f"sharding (cluster) shares out the cells of family ivf, but factory is {index.factory}"
                )
            known = index.model_copy(update={"family": spec.family, "codec": spec.codec})
            refuse_missing_engine(spec.family, spec.codec)
            return pipeline.model_copy(update={"index": known})
        if index.family == "auto":
            budget = Budget(index.recall, bytes_per_vector=index.bytes_per_vector)
            reduce = not index.transforms
            candidates(dimension, metric, LARGE_SHARD, budget, LARGE_SHARD, LARGE_SHARD, reduce=reduce)
        else:
            faiss_metric(index.family, index.codec, metric)
            refuse_missing_engine(index.family, index.codec)
            _factory(pipeline, index.family, dimension, LARGE_SHARD)
    except ValueError as error:
        raise PipelineFileInvalid([origin.problem("index", str(error))]) from error
    return pipeline


def _check_evaluation(pipeline: PipelineFile, origin: Origin) -> None:
    """Refuse files of queries and judgements that are not there."""
    evaluate, named = pipeline.evaluate, ("index.queries", pipeline.index.queries)
    for place, path in (("evaluate.queries", evaluate.queries), ("evaluate.relevance", evaluate.relevance), named):
        if isinstance(path, str):
            store, name = split_path(path)
            if store.info(name) is None:
                raise PipelineFileInvalid(
                    [origin.problem(place, f"({path}) must be a file, there is none; check the path")]
                )


def _evaluation_inputs(resolved: Resolved) -> list[str]:
    """Identities of the query and judgement files, and of the query side of the model."""
    evaluate = resolved.pipeline.evaluate
    paths = [path for path in (evaluate.queries, evaluate.relevance) if isinstance(path, str)]
    contents = []
    for path in paths:
        contents.append(content_of(path))
    return [*contents, resolved.query_encoder.fingerprint()]


def content_of(path: str) -> str:
    """sha256 of a file."""
    store, name = split_path(path)
    return hashlib.sha256(store.read(name)).hexdigest()


def split_path(path: str) -> tuple[Store, str]:
    """The store and the name within it of one file, local or on S3."""
    folder, slash, name = path.rpartition("/")
    return connect(folder or slash or "."), name


def _why_passages(resolved: Resolved, past: PastRun | None, todo: int) -> str:
    if past is None:
        return "first run" if todo else "done"
    changed = differences(past.parameters.get(PASSAGES, {}), resolved.parameters[PASSAGES])
    if changed:
        return f"changed parameter: {changed}" if todo else "done before with these parameters"
    before = past.files
    now = {file.source: file.content for file in resolved.files}
    counts = Counter(
        new=sum(source not in before for source in now),
        changed=sum(source in before and before[source] != content for source, content in now.items()),
        removed=sum(source not in now for source in before),
    )
    parts = [f"{count} {name}" for name, count in counts.items() if count]
    if parts:
        return f"inputs: {', '.join(parts)} file{'s' if counts.total() > 1 else ''}"
    return "interrupted run" if todo else "unchanged"


def _selection_plan(
    resolved: Resolved, facts: list[FragmentFacts] | None, past: PastRun | None, passages: StagePlan
) -> StagePlan:
    if facts is not None:
        return StagePlan(
            SELECTION, resolved.selection_fingerprint, 1, 0, sum(fact.passages_in for fact in facts), 0, "unchanged"
        )
    changed = differences(past.parameters.get(SELECTION, {}), resolved.parameters[SELECTION]) if past else ""
    why = f"changed parameter: {changed}" if changed else "passages changed" if past else "first run"
    return StagePlan(SELECTION, resolved.selection_fingerprint, 0, 1, None, None, why)


def _embeddings_plan(resolved: Resolved, chain: Embedded, store: Store, past: PastRun | None) -> StagePlan:
    done = finished_fragments(store, EMBEDDINGS, chain.embeddings_fingerprint)
    todo = [fact for fact in chain.facts if fact.kept and chain.embeddings[fact.passages] not in done]
    rows = sum(fact.kept for fact in todo)
    size_bytes = _passages_bytes(resolved, store, {fact.passages for fact in todo}) if todo else 0
    why = _why(EMBEDDINGS, resolved, past, bool(todo), "passages changed")
    return StagePlan(
        EMBEDDINGS, chain.embeddings_fingerprint, len(chain.embeddings) - len(todo), len(todo), rows, size_bytes, why
    )


def _kept_plan(resolved: Resolved, embedded: Embedded, kept: Embedded | None, store: Store) -> list[StagePlan]:
    """Deduplication by meaning, where it is asked for."""
    if resolved.pipeline.deduplicate.type != "semantic":
        return []
    if kept is not None and kept.deduplicated is not None:
        return [StagePlan(KEPT, kept.deduplicated.kept, len(kept.embeddings), 0, 0, 0, "unchanged")]
    plan = deduplication_of(resolved, embedded, store)
    earlier = read_decision(store, plan.earlier) if plan.earlier else None
    known = set() if earlier is None else set(earlier.encoded.values())
    new = sum(fact.kept for fact in embedded.facts if embedded.embeddings.get(fact.passages) not in known)
    why = f"{new:,} passages to compare"
    if earlier is not None:
        stays = sum(earlier.rows.values())
        why = f"{new:,} passages of new or changed fragments to compare with {stays:,} that stay"
    elif store.info(pair_recall_path(plan.pairs)) is not None:
        why = "to decide again by stored pairs"
    size_bytes = embedded.rows * vector_bytes(resolved)
    return [StagePlan(KEPT, plan.kept, 0, len(embedded.embeddings), embedded.rows, size_bytes, why)]


def _passages_bytes(resolved: Resolved, store: Store, fragments: set[str]) -> int:
    """Size of some passages fragments, by one listing instead of a request for each."""
    objects = store.list(stage_folder(PASSAGES, resolved.stage_fingerprint(PASSAGES)))
    return sum(info.size_bytes for info in objects if PurePosixPath(info.path).stem in fragments)


def _training_plan(resolved: Resolved, chain: Chain, store: Store, past: PastRun | None) -> StagePlan:
    done = store.info(training_record_path(chain.training_fingerprint)) is not None
    rows = 0 if done else min(chain.rows, chain.spec.training_rows)
    why = _why(TRAINING, resolved, past, not done, "embeddings changed")
    size_bytes = rows * vector_bytes(resolved)
    return StagePlan(TRAINING, chain.training_fingerprint, int(done), int(not done), rows, size_bytes, why)


def _shards_plan(resolved: Resolved, chain: Chain, store: Store, past: PastRun | None, published: bool) -> StagePlan:
    shards = resolved.pipeline.index.shards
    todo = 0 if published else shards - len(finished_shards(store, chain.shards_fingerprint, shards))
    rows = chain.rows * todo // shards
    why = _why(SHARDS, resolved, past, todo > 0, "index or embeddings changed")
    return StagePlan(SHARDS, chain.shards_fingerprint, shards - todo, todo, rows, rows * vector_bytes(resolved), why)


def _evaluation_plan(resolved: Resolved, chain: Chain, store: Store, past: PastRun | None) -> StagePlan:
    done = store.info(evaluation_path(chain.evaluation_fingerprint)) is not None
    rows = 0 if done else chain.rows
    why = _why(EVALUATION, resolved, past, not done, "index changed")
    size_bytes = rows * vector_bytes(resolved)
    return StagePlan(EVALUATION, chain.evaluation_fingerprint, int(done), int(not done), rows, size_bytes, why)


def evaluation_path(evaluation_fingerprint: str) -> str:
    return f"{stage_folder(EVALUATION, evaluation_fingerprint)}/evaluation.json"


def vector_bytes(resolved: Resolved) -> int:
    """Bytes of one stored vector."""
    return resolved.encoder.dimension * (2 if resolved.pipeline.embedding.store == "float16" else 4)


def _why(stage: str, resolved: Resolved, past: PastRun | None, todo: bool, otherwise: str) -> str:
    if not todo:
        return "unchanged"
    if past is None:
        return "first run"
    changed = differences(past.parameters.get(stage, {}), resolved.parameters[stage])
    return f"changed parameter: {changed}" if changed else otherwise


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 24 else text[:12] + "…"


def _lacks_cells(resolved: Resolved, cells: int) -> bool:
    """Whether there are more shards than cells for them to own."""
    index = resolved.pipeline.index
    return index.sharding is Sharding.CLUSTER and cells < index.shards


def is_trainable(resolved: Resolved, rows: int) -> bool:
    """Whether so many passages train the index, with a cell for every shard that is to own some."""
    spec = index_spec(resolved, rows)
    if _lacks_cells(resolved, nlist_of(spec)):
        return False
    return min(rows, spec.training_rows) >= max(1, fewest_training_rows(spec))


def check_trainable(resolved: Resolved, rows: int, origin: Origin) -> None:
    """Refuse an index that the corpus is too small to train."""
    spec = index_spec(resolved, rows)
    if _lacks_cells(resolved, nlist_of(spec)):
        shards = resolved.pipeline.index.shards
        rule = f"({shards}) must be at most the {nlist_of(spec)} cells of {rows} passages, which shards own whole"
        raise PipelineFileInvalid([origin.problem("index.shards", f"{rule}; lower it, or set index.nlist")])
    needed = max(1, fewest_training_rows(spec))
    if min(rows, spec.training_rows) < needed:
        rule = (
            f"({spec.factory}) needs at least {needed} passages to train, got {rows} "
            f"and index.training_rows {spec.training_rows}; "
            "choose family flat or hnsw with codec none or sq8, or a smaller nlist"
        )
        raise PipelineFileInvalid([origin.problem("index", rule)])
