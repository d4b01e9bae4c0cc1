"""A recipe in other people's layers, under transformations, over devices, within memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import quant

DIMS = (((1,), (0,)), ((), ()))
KEY = jax.random.key(3)


@pytest.fixture
def case(rng):
    return [
        jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((40, 96), (96, 64), (40, 64))
    ]


def gradients(f, x, w, d, dims=DIMS):
    @jax.jit
    def run(x, w, d):
        y, pull = jax.vjp(lambda x, w: f(x, w, dims), x, w)
        return y, *pull(d)

    return run(x, w, d)


def test_linen_dense_and_dense_general(case):
    x, w, _ = case
    f = quant.dot_general("nvidia", key=KEY)
    want = f(x, w, DIMS)
    dense = linen.Dense(64, use_bias=False, dot_general=f)
    np.testing.assert_array_equal(dense.apply({"params": {"kernel": w}}, x), want)
    # Contract two axes, give two.
    layer = linen.DenseGeneral((8, 8), axis=(-2, -1), use_bias=False, dot_general=f)
    got = layer.apply({"params": {"kernel": w.reshape(12, 8, 8, 8)}}, x.reshape(40, 12, 8))
    np.testing.assert_array_equal(got.reshape(40, 64), want)
    assert not np.array_equal(want, x @ w)


def test_nnx_linear(case):
    x, w, _ = case
    f = quant.dot_general("nvidia", key=KEY)
    layer = nnx.Linear(96, 64, use_bias=False, dot_general=f, rngs=nnx.Rngs(0))
    layer.kernel[...] = w
    got = nnx.grad(lambda layer: (layer(x) * case[2]).sum())(layer).kernel[...]
    np.testing.assert_allclose(got, gradients(f, *case)[2], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    "lhs,rhs,dims",
    [
        ((6, 32, 5), (32, 7), (((1,), (0,)), ((), ()))),
        ((4, 8, 6), (7, 8, 4), (((1, 0), (1, 2)), ((), ()))),
        ((6, 3, 32), (32, 5, 3), (((2,), (0,)), ((1,), (2,)))),
        ((32,), (32,), (((0,), (0,)), ((), ()))),
        ((6, 32), (32, 7), (((-1,), (-2,)), ((), ()))),
    ],
)
def test_dimension_numbers_of_any_order(lhs, rhs, dims, rng):
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in (lhs, rhs))
    positive = tuple(
        tuple(tuple(i % n for i in axes) for axes, n in zip(pair, (x.ndim, w.ndim), strict=True))
        for pair in dims
    )
    plain = lambda x, w, _: jax.lax.dot_general(x, w, positive)  # noqa: E731
    d = jnp.ones(plain(x, w, None).shape)
    for a, b in zip(
        gradients(quant.dot_general("bf16"), x, w, d, dims),
        gradients(plain, x, w, d, dims),
        strict=True,
    ):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_batch_elements_are_products_of_their_own(rng):
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 40, 32), (2, 32, 16)))
    d = jnp.ones((2, 40, 16))
    dims = (((2,), (1,)), ((0,), (0,)))
    got = gradients(quant.dot_general("nvfp4", key=KEY), x, w, d, dims)
    for i in range(2):
        one = quant.dot_general("nvfp4", key=quant.fold_seed(KEY, i))
        for a, b in zip(got, gradients(one, x[i], w[i], d[i]), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-6, atol=1e-5)


def test_preferred_element_type_is_not_rounded_first(case):
    x, w = (t.astype(jnp.bfloat16) for t in case[:2])
    f = quant.dot_general("nvfp4", key=KEY)
    y = f(x, w, DIMS, preferred_element_type=jnp.float32)
    assert y.dtype == jnp.float32 and (y != y.astype(jnp.bfloat16).astype(jnp.float32)).any()
    np.testing.assert_array_equal(f(x, w, DIMS), y.astype(jnp.bfloat16))


def test_jit_is_eager_and_nothing_compiles_twice(case):
    x, w, d = case
    step = jax.jit(
        lambda x, w, d, seed: gradients(
            quant.dot_general("nvidia", key=quant.fold_seed(KEY, seed)), x, w, d
        )
    )
    first = step(x, w, d, 0)
    second = step(x, w, d, 1)
    assert step._cache_size() == 1
    np.testing.assert_array_equal(first[0], second[0])  # nearest in fprop
    assert (first[1] != second[1]).any() and (first[2] != second[2]).any()
    f = quant.dot_general("nvidia", key=quant.fold_seed(KEY, 0))
    y, pull = jax.vjp(lambda x, w: f(x, w, DIMS), x, w)
    for a, b in zip((y, *pull(d)), first, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-5)


def test_enabled_chooses_at_run_time(case):
    x, w, d = case
    plain = gradients(quant.dot_general("bf16"), x, w, d)
    quantized = gradients(quant.dot_general("nvfp4", key=KEY), x, w, d)

    @jax.jit
    def scanned(x, w, d):
        def layer(carry, on):
            f = jax.checkpoint(
                lambda x, w: quant.dot_general("nvfp4", key=KEY, enabled=on)(x, w, DIMS)
            )
            y, pull = jax.vjp(f, x, w)
            return carry, (y, *pull(d))

        return jax.lax.scan(layer, 0, jnp.array([True, False]))[1]

    for got, on, off in zip(scanned(x, w, d), quantized, plain, strict=True):
        np.testing.assert_allclose(got[0], on, rtol=1e-6, atol=1e-5)
        np.testing.assert_allclose(got[1], off, rtol=1e-6, atol=1e-5)
        assert np.abs(on - off).max() > 0.1


RECIPE = dataclasses.replace(
    quant.get_recipe("metis_paper"), low_rank=quant.LowRank(rank=0.05, refresh=3, min_size=32)
)


def test_bases_are_kept_and_renewed(case):
    x, w, d = case
    state = quant.init_state(RECIPE, 40, 96, 64)
    assert {n: b.shape for n, b in state.items()} == {"x": (96, 2), "w": (64, 3), "d": (64, 2)}

    @jax.jit
    def step(state, x, step):
        def loss(state, x):
            f = quant.dot_general(RECIPE, key=quant.fold_seed(KEY, step), state=state, step=step)
            return (f(x, w, DIMS) * d).sum()

        return jax.grad(loss, (0, 1))(state, x)

    history = [state]
    for i in (1, 2, 3, 4):  # starts between two renewals
        history.append(step(history[-1], x, i)[0])
    for name in state:
        zero, first, second, third, fourth = (s[name] for s in history)
        assert not zero.any()
        np.testing.assert_allclose(first.T @ first, np.eye(first.shape[1]), atol=1e-5)
        np.testing.assert_array_equal(first, second)
        assert (second != third).any()
        np.testing.assert_array_equal(third, fourth)
    off = jax.grad(
        lambda s: quant.dot_general(RECIPE, key=KEY, state=s, step=0, enabled=False)(
            x, w, DIMS
        ).sum()
    )(history[1])
    for name in state:
        np.testing.assert_array_equal(off[name], history[1][name])


@pytest.mark.parametrize("spec", [P("data", None), P(("data", "tensor"), None)], ids=str)
@pytest.mark.parametrize("name", ["nvidia", "mean"])
def test_eight_devices_round_as_one(name, spec, rng):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    # Multiples of 1/64, all sums exact: other bits could only come from other random numbers.
    grid = lambda *s: jnp.asarray(np.round(rng.standard_normal(s) * 8) / 8, jnp.float32)  # noqa: E731
    x, w, d = grid(128, 64), grid(64, 32), grid(128, 32)
    f = quant.dot_general(name, key=KEY)
    one = gradients(f, x, w, d)
    put = lambda t, spec: jax.device_put(t, NamedSharding(mesh, spec))  # noqa: E731
    many = gradients(f, put(x, spec), put(w, P(None, "tensor")), put(d, spec))
    for a, b in zip(many, one, strict=True):
        # One value rounded the other way would differ by a hundredth and more.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_memory(rng):
    """At most one bfloat16 copy more of each operand of each product than the unquantized layer,
    block scales included: no float32 copies, and nothing of what quantization goes through."""
    shapes = [(2048, 256), (256, 512), (2048, 512)]
    specs = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes]

    def temporary(name):
        f = quant.dot_general(name, key=KEY)

        def run(x, w, d):
            y, pull = jax.vjp(lambda x, w: f(x, w, DIMS), x, w)
            return y, *pull(d)

        return jax.jit(run).lower(*specs).compile().memory_analysis().temp_size_in_bytes

    copies = sum(2 * a * b for a, b in shapes)
    assert temporary("nvfp4") <= temporary("bf16") + 2 * copies


@pytest.mark.parametrize(
    "make,error,words",
    [
        (lambda x: quant.dot_general("nvidia"), ValueError, "draws random numbers"),
        (
            lambda x: quant.dot_general("nvidia", key=KEY, state={}, step=0),
            ValueError,
            "keeps nothing",
        ),
        (
            lambda x: quant.dot_general("metis_paper", key=KEY, state={}),
            ValueError,
            "give the step too",
        ),
        (
            lambda x: quant.dot_general("bf16", implementation="fast"),
            ValueError,
            "must be 'native', 'emulated' or None, not 'fast'",
        ),
        (
            lambda x: quant.dot_general("bf16")(x.astype(jnp.int32), x, DIMS),
            TypeError,
            "lhs must be float32",
        ),
        (lambda x: quant.dot_general("bf16")(x, x, DIMS), ValueError, "contracted sizes differ"),
        (
            lambda x: quant.dot_general("bf16")(x, x.T, DIMS, out_sharding=P()),
            ValueError,
            "takes no out_sharding",
        ),
    ],
)
def test_refusals(make, error, words, case):
    with pytest.raises(error, match=words):
        make(case[0])
