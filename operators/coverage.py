"""Whether rows are where they should be, each exactly once."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

EXAMPLES = 3  # of what is wrong, by kind


@dataclass(frozen=True)
class RowCoverage:
    """Counts of rows, which add up over ranges of hashes.

    Attributes:
        expected: rows that should be there; rows: that are, each as often as it is.
        missing: expected and not there. doubled: there once more than once is enough. foreign: there and not expected.
        of_model: rows there, counted once, that the model's vectors are stored of; without_vector: the others.
        examples: hashes of what is wrong, a few of each kind; names: of those that are known.
    """

    expected: int = 0
    rows: int = 0
    missing: int = 0
    doubled: int = 0
    foreign: int = 0
    of_model: int = 0
    without_vector: int = 0
    examples: tuple[int, ...] = ()
    names: tuple[str, ...] = ()

    def add(self, other: "RowCoverage") -> "RowCoverage":
        """Those of two ranges together, with no more examples than one may have."""
        values = {name: value + getattr(other, name) for name, value in vars(self).items()}
        return RowCoverage(**{**values, **{name: values[name][: 4 * EXAMPLES] for name in ("examples", "names")}})

    def named(self, names: Mapping[int, str]) -> "RowCoverage":
        """With the names of its examples, as far as they are known."""
        return replace(self, names=tuple(names[one] for one in self.examples if one in names))

    def wrong(self) -> dict[str, int]:
        """How many rows are wrong, by what is wrong with them; empty where each is there exactly once."""
        kinds = ("missing", "doubled", "foreign", "without_vector")
        return {name: getattr(self, name) for name in kinds if getattr(self, name)}


def in_range(hashes: np.ndarray, first: int, last: int) -> np.ndarray:
    """Those of uint64 (n,) from first to last, both included, in their order."""
    return hashes[(hashes >= np.uint64(first)) & (hashes <= np.uint64(last))]


def compare_rows(expected: np.ndarray, built: np.ndarray, embedded: np.ndarray) -> RowCoverage:
    """Compare rows by their hashes, uint64 of any length and order: those that should be there, that are, and that the
    model's vectors are stored of. Memory: three copies of the input."""
    wanted, (present, counts) = np.unique(expected), np.unique(built, return_counts=True)
    missing = np.setdiff1d(wanted, present, assume_unique=True)
    foreign = np.setdiff1d(present, wanted, assume_unique=True)
    twice = present[counts > 1]
    strange = present[~np.isin(present, embedded)]
    examples = np.concatenate([kind[:EXAMPLES] for kind in (missing, twice, foreign, strange)])
    return RowCoverage(
        expected=len(wanted),
        rows=len(built),
        missing=len(missing),
        doubled=len(built) - len(present),
        foreign=len(foreign),
        of_model=len(present) - len(strange),
        without_vector=len(strange),
        examples=tuple(dict.fromkeys(examples.tolist())),
    )
