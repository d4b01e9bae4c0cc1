"""The product of a mixture of experts, quantized: rows in groups, a matrix for each group.

    y[rows of e] = x[rows of e] w[e]

Weights have one tensor scale for each expert, rows one for all. A mean is that of an expert's own
rows; leading directions are those of all rows. Blocks of the weight gradient lie along rows, so
every group has to begin at a multiple of `row_multiple` (rows of zeros fill up).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from quant import low_rank as lr
from quant.operands import basis_of, dense, prepare, role_key, take_out, transform
from quant.recipe import Recipe
from quant.recipes import get_recipe
from quant.rounding import Key, Seed, seed_of

Grouped = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(lhs, rhs, group_sizes) -> result: `moe.grouped_matmul` or `moe.grouped_outer`."""


def row_multiple(recipe: str | Recipe) -> int:
    """What the number of rows of every group has to be a multiple of.

    >>> row_multiple("nvidia"), row_multiple("mxfp4"), row_multiple("fp8")
    (16, 32, 1)
    """
    recipe = get_recipe(recipe)
    sizes = [1]
    for operand in (recipe.wgrad_x, recipe.wgrad_d):
        if operand is not None:
            sizes += [operand.fmt.block or 1, operand.hadamard or 1]
    return math.lcm(*sizes)


def grouped_matmul(
    recipe: str | Recipe,
    matmul: Grouped,
    outer: Grouped,
    *,
    key: Key | None = None,
    enabled: jax.Array | bool | None = None,
) -> Grouped:
    """A quantized (lhs [M, K], rhs [E, K, N], group_sizes [E]) -> [M, N], with its own gradient.

    Args:
      recipe: a recipe, or its name. Bases are found anew at every use.
      matmul: (lhs [M, K], rhs [E, K, N], group_sizes) -> [M, N], which the quantized operands go
        through; accumulates in float32 and gives the dtype of lhs or float32.
      outer: (lhs [M, K], grad [M, N], group_sizes) -> [E, K, N], each group's lhs^T grad.
      key: random key of this product at this step; every product of a layer needs its own.
      enabled: as in `quant.dot_general`.

    Raises:
      ValueError: a missing key.
    """
    recipe = get_recipe(recipe)
    if recipe.needs_key and key is None:
        raise ValueError(f"recipe {recipe.name!r} draws random numbers: give it a key")
    if enabled is False:
        recipe, enabled = get_recipe("bf16"), None
    on = None if enabled is None or enabled is True else jnp.asarray(enabled)
    seed = None if key is None else seed_of(key)
    spec = _Spec(recipe, matmul, outer)
    return lambda lhs, rhs, group_sizes: _product(spec, lhs, rhs, group_sizes, seed, on)


@dataclasses.dataclass(frozen=True)
class _Spec:
    recipe: Recipe
    matmul: Grouped
    outer: Grouped


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(spec: _Spec, x, w, sizes, key: Seed | None, enabled) -> jax.Array:
    recipe = spec.recipe

    def quantized():
        a = _rows(recipe, "fprop_x", x, 1, sizes, key)
        b, scale = _weights(recipe, "fprop_w", w, 0, key)
        y = _rows_times(spec, a, b, scale, sizes, x.dtype)
        return (y + _mean_rows(recipe, a.mean, b, scale, w, sizes, len(x))).astype(x.dtype)

    plain = lambda: spec.matmul(x, w.astype(x.dtype), sizes).astype(x.dtype)  # noqa: E731
    return quantized() if enabled is None else lax.cond(enabled, quantized, plain)


def _fwd(spec, x, w, sizes, key, enabled):
    return _product(spec, x, w, sizes, key, enabled), (x, w, sizes, key, enabled)


def _bwd(spec: _Spec, residuals, d):
    x, w, sizes, key, enabled = residuals
    recipe = spec.recipe

    def quantized():
        a = _rows(recipe, "dgrad_d", d, 1, sizes, key)
        b, scale = _weights(recipe, "dgrad_w", w, 1, key)
        b, exact = b.swapaxes(1, 2), w.swapaxes(1, 2)
        dx = _rows_times(spec, a, b, scale, sizes, d.dtype)
        dx = dx + _mean_rows(recipe, a.mean, b, scale, exact, sizes, len(d))

        a = _rows(recipe, "wgrad_x", x, 0, sizes, key)
        b = _rows(recipe, "wgrad_d", d, 0, sizes, key)
        dw = _joined(spec.outer, a.values, b.values, sizes)
        for side in (a, b):
            dw = dw if side.scale is None else dw * side.scale
        dw = dw + _mean_outer(recipe, a, b, sizes)
        return dx.astype(x.dtype), dw.astype(w.dtype)

    def plain():
        dx = spec.matmul(d, w.swapaxes(1, 2).astype(d.dtype), sizes)
        return dx.astype(x.dtype), spec.outer(x, d, sizes).astype(w.dtype)

    dx, dw = quantized() if enabled is None else lax.cond(enabled, quantized, plain)
    return dx, dw, None, None, None


_product.defvjp(_fwd, _bwd)


class _Rows(NamedTuple):
    """x or d, quantized."""

    values: jax.Array
    """[M, C]."""
    scale: jax.Array | None = None
    mean: jax.Array | None = None
    """f32 [E, C]."""
    hadamard: int | None = None
    signs: Seed | None = None


def _rows(recipe: Recipe, role: str, x, axis: int, sizes, key) -> _Rows:
    operand, tensor = getattr(recipe, role), role[-1]
    if operand is None:
        return _Rows(x)
    mean = None
    if recipe.mean is not None and getattr(recipe.mean, tensor):
        mean = _sums(x, sizes) / jnp.maximum(sizes, 1).astype(jnp.float32)[:, None]
        x = (x.astype(jnp.float32) - _spread(mean, sizes, len(x))).astype(x.dtype)
        if recipe.mean.precision == "fp4":
            seed = role_key(key, f"mean.{tensor}") if operand.rounding == "stochastic" else None
            mean = lr.along(mean.T, operand, seed).T
    bare = dataclasses.replace(recipe, mean=None)
    rank = recipe.low_rank.columns(*x.shape) if recipe.low_rank else 0
    basis = basis_of(bare, tensor, x, key, rank)
    parts = take_out(bare, tensor, x, operand, key, basis)
    signs = role_key(key, f"{role[:5]}.signs")
    side = prepare(bare, role, parts, axis, key, signs)
    if side.inner is None or side.outer is None:
        return _Rows(side.values, side.scale, mean, operand.hadamard, signs)
    return _Rows(_whole(side), None, mean, operand.hadamard, signs)


def _weights(recipe: Recipe, role: str, w, axis: int, key):
    """Values [E, ...] and the scales [E] or None."""
    operand = getattr(recipe, role)
    if operand is None:
        return w, None
    rank = recipe.low_rank.columns(*w.shape[1:]) if recipe.low_rank else 0

    def one(w, index):
        seed = role_key(key, f"expert.{role[-1]}")
        seed = None if seed is None else Seed(seed.a + index, seed.b)
        basis = basis_of(recipe, "w", w, seed, rank)
        parts = take_out(recipe, "w", w, operand, seed, basis)
        side = prepare(recipe, role, parts, axis, seed, role_key(key, f"{role[:5]}.signs"))
        if side.inner is None or side.outer is None:
            return side.values, side.scale
        return _whole(side), None

    return jax.vmap(one)(w, jnp.arange(len(w), dtype=jnp.uint32))


def _whole(side):
    """Values and factors as one bfloat16 matrix; hardware would sum them in its accumulator."""
    return dense(side._replace(mean=None)).astype(jnp.bfloat16)


def _rows_times(spec: _Spec, a: _Rows, b, scale, sizes, dtype):
    """Rows times the matrices of their groups, f32, with all scales."""
    # The product has the dtype of its rows: those in bfloat16 would round a float32 result.
    y = _joined(spec.matmul, a.values.astype(jnp.promote_types(a.values.dtype, dtype)), b, sizes)
    y = y if a.scale is None else y * a.scale
    return y if scale is None else y * _spread(scale[:, None], sizes, len(y))


def _joined(product: Grouped, a, b, sizes):
    dtype = jnp.promote_types(a.dtype, b.dtype)
    return product(a.astype(dtype), b.astype(dtype), sizes).astype(jnp.float32)


def _spread(values, sizes, rows: int):
    """[E, ...] to [rows, ...]: each row gets its group's; rows behind the last group get zero."""
    ends = jnp.cumsum(sizes)
    group = jnp.searchsorted(ends, jnp.arange(rows), side="right")
    return values.at[group].get(mode="fill", fill_value=0)


def _sums(x, sizes):
    """[M, C] to [E, C], f32: sums over the rows of each group."""
    ends = jnp.cumsum(sizes)
    group = jnp.searchsorted(ends, jnp.arange(len(x)), side="right")
    return jax.ops.segment_sum(x.astype(jnp.float32), group, len(sizes), indices_are_sorted=True)


def _mean_rows(recipe: Recipe, mean, values, scale, exact, sizes, rows: int):
    """What the means add to the rows of their groups; 0 without means."""
    if mean is None:
        return 0.0
    assert recipe.mean is not None
    if recipe.mean.weight == "high":
        values, scale = exact, None
    added = jnp.einsum("ek,ekn->en", mean, values, preferred_element_type=jnp.float32)
    added = added if scale is None else added * scale[:, None]
    return _spread(added, sizes, rows)


def _mean_outer(recipe: Recipe, x: _Rows, d: _Rows, sizes):
    """What the means add to the weight gradient; 0 without means. See `quant.product.product`."""
    total = 0.0
    if x.mean is not None and d.mean is not None:
        total = sizes[:, None, None] * x.mean[:, :, None] * d.mean[:, None, :]
    cross = recipe.mean is not None and recipe.mean.cross_terms
    if x.mean is not None and (cross or d.mean is None):
        total = total + x.mean[:, :, None] * _column_sums(recipe, d, sizes)[:, None, :]
    if d.mean is not None and (cross or x.mean is None):
        total = total + _column_sums(recipe, x, sizes)[:, :, None] * d.mean[:, None, :]
    return total


def _column_sums(recipe: Recipe, rows: _Rows, sizes):
    """Sums over each group's rows of an operand of wgrad, whatever its transform; f32 [E, C]."""
    values = rows.values.astype(jnp.float32)
    if rows.hadamard:
        ones = jnp.ones((len(values), 1), jnp.float32)
        values = values * transform(ones, 0, rows.hadamard, recipe, rows.signs)
    sums = _sums(values, sizes)
    return sums if rows.scale is None else sums * rows.scale
