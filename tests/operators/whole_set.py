"""The independent set of rows that lie together: what deciding them in parts must agree with."""

import numpy as np

from penstock.operators.independent_set import STAYS, Neighbours, settle


def neighbours_of(left: np.ndarray, right: np.ndarray, similarity: np.ndarray, rank: np.ndarray) -> Neighbours:
    """The pairs, int64 (e,) each with its similarity, as later row and earlier one by rank, int64 (n,)."""
    swapped = rank[left] < rank[right]
    return Neighbours(np.where(swapped, right, left), np.where(swapped, left, right), similarity)


def independent_set(neighbours: Neighbours, rank: np.ndarray) -> np.ndarray:
    """Which of n rows stay, bool (n,)."""
    states = np.zeros(len(rank), np.uint8)
    settle(neighbours, rank, states, np.ones(len(rank), bool))
    result: np.ndarray = states == STAYS
    return result
