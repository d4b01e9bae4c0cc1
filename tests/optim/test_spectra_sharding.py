"""What the compiled update communicates and computes on 8 simulated devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import optim

COLLECTIVE = re.compile(
    r"= (\S+) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
)
OPTIONS = [
    {},
    {"rank": "auto", "rank_ratio": 0.25, "nesterov": True, "normalization": "factored"},
]


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()), ("x",), axis_types=(AxisType.Auto,))


def compiled(tx, shape, mesh, spec):
    """The update alone, gradient and momentum laid out by `spec`, the rest as it follows."""
    matrix = NamedSharding(mesh, spec)

    def place(leaf):
        if leaf.shape == shape:
            return matrix
        axes = [axis if size == dim else None for axis, size, dim in zip(spec, leaf.shape, shape)]  # noqa: B905
        return NamedSharding(mesh, PartitionSpec(*axes[: leaf.ndim]))

    gradient = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=matrix)
    abstract = jax.eval_shape(tx.init, gradient)
    placed = jax.tree.map(place, abstract)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        placed,
    )
    step = jax.jit(tx.update, out_shardings=(matrix, placed))
    return step.lower(gradient, state).compile()


def moved(program):
    """(operation, elements of its largest result) of every collective."""
    found = []
    for shapes, name in COLLECTIVE.findall(program.as_text()):
        sizes = [
            np.prod([int(n) for n in dims.split(",") if n], dtype=int)
            for dims in re.findall(r"\[([\d,]*)\]", shapes)
        ]
        found.append((name, max(sizes, default=1)))
    return found


@pytest.mark.parametrize("options", OPTIONS)
def test_stacked_layers_sharded_over_the_layer_axis_move_nothing(mesh, options):
    shape = (16, 64, 96)
    program = compiled(optim.scale_by_spectra(**options), shape, mesh, PartitionSpec("x"))
    assert moved(program) == []
    one = compiled(optim.scale_by_spectra(**options), (2, *shape[1:]), mesh, PartitionSpec())
    # Each device does the work of its two layers and no more.
    assert program.cost_analysis()["flops"] <= 1.05 * one.cost_analysis()["flops"]


@pytest.mark.parametrize("axes", [(None, "x", None), (None, None, "x")])
@pytest.mark.parametrize("shape", [(2, 128, 64), (2, 64, 128)])
def test_sharded_matrix_axes_move_rank_k_blocks_only(mesh, axes, shape):
    tx = optim.scale_by_spectra(rank_ratio=0, min_rank=3)
    found = moved(compiled(tx, shape, mesh, PartitionSpec(*axes)))
    assert found
    assert max(size for _, size in found) <= 2 * max(shape) * 3, found


@pytest.mark.parametrize("axes", [("x",), (None, "x", None), (None, None, "x")])
@pytest.mark.parametrize("options", OPTIONS)
def test_sharded_equals_unsharded(mesh, rng, axes, options):
    tx = optim.scale_by_spectra(**options)
    gradients = [jnp.asarray(rng.normal(size=(8, 32, 24)), jnp.float32) for _ in range(3)]

    def run(place):
        state = jax.jit(tx.init)(place(gradients[0]))
        for gradient in gradients:
            update, state = jax.jit(tx.update)(place(gradient), state)
        return np.asarray(update)

    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    expected = run(lambda x: x)
    np.testing.assert_allclose(run(lambda x: jax.device_put(x, sharding)), expected, atol=2e-5)


def test_the_update_compiled_for_a_v5p_moves_nothing_either():
    """Ahead of time, where libtpu is installed; no TPU is needed."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc("v5p:2x2x1", platform="tpu")
    mesh = Mesh(np.array(topology.devices), ("x",), axis_types=(AxisType.Auto,))
    shape = (2 * len(topology.devices), 256, 512)
    program = compiled(optim.scale_by_spectra(), shape, mesh, PartitionSpec("x"))
    assert moved(program) == []
