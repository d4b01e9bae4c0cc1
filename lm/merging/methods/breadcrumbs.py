"""Model Breadcrumbs (arXiv 2312.06795): drop the largest and the smallest entries of task vectors.

Of a tensor's n entries the int(gamma n) largest are dropped, then the next int(density n) are kept;
where fewer than these are left, fewer of the largest are dropped. Both flavours agree.
mergekit before 0.1.5 returned zeros where int(gamma n) = 0 (a slice that ends at -0); here, as in
mergekit since, nothing counts as an outlier then.
"""

from typing import Any, NamedTuple

from lm.merging.methods.arrays import multiply
from lm.merging.methods.dare import magnitude_sum, scaled
from lm.merging.methods.elect import WEIGHT, combine
from lm.merging.methods.linear import shared
from lm.merging.methods.thresholds import (
    NOTHING,
    Cut,
    element_count,
    magnitude_keys,
    select,
    survivors,
)
from lm.merging.methods.ties import DENSITY, delta_keys, trimmed
from lm.merging.types import Block, Blocks, Method, Parameter

__all__ = ["BREADCRUMBS"]


class Band(NamedTuple):
    """What is kept of one task vector."""

    outer: Cut
    """The elements above are kept, ..."""
    inner: Cut
    """... without those above this one."""


class Measured(NamedTuple):
    """Of one tensor."""

    bands: list[Band]
    scales: list[float]


def ranks(density: float, gamma: float, size: int) -> list[int]:
    """Ranks of the outer and the inner cut."""
    if density >= 1:
        return [size, 0]
    keep = int(density * size)
    top = min(int(gamma * size), size - keep)
    return [top + keep, top] if keep else [0, 0]


def measure(blocks: Blocks) -> Measured:
    """Cuts and, where `rescale`, the factors that restore the L1 norms."""
    size, parameters = element_count(blocks), [source.params for source in blocks.job.sources]
    wanted = [
        ranks(float(params["density"]), float(params["gamma"]), size) for params in parameters
    ]
    bands = [Band(*cuts) for cuts in select(blocks.map, delta_keys, wanted, size)]
    scales = [1.0] * len(bands)
    if blocks.job.params["rescale"]:

        def sums(block: Block) -> list[tuple[float, float]]:
            xp, pairs = block.xp, zip(block.deltas, kept(block, bands), strict=True)
            return [(magnitude_sum(xp, whole), magnitude_sum(xp, part)) for whole, part in pairs]

        parts = list(blocks.map(sums))
        for k in range(len(bands)):
            before, after = (sum(part[k][side] for part in parts) for side in (0, 1))
            scales[k] = before / after if before >= 1e-7 and after >= 1e-7 else 1.0
    return Measured(bands, scales)


def kept(block: Block, bands: list[Band]) -> list[Any]:
    """The task vectors within their bands."""
    xp, deltas = block.xp, []
    for delta, band in zip(block.deltas, bands, strict=True):
        if band.inner != NOTHING:
            keys = magnitude_keys(xp, delta)
            delta = multiply(xp, delta, ~survivors(xp, keys, band.inner, block.start))
            # Dropped elements are 0 now; only they could pass the outer cut wrongly, as zeros.
        deltas.append(trimmed(block, delta, band.outer))
    return deltas


def breadcrumbs(block: Block, elect: bool) -> Any:
    """Drop, rescale where asked, then sum, or elect signs and sum those that agree."""
    seen = block.statistics
    return combine(block, scaled(block, kept(block, seen.bands), seen.scales), elect)


def _method(name: str, elect: bool) -> Method:
    return Method(
        name,
        lambda block: breadcrumbs(block, elect),
        measure=measure,
        per_model=(WEIGHT, DENSITY, Parameter("gamma", 0.01, low=0.0, high=1.0)),
        params=(*shared(False), Parameter("rescale", False, kind="bool")),
    )


BREADCRUMBS = (_method("breadcrumbs", False), _method("breadcrumbs_ties", True))
