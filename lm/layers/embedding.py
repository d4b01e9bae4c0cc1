"""Rows of an embedding table, on one device or over a mesh.

Over a mesh the table is laid out over `tensor` along the vocabulary and over `fsdp` along the
width, and tokens over the batch's axes. Each device looks the tokens of its fsdp group up in its
columns, and an all-to-all brings every token its whole row: as many bytes as there are activations,
where a gathered table would be as many as there are parameters. The gradient goes the same way back
and is added up in the table's dtype.

That is written out here because the compiler cannot be trusted with it: within one replica of
several (`lm.sharding.over_replicas`) XLA's partitioner aborts the process over a gather from a
table whose rows are cut (jaxlib 0.12.0).
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from lm.sharding import RULES, axis_sizes, dividing, splits_sequence


def lookup(
    table: Float[Array, "V D"], ids: Int[Array, "B T"], dtype: str, rows: str = "vocab"
) -> Float[Array, "B T D"]:
    """Rows `ids` of a table, in `dtype`; NaN where an id is outside of [0, V).

    Args:
      table: laid out by the logical axes (rows, "embed") if there is a mesh.
      ids: token ids or positions.
      dtype: of the result.
      rows: logical axis of the table's rows.

    The gradient with respect to the table is added up in its own dtype.
    """
    layout = _layout(table.shape, ids.shape, rows)
    if layout is None:
        found = table.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return found.astype(dtype)
    return _lookup(layout, jnp.dtype(dtype), table, ids)


def _layout(shape, ids, rows):
    """(batch axes, is fsdp among them, are rows cut, is the sequence) or None."""
    sizes = axis_sizes()
    batch = dividing(RULES["batch"], ids[0])
    vocab, width = dividing(RULES[rows], shape[0]), dividing(RULES["embed"], shape[1])
    if not sizes or batch is None or vocab is None or width is None:
        return None
    return batch, bool(width), bool(vocab), bool(vocab) and splits_sequence(ids[1])


def _specs(layout):
    batch, width, vocab, split = layout
    table = P("tensor" if vocab else None, "fsdp" if width else None)
    return table, P(batch or None), P(batch or None, "tensor" if split else None)


def _local(vocab: bool, count: int, ids):
    """Ids in this device's `count` rows; `count` for those of others."""
    if vocab:
        ids = ids - count * jax.lax.axis_index("tensor")
    return jnp.where((ids >= 0) & (ids < count), ids, count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lookup(layout, dtype, table, ids):
    _, width, vocab, split = layout

    def local(table, ids):
        if width:
            ids = jax.lax.all_gather(ids, "fsdp", axis=0, tiled=True)
        own = _local(vocab, table.shape[0], ids)
        rows = table.at[own].get(mode="fill", fill_value=0).astype(dtype)
        size = table.shape[0] * (jax.lax.axis_size("tensor") if vocab else 1)
        known = (ids >= 0) & (ids < size)
        rows = jnp.where(known[..., None], rows, jnp.nan)
        if split:
            rows = jax.lax.psum_scatter(rows, "tensor", scatter_dimension=1, tiled=True)
        elif vocab:
            rows = jax.lax.psum(rows, "tensor")
        if width:
            rows = jax.lax.all_to_all(rows, "fsdp", split_axis=0, concat_axis=2, tiled=True)
        return rows

    table_spec, ids_spec, rows_spec = _specs(layout)
    return jax.shard_map(
        local, in_specs=(table_spec, ids_spec), out_specs=rows_spec, check_vma=False
    )(table, ids)


def _lookup_fwd(layout, dtype, table, ids):
    like = jnp.zeros((table.shape[0], 0), table.dtype)  # an array that says what it needs to know
    return _lookup(layout, dtype, table, ids), (ids, like)


def _lookup_bwd(layout, dtype, residuals, g):
    del dtype
    batch, width, vocab, split = layout
    ids, like = residuals
    rest = tuple(axis for axis in batch if not (width and axis == "fsdp"))
    count = like.shape[0] // (axis_sizes()["tensor"] if vocab else 1)

    def local(ids, g):
        if width:
            ids = jax.lax.all_gather(ids, "fsdp", axis=0, tiled=True)
            g = jax.lax.all_to_all(g, "fsdp", split_axis=2, concat_axis=0, tiled=True)
        if split:
            g = jax.lax.all_gather(g, "tensor", axis=1, tiled=True)
        table = jnp.zeros((count, g.shape[-1]), like.dtype)
        table = table.at[_local(vocab, count, ids)].add(g.astype(like.dtype), mode="drop")
        return jax.lax.psum(table, rest) if rest else table

    table_spec, ids_spec, rows_spec = _specs(layout)
    grad = jax.shard_map(
        local, in_specs=(ids_spec, rows_spec), out_specs=table_spec, check_vma=False
    )(ids, g)
    return grad, None


_lookup.defvjp(_lookup_fwd, _lookup_bwd)
