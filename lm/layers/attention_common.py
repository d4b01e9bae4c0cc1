"""What the attention implementations share: the mask, the matrix product, the memory layout.

Shapes in names: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K queries
that share a key/value head, H width of a head.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

LOG2_E = 1.4426950408889634
"""Scores are kept in units of ln 2, because exp2 is cheaper than exp."""

CHECKPOINT_NAME = "attention"
"""Name (`jax.ad_checkpoint.checkpoint_name`) of the output and of the log-sum-exp: a remat policy
that saves it never runs the forward pass of attention twice."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static part of one attention call."""

    scale: float
    causal: bool
    window: int | None
    soft_cap: float | None = None
    context: int = 1
    """Devices that hold a piece of each row (`zigzag`): above 1 the call is one device's, inside of
    `shard_map`, with the queries and keys of its pieces and the keys' segments of whole rows."""


CONTEXT = "context"
"""Mesh axis of those devices."""


def zigzag(ways: int, length: int) -> np.ndarray:
    """int32 [ways, length / ways]: the tokens of a row that each of `ways` devices holds, in order.

    A row is cut into 2 ways chunks and device i takes chunks i and 2 ways - 1 - i, so that under a
    causal mask all have the same number of keys to look at (Llama 3, arXiv 2407.21783, section
    3.3.2).
    """
    chunks = np.arange(length, dtype=np.int32).reshape(2 * ways, -1)
    return np.concatenate([chunks[:ways], chunks[: ways - 1 : -1]], axis=1)


def places(spec: Spec, length: int, kv_length: int) -> tuple[Array | np.ndarray, np.ndarray]:
    """Where in their row the queries and the (gathered) keys of a call lie."""
    if spec.context == 1:
        # NumPy makes a mask by index a constant, which XLA:CPU reads faster than it compares.
        return np.arange(length, dtype=np.int32), np.arange(kv_length, dtype=np.int32)
    table = zigzag(spec.context, kv_length)
    return jnp.asarray(table)[jax.lax.axis_index(CONTEXT)], table.reshape(-1)


def gather(spec: Spec, *arrays: Array) -> tuple[Array, ...]:
    """Keys or values of whole rows, from those of this device's pieces."""
    if spec.context == 1:
        return arrays
    return tuple(jax.lax.all_gather(x, CONTEXT, axis=1, tiled=True) for x in arrays)


def scatter(spec: Spec, *gradients: Array) -> tuple[Array, ...]:
    """The transpose of `gather`: gradients of this device's pieces, added up over the devices."""
    if spec.context == 1:
        return gradients
    scatter = jax.lax.psum_scatter
    return tuple(scatter(g, CONTEXT, scatter_dimension=1, tiled=True) for g in gradients)


def scaled(spec: Spec, products: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """Scores in units of ln 2 from the products q . k: scaled and, if asked for, soft-capped."""
    if spec.soft_cap is None:
        return products * (spec.scale * LOG2_E)
    return jnp.tanh(products * (spec.scale / spec.soft_cap)) * (spec.soft_cap * LOG2_E)


def slope(spec: Spec, scores: Float[Array, "*dims"]) -> Float[Array, "*dims"] | float:
    """d scores / d products in units of 1 / ln 2, from what `scaled` gave."""
    if spec.soft_cap is None:
        return spec.scale
    return spec.scale * (1 - jnp.square(scores * (1 / (spec.soft_cap * LOG2_E))))


def visible(
    spec: Spec,
    rows: Int[Array, " T"],
    columns: Int[Array, " S"],
    q_segments: Int[Array, "B T"] | None,
    kv_segments: Int[Array, "B S"] | None,
) -> Bool[Array, "b T S"] | None:
    """Which keys (at index `columns`) each query (at index `rows`) sees; b is 1 or B.

    None stands for a mask that is true everywhere.
    """
    mask = None
    rows, columns = rows[None, :, None], columns[None, None, :]
    if spec.causal:
        mask = columns <= rows
    if spec.window is not None:
        mask = mask & (columns > rows - spec.window)
    if q_segments is not None:
        same = q_segments[:, :, None] == kv_segments[:, None, :]
        mask = same if mask is None else mask & same
    return mask


def masked(scores: Float[Array, "B K GT S"], mask: Bool[Array, "b T S"] | None) -> Array:
    """`scores` with -inf where `mask` is false; the G query heads of a group share the mask."""
    if mask is None:
        return scores
    batch, kv_heads, rows, columns = scores.shape
    split = (batch, kv_heads, rows // mask.shape[1], mask.shape[1], columns)
    out = jnp.where(mask[:, None, None], scores.reshape(split), -jnp.inf)
    return out.reshape(scores.shape)


def product(lhs: Array, rhs: Array, contract: tuple[int, int]) -> Float[Array, "B K m n"]:
    """Product over the axes `contract`, batched over the first two, accumulated in float32.

    float32 operands are multiplied in float32: accelerators would round them to TF32 or bfloat16.
    """
    return jax.lax.dot_general(
        lhs,
        rhs,
        (((contract[0],), (contract[1],)), ((0, 1), (0, 1))),
        precision=jax.lax.Precision.HIGHEST if lhs.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def contiguous(x: Array) -> Array:
    """`x`, laid out in memory in the order of its axes where that is what makes products fast.

    XLA:CPU folds a transpose into the product that reads it, finds the batch axes apart, and then
    leaves its fast kernels (bfloat16 operands are even converted to float32). The constraint keeps
    the transpose, a small copy, outside. Other backends read strided operands at full speed.
    """
    layout = Layout(tuple(range(x.ndim)))
    return jax.lax.platform_dependent(
        x, cpu=lambda x: with_layout_constraint(x, layout), default=lambda x: x
    )


def reciprocal(total: Array) -> Array:
    """1 / total, and 0 for a row that sees no key."""
    return jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)


def log2_sum(maximum: Array, total: Array) -> Array:
    """log2 of the sum of 2^scores of a row from its maximum m and sum of 2^(scores - m).

    A row that sees no key gives 0: its scores are all -inf, so 2^(scores - 0) is 0 as it must be.
    """
    return jnp.where(total > 0, maximum + jnp.log2(jnp.where(total > 0, total, 1)), 0)


def finite(maximum: Array) -> Array:
    """`maximum` with 0 for rows that see no key (-inf), so that -inf - m stays -inf, not NaN."""
    return jnp.where(maximum == -jnp.inf, 0, maximum)
