"""Tiled Hadamard transform: spreads an outlier over the values of its tile before quantization.

Every tile of `size` values along an axis is multiplied by S H, where H is the Sylvester Hadamard
matrix over sqrt(size), H H^T = I, and S = diag(signs). Applied to both operands along the
contracted axis it cancels: (X S H)(Y S H)^T = X Y^T. With signs this is the random Hadamard
transform of the NVFP4 pre-training recipe (arXiv 2509.25149, section 4.2 and appendix C).
"""

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SIZES = (16, 32, 64, 128)

TE_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""The one vector of 16 signs that Transformer Engine uses in every layer and step."""


def hadamard(
    x: jax.Array,
    *,
    axis: int,
    size: int = 16,
    signs: jax.Array | Sequence[int] | None = None,
) -> jax.Array:
    """Transform tiles of `size` values along `axis`: t -> t S H, orthonormal, linear.

    Args:
      x: float32, bfloat16 or float16; the length of `axis` a multiple of `size`.
      axis: the axis that tiles lie along.
      size: 16, 32, 64 or 128.
      signs: `size` signs +1 or -1, e.g. `quant.TE_SIGNS` or `quant.random_signs`; None: all +1.

    Returns:
      float32 of x's shape. Not x's dtype: it is made to be quantized, and once rounded is enough.

    Raises:
      ValueError: another size, a length that is no multiple, a wrong number of signs.

    Examples:
      >>> x = jnp.zeros(16).at[3].set(8.0)
      >>> hadamard(x, axis=0)[:4]
      Array([ 2., -2., -2.,  2.], dtype=float32)
      >>> y = hadamard(x, axis=0, signs=TE_SIGNS)
      >>> inverse_hadamard(y, axis=0, signs=TE_SIGNS)[2:5]
      Array([0., 8., 0.], dtype=float32)
    """
    x, vector = _check(x, axis, size, signs, "hadamard")
    matrix = jnp.asarray(_sylvester(size))
    return _tiles(x, axis, matrix if vector is None else vector[:, None] * matrix)


def inverse_hadamard(
    x: jax.Array,
    *,
    axis: int,
    size: int = 16,
    signs: jax.Array | Sequence[int] | None = None,
) -> jax.Array:
    """Undo `hadamard` with the same arguments: t -> t H^T S. Without signs the two are one."""
    x, vector = _check(x, axis, size, signs, "inverse_hadamard")
    matrix = jnp.asarray(_sylvester(size))  # symmetric
    return _tiles(x, axis, matrix if vector is None else matrix * vector[None, :])


def random_signs(key: jax.Array, size: int = 16) -> jax.Array:
    """`size` independent signs +1 or -1, float32."""
    return jax.random.rademacher(key, (size,), jnp.float32)


def _sylvester(size: int) -> np.ndarray:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.kron(np.array([[1, 1], [1, -1]], np.float32), matrix)
    return matrix / np.sqrt(np.float32(size))


def _check(x, axis, size, signs, name) -> tuple[jax.Array, jax.Array | None]:
    x = jnp.asarray(x)
    if size not in SIZES:
        raise ValueError(f"{name}: size must be one of {SIZES}, not {size}")
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise TypeError(f"{name}: x must be float32, bfloat16 or float16, not {x.dtype}")
    if not -x.ndim <= operator.index(axis) < x.ndim:
        raise ValueError(f"{name}: axis {axis} is out of range for x of shape {x.shape}")
    if x.shape[axis] % size:
        raise ValueError(
            f"{name}: axis {axis} has {x.shape[axis]} values, no multiple of {size}; pad both "
            "operands of the product with zeros along it, the product stays the same"
        )
    if signs is None:
        return x, None
    vector = jnp.asarray(signs, jnp.float32)
    if vector.shape != (size,):
        raise ValueError(f"{name}: signs have shape {vector.shape}, expected ({size},)")
    return x, vector


def _tiles(x: jax.Array, axis: int, matrix: jax.Array) -> jax.Array:
    """Multiply every tile along `axis` by the matrix from the right, in float32."""
    axis %= x.ndim
    size = len(matrix)
    shape = x.shape
    x = x.astype(jnp.float32).reshape(*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :])
    x = jnp.moveaxis(x, axis + 1, -1)
    x = jnp.matmul(x, matrix, precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(x, -1, axis + 1).reshape(shape)
