"""Everything that a training step changes, and how it is laid out over a mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from lm import model
from lm.layers.adapters import partition
from lm.sharding import replicated
from lm.train.config import RunConfig
from lm.train.guard import GuardState, init_guard
from lm.train.quantization import make_quantization
from lm.train.stacked import SPECTRAL, layer_sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The whole state of a run: saving it and the step's data index makes resuming exact."""

    step: Int[Array, ""]
    params: model.Params
    opt_state: Any
    guard: GuardState
    quant: Any = dataclasses.field(default_factory=dict)
    """Bases that a quantization recipe keeps between steps (`lm.train.quantization`)."""


def init_state(config: RunConfig, tx: optax.GradientTransformation) -> TrainState:
    """Fresh state from `config.seed`."""
    params = model.init(config.model, jax.random.key(config.seed))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(partition(config.model, params)[1]),
        guard=init_guard(config.guard),
        quant=quantization.init() if (quantization := make_quantization(config)) else {},
    )


def state_shardings(config: RunConfig, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A `NamedSharding` for every leaf of the state.

    What mirrors the parameters in the optimizer state (moments, momentum) is laid out like them,
    behind an axis of tasks where there is one (AdaTask). Spectral optimizers keep stacked layers,
    and what else they hold for each layer, over the layer axis (`lm.train.stacked`). Counters and
    statistics are replicated, and so is per-parameter state of any other shape.
    """
    everywhere = replicated(mesh)
    optimizer = config.mat.base if config.optim.name == "mat" else config.optim.name
    abstract = jax.eval_shape(lambda: init_state(config, tx))
    _, trained = partition(config.model, model.abstract_params(config.model))
    shapes = jax.tree.map(lambda leaf: leaf.shape, trained)
    masked = lambda leaf: isinstance(leaf, optax.MaskedNode)  # noqa: E731

    def place(leaf, sharding, shape):
        if masked(leaf):  # a parameter that this part of the optimizer leaves to another
            return leaf
        if optimizer in SPECTRAL and (layers := layer_sharding(leaf, shape, sharding)):
            return layers
        if leaf.shape[1:] == shape and leaf.ndim > len(shape):  # one copy for each task
            return NamedSharding(mesh, PartitionSpec(None, *sharding.spec))
        return sharding if leaf.shape == shape else everywhere

    opt_state = optax.tree.map_params(
        tx,
        place,
        abstract.opt_state,
        partition(config.model, model.shardings(config.model, mesh))[1],
        shapes,
        transform_non_params=lambda leaf: everywhere,
        is_leaf=masked,
    )
    return TrainState(
        step=everywhere,
        params=model.shardings(config.model, mesh),
        opt_state=opt_state,
        guard=jax.tree.map(lambda _: everywhere, abstract.guard),
        quant=jax.tree.map(lambda _: everywhere, abstract.quant),
    )


def abstract_state(config: RunConfig, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shape, dtype and sharding of every leaf, to restore a checkpoint into."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(lambda: init_state(config, tx)),
        state_shardings(config, tx, mesh),
    )
