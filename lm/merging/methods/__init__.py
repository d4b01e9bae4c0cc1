"""Merge methods by name. A new one is a pure function in a file of its own and a line here.

Where the paper and mergekit differ, the default is mergekit's reading, as that is what
configurations were written for:

    ties            mergekit: threshold in each tensor;    paper: one for the whole model
    dare_*          mergekit: keeps the L1 norm;           paper: divides by the density
    della*          mergekit: keeps the L1 norm;           paper: divides by the probability
    sce             mergekit: equal weights below 1e-6;    paper: always by mean squares
    model_stock     mergekit: mean cosine, t unlimited;    paper: mean angle, t in [0, 1]

Each file says the rest. Faults of mergekit releases are not reproduced in either flavour.
"""

import difflib

from lm.merging.methods import (
    arcee_fusion,
    bitdelta,
    breadcrumbs,
    dare,
    della,
    emr,
    linear,
    model_stock,
    pcb,
    ram,
    sce,
    slerp,
    sphere,
    subspace,
    tall,
    ties,
    wudi,
)
from lm.merging.types import MergeError, Method

__all__ = ["METHODS", "get"]

_ALL = (
    linear.LINEAR,
    linear.TASK_ARITHMETIC,
    linear.MAGMAX,
    linear.EXPO,
    linear.NEARSWAP,
    linear.PASSTHROUGH,
    ties.TIES,
    ties.TIES_PAPER,
    *dare.DARE,
    *della.DELLA,
    *breadcrumbs.BREADCRUMBS,
    sce.SCE,
    sce.SCE_PAPER,
    ram.RAM,
    ram.RAMPLUS_TL,
    slerp.SLERP,
    slerp.NUSLERP,
    sphere.MULTISLERP,
    sphere.KARCHER,
    model_stock.MODEL_STOCK,
    model_stock.MODEL_STOCK_PAPER,
    arcee_fusion.ARCEE_FUSION,
    pcb.PCB,
    tall.CONSENSUS,
    tall.TALL,
    emr.EMR,
    bitdelta.BITDELTA,
    subspace.TSV,
    subspace.ISO_C,
    subspace.ISO_CTS,
    subspace.KNOTS,
    wudi.WUDI,
    wudi.WUDI_STEPS,
)

METHODS: dict[str, tuple[Method, ...]] = {}
"""All readings of each method; the first is the default."""
for _method in _ALL:
    METHODS[_method.name] = (*METHODS.get(_method.name, ()), _method)


def get(name: str, flavor: str | None = None, kind: str = "matrix") -> Method:
    """The method of that name.

    Args:
      name: as in mergekit's configurations.
      flavor: "paper" or "mergekit" where a method has both readings; None gives its default.
      kind: `Job.kind` of the tensor: methods for matrices give their companion for the others.

    Raises:
      MergeError: there is no such method or flavour.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(METHODS))}"
        raise MergeError(f"unknown merge_method {name!r}{hint}")
    if flavor not in (None, "paper", "mergekit"):
        raise MergeError(f"flavor must be 'paper' or 'mergekit', got {flavor!r}")
    readings = METHODS[name]
    method = next((item for item in readings if item.flavor == flavor), readings[0])
    return method.elsewhere if method.elsewhere and kind != "matrix" else method
