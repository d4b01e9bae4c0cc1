"""What a recipe is: how each operand of the three products of a linear layer is quantized.

With x [l, m] (l tokens), w [m, n], y = x w, and d = dLoss/dy:

    fprop   y  = x w         contracts features   operands "fprop.x", "fprop.w"
    dgrad   dx = d w^T       contracts outputs    operands "dgrad.d", "dgrad.w"
    wgrad   dw = x^T d       contracts tokens     operands "wgrad.x", "wgrad.d"

Blocks lie along the contracted axis, so x, w and d are each quantized twice, both times from high
precision. A recipe can first take out what makes the blocks wide, and carry it in high precision
beside them: the mean over tokens (`Mean`) and the leading singular directions (`LowRank`).

Named recipes are in `quant.recipes`; change one with `dataclasses.replace`.
"""

import dataclasses
import math
from typing import Literal

from quant.formats import NVFP4, Format
from quant.hadamard import SIZES
from quant.quantize import Rounding

Signs = Literal["te", "random", "none"]
ROLES = ("fprop_x", "fprop_w", "dgrad_d", "dgrad_w", "wgrad_x", "wgrad_d")


@dataclasses.dataclass(frozen=True)
class Operand:
    """How one operand of one product is quantized.

    Attributes:
      fmt: the format.
      rounding: "nearest" or "stochastic".
      block_2d: square blocks (weights): both products see the same numbers.
      hadamard: size of the Hadamard transform along the contracted axis before quantization, or
        None. The two operands of a product have the same.
      sr_headroom: see `quant.quantize`.
    """

    fmt: Format = NVFP4
    rounding: Rounding = "nearest"
    block_2d: bool = False
    hadamard: int | None = None
    sr_headroom: float | None = None

    def __post_init__(self):
        if not isinstance(self.fmt, Format):
            raise TypeError(f"Operand: fmt must be a quant.Format, not {self.fmt!r}")
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"Operand: rounding 'nearest' or 'stochastic', not {self.rounding!r}")
        if self.hadamard is not None and self.hadamard not in SIZES:
            raise ValueError(f"Operand: hadamard must be one of {SIZES}, not {self.hadamard}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean:
    """Take the mean over tokens out of x and d (Averis, arXiv 2603.10444, section 2).

        x = 1 mu^T + x_R,   mu = x^T 1 / l        y = 1 (mu^T w) + Q(x_R) Q(w)

    and likewise for d; weights are not centred. The mean is that of the tokens given: over a mesh
    with tokens sharded it is the global one, which costs one small all-reduce.

    Attributes:
      x, d: which tensors are centred.
      precision: of mu. "high" keeps it in float32; "fp4" quantizes it like its tensor (published).
      weight: what mu is multiplied with in fprop and dgrad. "high": the weights before
        quantization, one matrix-vector product; "quantized" (published).
      cross_terms: keep Q(x_R)^T 1 mu_d^T + mu_x 1^T Q(d_R) in wgrad (published, Eq. 12). In exact
        arithmetic both are zero; after rounding they are noise.
    """

    x: bool = True
    d: bool = True
    precision: Literal["high", "fp4"] = "high"
    weight: Literal["high", "quantized"] = "high"
    cross_terms: bool = False

    def __post_init__(self):
        for name, known in (("precision", ("high", "fp4")), ("weight", ("high", "quantized"))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"Mean: {name} must be {' or '.join(map(repr, known))}, "
                    f"not {getattr(self, name)!r}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank:
    """Take the leading singular directions out of x, w and d (Metis, arXiv 2509.00404).

        x = t b^T + x_R,  b [m, k] orthonormal, t = x b;   x^ = Q'(t b^T) + Q(x_R)

    b is found from a sample of rows by a random projection with oversampling, so that the
    decomposition costs little beside the products. Any b is correct: a worse one leaves more in
    x_R.

    Attributes:
      x, w, d: which tensors are split.
      rank: share of min(rows, columns) that k is; at least 1.
      max_rank: bound on k.
      oversample: more columns in the random projection.
      rows: share of rows in the sample, at least 4 (k + oversample) of them. Weights use all rows.
      iterations: subspace iterations on the sample.
      refresh: steps between new bases; 1: a new one at every use. Above 1 a state carries them
        (`quant.init_state`).
      factors: "high": t and b in bfloat16, and the residual compensates their rounding; "fp4":
        each factor quantized along its own length, the residual does not know (published);
        "fp4_feedback": the same, and the residual compensates.
      min_size: a tensor with a side below this is not split.
    """

    x: bool = True
    w: bool = True
    d: bool = True
    rank: float = 0.015
    max_rank: int | None = None
    oversample: int = 8
    rows: float = 0.01
    iterations: int = 1
    refresh: int = 1
    factors: Literal["high", "fp4", "fp4_feedback"] = "high"
    min_size: int = 64

    def __post_init__(self):
        if not 0 < self.rank < 1 or not 0 < self.rows <= 1:
            raise ValueError(
                f"LowRank: rank and rows are shares in (0, 1), got {self.rank} and {self.rows}"
            )
        if self.refresh < 1 or self.iterations < 0 or self.oversample < 0:
            raise ValueError(
                "LowRank: refresh must be 1 or more, iterations and oversample 0 or more; got "
                f"{self.refresh}, {self.iterations}, {self.oversample}"
            )
        if self.factors not in ("high", "fp4", "fp4_feedback"):
            raise ValueError(
                f"LowRank: factors must be 'high', 'fp4' or 'fp4_feedback', not {self.factors!r}"
            )

    def columns(self, rows: int, cols: int) -> int:
        """k for a tensor of this shape; 0 if it is not split."""
        if min(rows, cols) < self.min_size:
            return 0
        k = max(1, round(self.rank * min(rows, cols)))
        return k if self.max_rank is None else min(k, self.max_rank)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One scheme of quantized training; equal recipes are equal objects and hash alike.

    Attributes:
      name: for messages and tables.
      fprop_x, fprop_w, dgrad_d, dgrad_w, wgrad_x, wgrad_d: the operands; None stays as it is.
      signs: of the Hadamard transforms: "te" the fixed vector of Transformer Engine (its 16 signs
        repeated for larger sizes), "random" new ones from the key, "none".
      mean: take the mean over tokens out first.
      low_rank: take the leading directions out first (after the mean).
    """

    name: str
    fprop_x: Operand | None = None
    fprop_w: Operand | None = None
    dgrad_d: Operand | None = None
    dgrad_w: Operand | None = None
    wgrad_x: Operand | None = None
    wgrad_d: Operand | None = None
    signs: Signs = "te"
    mean: Mean | None = None
    low_rank: LowRank | None = None

    def __post_init__(self):
        if self.signs not in ("te", "random", "none"):
            raise ValueError(f"{self.name}: signs must be 'te', 'random' or 'none'")
        for left, right in (ROLES[:2], ROLES[2:4], ROLES[4:]):
            a, b = getattr(self, left), getattr(self, right)
            if (a and a.hadamard) != (b and b.hadamard):
                raise ValueError(
                    f"{self.name}: {left} and {right} are multiplied, so both need the same "
                    "hadamard, or it does not cancel"
                )
            for role, operand in ((left, a), (right, b)):
                if operand and operand.block_2d and not role.endswith("w"):
                    raise ValueError(f"{self.name}: {role} has block_2d, which is for weights")
                if operand and operand.block_2d and operand.hadamard:
                    raise ValueError(
                        f"{self.name}: {role} has block_2d and hadamard: a transform along one "
                        "axis makes the two products see different numbers"
                    )

    @property
    def operands(self) -> dict[str, Operand]:
        """The quantized operands by role."""
        return {role: getattr(self, role) for role in ROLES if getattr(self, role) is not None}

    @property
    def needs_key(self) -> bool:
        """Whether the products need random numbers."""
        stochastic = any(o.rounding == "stochastic" for o in self.operands.values())
        signs = self.signs == "random" and any(o.hadamard for o in self.operands.values())
        return stochastic or signs or self.low_rank is not None

    @property
    def needs_state(self) -> bool:
        """Whether bases are kept between steps."""
        return self.low_rank is not None and self.low_rank.refresh > 1


def bits_per_value(recipe: Recipe) -> dict[str, float]:
    """Bits that each operand of the products takes; 16 for those that are not quantized."""
    bits = {role: 16.0 for role in ROLES}
    for role, operand in recipe.operands.items():
        value = operand.fmt.bits_per_value
        if operand.block_2d and operand.fmt.block is not None:
            scale = operand.fmt.bits_per_value - operand.fmt.element.bits
            value = operand.fmt.element.bits + scale / operand.fmt.block
        bits[role] = value
    assert all(math.isfinite(b) for b in bits.values())
    return bits
