"""Where things lie under a root. Every path in the store comes from here, made of fingerprints and checked names
only."""

PASSAGES = "passages"
SELECTION = "selection"
EMBEDDINGS = "embeddings"
TRANSFORMS = "transforms"
TRAINING = "training"
CENTROIDS = "centroids"
CELLS = "cells"
PLACEMENT = "placement"
STANDING = "standing"
REPLICAS = "replicas"
PAIRS = "pairs"
REMOVAL = "removal"
DOCUMENT_PAIRS = "document-pairs"
KEPT = "kept"
SHARDS = "shards"
EVALUATION = "evaluation"


def stage_folder(stage: str, fingerprint: str) -> str:
    return f"stages/{stage}/{fingerprint}"


def fragment_path(stage: str, stage_fingerprint: str, fragment: str) -> str:
    return f"{stage_folder(stage, stage_fingerprint)}/{fragment}.parquet"


def dead_letter_path(stage: str, stage_fingerprint: str, fragment: str) -> str:
    """Rows that a fragment dropped: written before the fragment itself, and only when there are any."""
    return f"{stage_folder(stage, stage_fingerprint)}/{fragment}.dropped.parquet"


def documents_path(stage_fingerprint: str, fragment: str) -> str:
    """The documents of a passages fragment, where passages are embedded within them: written before the fragment."""
    return f"{stage_folder(PASSAGES, stage_fingerprint)}/{fragment}.documents.parquet"


def stage_record_path(stage: str, fingerprint: str) -> str:
    return f"{stage_folder(stage, fingerprint)}/record.json"


def run_folder(run_id: str) -> str:
    return f"runs/{run_id}"


def shard_file(shard: int, kind: str) -> str:
    """File name within a version: shard-00000.faiss (or .svs.tar), shard-00000.ids.arrow, ..."""
    return f"shard-{shard:05d}.{kind}"
