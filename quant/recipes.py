"""The named recipes. Sources and what was measured: docs/quantization.md."""

import dataclasses
import difflib

from quant.formats import FP8, MXFP4, NVFP4, Format
from quant.recipe import LowRank, Mean, Operand, Recipe


def _plain(name: str, fmt: Format, **fields) -> Recipe:
    """Every operand in one format, nearest in fprop, gradients rounded stochastically."""
    near, random = Operand(fmt), Operand(fmt, "stochastic")
    return Recipe(name, near, near, random, near, near, random, **fields)


BF16 = Recipe("bf16")
"""Nothing is quantized: the control."""

NVFP4_PLAIN = _plain("nvfp4", NVFP4)
"""NVFP4 and no more: blocks of 16 along each contraction, unbiased stochastic gradients."""

_SQUARE = Operand(NVFP4, block_2d=True)
NVIDIA = Recipe(
    "nvidia",
    fprop_x=Operand(NVFP4),
    fprop_w=_SQUARE,
    dgrad_d=Operand(NVFP4, "stochastic", sr_headroom=1.0),
    dgrad_w=_SQUARE,
    wgrad_x=Operand(NVFP4, hadamard=16),
    wgrad_d=Operand(NVFP4, "stochastic", hadamard=16, sr_headroom=1.0),
)
"""The NVFP4 pre-training recipe as in Transformer Engine (arXiv 2509.25149, section 4): 16 x 16
blocks of weights, random Hadamard transform of 16 on both operands of wgrad, stochastic gradients
(without headroom, hence saturating 3.5 % of them). Which layers stay in high precision is
`quant.rules.NVIDIA`."""

MXFP4_PLAIN = _plain("mxfp4", MXFP4)
"""MXFP4: blocks of 32 with power-of-two scales that never clip, unbiased stochastic gradients."""

_E4M3 = Operand(FP8)
FP8_PLAIN = Recipe("fp8", _E4M3, _E4M3, _E4M3, _E4M3, _E4M3, _E4M3)
"""FP8 E4M3 with one scale a tensor, taken from the tensor itself, nearest everywhere."""

METIS = _plain("metis", NVFP4, low_rank=LowRank())
"""Metis (arXiv 2509.00404) with factors in bfloat16 and a compensating residual."""

METIS_PAPER = _plain("metis_paper", NVFP4, low_rank=LowRank(factors="fp4", refresh=8))
"""Metis as published: singular vectors in FP4, the residual does not compensate, bases reused for
8 steps. What the paper leaves open (sampling unit, oversampling, rounding) is chosen as in
`LowRank`."""

MEAN = _plain("mean", NVFP4, mean=Mean())
"""Mean removal with the mean in high precision and multiplied with unquantized weights."""

MEAN_PAPER = _plain(
    "mean_paper", NVFP4, mean=Mean(precision="fp4", weight="quantized", cross_terms=True)
)
"""Averis as published (arXiv 2603.10444, Eqs. 11 and 12): the mean in FP4, all four terms."""


def _hadamard_wgrad(recipe: Recipe, name: str) -> Recipe:
    return dataclasses.replace(
        recipe,
        name=name,
        wgrad_x=Operand(NVFP4, hadamard=16),
        wgrad_d=Operand(NVFP4, "stochastic", hadamard=16),
    )


MEAN_HADAMARD = _hadamard_wgrad(MEAN, "mean_hadamard")
"""Mean removal, then the Hadamard transform of 16 on the residuals in wgrad."""

METIS_MEAN = _plain("metis_mean", NVFP4, mean=Mean(), low_rank=LowRank())
"""Our best combination: the mean in high precision, then the leading directions."""

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        BF16,
        NVFP4_PLAIN,
        NVIDIA,
        MXFP4_PLAIN,
        FP8_PLAIN,
        METIS,
        METIS_PAPER,
        MEAN,
        MEAN_PAPER,
        MEAN_HADAMARD,
        METIS_MEAN,
    )
}


def get_recipe(recipe: str | Recipe) -> Recipe:
    """A recipe by its name.

    >>> get_recipe("nvidia").fprop_w.block_2d
    True
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        near = difflib.get_close_matches(str(recipe), RECIPES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}{hint}")
    return RECIPES[recipe]
