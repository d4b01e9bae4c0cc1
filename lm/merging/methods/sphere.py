"""Means of several models on the sphere: multi-SLERP and the Karcher mean.

Both are sums of the models whose coefficients follow from the inner products alone. Where the mean
direction is undefined (models that cancel) the plain weighted mean is taken.
"""

from typing import Any

import numpy as np

from lm.merging.methods.arrays import add
from lm.merging.methods.elect import WEIGHT, weights
from lm.merging.methods.gram import gram, mix
from lm.merging.methods.slerp import pair
from lm.merging.types import Block, Blocks, Method, Parameter

__all__ = ["KARCHER", "MULTISLERP", "karcher_coefficients", "multislerp_coefficients"]


def multislerp_coefficients(
    products: np.ndarray, share: np.ndarray, eps: float = 1e-8
) -> np.ndarray:
    """Coefficients of multi-SLERP.

    The definition takes the unit mean m of the weighted unit vectors, the weighted tangent vectors
    v = sum of w_k (u_k - (u_k . m) m), and cos(a) m + sin(a) v / a with a = |v| + eps. As m is the
    direction of sum w_k u_k, v is zero: what remains is cos(eps) m, times sum of w_k |theta_k|.

    Args:
      products: [K, K] inner products.
      share: [K] weights.
      eps: added to norms.
    """
    lengths = np.sqrt(np.diag(products))
    units = share / (lengths + eps)
    norm = np.sqrt(max(0.0, float(units @ products @ units)))
    if norm < max(eps, 1e-7 * np.abs(share).sum()):
        return share
    return units / norm * np.cos(eps) * (share @ lengths)


def karcher_coefficients(products: np.ndarray, max_iter: int = 10, tol: float = 1e-5) -> np.ndarray:
    """Coefficients of the Karcher mean with equal weights, scaled to the mean length.

    u <- cos|g| u + sin|g| g / |g| with g = mean of (w_k / sin w_k)(u_k - cos w_k u), from the
    normalised mean until |g| < tol. Vectors no longer than `tol` give no direction but count in
    the mean length; vectors opposite to u within 1e-5 pull nowhere, as no shortest way is theirs.

    Args:
      products: [K, K] inner products.
      max_iter: most iterations.
      tol: see above.
    """
    lengths = np.sqrt(np.diag(products))
    valid = lengths > tol
    count = int(valid.sum())
    if not count:
        return np.zeros(len(lengths))
    inverse = np.where(valid, 1 / np.where(valid, lengths, 1), 0)
    cosines = products * inverse[:, None] * inverse
    u = valid / count
    norm = np.sqrt(max(0.0, float(u @ cosines @ u)))
    if norm < tol:
        return np.full(len(lengths), 1 / len(lengths))
    u = u / norm
    for _ in range(int(max_iter)):
        cosine = np.clip(cosines @ u, -1, 1)
        angle = np.arccos(cosine)
        moves = valid & (angle >= tol) & (np.pi - angle >= 1e-5)
        pull = np.where(moves, angle / np.where(moves, np.sin(angle), 1), 0) / count
        g = pull - (pull @ cosine) * u
        size = np.sqrt(max(0.0, float(g @ cosines @ g)))
        if size < tol:
            break
        u = np.cos(size) * u + np.sin(size) * g / size
        u = u / np.sqrt(float(u @ cosines @ u))
    return lengths.mean() * u * inverse


def everyone(block: Block) -> tuple[Any, ...]:
    """The models, the base among them where one is given."""
    return block.models if block.base is None else (block.base, *block.models)


def measure_multislerp(blocks: Blocks) -> np.ndarray:
    """Inner products of the task vectors (of the models, without a base)."""
    return gram(blocks, pair)


def multislerp(block: Block) -> Any:
    """Weighted mean direction times weighted mean length; see `multislerp_coefficients`."""
    share = np.array(weights(block))
    if len(share) == 1:
        return block.models[0]
    if block.params["normalize_weights"] and abs(share.sum()) > 1e-12:
        share = share / share.sum()
    factors = multislerp_coefficients(block.statistics, share, float(block.params["eps"]))
    result = mix(block.xp, factors.tolist(), pair(block))
    return result if block.base is None else add(block.xp, result, block.base)


def measure_karcher(blocks: Blocks) -> np.ndarray:
    """Inner products of the models."""
    return gram(blocks, everyone)


def karcher(block: Block) -> Any:
    """The point of the sphere with the least sum of squared angles, times the mean length."""
    params = block.params
    factors = karcher_coefficients(block.statistics, int(params["max_iter"]), float(params["tol"]))
    return mix(block.xp, factors.tolist(), everyone(block))


MULTISLERP = Method(
    "multislerp",
    multislerp,
    measure=measure_multislerp,
    per_model=(WEIGHT,),
    params=(Parameter("normalize_weights", True, kind="bool"), Parameter("eps", 1e-8, low=0.0)),
    base="optional",
)
KARCHER = Method(
    "karcher",
    karcher,
    measure=measure_karcher,
    params=(Parameter("max_iter", 10, kind="integer", low=0), Parameter("tol", 1e-5, low=0.0)),
    base="optional",
)
