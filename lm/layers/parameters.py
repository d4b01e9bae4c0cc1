"""How a parameter is declared: shape, initial scale and logical axes in one place.

Layers that share a shape are stacked along a leading axis, so that `jax.lax.scan` can run them and
compile time does not grow with depth. `Stack(n)` passed to a layer's constructor makes it declare
n copies of itself at once.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class Stack(NamedTuple):
    """How many copies of a layer are declared together; None is a single, unstacked layer."""

    size: int | None = None


SINGLE = Stack()
"""A layer by itself."""


def normal(
    key: jax.Array,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    *,
    std: float,
    dtype: str,
    stack: Stack = SINGLE,
) -> nnx.Param:
    """A parameter drawn from N(0, std^2).

    Args:
      key: key of the draw.
      shape: shape of one layer's parameter.
      axes: logical axis name of each dimension of `shape` (`lm.sharding.RULES`).
      std: standard deviation.
      dtype: dtype it is held in; the draw itself is made in float32.
      stack: number of layers declared together, a leading axis named "layers".
    """
    shape, axes = _stacked(shape, axes, stack)
    value = jax.random.normal(key, shape, jnp.float32) * std
    return nnx.Param(value.astype(dtype), logical_axes=axes)


def constant(
    value: float,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    *,
    dtype: str,
    stack: Stack = SINGLE,
) -> nnx.Param:
    """A parameter that starts at `value` everywhere; other arguments as in `normal`."""
    shape, axes = _stacked(shape, axes, stack)
    return nnx.Param(jnp.full(shape, value, dtype), logical_axes=axes)


def _stacked(shape, axes, stack: Stack):
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} and logical axes {axes} differ in length")
    if stack.size is None:
        return tuple(shape), tuple(axes)
    return (stack.size, *shape), ("layers", *axes)


def fan_in_std(d_in: int, residual_layers: int | None = None) -> float:
    """1 / sqrt(d_in), so that unit-variance inputs give unit-variance outputs (LeCun 1998).

    `residual_layers`: for the two projections of a layer that add to the residual stream, the
    scale is divided by sqrt(2 * layers), so the stream's variance does not grow with depth (GPT-2,
    Radford et al. 2019, section 2.3).
    """
    std = 1.0 / math.sqrt(d_in)
    return std if residual_layers is None else std / math.sqrt(2 * residual_layers)
