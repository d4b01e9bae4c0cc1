"""SD-MoE: experts that share their leading singular directions and differ in all others.

The leading directions of experts, and of their gradients, are nearly the same for all of them: the
low-rank structure of text writes itself into every expert. SD-MoE gives it a place of its own
(arXiv 2602.12556): W_i = W_c + W_u,i, a common matrix and one unique matrix for each expert, which
is kept out of the leading left and right singular subspaces of W_c.

Parameters are trees with sibling nodes `common` and `experts` of equal structure,

    {"common": {"up": [..., m, n]}, "experts": {"up": [..., E, m, n]}}

(leading axes: stacked layers). The forward pass uses `common[..., None, :, :] + experts` in any
routed-expert layout; automatic differentiation then gives G_i to W_u,i and sum_i G_i to W_c, and
`sd_moe` does the rest around any Optax optimizer. `fold_common` returns ordinary experts.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe._subspace import common_part, matmul, random_basis, sweep, transpose, unique_part

OnRefresh = Literal["drop", "move_mean", "keep"]
COMMON, EXPERTS = "common", "experts"


class SDMoEState(NamedTuple):
    """State of `sd_moe`."""

    inner_state: optax.OptState
    """State of the wrapped optimizer."""
    count: jax.Array
    """Number of updates so far, int32."""
    left: Any
    """U_k of every common matrix, f32 [..., m, k], in the structure of the parameters; masked
    elsewhere."""
    right: Any
    """V_k of every common matrix, f32 [..., n, k]."""
    refresh_change: jax.Array
    """f32: what the last refresh changed of the experts W_i = W_c + W_u,i, the norm of the change
    over the norm of all W_i; 0 with on_refresh="keep"."""


def sd_moe(
    inner: optax.GradientTransformation,
    rank: int = 8,
    *,
    refresh_every: int = 16,
    refresh_sweeps: int = 2,
    init_sweeps: int = 8,
    on_refresh: OnRefresh = "move_mean",
    project_gradient: bool = True,
    project_update: bool = True,
    common_gradient: Literal["sum", "mean"] = "sum",
) -> optax.GradientTransformationExtraArgs:
    r"""Wrap an optimizer so that it trains experts decomposed as W_c + W_u,i.

    With :math:`P_U, P_V` the projections on the leading ``rank`` left and right singular
    directions of :math:`W_c`, the gradients handed to ``inner`` are

    .. math::
      C(G) &= P_U G + (I - P_U) G P_V, \quad N(G) = (I - P_U) G (I - P_V) = G - C(G) \\
      W_c &\leftarrow \textstyle C(\sum_i G_i), \quad W_{u,i} \leftarrow N(G_i)

    Optimizers that rescale single entries (Adam) leave the complement even so; with
    ``project_update`` the update of :math:`W_{u,i}` is projected by N as well, and
    :math:`P_U W_u = W_u P_V = 0` holds between refreshes for any of them, weight decay included.

    Every ``refresh_every`` updates the bases follow :math:`W_c`, by ``refresh_sweeps`` sweeps of
    subspace iteration from where they were. What W_u,i then has outside of its new place,
    :math:`R_i = C(W_{u,i})`, is dealt with inside of the same update, so that parameters plus
    updates are the refreshed parameters:

    - ``"move_mean"``: :math:`W_c` gains the mean of all :math:`R_i`, :math:`W_{u,i}` loses its own;
    - ``"drop"``: :math:`W_{u,i}` loses it;
    - ``"keep"``: it stays, out of reach of further gradients. No expert is changed by the refresh.

    The paper does not say which, nor whether gradients or updates are projected. What the first
    two change of the experts is recorded as ``refresh_change`` in the state. Moments of ``inner``
    stay as they are.

    All work is done in float32 (or the parameters' dtype if wider) with thin factors: 8mnk
    operations for each expert's matrix and projection, no m x m or n x n matrix.

    Args:
      inner: The optimizer, with its learning rate, weight decay, and clipping if it is to see
        decomposed gradients.
      rank: Number k of common directions; the paper's is 8.
      refresh_every: Updates between refreshes; the paper's is 16. 0 keeps the first bases.
      refresh_sweeps: Sweeps of subspace iteration at a refresh.
      init_sweeps: Sweeps of ``init``, which starts from random bases. Matrices from
        ``init_sd_moe`` have rank k and need one.
      on_refresh: See above.
      project_gradient: Decompose gradients; without it they reach ``inner`` as they are.
      project_update: Project the updates of the unique matrices.
      common_gradient: ``"sum"`` is what automatic differentiation gives W_c; ``"mean"`` divides it
        by the number of experts.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`. Its ``update`` needs
      ``params``; extra arguments are handed to ``inner``.

    Raises:
      ValueError: an option out of range; at ``init``: no pair of ``common`` and ``experts`` in the
        parameters, shapes that do not belong together, or k of min(m, n) or more.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, moe
      >>> common, unique = moe.init_sd_moe(jax.random.key(0), 4, (16, 32), rank=2, std=0.25)
      >>> params = {"common": {"up": common}, "experts": {"up": unique}}
      >>> tx = moe.sd_moe(optax.adamw(1e-3), rank=2)
      >>> state = tx.init(params)
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> updates, state = tx.update(grads, state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> leak = jnp.swapaxes(state.left["common"]["up"], 0, 1) @ params["experts"]["up"]
      >>> print(f"{jnp.max(jnp.abs(leak)):.4f}")
      0.0000

    References:
      `SD-MoE <https://arxiv.org/abs/2602.12556>`_, 2026
    """
    _check(rank, refresh_every, refresh_sweeps, init_sweeps, on_refresh, common_gradient)
    inner = optax.with_extra_args_support(inner)

    def init(params) -> SDMoEState:
        pairs = _pairs(params, rank)
        leaves, structure = jax.tree.flatten(params)
        lefts: list[Any] = [optax.MaskedNode()] * len(leaves)
        rights = list(lefts)
        for number, (at, _) in enumerate(pairs):
            w = _wide(leaves[at])
            shape = (*w.shape[:-2], w.shape[-1], rank)
            v = random_basis(jax.random.key(number), shape, w.dtype)
            lefts[at], rights[at] = sweep(w, v, init_sweeps)
        return SDMoEState(
            inner_state=inner.init(params),
            count=jnp.zeros((), jnp.int32),
            left=structure.unflatten(lefts),
            right=structure.unflatten(rights),
            refresh_change=jnp.zeros((), jnp.float32),
        )

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("sd_moe needs the parameters: tx.update(grads, state, params)")
        pairs = _pairs(updates, rank)
        leaves, structure = jax.tree.flatten(updates)
        lefts, rights = map(structure.flatten_up_to, (state.left, state.right))
        bases = [(lefts[at], rights[at]) for at, _ in pairs]
        with jax.named_scope("sd_moe_gradients"):
            for (common, unique), (u, v) in zip(pairs, bases, strict=True):
                experts = leaves[unique].shape[-3]
                if project_gradient:
                    leaves[common] = _apply(common_part, leaves[common], u, v)
                    leaves[unique] = _apply(unique_part, leaves[unique], *_each(u, v))
                if common_gradient == "mean":
                    leaves[common] = leaves[common] / experts
        updates, inner_state = inner.update(
            structure.unflatten(leaves), state.inner_state, params, **extra_args
        )
        leaves = structure.flatten_up_to(updates)
        if project_update:
            with jax.named_scope("sd_moe_updates"):
                for (_, unique), (u, v) in zip(pairs, bases, strict=True):
                    leaves[unique] = _apply(unique_part, leaves[unique], *_each(u, v))
        count = jnp.asarray(optax.safe_increment(state.count))
        change = state.refresh_change
        if refresh_every:
            moved = [(leaves[common], leaves[unique]) for common, unique in pairs]
            held = structure.flatten_up_to(params)
            old = [(held[common], held[unique]) for common, unique in pairs]
            with jax.named_scope("sd_moe_refresh"):
                moved, bases, change = jax.lax.cond(
                    count % refresh_every == 0,
                    functools.partial(_refresh, sweeps=refresh_sweeps, on_refresh=on_refresh),
                    lambda old, moved, bases, change: (moved, bases, change),
                    old,
                    moved,
                    bases,
                    change,
                )
            for (common, unique), pair, (u, v) in zip(pairs, moved, bases, strict=True):
                leaves[common], leaves[unique] = pair
                lefts[common], rights[common] = u, v
        return structure.unflatten(leaves), SDMoEState(
            inner_state, count, structure.unflatten(lefts), structure.unflatten(rights), change
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _refresh(old, updates, bases, change, *, sweeps: int, on_refresh: OnRefresh):
    """New bases, and updates that lead to the refreshed parameters."""
    del change
    changed = total = jnp.zeros((), jnp.float32)
    new_updates, new_bases = [], []
    for (w_c, w_u), (du_c, du_u), (_, v) in zip(old, updates, bases, strict=True):
        common = _wide(w_c) + _wide(du_c)
        u, v = sweep(common, v, sweeps)
        new_bases.append((u, v))
        if on_refresh == "keep":
            new_updates.append((du_c, du_u))
            continue
        unique = _wide(w_u) + _wide(du_u)
        displaced = common_part(unique, *_each(u, v))
        mean = jnp.mean(displaced, axis=-3) if on_refresh == "move_mean" else jnp.zeros_like(common)
        step_u = (_wide(du_u) - displaced).astype(du_u.dtype)
        new_updates.append(((_wide(du_c) + mean).astype(du_c.dtype), step_u))
        lost = mean[..., None, :, :] - displaced
        changed += jnp.sum(jnp.square(lost), dtype=jnp.float32)
        total += jnp.sum(jnp.square(common[..., None, :, :] + unique), dtype=jnp.float32)
    share = jnp.sqrt(changed / jnp.maximum(total, jnp.finfo(jnp.float32).tiny))
    return new_updates, new_bases, share


def init_sd_moe(
    key: jax.Array,
    num_experts: int,
    shape: tuple[int, int],
    rank: int = 8,
    *,
    std: float,
    stack: tuple[int, ...] = (),
    dtype: Any = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
    """Fresh common and unique matrices: [*stack, m, n] and [*stack, E, m, n].

    W_c = U diag(s) V^T with U, V from the QR factors of Gaussian matrices and s the `rank` largest
    singular values that a matrix of N(0, std^2) would have (quantiles of Marchenko and Pastur
    1967); W_u,i = (I - U U^T) N_i (I - V V^T) with entries of N_i from N(0, std^2). So every
    W_c + W_u,i has the scale and the spectrum of an ordinary initialization.

    Args:
      key: of the draw.
      num_experts: E.
      shape: (m, n).
      rank: k, below min(m, n).
      std: of the ordinary initialization.
      stack: leading axes (layers).
      dtype: of the result; drawn in float32.
    """
    m, n = shape
    check_rank(rank, m, n)
    u_key, v_key, unique_key = jax.random.split(key, 3)
    u = random_basis(u_key, (*stack, m, rank))
    v = random_basis(v_key, (*stack, n, rank))
    s = jnp.asarray(_leading_singular_values(m, n, rank) * std, jnp.float32)
    common = matmul(u * s.reshape((1,) * (u.ndim - 1) + (rank,)), transpose(v))
    drawn = jax.random.normal(unique_key, (*stack, num_experts, m, n)) * std
    return common.astype(dtype), unique_part(drawn, *_each(u, v)).astype(dtype)


def fold_common(params: Any) -> Any:
    """The same experts without the decomposition: W_c is added to each and `common` is gone.

    Works on trees of dicts, at any depth; nodes without `common` beside `experts` stay.
    """
    if not isinstance(params, dict):
        return params
    if COMMON in params and EXPERTS in params:
        add = lambda c, u: (_wide(u) + _wide(c)[..., None, :, :]).astype(u.dtype)  # noqa: E731
        rest = {name: node for name, node in params.items() if name != COMMON}
        return rest | {EXPERTS: jax.tree.map(add, params[COMMON], params[EXPERTS])}
    return {name: fold_common(node) for name, node in params.items()}


def _each(u: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Bases with an axis for the experts."""
    return u[..., None, :, :], v[..., None, :, :]


def _apply(part, g: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    return part(g.astype(u.dtype), u, v).astype(g.dtype)


def _wide(w: jax.Array) -> jax.Array:
    return w.astype(jnp.promote_types(w.dtype, jnp.float32))


def _pairs(params: Any, rank: int) -> list[tuple[int, int]]:
    """Positions among the leaves of each common matrix and of its experts."""
    found = jax.tree_util.tree_leaves_with_path(params)
    names = [tuple(_name(entry) for entry in path) for path, _ in found]
    place = {name: number for number, name in enumerate(names)}
    pairs = []
    for number, name in enumerate(names):
        if COMMON not in name:
            continue
        depth = name.index(COMMON)
        partner = place.get((*name[:depth], EXPERTS, *name[depth + 1 :]))
        if partner is None:
            raise ValueError(f"{'/'.join(name)} has no partner under {EXPERTS!r} beside it")
        shapes = jnp.shape(found[number][1]), jnp.shape(found[partner][1])
        if len(shapes[0]) < 2 or shapes[0] != (*shapes[1][:-3], *shapes[1][-2:]):
            raise ValueError(
                f"{'/'.join(name)} {shapes[0]} must be [..., m, n] and its experts {shapes[1]} "
                "[..., E, m, n]"
            )
        check_rank(rank, *shapes[0][-2:])
        pairs.append((number, partner))
    # Optax asks optimizers for their state with a tree that has no leaves.
    if found and not pairs:
        raise ValueError(
            f"the parameters hold no {COMMON!r} beside {EXPERTS!r}: make them with init_sd_moe or "
            "split_mean, or use the optimizer without sd_moe"
        )
    return pairs


def _name(entry: Any) -> str:
    return str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))


def _leading_singular_values(m: int, n: int, k: int) -> np.ndarray:
    """The k largest of an m x n matrix of N(0, 1), as quantiles of the Marchenko-Pastur law."""
    q, ratio = min(m, n), min(m, n) / max(m, n)
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    angle = (np.arange(20_000) + 0.5) / 20_000 * math.pi / 2
    x = low + (high - low) * np.sin(angle) ** 2
    # Density sqrt((high - x)(x - low)) / x, up to a constant, times dx / d angle.
    cdf = np.cumsum(np.sin(angle) ** 2 * np.cos(angle) ** 2 / x)
    return np.sqrt(max(m, n) * np.interp(1 - (np.arange(k) + 0.5) / q, cdf / cdf[-1], x))


def check_rank(rank: int, m: int, n: int) -> None:
    """Raise ValueError unless k common directions leave room in an m x n matrix."""
    if not 1 <= rank < min(m, n):
        raise ValueError(
            f"rank must be 1 or more and below both sides of a {m} x {n} expert, got {rank}"
        )


def _check(rank, refresh_every, refresh_sweeps, init_sweeps, on_refresh, common_gradient):
    least = dict(rank=1, refresh_every=0, refresh_sweeps=1, init_sweeps=1)
    given = (rank, refresh_every, refresh_sweeps, init_sweeps)
    for (name, low), value in zip(least.items(), given, strict=True):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name} must be a whole number, {low} or more, got {value!r}")
    if on_refresh not in ("drop", "move_mean", "keep"):
        raise ValueError(f"on_refresh must be drop, move_mean or keep, got {on_refresh!r}")
    if common_gradient not in ("sum", "mean"):
        raise ValueError(f"common_gradient must be sum or mean, got {common_gradient!r}")
