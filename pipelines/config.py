"""The pipeline file as one tree of frozen models: what the YAML file, `--set` and the recorded run all are."""

import re
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from penstock.operators.deduplication import DuplicateIds
from penstock.operators.encoding import Backend, Precision
from penstock.operators.independent_set import Keep
from penstock.operators.indexing import LEANVEC_CODECS, OPQ_CODECS, ROTATED_CODECS, Codec, Family, Metric, codecs_of
from penstock.operators.mixed_spaces import QueryMode
from penstock.operators.sharding import Sharding
from penstock.operators.similar_pairs import Join, refuse_similarity
from penstock.operators.transforms import Step, step_from_json
from penstock.operators.vector_codecs import VectorCodec

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
Count = Annotated[int, Field(strict=True, ge=1)]
Whole = Annotated[int, Field(strict=True, ge=0)]
Share = Annotated[float, Field(strict=True, ge=0.0, le=1.0, allow_inf_nan=False)]
Switch = Annotated[bool, Field(strict=True)]
Text = Annotated[str, StringConstraints(min_length=1)]
ColumnType = Literal["string", "int64", "float64", "bool", "timestamp"]
Amount = Annotated[float, Field(strict=True, ge=0.0, allow_inf_nan=False)]
Window = Annotated[str, StringConstraints(pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$")]
LEAST_STORED = 0.85  # so that most other thresholds need no other join
ENVIRONMENT_PATHS = (
    ("root",),
    ("documents", "path"),
    ("embedding", "model"),
    ("evaluate", "queries"),
    ("evaluate", "relevance"),
    ("index", "queries"),
    ("upgrade", "model"),
    ("upgrade", "log"),
)


class Section(BaseModel):
    """A part of the pipeline file: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=False, hide_input_in_errors=True)


class DocumentsBase(Section):
    """What all document sources share."""

    duplicate_ids: DuplicateIds = Field(
        DuplicateIds.ERROR, description="Documents with the same id: stop, or keep the first or last by path and row."
    )
    fragment_bytes: Annotated[int, Field(strict=True, ge=1024)] = Field(
        33_554_432, description="Target size of a fragment: the unit of work, of retry and of durability."
    )
    max_file_bytes: Count = Field(
        1_073_741_824, description="Decoded bytes of one file (of one fragment, where a file can be cut) at most."
    )


class TabularDocuments(DocumentsBase):
    """Rows of Parquet, JSONL (plain, .gz, .zst) or CSV files."""

    type: Literal["parquet", "jsonl", "csv"]
    path: Text | tuple[Text, ...] = Field(description="File, folder or glob, local or s3://; or a list of them.")
    text: Text | tuple[Text, ...] = Field("text", description="Text column, or several, joined by a line break.")
    id: Text | None = Field(None, description="Id column; without it ids are derived from the content.")
    keep: tuple[Text, ...] | dict[Text, ColumnType] = Field(
        (), description="Metadata columns to keep; as a mapping, with their types."
    )


class TextDocuments(DocumentsBase):
    """Text and Markdown files: a file is a document, its path below the pattern's folder is its id."""

    type: Literal["text"]
    path: Text | tuple[Text, ...] = Field(description="File, folder or glob, local or s3://; or a list of them.")
    keep: tuple[Literal["path"], ...] = ()


class DocstringDocuments(DocumentsBase):
    """Docstrings of installed Python packages, read from their sources without importing them."""

    type: Literal["docstrings"]
    packages: tuple[Text, ...] = Field(min_length=1, description='Import names; ["*"] means every installed package.')
    keep: tuple[Literal["module", "kind"], ...] = ("module", "kind")


Documents = Annotated[TabularDocuments | TextDocuments | DocstringDocuments, Field(discriminator="type")]


class Passages(Section):
    """How documents are cut."""

    type: Literal["tokens", "whole", "late"] = "tokens"
    tokens: Annotated[int, Field(strict=True, ge=8)] | None = Field(
        None, description="Window in the model's tokens; without it, all that the model takes."
    )
    overlap: Whole | None = Field(
        None, description="Tokens shared with the window before; without it, an eighth of the window."
    )

    @model_validator(mode="after")
    def _overlap_below_half(self) -> Self:
        if self.tokens and self.overlap and self.overlap * 2 >= self.tokens:
            raise ValueError(f"overlap ({self.overlap}) must be below half of tokens ({self.tokens})")
        if self.type == "whole" and (self.tokens or self.overlap):
            raise ValueError("tokens and overlap have no meaning with type whole; leave them out")
        return self


class Prompts(Section):
    """Put before each text; without this section, the model's own prompts are used."""

    query: str = ""
    document: str = ""


class PromptNames(Section):
    """Prompts by the names that the model gives them."""

    query: Text | None = None
    document: Text | None = None


class Workers(Section):
    """The pool of encoder workers."""

    count: Count | None = Field(None, description="Workers; without it, as many as the cluster's CPUs or GPUs allow.")
    min: Count | None = Field(None, description="Workers at least, of a pool that shrinks and grows; with max.")
    max: Count | None = Field(None, description="Workers at most, of a pool that shrinks and grows; with min.")
    cpus: Count = Field(1, description="CPUs, and so threads, of a worker.")
    gpus: Annotated[float, Field(strict=True, ge=0.0, allow_inf_nan=False)] = Field(
        0.0, description="GPUs of a worker; may be a fraction."
    )
    timeout_s: Annotated[float, Field(strict=True, gt=0.0, allow_inf_nan=False)] = Field(
        600.0, description="A batch that takes longer counts as hung: its worker is started again."
    )

    @model_validator(mode="after")
    def _count_or_range(self) -> Self:
        if (self.min is None) != (self.max is None):
            raise ValueError("min and max go together: give both, or count")
        if self.count is not None and self.max is not None:
            raise ValueError(f"count ({self.count}) and max ({self.max}) exclude each other: give one of them")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min ({self.min}) must be at most max ({self.max})")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus ({self.gpus:g}) must be a whole number, or a fraction below 1")
        return self


class Embedding(Section):
    """The model that turns passages into vectors."""

    model: Text = Field(description="Hub id@revision, folder, s3:// folder, or package:<module>.")
    dimension: Count | None = Field(None, description="Keep only the first components (Matryoshka models).")
    layers: Count | None = Field(None, description="Run only the first transformer layers (needs layers_trained).")
    layers_trained: Switch = Field(
        False, description="The model was trained so that its first layers serve alone (2D Matryoshka, Starbucks)."
    )
    precision: Precision | Literal["auto"] = Field(
        "auto", description="auto: the fastest whose vectors agree with float32 on texts of the corpus."
    )
    backend: Backend = Field(Backend.TORCH, description="What runs the model: torch, or openvino on Intel CPUs.")
    prompts: Prompts | None = None
    prompt_names: PromptNames | None = None
    batch_tokens: Count | None = Field(None, description="Padded tokens of a batch; without it, found by measurement.")
    store: Literal["float16", "float32"] = Field("float16", description="Format of the stored vectors.")
    trust_remote_code: Switch = Field(False, description="Run Python code that the model's folder brings along.")
    workers: Workers = Workers()

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        if self.layers is not None and not self.layers_trained:
            raise ValueError(
                f"layers ({self.layers}) gives useless vectors unless the model was trained for it (2D Matryoshka, "
                "Starbucks): set layers_trained to true if it was, or leave layers out"
            )
        if self.prompts is not None and self.prompt_names is not None:
            raise ValueError("prompts and prompt_names exclude each other: give the texts, or their names in the model")
        if self.backend is not Backend.TORCH and self.workers.gpus:
            raise ValueError(f"backend ({self.backend.value}) runs on CPUs: leave workers.gpus out")
        if self.backend is not Backend.TORCH and self.layers is not None:
            raise ValueError(f"layers ({self.layers}) needs backend torch")
        return self


KEEP_COLUMN = re.compile(r"column:(\S+)(?: (asc|desc))?")


# Where near-duplicates of documents are taken out of training corpora, they share 0.8 of their text (Lee et al.,
# arXiv:2107.06499; RefinedWeb, arXiv:2306.01116). What is lost of a document that goes is at most the rest.
COVERED_SHARE = 0.8


class Level(StrEnum):
    """What goes: single passages, or whole documents."""

    PASSAGE = "passage"
    DOCUMENT = "document"


class Deduplicate(Section):
    """Which passages stay out of the index because another says the same."""

    type: Literal["exact", "semantic", "none"] = Field(
        "exact", description="exact: the same text; semantic: also nearly the same vector; none: all stay."
    )
    similarity: Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)] = Field(
        0.95, description="Cosine similarity from which on two passages mean the same (type semantic)."
    )
    keep: Text = Field(
        "longest", description="Which of them stays: longest, first, densest, random, or column:NAME asc or desc."
    )
    join: Join = Field(
        Join.EXACT, description="exact finds every pair; graph and cluster miss some, and need no part of the cells."
    )
    floor: Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)] | None = Field(
        None, description="Least similarity of the pairs that are stored; default 0.85, or similarity if that is lower."
    )
    seed: Whole = 20_260_103
    level: Level = Field(
        Level.PASSAGE, description="passage, or document: one goes whole when one that stays covers it."
    )
    share: Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)] | None = Field(
        None, description="Share of a document's passages that are similar to some of one other (level document)."
    )

    @property
    def covered_share(self) -> float:
        """From which share on a document is covered by another."""
        return COVERED_SHARE if self.share is None else self.share

    @property
    def least(self) -> float:
        """The similarity down to which pairs are looked for and stored."""
        return min(LEAST_STORED, self.similarity) if self.floor is None else self.floor

    @property
    def by_text(self) -> bool:
        """Whether passages with the same text are left out before they are embedded. Not where documents go as a whole:
        each needs all its passages to be judged by, and to stay with."""
        return self.type != "none" and self.level is not Level.DOCUMENT

    def keep_rule(self) -> Keep:
        """The order in which passages are preferred."""
        return Keep.COLUMN if KEEP_COLUMN.fullmatch(self.keep) else Keep(self.keep)

    def keep_column(self) -> tuple[str, bool]:
        """The column that decides, and whether its largest values are preferred; no name where another rule does."""
        match = KEEP_COLUMN.fullmatch(self.keep)
        return (match[1], match[2] == "desc") if match else ("", False)

    @model_validator(mode="after")
    def _options_are_of_type_semantic(self) -> Self:
        given = sorted(self.model_fields_set - {"type"})
        if self.type != "semantic" and given:
            raise ValueError(f"{given[0]} belongs to type semantic, but type is {self.type}; leave it out")
        words = [rule.value for rule in Keep if rule is not Keep.COLUMN]
        if not KEEP_COLUMN.fullmatch(self.keep) and self.keep not in words:
            raise ValueError(f"keep ({self.keep}) must be one of {', '.join(words)}, or column:NAME asc or desc")
        if self.share is not None and self.level is not Level.DOCUMENT:
            raise ValueError(f"share ({self.share}) belongs to level document, but level is passage; leave it out")
        if self.least > self.similarity:
            raise ValueError(
                f"floor ({self.least}) must be at most similarity ({self.similarity}): pairs below it are not stored"
            )
        refuse_similarity(self.least, self.join)
        return self


class Transform(Section):
    """A map of vectors before they are coded."""

    type: Literal["centring", "normalization", "pca", "rotation", "sphering", "truncation", "whitening"]
    dimension: Count | None = Field(None, description="Components kept (pca, sphering, truncation, whitening).")
    both_sides: Switch | None = Field(None, description="Centre queries too (centring); default false.")
    eigenvalue_floor: Annotated[float, Field(strict=True, gt=0, lt=1)] | None = Field(
        None, description="Least share of the largest eigenvalue (sphering, whitening); default 1e-6."
    )
    seed: Whole | None = Field(None, description="Of the random rotation (rotation); default 0.")

    @model_validator(mode="after")
    def _options_belong_to_type(self) -> Self:
        self.step()
        return self

    def step(self) -> Step:
        """The step that it names.

        Raises:
            ValueError: an option of another type, or a missing one.
        """
        given = self.model_dump(exclude_none=True)
        if self.type == "rotation":
            given = {"seed": 0} | given
        if self.type in ("truncation", "sphering") and self.dimension is None:
            raise ValueError(f"type ({self.type}) needs a dimension: how many components to keep")
        return step_from_json(given)


# The family or codecs that an option of the index belongs to.
OPTION_OWNERS: dict[str, tuple[str, ...]] = {
    "hnsw_m": (Family.HNSW,),
    "ef_construction": (Family.HNSW, Family.VAMANA),
    "degree": (Family.VAMANA,),
    "leanvec_dimension": LEANVEC_CODECS,
    "nlist": (Family.IVF,),
    "iterations": (Family.IVF,),
    "pq_bytes": OPQ_CODECS,
    "opq": OPQ_CODECS,
    "rabitq_bits": ROTATED_CODECS,
}


class Index(Section):
    """The approximate nearest neighbour index."""

    family: Family | Literal["auto"] = Field(
        "auto", description="auto: family, codec and re-ranking are chosen by measurement, within what is asked below."
    )
    codec: Codec = Codec.NONE
    metric: Metric | None = Field(None, description="Without it, the model's own similarity.")
    shards: Annotated[int, Field(strict=True, ge=1, le=100_000)] = 1
    sharding: Sharding = Field(
        Sharding.HASH,
        description="hash, or cluster: a shard owns cells of the index, and queries need few (family ivf).",
    )
    recall: Share = Field(0.95, description="Recall that the default operating point must reach.")
    bytes_per_vector: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Index bytes per vector, at most; vectors stored for re-ranking do not count (family auto)."
    )
    memory_gib: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] | None = Field(
        None, description="GiB that the index files of all shards together may have (family auto)."
    )
    latency_ms: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Milliseconds of one query in one shard on one thread, at most (family auto)."
    )
    rerank: Switch = Field(False, description="Re-rank candidates with stored vectors (memory-mapped).")
    rerank_codec: VectorCodec = Field(VectorCodec.FLOAT16, description="How vectors are stored for re-ranking.")
    transforms: tuple[Transform, ...] = Field((), description="Maps of vectors before they are coded, in order.")
    queries: Text | None = Field(
        None, description="JSONL file of queries (text) that are asked, which sphering is fitted to."
    )
    hnsw_m: Annotated[int, Field(strict=True, ge=2, le=512)] | None = Field(
        None, description="Links per vertex (family hnsw); default 32."
    )
    ef_construction: Count | None = Field(
        None, description="Candidates while building (families hnsw and vamana); default 100, of vamana 200."
    )
    degree: Annotated[int, Field(strict=True, ge=2, le=512)] | None = Field(
        None, description="Links per vertex, at most (family vamana); default 64."
    )
    leanvec_dimension: Count | None = Field(
        None, description="Components searched first (codecs leanvec4x8 and leanvec8x8); default half of them."
    )
    nlist: Count | None = Field(
        None, description="Cells (family ivf); default about 4 times the root of a shard's rows."
    )
    iterations: Whole = Field(
        0, description="k-means iterations over all vectors after those over the sample (family ivf)."
    )
    pq_bytes: Count | None = Field(
        None, description="Bytes per vector (codecs pq and pqfs); a divisor of the dimension, of its half for pqfs."
    )
    opq: Switch = Field(False, description="Rotate such that the codes err least (codecs pq and pqfs).")
    rabitq_bits: Annotated[int, Field(strict=True, ge=1, le=8)] | None = Field(
        None, description="Bits per component (codecs rabitq and rabitqfs); default 4."
    )
    factory: Text | None = Field(
        None, description="A faiss factory string, instead of family, codec and their options."
    )
    training_rows: Count = Field(262_144, description="Vectors in the training sample, at most.")
    seed: Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)] = 20_260_101

    @model_validator(mode="after")
    def _one_way_to_say_which_index(self) -> Self:
        """A factory string, a family with its options, or a budget."""
        budget = [name for name in ("bytes_per_vector", "memory_gib", "latency_ms") if getattr(self, name) is not None]
        options = [name for name in ("codec", *OPTION_OWNERS) if name in self.model_fields_set]
        if self.factory is not None:
            given = ["family"] * (self.family != "auto") + options + budget
            rule = "follows from factory; leave it or factory out"
        elif self.family == "auto":
            given = options + ["rerank"] * ("rerank" in self.model_fields_set)
            rule = "is chosen by family auto; name a family, or leave it out"
        else:
            given, rule = (
                budget,
                f"is what family auto chooses by, but family is {self.family}; leave one of the two out",
            )
        if given:
            raise ValueError(f"{given[0]} ({getattr(self, given[0])}) {rule}")
        return self

    def steps(self) -> tuple[Step, ...]:
        """The transforms, as operators know them."""
        return tuple(transform.step() for transform in self.transforms)

    @model_validator(mode="after")
    def _sharding_fits(self) -> Self:
        if self.sharding is Sharding.CLUSTER and self.shards == 1:
            raise ValueError("sharding (cluster) shares cells out to several shards: set shards to 2 or more")
        if self.sharding is Sharding.CLUSTER and self.family not in ("auto", Family.IVF):
            raise ValueError(f"sharding (cluster) shares out the cells of family ivf, but family is {self.family}")
        return self

    @model_validator(mode="after")
    def _transforms_fit(self) -> Self:
        needs = any(transform.type == "sphering" for transform in self.transforms)
        if needs != (self.queries is not None):
            raise ValueError("queries and a transform of type sphering need each other: give both, or none")
        chosen = self.family == "auto" and self.factory is None
        if "rerank_codec" in self.model_fields_set and not self.rerank and not chosen:
            raise ValueError(f"rerank_codec ({self.rerank_codec}) is of stored vectors: set rerank to true")
        return self

    @model_validator(mode="after")
    def _options_fit_family_and_codec(self) -> Self:
        if self.family == "auto":
            return self
        for option, owners in OPTION_OWNERS.items():
            value = getattr(self, option)
            if value not in (None, False) and not {self.family, self.codec} & set(owners):
                raise ValueError(
                    f"{option} ({value}) belongs to {' and '.join(owners)}, but family is {self.family} "
                    f"and codec is {self.codec}; leave it out"
                )
        known = codecs_of(self.family, self.metric or Metric.COSINE)
        if self.codec not in known:
            raise ValueError(
                f"codec ({self.codec}) is not built with family {self.family} for metric "
                f"{self.metric or Metric.COSINE}; choose family ivf, or one of {', '.join(known)}"
            )
        return self


class Evaluate(Section):
    """How a version is measured before it may be published."""

    k: Count = 10
    queries: Count | Text = Field(
        200, description="How many passages serve as held-out queries, or a JSONL file of queries (id, text)."
    )
    relevance: Text | None = Field(None, description="Judgements as a BEIR TSV: query-id, corpus-id, score.")
    seed: Whole = 20_260_102

    @model_validator(mode="after")
    def _relevance_needs_queries(self) -> Self:
        if self.relevance and not isinstance(self.queries, str):
            raise ValueError("relevance needs a file of queries with ids: set evaluate.queries to its path")
        return self


class Gate(Section):
    """What a version must reach before an alias may point to it."""

    recall: Share | None = Field(None, description="Recall at evaluate.k; without it, index.recall.")
    shard_recall: Share | None = Field(
        None, description="Recall of the neighbours that lie in it which each shard must reach; default recall - 0.05."
    )
    ndcg: Share | None = None
    mrr: Share | None = None
    coverage: Share = Field(1.0, description="Indexed passages as a share of those that should be.")
    max_dropped_fraction: Share = Field(0.01, description="Dead letters as a share of documents, at most.")
    max_lost_files: Whole = Field(0, description="Source files that cannot be used as a whole, at most.")


class Publish(Section):
    """Where readers find the version."""

    alias: Name | None = None
    keep: Count = Field(3, description="Versions that clean-up leaves, besides those an alias points to.")


class Prices(Section):
    """What machines and storage cost, in any currency."""

    worker_hour: Amount = Field(0.0, description="An hour of one encoder worker.")
    gb_month: Amount = Field(0.0, description="10^9 bytes stored for a month.")


class Upgrade(Section):
    """How `penstock upgrade` moves the index to another model while it is searched."""

    model: Text | None = Field(None, description="The new model; --model names it too.")
    embedding: Embedding | None = Field(
        None, description="The whole new section `embedding`, where more than the model changes."
    )
    sample: Count = Field(4_000, description="Passages that are embedded with both models to compare them.")
    recovery: Share = Field(0.9, description="Share of the old model's quality that an adapter must keep.")
    tolerance: Share = Field(
        0.0, description="Share of the old version's quality that may go; the rest must stay, by confidence interval."
    )
    queries: Literal[QueryMode.BOTH, QueryMode.BRIDGE] = Field(
        QueryMode.BOTH,
        description="both: queries are encoded with both models while both are live; bridge: with the new one, "
        "and mapped for old vectors.",
    )
    steps: Annotated[int, Field(strict=True, ge=1, le=100)] = Field(
        10, description="How often, on the way, what is embedded is published and measured."
    )
    traffic: Text | None = Field(
        None, description="A number among documents.keep that says how often a document is asked for: those go first."
    )
    log: Text | None = Field(
        None, description="A JSONL file of asked queries (text, and count if not 1): what they find goes first."
    )
    max_workers: Count | None = Field(None, description="Encoder workers at most.")
    window: Window | None = Field(
        None, description="Local time of day in which to embed all but the sample, as in 01:00-06:00."
    )
    prices: Prices = Prices()
    compatible_with: Text | None = Field(
        None, description="The old model, if the new one was trained to answer from its index; measured before use."
    )
    seed: Whole = 20_260_102

    @model_validator(mode="after")
    def _one_new_model(self) -> Self:
        if self.model is not None and self.embedding is not None:
            raise ValueError("model and embedding exclude each other: name the model in the section embedding")
        if self.traffic is not None and self.log is not None:
            raise ValueError("traffic and log exclude each other: give one of them")
        return self


class PipelineFile(Section):
    """A whole pipeline file."""

    name: Name = Field(description="Name of the index.")
    root: Text = Field(description="Where everything is kept: a local folder or s3://bucket/prefix.")
    documents: Documents
    passages: Passages = Passages()
    embedding: Embedding
    deduplicate: Deduplicate = Deduplicate()
    index: Index = Index()
    evaluate: Evaluate = Evaluate()
    gate: Gate | None = None
    publish: Publish = Publish()
    upgrade: Upgrade = Upgrade()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.publish.alias and self.gate is None:
            raise ValueError("publish.alias needs a gate: add `gate: {recall: 0.95}`, or leave the alias out")
        column = self.deduplicate.keep_column()[0]
        if column and column not in self._kept_columns():
            known = ", ".join(self._kept_columns()) or "none"
            raise ValueError(
                f"deduplicate.keep ({self.deduplicate.keep}) must name a column of documents.keep, which has: {known}"
            )
        if self.upgrade.traffic is not None and self.upgrade.traffic not in self._kept_columns():
            known = ", ".join(self._kept_columns()) or "none"
            raise ValueError(
                f"upgrade.traffic ({self.upgrade.traffic}) must be a column of documents.keep, which has: {known}"
            )
        judged = self.gate is not None and (self.gate.ndcg is not None or self.gate.mrr is not None)
        if judged and not self.evaluate.relevance:
            raise ValueError("gate.ndcg and gate.mrr need judgements: set evaluate.queries and evaluate.relevance")
        return self

    def _kept_columns(self) -> list[str]:
        """Names of the columns of documents that passages carry."""
        return list(getattr(self.documents, "keep", ()))
