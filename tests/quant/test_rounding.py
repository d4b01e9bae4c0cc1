import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import quant
from quant.qarray import load_scales, store_scales
from quant.rounding import (
    decode_e2m1,
    encode_e2m1,
    random_bits,
    round_nearest,
    round_stochastic,
)


def grid_of(element):
    """All finite numbers of a grid, from ml_dtypes."""
    codes = np.arange(2**element.bits, dtype=np.uint8).view(element.dtype).astype(np.float32)
    return np.unique(codes[np.isfinite(codes)])


@pytest.mark.parametrize("element", [quant.E2M1, quant.E4M3, quant.E5M2])
def test_nearest_equals_the_casts_of_ml_dtypes_at_every_edge(element):
    grid = grid_of(element)
    middle = (grid[1:] + grid[:-1]) / 2
    edges = np.concatenate([grid, middle])
    points = np.concatenate(
        [edges, np.nextafter(edges, np.float32(-9e9)), np.nextafter(edges, np.float32(9e9))]
    )
    points = np.clip(points, -element.max, element.max).astype(np.float32)
    points = points[(np.abs(points) > 1e-30) | (points == 0)]
    expected = points.astype(element.dtype).astype(np.float32)
    for function in (round_nearest, jax.jit(round_nearest, static_argnums=1)):
        got = np.asarray(function(points, element))
        np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


def test_ties_of_e2m1_go_to_the_even_code():
    ties = jnp.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    np.testing.assert_array_equal(round_nearest(ties, quant.E2M1), [0, 1, 1, 2, 2, 4, 4])


def test_all_e2m1_codes_both_ways():
    codes = np.arange(16, dtype=np.uint8)
    numbers = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    decoded = np.asarray(decode_e2m1(jnp.asarray(codes)))
    np.testing.assert_array_equal(decoded.view(np.uint32), numbers.view(np.uint32))  # -0 as well
    np.testing.assert_array_equal(encode_e2m1(jnp.asarray(numbers)), codes)


@pytest.mark.parametrize("fmt", [quant.NVFP4, quant.MXFP4])
def test_all_scale_codes_both_ways(fmt):
    codes = np.arange(256, dtype=np.uint8)
    if fmt is quant.NVFP4:
        codes = codes[codes < 128]  # scales are not negative
    numbers = codes.view(fmt.scale_dtype).astype(np.float32)
    loaded = np.asarray(load_scales(jnp.asarray(codes.view(fmt.scale_dtype)), fmt))
    expected = np.where(np.abs(numbers) < 2.0**-126, np.float32(0), numbers)  # E8M0 code 0
    np.testing.assert_array_equal(loaded, expected)
    stored = np.asarray(jax.jit(store_scales, static_argnums=1)(loaded, fmt)).view(np.uint8)
    np.testing.assert_array_equal(stored, codes)


def test_nan_is_never_a_number_in_rounding():
    nan = jnp.array([jnp.nan])
    assert jnp.isnan(round_nearest(nan, quant.E2M1)).all()
    assert jnp.isnan(round_stochastic(nan, quant.E4M3, jnp.zeros(1, jnp.uint32))).all()


@pytest.mark.parametrize("element", [quant.E2M1, quant.E4M3])
def test_stochastic_rounding_takes_neighbours_with_the_right_frequency(element, getkey):
    rng = np.random.default_rng(1)
    grid = grid_of(element)
    y = rng.uniform(-element.max, element.max, 64).astype(np.float32)
    y[:8] = rng.uniform(-1, 1, 8)
    y[8:10] = grid[[1, len(grid) // 2 + 1]]
    n = 20000
    many = jnp.broadcast_to(jnp.asarray(y), (n, 64))
    got = np.asarray(round_stochastic(many, element, random_bits(getkey(), (n, 64))))
    below = grid[np.searchsorted(grid, y, side="right") - 1]
    above = grid[np.searchsorted(grid, y, side="left")]
    assert ((got == below) | (got == above)).all()
    share = np.where(above > below, (y - below) / np.where(above > below, above - below, 1), 0)
    error = (got == above).mean(0)[above > below] - share[above > below]
    assert (np.abs(error) < 5 * np.sqrt(share * (1 - share) / n)[above > below] + 1e-6).all()


def test_random_bits_are_uniform_and_independent(getkey):
    shape = (512, 1024)
    bits = np.asarray(random_bits(getkey(), shape))
    n = bits.size
    for shift in (0, 8, 16, 24):  # chi-squared of each byte: mean 255, sd 22.6
        counts = np.bincount(((bits >> shift) & 255).ravel(), minlength=256)
        assert abs(((counts - n / 256) ** 2 / (n / 256)).sum() - 255) < 5 * 22.6
    z = (bits / 2.0**32 - 0.5) * 12**0.5
    other = (np.asarray(random_bits(getkey(), shape)) / 2.0**32 - 0.5) * 12**0.5
    assert abs((z * other).sum()) < 5 * n**0.5
    for a, b in [(0, 1), (0, 2), (0, 16), (1, 0), (16, 0), (1, 1)]:
        assert abs((z[a:, b:] * z[: 512 - a, : 1024 - b]).sum()) < 5 * n**0.5


def test_random_bits_depend_on_the_place_alone(getkey):
    key = getkey()
    once = random_bits(key, (4, 8))
    np.testing.assert_array_equal(once, jax.jit(random_bits, static_argnums=1)(key, (4, 8)))
    np.testing.assert_array_equal(once.ravel(), random_bits(key, (32,)))
    np.testing.assert_array_equal(once, random_bits(key, (6, 8))[:4])
    assert len(np.unique(random_bits(key, (4096,)))) > 4090
    assert random_bits(jax.random.key(0, impl="rbg"), (4,)).shape == (4,)


def test_keys_differ_in_every_part():
    base = jax.random.key(0)
    parts = [
        dict(layer=layer, role=role, step=step)
        for layer in (0, 1, "attention.q")
        for role in ("dgrad.d", "wgrad.d")
        for step in (0, 1)
    ]
    keys = {tuple(jax.random.key_data(quant.fold_key(base, **part)).tolist()) for part in parts}
    assert len(keys) == len(parts)
    traced = jax.jit(lambda layer, step: quant.fold_key(base, layer=layer, role="x", step=step))
    assert traced(3, 5) == quant.fold_key(base, layer=3, role="x", step=5)
    with pytest.raises(TypeError, match="role must be a string"):
        quant.fold_key(base, layer=0, role=1, step=0)
