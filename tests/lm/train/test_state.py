import jax
import jax.numpy as jnp

from lm import model
from lm.config import ModelConfig
from lm.sharding import make_mesh
from lm.train.config import GuardConfig, OptimConfig, RunConfig
from lm.train.optimizer import make_optimizer
from lm.train.state import abstract_state, init_state, state_shardings

# No two kernels that are laid out differently have the same shape.
MODEL = ModelConfig(
    vocab_size=48, num_layers=2, d_model=16, num_heads=2, num_kv_heads=1, head_dim=16, d_ff=24,
    max_context=64,
)  # fmt: skip


def make(name):
    config = RunConfig(
        model=MODEL, optim=OptimConfig(name=name), guard=GuardConfig(window=8), sequence_length=8,
        seed=5,
    )  # fmt: skip
    return config, make_optimizer(config.optim, config.steps)[0]


def test_what_mirrors_a_parameter_lies_where_it_lies():
    config, tx = make("adamw")
    mesh = make_mesh({"fsdp": 2, "tensor": 2})
    abstract = abstract_state(config, tx, mesh)
    shardings = model.shardings(config.model, mesh)
    kernels = {
        leaf.shape: sharding.spec
        for leaf, sharding in zip(
            jax.tree.leaves(model.abstract_params(config.model)),
            jax.tree.leaves(shardings),
            strict=True,
        )
        if len(leaf.shape) > 1
    }
    moments = [leaf for leaf in jax.tree.leaves(abstract.opt_state) if leaf.shape in kernels]
    assert len([m for m in moments if m.ndim == 3]) == 14  # two of each of the 7 matrices
    for leaf in moments:
        assert leaf.sharding.spec == kernels[leaf.shape]
    scalars = [leaf for leaf in jax.tree.leaves(abstract) if leaf.ndim == 0]
    assert scalars and all(leaf.sharding.is_fully_replicated for leaf in scalars)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(abstract.guard))


def test_state_is_made_in_its_layout_and_from_the_seed():
    config, tx = make("adamw")
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    abstract = abstract_state(config, tx, mesh)
    shardings = state_shardings(config, tx, mesh)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(config, tx), out_shardings=shardings)()
    kind = lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding)  # noqa: E731
    assert jax.tree.map(kind, state) == jax.tree.map(kind, abstract)
    up = state.params["layers"]["mlp"]["up"]["kernel"]
    assert up.shape == (2, 16, 24) and up.addressable_shards[0].data.shape == (2, 8, 12)
    # Whatever the mesh, a seed draws one model.
    expected = model.init(config.model, jax.random.key(5))
    same = jax.tree.map(lambda a, b: jnp.allclose(a, b, rtol=1e-6), state.params, expected)
    assert all(jax.tree.leaves(same))
    assert state.step == 0 and state.guard.losses.shape == (8,)
