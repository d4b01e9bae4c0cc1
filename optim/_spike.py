"""The arithmetic of Spectra on stacks of matrices [..., rows, columns]."""

import math

import jax
import jax.numpy as jnp

from optim._orthogonal import HIGHEST, or_nan, orthonormalize, unit_columns

RMS = 0.2
"""Root mean square of an update before the learning rate: about AdamW's, so that one learning rate
serves both (arXiv 2502.16982, section 2.2)."""
TINY = 1e-30


def shape_spike(m, v, first, *, power_iters, init_iters, eps, auto, min_rank):
    """The update for momentum `m`, [..., rows, columns], and the next basis, [..., q, k]."""
    eps = jnp.asarray(eps, m.dtype)
    rows, columns = m.shape[-2:]
    q, k = v.shape[-2:]
    # Basis on the shorter side: m v has the longer one.
    to_long = "...ls,...sk->...lk" if rows >= columns else "...sl,...sk->...lk"
    to_short = "...ls,...lk->...sk" if rows >= columns else "...sl,...lk->...sk"
    product = lambda kind, x: jnp.einsum(kind, m, x, precision=HIGHEST)  # noqa: E731
    energy = jnp.sum(jnp.square(m), axis=(-2, -1))

    def sweep(v):
        u, _ = orthonormalize(product(to_long, v))
        w = product(to_short, u)
        unit, s = unit_columns(w)
        # A direction that gave nothing keeps its place, moved by one so that it is a new one.
        used = (s > 0)[..., None, :] | jnp.isnan(w)
        return u, w, jnp.where(used, unit, jnp.roll(v, 1, axis=-2)), unit

    if k == 0:
        sigma = jnp.sqrt(energy / q)
        delta = m
    else:
        iterations = jnp.where(first, max(init_iters, power_iters), power_iters) - 1
        if init_iters > 1 or power_iters > 1:
            v = jax.lax.fori_loop(0, iterations, lambda _, v: sweep(v)[2], v)
        u, w, v, unit = sweep(v)
        lowest = min(min_rank, k) if auto else k
        sigma, spike = level_of_rest(
            energy, jnp.sum(jnp.square(w), axis=-2), q, lowest, rows, columns
        )
        lowered = sigma[..., None, None] * unit - w
        lowered = jnp.where(or_nan(spike, sigma[..., None])[..., None, :], lowered, 0)
        pair = (u, lowered) if rows >= columns else (lowered, u)
        delta = m + jnp.einsum("...rk,...ck->...rc", *pair, precision=HIGHEST)
    # The root mean square of delta is sigma / sqrt(max(rows, columns)).
    longer = math.sqrt(max(rows, columns))
    scale = RMS * longer / (sigma + eps * longer)
    return scale[..., None, None] * delta, v


def normalize(delta, row_nu, column_nu, decay, count):
    """Divide by the factored average of squares, keep the root mean square; and its factors."""
    decay = jnp.asarray(decay, delta.dtype)
    square = jnp.square(delta)
    row_nu = decay * row_nu + (1 - decay) * jnp.mean(square, axis=-1)
    column_nu = decay * column_nu + (1 - decay) * jnp.mean(square, axis=-2)
    rows, columns = (nu / (1 - decay**count) + TINY for nu in (row_nu, column_nu))
    rows = rows / jnp.mean(rows, axis=-1, keepdims=True)
    delta = delta * jax.lax.rsqrt(rows)[..., :, None] * jax.lax.rsqrt(columns)[..., None, :]
    energy = jnp.mean(jnp.square(delta), axis=(-2, -1), keepdims=True)
    return delta * (RMS * jax.lax.rsqrt(energy + TINY)), row_nu, column_nu


def level_of_rest(energy, squares, q, lowest, rows, columns):
    """Which of the k directions are the spike, [..., k], and the level of all others, [...].

    The strongest `lowest` are. Of the others, those that stand above the edge of the spectrum of
    noise, (1 + sqrt(rows / columns)) times its level for rows <= columns (Marchenko and Pastur
    1967), counted from the strongest, the level being that of what is left over each time.
    """
    k = squares.shape[-1]
    strongest = -jnp.sort(-squares, axis=-1)
    # The difference of the energies is exact to eps * energy; below that there is no tail.
    rounding = 4 * jnp.finfo(energy.dtype).eps * energy
    left = jnp.maximum(energy[..., None] - jnp.cumsum(strongest, axis=-1), rounding[..., None])
    left = left / (q - 1 - jnp.arange(k, dtype=energy.dtype)).reshape((1,) * energy.ndim + (k,))
    edge = (1 + math.sqrt(q / max(rows, columns))) ** 2
    position = jnp.arange(k).reshape((1,) * energy.ndim + (k,))
    stands_out = (strongest > edge * left) | (position < lowest)
    count = jnp.sum(jnp.cumprod(stands_out, axis=-1), axis=-1, keepdims=True)
    last = jnp.maximum(count - 1, 0)
    level = jnp.where(count > 0, jnp.take_along_axis(left, last, -1), energy[..., None] / q)
    spike = (squares >= jnp.take_along_axis(strongest, last, -1)) & (count > 0)
    return jnp.sqrt(level)[..., 0], spike
