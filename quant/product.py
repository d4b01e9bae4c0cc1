"""The product of two prepared operands.

    a = s_a A + inner_a outer_a^T,  b = s_b B + inner_b outer_b^T       (contracted along the first)
    a^T b = s_a s_b [A | outer_a | A^T inner_b]^T [B | b^T inner_a / (s_a s_b) | outer_b / s_b]

so the factors ride in the one large product as a few more columns of the contraction, and only
rank-one terms of means are added to the result.
"""

import jax
import jax.numpy as jnp

from quant.matmul import dot
from quant.native import scaled_product
from quant.operands import Side, skinny, vector_product


def product(a: Side, b: Side, *, cross_terms: bool, mean_row: jax.Array | None = None) -> jax.Array:
    """a b contracted along the axis of each, float32 [other axis of a, other axis of b].

    Args:
      a, b: as prepared. A mean is over the rows: of a in fprop and dgrad (it is contracted, and is
        one row to add), of both in wgrad (rows are contracted, and it is an outer product).
      cross_terms: in wgrad, keep the products of one's mean with the other's residual.
      mean_row: the mean of a times b, float32 [other axis of b], where it is not to be that of the
        quantized b.
    """
    y = _with_factors(a, b)
    if a.axis == 1:
        if a.mean is not None:
            return y + (vector_product(a.mean, b) if mean_row is None else mean_row)[None]
        return y
    rows = a.values.shape[0]
    if a.mean is not None and b.mean is not None:
        # ones^T ones, whatever the transform: it is orthonormal (padding adds zeros only).
        count = jnp.float32(rows) if a.ones is None else jnp.sum(jnp.square(a.ones))
        y = y + (count * a.mean)[:, None] * b.mean[None]
    if a.mean is not None and (cross_terms or b.mean is None):
        y = y + a.mean[:, None] * vector_product(_ones(a, rows), b)[None]
    if b.mean is not None and (cross_terms or a.mean is None):
        y = y + vector_product(_ones(b, rows), a)[:, None] * b.mean[None]
    return y


def _ones(side: Side, rows: int) -> jax.Array:
    return jnp.ones((rows,), jnp.float32) if side.ones is None else side.ones


def _with_factors(a: Side, b: Side) -> jax.Array:
    scale = None
    for side in (a, b):
        if side.scale is not None:
            scale = side.scale if scale is None else scale * side.scale
    if a.packed is not None and b.packed is not None:
        return _native(a, b, scale)
    left, right = [a.values], [b.values]
    inverse = jnp.float32(1) if scale is None else _inverse(scale)
    if a.inner is not None and a.outer is not None:
        left.append(a.outer)
        right.append((_through(a.inner, b) * inverse).T)
    if b.inner is not None and b.outer is not None:
        unscaled = a._replace(scale=None)
        left.append(skinny(b.inner.astype(jnp.float32).T, unscaled).T)
        right.append(b.outer * (jnp.float32(1) if b.scale is None else _inverse(b.scale)))
    y = dot(_join(left, a.axis), _join(right, b.axis), a.axis, b.axis)
    return y if scale is None else y * scale


def _native(a: Side, b: Side, scale: jax.Array | None) -> jax.Array:
    assert a.packed is not None and b.packed is not None
    y = scaled_product(a.packed, b.packed)
    y = y if scale is None else y * scale
    if a.inner is not None and a.outer is not None:
        y = y + dot(a.outer, _through(a.inner, b).astype(a.outer.dtype), 1, 0)
    if b.inner is not None and b.outer is not None:
        seen = skinny(b.inner.astype(jnp.float32).T, a)  # [k, other axis of a]
        y = y + dot(seen.T.astype(b.outer.dtype), b.outer, 1, 1)
    return y


def _through(inner: jax.Array, b: Side) -> jax.Array:
    """inner^T b with the factors of b: float32 [k, other axis of b]."""
    inner = inner.astype(jnp.float32)
    through = skinny(inner.T, b)
    if b.inner is not None and b.outer is not None:
        gram = inner.T @ b.inner.astype(jnp.float32)
        through = through + gram @ b.outer.astype(jnp.float32).T
    return through


def _inverse(scale: jax.Array) -> jax.Array:
    """1 / scale, and 0 where that overflows: such a product is zero in float32."""
    return jnp.where(scale < 2.0**-120, 0.0, 1 / scale)


def _join(columns: list[jax.Array], axis: int) -> jax.Array:
    """The values, and factors [other axis, k] as more of the contracted axis."""
    if len(columns) == 1:
        return columns[0]
    dtype = columns[0].dtype
    more = [(c if axis == 1 else c.T).astype(dtype) for c in columns[1:]]
    return jnp.concatenate([columns[0], *more], axis)
