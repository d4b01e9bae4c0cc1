"""Mean removal: identities of Averis (arXiv 2603.10444), and what centring buys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quant
from quant.operands import dense, prepare, take_out

KEY = quant.fold_seed(jax.random.key(0), 0)


def shifted(share, channels=1.0, rows=2048, cols=512):
    """1 mu^T + N(0, 1) with this share of its energy in the mean, in a share of the channels."""
    rng = np.random.default_rng(0)
    mu = rng.standard_normal(cols) * (np.arange(cols) % round(1 / channels) == 0)
    mu *= np.sqrt(share / (1 - share) * cols) / np.linalg.norm(mu)
    return np.float32(mu + rng.standard_normal((rows, cols)))


def operand(recipe, x, role="fprop_x", axis=1):
    """x as the product of a recipe sees it."""
    side = prepare(
        recipe, role, take_out(recipe, "x", jnp.asarray(x), recipe.fprop_x, KEY, None), axis, KEY
    )
    return np.asarray(dense(side), np.float64)


def errors(got, x):
    """Relative error of all, and of what distinguishes tokens relative to that part."""
    centred = lambda t: t - t.mean(0)  # noqa: E731
    norm = np.linalg.norm
    e = got - x
    return norm(e) / norm(x), norm(centred(e)) / norm(centred(x))


@pytest.mark.parametrize(
    "share,channels,raw,raw_centred,published,published_centred,ours",
    # docs: 2048 x 512, total and centred relative errors.
    [
        (0.51, 1, 0.095, 0.135, 0.094, 0.095, 0.067),
        (0.90, 1, 0.094, 0.298, 0.091, 0.095, 0.030),
        (0.99, 1, 0.093, 0.824, 0.093, 0.095, 0.010),
        (0.91, 0.02, 0.092, 0.316, None, 0.095, 0.028),
    ],
)
def test_what_centring_buys(share, channels, raw, raw_centred, published, published_centred, ours):
    x = shifted(share, channels)
    before = errors(operand(quant.get_recipe("nvfp4"), x), x)
    paper = errors(operand(quant.get_recipe("mean_paper"), x), x)
    high = errors(operand(quant.get_recipe("mean"), x), x)
    assert before == pytest.approx((raw, raw_centred), rel=0.08)
    # Where few channels hold the mean, the error of an FP4 mean is that of a few numbers.
    assert paper[0] == pytest.approx(published, rel=0.08) if published else paper[0] < raw / 1.5
    assert (paper[1], high[1]) == pytest.approx((published_centred,) * 2, rel=0.03)
    assert high[0] == pytest.approx(ours, rel=0.08)
    # The rule; where the error of the raw tensor is not much below 1 it saturates.
    if share < 0.95:
        assert before[1] / paper[1] == pytest.approx(1 / np.sqrt(1 - share), rel=0.1)


def test_energy_splits():
    x = shifted(0.8, rows=300)
    parts = take_out(
        quant.get_recipe("mean"), "x", jnp.asarray(x), quant.get_recipe("mean").fprop_x, KEY, None
    )
    mean, residual = np.asarray(parts.mean, float), np.asarray(parts.residual, float)
    total = np.sum(np.square(x, dtype=float))
    assert len(x) * mean @ mean + np.sum(residual**2) == pytest.approx(total, rel=1e-5)
    assert len(x) * mean @ mean / total == pytest.approx(0.8, abs=0.01)


def test_middle_terms_of_wgrad_are_zero_only_before_quantization():
    x = shifted(0.5, rows=64, cols=32)
    before = operand(quant.Recipe("r", mean=quant.Mean()), x) - 0  # not quantized: whole
    np.testing.assert_array_equal(before, x)
    centred = x - x.mean(0)
    assert np.abs(centred.sum(0)).max() < 1e-4
    seen = operand(quant.get_recipe("mean"), x, "wgrad_x", 0) - x.mean(0)
    assert np.abs(seen.sum(0)).max() > 0.1


def test_weights_are_not_centred():
    w = jnp.asarray(shifted(0.9, rows=64, cols=32))
    recipe = quant.get_recipe("mean")
    assert take_out(recipe, "w", w, recipe.fprop_w, KEY, None).mean is None
    only_x = quant.Recipe("r", mean=quant.Mean(d=False))
    assert take_out(only_x, "d", w, recipe.dgrad_d, KEY, None).mean is None
