"""Attention for short rows in plain XLA: a few query blocks, each against the keys it can see.

Splitting T queries into n blocks and giving block i only the keys up to its end skips
(1 - 1/n) / 2 of all products under a causal mask. The backward pass computes the probabilities
anew from the saved log-sum-exp (Dao et al., arXiv 2205.14135, algorithm 4), which on a CPU is as
fast as reading them back and leaves nothing of size T x S between the passes.

Every product is written so that no large operand has to be transposed: gradients of keys and
values come out as [H, S] from small transposed copies of the queries and of the output gradient,
because XLA:CPU has no fast kernel for a product that contracts the first axis of its left operand.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from lm.layers.attention_common import (
    CHECKPOINT_NAME,
    Spec,
    contiguous,
    finite,
    gather,
    log2_sum,
    masked,
    places,
    product,
    reciprocal,
    scaled,
    scatter,
    slope,
    visible,
)

QUERY_BLOCKS = 4
MIN_BLOCK = 64


def _plan(spec: Spec, length: int, kv_length: int) -> list[tuple[int, int, int, int]]:
    """(first query, last + 1, first key, last + 1) of each block."""
    if not spec.causal or length != kv_length or spec.context > 1:
        return [(0, length, 0, kv_length)]
    block = max(MIN_BLOCK, -(-length // QUERY_BLOCKS))
    plan = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first_key = 0 if spec.window is None else max(0, start - spec.window + 1)
        plan.append((start, stop, first_key // block * block, stop))
    return plan


def _mask(spec, block, indices, q_segments, kv_segments):
    start, stop, key_start, key_stop = block
    if q_segments is not None:
        q_segments, kv_segments = q_segments[:, start:stop], kv_segments[:, key_start:key_stop]
    rows, columns = indices[0][start:stop], indices[1][key_start:key_stop]
    return visible(spec, rows, columns, q_segments, kv_segments)


def _heads(x: Array, kv_heads: int) -> Array:
    """[B, T, N, H] -> [B, K, G, T, H]."""
    batch, length, heads, width = x.shape
    split = x.reshape(batch, length, kv_heads, heads // kv_heads, width)
    return contiguous(split.transpose(0, 2, 3, 1, 4))


def _heads_transposed(x: Array, kv_heads: int) -> Array:
    """[B, T, N, H] -> [B, K, H, G, T]."""
    batch, length, heads, width = x.shape
    split = x.reshape(batch, length, kv_heads, heads // kv_heads, width)
    return contiguous(split.transpose(0, 2, 4, 3, 1))


def _rows(x: Array, start: int, stop: int) -> Array:
    """Queries start..stop of [B, K, G, T, H] as [B, K, G * t, H]."""
    batch, kv_heads, group, _, width = x.shape
    return x[:, :, :, start:stop].reshape(batch, kv_heads, group * (stop - start), width)


def _columns(x: Array, start: int, stop: int) -> Array:
    """Queries start..stop of [B, K, H, G, T] as [B, K, H, G * t]."""
    batch, kv_heads, width, group, _ = x.shape
    return x[..., start:stop].reshape(batch, kv_heads, width, group * (stop - start))


def _merge(blocks: list[Array], group: int, dtype) -> Array:
    """Blocks [B, K, G * t, H] -> [B, T, N, H]."""
    batch, kv_heads, _, width = blocks[0].shape
    parts = [x.astype(dtype).reshape(batch, kv_heads, group, -1, width) for x in blocks]
    out = jnp.concatenate(parts, axis=3).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, -1, kv_heads * group, width)


def _forward(spec, q, k, v, q_segments, kv_segments):
    kv_heads = k.shape[2]
    group = q.shape[2] // kv_heads
    queries = _heads(q, kv_heads)
    k, v = gather(spec, k, v)
    keys, values = (contiguous(x.transpose(0, 2, 1, 3)) for x in (k, v))
    indices = places(spec, q.shape[1], k.shape[1])
    outs, sums = [], []
    for block in _plan(spec, q.shape[1], k.shape[1]):
        start, stop, key_start, key_stop = block
        mask = _mask(spec, block, indices, q_segments, kv_segments)
        scores = product(_rows(queries, start, stop), keys[:, :, key_start:key_stop], (3, 3))
        scores = masked(scaled(spec, scores), mask)
        maximum = finite(scores.max(-1, keepdims=True))
        weights = jnp.exp2(scores - maximum)
        total = weights.sum(-1, keepdims=True)
        out = product(weights.astype(v.dtype), values[:, :, key_start:key_stop], (3, 2))
        outs.append(out * reciprocal(total))
        sums.append(log2_sum(maximum, total))
    out = checkpoint_name(_merge(outs, group, q.dtype), CHECKPOINT_NAME)
    return out, [checkpoint_name(x, CHECKPOINT_NAME) for x in sums]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense(spec, q, k, v, q_segments, kv_segments):
    return _forward(spec, q, k, v, q_segments, kv_segments)[0]


def _dense_fwd(spec, q, k, v, q_segments, kv_segments):
    out, sums = _forward(spec, q, k, v, q_segments, kv_segments)
    return out, (q, k, v, q_segments, kv_segments, out, sums)


def _dense_bwd(spec, residuals, grad):
    q, k, v, q_segments, kv_segments, out, sums = residuals
    kv_heads = k.shape[2]
    group = q.shape[2] // kv_heads
    queries, queries_t = _heads(q, kv_heads), _heads_transposed(q, kv_heads)
    grads, grads_t = _heads(grad, kv_heads), _heads_transposed(grad, kv_heads)
    k, v = gather(spec, k, v)
    keys, values = (contiguous(x.transpose(0, 2, 1, 3)) for x in (k, v))
    indices = places(spec, q.shape[1], k.shape[1])
    # sum_s P dP of a row equals its dO . O (arXiv 2205.14135, appendix B.2).
    delta = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    delta = _heads(delta, kv_heads)
    plan = _plan(spec, q.shape[1], k.shape[1])
    edges = [start for start, *_ in plan] + [k.shape[1]]
    dq, dk, dv = [], [None] * len(plan), [None] * len(plan)
    for block, log_sum in zip(plan, sums, strict=True):
        start, stop, key_start, key_stop = block
        block_k, block_v = keys[:, :, key_start:key_stop], values[:, :, key_start:key_stop]
        mask = _mask(spec, block, indices, q_segments, kv_segments)
        scores = scaled(spec, product(_rows(queries, start, stop), block_k, (3, 3)))
        weights = jnp.exp2(masked(scores - log_sum, mask))
        dweights = product(_rows(grads, start, stop), block_v, (3, 3))
        dscores = weights * (dweights - _rows(delta, start, stop)) * slope(spec, scores)
        weights, dscores = weights.astype(q.dtype), dscores.astype(q.dtype)
        dq.append(product(dscores, block_k, (3, 2)))
        dk_t = product(_columns(queries_t, start, stop), dscores, (3, 2))
        dv_t = product(_columns(grads_t, start, stop), weights, (3, 2))
        for j, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
            if key_start <= low < key_stop:
                part = slice(low - key_start, high - key_start)
                dk[j] = dk_t[..., part] if dk[j] is None else dk[j] + dk_t[..., part]
                dv[j] = dv_t[..., part] if dv[j] is None else dv[j] + dv_t[..., part]
    dk, dv = (
        jnp.concatenate(parts, axis=3).astype(x.dtype).transpose(0, 3, 1, 2)
        for parts, x in ((dk, k), (dv, v))
    )
    return _merge(dq, group, q.dtype), *scatter(spec, dk, dv), None, None


_dense.defvjp(_dense_fwd, _dense_bwd)


def dense(spec: Spec, q, k, v, q_segments, kv_segments) -> Array:
    """Attention whose temporaries grow as T x S: the fastest in XLA for rows up to about 512.

    Args as `lm.layers.attention.attention`, checked there.
    """
    return _dense(spec, q, k, v, q_segments, kv_segments)
