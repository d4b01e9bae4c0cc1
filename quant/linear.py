"""y = x w with three quantized products: the function under every `quant.dot_general`."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from quant.diagnostics import measure
from quant.matmul import dot
from quant.native import Implementation, paths
from quant.operands import Parts, Side, basis_of, prepare, role_key, skinny, take_out
from quant.product import product
from quant.recipe import Recipe
from quant.rounding import Seed

Bases = dict[str, jax.Array]
"""Kept bases by tensor: "x" [m, k], "w" [n, k], "d" [n, k], float32; all zero before the first."""


class Extras(NamedTuple):
    """What a product is told besides its operands; None where it does not apply."""

    key: Seed | None = None
    bases: Bases | None = None
    refresh: jax.Array | None = None
    """Whether to find new bases now (bool scalar)."""
    enabled: jax.Array | None = None
    """Whether to quantize at all (bool scalar)."""
    probe: jax.Array | None = None
    """float32 zeros [len(quant.diagnostics.NAMES)]; its gradient is the measurement."""


class Options(NamedTuple):
    """What is static in a product, besides its recipe."""

    dtype: Any = None
    """Of the result; None: that of x."""
    implementation: Implementation | None = None
    """See `quant.native.paths`."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def quantized_matmul(
    recipe: Recipe, x: jax.Array, w: jax.Array, extras: Extras, options: Options
) -> jax.Array:
    """x [l, m] times w [m, n].

    The gradients of `extras.bases` and `extras.probe` are not gradients: they are the new bases,
    and what was measured. That is how a function without side effects hands them out of a backward
    pass (as Flax's FP8 scales do).
    """
    return _forward(recipe, x, w, extras, options)[0]


def _forward(recipe: Recipe, x: jax.Array, w: jax.Array, extras: Extras, options: Options):
    dtype = options.dtype or x.dtype
    bases = {
        name: _basis(recipe, name, tensor, extras, _columns(recipe, name, x, w))
        for name, tensor in (("x", x), ("w", w))
    }
    quantized = lambda: _fprop(recipe, x, w, extras.key, bases, options).astype(dtype)  # noqa: E731
    if extras.enabled is None:
        return quantized(), bases
    plain = lambda: dot(x, w.astype(x.dtype), 1, 0).astype(dtype)  # noqa: E731
    return lax.cond(extras.enabled, quantized, plain), bases


def _columns(recipe: Recipe, name: str, x: jax.Array, w: jax.Array) -> int:
    shape = {"x": x.shape, "w": w.shape, "d": (len(x), w.shape[1])}[name]
    return recipe.low_rank.columns(*shape) if recipe.low_rank else 0


def _basis(recipe: Recipe, name: str, tensor: jax.Array, extras: Extras, rank: int) -> Any:
    kept = None if extras.bases is None else extras.bases.get(name)
    if kept is None:
        return basis_of(recipe, name, tensor, extras.key, rank)
    if recipe.low_rank is None:  # switched off: what was kept stays
        return kept
    # Nothing was kept yet where all is zero, as at the first step of a run that starts anywhere.
    first = jnp.logical_not(jnp.any(kept))
    refresh = first if extras.refresh is None else first | extras.refresh
    rank = kept.shape[1]
    return lax.cond(refresh, lambda: basis_of(recipe, name, tensor, extras.key, rank), lambda: kept)


def _fprop(recipe: Recipe, x, w, key, bases, options: Options) -> jax.Array:
    native = paths(recipe, options.implementation)["fprop"] == "native"
    parts_x = take_out(recipe, "x", x, recipe.fprop_x, key, bases["x"])
    parts_w = take_out(recipe, "w", _like(w, x, recipe.fprop_w), recipe.fprop_w, key, bases["w"])
    signs = role_key(key, "fprop.signs")
    a = prepare(recipe, "fprop_x", parts_x, 1, key, signs, native)
    b = prepare(recipe, "fprop_w", parts_w, 0, key, signs, native)
    return product(a, b, cross_terms=True, mean_row=_mean_row(recipe, parts_x, w, 0))


def _mean_row(recipe: Recipe, parts: Parts, w: jax.Array, axis: int) -> jax.Array | None:
    """The mean times the unquantized weights, contracted along `axis`, where that is asked for."""
    if recipe.mean is None or recipe.mean.weight != "high" or parts.mean is None:
        return None
    return skinny(parts.mean[None], Side(w, None, axis, None, None, None, None))[0]


def _fwd(recipe: Recipe, x: jax.Array, w: jax.Array, extras: Extras, options: Options):
    y, bases = _forward(recipe, x, w, extras, options)
    return y, (x, w, bases, extras)


def _bwd(recipe: Recipe, options: Options, residuals, d: jax.Array):
    x, w, bases, extras = residuals
    bases = dict(bases, d=_basis(recipe, "d", d, extras, _columns(recipe, "d", x, w)))
    quantized = lambda: _gradients(recipe, x, w, d, extras.key, bases, options)  # noqa: E731
    if extras.enabled is None:
        dx, dw = quantized()
    else:
        plain = lambda: (  # noqa: E731
            dot(d, w.astype(d.dtype), 1, 1).astype(x.dtype),
            dot(x, d, 0, 0).astype(w.dtype),
        )
        dx, dw = lax.cond(extras.enabled, quantized, plain)
    out = Extras(
        bases=None if extras.bases is None else {name: bases[name] for name in extras.bases},
        probe=None if extras.probe is None else measure(recipe, x, w, d, extras.key, bases),
    )
    return dx, dw, out


def _gradients(recipe: Recipe, x, w, d, key, bases, options) -> tuple[jax.Array, jax.Array]:
    native = {k: path == "native" for k, path in paths(recipe, options.implementation).items()}
    parts_d = take_out(recipe, "d", d, recipe.dgrad_d or recipe.wgrad_d, key, bases["d"])
    parts_w = take_out(recipe, "w", _like(w, d, recipe.dgrad_w), recipe.dgrad_w, key, bases["w"])
    signs = role_key(key, "dgrad.signs")
    whole = _unless(recipe.dgrad_d, parts_d, d)
    a = prepare(recipe, "dgrad_d", whole, 1, key, signs, native["dgrad"])
    # Contracted along n: the factors of w change places, and so does the axis.
    b = prepare(recipe, "dgrad_w", parts_w, 1, key, signs, native["dgrad"])
    mean_row = _mean_row(recipe, whole, w, 1)
    dx = product(a, b, cross_terms=True, mean_row=mean_row).astype(x.dtype)
    # One product after the other: both sets of quantized operands at once would cost memory.
    if recipe.operands:
        dx, x, d, parts_d = lax.optimization_barrier((dx, x, d, parts_d))

    parts_x = take_out(recipe, "x", x, recipe.wgrad_x, key, bases["x"])
    signs = role_key(key, "wgrad.signs")
    whole = _unless(recipe.wgrad_d, parts_d, d)
    a = prepare(recipe, "wgrad_x", parts_x, 0, key, signs, native["wgrad"])
    b = prepare(recipe, "wgrad_d", whole, 0, key, signs, native["wgrad"])
    cross = recipe.mean is not None and recipe.mean.cross_terms
    return dx, product(a, b, cross_terms=cross).astype(w.dtype)


def _like(w: jax.Array, x: jax.Array, operand) -> jax.Array:
    """Weights that are not quantized are multiplied in the dtype of the other operand."""
    return w.astype(x.dtype) if operand is None else w


def _unless(operand, parts: Parts, whole: jax.Array) -> Parts:
    return Parts(whole, None, None, None) if operand is None else parts


quantized_matmul.defvjp(_fwd, _bwd)
