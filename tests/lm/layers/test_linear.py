import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import native
from lm.layers.linear import Linear, Site, by_name, linear, native_products, with_native_products
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


@pytest.fixture
def compiled():
    if native.library() is None:
        pytest.skip("no C compiler here, or ANISO_NATIVE=0")


def native_calls(function, *args) -> int:
    # A function of its own: what JAX has traced once it does not trace again.
    program = jax.make_jaxpr(lambda *args: function(*args))(*args)
    return str(program).count("target_name=aniso_rows")


@pytest.mark.parametrize("dtype, bits", [("float32", 24), ("bfloat16", 8), ("float16", 11)])
@pytest.mark.parametrize("shape", [(64, 24), (104, 40), (61, 33), (8, 1), (16, 0)])
@pytest.mark.parametrize("batch", [(1, 1), (5,), (4, 8), (3, 11)])
def test_native_products_equal_float64(rng, batch, shape, dtype, bits):
    """Those of the C code, and those that go the usual way: float16, no columns, 33 rows."""
    x, w = draw(rng, (*batch, shape[0]), dtype), draw(rng, shape, dtype)
    with with_native_products(True):
        got = jax.jit(lambda x, w: linear(x, w))(x, w)
    assert (got.shape, got.dtype) == ((*batch, shape[1]), x.dtype)
    got, x, w = exact(got, x, w)
    # Summed in f32 and rounded once.
    allowed = 1e-5 * np.abs(x) @ np.abs(w) + 2.0**-bits * np.abs(x @ w)
    assert np.all(np.abs(got - x @ w) <= allowed)


@pytest.mark.parametrize(
    "x, w, dtypes, expected",
    [
        ((1, 64), (64, 24), ("float32", "float32"), 1),
        ((2, 16, 63), (63, 1), ("bfloat16", "bfloat16"), 1),
        ((3, 11, 64), (64, 24), ("float32", "float32"), 0),
        ((1, 64), (64, 0), ("float32", "float32"), 0),
        ((1, 64), (64, 24), ("float16", "float16"), 0),
        ((1, 64), (64, 24), ("bfloat16", "float32"), 0),
    ],
)
def test_few_rows_of_the_type_of_the_weights_are_native(compiled, x, w, dtypes, expected):
    x, w = jnp.ones(x, dtypes[0]), jnp.ones(w, dtypes[1])
    with with_native_products(True):
        assert native_calls(linear, x, w) == expected
    assert native_calls(linear, x, w) == 0


def test_native_products_are_those_within(compiled):
    x, w = jnp.ones((1, 64)), jnp.ones((64, 24))
    call = lambda: native_calls(linear, x, w)  # noqa: E731
    assert not native_products() and call() == 0
    with with_native_products(True):
        assert native_products() and call() == 1
        with with_native_products(False):
            assert not native_products() and call() == 0
        assert native_products() and call() == 1
    with pytest.raises(ZeroDivisionError), with_native_products(True):
        _ = 1 / 0
    assert not native_products() and call() == 0


def test_without_the_library_or_a_cpu_no_product_is_native(compiled, monkeypatch):
    x, w = jnp.ones((1, 64)), jnp.ones((64, 24))
    with monkeypatch.context() as patch:
        patch.setenv("ANISO_NATIVE", "0")
        with with_native_products(True):
            assert native_calls(linear, x, w) == 0
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with with_native_products(True):
        assert not native_products()


def test_a_plug_comes_before_native_products(compiled):
    x, w = jnp.ones((1, 64)), jnp.ones((64, 24))
    with with_native_products(True):
        assert native_calls(lambda x, w: linear(x, w, jax.lax.dot_general), x, w) == 0


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
