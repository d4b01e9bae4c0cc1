"""TIES merging (arXiv 2306.01708): trim small entries, elect signs, average those that agree.

Flavours. mergekit (default): each tensor alone keeps exactly max(1, int(density n)) entries, ties
by position; sums and elections are weighted; a sum of 0 elects +. paper (the authors' code): one
threshold over the whole model, the magnitude of rank int(density d) + 1, compared by >=; a sum of
0 elects the sign that most elected positions have; weights of 1 give the authors' mean, and
`normalize: false` their sum.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lm.merging.methods.arrays import multiply
from lm.merging.methods.elect import WEIGHT, combine, disjoint_mean, onto_base, weights
from lm.merging.methods.linear import shared
from lm.merging.methods.thresholds import (
    EVERYTHING,
    Cut,
    element_count,
    keep_count,
    magnitude_keys,
    select,
    survivors,
)
from lm.merging.types import Block, Blocks, Method, Parameter

__all__ = ["DENSITY", "TIES", "TIES_PAPER", "delta_keys", "trim", "trimmed"]

DENSITY = Parameter("density", 1.0, low=0.0, high=1.0)


def delta_keys(block: Block) -> list[Any]:
    """Magnitude keys of all task vectors."""
    return [magnitude_keys(block.xp, delta) for delta in block.deltas]


def trimmed(block: Block, delta: Any, cut: Cut) -> Any:
    """A task vector without the elements below the cut."""
    if cut == EVERYTHING:
        return delta
    keep = survivors(block.xp, magnitude_keys(block.xp, delta), cut, block.start)
    return multiply(block.xp, delta, keep)


def trim(blocks: Blocks) -> list[Cut]:
    """The cut of each model that keeps `density` of the tensor."""
    size, parameters = element_count(blocks), [source.params for source in blocks.job.sources]
    ranks = [
        [size if params["density"] >= 1 else keep_count(float(params["density"]), size)]
        for params in parameters
    ]
    return [cuts[0] for cuts in select(blocks.map, delta_keys, ranks, size)]


def ties(block: Block) -> Any:
    """Trim by the measured cuts, elect, average."""
    deltas = [
        trimmed(block, delta, cut)
        for delta, cut in zip(block.deltas, block.statistics, strict=True)
    ]
    return combine(block, deltas, elect=True)


class Survey(NamedTuple):
    """What TIES in the paper's reading knows about the whole model."""

    cuts: tuple[Cut, ...]
    positive: bool
    """Whether more positions elect + than -."""


def survey(job_blocks: Callable[[], Any]) -> Survey:
    """Thresholds over all tensors (two passes), then the majority of the elected signs (one)."""
    size, first = 0, None
    for _, blocks in job_blocks():
        size += element_count(blocks)
        first = first or blocks.job.sources

    def run(function: Callable[[Block], Any]) -> Any:
        for _, blocks in job_blocks():
            yield from blocks.map(function)

    densities = [float(model.params["density"]) for model in first]
    ranks = [[int(d * size) + 1 if 0 < d < 1 else int(d) * size] for d in densities]
    cuts = tuple(c[0] for c in select(run, delta_keys, ranks, size, sample=False, ties=True))

    def balance(block: Block) -> int:
        share = weights(block)
        deltas = zip(block.deltas, cuts, share, strict=True)
        total = sum(trimmed(block, delta, cut) * w for delta, cut, w in deltas)
        return int(np.count_nonzero(total > 0)) - int(np.count_nonzero(total < 0))

    return Survey(cuts, sum(run(balance)) > 0)


def ties_paper(block: Block) -> Any:
    """Trim by the whole model's cuts, elect, average."""
    xp, share, seen = block.xp, weights(block), block.whole
    deltas = [
        multiply(xp, trimmed(block, delta, cut), w)
        for delta, cut, w in zip(block.deltas, seen.cuts, share, strict=True)
    ]
    normalize = bool(block.params["normalize"])
    return onto_base(block, disjoint_mean(xp, deltas, share, normalize, seen.positive))


TIES = Method(
    "ties",
    ties,
    measure=trim,
    per_model=(WEIGHT, DENSITY),
    params=shared(True),
    flavor="mergekit",
)
TIES_PAPER = Method(
    "ties",
    ties_paper,
    survey=survey,
    per_model=(WEIGHT, DENSITY),
    params=shared(True),
    flavor="paper",
)
