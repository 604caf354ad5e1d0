"""What recall an index keeps when its rows become more, from the ranks that were found in a sample of them."""

import numpy as np


def recall_of_more_rows(
    candidates: np.ndarray, neighbours: np.ndarray, k: int, offered: int, sample_rows: int, rows: int
) -> float:
    """Recall@k of a search in `rows`, of which the sample is uniform, at the same number of lists and width of search.

    The row of rank r in the sample is among the first m of all rows where at least r of these m were sampled: a
    hypergeometric count. Of all rows, so, the neighbours that count are those of the lowest ranks in the sample, and
    more rows come between them in the order of the codes. Both counts rise and fall with how many of the near rows were
    sampled, so that the less probable of the two decides. After Reimers and Gurevych, "The curse of dense
    low-dimensional information retrieval for large index sizes" (2021), with ranks in place of a resampled corpus.

    The figure is cautious, as a row among the first by its code says more of its rank than chance: from 9,750 of 39,000
    real vectors for all, what was then measured lay 0 to 3 points above wherever it was 0.9 or more (SQ8, SQ4 and PQ of
    4 bits, with and without lists and re-ranking).

    Args:
        candidates: int64 (q, n), the rows of the sample in the order of their codes, -1 where there is none; `offered`
            of them or fewer.
        neighbours: int64 (q, m), the nearest rows of the sample, best first, m >= k; below -1 where there is none.
        offered: how many candidates are compared exactly.
    """
    from scipy.stats import hypergeom  # here, as it takes a second to import, which most runs need not wait for

    ranks = np.arange(1, neighbours.shape[1] + 1)
    counts = hypergeom.sf(ranks - 1, rows, min(k, rows), sample_rows)
    among = hypergeom.sf(np.arange(candidates.shape[1]), rows, min(offered, rows), sample_rows)
    found = candidates[:, None, :] == neighbours[:, :, None]
    kept = np.where(found.any(axis=2), among[found.argmax(axis=2)], 0.0)
    weights = np.where(neighbours >= 0, counts[None, :], 0.0)
    return float(np.minimum(kept, weights).sum() / weights.sum())
