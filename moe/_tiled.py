"""Grouped products as a loop over tiles of rows: ideal FLOPs, up to the padding of a tile a group.

Built for CPUs, where `jax.lax.ragged_dot` multiplies every row with every group's matrix, and
correct everywhere. For each group the loop runs as many full tiles as its rows fill, then one tile
of the rest, whose number of rows is rounded up to an eighth of a full tile. Trip counts depend on
the sizes at run time, so an empty group costs nothing and a hot one only its own rows.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

FRACTIONS = 8
"""Sizes of the last tile of a group, as parts of a full tile."""
MIN_TILE, MAX_TILE = 64, 512


def tile_rows(rows: int, groups: int) -> int:
    """Rows of a full tile: about the mean group, so that most groups take one or two tiles."""
    mean = max(rows // max(groups, 1), 1)
    tile = MIN_TILE
    while tile < MAX_TILE and tile < mean:
        tile *= 2
    return min(tile, rows)


def matmul(lhs, rhs, group_sizes, transpose: bool = False):
    """lhs [M, K] x rhs [E, K, N] -> [M, N] in the dtype of lhs; transpose: rhs is [E, N, K]."""
    rows, width = lhs.shape[0], rhs.shape[1 if transpose else 2]
    groups, tile = rhs.shape[0], tile_rows(lhs.shape[0], rhs.shape[0])
    out = jnp.zeros((rows, width), lhs.dtype)
    if rows == 0 or groups == 0:
        return out
    ends = jnp.cumsum(group_sizes)
    sizes = _part_sizes(tile)

    def group(e, out):
        matrix = lax.dynamic_index_in_dim(rhs, e, keepdims=False).astype(lhs.dtype)
        if transpose:
            matrix = _row_major(matrix.T)
        start, end = ends[e] - group_sizes[e], ends[e]
        full = (end - start) // tile

        def whole(i, out):
            at = start + i * tile
            y = lax.dot(lax.dynamic_slice_in_dim(lhs, at, tile), matrix)
            return lax.dynamic_update_slice_in_dim(out, y, at, 0)

        def rest(i, out):
            at, offset, which = _last_tile(start + full * tile, end, rows, tile, sizes)
            x = lax.dynamic_slice_in_dim(lhs, at, tile)

            def part(size):
                def run(offset):
                    offset = jnp.minimum(offset, tile - size)
                    y = lax.dot(lax.dynamic_slice_in_dim(x, offset, size), matrix)
                    blank = jnp.zeros((tile, width), y.dtype)
                    return lax.dynamic_update_slice_in_dim(blank, y, offset, 0)

                return run

            y = lax.switch(which, [part(size) for size in sizes], offset)
            old = lax.dynamic_slice_in_dim(out, at, tile)
            y = jnp.where(_inside(at, tile, end - (end - start) % tile, end), y, old)
            return lax.dynamic_update_slice_in_dim(out, y, at, 0)

        out = lax.fori_loop(0, full, whole, out)
        return lax.fori_loop(0, ((end - start) % tile > 0).astype(jnp.int32), rest, out)

    return lax.fori_loop(0, groups, group, out)


def outer(lhs, grad, group_sizes):
    """lhs [M, K], grad [M, N] -> f32 [E, K, N], lhs^T grad of each group's rows."""
    rows, groups = lhs.shape[0], group_sizes.shape[0]
    tile = tile_rows(rows, groups)
    shape = (lhs.shape[1], grad.shape[1])
    out = jnp.zeros((groups, *shape), jnp.float32)
    if rows == 0 or groups == 0:
        return out
    ends = jnp.cumsum(group_sizes)
    sizes = _part_sizes(tile)

    def group(e, out):
        start, end = ends[e] - group_sizes[e], ends[e]
        full = (end - start) // tile

        def read(at, count):
            return (lax.dynamic_slice_in_dim(a, at, count) for a in (lhs, grad))

        def whole(i, total):
            return total + _outer(*read(start + i * tile, tile))

        def part(size):
            def run(begin):
                at = jnp.minimum(begin, rows - size)
                inside = _inside(at, size, begin, end)
                # Both: what other groups' rows hold may be infinite, and 0 * inf is not 0.
                return _outer(*(jnp.where(inside, a, 0) for a in read(at, size)))

            return run

        # The rest comes first: of most groups it is all, and saves a sum.
        begin = start + full * tile
        which = jnp.sum((end - begin > jnp.asarray([0, *sizes])).astype(jnp.int32))
        nothing = lambda begin: jnp.zeros(shape, jnp.float32)  # noqa: E731
        total = lax.switch(which, [nothing, *(part(size) for size in sizes)], begin)
        total = lax.fori_loop(0, full, whole, total)
        return lax.dynamic_update_index_in_dim(out, total, e, 0)

    return lax.fori_loop(0, groups, group, out)


def _part_sizes(tile: int) -> list[int]:
    return sorted({-(-tile * part // FRACTIONS) for part in range(1, FRACTIONS + 1)})


def _last_tile(begin, end, rows, tile, sizes):
    """Where the last tile is read (moved up at the end of the array), where its rows begin in it,
    and the index of the smallest size that holds them."""
    at = jnp.minimum(begin, rows - tile)
    which = jnp.sum((end - begin > jnp.asarray(sizes)).astype(jnp.int32))
    return at, begin - at, which


def _inside(at, tile, begin, end):
    row = at + lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
    return (row >= begin) & (row < end)


def _outer(x, g):
    return lax.dot(_row_major(x.T), g, preferred_element_type=jnp.float32)


def _row_major(x):
    """XLA:CPU's fast 16-bit product wants both operands row-major; in f32 a copy costs more."""
    return x if x.dtype == jnp.float32 else with_layout_constraint(x, Layout((0, 1)))
