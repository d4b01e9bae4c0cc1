"""From a tensor to an operand of a product: what is taken out, what is quantized, in which scale.

    x = 1 mu^T + left right^T + residual          `take_out`, once for each tensor
    residual = scale * values                      `prepare`, once for each product

`values` are element times block scale: at most six significant bits, exact in bfloat16, so the
product of two quantized operands is one bfloat16 product, summed in float32, times two scalars.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from quant import low_rank as lr
from quant.hadamard import TE_SIGNS, hadamard
from quant.native import Packed, pack
from quant.quantize import fake_quant, quantize, quantize_values
from quant.recipe import Operand, Recipe
from quant.rounding import Key, Seed, fold_seed, random_bits


class Parts(NamedTuple):
    """A tensor [rows, cols], taken apart; None for what the recipe does not take out."""

    residual: jax.Array
    mean: jax.Array | None
    """float32 [cols], over the rows."""
    left: jax.Array | None
    """bfloat16 [rows, k]."""
    right: jax.Array | None
    """bfloat16 [cols, k]."""


class Side(NamedTuple):
    """One operand of a product, [rows, cols], contracted along `axis`."""

    values: jax.Array
    scale: jax.Array | None
    axis: int
    mean: jax.Array | None
    """[cols], transformed like the values where cols are contracted."""
    ones: jax.Array | None
    """What the mean's column of ones has become under the transform; None if it is all ones."""
    inner: jax.Array | None
    """[contracted, k]: the factor along the contracted axis (transformed like the values)."""
    outer: jax.Array | None
    """[other axis, k]."""
    packed: Packed | None = None
    """`values` once more, for a product on the hardware's own units."""


def role_key(key: Key | None, role: str) -> Seed | None:
    """The key of one operand."""
    return None if key is None else fold_seed(key, role)


def basis_of(recipe: Recipe, tensor: str, x: jax.Array, key: Key | None, rank: int):
    """A fresh basis for `take_out`, of x without its mean; None if it is not split."""
    low_rank = recipe.low_rank
    if low_rank is None or not getattr(low_rank, tensor) or rank == 0:
        return None
    if (mean := _mean(recipe, tensor, x)) is not None:
        x = (x.astype(jnp.float32) - mean[None]).astype(x.dtype)
    assert key is not None
    basis_key = fold_seed(key, f"basis.{tensor}")
    return lr.leading_basis(x, rank, low_rank, basis_key, all_rows=tensor == "w")


def _mean(recipe: Recipe, tensor: str, x: jax.Array) -> jax.Array | None:
    if recipe.mean is None or tensor == "w" or not getattr(recipe.mean, tensor):
        return None
    return jnp.sum(x, axis=0, dtype=jnp.float32) / max(len(x), 1)  # no tokens: no NaN


def take_out(
    recipe: Recipe,
    tensor: str,
    x: jax.Array,
    operand: Operand | None,
    key: Key | None,
    basis: jax.Array | None,
) -> Parts:
    """Take mean and leading directions out of "x", "d" or "w".

    Args:
      operand: how the tensor's parts are quantized, where the recipe says that they are.
      basis: from `basis_of`, or one kept from an earlier step.
    """
    if operand is None:  # not quantized: whole
        return Parts(x, None, None, None)
    keyed = lambda what: (  # noqa: E731
        role_key(key, f"{what}.{tensor}") if operand.rounding == "stochastic" else None
    )
    mean, left, right = _mean(recipe, tensor, x), None, None
    if mean is not None:
        assert recipe.mean is not None
        x = (x.astype(jnp.float32) - mean[None]).astype(x.dtype)
        if recipe.mean.precision == "fp4":
            mean = fake_quant(
                mean,
                operand.fmt,
                axis=0,
                rounding=operand.rounding,
                key=keyed("mean"),
                sr_headroom=operand.sr_headroom,
            )
    if basis is not None:
        assert recipe.low_rank is not None
        keys = keyed("left"), keyed("right")
        left, right, x = lr.split(x, basis, recipe.low_rank, operand, keys)
    return Parts(x, mean, left, right)


def prepare(
    recipe: Recipe,
    role: str,
    parts: Parts,
    axis: int,
    key: Key | None,
    sign_key: Key | None = None,
    native: bool = False,
) -> Side:
    """Quantize the residual in blocks along `axis`, the contracted one.

    Args:
      role: such as "fprop_x".
      key: of the call; the role is folded in here.
      sign_key: of random signs, the same for both operands of a product.
      native: for `quant.native`.
    """
    operand: Operand | None = getattr(recipe, role)
    x, mean, left, right = parts
    inner, outer = (left, right) if axis == 0 else (right, left)
    if operand is None:
        return Side(x, None, axis, mean, None, inner, outer)
    ones = None
    if operand.hadamard:
        size = operand.hadamard
        turn = lambda t: transform(t, axis, size, recipe, sign_key)  # noqa: E731
        x = turn(x)
        if inner is not None:
            inner = transform(inner, 0, size, recipe, sign_key)
        if mean is not None and axis == 1:
            mean = turn(mean[None])[0]
        elif mean is not None:
            ones = jnp.ones((len(parts.residual), 1), jnp.float32)
            ones = transform(ones, 0, size, recipe, sign_key)[:, 0]
    how: dict[str, Any] = dict(
        axis=axis,
        rounding=operand.rounding,
        key=role_key(key, role) if operand.rounding == "stochastic" else None,
        block_2d=operand.block_2d,
        sr_headroom=operand.sr_headroom,
    )
    values, scale = quantize_values(x, operand.fmt, **how)
    # Under jit nothing is computed twice: what is unused of the two is dropped, the rest shared.
    packed = pack(quantize(x, operand.fmt, **how)) if native else None
    return Side(values, scale, axis, mean, ones, inner, outer, packed)


def transform(x: jax.Array, axis: int, size: int, recipe: Recipe, sign_key) -> jax.Array:
    """Hadamard along `axis`, padded with zeros to whole tiles."""
    short = -x.shape[axis] % size
    if short:
        x = jnp.pad(x, [(0, short if i == axis else 0) for i in range(x.ndim)])
    return hadamard(x, axis=axis, size=size, signs=_signs(recipe, size, sign_key))


def _signs(recipe: Recipe, size: int, sign_key):
    if recipe.signs == "none":
        return None
    if recipe.signs == "te":
        return TE_SIGNS * (size // len(TE_SIGNS))
    return random_bits(sign_key, (size,)) % 2 * 2.0 - 1.0


def vector_product(vector: jax.Array, side: Side) -> jax.Array:
    """vector [contracted] times a side, float32 [other axis]; without the side's own mean."""
    y = skinny(vector[None], side)[0]
    if side.inner is not None and side.outer is not None:
        y = y + side.outer.astype(jnp.float32) @ (vector @ side.inner.astype(jnp.float32))
    return y


def skinny(rows: jax.Array, side: Side) -> jax.Array:
    """rows [k, contracted] in float32 times scale * values of a side: float32 [k, other axis].

    The rows go in as two bfloat16 halves: a float32 product with the values as they are, in one
    pass over them.
    """
    values, k = side.values, len(rows)
    if values.dtype == jnp.bfloat16:
        high = rows.astype(jnp.bfloat16)
        rows = jnp.concatenate([high, (rows - high.astype(jnp.float32)).astype(jnp.bfloat16)])
    dims = (((1,), (side.axis,)), ((), ()))
    y = lax.dot_general(rows, values, dims, preferred_element_type=jnp.float32)
    if values.dtype == jnp.bfloat16:
        y = y[:k] + y[k:]
    return y if side.scale is None else y * side.scale


def dense(side: Side) -> jax.Array:
    """The whole operand, float32 [rows, cols], in the transformed domain if there is one."""
    x = side.values.astype(jnp.float32)
    x = x if side.scale is None else x * side.scale
    if side.inner is not None and side.outer is not None:
        left, right = (side.inner, side.outer) if side.axis == 0 else (side.outer, side.inner)
        x = x + left.astype(jnp.float32) @ right.astype(jnp.float32).T
    if side.mean is not None:
        ones = jnp.ones(len(x), jnp.float32) if side.ones is None else side.ones
        x = x + ones[:, None] * side.mean[None]
    return x
