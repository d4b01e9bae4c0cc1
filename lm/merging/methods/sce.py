"""SCE (arXiv 2408.07990): select elements that vary, calculate weights, erase minority signs.

Elements are selected by the variance over models: the int(select_topk * non-zero variances)
largest, ties by position. Each model's weight is the mean of its squared selected deltas, divided
by the sum over models. Result: base + sum of w_k m_k tau_k / max(sum of w_k m_k, 1e-6), with m_k
the agreement with the sign of the sum. Flavours: mergekit (default) gives equal weights where the
mean squares sum to less than 1e-6, which fine-tuned weights often do; paper only where they are 0.
"""

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from lm.merging.methods.arrays import add, divide, multiply
from lm.merging.methods.gram import inner
from lm.merging.methods.linear import INT8_MASK
from lm.merging.methods.thresholds import (
    EVERYTHING,
    NOTHING,
    Cut,
    element_count,
    magnitude_keys,
    select,
    survivors,
)
from lm.merging.types import Block, Blocks, Method, Parameter

__all__ = ["SCE", "SCE_PAPER"]


class Measured(NamedTuple):
    """Of one tensor."""

    cut: Cut
    """On the variances."""
    shares: list[float]
    """Weights of the models; they sum to 1."""


def variance(block: Block) -> Any:
    """Variance over models of each element, by Welford's updates: exactly 0 of equal values."""
    xp, deltas = block.xp, block.deltas
    mean, total = deltas[0], xp.zeros_like(deltas[0])
    for count, delta in enumerate(deltas[1:], 2):
        step = delta - mean
        mean = add(xp, mean, step / count)
        total = add(xp, total, multiply(xp, step, delta - mean))
    return divide(xp, total, float(len(deltas)))


def selected(block: Block, cut: Cut) -> list[Any]:
    """The task vectors where the variance is large."""
    if cut == EVERYTHING:
        return list(block.deltas)
    xp = block.xp
    keep = survivors(xp, magnitude_keys(xp, variance(block)), cut, block.start)
    return [multiply(xp, delta, keep) for delta in block.deltas]


def measure(blocks: Blocks, floor: float) -> Measured:
    """The cut, then the weights."""
    size, top = element_count(blocks), float(blocks.job.params["select_topk"])
    cut = EVERYTHING if top >= 1 else NOTHING
    if 0 < top < 1:
        count = sum(blocks.map(lambda block: int(block.xp.count_nonzero(variance(block)))))
        streams = lambda block: [magnitude_keys(block.xp, variance(block))]  # noqa: E731
        ((cut,),) = select(blocks.map, streams, [[int(count * top)]], size)

    def squares(block: Block) -> np.ndarray:
        return np.array([inner(block.xp, delta, delta) for delta in selected(block, cut)])

    sums = sum(blocks.map(squares)) / max(1, size)
    total = float(sums.sum())
    count = len(sums)
    shares = [1 / count] * count if total <= 0 or total < floor else (sums / total).tolist()
    return Measured(cut, shares)


def sce(block: Block) -> Any:
    """Erase minority signs and average by the measured weights."""
    xp, seen = block.xp, block.statistics
    deltas = selected(block, seen.cut)
    # The election is by the sum of the deltas themselves, the average by their weights.
    positive = sum(deltas) >= 0
    result = divisor = None
    for delta, share in zip(deltas, seen.shares, strict=True):
        agrees = xp.where(positive, delta > 0, delta < 0).astype(xp.float32)
        weight = multiply(xp, agrees, share)
        part = multiply(xp, delta, weight)
        result = part if result is None else add(xp, result, part)
        divisor = weight if divisor is None else add(xp, divisor, weight)
    return add(xp, divide(xp, result, xp.maximum(divisor, 1e-6)), block.base)


def _method(flavor: Any, floor: float) -> Method:
    return Method(
        "sce",
        sce,
        measure=partial(measure, floor=floor),
        params=(Parameter("select_topk", 1.0, low=0.0, high=1.0), INT8_MASK),
        flavor=flavor,
    )


SCE = _method("mergekit", 1e-6)
SCE_PAPER = _method("paper", 0.0)
