"""Branches whose back-propagation is left out while their forward pass goes on.

A residual branch y = f(x) that is inactive gets neither weight gradients nor an input gradient:
the residual path alone carries the signal (modular adaptive training, arXiv 2405.07527). With a
branch's forward pass costing 1 and its backward pass 2, an inactive one costs a third.

Flags that are traced choose at run time (`lax.cond`, `lax.switch`): one compiled step serves every
choice, and what is not chosen is not executed. NumPy flags choose while tracing: the program then
holds only what is active, which is how FLOPs are counted.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

HEAD_BUCKETS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of a layer's heads for which a backward pass is compiled; others are rounded up."""


def is_static(flags: Any) -> bool:
    """Whether flags are known while tracing."""
    return isinstance(flags, (np.ndarray, np.bool_))


def gate(fn, active, inputs, *context):
    """fn(inputs, *context), whose gradient with respect to `inputs` is zero unless `active`.

    Args:
      fn: pure function of pytrees.
      active: bool []; NumPy or traced.
      inputs: pytree that gradients flow into.
      context: what gradients do not flow into (positions, segment ids, a layer's index).
    """
    if is_static(active):
        if active:
            return fn(inputs, *context)
        return fn(jax.lax.stop_gradient(inputs), *context)
    return _gate(fn, active, inputs, context)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gate(fn, active, inputs, context):
    return fn(inputs, *context)


def _gate_fwd(fn, active, inputs, context):
    y, pull = jax.vjp(lambda inputs: fn(inputs, *context), inputs)
    return y, (active, pull, inputs)


def _gate_bwd(fn, residuals, g):
    active, pull, inputs = residuals
    zeros = lambda g: jax.tree.map(jnp.zeros_like, inputs)  # noqa: E731
    return None, jax.lax.cond(active, lambda g: pull(g)[0], zeros, g), None


_gate.defvjp(_gate_fwd, _gate_bwd)


def bucket_sizes(groups: int) -> tuple[int, ...]:
    """How many of `groups` heads the compiled backward passes cover."""
    return tuple(sorted({int(np.ceil(share * groups)) for share in HEAD_BUCKETS}))


def gathered(stages, active, weights, x, context):
    """A sum over heads whose backward pass covers only the active ones.

        q, k, v = project(weights, x);  o = attend(q, k, v);  y = out(weights, o)

    The backward pass gathers weights, q, k, v and o of the active heads into the next bucket of
    `HEAD_BUCKETS`; the rest of the bucket is filled with inactive heads whose gradients are zero.
    It is exact: gradients do not depend on the bucket. The projections are not recomputed (their
    pull-backs do not need it, except below query and key norms); the attention itself is.

    Args:
      stages: three functions. `project(weights, heads, x, context)` gives q, k, v, each
        [B, T, n, ...] for the n heads with the indices `heads` (None: all); `attend(q, k, v,
        context)` gives o [B, T, n, ...]; `out(weights, heads, o, context)` gives y [B, T, D].
      active: bool [K], for each head (with grouped queries: each key/value head with its queries);
        NumPy or traced.
      weights: pytree that the stages share.
      x: [B, T, D].
      context: pytree of what gradients do not flow into.
    """
    if is_static(active):
        counts = (min(n for n in bucket_sizes(len(active)) if n >= np.sum(active)),)
        active = jnp.asarray(active)
    else:
        counts = bucket_sizes(active.shape[0])
    return _gathered(stages, counts, active, weights, x, context)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(stages, counts, active, weights, x, context):
    return _gathered_fwd(stages, counts, active, weights, x, context)[0]


def _gathered_fwd(stages, counts, active, weights, x, context):
    project, attend, out = stages
    q, k, v = project(weights, None, x, context)
    o = attend(q, k, v, context)
    return out(weights, None, o, context), (active, weights, x, q, k, v, o, context)


def _gathered_bwd(stages, counts, residuals, g):
    active, weights, x, q, k, v, o, context = residuals
    project, attend, out = stages
    order = jnp.argsort(~active, stable=True)  # active heads first

    def backward(count, g):
        if not count:
            return jax.tree.map(jnp.zeros_like, (weights, x))
        heads = order[:count]
        kept = active[heads]

        def masked(leaf):
            return jnp.where(kept.reshape(1, 1, -1, *[1] * (leaf.ndim - 3)), leaf, 0)

        q_n, k_n, v_n, o_n = (jnp.take(a, heads, axis=2) for a in (q, k, v, o))
        _, pull_out = jax.vjp(lambda w, o: out(w, heads, o, context), weights, masked(o_n))
        d_out, d_o = pull_out(g)
        _, pull_attend = jax.vjp(lambda q, k, v: attend(q, k, v, context), q_n, k_n, v_n)
        # An inactive head in the bucket has no output gradient, and so none of anything before it.
        d_qkv = pull_attend(masked(d_o))
        _, pull_project = jax.vjp(lambda w, x: project(w, heads, x, context), weights, x)
        d_project, d_x = pull_project(d_qkv)
        return jax.tree.map(jnp.add, d_out, d_project), d_x

    branches = [functools.partial(backward, count) for count in counts]
    if len(branches) == 1:
        gradients = branches[0](g)
    else:
        bucket = jnp.searchsorted(jnp.array(counts), jnp.sum(active))
        gradients = jax.lax.switch(bucket, branches, g)
    return None, *gradients, None


_gathered.defvjp(_gathered_fwd, _gathered_bwd)
