"""What the benchmark of a live upgrade demands of answers: met by the rule of places, missed by what is not it."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.operators.mixed_spaces import SpacedHits, fill_places
from penstock.operators.searching import Hits

AUDIT = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "answer_audit.py"))
ROWS, K = 60, 10


def nearest(similarities: np.ndarray, rows: set[int], shard: int) -> Hits:
    """The K rows with the highest similarity, as a search of one query finds them."""
    best = np.array(sorted(rows, key=lambda row: -similarities[row])[:K])[None]
    ids = np.array([[f"d{row}#0" for row in best[0]]], object)
    return Hits(ids, similarities[best].astype(np.float32), np.full(best.shape, shard), best)


@pytest.mark.parametrize("seed", range(20))
def test_only_answers_by_places_pass(seed: int) -> None:
    draw = np.random.default_rng(seed)
    before, after = draw.normal(size=(2, ROWS))
    part = set(draw.choice(ROWS, 30, replace=False).tolist())
    old, new = nearest(before, set(range(ROWS)), 1), nearest(after, part, 0)
    superseded = np.isin(old.rows, list(part))
    filled = fill_places(SpacedHits("old", old), superseded, SpacedHits("new", new), K).ids[0].tolist()
    similarities = [{f"d{row}#0": one[row] for row in rows} for one, rows in ((before, range(ROWS)), (after, part))]

    def allowed(ids: list[str], gone: set[str]) -> bool:
        found: bool = AUDIT["follows_places"](ids, *similarities, gone, K, 1e-6)
        return found

    again = {f"d{row}#0" for row in part}
    assert allowed(filled, again)
    assert not allowed([*filled[:-1], filled[0]], again), "a passage twice"
    assert not allowed(new.ids[0].tolist(), again), "the new ranking alone"
    stays = [name for name in filled if name not in again]
    assert not allowed(filled, again | set(stays[:1])), "a superseded passage that the new part does not have"
    assert not allowed(filled[::-1], again), "in another order"


def test_a_version_below_the_worse_of_old_and_bridge_has_fallen() -> None:
    floors = {"old": np.full(50, 0.8), "bridge": np.full(50, 0.7)}
    rows = np.random.default_rng(1).integers(0, 50, 400)
    answered: dict[str, Any] = {"as bridge": (rows, np.full(400, 0.7)), "lower": (rows, np.full(400, 0.5))}
    assert AUDIT["fallen"](answered, floors, 1) == ["lower"]
