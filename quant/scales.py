"""Block and tensor scales: the arithmetic of every format, up to the rounding of the values."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quant.formats import E4M3, Format
from quant.rounding import bits_of, float_of, round_nearest

_FLT_MAX = np.finfo(np.float32).max
_NAN = np.float32(np.nan)


def scale_to_grid(
    x: jax.Array, fmt: Format, inside: tuple[int, ...], headroom: float, widen: float = 1.0
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """The scales of an array, and the array divided by them.

    Args:
      x: float32, cut into blocks.
      fmt: the format.
      inside: axes of x inside a block.
      headroom: widens the scales by this factor.
      widen: widens block scales alone, of formats that are `adaptive`.

    Returns:
      x in units of the grid, clipped to its range; block scales, numbers of the scale type as
      float32, length 1 along `inside`, or None; tensor scale, a float32 scalar, or None.
    """
    top = np.float32(fmt.element.max)
    # As integers, whose order is that of magnitudes with NaN on top: XLA:CPU's reduction of floats
    # loses NaN in all but small arrays (jaxlib 0.12), and keeps what comes after from fusing.
    bits = (bits_of(x) & np.uint32(0x7FFFFFFF)).astype(jnp.int32)
    amax = float_of(jnp.max(bits, inside, keepdims=True, initial=0).astype(jnp.uint32))
    finite = jnp.isfinite(amax)
    if fmt.block is None:
        decode, encode = _tensor_scale(amax, fmt.element.max, headroom)
        # The grid has no infinity to saturate to, and a NaN for what is no number.
        scaled = jnp.where(finite, lax.clamp(-top, x * encode, top), _NAN)
        return scaled, None, decode
    if fmt.scale == "e8m0":
        scales, encode = _power_of_two(amax, fmt)
        decode = None
        if headroom != 1:
            encode = encode * np.float32(1 / headroom)
            decode = jnp.full((), headroom, jnp.float32)
    elif fmt.tensor_scale:
        # Adaptive scales grow by 1.5 in some blocks: the largest is 256 * 1.5, an E4M3 number.
        full = fmt.element.max * (256.0 if fmt.adaptive else E4M3.max)
        decode, tensor_encode = _tensor_scale(amax, full, headroom)
        wide = np.float32(headroom * widen / fmt.element.max)
        scales = _e4m3_scale(amax * (tensor_encode * wide), fmt)
        encode = _reciprocal(scales * decode)
    else:
        decode = None
        scales = amax * np.float32(headroom * widen / fmt.element.max)
        if fmt.scale == "e4m3":
            scales = _e4m3_scale(scales, fmt)
        encode = _reciprocal(scales)
    scales = jnp.where(finite, scales, _NAN)
    return lax.clamp(-top, x * encode, top), scales, decode


def _tensor_scale(amax: jax.Array, full: float, headroom: float) -> tuple[jax.Array, jax.Array]:
    """(1/S, S) with S = full / headroom / the largest finite amax; float32 scalars."""
    largest = jnp.max(jnp.where(jnp.isfinite(amax), amax, np.float32(0)), initial=0.0)
    encode = lax.min(np.float32(full / headroom) / largest, _FLT_MAX)
    encode = jnp.where((largest == 0) | (encode == 0), np.float32(1), encode)
    # Under jit XLA makes 1 / (2688 / a) into a / 2688: other bits for a third of all a (measured).
    # Barriers on these two scalars cost nothing and keep it away.
    encode = lax.optimization_barrier(encode)
    return lax.optimization_barrier(np.float32(1) / encode), encode


def _e4m3_scale(scale: jax.Array, fmt: Format) -> jax.Array:
    scale = round_nearest(lax.min(scale, np.float32(E4M3.max)), E4M3)
    if fmt.underflow == "floor":
        return lax.max(scale, np.float32(2.0**E4M3.min_exponent))
    if fmt.underflow == "one":
        return jnp.where(scale == 0, np.float32(1), scale)
    return scale


def _reciprocal(scale: jax.Array) -> jax.Array:
    return lax.min(np.float32(1) / scale, _FLT_MAX)


def _power_of_two(amax: jax.Array, fmt: Format) -> tuple[jax.Array, jax.Array]:
    """The block scale 2**k of an E8M0 format and its inverse, by arithmetic on the exponent."""
    full = fmt.element.max
    edge = {"floor": 2.0**fmt.element.max_exponent, "ceil": full, "oas": full * 7 / 12}[fmt.rule]
    edge_bits = int(np.float32(edge).view(np.uint32))
    bits = bits_of(amax).astype(jnp.int32)  # amax is not negative: no sign bit
    k = (bits >> 23) - (edge_bits >> 23)
    mantissa, edge_mantissa = bits & 0x7FFFFF, edge_bits & 0x7FFFFF
    if fmt.rule == "ceil":
        k = k + (mantissa > edge_mantissa).astype(jnp.int32)
    else:
        k = k - (mantissa < edge_mantissa).astype(jnp.int32)
    k = lax.clamp(-127, k, 126)
    # 2**-127 is a subnormal number that some devices flush: it is 0 here, byte 0 when stored.
    scales = float_of(((k + 127) << 23).astype(jnp.uint32))
    return scales, float_of(((127 - k) << 23).astype(jnp.uint32))
