"""Root-mean-square normalization."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

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
    """Holds the scale [D] (stacked: [L, D]), which starts at 1."""

    def __init__(self, d: int, *, eps: float, dtype: str, stack: Stack = SINGLE):
        self.eps = eps
        self.scale = constant(1.0, (d,), ("norm",), dtype=dtype, stack=stack)

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps)
