"""Weights as trained factors: w = u diag(s) v^T + residual, each its own parameter.

Metis's released code trains u, s, v and the residual in place of w (arXiv 2509.00404). That alone
changes training, with or without quantization: the optimizer sees other parameters. `merge_weights`
is differentiable, so any model can be trained on the factors.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from quant.low_rank import leading_basis
from quant.recipe import LowRank
from quant.rounding import Key, fold_seed


class SplitWeight(NamedTuple):
    """Factors of one matrix, or of a stack of them."""

    u: jax.Array
    """[..., m, k], orthonormal columns at the split."""
    s: jax.Array
    """[..., k]."""
    v: jax.Array
    """[..., n, k], orthonormal columns at the split."""
    residual: jax.Array
    """[..., m, n]."""


def split_weights(w: jax.Array, low_rank: LowRank, key: Key) -> SplitWeight | jax.Array:
    """Split w [..., m, n] by its leading k = `low_rank.columns(m, n)` directions.

    Returns:
      The factors in the dtype of w; w itself if it is too small to be split.
    """
    *lead, m, n = w.shape
    k = low_rank.columns(m, n)
    if k == 0:
        return w
    flat = w.reshape(-1, m, n).astype(jnp.float32)

    def one(w, index):
        v = leading_basis(w, k, low_rank, fold_seed(key, index), all_rows=True)
        scaled, triangle = jnp.linalg.qr(w @ v)
        # The small matrix has the singular values; its factors turn both bases.
        left, s, right = jnp.linalg.svd(triangle)
        u, v = scaled @ left, v @ right.T
        return SplitWeight(u, s, v, w - (u * s[None]) @ v.T)

    parts = jax.vmap(one)(flat, jnp.arange(len(flat)))
    return jax.tree.map(lambda p: p.reshape(*lead, *p.shape[1:]).astype(w.dtype), parts)


def merge_weights(split: SplitWeight) -> jax.Array:
    """u diag(s) v^T + residual."""
    product = jnp.einsum("...mk,...nk->...mn", split.u * split.s[..., None, :], split.v)
    return product + split.residual
