"""WUDI merging (arXiv 2503.08099): the matrix whose difference from each task vector is least felt.

Minimises sum over k of |(X - tau_k) tau_k^T|^2 / |tau_k|^2 for every matrix [out, in]; others are
averaged. The published numbers come from 300 steps of Adam at a rate of 1e-5 from the sum of the
task vectors, which move an entry by at most 0.003: `wudi_steps`. `wudi` is the minimiser itself:

    X = (sum of tau_k tau_k^T tau_k / n_k) (sum of tau_k^T tau_k / n_k)^+,   n_k = |tau_k|^2

With A the stacked tau_k / sqrt(n_k) = U S V^T, C = [tau_k tau_k^T / sqrt(n_k)]: X = C U S^-1 V^T,
which never forms the squared matrix.
"""

from typing import Any

from lm.merging.methods.elect import LAMBDA
from lm.merging.methods.linear import average
from lm.merging.methods.linear_algebra import svd
from lm.merging.methods.subspace import matrix_method
from lm.merging.types import Block, Method, Parameter

__all__ = ["WUDI", "WUDI_STEPS"]


def _parts(block: Block) -> tuple[list[Any], list[Any]]:
    """Task vectors that are not 0, and the same at length 1."""
    xp = block.xp
    deltas = [delta for delta in block.deltas if bool(xp.any(delta != 0))]
    return deltas, [delta / xp.sqrt(xp.sum(xp.square(delta))) for delta in deltas]


def wudi(block: Block) -> Any:
    """The minimiser of least norm."""
    xp = block.xp
    deltas, units = _parts(block)
    if not deltas:
        return block.base * 0
    u, s, vt = svd(xp, xp.concatenate(units))
    c = xp.concatenate([d @ unit.T for d, unit in zip(deltas, units, strict=True)], axis=1)
    return (c @ u) / xp.where(s > 0, s, 1)[None] @ vt


def wudi_steps(block: Block) -> Any:
    """Adam (0.9, 0.999, 1e-8) from the sum of the task vectors."""
    xp = block.xp
    deltas, units = _parts(block)
    if not deltas:
        return block.base * 0
    x = sum(deltas[1:], deltas[0])
    # Gradient 2 (X S - R): both sums are formed once.
    s = sum(unit.T @ unit for unit in units)
    r = sum(d @ (unit.T @ unit) for d, unit in zip(deltas, units, strict=True))
    first = second = xp.zeros_like(x)
    rate = float(block.params["rate"])
    for step in range(1, int(block.params["steps"]) + 1):
        gradient = 2 * (x @ s - r)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * xp.square(gradient)
        root = xp.sqrt(second / (1 - 0.999**step)) + 1e-8
        x = x - rate / (1 - 0.9**step) * first / root
    return x


WUDI = matrix_method(
    "wudi",
    wudi,
    lambda m, n, k: (6 * k + 12) * m * n + 2 * k * m * m + 11 * min(k * m, n) ** 2,
)
STEPS = (
    LAMBDA,
    Parameter("steps", 300, kind="integer", low=0),
    Parameter("rate", 1e-5, low=0.0),
)
WUDI_STEPS = matrix_method(
    "wudi_steps",
    wudi_steps,
    lambda m, n, k: (k + 10) * m * n + 2 * n * n,
    params=STEPS,
    elsewhere=Method("wudi_steps", average, params=STEPS),
)
