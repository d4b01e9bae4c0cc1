"""How sparsified task vectors become one: a weighted sum, or the mean of those that agree in sign.

TIES (arXiv 2306.01708, section 3): elect the sign of the sum at every position, then average the
entries that have it. `deltas` are consumed: their memory is reused under NumPy.
"""

from collections.abc import Sequence
from typing import Any

from lm.merging.methods.arrays import add, divide, multiply
from lm.merging.types import Block, Parameter

__all__ = ["LAMBDA", "WEIGHT", "combine", "disjoint_mean", "normalized", "onto_base", "weights"]

WEIGHT = Parameter("weight", required=True)
LAMBDA = Parameter("lambda", 1.0)


def weights(block: Block) -> list[float]:
    """Each model's weight."""
    return [float(params["weight"]) for params in block.per_model]


def combine(block: Block, deltas: Sequence[Any], elect: bool) -> Any:
    """base + lambda * merged deltas, as mergekit's parameters `weight` and `normalize` say."""
    xp, share = block.xp, weights(block)
    deltas = [
        delta if w == 1 else multiply(xp, delta, w) for delta, w in zip(deltas, share, strict=True)
    ]
    normalize = bool(block.params["normalize"])
    if elect:
        return onto_base(block, disjoint_mean(xp, deltas, share, normalize))
    total = deltas[0]
    for delta in deltas[1:]:
        total = add(xp, total, delta)
    return onto_base(block, normalized(xp, total, share) if normalize else total)


def onto_base(block: Block, delta: Any) -> Any:
    """base + lambda * delta."""
    scale = float(block.params["lambda"])
    if scale != 1:
        delta = multiply(block.xp, delta, scale)
    return add(block.xp, delta, block.base)


def normalized(xp: Any, total: Any, share: Sequence[float]) -> Any:
    """A weighted sum divided by the sum of the weights, unless that is 0 within 1e-8."""
    divisor = sum(share)
    return total if divisor == 1 or abs(divisor) < 1e-8 else divide(xp, total, divisor)


def disjoint_mean(
    xp: Any,
    deltas: Sequence[Any],
    share: Sequence[float],
    normalize: bool,
    zero_is_positive: bool = True,
) -> Any:
    """Sum over the agreeing of weighted deltas / sum over the agreeing of their weights.

    Args:
      deltas: already multiplied by their weights; overwritten.
      share: the weights.
      normalize: divide; where nothing agrees the divisor is 1.
      zero_is_positive: the sign elected where the sum is exactly 0.
    """
    total = deltas[0] + deltas[1] if len(deltas) > 1 else deltas[0]
    for delta in deltas[2:]:
        total = add(xp, total, delta)
    positive = total >= 0 if zero_is_positive else total > 0
    result = divisor = None
    even = len(share) < 256 and all(w == 1 for w in share)
    for delta, w in zip(deltas, share, strict=True):
        agrees = ((delta > 0) == positive) & (delta != 0)
        if not even:
            agrees = agrees.astype(xp.float32)
        delta = multiply(xp, delta, agrees)
        result = delta if result is None else add(xp, result, delta)
        if normalize:
            part = agrees.astype(xp.uint8) if even else multiply(xp, agrees, w)
            divisor = part if divisor is None else add(xp, divisor, part)
    if not normalize:
        return result
    divisor = add(xp, divisor, (divisor == 0).astype(divisor.dtype))
    return divide(xp, result, divisor.astype(xp.float32) if even else divisor)
