import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.layers.norms import RMSNorm, rms_norm
from lm.layers.parameters import Stack


def plain(x, scale, eps):
    """arXiv 1910.07467, equation 4, in float64."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def numeric_gradient(f, x, step=1e-6):
    """Central differences in float64."""
    out = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        high, low = x.copy(), x.copy()
        high[index] += step
        low[index] -= step
        out[index] = (f(high) - f(low)) / (2 * step)
    return out


@pytest.mark.parametrize("dtype,tolerance", [("float32", 2e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8), (2, 2, 3, 4)])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_value_and_gradients(rng, shape, dtype, tolerance, eps):
    x = jnp.asarray(rng.normal(size=shape), dtype)
    scale = jnp.asarray(rng.normal(size=shape[-1]), jnp.float32)
    g = jnp.asarray(rng.normal(size=shape), dtype)
    y, pull = jax.vjp(lambda x, scale: rms_norm(x, scale, eps), x, scale)
    dx, dscale = pull(g)
    assert (y.dtype, dx.dtype, dscale.dtype) == (x.dtype, x.dtype, scale.dtype)
    x64, s64, g64 = (np.asarray(a, np.float64) for a in (x, scale, g))
    close = dict(rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(np.asarray(y, np.float64), plain(x64, s64, eps), **close)
    expected = numeric_gradient(lambda x: np.sum(plain(x, s64, eps) * g64), x64)
    np.testing.assert_allclose(np.asarray(dx, np.float64), expected, **close)
    expected = numeric_gradient(lambda s: np.sum(plain(x64, s, eps) * g64), s64)
    # Inside it is f32 whatever x is, so this gradient does not pay for bf16.
    np.testing.assert_allclose(dscale, expected, rtol=2e-5, atol=2e-5)


def test_vmap_equals_a_loop(rng):
    x = jnp.asarray(rng.normal(size=(4, 3, 8)), jnp.float32)
    scale = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    grad = jax.grad(lambda x, s: jnp.sum(rms_norm(x, s, 1e-5) ** 3), argnums=(0, 1))
    together = jax.vmap(grad)(x, scale)
    for i in range(4):
        for a, b in zip(together, grad(x[i], scale[i]), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)


def test_large_bf16_inputs_do_not_overflow():
    x = jnp.full((1, 8), 1e15, jnp.bfloat16)
    np.testing.assert_allclose(
        np.asarray(rms_norm(x, jnp.ones(8), 1e-5), np.float32), np.ones((1, 8)), rtol=1e-2
    )


def test_module_starts_at_one_and_is_stacked():
    norm = RMSNorm(8, eps=1e-5, dtype="float32", stack=Stack(3))
    np.testing.assert_array_equal(norm.scale[...], np.ones((3, 8)))
    assert norm.scale.get_metadata("logical_axes") == ("layers", "norm")
