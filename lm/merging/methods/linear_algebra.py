"""Singular vectors and polar factors of one matrix.

NumPy works on the Gram matrix of the smaller side in float64: relative to its size a singular value
s has an error of about 1e-16 (s_1 / s)^2, below what rounding the input to float32 does, and
several times sooner than an SVD. Other namespaces take their own float32 SVD. Directions with
s <= 1e-6 s_1 are treated as absent (their vectors are 0): a library's SVD fills them with arbitrary
vectors.
"""

from typing import Any

import numpy as np

from lm.merging.methods.arrays import multiply

__all__ = ["mean_isotropic", "polar", "svd"]

NEGLIGIBLE = 1e-6


def svd(xp: Any, a: Any) -> tuple[Any, Any, Any]:
    """U [m, r], s [r] falling, V^T [r, n] with r = min(m, n); float64 from NumPy."""
    if xp is not np:
        u, s, vt = xp.linalg.svd(a, full_matrices=False)
        there = (s > NEGLIGIBLE * s[0]).astype(a.dtype)
        return u * there[None], s * there, vt * there[:, None]
    a = np.asarray(a, np.float64)
    if a.shape[0] > a.shape[1]:
        v, s, ut = svd(xp, a.T)
        return ut.T, s, v.T
    squares, u = np.linalg.eigh(a @ a.T)
    u = u[:, ::-1]
    s = np.sqrt(np.maximum(squares[::-1], 0))
    there = s > NEGLIGIBLE * s[0]
    s = s * there
    u *= there
    vt = u.T @ a
    vt /= np.where(there, s, 1)[:, None]
    return u, s, vt


def polar(xp: Any, a: Any) -> Any:
    """The matrix with a's singular vectors and singular values 1."""
    u, _, vt = svd(xp, a)
    return u @ vt


def mean_isotropic(xp: Any, a: Any) -> Any:
    """The matrix with a's singular vectors, all singular values set to their mean."""
    u, s, vt = svd(xp, a)
    return multiply(xp, u @ vt, s.mean())
