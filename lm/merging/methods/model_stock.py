"""Model Stock (arXiv 2403.19522): how far to go from the base to the mean of the fine-tuned models.

    theta = t mean(theta_k) + (1 - t) theta_0,   t = K c / (1 + (K - 1) c)

with c the cosine between task vectors. Flavours, which differ for K > 2 and for vectors at obtuse
angles. mergekit (default): c is the mean of the pairs' cosines (norm products below 1e-6 count as
1e-6), t is not limited, and 0 where its denominator vanishes. paper: c is the cosine of the mean of
the pairs' angles, and t is limited to [0, 1].
"""

from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from lm.merging.methods.gram import Along, coefficients, gram, mix
from lm.merging.types import Block, Blocks, Method, Parameter, Params

__all__ = ["MODEL_STOCK", "MODEL_STOCK_PAPER", "interpolation"]


def interpolation(products: np.ndarray, paper: bool) -> np.ndarray:
    """t from the [K, K, ...] inner products of the task vectors."""
    count = len(products)
    lengths = np.sqrt(np.array([products[i, i] for i in range(count)]))
    cosines = []
    for i, j in combinations(range(count), 2):
        scale = np.maximum(lengths[i] * lengths[j], 1e-30 if paper else 1e-6)
        cosines.append(np.clip(products[i, j] / scale, -1, 1))
    if paper:
        c = np.cos(np.mean([np.arccos(cosine) for cosine in cosines], axis=0))
    else:
        c = np.mean(cosines, axis=0)
    divisor = 1 + (count - 1) * c
    singular = np.abs(divisor) < 1e-6
    t = np.where(singular, 0.0, count * c / np.where(singular, 1.0, divisor))
    return np.clip(t, 0, 1) if paper else t


def along(params: Params) -> Along:
    """Which vectors are compared: whole tensors, or rows where `filter_wise`."""
    return "rows" if params["filter_wise"] else "all"


def measure(blocks: Blocks, paper: bool) -> np.ndarray:
    """t of the tensor or of its rows."""
    products = gram(blocks, lambda block: block.deltas, along(blocks.job.params))
    return interpolation(products, paper)


def model_stock(block: Block) -> Any:
    """t mean(theta_k) + (1 - t) theta_0."""
    seen, where, count = block.statistics, along(block.params), len(block.models)
    share = coefficients(block, seen / count, where)
    rest = coefficients(block, 1 - seen, where)
    return mix(block.xp, [rest, *[share] * count], [block.base, *block.models])


def _method(paper: bool) -> Method:
    return Method(
        "model_stock",
        model_stock,
        scope="row",
        measure=partial(measure, paper=paper),
        params=(Parameter("filter_wise", False, kind="bool"),),
        models=(2, None),
        flavor="paper" if paper else "mergekit",
    )


MODEL_STOCK = _method(False)
MODEL_STOCK_PAPER = _method(True)
