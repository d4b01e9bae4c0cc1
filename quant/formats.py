"""Block-scaled number formats: which grid, how many values share a scale, and how it is chosen.

A format says what a tensor becomes; `quant.quantize` does it. A value is stored as an element of a
small grid times the scale of its block, times one scale for the whole tensor where the format has
one. Change a convention with `dataclasses.replace`:

>>> import dataclasses
>>> ocp = dataclasses.replace(MXFP4, name="mxfp4_floor", rule="floor")
>>> one_level = dataclasses.replace(NVFP4, name="nvfp4_one_level", tensor_scale=False)
>>> ocp.sr_headroom, one_level.bits_per_value
(1.3333333333333333, 4.5)
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True)
class Element:
    """A grid of floating-point numbers: sign, exponent from `min_exponent`, `mantissa` bits.

    Below 2**min_exponent the spacing stays 2**(min_exponent - mantissa) down to zero.
    """

    name: str
    bits: int
    mantissa: int
    min_exponent: int
    max: float
    """The largest number; no grid here has infinities in use, values beyond saturate."""
    dtype: np.dtype
    """The JAX dtype with the same codes. E2M1 is stored two codes a byte instead."""

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest number: 2 for E2M1, 8 for E4M3, 15 for E5M2."""
        return math.frexp(self.max)[1] - 1


E2M1 = Element("e2m1", 4, 1, 0, 6.0, np.dtype(ml_dtypes.float4_e2m1fn))
"""0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives, codes 0..7 and 8..15; no infinity, no NaN."""
E4M3 = Element("e4m3", 8, 3, -6, 448.0, np.dtype(ml_dtypes.float8_e4m3fn))
"""Up to 448, smallest 2**-9; no infinity, one NaN per sign."""
E5M2 = Element("e5m2", 8, 2, -14, 57344.0, np.dtype(ml_dtypes.float8_e5m2))
"""Up to 57344, smallest 2**-16."""

ScaleType = Literal["e4m3", "e8m0", "f32"]
Rule = Literal["nearest", "floor", "ceil", "oas"]
Underflow = Literal["zero", "floor", "one"]

_RULES = {"e4m3": ("nearest",), "f32": ("nearest",), "e8m0": ("floor", "ceil", "oas")}


@dataclasses.dataclass(frozen=True)
class Format:
    """A block-scaled format. Equal formats are equal objects and hash alike (static under jit).

    Attributes:
      name: for messages and tables.
      element: grid of the values, `quant.E2M1`, `E4M3` or `E5M2`.
      block: values along the quantized axis that share a scale; None: one scale for the tensor.
      scale: type of the block scales: "e4m3", "e8m0" (powers of two), "f32" (unrounded; what an
        ideal scale would give), or None without blocks.
      rule: how the block scale s follows from a, the largest magnitude in the block, with M the
        largest number of the grid:
        "nearest" s = a / M, rounded to nearest for "e4m3" ("e4m3" and "f32" only);
        "floor"   s = 2**(floor(log2 a) - floor(log2 M)), clips the top (OCP MX 1.0);
        "ceil"    s = 2**ceil(log2(a / M)), the smallest that never clips (Transformer Engine);
        "oas"     s = 2**floor(log2(12/7 a / M)), clips a little (qwix's MXFP4).
      tensor_scale: multiply the tensor by one FP32 number first, so that block scales ("e4m3") or
        values (no blocks) use the whole range of their type.
      underflow: what an E4M3 scale that rounds to zero becomes. "zero": it stays zero, and so does
        the block (Transformer Engine); "floor": all scales are at least 2**-6, the smallest normal
        number (torchao); "one": zero becomes 1 (Quartet II).
      adaptive: "four over six", for nearest rounding: a block's largest magnitude becomes 6 or 4,
        whichever has the smaller squared error, because between 4 and 6 the grid has nothing
        (mit-han-lab/fouroversix; forward pass of Quartet II, arXiv 2601.22813).
    """

    name: str
    element: Element
    block: int | None
    scale: ScaleType | None
    rule: Rule = "nearest"
    tensor_scale: bool = False
    underflow: Underflow = "zero"
    adaptive: bool = False

    def __post_init__(self):
        if (self.block is None) != (self.scale is None):
            raise ValueError(
                f"format '{self.name}': block={self.block} with scale={self.scale!r}; "
                "give both, or neither for one scale per tensor"
            )
        if self.block is None and not self.tensor_scale:
            raise ValueError(f"format '{self.name}' has no scale: set tensor_scale=True")
        if self.block is not None and self.block < 1:
            raise ValueError(f"format '{self.name}': block must be at least 1, not {self.block}")
        if self.scale is not None:
            rules = _RULES.get(self.scale)
            if rules is None:
                raise ValueError(
                    f"format '{self.name}': unknown scale {self.scale!r}; one of {list(_RULES)}"
                )
            if self.rule not in rules:
                raise ValueError(
                    f"format '{self.name}': rule {self.rule!r} is not for {self.scale} scales; "
                    f"use one of {list(rules)}"
                )
            if self.tensor_scale and self.scale != "e4m3":
                raise ValueError(
                    f"format '{self.name}': {self.scale} scales need no tensor scale; "
                    "set tensor_scale=False"
                )
        if self.adaptive and (self.element.name, self.scale) != ("e2m1", "e4m3"):
            raise ValueError(
                f"format '{self.name}': adaptive chooses between 6 and 4 with an E4M3 scale; "
                f"{self.element.name} with {self.scale} scales has no such choice"
            )
        if self.underflow not in ("zero", "floor", "one"):
            raise ValueError(
                f"format '{self.name}': unknown underflow {self.underflow!r}; "
                "use 'zero', 'floor' or 'one'"
            )

    @property
    def scale_dtype(self) -> np.dtype | None:
        """The dtype block scales are stored in."""
        if self.scale is None:
            return None
        types = {"e4m3": ml_dtypes.float8_e4m3fn, "e8m0": ml_dtypes.float8_e8m0fnu}
        return np.dtype(types.get(self.scale, np.float32))

    @property
    def bits_per_value(self) -> float:
        """Storage of one value with its share of the block scale: 4.5 for NVFP4, 4.25 for MXFP4."""
        if self.block is None or self.scale_dtype is None:
            return float(self.element.bits)
        return self.element.bits + 8 * self.scale_dtype.itemsize / self.block

    @property
    def sr_headroom(self) -> float:
        """The factor by which stochastic rounding must widen the scale so that nothing clips.

        A value beyond the largest number of the grid saturates, which no rounding can make right on
        average. E4M3 scales come out at most 1/17 too small: 17/16 (Quartet II, fouroversix).
        "floor" powers of two clip at 2**(max_exponent + 1): 4/3 for E2M1 (amazon-science/mxfp4-llm
        scales the input by 3/4). "oas" clips at 7/6. "ceil", unrounded and tensor scales: 1.
        """
        if self.scale == "e4m3":
            return 17 / 16
        if self.scale == "e8m0" and self.rule == "floor":
            return 2.0 ** (self.element.max_exponent + 1) / self.element.max
        if self.scale == "e8m0" and self.rule == "oas":
            return 7 / 6
        return 1.0


NVFP4 = Format("nvfp4", E2M1, 16, "e4m3", "nearest", tensor_scale=True)
"""NVIDIA's FP4: blocks of 16, E4M3 scales, one FP32 scale for the tensor; arXiv 2509.25149, B."""
NVFP4_ADAPTIVE = Format(
    "nvfp4_adaptive", E2M1, 16, "e4m3", "nearest", tensor_scale=True, adaptive=True
)
"""NVFP4 whose blocks use the grid up to 6 or up to 4; any NVFP4 hardware multiplies it."""
MXFP4 = Format("mxfp4", E2M1, 32, "e8m0", "ceil")
"""OCP microscaling FP4: blocks of 32, power-of-two scales. "ceil" is NVIDIA's choice (2509.25149
B.4); OCP's own rule is "floor"."""
MXFP8 = Format("mxfp8", E4M3, 32, "e8m0", "ceil")
"""OCP microscaling FP8: blocks of 32, power-of-two scales, E4M3 values."""
FP8 = Format("fp8", E4M3, None, None, tensor_scale=True)
"""E4M3 with one FP32 scale for the tensor, from its present maximum ("current scaling")."""


def check_input(x, fmt: Format, name: str) -> None:
    """Refuse what has no meaning as values of `fmt`; `name` is the function called by the user."""
    if not isinstance(fmt, Format):
        raise TypeError(
            f"{name}: fmt must be a quant.Format such as quant.NVFP4, not {type(fmt).__name__}"
        )
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise TypeError(
            f"{name}: x has dtype {x.dtype}; {fmt.name} is made from float32, bfloat16 or "
            "float16: cast it first"
        )
    if x.ndim == 0:
        raise ValueError(f"{name}: x is a scalar; {fmt.name} needs an axis to quantize along")
