"""What is measured about a layer, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quant

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def tensors():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((128, 64)) + 2 * rng.standard_normal(64)
    return [
        np.float32(t) for t in (x, rng.standard_normal((64, 48)), rng.standard_normal((128, 48)))
    ]


@pytest.fixture(scope="module")
def measured(tensors):
    """Numbers by name, as the gradient of a probe hands them out of a layer."""
    x, w, d = tensors

    @functools.cache
    def run(recipe):
        def loss(probe):
            f = quant.dot_general(recipe, key=KEY, probe=probe)
            return (f(x, w, (((1,), (0,)), ((), ()))) * d).sum()

        numbers = jax.jit(jax.grad(loss))(jnp.zeros(len(quant.NAMES)))
        return dict(zip(quant.NAMES, np.asarray(numbers).tolist(), strict=True))

    return run


def test_numbers_of_a_plain_recipe(measured, tensors):
    x, w, d = tensors
    got = measured(quant.get_recipe("nvfp4"))
    for name, t in (("x", x), ("d", d)):
        share = len(t) * np.sum(t.mean(0) ** 2) / np.sum(t**2)
        assert got[f"mean_share/{name}"] == pytest.approx(share, rel=1e-4)
    for name, t in (("x", x - x.mean(0)), ("w", w), ("d", d - d.mean(0))):
        k = max(1, round(0.015 * min(t.shape)))
        s = np.linalg.svd(t, compute_uv=False) ** 2
        # Noise has no gap behind its first direction: a random search finds most of it.
        assert 0.75 < got[f"spike_share/{name}"] / (s[:k].sum() / s.sum()) < 1.001
    for role, t, axis in (("fprop_x", x, 1), ("fprop_w", w, 0), ("wgrad_x", x, 0)):
        q = quant.quantize(t, quant.NVFP4, axis=axis)
        back = np.asarray(quant.dequantize(q))
        snr = 10 * np.log10(np.sum(t**2) / np.sum((back - t) ** 2))
        assert got[f"snr/{role}"] == pytest.approx(snr, abs=0.01)
        assert got[f"underflow/{role}"] == pytest.approx(np.mean((back == 0) & (t != 0)), abs=1e-6)
    assert got["saturated/dgrad_d"] == 0  # headroom
    assert 0 < got["saturated/fprop_x"] < 0.05


def test_what_a_recipe_takes_out_is_not_noise(measured):
    plain, mean = (measured(quant.get_recipe(name)) for name in ("nvfp4", "mean_hadamard"))
    # The mean holds 80 % of x: without it, 7 dB less are quantized.
    assert mean["snr/fprop_x"] > plain["snr/fprop_x"] + 5
    assert mean["snr/wgrad_x"] > plain["snr/wgrad_x"] + 5
    assert mean["snr/fprop_w"] == pytest.approx(plain["snr/fprop_w"], abs=1e-3)
