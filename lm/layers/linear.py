"""The one place where linear layers multiply, and where another product can be plugged in.

`linear(x, w)` flattens x to two dimensions (XLA:CPU multiplies [B * T, D] faster than [B, T, D]:
194 against 127 GFLOP/s in f32 at 4096 x 256 x 1024 on a 2-core Zen 4) and has its own gradient:

    y = x w,   dx = g w^T,   dw = x^T g

The gradient products accumulate in f32 and dw leaves in the dtype of w, so f32 parameters never see
a gradient that was rounded to bf16. On CPUs the transposed operand of a bf16 product is laid out
row-major first: XLA:CPU sends only such products to its fast bf16 kernel (dx 186 -> 387 GFLOP/s, dw
170 -> 360 at the shape above). In f32 the copy would cost more than it gains.
"""

import contextlib
import contextvars
import fnmatch
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

import quant
from lm import native
from lm.layers.parameters import SINGLE, Stack, constant, normal

DotGeneral = Callable[..., jax.Array]
"""A function with the signature of `jax.lax.dot_general`."""


class Site(NamedTuple):
    """Where in the model a product happens, as told to a `Plug`."""

    name: str
    """Such as "layers.attention.query", "layers.mlp.down" or "head"."""
    layer: jax.Array | int | None = None
    """Index of the layer, traced when layers are scanned; None outside of layers."""


Plug = Callable[[Site], DotGeneral | None]
"""Chooses the product of a site; None leaves the site to `linear`'s own product."""


def by_name(rules: Sequence[tuple[str, DotGeneral | None]]) -> Plug:
    """A plug from (shell pattern, dot_general) pairs; the first pattern that matches wins.

    >>> plug = by_name([("head", None), ("layers.mlp.*", jax.lax.dot_general)])
    >>> plug(Site("layers.mlp.up", 0)) is jax.lax.dot_general, plug(Site("head")) is None
    (True, True)
    """

    def plug(site: Site) -> DotGeneral | None:
        for pattern, dot_general in rules:
            if fnmatch.fnmatchcase(site.name, pattern):
                return dot_general
        return None

    return plug


def linear(
    x: Float[Array, "*batch D"],
    w: Float[Array, "D F"],
    dot_general: DotGeneral | None = None,
) -> Float[Array, "*batch F"]:
    """x @ w in the dtype of x, for inputs of any rank.

    Args:
      x: inputs; their dtype is the dtype of the product and of the result.
      w: weights, in any floating dtype; cast to that of x for the product.
      dot_general: another product, called as `dot_general(x2d, w, (((1,), (0,)), ((), ())))`; it
        brings its own gradient.
    """
    x2d = x.reshape(-1, x.shape[-1])
    if dot_general is None:
        few = native_products() and native.takes_few_rows(x2d, w)
        y = native.few_rows(x2d, w) if few else _matmul(x2d, w)
    else:
        dims = (((1,), (0,)), ((), ()))
        # A quantized product takes the weights as they are: it rounds them once, and their
        # gradient leaves in their own dtype.
        exact = isinstance(dot_general, quant.DotGeneral)
        y = dot_general(x2d, w if exact else w.astype(x.dtype), dims).astype(x.dtype)
    return y.reshape(*x.shape[:-1], w.shape[-1])


@jax.custom_vjp
def _matmul(x, w):
    return jax.lax.dot(two_rows(x), w.astype(x.dtype))[: len(x)]


def two_rows(x: Float[Array, "N D"]) -> Float[Array, "M D"]:
    """x, or a single 16-bit row twice on CPUs: XLA's product of one reads weights at 1 GB/s, that
    of two at 12."""
    alone = len(x) == 1 and x.dtype.itemsize == 2 and jax.default_backend() == "cpu"
    return jnp.broadcast_to(x, (2, x.shape[1])) if alone else x


_native = contextvars.ContextVar("native_products", default=False)


@contextlib.contextmanager
def with_native_products(on: bool) -> Iterator[None]:
    """Products of few rows are those of `lm.native` in programs traced within, if there is a CPU.

    For decoding with whole weights on one CPU: they have no gradient, and would move the weights
    that lie on several devices. JAX keeps programs by their arguments: one that was traced within
    is used outside as well, if those are of the same type.
    """
    token = _native.set(on and jax.default_backend() == "cpu")
    try:
        yield
    finally:
        _native.reset(token)


def native_products() -> bool:
    """Whether the caller is within `with_native_products`."""
    return _native.get()


def _matmul_fwd(x, w):
    return _matmul(x, w), (x, w)


def _matmul_bwd(residuals, g):
    x, w = residuals
    dx = jax.lax.platform_dependent(
        g,
        w.astype(x.dtype),
        cpu=_input_gradient_cpu,
        default=lambda g, w: jax.lax.dot(g, w.T),
    )
    dw = jax.lax.platform_dependent(
        x,
        g,
        cpu=_weight_gradient_cpu,
        default=lambda x, g: _dot_f32(x.T, g),
    )
    return dx, dw.astype(w.dtype)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _input_gradient_cpu(g, w):
    return jax.lax.dot(g, w.T if g.dtype == jnp.float32 else _row_major(w.T))


def _weight_gradient_cpu(x, g):
    # The smaller operand is the one to transpose: XLA:CPU copies a [4096, 1024] transpose at under
    # 1 GB/s. The barrier keeps it from turning the product around again.
    if x.shape[1] > g.shape[1]:
        return jax.lax.optimization_barrier(_dot_f32(_row_major(g.T), x)).T
    return _dot_f32(x.T if x.dtype == jnp.float32 else _row_major(x.T), g)


def _dot_f32(a, b):
    return jax.lax.dot(a, b, preferred_element_type=jnp.float32)


def _row_major(x):
    return with_layout_constraint(x, Layout((0, 1)))


class Linear(nnx.Module):
    """y = x w + b: holds a kernel [D, F] (stacked: [L, D, F]) and, if asked for, a bias [F]."""

    def __init__(
        self,
        key: jax.Array,
        name: str,
        d_in: int,
        d_out: int,
        axes: tuple[str, str],
        *,
        std: float,
        bias: bool = False,
        dtype: str,
        stack: Stack = SINGLE,
    ):
        self.name = name
        self.kernel = normal(key, (d_in, d_out), axes, std=std, dtype=dtype, stack=stack)
        if bias:
            self.bias = constant(0.0, (d_out,), axes[1:], dtype=dtype, stack=stack)
        self.has_bias = bias
        self.has_adapter = False  # see lm.layers.adapters.attach

    def __call__(self, x: jax.Array, plug: Plug | None = None, layer=None) -> jax.Array:
        """x: [..., D] -> [..., F]. `plug` and `layer` choose the product (see `Plug`)."""
        y = linear(x, self.kernel[...], plug(Site(self.name, layer)) if plug else None)
        # The name lets a rematerialization policy keep exactly the products (lm/model.py).
        y = checkpoint_name(y, "linear")
        if self.has_adapter:
            y = y + self.adapter(x)
        if not self.has_bias:
            return y
        return y + jax.lax.broadcast_in_dim(self.bias[...].astype(y.dtype), y.shape, (y.ndim - 1,))
