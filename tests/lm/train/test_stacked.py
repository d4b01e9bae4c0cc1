import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm import model
from lm.config import ModelConfig
from lm.sharding import make_mesh
from lm.train.config import GuardConfig, OptimConfig, RunConfig
from lm.train.optimizer import make_optimizer
from lm.train.stacked import layer_axis, layer_sharding
from lm.train.state import abstract_state

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


def make(name, num_layers):
    config = RunConfig(
        model=ModelConfig(
            vocab_size=24, num_layers=num_layers, d_model=32, num_heads=4, d_ff=48, max_context=16
        ),
        optim=OptimConfig(name=name),
        guard=GuardConfig(window=8),
        sequence_length=8,
    )
    return config, make_optimizer(config.optim, config.steps)[0]


@pytest.mark.parametrize(
    "layers,sizes,expected",
    [
        (8, {"fsdp": 2, "tensor": 4}, "tensor"),
        (6, {"fsdp": 2, "tensor": 4}, "fsdp"),
        (4, {"fsdp": 2, "tensor": 2}, "fsdp"),
        (3, {"fsdp": 2, "tensor": 2}, None),
        (4, {"data": 8}, None),
    ],
)
def test_layers_take_the_largest_mesh_axis_that_divides_them(layers, sizes, expected):
    assert layer_axis(layers, make_mesh(sizes)) == expected


def test_what_the_layers_do_not_take_stays_inside_of_the_matrix():
    mesh = make_mesh(SIZES)
    parameter = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    shape = (6, 32, 48)
    found = layer_sharding(jax.ShapeDtypeStruct(shape, jnp.float32), shape, parameter)
    assert found.spec == PartitionSpec("fsdp", None, "tensor")
    basis = layer_sharding(jax.ShapeDtypeStruct((6, 32, 2), jnp.float32), shape, parameter)
    assert basis.spec == PartitionSpec("fsdp")
    assert layer_sharding(jax.ShapeDtypeStruct((3, 32), jnp.float32), (3, 32), parameter) is None


@pytest.mark.parametrize("name", ["muon", "spectra"])
def test_the_update_exchanges_gradients_once_and_gathers_no_matrix(name):
    """The layout pays: whole matrices on each device, without a copy of all layers anywhere."""
    config, tx = make(name, 4)
    mesh = make_mesh(SIZES)
    state = abstract_state(config, tx, mesh)
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(  # noqa: E731
        leaf.shape, leaf.dtype, sharding=sharding
    )
    shardings = model.shardings(config.model, mesh)
    params = jax.tree.map(place, model.abstract_params(config.model), shardings)
    layouts = jax.tree.map(lambda leaf: leaf.sharding, state.opt_state)
    with jax.set_mesh(mesh):
        step = jax.jit(tx.update, out_shardings=(shardings, layouts))
        text = step.lower(params, state.opt_state, params).compile().as_text()
    found = re.findall(r"= (.+?) (all-reduce|all-gather|all-to-all|collective-permute)\(", text)
    largest = {}
    for shapes, operation in found:
        sizes = [
            np.prod([int(n) for n in dims.split(",") if n], dtype=int)
            for dims in re.findall(r"\[([\d,]*)\]", shapes)
        ]
        largest[operation] = max(largest.get(operation, 0), *sizes)
    whole = 4 * 32 * 48
    assert "all-to-all" in largest, "the gradients have to change their layout somewhere"
    # A device's share of a stack is an eighth of it; Muon needs the shares of a tensor pair.
    assert max(largest.values()) <= whole // 2, largest
    momenta = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (4, 32, 48)]
    assert momenta
    for leaf in momenta:
        assert leaf.sharding.spec == PartitionSpec("fsdp", None, "tensor")
