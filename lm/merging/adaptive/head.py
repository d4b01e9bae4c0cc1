"""Entropies of predictions without their logits: the head is multiplied some words at a time.

For the states z_p behind the final norm, the head W and y_pv = cap(z_p . w_v)

    log Z_p = log sum_v exp y_pv        H_p = log Z_p - sum_v p_pv y_pv
    dH_p / dy_pv = -p_pv (log p_pv + H_p)

and for the mean prediction m = sum_p share_p p_p of a task, with M = -sum_v m_v log m_v

    dM / dy_pv = -share_p p_pv (log m_v - sum_u p_pu log m_u)

Three passes over the vocabulary: the sums, the mean prediction, and the gradient, which is added up
in the dtype of W. None holds more than the logits of `chunk` words, nor a copy of W.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

__all__ = ["CHUNK", "Head", "head_entropies"]

CHUNK = 8192
"""Words whose logits exist at a time."""


class Head(NamedTuple):
    """How states become predictions that count; hashable, but for its arrays."""

    rows: bool
    """W is [V, D], as an embedding, and not [D, V]."""
    cap: float | None = None
    """`ModelConfig.logit_soft_cap`."""
    chunk: int = CHUNK


def head_entropies(
    head: Head,
    w: Float[Array, "..."],
    z: Float[Array, "P D"],
    task: Int[Array, " P"],
    share: Float[Array, " P"],
    allowed: Bool[Array, "K V"],
) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
    """(entropy, marginal entropy) of every task, in nats.

    Args:
      head, w: the head.
      z: states of the predictions.
      task: of each, below K.
      share: weight of each in its task's mean; 0 for those that do not count.
      allowed: words that each task compares.
    """
    entropies, marginal = _entropies(head, w, z, task, share, allowed)
    return jnp.zeros(len(allowed)).at[task].add(entropies * share), marginal


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _entropies(head: Head, w, z, task, share, allowed):
    return _forward(head, w, z, task, share, allowed)[0]


def _forward(head: Head, w, z, task, share, allowed):
    count, size = len(z), allowed.shape[1]

    def sums(i, carry):
        top, total, dot = carry
        y, inside = _logits(head, w, z, task, allowed, i)
        new = jnp.maximum(top, jnp.max(jnp.where(inside, y, -jnp.inf), 1))
        shift = jnp.where(jnp.isfinite(new), new, 0.0)
        e = jnp.where(inside, jnp.exp(y - shift[:, None]), 0.0)
        old = jnp.where(jnp.isfinite(top), jnp.exp(top - shift), 0.0)
        return new, total * old + e.sum(1), dot * old + (e * jnp.where(inside, y, 0.0)).sum(1)

    start = jnp.full(count, -jnp.inf), jnp.zeros(count), jnp.zeros(count)
    top, total, dot = jax.lax.fori_loop(0, _chunks(head, size), sums, start)
    log_z = top + jnp.log(total)
    entropies = log_z - dot / total

    def marginals(i, carry):
        found, cross = carry
        y, inside = _logits(head, w, z, task, allowed, i)
        p = jnp.where(inside, jnp.exp(y - log_z[:, None]), 0.0)
        mean, log_mean = _mean(p, task, share, len(allowed))
        return found - jnp.sum(mean * log_mean, 1), cross + jnp.sum(p * log_mean[task], 1)

    start = jnp.zeros(len(allowed)), jnp.zeros(count)
    marginal, cross = jax.lax.fori_loop(0, _chunks(head, size), marginals, start)
    return (entropies, marginal), (w, z, task, share, allowed, log_z, entropies, cross)


def _mean(p, task, share, tasks: int):
    """Mean prediction of every task [K, C], and its logarithm."""
    mean = jnp.zeros((tasks, p.shape[1])).at[task].add(p * share[:, None])
    return mean, jnp.log(jnp.maximum(mean, 1e-30))


def _backward(head: Head, residuals, gradients):
    w, z, task, share, allowed, log_z, entropies, cross = residuals
    g, axis, size = gradients[0], 0 if head.rows else 1, allowed.shape[1]
    g_marginal = (gradients[1][task] * share)[:, None]

    def step(i, carry):
        dz, dw = carry
        y, inside = _logits(head, w, z, task, allowed, i)
        log_p = jnp.where(inside, y - log_z[:, None], 0.0)
        p = jnp.where(inside, jnp.exp(log_p), 0.0)
        log_mean = _mean(p, task, share, len(allowed))[1][task]
        dy = -p * (log_p + entropies[:, None]) * g[:, None]
        dy = dy - p * (log_mean - cross[:, None]) * g_marginal
        if head.cap is not None:
            dy = dy * (1 - jnp.square(y / head.cap))
        dy = dy.astype(z.dtype)
        at, width = _place(head, size, i)
        part = jax.lax.dynamic_slice_in_dim(w, at, width, axis).astype(z.dtype)
        dz = dz + _dot(dy, part, 1, axis)
        new = _dot(dy, z, 0, 0) if head.rows else _dot(z, dy, 0, 0)
        # The last chunk may reach back over words of the one before, which add nothing again.
        new = new.astype(dw.dtype) + jax.lax.dynamic_slice_in_dim(dw, at, width, axis)
        return dz, jax.lax.dynamic_update_slice_in_dim(dw, new, at, axis)

    start = jnp.zeros(z.shape, jnp.float32), jnp.zeros_like(w)
    dz, dw = jax.lax.fori_loop(0, _chunks(head, size), step, start)
    return dw, dz.astype(z.dtype), None, None, None


_entropies.defvjp(_forward, _backward)


def _chunks(head: Head, size: int) -> int:
    return -(-size // head.chunk)


def _place(head: Head, size: int, i):
    """Where chunk i begins, and its width; the last one ends with the vocabulary."""
    width = min(head.chunk, size)
    return jnp.minimum(i * width, size - width), width


def _logits(head: Head, w, z, task, allowed, i):
    """(y [P, C] f32, which of them are compared) of a chunk."""
    axis, size = 0 if head.rows else 1, allowed.shape[1]
    at, width = _place(head, size, i)
    part = jax.lax.dynamic_slice_in_dim(w, at, width, axis).astype(z.dtype)
    y = _dot(z, part, 1, 1 - axis)
    y = y if head.cap is None else head.cap * jnp.tanh(y / head.cap)
    fresh = at + jnp.arange(width) >= i * width
    inside = jax.lax.dynamic_slice_in_dim(allowed, at, width, 1)[task]
    return y, inside & fresh[None]


def _dot(a, b, axis_a: int, axis_b: int):
    return jax.lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32
    )
