"""Random samples of what a published version holds."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from penstock.cluster.catalog import Catalog
from penstock.cluster.jobs.stored_sample import StoredSampleTask, merge_stored, sample_stored, sample_texts
from penstock.pipelines.publishing import shards_of

SEED = 0  # the same rows each time, so that what is asked with them compares


def sample_tasks(
    catalog: Catalog, manifest: Mapping[str, Any], wanted: int, seed: int = SEED
) -> list[StoredSampleTask]:
    """The jobs that sample `wanted` of a version's rows, one for each shard."""
    shards = shards_of(dict(manifest), catalog.version_folder(manifest["version"]))
    return [StoredSampleTask(catalog.store.url, shard, manifest["rows"], wanted, seed) for shard in shards]


def sampled_texts(catalog: Catalog, manifest: Mapping[str, Any], count: int) -> list[str]:
    """Texts of passages, all where there are fewer."""
    return sample_texts(sample_tasks(catalog, manifest, count))


def sampled_vectors(catalog: Catalog, manifest: Mapping[str, Any], count: int) -> np.ndarray:
    """Stored vectors float32 (n, d), all where there are fewer; none where the version stores none."""
    if manifest["stored"] is None:
        return np.empty((0, int(manifest["dimension"])), np.float32)
    return merge_stored([sample_stored(task) for task in sample_tasks(catalog, manifest, count)], count, SEED)
