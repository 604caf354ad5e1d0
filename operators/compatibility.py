"""May queries of a new model ask an index of an old one as they are? Only if it is measured to be better.

The criterion of backward-compatible training (Shen et al. 2020, arXiv:2003.11942) with a confidence bound:
quality(new queries, old index) > quality(old queries, old index). A declaration alone is not believed.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from penstock.operators.confidence import Interval, mean_interval


@dataclass(frozen=True)
class Compatibility:
    """What was measured.

    Attributes:
        old: quality of the old model in its own index.
        cross: quality of the new model's queries in the old index, nothing in between.
        difference: cross less old, paired by query.
        update_gain: the share of the full gain, (cross - old) / (new - old), that comes without embedding documents
            again; None where the new model in its own index was not measured, or gains nothing.
    """

    old: Interval
    cross: Interval
    difference: Interval
    update_gain: float | None

    @property
    def compatible(self) -> bool:
        return self.difference.low > 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"compatible": self.compatible}


def measure_compatibility(
    old: np.ndarray, cross: np.ndarray, seed: int, new: np.ndarray | None = None
) -> Compatibility:
    """The criterion, from one figure of quality for each of the same queries: float64 (q,).

    Args:
        old: old queries in the old index. cross: new queries in the old index. new: new queries in a new index.

    Raises:
        ValueError: figures of other queries.
    """
    for name, figures in (("cross", cross), ("new", new)):
        if figures is not None and figures.shape != old.shape:
            raise ValueError(f"{name} (shape {figures.shape}) must have a figure for each of the {len(old)} queries")
    gain = None
    if new is not None and new.mean() > old.mean():
        gain = float((cross.mean() - old.mean()) / (new.mean() - old.mean()))
    return Compatibility(mean_interval(old, seed), mean_interval(cross, seed), mean_interval(cross - old, seed), gain)
