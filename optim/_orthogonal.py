"""Orthonormal bases of tall, thin matrices: matrix products and a small Cholesky factor."""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def unit_columns(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Columns of length 1 and their former lengths, [..., n, k] and [..., k]; zero stays zero."""
    norms = jnp.sqrt(jnp.sum(jnp.square(x), axis=-2))
    return x / jnp.maximum(norms, jnp.finfo(x.dtype).tiny)[..., None, :], norms


def gram(x: jax.Array) -> jax.Array:
    """x^T x, [..., k, k], at full precision (TPUs and TF32 would round the operands)."""
    return jnp.einsum("...nk,...nl->...kl", x, x, precision=HIGHEST)


def orthonormalize(y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Orthonormal basis of the columns of `y`, in their order, as Gram-Schmidt gives it.

    CholeskyQR2 (Yamamoto et al. 2015) on columns scaled to length 1: with R the Cholesky factor of
    y^T y, y R^-1 is orthonormal up to eps * cond(y)^2, and once more brings that to eps. Thin QR
    by Householder reflections gives the same basis several times slower. Its two faults are mended
    without a branch (a branch would make sharded stacks communicate):

    - the factorization fails for dependent columns: the first one is shifted by s = 8 k eps
      (Fukaya et al. 2020), far below what independent columns see;
    - dependent columns give no direction: a column whose part orthogonal to those before it is
      below about sqrt(s) of its length is set to zero instead of being filled with rounding noise.

    Args:
      y: [..., n, k], n >= k; scaled as it may be, NaN gives NaN.

    Returns:
      basis: [..., n, k]; basis^T basis is the identity to about k * eps (1e-6 in float32 for k
        up to 256), with zeros on the diagonal for the columns that were dropped.
      kept: bool [..., k], False for those columns.
    """
    k, eps = y.shape[-1], jnp.finfo(y.dtype).eps
    identity = jnp.broadcast_to(jnp.eye(k, dtype=y.dtype), (*y.shape[:-2], k, k))
    y, norms = unit_columns(y)
    # What fell below the range of the others by more than eps is rounding noise.
    top = jnp.max(norms, axis=-1, keepdims=True)
    alive = norms > jnp.maximum(top * eps, jnp.finfo(y.dtype).tiny)
    y = jnp.where(or_nan(alive, norms)[..., None, :], y, 0)
    y = _solve(y, gram(y) + 8 * k * eps * identity)
    # Independent columns have length 1 now, dependent ones next to nothing.
    squares = jnp.sum(jnp.square(y), axis=-2)
    kept = squares > 0.5
    y = jnp.where(or_nan(kept, squares)[..., None, :], y, 0)
    second = gram(y)
    return _solve(y, second + identity * ~kept[..., None, :]), kept


def _solve(y: jax.Array, g: jax.Array) -> jax.Array:
    """y R^-1 with g = R^T R; the small factor is inverted, so the tall one is only multiplied."""
    factor = jnp.linalg.cholesky(g, upper=True, symmetrize_input=False)
    eye = jnp.broadcast_to(jnp.eye(g.shape[-1], dtype=g.dtype), g.shape)
    inverse = jax.scipy.linalg.solve_triangular(factor, eye)
    return jnp.einsum("...nk,...kl->...nl", y, inverse, precision=HIGHEST)


def or_nan(condition: jax.Array, value: jax.Array) -> jax.Array:
    return condition | jnp.isnan(value)
