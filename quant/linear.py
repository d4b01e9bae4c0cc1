"""y = x w with three quantized products: the function under every `quant.dot_general`."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from quant.diagnostics import measure
from quant.operands import Parts, basis_of, prepare, role_key, take_out
from quant.product import dot, product
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def quantized_matmul(recipe: Recipe, x: jax.Array, w: jax.Array, extras: Extras) -> jax.Array:
    """x [l, m] times w [m, n], in the dtype of x.

    The gradients of `extras.bases` and `extras.probe` are not gradients: they are the new bases,
    and what was measured. That is how a function without side effects hands them out of a backward
    pass (as Flax's FP8 scales do).
    """
    return _forward(recipe, x, w, extras)[0]


def _forward(recipe: Recipe, x: jax.Array, w: jax.Array, extras: Extras):
    bases = {
        name: _basis(recipe, name, tensor, extras, _columns(recipe, name, x, w))
        for name, tensor in (("x", x), ("w", w))
    }
    if extras.enabled is None:
        return _fprop(recipe, x, w, extras.key, bases), bases
    return lax.cond(
        extras.enabled,
        lambda: _fprop(recipe, x, w, extras.key, bases),
        lambda: dot(x, w, 1, 0).astype(x.dtype),
    ), bases


def _columns(recipe: Recipe, name: str, x: jax.Array, w: jax.Array) -> int:
    shape = {"x": x.shape, "w": w.shape, "d": (len(x), w.shape[1])}[name]
    return recipe.low_rank.columns(*shape) if recipe.low_rank else 0


def _basis(recipe: Recipe, name: str, tensor: jax.Array, extras: Extras, rank: int) -> Any:
    kept = None if extras.bases is None else extras.bases.get(name)
    if kept is None:
        return basis_of(recipe, name, tensor, extras.key, rank)
    # Nothing was kept yet where all is zero, as at the first step of a run that starts anywhere.
    first = jnp.logical_not(jnp.any(kept))
    refresh = first if extras.refresh is None else first | extras.refresh
    rank = kept.shape[1]
    return lax.cond(refresh, lambda: basis_of(recipe, name, tensor, extras.key, rank), lambda: kept)


def _fprop(recipe: Recipe, x, w, key, bases) -> jax.Array:
    parts_x = take_out(recipe, "x", x, recipe.fprop_x, key, bases["x"])
    parts_w = take_out(recipe, "w", w, recipe.fprop_w, key, bases["w"])
    signs = role_key(key, "fprop.signs")
    a = prepare(recipe, "fprop_x", parts_x, 1, key, signs)
    b = prepare(recipe, "fprop_w", parts_w, 0, key, signs)
    return product(a, b, cross_terms=True, exact_b=_exact(recipe, w)).astype(x.dtype)


def _exact(recipe: Recipe, w: jax.Array) -> jax.Array | None:
    return w if recipe.mean is not None and recipe.mean.weight == "high" else None


def _fwd(recipe: Recipe, x: jax.Array, w: jax.Array, extras: Extras):
    y, bases = _forward(recipe, x, w, extras)
    return y, (x, w, bases, extras)


def _bwd(recipe: Recipe, residuals, d: jax.Array):
    x, w, bases, extras = residuals
    bases = dict(bases, d=_basis(recipe, "d", d, extras, _columns(recipe, "d", x, w)))
    quantized = lambda: _gradients(recipe, x, w, d, extras.key, bases)  # noqa: E731
    if extras.enabled is None:
        dx, dw = quantized()
    else:
        plain = lambda: (  # noqa: E731
            dot(d, w, 1, 1).astype(x.dtype),
            dot(x, d, 0, 0).astype(w.dtype),
        )
        dx, dw = lax.cond(extras.enabled, quantized, plain)
    out = Extras(
        bases=None if extras.bases is None else {name: bases[name] for name in extras.bases},
        probe=None if extras.probe is None else measure(recipe, x, w, d, extras.key, bases),
    )
    return dx, dw, out


def _gradients(recipe: Recipe, x, w, d, key, bases) -> tuple[jax.Array, jax.Array]:
    parts_d = take_out(recipe, "d", d, recipe.dgrad_d or recipe.wgrad_d, key, bases["d"])
    parts_w = take_out(recipe, "w", w, recipe.dgrad_w, key, bases["w"])
    signs = role_key(key, "dgrad.signs")
    a = prepare(recipe, "dgrad_d", _unless(recipe.dgrad_d, parts_d, d), 1, key, signs)
    # Contracted along n: the factors of w change places, and so does the axis.
    b = prepare(recipe, "dgrad_w", parts_w, 1, key, signs)
    dx = product(a, b, cross_terms=True, exact_b=_exact(recipe, w)).astype(x.dtype)

    parts_x = take_out(recipe, "x", x, recipe.wgrad_x, key, bases["x"])
    signs = role_key(key, "wgrad.signs")
    a = prepare(recipe, "wgrad_x", parts_x, 0, key, signs)
    b = prepare(recipe, "wgrad_d", _unless(recipe.wgrad_d, parts_d, d), 0, key, signs)
    cross = recipe.mean is not None and recipe.mean.cross_terms
    return dx, product(a, b, cross_terms=cross).astype(w.dtype)


def _unless(operand, parts: Parts, whole: jax.Array) -> Parts:
    return Parts(whole, None, None, None) if operand is None else parts


quantized_matmul.defvjp(_fwd, _bwd)
