import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm.layers.linear as module
from lm.layers.linear import Linear, Site, by_name, fast_single_rows, linear
from lm.layers.parameters import Stack, fan_in_std, normal

SHAPES = [((3, 5, 8), 6), ((2, 3, 6), 16), ((7, 8), 8), ((2, 1, 2, 4), 12)]


def draw(rng, shape, dtype):
    return jnp.asarray(rng.normal(size=shape), dtype)


def exact(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


@pytest.mark.parametrize("x_dtype,tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("shape,d_out", SHAPES)
def test_value_and_gradients_equal_float64(rng, shape, d_out, x_dtype, tolerance):
    x, w = draw(rng, shape, x_dtype), draw(rng, (shape[-1], d_out), "float32")
    g = draw(rng, (*shape[:-1], d_out), x_dtype)
    y, pull = jax.vjp(linear, x, w)
    dx, dw = pull(g)
    assert (y.dtype, dx.dtype, dw.dtype) == (x.dtype, x.dtype, w.dtype)
    x64, w64, g64 = exact(x, w.astype(x_dtype), g)
    np.testing.assert_allclose(*exact(y, x64 @ w64), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(*exact(dx, g64 @ w64.T), rtol=tolerance, atol=tolerance)
    expected = np.einsum("nd,nf->df", x64.reshape(-1, shape[-1]), g64.reshape(-1, d_out))
    # Products of bf16 numbers are exact in f32: whatever the inputs, dw is as good as f32.
    np.testing.assert_allclose(dw, expected, rtol=1e-5, atol=1e-5)


def test_jit_vmap_and_remat_give_the_same_gradients(rng):
    x, w = draw(rng, (4, 3, 8), "float32"), draw(rng, (4, 8, 6), "float32")
    loss = lambda x, w: jnp.sum(jnp.sin(linear(x, w)))  # noqa: E731
    plain = lambda x, w: jnp.sum(jnp.sin(x @ w))  # noqa: E731
    grad = jax.grad(loss, argnums=(0, 1))
    rows = [jax.grad(plain, argnums=(0, 1))(x[i], w[i]) for i in range(4)]
    expected = jax.tree.map(lambda *a: jnp.stack(a), *rows)
    for transformed in (jax.vmap(grad), jax.jit(jax.vmap(grad))):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            transformed(x, w),
            expected,
        )
    once = jax.grad(jax.checkpoint(loss), argnums=(0, 1))(x[0], w[0])
    np.testing.assert_allclose(once[1], rows[0][1], rtol=1e-5, atol=1e-5)


def test_vmap_in_bfloat16(rng):
    x, w = draw(rng, (4, 3, 8), "bfloat16"), draw(rng, (4, 8, 16), "float32")
    loss = lambda x, w: jnp.sum(linear(x, w).astype(jnp.float32))  # noqa: E731
    dw = jax.jit(jax.vmap(jax.grad(loss, argnums=1)))(x, w)
    expected = np.asarray(x, np.float64).sum(1)[:, :, None].repeat(16, 2)
    np.testing.assert_allclose(dw, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, bits", [("float32", 24), ("bfloat16", 8), ("float16", 11)])
@pytest.mark.parametrize("shape", [(64, 24), (104, 40), (60, 24), (8, 1), (16, 0)])
@pytest.mark.parametrize("sums", [1 << 21, 512])
def test_fast_single_rows_equal_float64(monkeypatch, rng, shape, dtype, bits, sums):
    """Whole and in blocks; a width that does not divide and an empty one go the usual way."""
    monkeypatch.setattr(module, "_SUMS", sums)
    x, w = draw(rng, (1, 1, shape[0]), dtype), draw(rng, shape, dtype)
    with fast_single_rows(True):
        got = linear(x, w)
    assert (got.shape, got.dtype) == ((1, 1, shape[1]), x.dtype)
    got, x, w = exact(got, x, w)
    # Summed in f32 and rounded once.
    allowed = 1e-6 * np.abs(x) @ np.abs(w) + 2.0**-bits * np.abs(x @ w)
    assert np.all(np.abs(got - x @ w) <= allowed)


def one_row_products(function, *args) -> int:
    return str(jax.make_jaxpr(function)(*args)).count("name=_one_row")


def test_only_single_rows_are_multiplied_so_and_only_on_request():
    w = jnp.ones((64, 24))
    with fast_single_rows(True):
        assert one_row_products(lambda x: linear(x, w), jnp.ones((1, 64))) == 1
        assert one_row_products(lambda x: linear(x, w), jnp.ones((2, 64))) == 0
        assert one_row_products(lambda x: linear(x, w[:63]), jnp.ones((1, 63))) == 0
        with fast_single_rows(False):
            assert one_row_products(lambda x: linear(x, w), jnp.ones((1, 64))) == 0
    assert one_row_products(lambda x: linear(x, w), jnp.ones((1, 64))) == 0


def test_fast_single_rows_hold_the_sums_of_one_block(monkeypatch):
    monkeypatch.setattr(module, "_SUMS", 1 << 14)
    x, w = jnp.ones((1, 2048)), jnp.ones((2048, 128))
    with fast_single_rows(True):
        memory = jax.jit(lambda x, w: linear(x, w)).lower(x, w).compile().memory_analysis()
    assert memory is not None and 1 << 14 <= memory.temp_size_in_bytes < 1 << 15


def test_a_plugged_product_is_what_comes_out(rng):
    seen = []

    def product(a, b, dims):
        seen.append((a.shape, b.shape, b.dtype, dims))
        return 3 * jax.lax.dot_general(a, b, dims).astype(jnp.float32)

    x, w = draw(rng, (2, 3, 8), "bfloat16"), draw(rng, (8, 4), "float32")
    y = linear(x, w, product)
    assert seen == [((6, 8), (8, 4), jnp.bfloat16, (((1,), (0,)), ((), ())))]
    assert y.dtype == jnp.bfloat16 and y.shape == (2, 3, 4)
    np.testing.assert_allclose(*exact(y, 3 * linear(x, w).astype(jnp.float32)), rtol=2e-2, atol=0.1)


def test_by_name_takes_the_first_pattern_that_matches():
    first, second = jax.lax.dot_general, lambda *_: None
    plug = by_name([("layers.mlp.down", None), ("layers.mlp.*", first), ("layers.*", second)])
    sites = ["layers.mlp.down", "layers.mlp.up", "layers.attention.query", "head"]
    assert [plug(Site(name)) for name in sites] == [None, first, second, None]


def test_linear_holds_a_stack_with_its_axes():
    layer = Linear(
        jax.random.key(0), "n", 8, 6, ("embed", "mlp"), std=1.0, bias=True, dtype="bfloat16",
        stack=Stack(3),
    )  # fmt: skip
    assert layer.kernel.shape == (3, 8, 6) and layer.bias.shape == (3, 6)
    assert layer.kernel.dtype == layer.bias.dtype == jnp.bfloat16
    assert layer.kernel.get_metadata("logical_axes") == ("layers", "embed", "mlp")
    assert layer.bias.get_metadata("logical_axes") == ("layers", "mlp")
    kernel = np.asarray(layer.kernel[...], np.float32)
    assert not np.array_equal(kernel[0], kernel[1]), "every layer has its own draw"


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8)])
def test_bias_is_added_in_the_dtype_of_x(rng, shape):
    layer = Linear(
        jax.random.key(0), "n", 8, 6, ("embed", "mlp"), std=1.0, bias=True, dtype="float32"
    )
    layer.bias[...] = draw(rng, (6,), "float32")
    x = draw(rng, shape, "float32")
    expected = exact(x)[0] @ exact(layer.kernel[...])[0] + exact(layer.bias[...])[0]
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert layer(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_declarations():
    assert fan_in_std(64) == 1 / 8
    assert fan_in_std(64, 8) == pytest.approx(1 / 8 / 4)
    with pytest.raises(ValueError, match="differ in length"):
        normal(jax.random.key(0), (2, 3), ("embed",), std=1.0, dtype="float32")
