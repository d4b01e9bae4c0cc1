"""BitDelta (arXiv 2402.10193): every task vector as one sign per element and one scale per matrix.

theta_k = theta_0 + mean|tau_k| sign(tau_k), 0 counting as +; tensors that are no matrices keep
their task vectors whole. Stored as `lm.merging.methods.compressed` says.
"""

from typing import Any

import numpy as np

from lm.merging.methods.compressed import bits, sign_outputs, whole_outputs
from lm.merging.methods.dare import magnitude_sum
from lm.merging.methods.thresholds import element_count
from lm.merging.types import Block, Blocks, Method

__all__ = ["BITDELTA"]


def measure(blocks: Blocks) -> list[float]:
    """Mean |tau_k| of the tensor."""
    sums = blocks.map(lambda b: np.array([magnitude_sum(b.xp, delta) for delta in b.deltas]))
    return (sum(sums) / max(1, element_count(blocks))).tolist()


def bitdelta(block: Block) -> dict[str, Any]:
    """Packed signs, and with the first block the scales."""
    pieces = {f".sign.{k}": bits(block, ~(d < 0)) for k, d in enumerate(block.deltas)}
    if block.start == 0:
        pieces[".scale"] = np.array(block.statistics, np.float32)
    return pieces


def whole(block: Block) -> dict[str, Any]:
    """The task vectors as they are."""
    return {f".delta.{k}": delta for k, delta in enumerate(block.deltas)}


BITDELTA = Method(
    "bitdelta",
    bitdelta,
    measure=measure,
    many=True,
    outputs=sign_outputs,
    elsewhere=Method("bitdelta", whole, many=True, outputs=whole_outputs),
)
