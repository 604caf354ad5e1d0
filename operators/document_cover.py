"""Which documents cover others: what share of a document's passages has a similar one in another.

That share is the containment of one document in the other (Broder, "On the resemblance and containment of documents",
1997) and not their resemblance: it is told in each direction by itself. A notice that a long report repeats whole is
contained in it with a share of 1, and adds nothing to it; the report is not contained in the notice. Where a document
may go only when one that stays contains it, the direction is what says that nothing is lost; resemblance, symmetric,
would keep such notices, and the larger of the two shares would let the report go for the notice.
"""

import numpy as np


def document_shares(
    document: np.ndarray, other: np.ndarray, passage: np.ndarray, passages: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What share of each document is similar to another one. Several similar passages of the other count once.

    Args:
        document: int64 (i,), numbers 0..n - 1; `passage` (i,) is one of its passages that has a similar one in the
            document `other` (i,). Any order, also several times the same.
        passages: int64 (n,), how many passages each document has.

    Returns:
        int64 (c,) documents, (c,) others, float32 (c,) shares above 0, sorted by document and other.
    """
    order = np.lexsort((passage, other, document))
    document, other, passage = document[order], other[order], passage[order]
    another = _changes(document) | _changes(other)
    once = another | _changes(passage)
    starts = np.flatnonzero(another[once])
    document, other = document[once][starts], other[once][starts]
    counts = np.diff(starts, append=np.count_nonzero(once))
    return document, other, (counts / passages[document]).astype(np.float32)


def _changes(values: np.ndarray) -> np.ndarray:
    """Where a value is not that before it, bool (n,); at the first place as well."""
    changes = np.ones(len(values), bool)
    changes[1:] = values[1:] != values[:-1]
    return changes
