import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optim.spectrum
from optim import SpectrumStats, spectrum_stats

SCALARS = ("spike_50", "spike_90", "sigma_1", "sigma_ratio", "entropy_rank", "stable_rank")


def reference(x):
    """The definitions, from NumPy's singular values in float64."""
    s = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    energy = s**2 / (s**2).sum()
    cumulative = np.cumsum(energy)
    return {
        "spike_50": (1 + np.sum(cumulative < 0.5)) / len(s),
        "spike_90": (1 + np.sum(cumulative < 0.9)) / len(s),
        "sigma_1": s[0],
        "sigma_ratio": s[0] / np.median(s),
        "entropy_rank": np.exp(-np.sum(energy * np.log(energy))),
        "stable_rank": 1 / energy[0],
    }


def matrix(rng, m, n, power=0.7, scale=1.0):
    """A matrix whose singular values fall as i^-power."""
    q = min(m, n)
    u = np.linalg.qr(rng.standard_normal((m, q)))[0]
    v = np.linalg.qr(rng.standard_normal((n, q)))[0]
    return ((u * (scale * np.arange(1.0, q + 1) ** -power)) @ v.T).astype(np.float32)


@pytest.mark.parametrize("shape", [(12, 12), (9, 30), (31, 8), (1, 5)])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_equals_the_singular_values(rng, shape, scale):
    x = matrix(rng, *shape, scale=scale)
    got = jax.jit(spectrum_stats)({"w": x})["w"]
    for name, want in reference(x).items():
        np.testing.assert_allclose(getattr(got, name), want, rtol=2e-4, err_msg=name)
    assert got.basis is None and got.alignment is None


def test_leading_axes_are_batch_and_other_leaves_are_left_out(rng):
    stack = np.stack([[matrix(rng, 6, 10, p) for p in (0.1, 0.5, 1.0)] for _ in range(2)])
    tree = {"stack": stack, "bias": np.ones(4, np.float32), "scales": np.ones((2, 4), np.float32)}
    got = spectrum_stats(tree, mask={"stack": True, "bias": True, "scales": False})
    assert got["bias"] is None and got["scales"] is None
    for index in np.ndindex(2, 3):
        for name, want in reference(stack[index]).items():
            np.testing.assert_allclose(getattr(got["stack"], name)[index], want, rtol=2e-4)
    by_function = spectrum_stats(tree, mask=lambda t: {k: v.ndim == 4 for k, v in t.items()})
    assert by_function["scales"] is None and by_function["stack"] is not None


def test_alignment_compares_leading_subspaces(rng):
    u = np.linalg.qr(rng.standard_normal((20, 20)))[0]
    v = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    s = np.array([9.0, 8, 7, 6] + [0.5] * 16)

    def make(columns):
        left = u[:, columns + [c for c in range(20) if c not in columns]]
        return ((left * s) @ v[:20]).astype(np.float32)

    compare = jax.jit(lambda x, before: spectrum_stats(x, before, rank=4))
    first = spectrum_stats(make([0, 1, 2, 3]), rank=4)
    assert first.basis.shape == (20, 4) and np.isnan(first.alignment)
    # Same subspace in another order, half of it, none of it; the transpose has the same sides.
    for columns, want in (([3, 1, 0, 2], 1.0), ([0, 1, 10, 11], 0.5), ([10, 11, 12, 13], 0.0)):
        np.testing.assert_allclose(compare(make(columns), first).alignment, want, atol=1e-5)
        np.testing.assert_allclose(compare(make(columns).T, first).alignment, want, atol=1e-5)
    # One type before and after, so that a jitted caller compiles once.
    kind = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert kind(compare(make([0, 1, 2, 3]), first)) == kind(first)


def test_the_sketch_bounds_what_it_says(rng):
    x = matrix(rng, 120, 200, power=1.0)
    want = reference(x)
    got = spectrum_stats(x, max_side=64, sketch=32, rank=4)
    exact = spectrum_stats(x, rank=4)
    np.testing.assert_allclose(got.sigma_1, want["sigma_1"], rtol=1e-5)
    np.testing.assert_allclose(got.spike_50, want["spike_50"], rtol=1e-5)  # within the sketch
    assert got.sigma_1 <= want["sigma_1"] * (1 + 1e-5)
    for name in ("spike_90", "entropy_rank", "stable_rank"):
        assert want[name] * (1 - 1e-5) <= getattr(got, name) <= 1.2 * want[name], name
    assert 0.8 * want["sigma_ratio"] < got.sigma_ratio < 1.2 * want["sigma_ratio"]
    aligned = spectrum_stats(x, exact, rank=4, max_side=64, sketch=32).alignment
    np.testing.assert_allclose(aligned, 1.0, atol=1e-4)
    # The rest is spread evenly, so a spike share beyond the sketch is a bound, not exact.
    flat = spectrum_stats(np.eye(100, dtype=np.float32), max_side=10, sketch=10)
    np.testing.assert_allclose([flat.spike_50, flat.spike_90], [0.5, 0.9], atol=0.011)
    np.testing.assert_allclose(flat.entropy_rank, 100, rtol=1e-4)
    np.testing.assert_allclose(flat.sigma_ratio, 1, rtol=1e-4)


@pytest.mark.parametrize("max_side", [2048, 4])
def test_zero_and_non_finite_matrices_are_defined(max_side):
    bad = np.ones((4, 6, 8), np.float32)
    bad[0], bad[1, 2, 3], bad[2, 0, 0] = 0, np.nan, np.inf
    got = spectrum_stats(bad, rank=2, max_side=max_side, sketch=4)
    for name in SCALARS:
        value = getattr(got, name)
        assert value[0] == 0 and np.isnan(value[1]) and np.isnan(value[2]), name
        assert np.isfinite(value[3]), name
    # Rank one: everything in the first direction, the median at the floor of f32.
    np.testing.assert_allclose(got.stable_rank[3], 1, rtol=1e-5)
    np.testing.assert_allclose(got.spike_90[3], 1 / 6, rtol=1e-5)
    assert 1e3 < got.sigma_ratio[3] <= 2897


def test_half_precision_is_measured_in_f32(rng):
    x = jnp.asarray(matrix(rng, 16, 16), jnp.bfloat16)
    got = spectrum_stats(x)
    want = reference(np.asarray(x, np.float32))
    assert got.sigma_1.dtype == jnp.float32
    np.testing.assert_allclose(got.sigma_1, want["sigma_1"], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, "rank must be 0 or more, got -1"),
        ({"rank": 9, "sketch": 8}, "sketch must be at least .* 9, got 8"),
        ({"previous": {"w": None}}, "give rank above 0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        spectrum_stats({"w": np.ones((3, 3), np.float32)}, **options)


def test_empty_leaves_are_left_out():
    stats = spectrum_stats({"a": jnp.ones((0, 4)), "b": jnp.ones((2, 3, 0)), "c": jnp.ones((2, 2))})
    assert stats["a"] is None and stats["b"] is None and stats["c"].sigma_1 == pytest.approx(2.0)


def test_fields_are_float32_where_64_bits_are_enabled():
    with jax.enable_x64(True):
        first = spectrum_stats(jnp.ones((4, 3)), rank=2)
        second = spectrum_stats(jnp.ones((4, 3)), first, rank=2)
        assert {leaf.dtype for leaf in jax.tree.leaves((first, second))} == {jnp.dtype("float32")}


def test_example():
    assert doctest.testmod(optim.spectrum).failed == 0
    assert SpectrumStats._fields[:6] == SCALARS
