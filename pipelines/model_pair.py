"""A published version and the model that is to follow its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penstock.cluster.catalog import Catalog
from penstock.cluster.storage import Store
from penstock.operators.encoding import ModelMismatch
from penstock.pipelines.mixed_format import MixedParts, is_mixed
from penstock.pipelines.model_identity import identity_words, is_one_space
from penstock.pipelines.planning import Resolved
from penstock.pipelines.publishing import model_of


@dataclass(frozen=True)
class ModelPair:
    """A published version's pipeline, and the same pipeline with another `embedding` section; both precisions known.

    Raises:
        ModelMismatch: the old pipeline's model is not the one that the version was made with.
        ValueError: both are the same model.
    """

    old: Resolved
    new: Resolved
    manifest: Mapping[str, Any]

    def __post_init__(self) -> None:
        refuse_other_model(self.old, self.manifest)
        if self.encoders(self.old) == self.encoders(self.new):
            raise ValueError(
                f"model ({self.new.encoder.model}) is the one that version {self.manifest['version']} was made with; "
                "name another"
            )

    @property
    def both(self) -> tuple[Resolved, Resolved]:
        return self.old, self.new

    @staticmethod
    def encoders(resolved: Resolved) -> list[str]:
        """What makes the vectors of documents and of queries."""
        return [resolved.encoder.fingerprint(), resolved.query_encoder.fingerprint()]


def refuse_other_model(resolved: Resolved, manifest: Mapping[str, Any]) -> None:
    """Refuses a pipeline whose model, with its prompts and dimension, is not the one that a version was made with.

    Raises:
        ModelMismatch: naming both.
    """
    stated, asked = manifest["model"], model_of(resolved)
    if not is_one_space(asked, stated):
        raise ModelMismatch(
            f"model ({identity_words(asked)}) must be the one that version {manifest['version']} was made with, "
            f"{identity_words(stated)}; give the pipeline file that published it"
        )


def published_manifest(resolved: Resolved, store: Store) -> dict[str, Any]:
    """The manifest of the version that the pipeline's alias points to; of a mixed one that of its old part, which the
    new model follows.

    Raises:
        ValueError: there is none.
    """
    pipeline = resolved.pipeline
    catalog = Catalog(store, pipeline.name)
    entry = catalog.alias(pipeline.publish.alias) if pipeline.publish.alias else None
    if entry is None:
        raise ValueError(
            f"publish.alias ({pipeline.publish.alias}) of index {pipeline.name} must point to a published version, "
            "which a new model is compared with; run the pipeline first"
        )
    manifest = catalog.manifest(entry.version)
    return catalog.manifest(MixedParts.of(manifest).old) if is_mixed(manifest) else manifest
