"""TALL masks and consensus merging (ICML 2024, arXiv 2405.07813).

Task k's mask says where its own change dominates that of the others:
m_k = |tau_k| > threshold_k |tau - tau_k| with tau = sum of tau_k. `consensus` keeps the elements
of tau that at least `k_min` tasks use: one model. `tall` stores tau once and one bit per task and
element (see `lm.merging.methods.compressed`): theta_k = theta_0 + m_k tau.
"""

from typing import Any

from lm.merging.methods.arrays import add, multiply
from lm.merging.methods.compressed import pack, unified_outputs
from lm.merging.methods.elect import onto_base
from lm.merging.types import Block, Method, Parameter

__all__ = ["CONSENSUS", "TALL"]

# "tall_threshold" of the paper's .2 to .6, chosen per task on validation data.
THRESHOLD = Parameter("tall_threshold", 0.4, low=0.0)


def masks(block: Block) -> tuple[Any, list[Any]]:
    """The summed task vector and each task's mask."""
    xp, deltas = block.xp, block.deltas
    total = sum(deltas[1:], deltas[0])
    found = []
    for delta, params in zip(deltas, block.per_model, strict=True):
        rest = multiply(xp, xp.abs(total - delta), float(params["tall_threshold"]))
        found.append(xp.abs(delta) > rest)
    return total, found


def consensus(block: Block) -> Any:
    """theta_0 + lambda tau where at least `k_min` masks are set."""
    xp = block.xp
    total, found = masks(block)
    counts = found[0].astype(xp.int32)
    for mask in found[1:]:
        counts = add(xp, counts, mask)
    keep = counts >= int(block.params["k_min"])
    return onto_base(block, multiply(xp, total, keep))


def tall(block: Block) -> dict[str, Any]:
    """The summed task vector, packed masks, and scales of 1."""
    total, found = masks(block)
    return pack(block, total, found, [1.0] * len(found))


CONSENSUS = Method(
    "consensus",
    consensus,
    per_model=(THRESHOLD,),
    params=(Parameter("lambda", 0.3), Parameter("k_min", 2, kind="integer", low=0)),
)
TALL = Method("tall", tall, per_model=(THRESHOLD,), many=True, outputs=unified_outputs)
