"""Dense MLPs into experts, and experts into the decomposition of SD-MoE, on parameter trees.

`lm.merging.upcycle` does the former for Hugging Face checkpoints on disk; options that both have
carry the same names. Sources: sparse upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055);
drop-upcycling (Nakamura et al. 2025, arXiv 2502.19261); SD-MoE (arXiv 2602.12556).
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from moe._subspace import common_part, matmul, transpose
from moe.sd_moe import COMMON, EXPERTS, check_rank

Tree = dict[str, Any]


class SplitMean(NamedTuple):
    """See `split_mean`."""

    common: jax.Array
    """W_c, [..., m, n], of rank k."""
    unique: jax.Array
    """W_u,i, [..., E, m, n]."""
    change: jax.Array
    """f32 [...]: norm of what the experts lost over the norm of the experts."""


def upcycle_mlp(
    mlp: dict[str, jax.Array],
    num_experts: int,
    key: jax.Array,
    *,
    noise_scale: float = 0.0,
    residual_scale: float = 1.0,
    drop_ratio: float = 0.0,
) -> dict[str, jax.Array]:
    """Copies of an MLP as experts: {"gate", "up": [..., E, D, F], "down": [..., E, F, D]}.

    Without noise and drop, a mixture whose routing weights add up to 1 computes what the MLP does.

    Args:
      mlp: gate (if gated) and up [..., D, F], down [..., F, D].
      num_experts: E.
      key: of noise and drop.
      noise_scale: standard deviation of Gaussian noise added to every weight.
      residual_scale: factor of `down`.
      drop_ratio: drop-upcycling: the share of each expert's hidden units (its own choice of them)
        that starts anew, from the normal distribution with the mean and standard deviation of the
        weights replaced, for each matrix. The paper's is 0.5.

    Raises:
      ValueError: unknown or missing matrices, shapes that do not fit, an option out of range.
    """
    if set(mlp) not in ({"up", "down"}, {"gate", "up", "down"}):
        raise ValueError(f"an MLP is gate (if gated), up and down, got {', '.join(sorted(mlp))}")
    shapes = {name: tuple(w.shape) for name, w in mlp.items()}
    down = (*shapes["up"][:-2], *shapes["up"][:-3:-1])
    if len(down) < 2 or shapes["down"] != down or shapes.get("gate", shapes["up"]) != shapes["up"]:
        raise ValueError(f"up and gate must be [..., D, F] and down [..., F, D], got {shapes}")
    if num_experts < 1:
        raise ValueError(f"num_experts must be 1 or more, got {num_experts}")
    if not 0 <= drop_ratio <= 1 or noise_scale < 0:
        raise ValueError(
            "drop_ratio must lie in [0, 1] and noise_scale be 0 or more, got "
            f"{drop_ratio} and {noise_scale}"
        )
    *stack, _, hidden = shapes["up"]
    choice_key, *keys = jax.random.split(key, 1 + 2 * len(mlp))
    order = jnp.argsort(jax.random.uniform(choice_key, (*stack, num_experts, hidden)), axis=-1)
    dropped = order < round(drop_ratio * hidden)
    experts = {}
    for number, name in enumerate(("gate", "up", "down")):
        if name not in mlp:
            continue
        number -= "gate" not in mlp
        w = mlp[name].astype(jnp.float32)[..., None, :, :]
        w = jnp.broadcast_to(w, (*stack, num_experts, *w.shape[-2:]))
        w = w * residual_scale if name == "down" else w
        if drop_ratio:
            units = dropped[..., :, None] if name == "down" else dropped[..., None, :]
            w = _start_anew(w, jnp.broadcast_to(units, w.shape), keys[2 * number])
        if noise_scale:
            w = w + noise_scale * jax.random.normal(keys[2 * number + 1], w.shape)
        experts[name] = w.astype(mlp[name].dtype)
    return experts


def _start_anew(w: jax.Array, where: jax.Array, key: jax.Array) -> jax.Array:
    count = jnp.maximum(jnp.sum(where, axis=(-2, -1), keepdims=True), 1)
    mean = jnp.sum(jnp.where(where, w, 0), axis=(-2, -1), keepdims=True) / count
    square = jnp.where(where, jnp.square(w - mean), 0)
    std = jnp.sqrt(jnp.sum(square, axis=(-2, -1), keepdims=True) / count)
    return jnp.where(where, mean + std * jax.random.normal(key, w.shape), w)


def upcycle_router(
    key: jax.Array,
    d_model: int,
    num_experts: int,
    *,
    gate_mode: Literal["uniform_random", "random"] = "uniform_random",
    stack: tuple[int, ...] = (),
    dtype: Any = jnp.float32,
) -> jax.Array:
    """A fresh router [*stack, D, E].

    Args:
      key: of the draw.
      d_model: D.
      num_experts: E.
      gate_mode: `"uniform_random"`: uniform in [-1/sqrt(D), 1/sqrt(D)]; `"random"`: N(0, 1).
      stack: leading axes (layers).
      dtype: of the result.
    """
    shape = (*stack, d_model, num_experts)
    if gate_mode == "random":
        return jax.random.normal(key, shape).astype(dtype)
    if gate_mode != "uniform_random":
        raise ValueError(f"gate_mode must be uniform_random or random, got {gate_mode!r}")
    bound = d_model**-0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound).astype(dtype)


def split_mean(
    experts: jax.Array, rank: int = 8, *, displaced: Literal["keep", "drop"] = "keep"
) -> SplitMean:
    """Experts W_i as W_c + W_u,i, with W_c the best approximation of rank k to their mean.

    W_i - W_c need not avoid the leading directions of W_c, as SD-MoE wants it:

    - `displaced="keep"` leaves that part where it is, so every expert stays what it was. Only for
      `sd_moe(on_refresh="keep")`: other refreshes take it away after the fact.
    - `"drop"` leaves it out; `change` says how much that is. It is the part in which experts differ
      from their mean along the common directions, and nothing for copies of one dense MLP.

    Args:
      experts: [..., E, m, n].
      rank: k, below min(m, n).
      displaced: see above.
    """
    if displaced not in ("keep", "drop"):
        raise ValueError(f"displaced must be keep or drop, got {displaced!r}")
    check_rank(rank, *experts.shape[-2:])
    w = experts.astype(jnp.promote_types(experts.dtype, jnp.float32))
    u, s, vt = jnp.linalg.svd(jnp.mean(w, axis=-3), full_matrices=False)
    u, s, vt = u[..., :rank], s[..., :rank], vt[..., :rank, :]
    common = matmul(u * s[..., None, :], vt)
    unique = w - common[..., None, :, :]
    change = jnp.zeros(w.shape[:-3], jnp.float32)
    if displaced == "drop":
        part = common_part(unique, u[..., None, :, :], transpose(vt)[..., None, :, :])
        unique = unique - part
        norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axis=(-3, -2, -1)))  # noqa: E731
        change = norm(part) / jnp.maximum(norm(w), jnp.finfo(jnp.float32).tiny)
    return SplitMean(common.astype(experts.dtype), unique.astype(experts.dtype), change)


def to_sd_moe(
    params: Tree, rank: int = 8, *, displaced: Literal["keep", "drop"] = "keep"
) -> tuple[Tree, dict[str, jax.Array]]:
    """Every `experts` of a tree of dicts decomposed by `split_mean`: `common` appears beside it.

    The way back is `fold_common`. Where a dense model comes first, `upcycle_mlp` makes the experts.

    Returns:
      The new tree and `SplitMean.change` by path.
    """
    changes: dict[str, jax.Array] = {}

    def visit(node, path):
        if not isinstance(node, dict):
            return node
        if EXPERTS not in node:
            return {name: visit(child, (*path, name)) for name, child in node.items()}
        if COMMON in node:
            raise ValueError(f"{'/'.join(path) or 'the tree'} is decomposed already")
        split = {
            name: split_mean(w, rank, displaced=displaced) for name, w in node[EXPERTS].items()
        }
        changes.update({"/".join((*path, name)): found.change for name, found in split.items()})
        return node | {
            COMMON: {name: found.common for name, found in split.items()},
            EXPERTS: {name: found.unique for name, found in split.items()},
        }

    return visit(params, ()), changes
