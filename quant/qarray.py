"""The stored form of a quantized array."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quant.formats import E2M1, Format
from quant.rounding import decode_e2m1, encode_e2m1, float_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray:
    """Codes, block scales and tensor scale of an array; a pytree of up to three arrays.

    The array is element * block scale * tensor scale. `quant.dequantize` forms it.
    Leading axes may be added or taken away from all leaves at once (`jax.vmap`, `jax.lax.scan`,
    indexing with `jax.tree.map`): `axis` counts from the end and `shape` follows the leaves.

    Attributes:
      codes: E2M1: uint8, two codes a byte along `axis`, the first one in the low half; an odd
        length is rounded up. E4M3, E5M2: that dtype, the shape of the array.
      scales: block scales in `fmt.scale_dtype`; `axis` has ceil(length / block) entries, and so has
        the other of the last two axes if `block_2d`. NaN for a block that held NaN or infinity.
        None for a format without blocks.
      tensor_scale: float32 scalar to multiply with, or None for 1.
      fmt: the format.
      axis: the quantized axis, counted from the end (negative).
      size: length of that axis.
      block_2d: blocks are squares over the last two axes.
      dtype: of the array before, and of what `dequantize` gives.
    """

    codes: jax.Array
    scales: jax.Array | None
    tensor_scale: jax.Array | None
    fmt: Format = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})
    size: int = dataclasses.field(metadata={"static": True})
    block_2d: bool = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that was quantized."""
        shape = list(self.codes.shape)
        shape[self.axis] = self.size
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored, rounding-up included."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def store_elements(q: jax.Array, fmt: Format, axis: int) -> jax.Array:
    """Codes of float32 grid numbers, packed along `axis` (negative) if they have 4 bits."""
    if fmt.element != E2M1:
        return q.astype(fmt.element.dtype)
    code = encode_e2m1(q)
    axis += code.ndim
    if code.shape[axis] % 2:
        code = jnp.pad(code, [(0, int(i == axis)) for i in range(code.ndim)])
    length = code.shape[axis]
    low = lax.slice_in_dim(code, 0, length, 2, axis)
    high = lax.slice_in_dim(code, min(1, length), length, 2, axis)
    return low | (high << np.uint8(4))


def load_elements(q: QArray) -> jax.Array:
    """The float32 grid numbers of a QArray, in its shape."""
    if q.fmt.element != E2M1:
        return q.codes.astype(jnp.float32)
    axis = q.axis + q.ndim
    pairs = jnp.stack([q.codes & np.uint8(15), q.codes >> np.uint8(4)], axis + 1)
    shape = list(q.codes.shape)
    shape[axis] *= 2
    return decode_e2m1(lax.slice_in_dim(pairs.reshape(shape), 0, q.size, axis=axis))


def store_scales(scales: jax.Array, fmt: Format) -> jax.Array:
    """float32 numbers that the scale type represents, in that type."""
    if fmt.scale != "e8m0":
        return scales.astype(fmt.scale_dtype)  # exact: already rounded
    # A cast to E8M0 would round zero to NaN; the byte is the exponent field of the float32.
    field = (lax.bitcast_convert_type(scales, jnp.uint32) >> np.uint32(23)).astype(jnp.uint8)
    byte = jnp.where(jnp.isnan(scales), np.uint8(255), field)
    return lax.bitcast_convert_type(byte, jnp.float8_e8m0fnu)


def load_scales(scales: jax.Array, fmt: Format) -> jax.Array:
    """Block scales as float32. 2**-127 becomes 0: devices disagree on subnormal numbers."""
    if fmt.scale != "e8m0":
        return scales.astype(jnp.float32)
    byte = lax.bitcast_convert_type(scales, jnp.uint8).astype(jnp.uint32)
    value = float_of(byte << np.uint32(23))
    return jnp.where(byte == 255, np.float32(np.nan), value)
