"""Interpolation along a great circle between two models: SLERP and NuSLERP.

    sin((1 - t) w) / sin(w) u + sin(t w) / sin(w) v,   w = angle between u and v

on the vectors as they are: their lengths enter the angle only through its normalisation.
"""

from typing import Any

import numpy as np

from lm.merging.methods.arrays import add
from lm.merging.methods.elect import WEIGHT, weights
from lm.merging.methods.gram import Along, coefficients, gram, mix
from lm.merging.types import Block, Blocks, Method, Parameter, Params

__all__ = ["NUSLERP", "SLERP", "arc"]


def arc(cosine: np.ndarray, t: float, linear: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of the two ends; of the straight line where `linear`."""
    angle = np.arccos(np.where(linear, 0.0, cosine))
    sine = np.sin(angle)
    first = np.where(linear, 1 - t, np.sin((1 - t) * angle) / sine)
    return first, np.where(linear, t, np.sin(t * angle) / sine)


def cosine(products: np.ndarray, tiny: float) -> np.ndarray:
    """Cosine from [2, 2, ...] inner products; 0 where a norm is not above `tiny`."""
    lengths = np.sqrt(products[0, 0]), np.sqrt(products[1, 1])
    zero = (lengths[0] <= tiny) | (lengths[1] <= tiny)
    scale = np.where(zero, 1.0, lengths[0] * lengths[1])
    return np.where(zero, 0.0, np.clip(products[0, 1] / scale, -1, 1))


def ends(block: Block) -> tuple[Any, Any]:
    """The base, where t = 0, and the other model."""
    return block.base, block.models[0]


def measure_slerp(blocks: Blocks) -> np.ndarray:
    """Cosine of the angle; the vectors are the whole tensors."""
    return cosine(gram(blocks, ends), 1e-8)


def slerp(block: Block) -> Any:
    """From the base (t = 0) to the other model (t = 1); a straight line where |cos| > 0.9995.

    A vector of length 0 counts as at right angles to the other, as in mergekit.
    """
    seen = block.statistics
    factors = arc(seen, float(block.params["t"]), np.abs(seen) > 0.9995)
    return mix(block.xp, [float(factor) for factor in factors], ends(block))


def along(params: Params, shape: tuple[int, ...]) -> Along:
    """Which vectors NuSLERP turns."""
    if params["nuslerp_flatten"] or len(shape) < 2:
        return "all"
    return "columns" if params["nuslerp_row_wise"] else "rows"


def pair(block: Block) -> tuple[Any, ...]:
    """The task vectors, or the models where there is no base."""
    return block.models if block.base is None else block.deltas


def measure_nuslerp(blocks: Blocks) -> np.ndarray:
    """Cosines: one, or one for each row or column."""
    return cosine(gram(blocks, pair, along(blocks.job.params, blocks.job.shape)), 1e-7)


def nuslerp(block: Block) -> Any:
    """t = w_2 / (w_1 + w_2), 0.5 where the sum vanishes; of task vectors where there is a base.

    A straight line where sin w < 1e-4: below that, slerp and line agree to 1e-8 for parallel
    vectors and slerp is undefined for opposite ones (mergekit then may return numbers a thousand
    times too large).
    """
    xp, share, seen = block.xp, weights(block), block.statistics
    t = 0.5 if abs(sum(share)) < 1e-6 else share[1] / sum(share)
    factors = arc(seen, t, 1 - seen**2 <= 1e-8)
    where = along(block.params, block.info.shape)
    result = mix(xp, [coefficients(block, factor, where) for factor in factors], pair(block))
    return result if block.base is None else add(xp, result, block.base)


SLERP = Method(
    "slerp",
    slerp,
    measure=measure_slerp,
    params=(Parameter("t", required=True),),
    base="one of the models",
    models=(1, 1),
)
NUSLERP = Method(
    "nuslerp",
    nuslerp,
    scope="row",
    measure=measure_nuslerp,
    per_model=(WEIGHT,),
    params=(
        Parameter("nuslerp_row_wise", False, kind="bool"),
        Parameter("nuslerp_flatten", True, kind="bool"),
    ),
    base="optional",
    models=(2, 2),
)
