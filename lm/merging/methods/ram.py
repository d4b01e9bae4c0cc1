"""RAM and RAM+ (arXiv 2601.13572): changes of one model in full, shared changes averaged.

Model k touches an element if |tau_k| > epsilon. Elements that one model touches get its change,
elements that several touch the mean of theirs. RAM+ (tensor-local) multiplies the changes of a
single model by 1 + r clip(shared_k / unique_k, 0, alpha), with the counts of elements that model k
touches together with others and alone.
"""

from typing import Any

import numpy as np

from lm.merging.methods.arrays import add, multiply
from lm.merging.types import Block, Blocks, Method, Parameter

__all__ = ["RAM", "RAMPLUS_TL"]

EPSILON = Parameter("epsilon", 1e-5, low=0.0)


def touches(block: Block) -> tuple[list[Any], Any]:
    """Which elements each model touches, and how many models touch each element (int32)."""
    xp, epsilon = block.xp, float(block.params["epsilon"])
    masks = [xp.abs(delta) > epsilon for delta in block.deltas]
    counts = masks[0].astype(xp.int32)
    for mask in masks[1:]:
        counts = add(xp, counts, mask)
    return masks, counts


def measure(blocks: Blocks) -> list[float]:
    """Each model's factor for the elements it touches alone."""

    def count(block: Block) -> np.ndarray:
        masks, counts = touches(block)
        number = block.xp.count_nonzero
        return np.array(
            [[int(number(m & (counts > 1))), int(number(m & (counts == 1)))] for m in masks]
        )

    params = blocks.job.params
    r, alpha, floor = (float(params[name]) for name in ("r", "alpha", "epsilon"))
    return [
        1 + r * min(shared / max(unique, floor, 1e-30), alpha)
        for shared, unique in sum(blocks.map(count)).tolist()
    ]


def ram(block: Block) -> Any:
    """base + sum over touching models of tau_k / their number, enlarged where one touches."""
    xp = block.xp
    masks, counts = touches(block)
    factors = block.statistics or [1.0] * len(masks)
    divisor = xp.maximum(counts, 1).astype(xp.float32)
    total = None
    for delta, mask, factor in zip(block.deltas, masks, factors, strict=True):
        part = xp.where(mask | xp.isnan(delta), delta / divisor, xp.float32(0))
        if factor != 1:
            part = multiply(xp, part, xp.where(counts == 1, xp.float32(factor), xp.float32(1)))
        total = part if total is None else add(xp, total, part)
    return add(xp, total, block.base)


RAM = Method("ram", ram, params=(EPSILON,))
RAMPLUS_TL = Method(
    "ramplus_tl",
    ram,
    measure=measure,
    params=(EPSILON, Parameter("r", 0.1), Parameter("alpha", 0.2, low=0.0)),
)
