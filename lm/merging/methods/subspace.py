"""Methods of singular vectors: TSV-Merge, Iso-C, Iso-CTS, KnOTS. Other tensors are averaged.

All give theta_0 + lambda Delta for matrices [out, in]; singular directions below 1e-6 of the
largest are taken as absent (`linear_algebra`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from lm.merging.methods.arrays import add, multiply
from lm.merging.methods.elect import LAMBDA, WEIGHT, disjoint_mean, weights
from lm.merging.methods.linear import average, shared
from lm.merging.methods.linear_algebra import mean_isotropic, polar, svd
from lm.merging.methods.thresholds import (
    EVERYTHING,
    keep_count,
    magnitude_keys,
    select,
    survivors,
)
from lm.merging.methods.ties import DENSITY, TIES
from lm.merging.types import Block, Method, Parameter

__all__ = ["ISO_C", "ISO_CTS", "KNOTS", "TSV", "matrix_method"]


def matrix_method(
    name: str,
    delta: Callable[[Block], Any],
    extra: Callable[[int, int, int], int],
    **more: Any,
) -> Method:
    """A method of matrices.

    Args:
      name: of the method.
      delta: merges one matrix's task vectors to a change of the base.
      extra: float32 numbers that `delta` takes besides the models and the task vectors (a float64
        number counts as two), for (rows, columns, number of task vectors). Of the p x p matrix of
        an eigendecomposition LAPACK has six times p^2 for itself.
      more: fields of the `Method`.
    """

    def apply(block: Block) -> Any:
        if len(block.info.shape) != 2:
            return average(block)
        xp = block.xp
        change = multiply(xp, delta(block), float(block.params["lambda"]))
        return xp.asarray(add(xp, change, block.base), xp.float32)

    more = {"params": (LAMBDA,), "elsewhere": Method(name, average, params=(LAMBDA,))} | more

    def memory(shape: tuple[int, ...], count: int) -> int:
        rows, columns = (*shape, 1, 1)[:2]
        return 4 * ((2 * count + 1) * math.prod(shape) + extra(rows, columns, count))

    return Method(name, apply, scope="tensor", memory=memory, **more)


def tsv(block: Block) -> Any:
    """TSV-Merge (arXiv 2412.00081): the tasks' leading singular vectors, made orthogonal.

    Each of the K task vectors keeps its r = floor(min(m, n) / K) leading directions; the joined
    left and right vectors are replaced by their polar factors.
    """
    xp, deltas = block.xp, block.deltas
    rank = max(1, min(deltas[0].shape) // len(deltas))
    u, s, vt = _joined(xp, [_leading(xp, delta, rank) for delta in deltas])
    return polar(xp, u) * s[None] @ polar(xp, vt)


def _leading(xp: Any, a: Any, rank: int) -> tuple[Any, Any, Any]:
    """The first singular vectors and values, copied: the others' memory is free again."""
    u, s, vt = svd(xp, a)
    return xp.array(u[:, :rank]), s[:rank], xp.array(vt[:rank])


def _joined(xp: Any, parts: Sequence[tuple[Any, Any, Any]]) -> tuple[Any, Any, Any]:
    u, s, vt = zip(*parts, strict=True)
    return xp.concatenate(u, axis=1), xp.concatenate(s), xp.concatenate(vt)


def iso_c(block: Block) -> Any:
    """Iso-C (arXiv 2502.04959): the summed task vector with all singular values at their mean."""
    return mean_isotropic(block.xp, sum(block.deltas))


def iso_cts(block: Block) -> Any:
    """Iso-CTS (arXiv 2502.04959): common directions of the sum, completed by each task's own.

    Of the r = min(m, n) directions about (1 - common_fraction) r, the same number for each task,
    come from the task vectors without their part in the common left space.
    """
    xp, deltas = block.xp, block.deltas
    total, count = min(deltas[0].shape), len(deltas)
    common = int(total * float(block.params["common_fraction"]))
    each = min(round((total - common) / count), total // count)
    common = total - each * count
    shared_part = u, _, _ = _leading(xp, sum(deltas), common)
    parts = [_leading(xp, delta - u @ (u.T @ delta), each) for delta in deltas]
    u, s, vt = _joined(xp, [*parts, shared_part])
    return multiply(xp, polar(xp, u) @ polar(xp, vt), s.mean())


def knots(block: Block) -> Any:
    """KnOTS (arXiv 2410.19735) with TIES: task vectors are merged in a common left basis.

    [tau_1 .. tau_K] = U S [V_1^T .. V_K^T]; the aligned blocks S V_k^T = U^T tau_k are trimmed to
    their `density` largest entries, elected, averaged, and multiplied by U. Directions with
    s <= 1e-5 are dropped. Meant for task vectors of LoRA.
    """
    xp, share = block.xp, weights(block)
    u, s, _ = svd(xp, xp.concatenate(block.deltas, axis=1))
    u = u * (s > 1e-5)[None].astype(u.dtype)
    aligned = []
    for delta, params, weight in zip(block.deltas, block.per_model, share, strict=True):
        part = (u.T @ delta).astype(xp.float32)
        part = _densest(block, part, float(params["density"]))
        aligned.append(multiply(xp, part, weight))
    return u @ disjoint_mean(xp, aligned, share, bool(block.params["normalize"]))


def _densest(block: Block, part: Any, density: float) -> Any:
    """The largest entries of an aligned block."""
    xp = block.xp
    keys = magnitude_keys(xp, part)
    size = keys.shape[0]
    rank = size if density >= 1 else keep_count(density, size)
    ((cut,),) = select(lambda look: iter([look(block)]), lambda _: [keys], [[rank]], size)
    if cut == EVERYTHING:
        return part
    return multiply(xp, part, survivors(xp, keys, cut, 0).reshape(part.shape))


TSV = matrix_method("tsv", tsv, lambda m, n, k: 8 * m * n + 14 * min(m, n) ** 2)
ISO_C = matrix_method("iso_c", iso_c, lambda m, n, k: 7 * m * n + 10 * min(m, n) ** 2)
FRACTION = Parameter("common_fraction", 0.8, low=0.0, high=1.0)
ISO_CTS = matrix_method(
    "iso_cts",
    iso_cts,
    lambda m, n, k: 10 * m * n + 16 * min(m, n) ** 2,
    params=(LAMBDA, FRACTION),
    elsewhere=Method("iso_cts", average, params=(LAMBDA, FRACTION)),
)
KNOTS = matrix_method(
    "knots",
    knots,
    lambda m, n, k: (3 * k + 5) * m * n + 12 * min(m, k * n) ** 2,
    per_model=(WEIGHT, DENSITY),
    params=shared(True),
    elsewhere=TIES,
)
