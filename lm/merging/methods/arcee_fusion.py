"""Arcee fusion: take over the changes that stand out.

importance = |tau| KL(softmax(row of theta_1) || softmax(row of theta_0)); changes are taken where
it reaches median + 1.5 (upper - lower quartile). A quantile q is the order statistic int(q (n - 1))
from the smallest. Here it is exact for any size (mergekit samples 1e6 elements beyond that, without
a seed), and under NumPy the divergence is computed in float64: of similar rows it is a small
difference of large sums, of which float32, as in mergekit, leaves three digits.
"""

from typing import Any, NamedTuple

import numpy as np

from lm.merging.methods.arrays import add, flat, multiply
from lm.merging.methods.thresholds import element_count, key_value, magnitude_keys, select
from lm.merging.types import Block, Blocks, Method

__all__ = ["ARCEE_FUSION"]


class Measured(NamedTuple):
    """Of one tensor."""

    divergence: np.ndarray
    """[rows], float32."""
    threshold: float


def divergence(block: Block) -> np.ndarray:
    """KL divergence between the softmaxes of the rows, [rows]."""
    xp = block.xp

    def log_softmax(values: Any) -> Any:
        values = values.astype(np.float64) if xp is np else values
        values = values - values.max(-1, keepdims=True)
        return values - xp.log(xp.exp(values).sum(-1, keepdims=True))

    p, q = log_softmax(block.models[0]), log_softmax(block.base)
    terms = np.asarray(xp.exp(p) * (p - q))
    return np.maximum(terms.sum(-1, dtype=np.float64), 0).astype(np.float32)


def importance(block: Block, rows: np.ndarray) -> Any:
    """|tau| times the divergence of its row, flat."""
    first = block.start // block.models[0].shape[1]
    factors = block.xp.asarray(rows[first : first + block.models[0].shape[0], None])
    return flat(block.xp, block.xp.abs(block.deltas[0]) * factors)


def measure(blocks: Blocks) -> Measured:
    """Divergences in one pass, quartiles in two more."""
    rows = np.concatenate(list(blocks.map(divergence)))
    size = element_count(blocks)
    if not size:
        return Measured(rows, 0.0)
    ranks = [size - int(q * (size - 1)) for q in (0.25, 0.5, 0.75)]
    streams = lambda block: [magnitude_keys(block.xp, importance(block, rows))]  # noqa: E731
    ((low, median, high),) = select(blocks.map, streams, [ranks], size)
    low, median, high = (
        np.float32(key_value(cut.key)) if rank < size else _least(blocks, rows)
        for cut, rank in zip((low, median, high), ranks, strict=True)
    )
    return Measured(rows, float(median + np.float32(1.5) * (high - low)))


def _least(blocks: Blocks, rows: np.ndarray) -> np.float32:
    """The smallest importance: the quantile of a tensor too small to have elements below it."""
    return np.float32(min(blocks.map(lambda block: float(importance(block, rows).min()))))


def arcee_fusion(block: Block) -> Any:
    """theta_0 + tau where important."""
    seen = block.statistics
    (delta,) = block.deltas
    # Compared as "not below", so that NaN stays.
    taken = ~(importance(block, seen.divergence) < np.float32(seen.threshold))
    delta = multiply(block.xp, delta, taken.reshape(delta.shape))
    return add(block.xp, delta, block.base)


ARCEE_FUSION = Method(
    "arcee_fusion",
    arcee_fusion,
    scope="row",
    measure=measure,
    base="one of the models",
    models=(1, 1),
)
