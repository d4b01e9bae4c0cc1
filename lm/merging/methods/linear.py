"""Methods that look at each element alone: averages, task arithmetic, MagMax, ExPO, nearswap."""

from typing import Any

from lm.merging.methods.arrays import add, multiply
from lm.merging.methods.elect import LAMBDA, WEIGHT, combine, normalized, weights
from lm.merging.types import Block, Method, Parameter

__all__ = [
    "EXPO",
    "LINEAR",
    "MAGMAX",
    "NEARSWAP",
    "PASSTHROUGH",
    "TASK_ARITHMETIC",
    "average",
    "shared",
]

INT8_MASK = Parameter("int8_mask", False, kind="bool")  # accepted: our masks are bits anyway


def shared(normalize: bool) -> tuple[Parameter, ...]:
    """Parameters of the family of mergekit's task arithmetic."""
    return (LAMBDA, Parameter("normalize", normalize, kind="bool"), INT8_MASK)


def linear(block: Block) -> Any:
    """Sum of w_k theta_k, divided by the sum of w_k where `normalize` (arXiv 2203.05482)."""
    xp, share = block.xp, weights(block)
    total = xp.multiply(block.models[0], share[0])
    for model, w in zip(block.models[1:], share[1:], strict=True):
        total = add(xp, total, xp.multiply(model, w))
    return normalized(xp, total, share) if block.params["normalize"] else total


def task_arithmetic(block: Block) -> Any:
    """theta_0 + lambda * sum of w_k tau_k (arXiv 2212.04089)."""
    return combine(block, block.deltas, elect=False)


def average(block: Block) -> Any:
    """theta_0 + lambda * mean of tau_k: what methods of singular vectors do with other tensors."""
    deltas = block.deltas
    total = deltas[0]
    for delta in deltas[1:]:
        total = add(block.xp, total, delta)
    scale = float(block.params["lambda"]) / len(deltas)
    return add(block.xp, multiply(block.xp, total, scale), block.base)


def magmax(block: Block) -> Any:
    """theta_0 + lambda * the tau_k of largest magnitude, of equals the first (arXiv 2407.06322)."""
    xp, deltas = block.xp, block.deltas
    best = deltas[0]
    for delta in deltas[1:]:
        # NaN in either stays: no comparison with it is true, and NaN - NaN below is NaN.
        larger = xp.abs(delta) > xp.abs(best)
        best = xp.where(larger | xp.isnan(delta), delta, best)
    return add(xp, multiply(xp, best, float(block.params["lambda"])), block.base)


def expo(block: Block) -> Any:
    """theta + alpha (theta - theta_0): beyond an aligned model, away from the one it came from.

    The base is the model before alignment (arXiv 2404.16792). alpha = 0 gives the model itself.
    """
    (delta,) = block.deltas
    delta = multiply(block.xp, delta, float(block.params["alpha"]))
    return add(block.xp, delta, block.models[0])


def nearswap(block: Block) -> Any:
    """w theta_1 + (1 - w) theta_0 with w = min(1, t / |theta_1 - theta_0|): near values swap."""
    xp, t = block.xp, float(block.params["t"])
    (delta,) = block.deltas
    w = xp.clip(t / xp.maximum(xp.abs(delta), 1e-6), 0, 1).astype(xp.float32)
    return add(xp, w * block.models[0], (1 - w) * block.base)


def passthrough(block: Block) -> Any:
    """scale * theta; a copy without `scale`."""
    scale = block.per_model[0]["scale"]
    (model,) = block.models
    return model if scale is None else block.xp.multiply(model, float(scale))


LINEAR = Method(
    "linear",
    linear,
    per_model=(WEIGHT,),
    params=(Parameter("normalize", True, kind="bool"),),
    base="none",
)
TASK_ARITHMETIC = Method(
    "task_arithmetic",
    task_arithmetic,
    per_model=(WEIGHT, Parameter("density")),  # density: read by mergekit, used by neither
    params=(*shared(False), Parameter("rescale", False, kind="bool")),
)
MAGMAX = Method("magmax", magmax, params=(LAMBDA,))
EXPO = Method("expo", expo, params=(Parameter("alpha", 0.3),), models=(1, 1))
NEARSWAP = Method(
    "nearswap",
    nearswap,
    params=(Parameter("t", required=True),),
    base="one of the models",
    models=(1, 1),
)
PASSTHROUGH = Method(
    "passthrough",
    passthrough,
    per_model=(Parameter("scale"),),
    base="none",
    models=(1, 1),
)
