"""EMR merging (NeurIPS 2024, arXiv 2405.17461): elect a unified task vector, mask, rescale.

sigma = sign of the sum of tau_k (0 counts as -); u = sigma max |tau_k| over the tasks that agree;
M_k = (tau_k sigma > 0); rho_k = (sum over tensors of mean |tau_k|) / (sum over tensors of mean
|M_k u|). Task k's model is theta_0 + rho_k M_k u: not one model but a unified vector, K masks and K
scales, stored as `lm.merging.methods.compressed` says. With one task it is exact.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from lm.merging.methods.arrays import multiply
from lm.merging.methods.compressed import pack, unified_outputs
from lm.merging.methods.dare import magnitude_sum
from lm.merging.methods.thresholds import element_count
from lm.merging.types import Block, Method

__all__ = ["EMR"]


def unify(block: Block) -> tuple[Any, list[Any]]:
    """u and the masks M_k."""
    xp, deltas = block.xp, block.deltas
    total = sum(deltas[1:], deltas[0])
    sign = xp.where(total > 0, xp.float32(1), xp.float32(-1))
    largest, masks = xp.zeros_like(total), []
    for delta in deltas:
        aligned = delta * sign
        largest = xp.maximum(largest, aligned)  # NaN stays; entries that disagree are negative
        masks.append(aligned > 0)
    return multiply(xp, largest, sign), masks


def survey(job_blocks: Callable[[], Any]) -> list[float]:
    """rho_k of every task: one pass."""

    def sums(block: Block) -> np.ndarray:
        xp = block.xp
        unified, masks = unify(block)
        before = [magnitude_sum(xp, delta) for delta in block.deltas]
        after = [magnitude_sum(xp, unified * mask) for mask in masks]
        return np.array([before, after])

    before, after = sum(
        sum(blocks.map(sums)) / max(1, element_count(blocks)) for _, blocks in job_blocks()
    )
    return [float(b / a) if a > 0 else 1.0 for b, a in zip(before, after, strict=True)]


def emr(block: Block) -> dict[str, Any]:
    """The unified vector, packed masks, and the scales."""
    return pack(block, *unify(block), block.whole)


EMR = Method("emr", emr, survey=survey, many=True, outputs=unified_outputs)
