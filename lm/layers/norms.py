"""Root-mean-square normalization, and the layer normalization of GPT-2."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lm.config import ModelConfig
from lm.layers.parameters import SINGLE, Stack, constant


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "*batch D"]:
    """x / sqrt(mean(x^2) + eps) * scale, computed in f32, in the dtype of x (arXiv 1910.07467).

    Its own gradient keeps only x and the inverse root mean square: automatic differentiation would
    keep several f32 copies of x per layer.
    """
    return _rms_norm_fwd(x, scale, eps)[0]


def _rms_norm_fwd(x, scale, eps):
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    y = x32 * inverse * _as_row(scale, x.ndim)
    return y.astype(x.dtype), (x, scale, inverse)


def _rms_norm_bwd(eps, residuals, g):
    # With n = x r, r = (mean(x^2) + eps)^(-1/2), h = g scale:  dx = r (h - n mean(h n)).
    del eps
    x, scale, inverse = residuals
    g32 = g.astype(jnp.float32)
    n = x.astype(jnp.float32) * inverse
    h = g32 * _as_row(scale, x.ndim)
    dx = inverse * (h - n * jnp.mean(h * n, axis=-1, keepdims=True))
    dscale = jnp.sum(g32 * n, axis=tuple(range(x.ndim - 1)))
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


def _as_row(scale, ndim):
    return scale.astype(jnp.float32).reshape((1,) * (ndim - 1) + (-1,))


class RMSNorm(nnx.Module):
    """Holds the scale [D] (stacked: [L, D]), which starts at 1.

    With `unit_offset` the factor is 1 + scale, and scale starts at 0 (Gemma).
    """

    def __init__(
        self, d: int, *, eps: float, dtype: str, stack: Stack = SINGLE, unit_offset: bool = False
    ):
        self.eps, self.unit_offset = eps, unit_offset
        start = 0.0 if unit_offset else 1.0
        self.scale = constant(start, (d,), ("norm",), dtype=dtype, stack=stack)

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.scale[...]
        # In f32: 1 + w rounded to bfloat16 would lose most of w.
        return rms_norm(x, 1 + scale.astype(jnp.float32) if self.unit_offset else scale, self.eps)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias, in f32 (arXiv 1607.06450).

    Holds scale and bias [D] (stacked: [L, D]), which start at 1 and 0.
    """

    def __init__(self, d: int, *, eps: float, dtype: str, stack: Stack = SINGLE):
        self.eps = eps
        self.scale = constant(1.0, (d,), ("norm",), dtype=dtype, stack=stack)
        self.bias = constant(0.0, (d,), ("norm",), dtype=dtype, stack=stack)

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.eps) * _as_row(self.scale[...], x.ndim)
        return (y + _as_row(self.bias[...], x.ndim)).astype(x.dtype)


def make_norm(config: ModelConfig, d: int, stack: Stack = SINGLE) -> RMSNorm | LayerNorm:
    """The norm of width d that `config.norm` names."""
    options = dict(eps=config.norm_eps, dtype=config.param_dtype, stack=stack)
    if config.norm == "layer":
        return LayerNorm(d, **options)
    return RMSNorm(d, unit_offset=config.norm_unit_offset, **options)
