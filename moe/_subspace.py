"""Leading singular subspaces and projections by thin factors: nothing here is m x m or n x n.

Bases are orthonormal, U [..., m, k] and V [..., n, k], with P_U = U U^T and P_V = V V^T. Leading
axes broadcast. Products are made at full precision: they are thin, hence bound by memory, and TF32
or bfloat16 operands would leave a thousandth of what a projection is to remove.
"""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=HIGHEST)


def transpose(a: jax.Array) -> jax.Array:
    return jnp.swapaxes(a, -1, -2)


def orthonormal(x: jax.Array) -> jax.Array:
    """Orthonormal basis, [..., n, k], that holds the columns of x (n >= k), dependent or not."""
    return jnp.linalg.qr(x)[0]


def random_basis(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Orthonormal columns, uniformly distributed: the QR factor of a Gaussian of `shape`."""
    return orthonormal(jax.random.normal(key, shape, dtype))


def sweep(w: jax.Array, v: jax.Array, sweeps: int) -> tuple[jax.Array, jax.Array]:
    """Bases (U, V) of the leading singular subspaces of w [..., m, n] by subspace iteration.

    A sweep is U = orth(w V), V = orth(w^T U). From a warm start v [..., n, k] one or two follow a
    slowly changing w; a matrix of rank k is found exactly by one from almost any start.
    """
    for _ in range(sweeps):
        u = orthonormal(matmul(w, v))
        v = orthonormal(matmul(transpose(w), u))
    return u, v


def common_factors(g: jax.Array, u: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Thin factors of C(g) = P_U g + (I - P_U) g P_V: [..., m, 2k] and [..., 2k, n].

    C(g) = [U, (I - P_U) g V] [U^T g; V^T]. Two passes over g, 4mnk flops; the product is as much.
    """
    # Spelled out for each expert: a batched product is about twice as fast on CPUs as one that
    # broadcasts, and the copies are thin.
    stack = jnp.broadcast_shapes(g.shape[:-2], u.shape[:-2])
    u = jnp.broadcast_to(u, (*stack, *u.shape[-2:]))
    v = jnp.broadcast_to(v, (*stack, *v.shape[-2:]))
    rows, columns = matmul(transpose(u), g), matmul(g, v)
    columns = columns - matmul(u, matmul(rows, v))
    left = jnp.concatenate([u, columns], axis=-1)
    return left, jnp.concatenate([rows, transpose(v)], axis=-2)


def common_part(g: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    """C(g) = P_U g + (I - P_U) g P_V, of rank 2k at most; 8mnk flops."""
    return matmul(*common_factors(g, u, v))


def unique_part(g: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    """N(g) = (I - P_U) g (I - P_V) = g - C(g)."""
    return g - common_part(g, u, v)
