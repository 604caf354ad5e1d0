import numpy as np

from penstock.cluster.jobs.evaluation import Measured, Queries
from penstock.operators.evaluation import Neighbours
from penstock.operators.identity import row_hashes
from penstock.operators.searching import Hits
from penstock.operators.sharding import shard_of
from penstock.pipelines.evaluating import _shard_recall


def hits(rows: list[list[str]]) -> Hits:
    ids = np.array(rows, dtype=object)
    return Hits(ids, np.ones(ids.shape, np.float32), np.zeros(ids.shape, np.int32), np.zeros(ids.shape, np.int64))


def test_a_shard_answers_for_the_neighbours_that_lie_in_it() -> None:
    names = [f"p{number}" for number in range(12)]
    owner = dict(zip(names, shard_of(row_hashes(names), 3).tolist(), strict=True))
    truth = Neighbours(np.array([names[:6], names[6:]], dtype=object), np.ones((2, 6), np.float32))
    own = [frozenset(name for name in names if owner[name] == shard) for shard in range(3)]
    perfect = [
        Measured(
            shard,
            (hits([[name if name in own[shard] else "other" for name in row] for row in truth.ids]),),
            (),
            (np.ones(2, bool),),
            own[shard],
        )
        for shard in range(3)
    ]
    counts = [list(owner.values()).count(shard) for shard in range(3)]
    asked = Queries(("a", "b"), np.zeros((2, 2), np.float32), (None, None))
    found = _shard_recall(perfect, truth, asked, 6, False)
    assert found == {"shard_recall": [1.0, 1.0, 1.0], "shard_neighbours": counts}
    blind = [perfect[0], Measured(1, (hits([["other"] * 6] * 2),), (), (np.ones(2, bool),), own[1]), perfect[2]]
    assert _shard_recall(blind, truth, asked, 6, False)["shard_recall"] == [1.0, 0.0, 1.0]
    # With exact similarities, a row as similar as the last neighbour counts like it; the query itself never does.
    assert _shard_recall(blind, truth, asked, 6, True)["shard_recall"] == [1.0, 1.0, 1.0]
    itself = Queries(("a", "b"), np.zeros((2, 2), np.float32), ("other", "other"))
    assert _shard_recall(blind, truth, itself, 6, True)["shard_recall"] == [1.0, 0.0, 1.0]
