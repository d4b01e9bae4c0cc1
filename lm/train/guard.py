"""Throwing away the update of a step that is not finite or whose loss or gradient spikes.

The decision is made inside the compiled step, from statistics that live in the training state:
nothing travels to the host, and a resumed run decides as the uninterrupted one would have.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lm.train.config import GuardConfig


class GuardState(NamedTuple):
    """Statistics of the accepted steps."""

    losses: Float[Array, " window"]
    grad_norms: Float[Array, " window"]
    accepted: Int[Array, ""]
    skipped: Int[Array, ""]
    consecutive: Int[Array, ""]
    """Steps skipped since the last accepted one."""


def init_guard(config: GuardConfig) -> GuardState:
    """Statistics before the first step."""
    return GuardState(
        losses=jnp.zeros(config.window, jnp.float32),
        grad_norms=jnp.zeros(config.window, jnp.float32),
        accepted=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        consecutive=jnp.zeros((), jnp.int32),
    )


def judge(
    config: GuardConfig, state: GuardState, loss: Float[Array, ""], grad_norm: Float[Array, ""]
) -> tuple[Bool[Array, ""], GuardState]:
    """Whether to accept a step, and the statistics after it.

    A step is refused if its loss or gradient norm is not finite, or, once a quarter of the window
    is filled, if either exceeds mean + spike_sigma * std of the accepted steps in the window. Both
    are compared on a log scale: norms are heavy-tailed, and a run may start from any loss.
    """
    filled = jnp.minimum(state.accepted, config.window)
    ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if config.spike_sigma:
        known = jnp.arange(config.window) < filled
        ready = filled >= config.window // 4
        for value, history in ((loss, state.losses), (grad_norm, state.grad_norms)):
            ok &= ~ready | (_log(value) <= _limit(_log(history), known, filled, config))
    slot = state.accepted % config.window
    return ok, GuardState(
        losses=state.losses.at[slot].set(jnp.where(ok, loss, state.losses[slot])),
        grad_norms=state.grad_norms.at[slot].set(jnp.where(ok, grad_norm, state.grad_norms[slot])),
        accepted=state.accepted + ok,
        skipped=state.skipped + ~ok,
        consecutive=jnp.where(ok, 0, state.consecutive + 1),
    )


def _log(x):
    return jnp.log(jnp.maximum(x, 1e-12))


def _limit(history, known, filled, config: GuardConfig):
    count = jnp.maximum(filled, 1)
    mean = jnp.sum(jnp.where(known, history, 0.0)) / count
    variance = jnp.sum(jnp.where(known, jnp.square(history - mean), 0.0)) / count
    # A run that has converged has next to no spread: let 1 % pass in any case.
    return mean + config.spike_sigma * jnp.sqrt(variance) + 0.01
