"""From tokens to rows sorted by expert, and back: gathers only, in both directions of the gradient.

`spread` copies tokens into rows, `collect` adds rows up into tokens; each is the other's gradient,
so neither ever scatters. `plan` says which row holds which assignment of a token to an expert.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Plan(NamedTuple):
    """Rows sorted by expert. N tokens with k assignments each, R rows, E experts.

    Every expert's rows start at a multiple of the alignment asked for; rows that hold nothing are
    zero. Index R (of rows) and N (of tokens) stand for "nothing".
    """

    token: Int[Array, " R"]
    """Token that each row holds."""
    choice: Int[Array, " R"]
    """Which of its token's k assignments the row is; 0 where it holds nothing."""
    row: Int[Array, "N k"]
    """Row of each assignment; R if the capacity refused it."""
    group_sizes: Int[Array, " E"]
    """Rows of each expert, those that pad its end to the alignment included."""
    drop_share: Float[Array, ""]
    """Share of the assignments that the capacity refused, f32."""


def plan(
    indices: Int[Array, "N k"],
    experts: int,
    *,
    align: int = 1,
    capacity: int | None = None,
) -> Plan:
    """Sort the assignments of tokens to experts.

    Args:
      indices: the experts of each token.
      experts: number of experts, E.
      align: every expert's rows start at a multiple of this.
      capacity: rows that an expert may take, at most; tokens' first choices go before all second
        choices, and earlier tokens before later ones (arXiv 2006.16668, algorithm 1). None: all.
    """
    if align < 1 or (capacity is not None and capacity < 1):
        raise ValueError(f"align and capacity must be 1 or more, got {align} and {capacity}")
    tokens, k = indices.shape
    count = tokens * k
    rows = row_count(count, experts, align, capacity)
    # Choice-major, so that first choices come first within an expert; the sort is stable.
    expert = indices.T.reshape(-1)
    order = jnp.argsort(expert, stable=True)
    wanted = jnp.sum(jax.nn.one_hot(expert, experts, dtype=jnp.int32), axis=0)
    sizes = wanted if capacity is None else jnp.minimum(wanted, capacity)
    padded = (sizes + (align - 1)) // align * align
    starts = jnp.cumsum(padded) - padded
    place = jnp.zeros((count,), jnp.int32)
    place = place.at[order].set(jnp.arange(count, dtype=jnp.int32), unique_indices=True)
    rank = place - (jnp.cumsum(wanted) - wanted)[expert]
    row = jnp.where(rank < sizes[expert], starts[expert] + rank, rows)
    # One entry more than there are rows takes what was refused.
    held = jnp.full((rows + 1,), count, jnp.int32)
    held = held.at[row].set(jnp.arange(count, dtype=jnp.int32))[:rows]
    empty = held == count
    return Plan(
        token=jnp.where(empty, tokens, held % max(tokens, 1)),
        choice=jnp.where(empty, 0, held // max(tokens, 1)),
        row=row.reshape(k, tokens).T,
        group_sizes=padded,
        drop_share=1.0 - jnp.sum(sizes).astype(jnp.float32) / max(count, 1)
        if capacity is not None
        else jnp.zeros((), jnp.float32),
    )


def row_count(assignments: int, experts: int, align: int = 1, capacity: int | None = None) -> int:
    """Rows that a plan needs at most, whatever the routing: a multiple of `align`."""
    most = assignments + min(experts, assignments) * (align - 1)
    if capacity is not None:
        most = min(most, experts * -(-capacity // align) * align)
    return most // align * align


def capacity_rows(assignments: int, experts: int, factor: float) -> int:
    """ceil(factor * assignments / experts), at least 1: what "capacity factor" means."""
    if not factor > 0:
        raise ValueError(f"capacity_factor must be above 0, got {factor}")
    return max(math.ceil(factor * assignments / experts), 1)


@jax.custom_vjp
def spread(
    x: Float[Array, "N D"], token: Int[Array, " R"], row: Int[Array, "N k"]
) -> Float[Array, "R D"]:
    """rows[r] = x[token[r]], zeros where token is N. `row` says the same from the token's side."""
    return _take(x, token)


def _spread_fwd(x, token, row):
    return _take(x, token), (token, row)


def _spread_bwd(residuals, grad):
    token, row = residuals
    return collect(grad, token, row), None, None


spread.defvjp(_spread_fwd, _spread_bwd)


@jax.custom_vjp
def collect(
    rows: Float[Array, "R D"], token: Int[Array, " R"], row: Int[Array, "N k"]
) -> Float[Array, "N D"]:
    """x[n] = sum_j rows[row[n, j]], added in f32, in the dtype of rows; row R adds nothing."""
    # One gather for each choice: XLA:CPU reduces a single gather of all ten times slower.
    total = _take(rows, row[:, 0]).astype(jnp.float32)
    for choice in range(1, row.shape[1]):
        total = total + _take(rows, row[:, choice]).astype(jnp.float32)
    return total.astype(rows.dtype)


def _collect_fwd(rows, token, row):
    return collect(rows, token, row), (token, row)


def _collect_bwd(residuals, grad):
    token, row = residuals
    return _take(grad, token), None, None


collect.defvjp(_collect_fwd, _collect_bwd)


def _take(x, index):
    if x.shape[0] == 0:
        return jnp.zeros((index.shape[0], *x.shape[1:]), x.dtype)
    return x.at[index].get(mode="fill", fill_value=0)


def row_weights(weights: Float[Array, "N k"], plan: Plan) -> Float[Array, " R"]:
    """The routing weight of each row, f32; 0 where it holds nothing."""
    flat = plan.token * weights.shape[1] + plan.choice
    return spread(weights.reshape(-1, 1), flat, plan.row.reshape(-1, 1))[:, 0]
