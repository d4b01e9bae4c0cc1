"""Which parameters are hidden matrices, by the names that common libraries give."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx

import optim

MATRICES = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "block_sparse_moe.experts.0.w1.weight",
    "Dense_0/kernel",
    "mlp/gate/kernel",
    "layers/attention/head_proj",
    "attention/heads",
)
OTHERS = (
    "model.embed_tokens.weight",
    "model.layers.0.input_layernorm.weight",
    "model.norm.weight",
    "lm_head.weight",
    "transformer.wte.weight",
    "transformer.h.0.ln_1.weight",
    "block_sparse_moe.gate.weight",
    "MoeBlock_0/gate/kernel",
    "router/kernel",
    "LayerNorm_0/scale",
    "heads/head/kernel",
    "layers/attention/query/bias",
)
LEAF = jnp.ones((4, 4))


def nested(name):
    tree = LEAF
    for part in reversed(name.replace("/", ".").split(".")):
        tree = {part: tree}
    return tree


@pytest.mark.parametrize("make", [nested, lambda name: {name: LEAF}], ids=["nested", "flat"])
@pytest.mark.parametrize("name", MATRICES + OTHERS)
def test_names_nested_or_joined(name, make):
    expected = "matrix" if name in MATRICES else "other"
    assert jax.tree.leaves(optim.matrix_labels(make(name))) == [expected]


def test_shapes_and_dtypes():
    leaves = {
        "vector": jnp.ones(4),
        "depthwise": jnp.ones((3, 3, 1, 4)),
        "stack": jnp.ones((2, 4, 4)),
        "table": jnp.ones((4, 4), jnp.int32),
        "phases": jnp.ones((4, 4), jnp.complex64),
        "nothing": None,
    }
    labels = optim.matrix_labels(leaves)
    assert labels.pop("nothing") is None
    assert [name for name, label in labels.items() if label == "matrix"] == ["stack"]


def test_modules_of_flax():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embedder = nnx.Embed(8, 4, rngs=rngs)
            self.dense = nnx.Linear(4, 4, rngs=rngs)
            self.norm = nnx.LayerNorm(4, rngs=rngs)

    labels = optim.matrix_labels(nnx.state(Model(nnx.Rngs(0)), nnx.Param))
    found = {path[0].key: set() for path, _ in jax.tree_util.tree_leaves_with_path(labels)}
    for path, label in jax.tree_util.tree_leaves_with_path(labels):
        found[path[0].key].add(label)
    assert found == {"embedder": {"other"}, "dense": {"matrix", "other"}, "norm": {"other"}}


def test_attention_of_flax_by_the_dimension_numbers_of_the_guide():
    heads, width = 2, 8
    module = linen.MultiHeadDotProductAttention(num_heads=heads)
    params = module.init(jax.random.key(0), *jnp.ones((2, 1, 3, width)))["params"]
    dims = optax.contrib.MuonDimensionNumbers

    def of(path, leaf):
        return dims((0, 1), 2) if path[0].key == "out" else dims(0, (1, 2))

    tx = optim.spectra(
        1.0,
        rank_ratio=0.9,
        dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(of, params),
    )
    noise = lambda p: jax.random.normal(jax.random.key(1), p.shape)  # noqa: E731
    updates, _ = tx.update(jax.tree.map(noise, params), tx.init(params), params)
    # Nearly the polar factor: all singular values of the whole matrix are equal.
    for name, shape in (("query", (width, -1)), ("out", (-1, width))):
        values = jnp.linalg.svd(updates[name]["kernel"].reshape(shape), compute_uv=False)
        assert values[0] < 1.3 * values[-1], name
