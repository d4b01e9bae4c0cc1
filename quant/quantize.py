"""Quantize, dequantize, and both at once with a straight-through gradient.

Bit for bit Transformer Engine's arithmetic for NVFP4 (all float32; a is a largest magnitude):

    S   = min(2688 / a_tensor, FLT_MAX), 1 if a_tensor is 0          2688 = 448 * 6
    s   = e4m3(min(a_block * (S * (1/6)), 448))                      nearest, ties to even
    enc = min(1 / (s * (1/S)), FLT_MAX)
    q   = e2m1(clip(x * enc, -6, 6))
    x'  = q * s * (1/S)

and its like for the others: MX formats have s a power of two and no S, FP8 has S = 448 / a_tensor
and no s.
"""

import functools
import math
import operator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quant.formats import Format, check_input
from quant.qarray import QArray, load_elements, load_scales, store_elements, store_scales
from quant.rounding import Key, random_bits, round_nearest, round_stochastic
from quant.scales import scale_to_grid

Rounding = Literal["nearest", "stochastic"]


def quantize(
    x: jax.Array | np.ndarray,
    fmt: Format,
    *,
    axis: int,
    rounding: Rounding = "nearest",
    key: Key | None = None,
    block_2d: bool = False,
    sr_headroom: float | None = None,
) -> QArray:
    """Quantize an array of any shape in blocks along one axis.

    The same bits under jit, op by op, and however the array is sharded. With the blocked axis on
    one device the only communication is the maximum for the tensor scale, if the format has one.

    NaN and infinity are propagated: their block is NaN when dequantized (their 2-D block; with FP8
    just the value), and does not touch the scale of the rest. Finite values beyond the range of the
    scale saturate; from 1.7e38 on rounding up may give infinity, as casts do. No gradient flows
    through: `fake_quant` has the straight-through one.

    Args:
      x: float32, bfloat16 or float16, at least one axis. Any size: a last block that is not full
        is as if zeros followed.
      fmt: `quant.NVFP4`, `MXFP4`, `MXFP8`, `FP8` or your own `quant.Format`.
      axis: the axis that blocks lie along: the contracted one of the product to come.
      rounding: of the values; scales are always rounded by their rule.
        "nearest" ties to the even code; "stochastic" up or down at random so that the mean is x.
      key: for "stochastic", see `quant.fold_key`. Under `jax.vmap` give each its own.
      block_2d: one scale for a square of block x block values over the last two axes (weights:
        the codes do not depend on `axis`, so both products see the same numbers). `axis` must be
        one of the last two.
      sr_headroom: the scale is widened by this factor in stochastic rounding, so that no value
        saturates; None: `fmt.sr_headroom`, just enough. 1: none, as in Transformer Engine, and
        biased. Measured on N(0, 1), 1024 x 2048, 8 keys, share of saturated values and mean result
        <q, x> / <x, x> (standard error 0.00005; all are 1.0000 with headroom): NVFP4 3.5 % and
        0.9967, MXFP4 with "floor" 2.3 % and 0.9897, with "oas" 0.6 % and 0.9980.
        Blocks so small that their E4M3 scale is subnormal or zero (a_block below a_tensor / 28672)
        can still saturate, unless `fmt.underflow` is "floor".

    Returns:
      A `QArray`.

    Raises:
      TypeError: x is not of these types, or fmt is no format.
      ValueError: axis out of range, a stochastic rounding without key, and the like.

    Examples:
      >>> from quant import NVFP4
      >>> x = jnp.linspace(-1.0, 1.0, 64).reshape(2, 32)
      >>> q = quantize(x, NVFP4, axis=-1)
      >>> q.codes.shape, q.scales.shape, q.nbytes
      ((2, 16), (2, 2), 40)
      >>> bool(jnp.max(jnp.abs(dequantize(q) - x)) < 0.17)
      True
    """
    x = jnp.asarray(x)
    plan = _Plan.of(x, fmt, axis, rounding, key, block_2d, sr_headroom, "quantize")
    codes, scales, tensor_scale = _store(x, key, plan)
    return QArray(
        codes=codes,
        scales=scales,
        tensor_scale=tensor_scale,
        fmt=fmt,
        axis=plan.blocks.axis - x.ndim,
        size=x.shape[axis],
        block_2d=block_2d,
        dtype=np.dtype(x.dtype),
    )


def dequantize(q: QArray, dtype: Any = None) -> jax.Array:
    """The numbers a QArray stands for: element * block scale * tensor scale, in that order.

    Computed in float32, then cast to `dtype` (default: that of the quantized array).
    """
    if not isinstance(q, QArray):
        raise TypeError(f"dequantize: expected a quant.QArray, not {type(q).__name__}")
    return _load(q, np.dtype(dtype or q.dtype))


def fake_quant(
    x: jax.Array | np.ndarray,
    fmt: Format,
    *,
    axis: int,
    rounding: Rounding = "nearest",
    key: Key | None = None,
    block_2d: bool = False,
    sr_headroom: float | None = None,
) -> jax.Array:
    """`dequantize(quantize(x, ...))`, the same bits without storing codes, differentiable.

    The gradient is straight-through: that of the identity, also where values saturate.
    Arguments and errors are those of `quantize`; the result has the dtype of x.

    Examples:
      >>> from quant import MXFP4
      >>> x = jnp.array([0.1, -0.7, 3.0])
      >>> fake_quant(x, MXFP4, axis=0)
      Array([ 0.  , -0.75,  3.  ], dtype=float32)
      >>> jax.grad(lambda x: fake_quant(x, MXFP4, axis=0).sum())(x)
      Array([1., 1., 1.], dtype=float32)
    """
    x = jnp.asarray(x)
    plan = _Plan.of(x, fmt, axis, rounding, key, block_2d, sr_headroom, "fake_quant")
    return _straight_through(x, _fake(x, key, plan))


def quantize_values(
    x: jax.Array,
    fmt: Format,
    *,
    axis: int,
    rounding: Rounding = "nearest",
    key: Key | None = None,
    block_2d: bool = False,
    sr_headroom: float | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """What `fake_quant` gives, with the tensor scale apart: an operand for a product.

    Arguments and errors are those of `quantize`; no gradient flows through.

    Returns:
      values of x's shape, element * block scale: bfloat16, where they are exact (at most six
        significant bits), or float32 for a format with unrounded scales;
      tensor scale, float32 scalar, or None for 1.
    """
    plan = _Plan.of(x, fmt, axis, rounding, key, block_2d, sr_headroom, "quantize_values")
    return _values(x, key, plan)


@jax.custom_jvp
def _straight_through(x: jax.Array, result: jax.Array) -> jax.Array:
    return result


@_straight_through.defjvp
def _(primals, tangents):
    return primals[1], tangents[0]


class _Blocks(NamedTuple):
    """How an array is cut into blocks, and put together again."""

    shape: tuple[int, ...]
    padded: tuple[int, ...]
    cut: tuple[int, ...]  # each blocked axis becomes (blocks, values in one)
    inner: tuple[int, ...]  # axes of `cut` inside a block
    axis: int

    @classmethod
    def of(cls, x: jax.Array, fmt: Format, axis: int, block_2d: bool, name: str) -> "_Blocks":
        check_input(x, fmt, name)
        at = operator.index(axis)
        if not -x.ndim <= at < x.ndim:
            raise ValueError(f"{name}: axis {axis} is out of range for x of shape {x.shape}")
        at %= x.ndim
        axes = (at,)
        if block_2d:
            if fmt.block is None:
                raise ValueError(f"{name}: {fmt.name} has no blocks, so block_2d means nothing")
            axes = (x.ndim - 2, x.ndim - 1)
            if x.ndim < 2 or at not in axes:
                raise ValueError(
                    f"{name}: 2-D blocks lie in the last two axes; axis {axis} of x of shape "
                    f"{x.shape} is not one of them: move it there, or use block_2d=False"
                )
        padded, cut, inner = list(x.shape), [], []
        for i, size in enumerate(x.shape):
            if fmt.block is not None and i in axes:
                count = -(-size // fmt.block)
                padded[i] = count * fmt.block
                inner.append(len(cut) + 1)
                cut += [count, fmt.block]
            else:
                cut.append(size)
        return cls(x.shape, tuple(padded), tuple(cut), tuple(inner), at)

    def split(self, x: jax.Array) -> jax.Array:
        if self.padded != self.shape:
            x = jnp.pad(x, [(0, p - n) for p, n in zip(self.padded, self.shape, strict=True)])
        return x.reshape(self.cut)

    def join(self, x: jax.Array) -> jax.Array:
        x = x.reshape(self.padded)
        return x if self.padded == self.shape else lax.slice(x, (0,) * x.ndim, self.shape)


class _Plan(NamedTuple):
    """All that is static in a quantization, checked."""

    fmt: Format
    blocks: _Blocks
    headroom: float

    @classmethod
    def of(cls, x, fmt, axis, rounding, key, block_2d, headroom, name: str) -> "_Plan":
        blocks = _Blocks.of(x, fmt, axis, block_2d, name)
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(
                f"{name}: rounding must be 'nearest' or 'stochastic', not {rounding!r}"
            )
        if rounding == "stochastic" and key is None:
            raise ValueError(f"{name}: stochastic rounding needs a key, see quant.fold_key")
        if rounding == "nearest" and key is not None:
            raise ValueError(
                f"{name}: a key, but rounding is 'nearest': set rounding='stochastic' or drop it"
            )
        if headroom is not None and not (math.isfinite(headroom) and headroom >= 1):
            raise ValueError(f"{name}: sr_headroom must be 1 or more, not {headroom}")
        headroom = fmt.sr_headroom if headroom is None else float(headroom)
        return cls(fmt, blocks, headroom if rounding == "stochastic" else 1.0)


# Compiled as one each: called op by op, a new shape would compile some sixty small programs.
@functools.partial(jax.jit, static_argnums=2)
def _store(x: jax.Array, key: Key | None, plan: _Plan):
    fmt, blocks, _ = plan
    elements, scales, tensor_scale = _quantize(x, key, plan)
    if scales is not None:
        scales = store_scales(lax.squeeze(scales, blocks.inner), fmt)
    codes = store_elements(blocks.join(elements), fmt, blocks.axis - x.ndim)
    return codes, scales, tensor_scale


@functools.partial(jax.jit, static_argnums=2)
def _values(x: jax.Array, key: Key | None, plan: _Plan):
    result, scales, tensor_scale = _quantize(x, key, plan)
    if scales is not None:
        result = result * scales
    exact = jnp.float32 if plan.fmt.scale == "f32" else jnp.bfloat16
    return plan.blocks.join(result.astype(exact)), tensor_scale


@functools.partial(jax.jit, static_argnums=2)
def _fake(x: jax.Array, key: Key | None, plan: _Plan) -> jax.Array:
    result, scales, tensor_scale = _quantize(x, key, plan)
    if scales is not None:
        result = result * scales
    if tensor_scale is not None:
        result = result * tensor_scale
    return plan.blocks.join(result).astype(x.dtype)


@functools.partial(jax.jit, static_argnums=1)
def _load(q: QArray, dtype: np.dtype) -> jax.Array:
    values = load_elements(q)
    if q.scales is not None:
        blocks = _Blocks.of(values, q.fmt, q.axis, q.block_2d, "dequantize")
        scales = lax.expand_dims(load_scales(q.scales, q.fmt), blocks.inner)
        values = blocks.join(blocks.split(values) * scales)
    if q.tensor_scale is not None:
        # One number, or one for each of the leading axes added by vmap.
        lead = q.tensor_scale.shape
        values = values * q.tensor_scale.reshape(lead + (1,) * (q.ndim - len(lead)))
    return values.astype(dtype)


def _quantize(
    x: jax.Array, key: Key | None, plan: _Plan
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Float32 grid numbers cut into blocks; scales, of length 1 inside a block; tensor scale."""
    fmt, blocks, headroom = plan
    x = blocks.split(_as_float32(lax.stop_gradient(x)))
    scaled, scales, tensor_scale = scale_to_grid(x, fmt, blocks.inner, headroom)
    if key is None:
        values = round_nearest(scaled, fmt.element)
        if fmt.adaptive:
            values, scales = _adapt(x, values, scales, tensor_scale, plan)
        return values, scales, tensor_scale
    random = random_bits(key, blocks.padded).reshape(blocks.cut)
    return round_stochastic(scaled, fmt.element, random), scales, tensor_scale


def _adapt(x, values, scales, tensor_scale, plan: _Plan) -> tuple[jax.Array, jax.Array]:
    """Values and scales, of blocks that are better off with 4 as their largest magnitude too."""
    fmt, blocks, headroom = plan
    scaled, wide, _ = scale_to_grid(x, fmt, blocks.inner, headroom, widen=fmt.element.max / 4)
    others = round_nearest(scaled, fmt.element)
    assert wide is not None  # the format has block scales

    def error(values, scales):
        back = values * scales if tensor_scale is None else values * scales * tensor_scale
        return jnp.sum(jnp.square(back - x), blocks.inner, keepdims=True)

    better = error(others, wide) < error(values, scales)
    return jnp.where(better, others, values), jnp.where(better, wide, scales)


def _as_float32(x: jax.Array) -> jax.Array:
    # Under jit XLA may keep more bits in an x that was cast down just before; round it for sure.
    if x.dtype == jnp.bfloat16:
        return lax.reduce_precision(x.astype(jnp.float32), 8, 7)
    if x.dtype == jnp.float16:  # reduce_precision would flush its subnormal numbers
        return lax.optimization_barrier(x).astype(jnp.float32)
    return x
