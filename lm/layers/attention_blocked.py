"""Attention for long rows in plain XLA: memory grows as T + S, never as T x S.

FlashAttention-2 (Dao, arXiv 2307.08691, algorithms 1 and 2) as one `lax.scan` over the pairs
(query block, key block) that the mask leaves: pairs above the causal diagonal or outside of the
sliding window are not in the list, so their products are never computed, and compile time does not
depend on T. Where a row is spread over devices (`Spec.context`), each has a list of its own, of the
same length. The forward pass carries output, running maximum and running sum of every query block
and updates one of them a step; the backward pass carries the three gradients. Both are in place.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from lm.layers.attention_common import (
    CHECKPOINT_NAME,
    CONTEXT,
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
    zigzag,
)

CPU_BLOCK, BLOCK = 256, 512
"""Queries and keys of one block, at most. On CPUs the smaller one keeps the scores in cache."""


def block_size(spec: Spec, length: int, kv_length: int) -> int:
    """The block, or less where a row of that many queries and keys would be mostly padding.

    Blocks end where chunks of `zigzag` do, if those are of 16 tokens or a multiple.
    """
    block = CPU_BLOCK if jax.default_backend() == "cpu" else BLOCK
    longest = max(length, kv_length) if spec.context == 1 else length // 2
    return min(block, -(-longest // 16) * 16)


def block_pairs(spec: Spec, size: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """int32 [pairs, 2]: the (query block, key block) pairs in which some query may see some key.

    rows, columns: where the queries and the keys lie in their row.
    """

    def bounds(places):
        edge = np.pad(places, (0, -len(places) % size), mode="edge").reshape(-1, size)
        return edge.min(1), edge.max(1)

    (first_row, last_row), (first_column, last_column) = bounds(rows), bounds(columns)
    seen = np.ones((len(first_row), len(first_column)), bool)
    if spec.causal:
        seen &= first_column[None] <= last_row[:, None]
    if spec.window is not None:
        seen &= last_column[None] > first_row[:, None] - spec.window
    return np.argwhere(seen).astype(np.int32)


def _pairs(spec: Spec, size: int, q_blocks: int, kv_blocks: int) -> np.ndarray:
    """`block_pairs` of a row in order, transposed."""
    return block_pairs(spec, size, np.arange(q_blocks * size), np.arange(kv_blocks * size)).T


def device_pairs(spec: Spec, size: int, length: int, kv_length: int) -> list[np.ndarray]:
    """`block_pairs` of each device that holds a piece of the row."""
    if spec.context == 1:
        return [_pairs(spec, size, -(-length // size), -(-kv_length // size)).T]
    table = zigzag(spec.context, kv_length)
    return [block_pairs(spec, size, rows, table.reshape(-1)) for rows in table]


def _steps(spec: Spec, size: int, length: int, kv_length: int):
    """Pairs of this device: (query block, key block, whether there is such a pair; None: yes)."""
    lists = device_pairs(spec, size, length, kv_length)
    longest = max(len(pairs) for pairs in lists)
    filled = [np.pad(pairs, ((0, longest - len(pairs)), (0, 0))) for pairs in lists]
    real = np.array([np.arange(longest) < len(pairs) for pairs in lists])
    table, real = jnp.asarray(np.stack(filled)), None if real.all() else jnp.asarray(real)
    me = 0 if spec.context == 1 else jax.lax.axis_index(CONTEXT)
    return table[me, :, 0], table[me, :, 1], None if real is None else real[me]


def _blocks(x: Array, size: int, kv_heads: int) -> Array:
    """[B, T, N, H] -> [blocks, B, K, G * size, H], padded at the end with zeros."""
    batch, length, heads, width = x.shape
    count = -(-length // size)
    x = jnp.pad(x, ((0, 0), (0, count * size - length), (0, 0), (0, 0)))
    x = x.reshape(batch, count, size, kv_heads, heads // kv_heads, width)
    x = x.transpose(1, 0, 3, 4, 2, 5)
    return contiguous(x.reshape(count, batch, kv_heads, -1, width))


def _unblock(x: Array, length: int, heads: int, dtype) -> Array:
    """The inverse of `_blocks`, in `dtype`."""
    count, batch, kv_heads, rows, width = x.shape
    group = heads // kv_heads
    x = x.astype(dtype).reshape(count, batch, kv_heads, group, rows // group, width)
    x = x.transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(batch, -1, heads, width)[:, :length]


def _segment_blocks(ids: Array | None, size: int) -> Array | None:
    """int32 [B, T] -> [blocks, B, size]."""
    if ids is None:
        return None
    batch, length = ids.shape
    count = -(-length // size)
    ids = jnp.pad(ids, ((0, 0), (0, count * size - length)))
    return ids.reshape(batch, count, size).swapaxes(0, 1)


def _index_blocks(spec: Spec, size: int, length: int, kv_length: int):
    """Places in the row of the queries [blocks, size] and of the keys; None: in order."""
    if spec.context == 1:
        return None
    rows, columns = places(spec, length, kv_length)
    rows = jnp.pad(rows, (0, -length % size)).reshape(-1, size)
    columns = np.pad(columns, (0, -kv_length % size), constant_values=kv_length)
    return rows, jnp.asarray(columns.reshape(-1, size))


def _mask(spec, size, kv_length, pair, indices, q_segments, kv_segments):
    """Mask of a block pair; keys that only pad the last block are seen by nobody."""
    i, j, there = pair
    within = jnp.arange(size, dtype=jnp.int32)
    rows, columns = i * size + within, j * size + within
    if indices is not None:
        rows, columns = indices[0][i], indices[1][j]
    if q_segments is not None:
        q_segments, kv_segments = q_segments[i], kv_segments[j]
    mask = visible(spec, rows, columns, q_segments, kv_segments)
    if kv_length % size:
        real = (columns < kv_length)[None, None, :]
        mask = jnp.broadcast_to(real, (1, size, size)) if mask is None else mask & real
    return mask if there is None else mask & there


def _forward(spec, q, k, v, q_segments, kv_segments):
    kv_heads = k.shape[2]
    k, v = gather(spec, k, v)
    lengths = q.shape[1], k.shape[1]
    size = block_size(spec, *lengths)
    indices = _index_blocks(spec, size, *lengths)
    queries = _blocks(q, size, kv_heads)
    keys, values = _blocks(k, size, kv_heads), _blocks(v, size, kv_heads)
    q_ids, kv_ids = _segment_blocks(q_segments, size), _segment_blocks(kv_segments, size)

    def step(carry, pair):
        out, maximum, total = carry
        i, j, _ = pair
        scores = scaled(spec, product(queries[i], keys[j], (3, 3)))
        scores = masked(scores, _mask(spec, size, k.shape[1], pair, indices, q_ids, kv_ids))
        old = maximum[i]
        new = jnp.maximum(old, scores.max(-1, keepdims=True))
        weights = jnp.exp2(scores - finite(new))
        fade = jnp.exp2(old - finite(new))
        added = product(weights.astype(v.dtype), values[j], (3, 2))
        out = out.at[i].set(out[i] * fade + added)
        total = total.at[i].set(total[i] * fade + weights.sum(-1, keepdims=True))
        return (out, maximum.at[i].set(new), total), None

    row = jnp.zeros((*queries.shape[:-1], 1), jnp.float32)
    start = (jnp.zeros(queries.shape, jnp.float32), row - jnp.inf, row)
    (out, maximum, total), _ = jax.lax.scan(step, start, _steps(spec, size, *lengths))
    out = _unblock(out * reciprocal(total), q.shape[1], q.shape[2], q.dtype)
    log_sums = log2_sum(maximum, total)
    return checkpoint_name(out, CHECKPOINT_NAME), checkpoint_name(log_sums, CHECKPOINT_NAME)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(spec, q, k, v, q_segments, kv_segments):
    return _forward(spec, q, k, v, q_segments, kv_segments)[0]


def _blocked_fwd(spec, q, k, v, q_segments, kv_segments):
    out, log_sums = _forward(spec, q, k, v, q_segments, kv_segments)
    return out, (q, k, v, q_segments, kv_segments, out, log_sums)


def _blocked_bwd(spec, residuals, grad):
    q, k, v, q_segments, kv_segments, out, log_sums = residuals
    kv_heads = k.shape[2]
    k, v = gather(spec, k, v)
    lengths = q.shape[1], k.shape[1]
    size = block_size(spec, *lengths)
    indices = _index_blocks(spec, size, *lengths)
    queries, grads = _blocks(q, size, kv_heads), _blocks(grad, size, kv_heads)
    keys, values = _blocks(k, size, kv_heads), _blocks(v, size, kv_heads)
    # Small transposed copies, so that no product contracts the first axis of its left operand.
    queries_t, grads_t = contiguous(queries.mT), contiguous(grads.mT)
    q_ids, kv_ids = _segment_blocks(q_segments, size), _segment_blocks(kv_segments, size)
    # sum_s P dP of a row equals its dO . O (arXiv 2205.14135, appendix B.2).
    delta = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    delta = _blocks(delta, size, kv_heads)

    def step(carry, pair):
        dq, dk_t, dv_t = carry
        i, j, _ = pair
        scores = scaled(spec, product(queries[i], keys[j], (3, 3)))
        mask = _mask(spec, size, k.shape[1], pair, indices, q_ids, kv_ids)
        weights = jnp.exp2(masked(scores - log_sums[i], mask))
        dweights = product(grads[i], values[j], (3, 3))
        dscores = (weights * (dweights - delta[i]) * slope(spec, scores)).astype(q.dtype)
        dq = dq.at[i].add(product(dscores, keys[j], (3, 2)))
        dk_t = dk_t.at[j].add(product(queries_t[i], dscores, (3, 2)))
        dv_t = dv_t.at[j].add(product(grads_t[i], weights.astype(q.dtype), (3, 2)))
        return (dq, dk_t, dv_t), None

    zeros = jnp.zeros(keys.mT.shape, jnp.float32)
    start = (jnp.zeros(queries.shape, jnp.float32), zeros, zeros)
    (dq, dk_t, dv_t), _ = jax.lax.scan(step, start, _steps(spec, size, *lengths))
    dk = _unblock(dk_t.mT, k.shape[1], kv_heads, k.dtype)
    dv = _unblock(dv_t.mT, k.shape[1], kv_heads, v.dtype)
    dq = _unblock(dq, q.shape[1], q.shape[2], q.dtype)
    return dq, *scatter(spec, dk, dv), None, None


_blocked.defvjp(_blocked_fwd, _blocked_bwd)


def blocked(spec: Spec, q, k, v, q_segments, kv_segments) -> Array:
    """Attention whose temporaries are blocks and arrays of the size of q, k and v.

    Args as `lm.layers.attention.attention`, checked there.
    """
    return _blocked(spec, q, k, v, q_segments, kv_segments)
