"""What experts have in common, what routers follow, and how mixed the routes are.

- effective composition number of routes (arXiv 2602.12587, section 2);
- overlap of the experts' leading singular subspaces (SD-MoE, arXiv 2602.12556, has experts share
  more than 0.9 of them; its exact definition is not public, the one here is ours);
- alignment of router columns with the experts' leading input directions (the same paper's);
- shares of tokens by expert.

Matrices multiply from the right, [..., E, D, F] for up and gate, so that inputs are rows: what
papers call right singular vectors of w1 are left ones here.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe._subspace import HIGHEST, matmul, random_basis, sweep, transpose
from moe.sd_moe import COMMON, EXPERTS


class EffectiveCompositions(NamedTuple):
    """See `effective_compositions`."""

    per_route: jax.Array
    """f32 [..., R]: N_eff of each route, from 1 (pure) to C; 0 for routes without tokens."""
    share: jax.Array
    """f32 [..., R]: share of tokens that take it."""
    mean: jax.Array
    """f32 [...]: mean of N_eff, weighted by tokens."""


class ExpertSimilarity(NamedTuple):
    """See `expert_similarity`."""

    left: jax.Array
    """f32 [..., E, E]: overlap of left singular subspaces; by chance rank / m."""
    right: jax.Array
    """f32 [..., E, E]: overlap of right singular subspaces; by chance rank / n."""


class RouterAlignment(NamedTuple):
    """See `router_alignment`."""

    scores: jax.Array
    """f32 [..., E, E]: column i of the router against expert j."""
    matched: jax.Array
    """f32 [...]: mean over i = j."""
    mismatched: jax.Array
    """f32 [...]: mean over all other pairs; 0 for a single expert."""
    baseline: float
    """What a random direction scores, k / D."""
    specificity: jax.Array
    """f32 [...]: matched / mismatched; 1 says that a router column fits every expert alike."""


def route_ids(indices: Any, ordered: bool = False) -> tuple[np.ndarray, int]:
    """Number the routes of tokens: int [N] in [0, R), and R. On the host.

    Args:
      indices: [N, k] chosen experts of each token.
      ordered: whether the order counts, as it does where each column is a router of its own
        (head-wise mixtures).
    """
    rows = np.asarray(indices)
    rows = rows if ordered else np.sort(rows, axis=1)
    _, ids = np.unique(rows, axis=0, return_inverse=True)
    ids = ids.reshape(-1)
    return ids, int(ids.max(initial=-1)) + 1


def composition_counts(
    routes: jax.Array, compositions: jax.Array, num_routes: int, num_compositions: int
) -> jax.Array:
    """int32 [R, C]: tokens of each composition label on each route; labels are int [N] each."""
    at = jnp.asarray(routes) * num_compositions + jnp.asarray(compositions)
    counts = jnp.bincount(at, length=num_routes * num_compositions)
    return counts.reshape(num_routes, num_compositions)


def effective_compositions(counts: jax.Array) -> EffectiveCompositions:
    """N_eff(route) = 1 / sum_c p(c | route)^2, the inverse Simpson index.

    Args:
      counts: [..., R, C] tokens of each composition on each route (`composition_counts`).
    """
    counts = jnp.asarray(counts, jnp.float32)
    tokens = jnp.sum(counts, axis=-1)
    squares = jnp.sum(jnp.square(counts), axis=-1)
    per_route = jnp.square(tokens) / jnp.maximum(squares, 1)
    share = tokens / jnp.maximum(jnp.sum(tokens, axis=-1, keepdims=True), 1)
    return EffectiveCompositions(per_route, share, jnp.sum(share * per_route, axis=-1))


def leading_rank(rows: int, columns: int) -> int:
    """1 % of the singular directions, rounded up."""
    return math.ceil(0.01 * min(rows, columns))


def leading_subspaces(
    w: jax.Array, rank: int | None = None, sweeps: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Leading singular subspaces of [..., m, n]: orthonormal f32 [..., m, k] and [..., n, k].

    Args:
      w: the matrices.
      rank: k; None is `leading_rank`.
      sweeps: of subspace iteration from a fixed random start, twice k wide; None is an exact
        singular value decomposition, which for large experts takes much longer.
    """
    w = w.astype(jnp.float32)
    rows, columns = w.shape[-2:]
    rank = leading_rank(rows, columns) if rank is None else rank
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(f"rank must lie in [1, {min(rows, columns)}], got {rank}")
    if sweeps is None:
        u, _, vt = jnp.linalg.svd(w, full_matrices=False)
        return u[..., :rank], transpose(vt[..., :rank, :])
    wide = min(2 * rank, rows, columns)
    start = random_basis(jax.random.key(0), (*w.shape[:-2], columns, wide))
    u, v = sweep(w, start, sweeps)
    # Within the wider bases, the leading k: by the small matrix U^T w V.
    a, _, bt = jnp.linalg.svd(matmul(matmul(transpose(u), w), v))
    return matmul(u, a[..., :rank]), matmul(v, transpose(bt[..., :rank, :]))


def expert_similarity(
    experts: jax.Array, rank: int | None = None, sweeps: int | None = None
) -> ExpertSimilarity:
    """sim(i, j) = ||U_i^T U_j||_F^2 / k: share of expert i's leading subspace that is in j's.

    Args:
      experts: [..., E, m, n].
      rank: k; None is 1 % of min(m, n), rounded up.
      sweeps: see `leading_subspaces`.
    """
    u, v = leading_subspaces(experts, rank, sweeps)
    return ExpertSimilarity(_overlap(u), _overlap(v))


def _overlap(basis: jax.Array) -> jax.Array:
    gram = jnp.einsum("...imk,...jml->...ikjl", basis, basis, precision=HIGHEST)
    return jnp.sum(jnp.square(gram), axis=(-3, -1)) / basis.shape[-1]


def off_diagonal_mean(matrix: jax.Array) -> jax.Array:
    """Mean over pairs i != j of [..., E, E]; 0 for a single expert."""
    size = matrix.shape[-1]
    total = jnp.sum(matrix, axis=(-2, -1)) - jnp.trace(matrix, axis1=-2, axis2=-1)
    return total / max(size * (size - 1), 1)


def router_alignment(
    router: jax.Array, experts: jax.Array, rank: int | None = None, sweeps: int | None = None
) -> RouterAlignment:
    """score(i, j) = ||U_j^T r_i||^2, r_i the unit column i of the router.

    U_j is the basis of expert j's k leading input directions.

    Args:
      router: [..., D, E].
      experts: [..., E, D, F], gate or up.
      rank: k; None is 1 % of min(D, F), rounded up.
      sweeps: see `leading_subspaces`.
    """
    u, _ = leading_subspaces(experts, rank, sweeps)
    r = router.astype(jnp.float32)
    r = r / jnp.maximum(jnp.linalg.norm(r, axis=-2, keepdims=True), jnp.finfo(jnp.float32).tiny)
    projected = jnp.einsum("...di,...jdk->...ijk", r, u, precision=HIGHEST)
    scores = jnp.sum(jnp.square(projected), axis=-1)
    matched = jnp.trace(scores, axis1=-2, axis2=-1) / scores.shape[-1]
    mismatched = off_diagonal_mean(scores)
    specificity = matched / jnp.maximum(mismatched, jnp.finfo(jnp.float32).tiny)
    return RouterAlignment(scores, matched, mismatched, u.shape[-1] / u.shape[-2], specificity)


def utilization(
    indices: jax.Array, num_experts: int, groups: jax.Array | None = None, num_groups: int = 1
) -> jax.Array:
    """f32 [G, E]: share of each group's assignments that went to each expert; rows add up to 1.

    Args:
      indices: int [N, k] chosen experts; those outside of [0, E) count for none.
      num_experts: E.
      groups: int [N], the group (domain, task, position) of each token; None is one group.
      num_groups: G.
    """
    groups = jnp.zeros(indices.shape[0], jnp.int32) if groups is None else jnp.asarray(groups)
    kept = (indices >= 0) & (indices < num_experts)
    at = jnp.where(kept, groups[:, None] * num_experts + indices, num_groups * num_experts)
    counts = jnp.bincount(at.reshape(-1), length=num_groups * num_experts + 1)[:-1]
    counts = counts.reshape(num_groups, num_experts).astype(jnp.float32)
    return counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1)


def expert_metrics(
    params: Any, rank: int | None = None, sweeps: int | None = None
) -> dict[str, jax.Array]:
    """f32 scalars that describe the experts in a parameter tree, means over layers and pairs.

    For every node with `experts` {name: [..., E, m, n]}, by name and side ("left", "right"):

    - similarity/NAME/SIDE: `expert_similarity` of the experts, W_c + W_u,i if decomposed;
    - unique_similarity/NAME/SIDE: that of the W_u,i, if decomposed;
    - alignment/NAME/{matched,mismatched,specificity} if there is `router` {kernel: [..., D, E]},
      for the names gate and up.

    Several such nodes must have different paths; the part of the path before `experts` comes first
    where it is not "layers/mlp".
    """
    found = {}

    def describe(node, path):
        if not isinstance(node, dict):
            return
        if EXPERTS in node:
            names = [name for name in path if name not in ("layers", "mlp")]
            for name, value in _node_metrics(node, rank, sweeps).items():
                found["/".join([*names, name])] = value
        for name, child in node.items():
            describe(child, (*path, name))

    describe(params, ())
    return found


def _node_metrics(node, rank, sweeps) -> dict[str, jax.Array]:
    found = {}
    for name, experts in node[EXPERTS].items():
        trees = {"similarity": experts}
        if COMMON in node:
            trees["unique_similarity"] = experts
            common = node[COMMON][name].astype(jnp.float32)
            trees["similarity"] = experts.astype(jnp.float32) + common[..., None, :, :]
        for what, tree in trees.items():
            for side, overlap in expert_similarity(tree, rank, sweeps)._asdict().items():
                found[f"{what}/{name}/{side}"] = jnp.mean(off_diagonal_mean(overlap))
        kernel = node.get("router", {}).get("kernel")
        if kernel is not None and name in ("gate", "up"):
            alignment = router_alignment(kernel, trees["similarity"], rank, sweeps)
            for what in ("matched", "mismatched", "specificity"):
                found[f"alignment/{name}/{what}"] = jnp.mean(getattr(alignment, what))
    return found


def plot_maps(maps: dict[str, Any], *, vmax: float | None = None):
    """A row of heat maps, one for each title: similarities, alignments, utilizations [rows, E].

    Returns the matplotlib figure; save it with `figure.savefig(path)`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(maps), 3), layout="constrained")
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for axis, (title, values) in zip(axes, maps.items(), strict=True):
        image = axis.imshow(np.asarray(values), vmin=0, vmax=vmax, aspect="auto", cmap="viridis")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("expert")
        figure.colorbar(image, ax=axis, shrink=0.8)
    return figure
