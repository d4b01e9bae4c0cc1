"""DARE (arXiv 2311.03099): drop entries of the task vectors at random and enlarge the rest.

Flavours. mergekit (default): with `rescale`, what is left is scaled to the L1 norm that the task
vector's tensor had, so a tensor's total change keeps its size but single entries are not unbiased.
paper: with `rescale`, what is left is divided by the density, the unbiased estimator.
`dare_linear` sums the results, `dare_ties` elects signs and sums those that agree (no trimming).
"""

from typing import Any

import numpy as np

from lm.merging.methods.arrays import multiply
from lm.merging.methods.elect import WEIGHT, combine
from lm.merging.methods.linear import shared
from lm.merging.methods.ties import DENSITY
from lm.merging.types import Block, Blocks, Method, Parameter

__all__ = ["DARE", "l1_scales", "magnitude_sum"]


def drop(block: Block) -> list[Any]:
    """Task vectors with each entry kept with probability `density`; not rescaled."""
    xp = block.xp
    return [
        multiply(xp, delta, block.random(k) < float(params["density"]))
        if params["density"] < 1
        else delta
        for k, (delta, params) in enumerate(zip(block.deltas, block.per_model, strict=True))
    ]


def magnitude_sum(xp: Any, values: Any) -> float:
    """Sum of |values|: float32 within 1024 elements, float64 over them."""
    values = xp.abs(values).reshape(-1)
    if xp is np:
        return float(
            np.add.reduce(np.add.reduceat(values, np.arange(0, values.size, 1024)), dtype="f8")
        )
    values = xp.pad(values, (0, -values.size % 1024)).reshape(-1, 1024)
    return float(np.asarray(values.sum(1)).sum(dtype=np.float64))


def l1_scales(blocks: Blocks, sparsify: Any) -> list[float]:
    """For each model |tau|_1 / |sparsified tau|_1 over the tensor; 1 where either is below 1e-7."""

    def sums(block: Block) -> np.ndarray:
        if not block.params["rescale"]:
            return np.zeros((2, len(block.models)))
        before = [magnitude_sum(block.xp, delta) for delta in block.deltas]
        after = [magnitude_sum(block.xp, delta) for delta in sparsify(block)]
        return np.array([before, after])

    before, after = sum(blocks.map(sums))
    return [
        float(b / a) if b >= 1e-7 and a >= 1e-7 else 1.0 for b, a in zip(before, after, strict=True)
    ]


def scaled(block: Block, deltas: list[Any], scales: list[float]) -> list[Any]:
    """Each task vector times its scale."""
    pairs = zip(deltas, scales, strict=True)
    return [delta if s == 1 else multiply(block.xp, delta, s) for delta, s in pairs]


def measure(blocks: Blocks) -> list[float]:
    """Scales that restore the L1 norms."""
    return l1_scales(blocks, drop)


def dare(block: Block, elect: bool) -> Any:
    """mergekit's reading."""
    return combine(block, scaled(block, drop(block), block.statistics), elect)


def dare_paper(block: Block, elect: bool) -> Any:
    """The paper's reading; density 0 leaves nothing to enlarge."""
    densities = [float(params["density"]) for params in block.per_model]
    rescale = bool(block.params["rescale"])
    scales = [1 / d if rescale and d > 0 else 1.0 for d in densities]
    return combine(block, scaled(block, drop(block), scales), elect)


def _method(name: str, elect: bool, paper: bool) -> Method:
    return Method(
        name,
        lambda block: (dare_paper if paper else dare)(block, elect),
        measure=None if paper else measure,
        per_model=(WEIGHT, DENSITY),
        params=(*shared(False), Parameter("rescale", True, kind="bool")),
        flavor="paper" if paper else "mergekit",
    )


DARE = tuple(
    _method(name, elect, paper)
    for name, elect in (("dare_linear", False), ("dare_ties", True))
    for paper in (False, True)
)
