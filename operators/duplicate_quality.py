"""What leaving out duplicates does to answers: what is found among the rows that stay, and what these stand for."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np


def with_represented(
    found: Sequence[tuple[str, str]], stands_for: Mapping[str, Sequence[str]], relevant: Collection[str], k: int
) -> tuple[list[str], list[str]]:
    """The first k names that were found, and the same with those that they stand for behind them.

    Args:
        found: passages and their names (their own, or that of their document), best first.
        stands_for: the names that a passage represents, of which only relevant ones are added, so that nothing else
            takes their place.

    Returns:
        Names, each once and where it comes first.
    """
    names = list(dict.fromkeys(name for _, name in found))[:k]
    first = set(names)
    credited: dict[str, None] = {}
    for passage, name in found:
        if name in first:
            others = (other for other in stands_for.get(passage, ()) if other in relevant)
            credited |= dict.fromkeys((name, *others))
    return names, list(credited)


def relevant_share(found: Sequence[Sequence[str]], relevance: Sequence[Mapping[str, float]]) -> np.ndarray:
    """The share of the relevant names of each query (those above 0) that were found, float64 (q,); NaN where none is
    relevant."""
    shares = np.full(len(found), np.nan)
    for query, (names, judged) in enumerate(zip(found, relevance, strict=True)):
        relevant = {name for name, value in judged.items() if value > 0}
        if relevant:
            shares[query] = len(relevant.intersection(names)) / len(relevant)
    return shares
