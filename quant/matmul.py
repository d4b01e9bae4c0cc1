"""Products of two matrices, in the form that each backend is fast at."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint


def dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Contract two matrices, accumulating in float32."""
    if a.dtype != b.dtype:
        a, b = (t.astype(jnp.promote_types(a.dtype, b.dtype)) for t in (a, b))
    dims = (((axis_a,), (axis_b,)), ((), ()))
    plain = lambda a, b: lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)  # noqa: E731
    if a.dtype != jnp.bfloat16 or (axis_a, axis_b) == (1, 0):
        return plain(a, b)

    def fast(a, b):
        # A transposition of the result must not become one of the product: there is no such kernel.
        return lax.optimization_barrier(lax.dot(a, b, preferred_element_type=jnp.float32))

    def rows_first(a, b):
        # XLA:CPU sends only [p, c] [c, q] in row-major order to its fast bfloat16 kernel. With both
        # contracted along rows, the smaller one is the one to transpose.
        if (axis_a, axis_b) == (0, 0) and a.shape[1] > b.shape[1]:
            return fast(_row_major(b.T), a).T
        return fast(_row_major(a.T) if axis_a == 0 else a, _row_major(b.T) if axis_b == 1 else b)

    return lax.platform_dependent(a, b, cpu=rows_first, default=plain)


def _row_major(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout((0, 1)))
