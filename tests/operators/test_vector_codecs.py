import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from penstock.operators.vector_codecs import (
    HALF_LARGEST,
    LVQ4X8_STEPS,
    LVQ8_STEPS,
    RESIDUAL_STEPS,
    LvqCodes,
    VectorCodec,
    code_bytes,
    decode_lvq,
    encode_lvq,
    half_to_single,
    is_lvq,
    stored_bytes,
)

LVQ = [VectorCodec.LVQ8, VectorCodec.LVQ4X8]
# Values are added in float32, each step rounding by half a unit in the last place of the largest term.
ROUNDING = 8 * float(np.finfo(np.float32).eps)


def _decoded(encoded: LvqCodes, mean: np.ndarray, codec: VectorCodec) -> np.ndarray:
    out = np.full((len(encoded.codes), len(mean)), np.nan, np.float32)
    decode_lvq(encoded, mean, codec, out)
    return out


def _bounds(encoded: LvqCodes, codec: VectorCodec) -> np.ndarray:
    """The error that ALGORITHMS allows a value of each vector: half a step of the last level, float64 (n, 1)."""
    steps = encoded.scales.astype(np.float64)[:, None]
    return steps / 2 if codec is VectorCodec.LVQ8 else steps / (2 * RESIDUAL_STEPS)


@pytest.mark.parametrize("codec", LVQ)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_value_errs_by_more_than_half_a_step(codec: VectorCodec, data: st.DataObject) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=9))
    largest = data.draw(st.sampled_from([2.0**-20, 1.0, 30_000.0]))
    values = st.floats(-largest, largest, width=32)
    vectors = data.draw(hnp.arrays(np.float32, shape, elements=values))
    mean = data.draw(hnp.arrays(np.float32, shape[1], elements=values))
    encoded = encode_lvq(vectors, mean, codec)
    errors = np.abs(_decoded(encoded, mean, codec).astype(np.float64) - vectors)
    assert np.isfinite(encoded.offsets).all() and (encoded.scales >= 0).all()
    assert (errors <= _bounds(encoded, codec) + ROUNDING * largest).all()


@pytest.mark.parametrize("codec", LVQ)
@pytest.mark.parametrize("dimension", [1, 7, 384])
def test_codes_follow_the_definition(codec: VectorCodec, dimension: int) -> None:
    generator = np.random.default_rng(dimension)
    vectors = generator.standard_normal((50, dimension)).astype(np.float32) + 3
    mean = vectors.mean(axis=0)
    encoded = encode_lvq(vectors, mean, codec)
    offsets, scales = (column.astype(np.float64)[:, None] for column in (encoded.offsets, encoded.scales))
    if codec is VectorCodec.LVQ8:
        steps = encoded.codes.astype(np.float64)
    else:
        half = (dimension + 1) // 2
        nibbles = np.concatenate([encoded.codes[:, :half] & 15, encoded.codes[:, :half] >> 4], axis=1)[:, :dimension]
        residuals = encoded.codes[:, half:]
        steps = nibbles + (residuals / RESIDUAL_STEPS - 0.5)
    assert np.allclose(_decoded(encoded, mean, codec), mean + offsets + scales * steps, atol=1e-5)
    most = LVQ8_STEPS if codec is VectorCodec.LVQ8 else LVQ4X8_STEPS
    reach = (vectors - mean).astype(np.float64)
    assert (offsets <= reach.min(axis=1, keepdims=True)).all()
    assert (offsets + most * scales >= reach.max(axis=1, keepdims=True) - 1e-6).all()


def test_two_levels_come_closer_than_one() -> None:
    vectors = np.random.default_rng(2).standard_normal((100, 96)).astype(np.float32)
    mean = vectors.mean(axis=0)
    one, two = (np.abs(_decoded(encode_lvq(vectors, mean, codec), mean, codec) - vectors).max() for codec in LVQ)
    assert two < one / 10  # 15 * 255 steps against 255


@pytest.mark.parametrize("codec", LVQ)
def test_equal_values_and_the_mean_itself_come_back(codec: VectorCodec) -> None:
    mean = np.array([1.5, -2, 0.1], np.float32)
    vectors = np.array([mean, mean + np.float32(0.25), mean - np.float32(HALF_LARGEST)], np.float32)
    encoded = encode_lvq(vectors, mean, codec)
    assert np.array_equal(_decoded(encoded, mean, codec)[:2], vectors[:2])
    assert encoded.scales[:2].tolist() == [0, 0]


@pytest.mark.parametrize("codec", VectorCodec)
def test_bytes_are_those_of_the_arrays(codec: VectorCodec) -> None:
    for dimension in (1, 8, 33):
        vectors = np.random.default_rng(1).standard_normal((4, dimension)).astype(np.float32)
        if is_lvq(codec):
            encoded = encode_lvq(vectors, vectors.mean(axis=0), codec)
            columns = [encoded.codes, encoded.offsets, encoded.scales]
        else:
            columns = [vectors.astype(codec.value)]
        assert code_bytes(codec, dimension) * 4 == columns[0].nbytes
        assert stored_bytes(codec, dimension) * 4 == sum(column.nbytes for column in columns)


def test_every_finite_half_converts_exactly() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = halves[np.isfinite(halves)].reshape(-1, 8)
    single = np.empty(finite.shape, np.float32)
    half_to_single(finite, single)
    assert np.array_equal(single.view(np.uint32), finite.astype(np.float32).view(np.uint32))
