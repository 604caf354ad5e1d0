"""Pairings and bridges of sampled spaces, against spaces that are planted."""

from dataclasses import replace

import numpy as np
import pytest

from penstock.operators.adapters import Procrustes
from penstock.operators.bridge_trials import BridgeTask, fit_bridge
from penstock.operators.bridging import Direction, SpaceIdentity
from penstock.operators.evaluation import ndcg_at_k
from penstock.operators.indexing import Metric
from penstock.operators.lengths import normalize
from penstock.operators.paired_samples import (
    Answered,
    PairedSample,
    SampledSpace,
    answered,
    compared_models,
    ranked_documents,
    sampled_compatibility,
)
from penstock.operators.space_report import COSINE_BINS, space_report

D, DOCUMENTS, QUERIES = 24, 360, 80


def space(name: str, documents: np.ndarray, queries: np.ndarray) -> SampledSpace:
    identity = SpaceIdentity(name, f"space of {name}", "w", documents.shape[1])
    return SampledSpace(identity, Metric.COSINE, normalize(documents), normalize(queries))


def planted(seed: int = 1) -> PairedSample:
    """An old space, and a new one that is the old one rotated; each query is near a document, some of two parts."""
    generator = np.random.default_rng(seed)
    documents = generator.normal(size=(DOCUMENTS, D)) + 0.5
    queries = documents[:QUERIES] + 0.3 * generator.normal(size=(QUERIES, D))
    turn = np.linalg.qr(generator.normal(size=(D, D)))[0]
    return PairedSample(
        space("old", documents, queries),
        space("new", documents @ turn, queries @ turn),
        tuple(f"d{row // 2 if row < 20 else row}" for row in range(DOCUMENTS)),
        DOCUMENTS,
        tuple(f"q{row}" for row in range(QUERIES)),
        tuple({f"d{row // 2 if row < 20 else row}": 1.0} for row in range(QUERIES)),
        5,
        0,
    )


def shuffled(sample: PairedSample) -> PairedSample:
    """New vectors of other texts."""
    order = np.random.default_rng(2)
    new = sample.new
    documents, queries = order.permutation(new.documents), order.permutation(new.queries)
    return replace(sample, new=replace(new, documents=documents, queries=queries))


def test_documents_are_ranked_by_their_best_passage() -> None:
    documents = np.eye(4, dtype=np.float32)
    queries = np.array([[0.9, 0.1, 0.5, 0.0], [0.0, 0.2, 0.1, 0.9]], np.float32)
    ranked = ranked_documents(queries, documents, ["a", "b", "a", "c"], 2)
    assert ranked == [["a", "b"], ["c", "b"]]
    judged = [{"b": 2.0, "x": 0.0}, {"a": 1.0, "c": 1.0, "b": 1.0}]
    found = answered(ranked, judged, 2)
    assert isinstance(found, Answered)
    assert found.recall.tolist() == [1.0, 1.0] and found.right.tolist() == [True, True]
    assert found.ndcg.tolist() == ndcg_at_k(ranked, judged, 2).tolist()


def test_halves_share_no_query_and_depend_on_the_seed() -> None:
    sample = planted()
    fitting, judging = sample.halves
    assert sorted([*fitting, *judging]) == list(range(QUERIES)) and len(fitting) == QUERIES // 2
    assert replace(sample, seed=1).halves[0].tolist() != fitting.tolist()


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("judged", [True, False])
def test_a_rotated_space_passes_and_shuffled_pairs_fail(direction: Direction, judged: bool) -> None:
    sample = planted() if judged else replace(planted(), relevance=None)
    found = fit_bridge(BridgeTask(sample, direction))
    assert found.record.verdict.passes and found.record.verdict.recovery.estimate > 0.98
    assert isinstance(found.record.chosen.method, Procrustes) or judged
    assert found.record.length == pytest.approx(1.0, abs=1e-3) and found.record.length <= 1
    assert found.record.direction is direction and found.record.adapter_hash == found.adapter.content_hash()
    name = "recall" if judged else "agreement"
    assert found.figures[name]["estimate"] > 0.95
    fails = fit_bridge(BridgeTask(shuffled(sample), direction))
    assert not fails.record.verdict.passes


def test_what_judges_was_fitted_to_nowhere() -> None:
    sample = planted()
    relevant = sample.relevant_rows(sample.halves[1])
    queries = fit_bridge(BridgeTask(sample, Direction.QUERIES_TO_OLD)).record
    assert (queries.documents, queries.queries) == (DOCUMENTS - int(relevant.sum()), QUERIES // 2)
    documents = fit_bridge(BridgeTask(sample, Direction.DOCUMENTS_TO_NEW)).record
    assert documents.queries == 0 and documents.documents < 0.75 * DOCUMENTS


def test_pairings_of_a_rotated_space() -> None:
    sample = planted()
    found = compared_models(sample)
    pairings = found["pairings"]
    assert pairings["new_to_new"]["recall"] == pairings["old_to_old"]["recall"]
    assert pairings["new_to_new"]["flips"]["negative"]["estimate"] == 0
    direct = pairings["new_to_old"]
    assert direct["recall"]["estimate"] < 0.3 and direct["flips"]["negative"]["estimate"] > 0.5
    assert set(direct["flips"]["negative_queries"]) <= {sample.query_ids[row] for row in sample.halves[1]}
    assert found["neighbour_overlap"]["estimate"] > 0.999 and found["likeness"]["matched"] == 1.0
    old, new = (found["spaces"][name]["health"] for name in ("old", "new"))
    assert new["effective_rank"] == pytest.approx(old["effective_rank"], rel=1e-4)
    compatibility = sampled_compatibility(sample)
    assert compatibility is not None and not compatibility.compatible


def test_a_better_model_of_the_same_space_is_compatible() -> None:
    """New queries lie nearer to their documents, and old documents stay where they are."""
    sample = planted()
    noisy = normalize(sample.old.queries + 0.3 * np.random.default_rng(3).normal(size=sample.old.queries.shape))
    better = replace(sample, old=replace(sample.old, queries=noisy), new=replace(sample.old))
    found = sampled_compatibility(better)
    assert found is not None and found.compatible and found.update_gain == pytest.approx(1.0)
    assert sampled_compatibility(replace(better, relevance=None)) is None
    narrow = replace(better.new, documents=normalize(better.new.documents[:, :8]), queries=better.new.queries[:, :8])
    assert sampled_compatibility(replace(better, new=narrow)) is None
    assert "new_to_old" not in compared_models(replace(better, new=narrow, relevance=None))["pairings"]


def test_without_judgements_agreement_is_all() -> None:
    sample = replace(planted(), relevance=None)
    assert set(compared_models(sample)["pairings"]["new_to_new"]) == {"agreement"}
    with pytest.raises(ValueError, match=r"judgements \(none of 80 queries\) must be given"):
        sample.relevance_of(np.arange(2))


def test_histograms_of_a_space_are_shares() -> None:
    vectors = planted().old.documents
    report = space_report(vectors, Metric.COSINE, 0)
    cosines, occurrences = report.cosines, report.occurrences
    assert len(cosines.shares) == COSINE_BINS and sum(cosines.shares) == pytest.approx(1, abs=1e-4)
    assert sum(occurrences.shares) == pytest.approx(1, abs=1e-4) and occurrences.open_ended
    middles = (np.array(cosines.edges[:-1]) + np.array(cosines.edges[1:])) / 2
    assert middles @ np.array(cosines.shares) == pytest.approx(report.health.mean_cosine, abs=0.01)
    assert occurrences.shares[0] == pytest.approx(report.health.antihub_share, abs=1e-6)
