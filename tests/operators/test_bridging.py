"""Adapters against planted maps: what each can represent it recovers, and pairs that say nothing fail the gate."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from penstock.operators.adapter_fitting import Pairs, fit_adapter, fit_linear
from penstock.operators.adapters import (
    METHOD_TYPES,
    Adapter,
    LowRank,
    Method,
    Procrustes,
    ResidualMlp,
    Ridge,
    WhitenedRidge,
    gelu,
    method_from_json,
    method_to_json,
)
from penstock.operators.bridging import (
    QUERY_WEIGHTS,
    BridgeRecord,
    Candidate,
    Direction,
    Fit,
    Sample,
    SpaceIdentity,
    Trial,
    Verdict,
    WrongSpace,
    agreement,
    choose_fit,
    judge_bridge,
    record_bridge,
    sample_hash,
)
from penstock.operators.encoding import Encoder
from penstock.operators.indexing import Metric
from penstock.operators.moments import moments_of
from penstock.operators.searching import normalize
from penstock.operators.tensors import pack

D = 16
COSINE, INNER = Metric.COSINE, Metric.INNER_PRODUCT
METHODS: list[Method] = [
    Procrustes(),
    Ridge(1e-3),
    WhitenedRidge(0.1, 0.5),
    LowRank(8, 1e-3),
    ResidualMlp(16, 1e-3, seed=1),
]


def _rotation(seed: int, dimension: int = D) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((dimension, dimension)))[0]


def _texts(seed: int, rows: int, dimension: int = D) -> np.ndarray:
    """Vectors of one space: not centred, and of unequal variances."""
    generator = np.random.default_rng(seed)
    spread = np.geomspace(1, 0.2, dimension)
    return generator.standard_normal((rows, dimension)) * spread + np.linspace(-0.5, 0.5, dimension)


def _curved(source: np.ndarray) -> np.ndarray:
    """A map that no affine one is near: distances along two axes are folded."""
    generator = np.random.default_rng(9)
    hidden = np.abs(source @ generator.standard_normal((source.shape[1], 2 * source.shape[1])))
    return normalize(hidden @ generator.standard_normal((hidden.shape[1], source.shape[1])) - 0.5)


def test_procrustes_recovers_a_planted_rotation_and_the_means() -> None:
    source = _texts(1, 300)
    rotation = _rotation(2)
    pairs = Pairs(source, source @ rotation + 3)
    adapter = fit_adapter(Procrustes(), pairs, INNER)
    np.testing.assert_allclose(adapter.arrays["matrix"], rotation, atol=1e-6)
    np.testing.assert_allclose(adapter.apply(_texts(3, 50)), _texts(3, 50) @ rotation + 3, atol=1e-5)


def test_rotated_queries_find_all_that_their_own_would() -> None:
    queries, documents, rotation = normalize(_texts(1, 100)), normalize(_texts(2, 500)), _rotation(3)
    known = normalize(_texts(4, 200))
    adapter = fit_adapter(Procrustes(), Pairs(known, known @ rotation), COSINE)
    trial = Trial(Direction.QUERIES_TO_OLD, Pairs(queries, queries @ rotation), normalize(documents @ rotation))
    np.testing.assert_array_equal(agreement(adapter, None, trial), 1)


def test_the_same_model_is_bridged_by_the_identity() -> None:
    vectors = _texts(1, 300)
    for method in (Procrustes(), Ridge(0)):
        adapter = fit_adapter(method, Pairs(vectors, vectors), INNER)
        np.testing.assert_allclose(adapter.arrays["matrix"], np.eye(D), atol=1e-6)
        np.testing.assert_allclose(adapter.arrays["bias"], 0, atol=1e-6)


@pytest.mark.parametrize("dimensions", [(12, 20), (20, 12)])
def test_procrustes_between_unequal_dimensions_is_orthonormal(dimensions: tuple[int, int]) -> None:
    small, large = min(dimensions), max(dimensions)
    axes = _rotation(5, large)[:small]
    planted = axes if dimensions[0] == small else axes.T
    source = np.random.default_rng(7).standard_normal((4_000, dimensions[0]))
    adapter = fit_adapter(Procrustes(), Pairs(source, source @ planted), INNER)
    matrix = adapter.arrays["matrix"].astype(np.float64)
    gram = matrix @ matrix.T if dimensions[0] == small else matrix.T @ matrix
    np.testing.assert_allclose(gram, np.eye(small), atol=1e-6)
    np.testing.assert_allclose(matrix, planted, atol=1e-6 if dimensions[0] == small else 0.1)


def test_ridge_recovers_a_planted_affine_map() -> None:
    source = _texts(1, 300)
    generator = np.random.default_rng(2)
    matrix, bias = generator.standard_normal((D, 10)), generator.standard_normal(10)
    adapter = fit_adapter(Ridge(0), Pairs(source, source @ matrix + bias), INNER)
    np.testing.assert_allclose(adapter.arrays["matrix"], matrix, atol=1e-5)
    np.testing.assert_allclose(adapter.arrays["bias"], bias, atol=1e-5)


def test_ridge_is_the_solution_of_its_normal_equations() -> None:
    pairs = Pairs(_texts(1, 40), _texts(2, 40), np.random.default_rng(3).uniform(0.1, 2, 40))
    adapter = fit_adapter(Ridge(0.1), pairs, INNER)
    weights = pairs.weights
    assert weights is not None
    x, y = (side - np.average(side, axis=0, weights=weights) for side in (pairs.source, pairs.target))
    own = (x.T * weights) @ x / weights.sum()
    matrix = np.linalg.inv(own + 0.1 * np.trace(own) / D * np.eye(D)) @ (x.T * weights) @ y / weights.sum()
    np.testing.assert_allclose(adapter.arrays["matrix"], matrix, atol=1e-6)
    mean = np.average(pairs.source, axis=0, weights=weights)[None]
    np.testing.assert_allclose(adapter.apply(mean)[0], np.average(pairs.target, axis=0, weights=weights), atol=1e-5)


def test_whitened_ridge_ranks_by_the_likelihood_of_normal_vectors() -> None:
    """Weakly dependent pairs, for which the leading term of log p(y | x) / p(y) is all of it."""
    generator = np.random.default_rng(4)
    mix, other = generator.standard_normal((2, 6, 6))
    source = generator.standard_normal((20_000, 6)) @ mix + 1
    noise = generator.standard_normal((20_000, 6)) @ other
    target = 0.005 * source @ generator.standard_normal((6, 6)) + noise + 2
    adapter = fit_adapter(WhitenedRidge(0, 1), Pairs(source, target), INNER)
    queries, documents = source[:5], target[:50]
    found = adapter.apply(queries).astype(np.float64) @ documents.T
    joint = np.cov(np.concatenate([source, target], axis=1).T, bias=True)
    matrix = np.linalg.solve(joint[:6, :6], joint[:6, 6:])
    conditional = np.linalg.inv(joint[6:, 6:] - matrix.T @ joint[:6, :6] @ matrix)
    centred = documents - target.mean(axis=0)
    misses = centred[None] - ((queries - source.mean(axis=0)) @ matrix)[:, None]
    exact = -0.5 * np.einsum("qnd,de,qne->qn", misses, conditional, misses)
    exact += 0.5 * np.einsum("nd,de,ne->n", centred, np.linalg.inv(joint[6:, 6:]), centred)
    for mine, theirs in zip(found, exact, strict=True):
        assert np.corrcoef(mine, theirs)[0, 1] > 0.99


def test_whitened_ridge_without_whitening_is_ridge_around_the_means() -> None:
    source, target = _texts(1, 100), _texts(2, 100)
    plain, centred = (
        fit_adapter(method, Pairs(source, target), INNER) for method in (Ridge(0.1), WhitenedRidge(0.1, 0))
    )
    np.testing.assert_allclose(centred.apply(source) + target.mean(axis=0), plain.apply(source), atol=1e-5)


def test_low_rank_recovers_a_planted_map_of_its_rank_and_is_best_among_such() -> None:
    source, generator = _texts(1, 400), np.random.default_rng(2)
    planted = generator.standard_normal((D, 3)) @ generator.standard_normal((3, D))
    adapter = fit_adapter(LowRank(3, 0), Pairs(source, source @ planted), INNER)
    np.testing.assert_allclose(adapter.arrays["down"] @ adapter.arrays["up"], planted, atol=1e-4)
    target = source @ planted + 0.5 * generator.standard_normal((400, D))
    best = _squared_error(LowRank(2, 0), source, target)
    ridge = fit_adapter(Ridge(0), Pairs(source, target), INNER).arrays["matrix"].astype(np.float64)
    left, values, right = np.linalg.svd(ridge)
    truncated = (left[:, :2] * values[:2]) @ right[:2]
    centred, wanted = source - source.mean(axis=0), target - target.mean(axis=0)
    assert best < float(((centred @ truncated - wanted) ** 2).mean())
    assert _squared_error(LowRank(D, 0), source, target) == pytest.approx(_squared_error(Ridge(0), source, target))


def _squared_error(method: Method, source: np.ndarray, target: np.ndarray) -> float:
    found = fit_adapter(method, Pairs(source, target), INNER).apply(source)
    return float(((found - target) ** 2).mean())


def test_moments_of_parts_fit_what_the_pairs_fit() -> None:
    pairs = Pairs(_texts(1, 300), _curved(_texts(1, 300)))
    rows = np.concatenate([pairs.source, pairs.target], axis=1)
    parts = [moments_of(part, rows[0]) for part in np.array_split(rows, 4)]
    total = parts[3].merged(parts[1]).merged(parts[0].merged(parts[2]))
    for method in (Procrustes(), Ridge(), LowRank(4)):
        apart, whole = fit_linear(method, total, D, COSINE), fit_adapter(method, pairs, COSINE)
        np.testing.assert_allclose(apart.apply(pairs.source), whole.apply(pairs.source), atol=1e-5)


@pytest.mark.parametrize("metric", [COSINE, INNER])
def test_the_network_learns_what_is_not_affine(metric: Metric) -> None:
    source, queries, documents = _texts(1, 3_000), _texts(2, 100), _texts(3, 400)
    trial = Trial(Direction.QUERIES_TO_OLD, Pairs(queries, _curved(queries)), _curved(documents))
    pairs = Pairs(source, _curved(source))
    affine, network = (fit_adapter(method, pairs, metric) for method in (Ridge(1e-3), ResidualMlp(64, 1e-3, 5)))
    assert agreement(network, None, trial).mean() > agreement(affine, None, trial).mean() + 0.15
    again = fit_adapter(ResidualMlp(64, 1e-3, 5), pairs, metric)
    assert again.to_bytes() == network.to_bytes() != fit_adapter(ResidualMlp(64, 1e-3, 6), pairs, metric).to_bytes()


def test_validation_chooses_what_was_planted() -> None:
    source, queries, documents = (normalize(_texts(seed, rows)) for seed, rows in ((1, 1_500), (2, 200), (3, 400)))
    rotation = _rotation(4)
    for planted, kinds in (
        (lambda rows: normalize(rows @ rotation), (Procrustes, Ridge)),
        (_curved, (ResidualMlp,)),
    ):  # 16 dimensions are too few for low ranks
        asked = Pairs(queries, planted(queries))
        trial = Trial(Direction.QUERIES_TO_OLD, asked, planted(documents))
        sample = Sample(Pairs(source, planted(source)), asked)
        chosen, tried = choose_fit(Direction.QUERIES_TO_OLD, sample, partial(agreement, trial=trial), COSINE, seed=3)
        assert isinstance(chosen.method, kinds)
        best = max(one.quality.mean() for one in tried)
        assert next(one for one in tried if one.fit == chosen).quality.mean() == best
        assert {type(one.fit.method) for one in tried} == {Procrustes, Ridge, WhitenedRidge, ResidualMlp}
        assert {one.fit.query_weight for one in tried} == set(QUERY_WEIGHTS)


def test_each_query_is_answered_once_by_an_adapter_that_did_not_see_it() -> None:
    """Targets are noise, so that only an adapter fitted to a query itself can know its target."""
    generator = np.random.default_rng(1)
    documents, queries = (Pairs(*generator.standard_normal((2, rows, 40))) for rows in (60, 24))
    seen: list[int] = []

    def error(adapter: Adapter, rows: np.ndarray) -> np.ndarray:
        seen.extend(rows.tolist())
        misses: np.ndarray = -((adapter.apply(queries.source[rows]) - queries.target[rows]) ** 2).mean(axis=1)
        return misses

    _, tried = choose_fit(Direction.QUERIES_TO_OLD, Sample(documents, queries), error, INNER, 1)
    assert sorted(seen[:24]) == list(range(24)) and len(seen) == 24 * len(tried)
    assert max(one.quality.mean() for one in tried) < -0.5


def test_fidelity_decides_where_quality_hardly_does() -> None:
    documents, queries = (Pairs(_texts(seed, rows), _texts(seed, rows)) for seed, rows in ((1, 60), (2, 40)))
    noise = np.random.default_rng(3).normal(0, 0.1, 40)
    noise -= noise.mean()

    def chosen(loss: float) -> Method:
        """What is chosen when all but Procrustes lose some quality, and Ridge alone is faithful."""

        def quality(adapter: Adapter, rows: np.ndarray) -> np.ndarray:
            return noise[rows] * (2 if adapter.method == Procrustes() else 1) - loss * (adapter.method != Procrustes())

        def fidelity(adapter: Adapter, rows: np.ndarray) -> np.ndarray:
            return np.full(len(rows), float(isinstance(adapter.method, Ridge)))

        sample = Sample(documents, queries)
        return choose_fit(Direction.QUERIES_TO_OLD, sample, quality, INNER, 1, fidelity)[0].method

    error = noise.std() / np.sqrt(40)
    assert isinstance(chosen(0.5 * error), Ridge)
    assert isinstance(chosen(2 * error), Procrustes)


def test_documents_are_held_out_where_there_are_no_queries() -> None:
    pairs = Pairs(normalize(_texts(1, 300, 80)), normalize(_texts(1, 300, 80) @ _rotation(2, 80)))
    trial = Trial(Direction.DOCUMENTS_TO_NEW, pairs, normalize(_texts(3, 50, 80)))
    chosen, tried = choose_fit(Direction.DOCUMENTS_TO_NEW, Sample(pairs), partial(agreement, trial=trial), COSINE, 1)
    assert [one.fit.method.rank for one in tried if isinstance(one.fit.method, LowRank)] == [64]
    assert {one.fit.query_weight for one in tried} == {1.0}
    assert isinstance(chosen.method, Procrustes | Ridge)
    assert not any(isinstance(one.fit.method, WhitenedRidge) for one in tried)


def test_queries_that_lie_elsewhere_are_mapped_by_what_they_weigh() -> None:
    documents, queries = _texts(1, 200), _texts(2, 50)
    sample = Sample(Pairs(documents, documents), Pairs(queries, queries + 2))
    alone, both = (Fit(Ridge(0), weight).adapter(sample, INNER) for weight in (0.0, 1e6))
    np.testing.assert_allclose(alone.apply(documents), documents, atol=1e-5)
    np.testing.assert_allclose(both.apply(queries), queries + 2, atol=1e-2)
    np.testing.assert_array_equal(Sample(sample.documents).weighed(4).source, documents)


def test_old_documents_are_bridged_into_the_new_space() -> None:
    old, queries = normalize(_texts(1, 400)), normalize(_texts(2, 50))
    rotation = _rotation(3)
    adapter = fit_adapter(Ridge(1e-6), Pairs(old, normalize(old @ rotation)), COSINE)
    trial = Trial(Direction.DOCUMENTS_TO_NEW, Pairs(old, normalize(old @ rotation)), normalize(queries @ rotation))
    assert agreement(adapter, None, trial).mean() > 0.999
    backwards = fit_adapter(Ridge(1e-6), Pairs(old, old), COSINE)
    assert agreement(backwards, None, trial).mean() < 0.6  # every other one is a document that was embedded again


def test_shuffled_pairs_fail_the_gate() -> None:
    queries, documents, rotation = normalize(_texts(1, 200)), normalize(_texts(2, 300)), _rotation(3)
    known = normalize(_texts(4, 400))
    trial = Trial(Direction.QUERIES_TO_OLD, Pairs(queries, queries @ rotation), normalize(documents @ rotation))
    true, reference = Sample(Pairs(known, known @ rotation), trial.pairs.take(np.arange(50))), np.ones(len(queries))
    for sample, passes in ((true, True), (true.shuffled(1), False)):
        for method in METHODS:
            bridged = agreement(Fit(method).adapter(sample, COSINE), None, trial)
            control = agreement(Fit(method).adapter(sample.shuffled(7), COSINE), None, trial)
            verdict = judge_bridge(bridged, reference, control, seed=1, least_recovery=0.3)
            assert verdict.passes == passes, (method, verdict)


def test_the_control_refuses_what_only_predicts_the_mean() -> None:
    """Shuffled pairs and a quality that they reach too, since all texts are alike: no recovery makes up for it."""
    verdict = judge_bridge(np.full(50, 0.95), np.ones(50), np.full(50, 0.95), seed=1)
    assert verdict.recovery.low > verdict.least_recovery
    assert not verdict.passes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("metric", [COSINE, INNER])
def test_saved_adapters_answer_bit_for_bit(method: Method, metric: Metric) -> None:
    source, target = _texts(1, 200), _texts(2, 200, 12)
    adapter = fit_adapter(method, Pairs(source, target), metric)
    loaded = Adapter.from_bytes(adapter.to_bytes())
    assert loaded.to_bytes() == adapter.to_bytes()
    assert loaded.method == method and loaded.metric is metric
    assert loaded.content_hash() == adapter.content_hash()
    mapped = loaded.apply(source)
    np.testing.assert_array_equal(mapped, adapter.apply(source))
    assert mapped.dtype == np.float32 and mapped.shape == (200, 12)
    np.testing.assert_allclose(mapped[:3], loaded.apply(source[:3]), atol=1e-5)
    if metric is COSINE:
        np.testing.assert_allclose(np.linalg.norm(mapped, axis=1), 1, atol=1e-6)
    assert method_from_json(json.loads(json.dumps(method_to_json(method)))) == method


def test_the_networks_arithmetic_is_torchs() -> None:
    import torch

    values = np.linspace(-6, 6, 1_001, dtype=np.float32)
    expected = torch.nn.functional.gelu(torch.from_numpy(values), approximate="tanh").numpy()
    np.testing.assert_allclose(gelu(values), expected, atol=1e-6)


def _identity(name: str, dimension: int = D) -> SpaceIdentity:
    return SpaceIdentity(name, f"space of {name}", f"weights of {name}", dimension)


def _record() -> tuple[BridgeRecord, Adapter]:
    sample, fit = Sample(Pairs(_texts(1, 100), _texts(2, 100))), Fit(Ridge(0.1), 4.0)
    adapter = fit.adapter(sample, COSINE)
    tried = [Candidate(fit, np.linspace(0, 1, 20)), Candidate(Fit(LowRank(4)), np.zeros(20))]
    verdict = judge_bridge(np.linspace(0.5, 1, 20), np.ones(20), np.zeros(20), seed=4)
    identities = _identity("new"), _identity("old")
    return record_bridge(Direction.QUERIES_TO_OLD, identities, sample, (fit, tried), adapter, verdict, 4), adapter


def test_records_are_plain_data_that_is_read_back() -> None:
    record, adapter = _record()
    written = json.loads(json.dumps(record.to_json()))
    assert BridgeRecord.from_json(written) == record and record.length == 1
    assert BridgeRecord.from_json(written | {"length": 0.8}) == replace(record, length=0.8)
    assert written["candidates"][0]["quality"]["estimate"] == 0.5
    assert (written["documents"], written["queries"]) == (100, 0)
    assert written["adapter_hash"] == adapter.content_hash()
    assert written["verdict"]["passes"] is False
    with pytest.raises(ValueError, match=r"version of an adapter's record \(2\) must be 1"):
        BridgeRecord.from_json(written | {"version": 2})


def test_a_record_refuses_other_spaces_and_adapters() -> None:
    record, adapter = _record()
    record.refuse_other(adapter, "space of new", "space of old")
    with pytest.raises(WrongSpace, match="leads from space space of new of new, asked for space of old"):
        record.refuse_other(adapter, "space of old", "space of new")
    with pytest.raises(WrongSpace, match="leads to space space of old of old, asked for another"):
        record.refuse_other(adapter, "space of new", "another")
    with pytest.raises(WrongSpace, match=f"must be {adapter.content_hash()[:16]}, which the record is of"):
        record.refuse_other(replace(adapter, metric=INNER), "space of new", "space of old")


def test_identity_of_an_encoder_leaves_prompts_out() -> None:
    encoder = Encoder("m", "w", "t", "c", 8, 2, D, "query: ", True)
    assert SpaceIdentity.of(encoder) == SpaceIdentity.of(replace(encoder, prompt="", task="query"))
    assert SpaceIdentity.of(encoder).space != SpaceIdentity.of(replace(encoder, weights_hash="v")).space


def test_samples_are_known_by_their_hash() -> None:
    one, other = Pairs(_texts(1, 5), _texts(2, 5)), Pairs(_texts(3, 4), _texts(4, 4))
    hashes = {sample_hash(Sample(*parts)) for parts in ((one,), (one, other), (other, one), (one.shuffled(1),))}
    assert len(hashes) == 4
    assert sample_hash(Sample(one)) == sample_hash(Sample(one.take(np.arange(5))))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pairs(np.ones((2, 3)), np.ones((3, 3))), r"target vectors of pairs \(shape \(3, 3\)\)"),
        (lambda: _choose_for_documents(), r"sample for documents_to_new \(5 pairs of queries\) must hold documents"),
        (lambda: Pairs(np.ones((0, 3)), np.ones((0, 3))), r"source vectors of pairs \(shape \(0, 3\)\)"),
        (lambda: fit_adapter(Ridge(), Pairs(np.ones((9, 3)), _texts(1, 9)), COSINE), "mean variance 0"),
        (lambda: fit_adapter(LowRank(20), Pairs(_texts(1, 9), _texts(2, 9)), COSINE), r"rank of low_rank \(20\)"),
        (lambda: Ridge(-1), r"penalty of ridge \(-1\)"),
        (lambda: WhitenedRidge(power=2), r"power of whitened_ridge \(2\) must lie between 0, no whitening, and 1"),
        (lambda: LowRank(0), r"rank of low_rank \(0\) must be at least 1"),
        (lambda: ResidualMlp(0), r"hidden of residual_mlp \(0\)"),
        (lambda: ResidualMlp(seed=-1), r"seed of residual_mlp \(-1\)"),
        (lambda: method_from_json({"type": "magic"}), rf"\(magic\) is none of {', '.join(METHOD_TYPES)}"),
        (lambda: method_from_json({"type": "ridge", "rank": 3}), r"parameter rank \(3\) of ridge is none of"),
        (lambda: Adapter(Ridge(), COSINE, 3, 3, {}), r"arrays of ridge \(shapes \{\}\) must have the shapes"),
        (lambda: _affine(np.full((3, 3), np.nan)), r"array matrix of ridge \(float32\) must hold finite"),
        (lambda: _affine(np.eye(3)).apply(np.ones((2, 4))), r"vectors to adapt \(shape \(2, 4\)\)"),
        (lambda: _affine(np.zeros((3, 3))).apply(np.ones((2, 3))), r"vector 0 \(of length 0.0 in the target space\)"),
        (lambda: Adapter.from_bytes(pack("moments", {}, {})), "must be of kind adapter, version 1, got kind moments"),
        (lambda: Adapter.from_bytes(b"torn"), r"adapter \(4 bytes\) must be a safetensors file"),
    ],
)
def test_errors_name_what_is_wrong(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def _choose_for_documents() -> None:
    pairs = Pairs(_texts(1, 5), _texts(2, 5))
    choose_fit(Direction.DOCUMENTS_TO_NEW, Sample(pairs, pairs), lambda _, rows: np.ones(len(rows)), COSINE, 1)


def _affine(matrix: np.ndarray) -> Adapter:
    arrays = {"matrix": matrix.astype(np.float32), "bias": np.zeros(3, np.float32)}
    return Adapter(Ridge(), COSINE, 3, 3, arrays)


def test_verdicts_need_both_halves() -> None:
    record, _ = _record()
    verdict = record.verdict
    assert isinstance(verdict, Verdict) and not verdict.passes
    assert replace(verdict, least_recovery=0.1).passes
