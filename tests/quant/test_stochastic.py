"""What is true on average, and the published errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quant

FLOOR = dataclasses.replace(quant.MXFP4, rule="floor")
OAS = dataclasses.replace(quant.MXFP4, rule="oas")
SQUARE = {"block_2d": True}


@pytest.fixture(scope="module")
def normal():
    return np.random.default_rng(5).standard_normal((1024, 2048)).astype(np.float32)


def stochastic(x, fmt, seed, **options):
    key = jax.random.key(seed)
    return quant.fake_quant(x, fmt, axis=-1, rounding="stochastic", key=key, **options)


@pytest.mark.parametrize(
    "fmt,options,published",
    [
        (quant.NVFP4, {}, 9.04),
        (quant.NVFP4, SQUARE, 12.38),
        (quant.NVFP4, {"rounding": "stochastic", "key": jax.random.key(0)}, 23.50),
        (
            quant.NVFP4,
            {"rounding": "stochastic", "key": jax.random.key(0), "sr_headroom": 1},
            18.9,
        ),
        (dataclasses.replace(quant.NVFP4, scale="f32", tensor_scale=False), {}, 8.86),
        (FLOOR, {}, 13.21),
        (quant.MXFP4, {}, 13.30),
    ],
)
def test_mean_squared_error_on_normal_values(normal, fmt, options, published):
    """Times 1000, on N(0, 1); 9.0, 12.4 and 23.5 also in arXiv 2601.22813, Table 1."""
    y = np.asarray(quant.fake_quant(normal, fmt, axis=-1, **options), np.float64)
    assert 1000 * ((y - normal) ** 2).mean() == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    "fmt,options",
    [
        (quant.NVFP4, {}),
        (quant.NVFP4, SQUARE),
        (dataclasses.replace(quant.NVFP4, tensor_scale=False), {}),
        (quant.MXFP4, {}),
        (FLOOR, {}),
        (OAS, {}),
        (quant.MXFP8, {}),
        (dataclasses.replace(quant.MXFP8, rule="floor"), {}),
        (quant.FP8, {}),
    ],
)
def test_stochastic_rounding_is_unbiased_for_every_value(fmt, options, rng):
    x = rng.standard_normal((32, 64)).astype(np.float32)
    x[:16] *= 1e2
    n = 512
    one = lambda key: quant.fake_quant(  # noqa: E731
        x, fmt, axis=-1, rounding="stochastic", key=key, **options
    )
    y = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), n)), np.float64)
    below, above = y.min(0), y.max(0)
    # Of n draws between two neighbours, (x - below) / (above - below) * n go up; the rarer of both
    # is expected 40 times or more in what is looked at, so that its count is nearly normal.
    share = (x - below) / np.where(above > below, above - below, 1)
    often = (above > below) & (n * np.minimum(share, 1 - share) >= 40)
    assert often.mean() > 0.4
    z = (y.mean(0) - x)[often] / np.sqrt(((x - below) * (above - x))[often] / n)
    assert (np.abs(z) < 6).all() and abs(z.mean()) < 5 / np.sqrt(often.sum())
    once = below == above  # on the grid, or so near it that all went there
    slack = np.abs(below).max() * 2**-9 if fmt.block is None else np.abs(x) * 2**-3 + 1e-3
    assert (np.abs(below - x) <= slack)[once].all()


@pytest.mark.parametrize(
    "fmt,biased", [(quant.NVFP4, 0.9967), (FLOOR, 0.9897), (OAS, 0.9980)], ids=lambda v: str(v)[:20]
)
def test_headroom_removes_the_documented_bias(normal, fmt, biased):
    x = normal.astype(np.float64)

    def share(**options):
        y = np.asarray(stochastic(normal, fmt, 3, **options), np.float64)
        return (y * x).sum() / (x * x).sum()

    # Standard error of one draw of 2M values: 0.00012.
    assert share(sr_headroom=1) == pytest.approx(biased, abs=6e-4)
    assert share() == pytest.approx(1, abs=6e-4)


def test_mean_over_keys_beats_nearest(normal):
    x = normal[:64, :256]
    nearest = np.asarray(quant.fake_quant(x, quant.NVFP4, axis=-1))
    f = jax.jit(lambda seed: stochastic(x, quant.NVFP4, seed))
    mean = np.mean([np.asarray(f(seed)) for seed in range(32)], 0)
    assert np.square(mean - x).mean() < 0.2 * np.square(nearest - x).mean()


def test_one_key_rounds_alike_and_two_do_not(normal):
    x = jnp.asarray(normal[:8])
    a, b, c = (stochastic(x, quant.NVFP4, seed) for seed in (0, 0, 1))
    assert (a == b).all() and (a != c).any()
