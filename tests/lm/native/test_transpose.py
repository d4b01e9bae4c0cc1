"""Transposes in C are exact, and refused where the code is not for them."""

import ctypes

import jax.numpy as jnp
import numpy as np
import pytest

from lm import native

SHAPES = [(1, 1), (16, 16), (17, 33), (100, 7), (16, 15), (48, 64), (513, 1030)]
DTYPES = [np.float32, np.int32, np.float16, jnp.bfloat16, np.uint16]


def draw(rng, shape, dtype):
    size = np.dtype(dtype).itemsize
    return rng.integers(0, 1 << 8 * size, shape, f"u{size}").view(dtype)


def bits(array):
    """NaN equals itself, and no zero equals another."""
    return array.view(f"u{array.itemsize}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_exact(rng, compiled, shape, dtype):
    source = draw(rng, shape, dtype)
    target = np.zeros(shape[::-1], dtype)
    assert native.transpose(source, target)
    np.testing.assert_array_equal(bits(target), bits(source).T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns", [(17, 33), (40, 16), (1, 9)])
def test_rows_may_lie_apart(rng, compiled, rows, columns, dtype):
    """Nothing beside the target is touched, and nothing beside the source arrives."""
    around = draw(rng, (rows * 2, columns + 9), dtype)
    whole = draw(rng, (columns + 2, rows + 11), dtype)
    source, target = around[::2, 5 : 5 + columns], whole[1:-1, 3 : 3 + rows]
    wanted = bits(whole).copy()
    wanted[1:-1, 3 : 3 + rows] = bits(source.copy()).T
    assert native.transpose(source, target)
    np.testing.assert_array_equal(bits(whole), wanted)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_rows_may_lie_backwards(rng, compiled, dtype):
    source, target = draw(rng, (33, 18), dtype), np.zeros((18, 33), dtype)
    assert native.transpose(source[::-1], target[::-1])
    np.testing.assert_array_equal(bits(target), bits(source)[::-1].T[::-1])


@pytest.mark.parametrize("rows, columns", [(0, 5), (5, 0), (0, 0)])
def test_empty_ones_write_nothing(compiled, rows, columns):
    around = np.ones((6, 6), np.float32)
    target = around[:columns, :rows]
    assert native.transpose(np.zeros((6, 6), np.float32)[:rows, :columns], target)
    assert around.all()


def kept(source, target):
    before = target.copy()
    assert not native.transpose(source, target)
    np.testing.assert_array_equal(target, before)


@pytest.mark.parametrize("dtype", [np.int8, np.float64, np.complex64, bool])
def test_other_sizes_are_refused(compiled, dtype):
    kept(np.ones((4, 6), dtype), np.zeros((6, 4), dtype))


def test_two_sizes_are_refused(compiled):
    kept(np.ones((4, 6), np.float32), np.zeros((6, 4), np.float16))
    kept(np.ones((4, 6), np.float16), np.zeros((6, 4), np.float32))


@pytest.mark.parametrize("shape", [(4, 6), (6, 5), (5, 4), (4, 4), (24, 1)])
def test_wrong_shapes_are_refused(compiled, shape):
    kept(np.ones((4, 6), np.float32), np.zeros(shape, np.float32))


def test_elements_that_lie_apart_are_refused(compiled):
    apart = np.arange(48.0, dtype=np.float32).reshape(4, 12)[:, ::2]
    kept(apart, np.zeros((6, 4), np.float32))
    kept(np.ones((4, 6), np.float32), np.zeros((6, 8), np.float32)[:, ::2])
    kept(np.ones((6, 4), np.float32).T, np.zeros((6, 4), np.float32))
    kept(np.ones((4, 6), np.float32)[:, ::-1], np.zeros((6, 4), np.float32))


def test_without_the_library_nothing_is_done(monkeypatch):
    monkeypatch.setenv("ANISO_NATIVE", "0")
    kept(np.ones((4, 6), np.float32), np.zeros((6, 4), np.float32))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_exact_on_other_processors(rng, built, dtype):
    turn = built[1].aniso_transpose
    pointer, length = ctypes.c_void_p, ctypes.c_int64
    for shape in SHAPES:
        source, target = draw(rng, shape, dtype), np.zeros(shape[::-1], dtype)
        turn(
            *(pointer(target.ctypes.data), length(target.strides[0])),
            *(pointer(source.ctypes.data), length(source.strides[0])),
            *map(length, (*shape, source.itemsize)),
        )
        np.testing.assert_array_equal(bits(target), bits(source).T)
