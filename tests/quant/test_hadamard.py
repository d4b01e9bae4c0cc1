import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quant

SIZES = (16, 32, 64, 128)


def by_hand(x, size, signs):
    """Entry (i, j) of H is (-1)**(common bits of i and j); float64."""
    h = np.array([[(-1) ** bin(i & j).count("1") for j in range(size)] for i in range(size)])
    tiles = np.asarray(x, np.float64).reshape(*x.shape[:-1], -1, size)
    return (tiles * signs @ h / np.sqrt(size)).reshape(x.shape)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("signed", [False, True])
def test_definition_inverse_and_gradient(size, signed, rng, getkey):
    x = rng.standard_normal((3, 2 * size)).astype(np.float32)
    signs = quant.random_signs(getkey(), size) if signed else None
    options = dict(axis=-1, size=size, signs=signs)
    y = quant.hadamard(x, **options)
    numbers = np.asarray(signs, np.float64) if signed else np.ones(size)
    np.testing.assert_allclose(y, by_hand(x, size, numbers), atol=2e-6)
    np.testing.assert_allclose(quant.inverse_hadamard(y, **options), x, atol=2e-6)
    if not signed:  # its own inverse
        np.testing.assert_allclose(quant.hadamard(y, **options), x, atol=2e-6)
    # The transpose of an orthonormal map is its inverse.
    c = rng.standard_normal(x.shape).astype(np.float32)
    grad = jax.grad(lambda x: jnp.vdot(quant.hadamard(x, **options), c))(x)
    np.testing.assert_allclose(grad, quant.inverse_hadamard(c, **options), atol=2e-6)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_any_axis(axis, rng):
    x = rng.standard_normal((32, 16, 48)).astype(np.float32)
    y = quant.hadamard(x, axis=axis, signs=quant.TE_SIGNS)
    expected = by_hand(np.moveaxis(x, axis, -1), 16, np.array(quant.TE_SIGNS))
    np.testing.assert_allclose(y, np.moveaxis(expected, -1, axis), atol=2e-6)
    np.testing.assert_array_equal(
        y, jax.jit(lambda x: quant.hadamard(x, axis=axis, signs=quant.TE_SIGNS))(x)
    )


def test_cancels_in_the_product(rng):
    x = rng.standard_normal((64, 8)).astype(np.float32)
    d = rng.standard_normal((64, 5)).astype(np.float32)
    options = dict(axis=0, size=32, signs=quant.random_signs(jax.random.key(3), 32))
    product = quant.hadamard(x, **options).T @ quant.hadamard(d, **options)
    np.testing.assert_allclose(product, x.T @ d, atol=2e-5)


def test_spreads_an_outlier():
    x = np.zeros((4, 64), np.float32)
    x[:, 19] = 8
    y = np.asarray(quant.hadamard(x, axis=-1, signs=quant.TE_SIGNS))
    np.testing.assert_array_equal(np.abs(y[:, 16:32]), 2)
    assert not y[:, :16].any() and not y[:, 32:].any()


def test_types_empty_arrays_and_nan():
    assert quant.hadamard(jnp.ones(16, jnp.bfloat16), axis=0).dtype == jnp.float32
    assert quant.hadamard(jnp.ones((0, 16)), axis=1).shape == (0, 16)
    y = quant.hadamard(jnp.zeros(32).at[3].set(jnp.nan), axis=0)
    assert np.isnan(y[:16]).all() and not np.isnan(y[16:]).any()


def test_random_signs(getkey):
    signs = np.asarray(quant.random_signs(getkey(), 64))
    assert set(signs.tolist()) == {-1.0, 1.0} and signs.shape == (64,)
    assert len(quant.TE_SIGNS) == 16


@pytest.mark.parametrize(
    "shape,options,error,message",
    [
        ((16,), {"axis": 0, "size": 8}, ValueError, r"one of \(16, 32, 64, 128\), not 8"),
        ((20,), {"axis": 0}, ValueError, "20 values, no multiple of 16; pad both"),
        ((16,), {"axis": 1}, ValueError, "axis 1 is out of range"),
        ((16,), {"axis": 0, "signs": (1, -1)}, ValueError, r"shape \(2,\), expected \(16,\)"),
    ],
)
def test_bad_arguments_say_why(shape, options, error, message):
    for function in (quant.hadamard, quant.inverse_hadamard):
        with pytest.raises(error, match=message):
            function(jnp.ones(shape), **options)
    with pytest.raises(TypeError, match="not int32"):
        quant.hadamard(jnp.ones(16, jnp.int32), axis=0)
