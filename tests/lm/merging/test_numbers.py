"""Conversions against ml_dtypes' and NumPy's own, over all bit patterns."""

import ml_dtypes
import numpy as np
import pytest

from lm.merging.numbers import all_finite, from_float32, is_float, resolution, to_float32

SIXTEEN = [ml_dtypes.bfloat16, np.float16]


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_every_sixteen_bit_number_becomes_its_float32(dtype):
    every = np.arange(65536, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        expected = np.array([float(v) for v in every], np.float32)
        got = to_float32(every, np.empty(70000, np.float32))
    np.testing.assert_array_equal(got, expected)  # NaN where NaN is
    zero = every.astype(np.float32) == 0
    np.testing.assert_array_equal(np.signbit(got[zero]), np.signbit(expected[zero]))


def test_halves_without_infinities_take_the_fast_way_and_agree():
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    got = to_float32(finite, np.empty(finite.size, np.float32))
    np.testing.assert_array_equal(got.view(np.uint32), finite.astype(np.float32).view(np.uint32))


def test_bfloat16_is_rounded_to_nearest_even(rng):
    values = rng.standard_normal(5000).astype(np.float32)
    values[:4] = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -(1 + 2**-8)]  # ties and beside
    got = from_float32(values, np.empty(5000, ml_dtypes.bfloat16)).astype(np.float64)
    assert got[:4].tolist() == [1.0, 1 + 2**-6, 1 + 2**-7, -1.0]
    step = 2.0 ** (np.floor(np.log2(np.abs(values))) - 7)
    assert (np.abs(got - values.astype(np.float64)) <= step / 2).all()


@pytest.mark.parametrize("dtype", [*SIXTEEN, np.float32, np.float64, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_one_bad_number_is_found(dtype, bad, rng):
    values = rng.standard_normal(1000).astype(np.float32).astype(dtype)
    assert all_finite(values)
    values[357] = bad
    assert not all_finite(values)


@pytest.mark.parametrize("dtype", [*SIXTEEN, np.float32])
def test_the_largest_numbers_are_finite(dtype):
    info = ml_dtypes.finfo(dtype)
    assert all_finite(np.array([info.max, -info.max, 0, -0.0], dtype))


def test_integers_are_copied_and_always_finite():
    assert not is_float("int64") and not is_float("bool") and is_float("float8_e4m3fn")
    assert all_finite(np.array([-1, 2**62]))


def test_resolution_is_the_spacing_above_one():
    for dtype in (*SIXTEEN, np.float32):
        assert resolution(dtype) == float(ml_dtypes.finfo(dtype).eps)
