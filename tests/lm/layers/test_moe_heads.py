import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe
from lm import model
from lm.config import ConfigError, ModelConfig
from lm.config_moe import MoEConfig
from lm.layers.mlp import make_mlp
from lm.layers.parameters import Stack
from lm.sharding import make_mesh
from lm.train.flops import model_flops_per_token, parameter_count

EXPERTS = dict(heads=2, experts=3, top_k=2, d_expert=10, implementation="reference")
BASE = ModelConfig(
    vocab_size=32, num_layers=2, d_model=16, num_heads=2, max_context=16, dtype="float32",
    mlp="moe", moe=MoEConfig(kind="head_wise", **EXPERTS),
)  # fmt: skip
KINDS = {
    "head_wise": BASE,
    "multi_head": dataclasses.replace(BASE, moe=MoEConfig(kind="multi_head", **EXPERTS)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_is_that_of_the_ground_floor(kind, rng):
    config = KINDS[kind]
    layer = make_mlp(jax.random.key(0), config, Stack())
    x = jnp.asarray(rng.normal(size=(2, 4, 16)), jnp.float32)
    y, auxiliary = layer(x)
    params = layer.experts.arrays() | {"router": layer.router.kernel[...]}
    if kind == "head_wise":
        expected, routing = moe.head_wise_mlp(x.reshape(8, 16), params, k=2, implementation="xla")
        losses = [float(moe.load_balance_loss(moe.bank(routing, h))) for h in range(2)]
    else:
        layer.head.bias[...] = jnp.asarray(rng.normal(size=16), jnp.float32)
        y, auxiliary = layer(x)
        for name in ("head", "merge"):
            linear = getattr(layer, name)
            params |= {name: linear.kernel[...], f"{name}_bias": linear.bias[...]}
        expected, routing = moe.multi_head_mlp(
            x.reshape(8, 16), params, heads=2, k=2, implementation="xla"
        )
        losses = [float(moe.load_balance_loss(routing))]
    np.testing.assert_allclose(y.reshape(8, 16), expected, rtol=1e-4, atol=1e-5)
    assert float(auxiliary["loss/load_balance"]) == pytest.approx(0.01 * np.mean(losses), rel=1e-5)
    assert auxiliary["experts/load"].shape == (3,) and float(auxiliary["experts/drop_share"]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_trains_through_it_and_is_counted(kind):
    config = KINDS[kind]
    params = model.init(config, jax.random.key(0))
    assert parameter_count(config) == sum(leaf.size for leaf in jax.tree.leaves(params))
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 32)

    def loss(params):
        x, auxiliary = model.hidden(config, params, tokens)
        return jnp.mean(jnp.square(x)) + jnp.sum(auxiliary["loss/load_balance"])

    grads = jax.jit(jax.grad(loss))(params)
    moved = jax.tree.map(lambda g: bool(np.abs(g).max() > 0), grads["layers"]["mlp"])
    assert all(jax.tree.leaves(moved)), moved
    # One more expert a token costs what its matrices say.
    more = dataclasses.replace(config, moe=dataclasses.replace(config.moe, top_k=3))
    extra = model_flops_per_token(more, 8, True) - model_flops_per_token(config, 8, True)
    size = 2 * (2 * 8 * 10 + 10 * (16 if kind == "head_wise" else 8))
    assert extra == pytest.approx(6 * config.num_layers * size)


def test_what_it_cannot_do_is_said():
    with pytest.raises(ConfigError, match=r"model.moe.heads \(3\) must divide"):
        model.init(
            dataclasses.replace(BASE, moe=MoEConfig(kind="head_wise", heads=3)), jax.random.key(0)
        )
    with pytest.raises(ConfigError, match="model.moe.shared is not read"):
        MoEConfig(kind="multi_head", shared=1)
    with pytest.raises(ConfigError, match="model.moe.heads is not read with model.moe.kind token"):
        MoEConfig(heads=2)
    tokens = jnp.zeros((2, 4), jnp.int32)
    with jax.set_mesh(make_mesh({"data": 2})), pytest.raises(NotImplementedError, match="one dev"):
        jax.eval_shape(lambda p: model.apply(BASE, p, tokens), model.abstract_params(BASE))
