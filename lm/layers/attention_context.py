"""Attention over a mesh: each device its rows and heads, inside of `shard_map`.

Context parallelism cuts rows over the mesh axis `context`. A device holds a piece of each of its
rows, and the pieces are treated as rows of their own: [B, T] becomes [B ways, T / ways], laid out
over the batch's axes and `context` together. Everything that works on single tokens (embedding,
projections, norms, MLPs, experts, the loss) needs to know nothing of it. Attention alone looks at
other pieces: it gathers the keys and values of whole rows over `context`, in the dtype that they
have, for its own queries; their gradients go back by a reduce-scatter (Llama 3, arXiv 2407.21783,
section 3.3.2). The backward pass gathers them anew instead of keeping them for every layer.

The pieces are not contiguous: `attention_common.zigzag` balances the work under a causal mask.
Positions and documents travel with the tokens.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from lm.layers.attention import IMPLEMENTATIONS, attention
from lm.layers.attention_common import CONTEXT, Spec
from lm.sharding import CONTEXT_ATTENTION, ROWS, RULES, axis_sizes, dividing


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Pieces:
    """Rows are cut over so many devices of the mesh axis `context`."""

    ways: int


def pieces_of(shape: tuple[int, ...]) -> Pieces | None:
    """How the mesh in context cuts tokens [B, T]; None if it does not, or cannot.

    What cannot be cut is left to the compiler: right, but with more communication.
    """
    ways = axis_sizes().get(CONTEXT, 1)
    if ways == 1 or shape[1] % (2 * ways) or dividing(ROWS, shape[0]) is None:
        return None
    return Pieces(ways)


def cut(pieces: Pieces, *arrays: Array) -> list[Array]:
    """Arrays [B, T, ...] as pieces [B ways, T / ways, ...]; moves half of what each device has."""
    rows = dividing(ROWS, arrays[0].shape[0])
    run = jax.shard_map(
        lambda *arrays: [_to_pieces(pieces.ways, x) for x in arrays],
        in_specs=P(rows or None, CONTEXT),
        out_specs=P((*rows, CONTEXT)),
        check_vma=False,
    )
    return run(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _join(pieces: Pieces, x: Array) -> Array:
    rows = dividing(ROWS, x.shape[0] // pieces.ways)
    run = jax.shard_map(
        lambda x: _from_pieces(pieces.ways, x),
        in_specs=P((*rows, CONTEXT)),
        out_specs=P(rows or None, CONTEXT),
        check_vma=False,
    )
    return run(x)


def join(pieces: Pieces, x: Array) -> Array:
    """The inverse of `cut`."""
    return _join(pieces, x)


# Differentiated by hand: the transpose of a shard_map adds up over axes that it does not name.
_join.defvjp(lambda pieces, x: (_join(pieces, x), None), lambda pieces, _, g: tuple(cut(pieces, g)))


def row_segments(pieces: Pieces, segment_ids: Int[Array, "R S"]) -> Int[Array, "B T"]:
    """Documents of the tokens of whole rows, in the order in which keys are gathered."""
    rows = dividing(ROWS, segment_ids.shape[0] // pieces.ways)
    run = jax.shard_map(
        lambda ids: jax.lax.all_gather(ids, CONTEXT, axis=1, tiled=True),
        in_specs=P((*rows, CONTEXT)),
        out_specs=P(rows or None),
        check_vma=False,
    )
    return run(segment_ids)


def _owners(ways: int, parity: int) -> list[tuple[int, int]]:
    """(device with chunk 2 d + parity in the order of the row, device with it in zigzag)."""
    chunks = [2 * device + parity for device in range(ways)]
    return [(chunk // 2, min(chunk, 2 * ways - 1 - chunk)) for chunk in chunks]


def _to_pieces(ways: int, x: Array) -> Array:
    # Of the chunks i and 2 ways - 1 - i that device i is to get, one is even and one is odd.
    halves = jnp.split(x, 2, axis=1)
    even, odd = (jax.lax.ppermute(half, CONTEXT, _owners(ways, p)) for p, half in enumerate(halves))
    swap = jax.lax.axis_index(CONTEXT) % 2 == 1
    return jnp.concatenate([jnp.where(swap, odd, even), jnp.where(swap, even, odd)], axis=1)


def _from_pieces(ways: int, x: Array) -> Array:
    first, second = jnp.split(x, 2, axis=1)
    swap = jax.lax.axis_index(CONTEXT) % 2 == 1
    even, odd = jnp.where(swap, second, first), jnp.where(swap, first, second)
    back = [[(b, a) for a, b in _owners(ways, parity)] for parity in (0, 1)]
    chunks = [jax.lax.ppermute(x, CONTEXT, p) for p, x in zip(back, (even, odd), strict=True)]
    return jnp.concatenate(chunks, axis=1)


def mesh_attention(
    q: Float[Array, "R T N H"],
    k: Float[Array, "R T K H"],
    v: Float[Array, "R T K H"],
    *,
    segment_ids: Int[Array, "R T"] | None,
    window: int | None,
    scale: float,
    soft_cap: float | None,
    implementation: str | None,
    pieces: Pieces | None = None,
    row_segment_ids: Int[Array, "B S"] | None = None,
) -> Float[Array, "R T N H"]:
    """Causal `lm.layers.attention.attention` over the mesh in context.

    Args:
      pieces: the rows of q, k and v are pieces; None: they are whole.
      row_segment_ids: as from `row_segments`, if there are pieces and segments.
      others: as in `attention`.

    Raises:
      NotImplementedError: an implementation that cannot do this, or not on pieces.
    """
    options = dict(window=window, scale=scale, soft_cap=soft_cap, implementation=implementation)
    rows = dividing(RULES["batch"], q.shape[0])
    heads = dividing(RULES["act_heads"], k.shape[2])
    if pieces is None and (not axis_sizes() or rows is None or heads is None):
        return attention(q, k, v, segment_ids=segment_ids, **options)
    if pieces is None:
        whole = rows

        def local(q, k, v, segments, _):
            return attention(q, k, v, segment_ids=segments, **options)

    else:
        if implementation not in CONTEXT_ATTENTION:
            raise NotImplementedError(
                f"attention implementation {implementation!r} cannot see keys of other devices: "
                f"with mesh.context = {pieces.ways} use None or 'xla'"
            )
        run = IMPLEMENTATIONS[implementation or "xla"]
        spec = Spec(scale, True, window, soft_cap, pieces.ways)
        whole = tuple(axis for axis in rows if axis != CONTEXT)

        def local(q, k, v, segments, row_segments):
            return run(spec, q, k, v, segments, row_segments)

    place = P(rows or None, None, heads or None)
    return jax.shard_map(
        local,
        in_specs=(place, place, place, P(rows or None), P(whole or None)),
        out_specs=place,
        check_vma=False,
    )(q, k, v, segment_ids, row_segment_ids)
