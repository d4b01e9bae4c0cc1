"""Parameters of any rank seen as stacks of matrices, by `optax.contrib.MuonDimensionNumbers`."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

DimensionNumbers = MuonDimensionNumbers | Any | Callable[[Any], Any] | None
"""One specification, a tree of them in the structure of the parameters, a function from the
parameters to such a tree, or None: the last two axes are the matrix, the rest are a stack."""


class MatrixView(NamedTuple):
    """How an array of one shape becomes [..., rows, columns] and back."""

    shape: tuple[int, ...]
    """Of the view; what stands before the last two axes is a stack of independent matrices."""
    split: Callable[[jax.Array], jax.Array]
    """Array to view."""
    join: Callable[[jax.Array], jax.Array]
    """View to array."""


def matrix_view(shape: tuple[int, ...], dims: MuonDimensionNumbers | None) -> MatrixView:
    """The view of arrays of `shape`: reduction axes are the rows, output axes the columns.

    Stack axes keep their order and are never merged, so that a stack that is sharded over one of
    them stays so. Without transposition or merging of axes the view is the array itself.

    Raises:
      ValueError: fewer than two axes, or axes named twice or out of range.
    """
    ndim = len(shape)
    if ndim < 2:
        raise ValueError(
            f"a parameter of shape {shape} is no matrix: leave it to another optimizer with "
            "optax.partition or optax.masked, or use an alias that does"
        )
    if dims is None:
        dims = MuonDimensionNumbers(ndim - 2, ndim - 1)
    rows, columns = _axes(dims.reduction_axis), _axes(dims.output_axis)
    if any(not -ndim <= axis < ndim for axis in rows + columns):
        raise ValueError(f"{dims} names an axis that the shape {shape} does not have")
    rows, columns = (tuple(axis % ndim for axis in axes) for axes in (rows, columns))
    if len(set(rows + columns)) < len(rows + columns) or not rows or not columns:
        raise ValueError(f"{dims} must name every axis of the shape {shape} at most once")
    stack = tuple(axis for axis in range(ndim) if axis not in rows + columns)
    order = stack + rows + columns
    size = lambda axes: math.prod(shape[axis] for axis in axes)  # noqa: E731
    view = (*(shape[axis] for axis in stack), size(rows), size(columns))
    permuted = tuple(shape[axis] for axis in order)
    if order == tuple(range(ndim)) and view == shape:
        return MatrixView(shape, lambda x: x, lambda x: x)
    inverse = tuple(order.index(axis) for axis in range(ndim))
    return MatrixView(
        view,
        lambda x: jnp.transpose(x, order).reshape(view),
        lambda x: jnp.transpose(x.reshape(permuted), inverse),
    )


def matrix_views(params: Any, dimension_numbers: DimensionNumbers) -> Any:
    """A `MatrixView` for every leaf of `params`, as a flat list in the order of its leaves."""
    if callable(dimension_numbers):
        dimension_numbers = dimension_numbers(params)
    leaves, structure = jax.tree.flatten(params)
    if dimension_numbers is None or isinstance(dimension_numbers, MuonDimensionNumbers):
        dims = [dimension_numbers] * len(leaves)
    else:
        is_dims = lambda x: x is None or isinstance(x, MuonDimensionNumbers)  # noqa: E731
        # Parameters that optax.masked took out are taken out here too.
        masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
        pruned = jax.tree.map(
            lambda p, d: p if masked(p) else _Spec(d), params, dimension_numbers, is_leaf=masked
        )
        dims = [spec.dims for spec in structure.flatten_up_to(pruned)]
        if not all(is_dims(d) for d in dims):
            raise ValueError("dimension_numbers must hold MuonDimensionNumbers or None")
    return [matrix_view(jnp.shape(p), d) for p, d in zip(leaves, dims, strict=True)]


class _Spec:
    """Hides a NamedTuple (a tree of its own to JAX) in a leaf."""

    def __init__(self, dims):
        self.dims = dims


def _axes(axis) -> tuple[int, ...]:
    return (axis,) if isinstance(axis, int) else tuple(axis)
