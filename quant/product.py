"""The product of two prepared operands.

    a = s_a A + inner_a outer_a^T,  b = s_b B + inner_b outer_b^T       (contracted along the first)
    a^T b = s_a s_b [A | outer_a | A^T inner_b]^T [B | b^T inner_a / (s_a s_b) | outer_b / s_b]

so the factors ride in the one large product as a few more columns of the contraction, and only
rank-one terms of means are added to the result.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from quant.operands import Side, skinny, vector_product


def product(a: Side, b: Side, *, cross_terms: bool, exact_b: jax.Array | None = None) -> jax.Array:
    """a b contracted along the axis of each, float32 [other axis of a, other axis of b].

    Args:
      a, b: as prepared. A mean is over the rows: of a in fprop and dgrad (it is contracted, and is
        one row to add), of both in wgrad (rows are contracted, and it is an outer product).
      cross_terms: in wgrad, keep the products of one's mean with the other's residual.
      exact_b: multiply the mean of a with this instead of b; in b's layout.
    """
    y = _with_factors(a, b)
    if a.axis == 1:
        if a.mean is not None:
            return y + _mean_row(a.mean, b, exact_b)[None]
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


def _mean_row(mean: jax.Array, b: Side, exact_b: jax.Array | None) -> jax.Array:
    if exact_b is None:
        return vector_product(mean, b)
    return skinny(mean[None], b._replace(values=exact_b, scale=None))[0]


def _with_factors(a: Side, b: Side) -> jax.Array:
    scale = None
    for side in (a, b):
        if side.scale is not None:
            scale = side.scale if scale is None else scale * side.scale
    left, right = [a.values], [b.values]
    inverse = jnp.float32(1) if scale is None else 1 / scale
    if a.inner is not None and a.outer is not None:
        inner = a.inner.astype(jnp.float32)
        through = skinny(inner.T, b)  # [k, other axis of b]
        if b.inner is not None and b.outer is not None:
            gram = inner.T @ b.inner.astype(jnp.float32)
            through = through + gram @ b.outer.astype(jnp.float32).T
        left.append(a.outer)
        right.append((through * inverse).T)
    if b.inner is not None and b.outer is not None:
        unscaled = a._replace(scale=None)
        left.append(skinny(b.inner.astype(jnp.float32).T, unscaled).T)
        right.append(b.outer.astype(jnp.float32) * (1.0 if b.scale is None else 1 / b.scale))
    y = dot(_join(left, a.axis), _join(right, b.axis), a.axis, b.axis)
    return y if scale is None else y * scale


def _join(columns: list[jax.Array], axis: int) -> jax.Array:
    """The values, and factors [other axis, k] as more of the contracted axis."""
    if len(columns) == 1:
        return columns[0]
    dtype = columns[0].dtype
    more = [(c if axis == 1 else c.T).astype(dtype) for c in columns[1:]]
    return jnp.concatenate([columns[0], *more], axis)


def dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Contract two matrices, accumulating in float32."""
    if a.dtype != b.dtype:
        a, b = (t.astype(jnp.promote_types(a.dtype, b.dtype)) for t in (a, b))
    dims = (((axis_a,), (axis_b,)), ((), ()))
    plain = lambda a, b: lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)  # noqa: E731
    if a.dtype != jnp.bfloat16 or (axis_a, axis_b) == (1, 0):
        return plain(a, b)

    def rows_first(a, b):
        # XLA:CPU sends only [p, c] [c, q] in row-major order to its fast bfloat16 kernel. With both
        # contracted along rows, the smaller one is the one to transpose.
        if (axis_a, axis_b) == (0, 0) and a.shape[1] > b.shape[1]:
            turned = lax.dot(_row_major(b.T), a, preferred_element_type=jnp.float32)
            return lax.optimization_barrier(turned).T
        a = _row_major(a.T) if axis_a == 0 else a
        b = _row_major(b.T) if axis_b == 1 else b
        return lax.dot(a, b, preferred_element_type=jnp.float32)

    return lax.platform_dependent(a, b, cpu=rows_first, default=plain)


def _row_major(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout((0, 1)))
