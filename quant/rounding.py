"""Rounding to a floating-point grid, its codes, and random numbers that any sharding agrees on.

All of it is arithmetic on float32 and its bits, never a cast there and back: XLA may remove such a
pair of casts under jit, and NaN cast to E2M1 is -0.
"""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quant.formats import Element

_EXPONENT = np.uint32(0x7F800000)
_MAGNITUDE = np.uint32(0x7FFFFFFF)


def bits_of(x: jax.Array) -> jax.Array:
    """The bits of float32 `x` as uint32."""
    return lax.bitcast_convert_type(x, jnp.uint32)


def float_of(bits: jax.Array) -> jax.Array:
    """The float32 with these uint32 bits."""
    return lax.bitcast_convert_type(bits, jnp.float32)


def _spacing(y: jax.Array, element: Element) -> tuple[jax.Array, jax.Array]:
    """Distance of the grid's numbers around y, and its inverse; both are powers of two."""
    lowest = np.uint32((127 + element.min_exponent) << 23)
    step = lax.max(bits_of(y) & _EXPONENT, lowest) - np.uint32(element.mantissa << 23)
    return float_of(step), float_of(np.uint32(254 << 23) - step)


def round_nearest(y: jax.Array, element: Element) -> jax.Array:
    """Round to the nearest number of the grid, ties to the even code; NaN stays NaN.

    Args:
      y: float32, at most `element.max` in magnitude (the caller clips: what saturates is its
        business).
      element: the grid.

    Returns:
      float32 of the same shape, all numbers of the grid.
    """
    step, inverse = _spacing(y, element)
    # Products with powers of two are exact, so fusing or splitting them cannot change a bit.
    return lax.round(y * inverse, lax.RoundingMethod.TO_NEAREST_EVEN) * step


def round_stochastic(y: jax.Array, element: Element, random: jax.Array) -> jax.Array:
    """Round to the number above with probability (y - below) / (above - below), else below.

    The expectation is y to 2**-24 of a grid step. Numbers of the grid stay as they are.

    Args:
      y: float32, at most `element.max` in magnitude.
      element: the grid.
      random: uint32 of the same shape, see `random_bits`.
    """
    step, inverse = _spacing(y, element)
    t = y * inverse
    below = lax.floor(t)
    uniform = (random >> np.uint32(8)).astype(jnp.int32).astype(jnp.float32) * np.float32(2**-24)
    return (below + (uniform < t - below).astype(jnp.float32)) * step


def encode_e2m1(q: jax.Array) -> jax.Array:
    """Codes 0..15 (uint8) of float32 numbers of the E2M1 grid; sign is bit 3, -0 is 8."""
    bits = bits_of(q)
    magnitude = bits & _MAGNITUDE
    # One mantissa bit below the exponent: from 1.0 on, the code is the top of the bits, shifted.
    normal = (magnitude >> np.uint32(22)) - np.uint32(126 << 1)
    small = (magnitude != 0).astype(jnp.uint32)
    code = jnp.where(magnitude < np.uint32(127 << 23), small, normal & np.uint32(7))
    return (code | ((bits >> np.uint32(28)) & np.uint32(8))).astype(jnp.uint8)


def decode_e2m1(code: jax.Array) -> jax.Array:
    """The float32 numbers of E2M1 codes 0..15."""
    code = code.astype(jnp.uint32)
    magnitude = code & np.uint32(7)
    normal = (magnitude + np.uint32(126 << 1)) << np.uint32(22)
    small = magnitude * np.uint32(126 << 23)  # code 1 is .5, code 0 is 0
    bits = jnp.where(magnitude < np.uint32(2), small, normal)
    return float_of(bits | ((code & np.uint32(8)) << np.uint32(28)))


class Seed(NamedTuple):
    """A random key as two uint32 words that are cheap to fold numbers into.

    A few integer operations where `jax.random.fold_in` is a Threefry loop: a linear layer has some
    twenty draws, and as many loops would dominate its compile time. Quality is that of
    `random_bits`: for rounding and random projections.
    """

    a: jax.Array
    b: jax.Array


Key = jax.Array | Seed
"""A JAX random key, or a `Seed` made from one."""


def seed_of(key: Key) -> Seed:
    """The seed of a JAX random key of any kind; of a seed, itself."""
    if isinstance(key, Seed):
        return key
    word = jax.random.bits(key, (2,), jnp.uint32)
    return Seed(word[0], word[1])


def fold_seed(key: Key, *data: int | str | jax.Array) -> Seed:
    """The seed for what `data` names, and for nothing else.

    Args:
      key: a seed or a JAX key.
      data: numbers, possibly traced, or names.
    """
    seed = seed_of(key)
    for part in data:
        # crc32 and not hash(): the same in every process.
        number = zlib.crc32(part.encode()) if isinstance(part, str) else part
        if isinstance(number, int):
            number = np.uint32(number % 2**32)
        word = _mix(jnp.asarray(number).astype(jnp.uint32) + np.uint32(0x9E3779B9))
        seed = Seed(_mix(seed.a ^ word), _mix(seed.b + word))
    return seed


def random_bits(key: Key, shape: tuple[int, ...]) -> jax.Array:
    """uint32 random numbers, each a hash of the key and of the element's index in the whole array.

    So every device computes its own, and a sharded array gets the same numbers as one on a single
    device. JAX's Threefry has this property too, but takes some 70 times as long on a CPU (measured
    for 4M numbers), far longer than all of the quantizer. Two rounds of the 32-bit
    finalizer "lowbias32" (C. Wellons, hash-prospector), with a word of the key before each. Good
    enough to round with, not for cryptography; numbers repeat after 2**32 elements.

    Args:
      key: a JAX random key of any kind, or a `Seed`.
      shape: of the array.
    """
    word = seed_of(key)
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        here = lax.broadcasted_iota(jnp.uint32, shape, axis)
        index += here * np.uint32(stride % 2**32)
        stride *= shape[axis]
    return _mix(_mix(index ^ word[0]) + word[1])


def _mix(h: jax.Array) -> jax.Array:
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B)
    return h ^ (h >> np.uint32(16))


def fold_key(
    key: jax.Array, *, layer: int | str | jax.Array, role: str, step: int | jax.Array
) -> jax.Array:
    """The key for one rounding: of this operand, in this layer, at this step, and of no other.

    Derived from names and numbers alone, so a resumed run, another device count or another order of
    layers rounds the same. Never round two operands with one key: their errors would correlate.

    Args:
      key: the key of the run.
      layer: index of the layer (an array under `jax.lax.scan`) or its name.
      role: which operand of which product, any string ("dgrad.d", "wgrad.x").
      step: number of the training step.

    Examples:
      >>> a = fold_key(jax.random.key(0), layer=3, role="dgrad.d", step=100)
      >>> b = fold_key(jax.random.key(0), layer=3, role="wgrad.d", step=100)
      >>> bool(a == b)
      False
    """
    if not isinstance(role, str):
        raise TypeError(f"fold_key: role must be a string such as 'dgrad.d', not {role!r}")
    # crc32 and not hash(): the same in every process.
    at = zlib.crc32(layer.encode()) if isinstance(layer, str) else layer
    for part in (at, zlib.crc32(role.encode()), step):
        key = jax.random.fold_in(key, part)
    return key
