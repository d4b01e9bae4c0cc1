"""Leading directions from a sample, the split by them, and what it buys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quant
from quant.low_rank import leading_basis, split

KEY = jax.random.key(0)


def spiked(share, rows=2048, cols=512, k=8, seed=0):
    """Noise and k directions of equal size that hold this share of the energy; their basis."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((rows, cols))
    u, v = (np.linalg.qr(rng.standard_normal((n, k)))[0] for n in (rows, cols))
    size = np.linalg.norm(noise) * np.sqrt(share / (1 - share) / k)
    return np.float32(noise + size * u @ v.T), v


def alignment(basis, true):
    """Mean squared cosine of the angles between two subspaces."""
    return np.linalg.norm(np.asarray(basis, np.float64).T @ true) ** 2 / true.shape[1]


@pytest.mark.parametrize("share,least,most", [(0.94, 0.99, 1), (0.4, 0.4, 0.95)])
def test_a_sample_finds_the_directions(share, least, most):
    """Rows of 5 %, one iteration: .99 where they hold most of the energy, less where not."""
    x, true = spiked(share)
    low_rank = quant.LowRank(rows=0.05, iterations=1)
    find = jax.jit(lambda x: leading_basis(x, 8, low_rank, KEY, all_rows=False))
    basis = find(x)
    assert basis.shape == (512, 8) and basis.dtype == jnp.float32
    np.testing.assert_allclose(basis.T @ basis, np.eye(8), atol=1e-5)
    assert least < alignment(basis, true) <= most + 1e-5
    chance = np.linalg.qr(np.random.default_rng(1).standard_normal((512, 8)))[0]
    assert alignment(chance, true) < 0.1


def test_all_rows_do_as_well_as_the_decomposition():
    x, _ = spiked(0.4)
    low_rank = quant.LowRank(iterations=2)
    find = jax.jit(lambda x: leading_basis(x, 8, low_rank, KEY, all_rows=True))
    basis = np.asarray(find(x), float)
    v = np.linalg.svd(x, full_matrices=False)[2][:8].T
    left = lambda b: np.linalg.norm(x - x @ b @ b.T)  # noqa: E731
    assert left(v) <= left(basis) < 1.002 * left(v)


def test_the_sample_is_spread_and_has_no_row_twice():
    # Row i alone has direction i: the basis tells which rows were seen.
    x = jnp.eye(128)
    low_rank = quant.LowRank(rows=0.01, oversample=0)
    find = jax.jit(lambda key: leading_basis(x, 2, low_rank, key, all_rows=False))
    bases = [find(jax.random.key(i)) for i in range(6)]
    for basis in bases:
        rows = np.flatnonzero(np.abs(basis).max(1) > 1e-6)
        assert len(rows) == 8  # 4 k, above 1 % of 128
        assert (rows // 16 == np.arange(8)).all()
    assert len({tuple(np.flatnonzero(np.abs(b).max(1) > 1e-6)) for b in bases}) > 1


def test_zero_and_nan():
    find = jax.jit(lambda x: leading_basis(x, 3, quant.LowRank(), KEY, all_rows=True))
    assert not find(jnp.zeros((64, 32))).any()
    assert np.isnan(find(jnp.zeros((64, 32)).at[3, 3].set(jnp.nan))).all()


@pytest.mark.parametrize(
    "rank,sizes", [(2, (1, 1)), (3, (1, 1, 1e-4)), (12, np.logspace(0, -4, 12))]
)
def test_few_directions_and_very_different_ones(rank, sizes):
    """Orthonormal where there are directions, no longer than that elsewhere, and all are found."""
    rng = np.random.default_rng(3)
    u, v = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for n in (128, 96))
    x = np.float32(u * sizes @ v.T)
    low_rank = quant.LowRank(iterations=1)
    find = jax.jit(lambda x: leading_basis(x, 12, low_rank, KEY, all_rows=True))
    basis = np.asarray(find(jnp.asarray(x)), float)
    size = np.linalg.svd(basis, compute_uv=False)
    assert size[0] < 1 + 1e-4 and size[min(rank, 3) - 1] > 1 - 1e-4
    assert np.linalg.norm(x - x @ basis @ basis.T) < 5e-3 * np.linalg.norm(x)


def test_number_of_columns():
    low_rank = quant.LowRank()
    assert low_rank.columns(4096, 1024) == 15  # 1.5 % of the smaller side
    assert low_rank.columns(64, 64) == 1 and low_rank.columns(63, 4096) == 0
    assert quant.LowRank(max_rank=4).columns(4096, 1024) == 4


PLAIN = quant.Operand(quant.NVFP4)


@pytest.mark.parametrize("factors", ["high", "fp4_feedback", "fp4"])
def test_split_sums_to_the_tensor(factors):
    x, v = spiked(0.9, 256, 64)
    low_rank = quant.LowRank(factors=factors)
    left, right, rest = split(jnp.asarray(x), jnp.float32(v), low_rank, PLAIN, (None, None))
    assert left.dtype == right.dtype == jnp.bfloat16 and rest.dtype == jnp.float32
    back = np.asarray(left, float) @ np.asarray(right, float).T + np.asarray(rest)
    error = np.linalg.norm(back - x) / np.linalg.norm(x)
    # As published the residual does not know that the factors were rounded to FP4.
    assert error > 0.05 if factors == "fp4" else error < 1e-6
    assert np.abs(rest).max() < np.abs(x).max() / 1.5


@pytest.mark.parametrize(
    "share,raw,high,paper,feedback",
    # docs: relative errors of 2048 x 512 with 8 directions.
    [
        (0.40, 0.095, 0.074, 0.113, 0.074),
        (0.94, 0.095, 0.023, 0.133, 0.026),
        (0.997, 0.095, 0.005, 0.137, 0.014),
    ],
)
def test_what_the_split_buys(share, raw, high, paper, feedback):
    x, v = spiked(share)
    fake = lambda t: np.asarray(quant.fake_quant(jnp.asarray(t), quant.NVFP4, axis=1))  # noqa: E731
    error = lambda got: np.linalg.norm(got - x) / np.linalg.norm(x)  # noqa: E731
    assert error(fake(x)) == pytest.approx(raw, rel=0.05)
    for factors, wanted in (("high", high), ("fp4", paper), ("fp4_feedback", feedback)):
        low_rank = quant.LowRank(factors=factors)
        left, right, rest = split(jnp.asarray(x), jnp.float32(v), low_rank, PLAIN, (None, None))
        got = np.asarray(left, float) @ np.asarray(right, float).T + fake(rest)
        assert error(got) == pytest.approx(wanted, rel=0.1, abs=5e-4), factors
