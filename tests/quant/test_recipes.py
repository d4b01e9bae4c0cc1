"""Every recipe's three products against the formulas, restated in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import quant
from quant.recipe import ROLES, bits_per_value

DIMS = (((1,), (0,)), ((), ()))
KEY = jax.random.key(3)
# Every value has its own unrounded scale: quantization that changes nothing.
EXACT = quant.Format("exact", quant.E4M3, 1, "f32")


def products(recipe, x, w, d, **options):
    """y, dx, dw."""
    f = quant.dot_general(recipe, key=KEY, **options)

    @jax.jit
    def run(x, w, d):
        y, pull = jax.vjp(lambda x, w: f(x, w, DIMS), x, w)
        return y, *pull(d)

    return run(x, w, d)


@pytest.fixture
def case():
    """x [40, 96] with a mean, w [96, 72], d [40, 72]; no size is a multiple of all blocks."""
    rng = np.random.default_rng(1)
    # Multiples of 1/64: sums over tokens are exact in any order, and so are the means.
    grid = lambda *shape: np.round(rng.standard_normal(shape) * 64) / 64  # noqa: E731
    x = grid(40, 96) + np.round(rng.standard_normal(96) * 128) / 64
    return [np.float32(a) for a in (x, grid(96, 72), grid(40, 72) + 0.5)]


def hadamard64(t, axis, size):
    """t S H along an axis, padded; the signs of Transformer Engine repeated."""
    h = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    signs = np.tile([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1], size // 16)
    t = np.moveaxis(t, axis, -1)
    t = np.pad(t, ((0, 0), (0, -t.shape[1] % size)))
    tiles = t.reshape(len(t), -1, size) * signs @ h / np.sqrt(size)
    return np.moveaxis(tiles.reshape(t.shape), -1, axis)


def rounded(recipe, role, t, axis):
    operand = getattr(recipe, role)
    if operand is None:
        return t.astype(np.float64)
    if operand.hadamard:
        t = hadamard64(t, axis, operand.hadamard).astype(np.float32)
    key = quant.fold_seed(KEY, role) if operand.rounding == "stochastic" else None
    q = quant.quantize(
        jnp.asarray(t),
        operand.fmt,
        axis=axis,
        rounding=operand.rounding,
        key=key,
        block_2d=operand.block_2d,
        sr_headroom=operand.sr_headroom,
    )
    return np.asarray(quant.dequantize(q), np.float64)


def rounded_mean(recipe, tensor, mean, operand):
    if recipe.mean.precision == "high":
        return mean.astype(np.float64)
    key = quant.fold_seed(KEY, f"mean.{tensor}") if operand.rounding == "stochastic" else None
    how = {"axis": 0, "rounding": operand.rounding, "key": key}
    return np.asarray(quant.fake_quant(jnp.asarray(mean), operand.fmt, **how), np.float64)


def expected(recipe, x, w, d):
    """The formulas of the specification (Averis Eqs. 11 and 12 where there is a mean)."""
    mu_x = mu_d = None
    xr, dr = x, d
    if recipe.mean:
        mean_x, mean_d = (t.sum(0, dtype=np.float32) / np.float32(len(t)) for t in (x, d))
        xr, dr = x - mean_x, d - mean_d
        mu_x = rounded_mean(recipe, "x", mean_x, recipe.fprop_x)
        mu_d = rounded_mean(recipe, "d", mean_d, recipe.dgrad_d)
    w_out, w_in = (rounded(recipe, role, w, a) for role, a in (("fprop_w", 0), ("dgrad_w", 1)))
    y = rounded(recipe, "fprop_x", xr, 1) @ w_out
    dx = rounded(recipe, "dgrad_d", dr, 1) @ w_in.T
    a, b = rounded(recipe, "wgrad_x", xr, 0), rounded(recipe, "wgrad_d", dr, 0)
    dw = a.T @ b
    if recipe.mean:
        high = recipe.mean.weight == "high"
        y = y + mu_x @ (w.astype(np.float64) if high else w_out)
        dx = dx + mu_d @ (w.T.astype(np.float64) if high else w_in.T)
        dw = dw + len(x) * np.outer(mu_x, mu_d)
        if recipe.mean.cross_terms:
            dw = dw + np.outer(a.sum(0), mu_d) + np.outer(mu_x, b.sum(0))
    return y, dx, dw


@pytest.mark.parametrize(
    "name", ["bf16", "nvfp4", "nvidia", "mxfp4", "fp8", "mean", "mean_paper", "mean_hadamard"]
)
def test_products_are_those_of_the_formulas(name, case):
    recipe = quant.get_recipe(name)
    got = products(recipe, *case)
    x, w, d = case
    for a, b, exact in zip(got, expected(recipe, *case), (x @ w, d @ w.T, x.T @ d), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())
        assert (np.linalg.norm(a - exact) > 0.01 * np.linalg.norm(exact)) == (name != "bf16")


HADAMARD = quant.Operand(EXACT, hadamard=16)
PLAIN = quant.Operand(EXACT)


@pytest.mark.parametrize(
    "recipe",
    [
        quant.Recipe(
            "all", *[HADAMARD] * 6, mean=quant.Mean(), low_rank=quant.LowRank(rank=0.05, min_size=8)
        ),
        quant.Recipe("w", *[HADAMARD] * 6, mean=quant.Mean(weight="quantized")),
        quant.Recipe("x", *[PLAIN] * 6, mean=quant.Mean(d=False, cross_terms=True)),
        quant.Recipe("d", None, PLAIN, None, PLAIN, None, PLAIN, mean=quant.Mean(x=False)),
        quant.Recipe("random", *[quant.Operand(EXACT, hadamard=32)] * 6, signs="random"),
    ],
    ids=lambda r: r.name,
)
def test_without_rounding_a_recipe_is_the_plain_product(recipe, case):
    """Means, factors, transforms and padding all cancel; only float rounding is left."""
    x, w, d = case
    exact = x @ w, d @ w.T, x.T @ d
    for a, b in zip(products(recipe, x, w, d), exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize("mode", ["high", "fp4_feedback", "fp4"])
def test_low_rank_products(mode, case):
    """With bases that are given, against factors and residuals written out."""
    x, w, d = case
    low_rank = quant.LowRank(refresh=8, factors=mode)
    recipe = dataclasses.replace(quant.get_recipe("nvfp4"), low_rank=low_rank)
    k = {"x": 2, "w": 4, "d": 2}
    state = {n: np.linalg.svd(t)[2][: k[n]].T for n, t in (("x", x), ("w", w), ("d", d))}
    y, dx, dw = products(recipe, x, w, d, state=state, step=1)

    def fp4(t, name, which):
        if name == "d":
            how = {"rounding": "stochastic", "key": quant.fold_seed(KEY, f"{which}.d")}
        else:
            how = {}
        t = jnp.asarray(t, jnp.float32)
        return np.asarray(quant.fake_quant(t, quant.NVFP4, axis=0, **how), np.float64)

    bfloat16 = lambda t: t.astype(ml_dtypes.bfloat16).astype(np.float64)  # noqa: E731

    def parts(t, name):
        basis = state[name].astype(np.float64)
        seen = t @ basis
        low = bfloat16(seen) @ bfloat16(basis).T
        norm = np.linalg.norm(seen, axis=0)
        stored = low
        if mode != "high":
            left = bfloat16(fp4(seen / norm, name, "left") * norm)
            stored = left @ fp4(basis, name, "right").T
        return stored, np.float32(t - (low if mode == "fp4" else stored))

    (low_x, res_x), (low_w, res_w), (low_d, res_d) = (
        parts(t, n) for t, n in ((x, "x"), (w, "w"), (d, "d"))
    )
    hat = lambda low, res, role, axis: low + rounded(recipe, role, res, axis)  # noqa: E731
    want = (
        hat(low_x, res_x, "fprop_x", 1) @ hat(low_w, res_w, "fprop_w", 0),
        hat(low_d, res_d, "dgrad_d", 1) @ hat(low_w, res_w, "dgrad_w", 1).T,
        hat(low_x, res_x, "wgrad_x", 0).T @ hat(low_d, res_d, "wgrad_d", 0),
    )
    for got, b, exact in zip((y, dx, dw), want, (x @ w, d @ w.T, x.T @ d), strict=True):
        error, noise = (np.linalg.norm(got - t) / np.linalg.norm(t) for t in (b, exact))
        # Factors ride in a bfloat16 product; projections that round to another bfloat16 number move
        # residuals.
        assert error < 0.02 < 0.04 < noise


def test_operands_of_the_three_products_round_independently():
    # All tensors are one, so equal bits would give equal errors.
    t = np.float32(np.random.default_rng(0).standard_normal((64, 64)))
    random = quant.Operand(quant.NVFP4, "stochastic")
    errors = {}
    for role in ROLES:
        axis = 0 if role in ("fprop_w", "wgrad_x", "wgrad_d") else 1
        recipe = quant.Recipe("r", **{role: random})
        one = quant.operands.Parts(jnp.asarray(t), None, None, None)
        side = quant.operands.prepare(recipe, role, one, axis, quant.fold_seed(KEY, 0))
        errors[role] = np.ravel(quant.operands.dense(side)) - t.ravel()
    names = list(errors)
    for i, a in enumerate(names):
        for b in names[:i]:
            # Noise of 4096 numbers: 1/64 each, and rounding to the same grid correlates none.
            assert abs(np.corrcoef(errors[a], errors[b])[0, 1]) < 0.1, (a, b)


@pytest.mark.parametrize("name", ["nvidia", "mean"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(name, bad, case):
    x, w, d = (t.copy() for t in case)
    x[7, 5] = bad
    y, _, dw = products(name, x, w, d)
    assert not np.isfinite(y[7]).any() and not np.isfinite(dw[5]).any()


def test_stored_nan_in_a_large_array():
    """XLA:CPU's maximum over float32 drops NaN beyond some size, see quant/scales.py."""
    x = np.ones((256, 512), np.float32)
    x[3, 40] = np.nan
    back = np.asarray(quant.dequantize(quant.quantize(x, quant.NVFP4, axis=1)))
    assert np.isnan(back[3, 32:48]).all() and np.isnan(back).sum() == 16
    np.testing.assert_array_equal(back, quant.fake_quant(x, quant.NVFP4, axis=1))


def test_tiny_and_zero(case):
    """Where the product of two tensor scales is no float32, the result is zero and not NaN."""
    recipe = dataclasses.replace(quant.get_recipe("metis_mean"), low_rank=quant.LowRank(min_size=8))
    f = jax.jit(quant.dot_general(recipe, key=KEY), static_argnums=2)
    for scale in (0.0, 1e-20, 1e-37):
        x, w, _ = (np.float32(t * scale) for t in case)
        y, pull = jax.vjp(lambda x, w: f(x, w, DIMS), x, w)
        for got in (y, *pull(y)):
            assert np.isfinite(got).all() and np.abs(got).max() < 1e-30


@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_few_tokens(tokens, case):
    x, w, d = case
    x, d = x[:tokens], d[:tokens]
    y, dx, dw = products("mean", x, w, d)
    assert y.shape == (tokens, 72) and dx.shape == x.shape
    noise = np.linalg.norm(dw - x.T @ d) / max(np.linalg.norm(x.T @ d), 1)
    assert noise < 0.2 and (tokens > 1 or noise < 1e-5)  # one token is its own mean


def test_float16_overflows_as_it_would_anyway(case):
    x, w, d = (t.astype(np.float16) for t in case)
    y, dx, _ = products("nvidia", x * np.float16(3e3), w, d)
    assert y.dtype == jnp.float16 and np.isinf(y).any() and not np.isnan(y).any()
    assert np.isfinite(dx).all()


def test_names():
    assert all(name == recipe.name for name, recipe in quant.RECIPES.items())
    with pytest.raises(ValueError, match="'metis_maen'; did you mean 'metis_mean'"):
        quant.get_recipe("metis_maen")
    assert hash(dataclasses.replace(quant.RECIPES["mean"])) == hash(quant.RECIPES["mean"])


def test_bits_per_value():
    # 4 + 8/16; squares of 256 values share 8 bits; 4 + 8/32; no block scales.
    assert bits_per_value(quant.get_recipe("nvidia"))["fprop_x"] == 4.5
    assert bits_per_value(quant.get_recipe("nvidia"))["fprop_w"] == 4 + 8 / 256
    assert set(bits_per_value(quant.get_recipe("mxfp4")).values()) == {4.25}
    assert set(bits_per_value(quant.get_recipe("bf16")).values()) == {16.0}


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: quant.Recipe("r", fprop_x=HADAMARD), "same hadamard"),
        (lambda: quant.Recipe("r", fprop_x=quant.Operand(block_2d=True)), "for weights"),
        (
            lambda: quant.Recipe("r", HADAMARD, quant.Operand(block_2d=True, hadamard=16)),
            "see different numbers",
        ),
        (lambda: quant.Recipe("r", signs="some"), "signs must be"),
        (lambda: quant.Operand("nvfp4"), "must be a quant.Format"),
        (lambda: quant.Operand(rounding="up"), "not 'up'"),
        (lambda: quant.Operand(hadamard=8), "hadamard must be one of"),
        (lambda: quant.Mean(precision="bf16"), "precision must be 'high' or 'fp4'"),
        (lambda: quant.Mean(weight="fp4"), "weight must be 'high' or 'quantized'"),
        (lambda: quant.LowRank(rank=2), "shares in"),
        (lambda: quant.LowRank(refresh=0), "refresh must be 1 or more"),
        (lambda: quant.LowRank(factors="bf16"), "not 'bf16'"),
    ],
)
def test_refusals(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()
