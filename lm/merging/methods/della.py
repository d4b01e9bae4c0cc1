"""DELLA (arXiv 2406.11617): DARE whose probabilities grow with an entry's rank in its row.

In every row (last axis; a vector is one row) |tau| is ranked r = 1..n from the smallest, of equals
the earlier first, and entry r is kept with probability density - eps + 2 eps (r - 1) / (n - 1); a
row of one entry has probability `density`. Flavours: mergekit (default) scales what is kept to the
tensor's L1 norm, paper divides each entry by its probability. `della_linear` sums, `della` elects
signs and averages those that agree.
"""

from functools import partial
from typing import Any

from lm.merging.methods.arrays import divide, multiply
from lm.merging.methods.dare import l1_scales, scaled
from lm.merging.methods.elect import WEIGHT, combine
from lm.merging.methods.linear import shared
from lm.merging.methods.ties import DENSITY
from lm.merging.types import Block, Blocks, Job, MergeError, Method, Parameter

__all__ = ["DELLA", "probabilities"]


def probabilities(xp: Any, magnitudes: Any, density: float, epsilon: float) -> Any:
    """Probability with which each entry of [rows, columns] is kept."""
    columns = magnitudes.shape[1]
    order = xp.argsort(magnitudes, axis=1, stable=True)
    ranks = xp.argsort(order, axis=1).astype(xp.float32)
    slope = 2 * epsilon / (columns - 1) if columns > 1 else 0.0
    return (density - epsilon if columns > 1 else density) + slope * ranks


def drop(block: Block, divided: bool = False) -> list[Any]:
    """Sparsified task vectors; `divided` by their probabilities."""
    xp, result = block.xp, []
    for k, (delta, params) in enumerate(zip(block.deltas, block.per_model, strict=True)):
        density, epsilon = float(params["density"]), float(params["epsilon"])
        if density <= 0:
            delta = multiply(xp, delta, 0.0)
        elif density < 1:
            chance = probabilities(xp, xp.abs(delta), density, epsilon)
            delta = multiply(xp, delta, block.random(k) < chance)
            if divided:
                delta = divide(xp, delta, chance)
        result.append(delta)
    return result


def check(job: Job) -> None:
    """Densities and epsilons must give probabilities."""
    for source in job.sources:
        density, epsilon = float(source.params["density"]), float(source.params["epsilon"])
        if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            raise MergeError(
                f"{job.output}: della needs density - epsilon and density + epsilon within (0, 1), "
                f"got density {density:g} and epsilon {epsilon:g}: lower epsilon"
            )


def measure(blocks: Blocks) -> list[float]:
    """Scales that restore the L1 norms."""
    return l1_scales(blocks, drop)


def della(block: Block, elect: bool) -> Any:
    """mergekit's reading."""
    return combine(block, scaled(block, drop(block), block.statistics), elect)


def della_paper(block: Block, elect: bool) -> Any:
    """The paper's reading."""
    return combine(block, drop(block, divided=bool(block.params["rescale"])), elect)


def _method(name: str, elect: bool, paper: bool) -> Method:
    return Method(
        name,
        partial(della_paper if paper else della, elect=elect),
        scope="row",
        check=check,
        measure=None if paper else measure,
        per_model=(WEIGHT, DENSITY, Parameter("epsilon", 0.15, low=0.0, high=1.0)),
        params=(*shared(elect), Parameter("rescale", True, kind="bool")),
        flavor="paper" if paper else "mergekit",
    )


DELLA = tuple(
    _method(name, elect, paper)
    for name, elect in (("della", True), ("della_linear", False))
    for paper in (False, True)
)
