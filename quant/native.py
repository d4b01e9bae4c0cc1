"""Products on the hardware's own block-scaled units, through `jax.nn.scaled_matmul`.

NVFP4 (E2M1 values in blocks of 16 with E4M3 scales, also in square blocks) and MXFP8 (E4M3 in
blocks of 32 with E8M0 scales), where both operands of a product have the same of the two. The
codes are those that the emulation multiplies, and both sum in float32, so the two paths differ by
the order of the sum. Tensor scales are multiplied in afterwards, and so are low-rank factors and
means, as skinny products of their own.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from quant.formats import E2M1, E4M3, Format
from quant.qarray import QArray, load_elements
from quant.recipe import ROLES, Recipe

Implementation = Literal["native", "emulated"]
"""How a quantized product is computed."""
Path = Literal["native", "emulated", "high"]
"""The same, or "high" for a product that is not quantized."""
PRODUCTS = ("fprop", "dgrad", "wgrad")

_BLOCKS = {(E2M1, 16, "e4m3"), (E4M3, 32, "e8m0")}


class Packed(NamedTuple):
    """An operand as the hardware takes it: the contracted axis last, in whole blocks."""

    elements: jax.Array
    """float4_e2m1fn or float8_e4m3fn [other axis, contracted]."""
    scales: jax.Array
    """float8_e4m3fn or float8_e8m0fnu [other axis, blocks]."""


def paths(recipe: Recipe, implementation: Implementation | None = None) -> dict[str, Path]:
    """The path of each of the three products.

    Args:
      recipe: whose products.
      implementation: "native" wherever both operands have a format for it, on any device (without
        such units JAX emulates them, slower than this package); "emulated" nowhere; None: "native"
        on an NVIDIA GPU of compute capability 10.0 or more.

    Raises:
      ValueError: another implementation.

    Examples:
      >>> from quant import get_recipe
      >>> paths(get_recipe("nvidia"), "native")
      {'fprop': 'native', 'dgrad': 'native', 'wgrad': 'native'}
      >>> paths(get_recipe("mxfp4"), "native")["fprop"]
      'emulated'
    """
    if implementation not in (None, "native", "emulated"):
        raise ValueError(
            f"implementation must be 'native', 'emulated' or None, not {implementation!r}"
        )
    wanted = _has_units() if implementation is None else implementation == "native"
    found: dict[str, Path] = {}
    for i, name in enumerate(PRODUCTS):
        pair = [getattr(recipe, role) for role in ROLES[2 * i : 2 * i + 2]]
        formats = {operand.fmt for operand in pair if operand is not None}
        if not formats:
            found[name] = "high"
        elif wanted and None not in pair and len(formats) == 1 and _fits(*formats):
            found[name] = "native"
        else:
            found[name] = "emulated"
    return found


def _fits(fmt: Format) -> bool:
    return (fmt.element, fmt.block, fmt.scale) in _BLOCKS


@functools.cache
def _has_units() -> bool:
    if jax.default_backend() != "gpu":
        return False
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    try:
        return float(capability) >= 10.0
    except ValueError:  # AMD's architectures have names
        return False


def pack(q: QArray) -> Packed:
    """A quantized matrix for `scaled_product`."""
    assert q.scales is not None and q.fmt.block is not None
    elements = jnp.moveaxis(load_elements(q), q.axis, -1)
    scales = jnp.moveaxis(q.scales, q.axis, -1)
    if q.block_2d:  # a row of blocks has the scales of all rows that it covers
        scales = jnp.repeat(scales, q.fmt.block, axis=0)[: len(elements)]
    short = scales.shape[1] * q.fmt.block - elements.shape[1]
    elements = jnp.pad(elements, ((0, 0), (0, short)))
    # float32 numbers of the grid: the cast is exact.
    return Packed(elements.astype(q.fmt.element.dtype), scales)


def scaled_product(a: Packed, b: Packed) -> jax.Array:
    """a b^T without tensor scales, float32 [other axis of a, other axis of b]."""
    elements = (a.elements[None], b.elements[None])
    scales = (a.scales[None], b.scales[None])
    return jax.nn.scaled_matmul(*elements, *scales, preferred_element_type=jnp.float32)[0]
