"""Where values stand among ascending ones."""

import numpy as np


def places_among(ascending: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the wanted, uint64 (n,), are among the ascending ones, and where these stand there: int64 (m,) each."""
    place = np.searchsorted(ascending, wanted)
    found = np.flatnonzero(place < len(ascending))
    found = found[ascending[place[found]] == wanted[found]]
    return found, place[found]
