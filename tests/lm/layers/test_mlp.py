import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import ConfigError, ModelConfig
from lm.layers.mlp import make_mlp, silu_product
from lm.layers.parameters import SINGLE

SIZES = dict(vocab_size=64, num_layers=2, d_model=8, num_heads=2, d_ff=12, dtype="float32")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("dtype,tolerance", [("float32", 2e-6), ("bfloat16", 1e-2)])
def test_silu_product_and_its_gradients(rng, dtype, tolerance):
    gate, up, g = (jnp.asarray(3 * rng.normal(size=(4, 16)), dtype) for _ in range(3))
    y, pull = jax.vjp(silu_product, gate, up)
    dgate, dup = pull(g)
    assert y.dtype == dgate.dtype == dup.dtype == gate.dtype
    a, b, c = (np.asarray(v, np.float64) for v in (gate, up, g))
    silu = lambda x: x * sigmoid(x)  # noqa: E731
    slope = (silu(a + 1e-6) - silu(a - 1e-6)) / 2e-6
    for got, expected in ((y, silu(a) * b), (dgate, c * b * slope), (dup, c * silu(a))):
        # Against the largest value: single ones may cancel.
        error = np.abs(np.asarray(got, np.float64) - expected).max()
        assert error <= tolerance * np.abs(expected).max()


def test_silu_product_is_finite_far_out():
    gate = jnp.asarray([-200.0, -90.0, 0.0, 90.0, 200.0])
    one = jnp.ones(5)
    y, pull = jax.vjp(silu_product, gate, one)
    np.testing.assert_allclose(y, [0, 0, 0, 90, 200], atol=1e-30)
    np.testing.assert_allclose(pull(one)[0], [0, 0, 0.5, 1, 1], atol=1e-30)


def test_silu_product_keeps_only_its_inputs():
    gate = up = jnp.ones((4, 16))
    _, pull = jax.vjp(silu_product, gate, up)
    assert sum(leaf.size for leaf in jax.tree.leaves(pull)) <= 2 * gate.size


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_layers_equal_their_formula(rng, getkey, kind):
    layer = make_mlp(getkey(), ModelConfig(**SIZES, mlp=kind, mlp_bias=True), SINGLE)
    for name in ("gate", "up", "down") if kind == "swiglu" else ("up", "down"):
        bias = getattr(layer, name).bias
        bias[...] = jnp.asarray(rng.normal(size=bias.shape), jnp.float32)
    x = rng.normal(size=(2, 3, 8))

    def apply(name, x):
        part = getattr(layer, name)
        kernel, bias = (np.asarray(v[...], np.float64) for v in (part.kernel, part.bias))
        return x @ kernel + bias

    if kind == "swiglu":
        gate = apply("gate", x)
        hidden = gate * sigmoid(gate) * apply("up", x)
    else:
        hidden = gelu(apply("up", x))
    y, auxiliary = layer(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, apply("down", hidden), rtol=1e-5, atol=1e-5)
    assert auxiliary == {}


def test_an_unknown_kind_lists_the_known(getkey):
    with pytest.raises(ConfigError, match="one of swiglu, gelu.*'swigloo'"):
        make_mlp(getkey(), ModelConfig(**SIZES, mlp="swigloo"), SINGLE)
