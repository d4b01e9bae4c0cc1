"""The leading directions of a tensor, estimated from a sample of its rows, and the split by them.

Randomized range finder with subspace iterations (Halko, Martinsson, Tropp 2011, algorithm 4.4) on
rows drawn without replacement, as in Metis (arXiv 2509.00404, version 4). It has no gradient.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quant.matmul import dot
from quant.quantize import fake_quant
from quant.recipe import LowRank, Operand
from quant.rounding import Key, fold_seed, random_bits

SHIFT = 1e-6
"""Of Cholesky QR on columns of size 1: above the rounding errors of their float32 Gram matrix."""


def leading_basis(x: jax.Array, k: int, low_rank: LowRank, key: Key, *, all_rows: bool):
    """Orthonormal basis of about the k leading right singular directions of x.

    Args:
      x: [rows, cols].
      k: number of directions.
      low_rank: its `oversample`, `rows` and `iterations` count here.
      key: draws the rows and the projection.
      all_rows: use every row (weights).

    Returns:
      float32 [cols, k]; columns beyond the rank of the sample may be zero.
    """
    rows, cols = x.shape
    wide = min(k + low_rank.oversample, rows, cols)
    count = max(math.ceil(low_rank.rows * rows), 4 * wide)
    if not all_rows and count < rows:
        x = x[_stratified(fold_seed(key, "rows"), rows, count)]
    x = x.astype(jnp.bfloat16)
    # Random signs do what Gaussian numbers do in a range finder, and are exact in bfloat16.
    bits = random_bits(fold_seed(key, "projection"), (len(x), wide))
    signs = (bits >> np.uint32(31)).astype(jnp.float32) * 2 - 1
    basis = _orthonormal(_tall(x, signs))
    for _ in range(low_rank.iterations):
        basis = _orthonormal(_tall(x, _project(x, basis)))
    basis = _orthonormal(basis)  # what one pass left over, for directions of very different size
    if wide == k:
        return basis
    # The leading k of the `wide` directions; eigenvectors come with the largest last.
    seen = _project(x, basis)
    gram = lax.dot(seen.T, seen, precision=lax.Precision.HIGHEST)
    finite = jnp.isfinite(gram).all()  # eigh may not return from NaN; the basis is NaN anyway
    vectors = jnp.linalg.eigh(jnp.where(finite, gram, jnp.eye(wide)))[1]
    return lax.dot(basis, vectors[:, wide - k :], precision=lax.Precision.HIGHEST)


def _stratified(key: Key, rows: int, count: int) -> jax.Array:
    """One row out of each of `count` equal parts: spread over all sequences, none twice."""
    edges = np.arange(count + 1, dtype=np.int64) * rows // count
    width = (edges[1:] - edges[:-1]).astype(np.uint32)
    return jnp.asarray(edges[:-1], jnp.int32) + (random_bits(key, (count,)) % width).astype(
        jnp.int32
    )


def _project(x: jax.Array, basis: jax.Array) -> jax.Array:
    return lax.dot(x, basis.astype(x.dtype), preferred_element_type=jnp.float32)


def _tall(x: jax.Array, right: jax.Array) -> jax.Array:
    """x^T right."""
    return dot(x, right.astype(x.dtype), 0, 0)


def _orthonormal(y: jax.Array) -> jax.Array:
    """y L^-T with L L^T = y^T y + shift: products and one small factorization, where Householder
    reflections of a tall matrix take a GPU longer than the products that they serve. Singular
    values s become s / sqrt(s^2 + shift), so twice makes 1 of any above 1e-3 (shifted Cholesky QR,
    Fukaya et al. 2020, arXiv 1809.11085)."""
    # Columns of one size: the shift is relative to them.
    norm = jnp.linalg.norm(y, axis=0, keepdims=True)
    y = y / jnp.where(norm > 0, norm, 1)
    gram = lax.dot(y.T, y, precision=lax.Precision.HIGHEST)
    lower = jnp.linalg.cholesky(gram + SHIFT * jnp.eye(len(gram)), symmetrize_input=False)
    q = lax.linalg.triangular_solve(lower, y, lower=True, transpose_a=True)
    return jnp.where(jnp.isfinite(norm).all(), q, jnp.nan)


def split(
    x: jax.Array,
    basis: jax.Array,
    low_rank: LowRank,
    operand: Operand,
    keys: tuple[Key | None, Key | None],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x = left right^T + residual, with the factors as the recipe stores them.

    Args:
      x: [rows, cols].
      basis: [cols, k] from `leading_basis`.
      low_rank: its `factors` count here.
      operand: format and rounding of factors in FP4.
      keys: of the stochastic rounding of left and right.

    Returns:
      left bfloat16 [rows, k], right bfloat16 [cols, k], residual [rows, cols] in the dtype of x.
    """
    seen = _project(x, basis)
    right = basis.astype(jnp.bfloat16)
    left = seen.astype(jnp.bfloat16)
    subtract = left, right
    if low_rank.factors != "high":
        # Singular vectors in FP4, blocked along themselves; singular values (the norms) not.
        norm = jnp.linalg.norm(seen, axis=0, keepdims=True)
        unit = seen / jnp.where(norm > 0, norm, 1)
        left = (along(unit, operand, keys[0]) * norm).astype(jnp.bfloat16)
        right = along(basis, operand, keys[1]).astype(jnp.bfloat16)
        if low_rank.factors == "fp4_feedback":
            subtract = left, right
    dims = (((1,), (1,)), ((), ()))
    low = lax.dot_general(*subtract, dims, preferred_element_type=jnp.float32)
    return left, right, (x.astype(jnp.float32) - low).astype(x.dtype)


def along(vectors: jax.Array, operand: Operand, key: Key | None) -> jax.Array:
    """Vectors [length, k], quantized in blocks along their length."""
    return fake_quant(
        vectors,
        operand.fmt,
        axis=0,
        rounding=operand.rounding,
        key=key,
        sr_headroom=operand.sr_headroom,
    )
