"""What the spectrum of each matrix of a tree looks like, cheap enough to log while training."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_HIGHEST = jax.lax.Precision.HIGHEST
_TINY = jnp.finfo(jnp.float32).tiny
# A Gram matrix squares the condition: below this share of sigma_1, f32 holds no singular value.
_FLOOR = math.sqrt(jnp.finfo(jnp.float32).eps)


class SpectrumStats(NamedTuple):
    """Of one leaf [..., m, n], q = min(m, n); every field is f32 [...] unless said otherwise.

    Attributes:
      spike_50: smallest share of the q singular directions that holds 50 % of the energy.
      spike_90: the same for 90 %.
      sigma_1: largest singular value.
      sigma_ratio: sigma_1 / median singular value, at most 2896 (see `spectrum_stats`).
      entropy_rank: exp(-sum_i p_i log p_i) with p_i = sigma_i^2 / sum sigma^2, between 1 and q.
      stable_rank: sum sigma^2 / sigma_1^2, between 1 and q.
      basis: [..., q, k], the first k singular vectors on the shorter side; None without rank.
      alignment: ||U^T U_previous||_F^2 / k, between 0 and 1; NaN without `previous`, None without
        rank.
    """

    spike_50: jax.Array
    spike_90: jax.Array
    sigma_1: jax.Array
    sigma_ratio: jax.Array
    entropy_rank: jax.Array
    stable_rank: jax.Array
    basis: jax.Array | None = None
    alignment: jax.Array | None = None


def spectrum_stats(
    tree: Any,
    previous: Any = None,
    *,
    rank: int = 0,
    mask: Any | Callable[[Any], Any] | None = None,
    max_side: int = 2048,
    sketch: int = 256,
) -> Any:
    r"""Spike share, effective ranks and alignment of every matrix in a tree.

    With singular values :math:`\sigma_1 \ge \dots \ge \sigma_q` of a leaf :math:`M`, the spike
    share at :math:`\tau` is :math:`\min\{j : \sum_{i \le j} \sigma_i^2 \ge \tau \|M\|_F^2\} / q`,
    and the alignment with an earlier basis :math:`\|U^T U'\|_F^2 / k`: 1 for equal subspaces, k / q
    for unrelated ones. The Spectra paper (`arXiv:2602.11185 <https://arxiv.org/abs/2602.11185>`_)
    names a spike of 1.5 % without printing its measure; these definitions are ours.

    Cost of an exact leaf: the Gram matrix on the shorter side, 2 q^2 max(m, n) FLOPs, and its
    eigenvalues (with `rank`, eigenvectors). Gram matrices square the condition number, so singular
    values below sqrt(eps) = 3.5e-4 of sigma_1 are not resolved in f32; the median is raised to that
    floor.

    Sides above `max_side` get `sketch` = r directions of a randomized subspace iteration instead
    (two sweeps from a fixed Gaussian start; Halko et al. 2011, algorithm 4.4; 12 m n r FLOPs). Its
    r leading values never exceed the true ones and are off by less than
    :math:`(\sigma_{r+1} / \sigma_j)^4` relatively, up to a modest factor; the rest of the energy,
    known exactly from the Frobenius norm, is spread evenly over the other q - r directions. So
    spike shares, entropy rank and stable rank are upper bounds there, and the median is the root
    mean square of the rest where r < q / 2.

    Args:
      tree: pytree of arrays; the last two axes of a leaf are the matrix, those before are batch.
      previous: what an earlier call returned for this tree with the same `rank`, or None.
      rank: number k of leading directions to keep in `basis` (at most q); 0 keeps none.
      mask: tree of bools in the structure of `tree`, or a function from the tree to one: False
        leaves a leaf out (a stack of norm scales is no matrix). Empty leaves and those of fewer
        than two dimensions are always left out.
      max_side: longest shorter side whose spectrum is computed exactly.
      sketch: directions r of the randomized variant; at least `rank`.

    Returns:
      `SpectrumStats` in place of every matrix and None in place of other leaves. A zero matrix has
      zeros everywhere, one with NaN or infinite entries NaN.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optim import spectrum_stats
      >>> stats = spectrum_stats({"w": jnp.diag(jnp.array([2.0, 1.0, 1.0, 1.0]))})["w"]
      >>> print(f"{stats.spike_50:.2f} {stats.sigma_ratio:.2f} {stats.stable_rank:.2f}")
      0.25 2.00 1.75

    Raises:
      ValueError: rank below 0, or sketch below max(rank, 1).
    """
    if rank < 0:
        raise ValueError(f"rank must be 0 or more, got {rank}")
    if sketch < max(rank, 1):
        raise ValueError(f"sketch must be at least max(rank, 1) = {max(rank, 1)}, got {sketch}")
    if previous is not None and not rank:
        raise ValueError("previous is only compared with a basis: give rank above 0 as well")
    if callable(mask):
        mask = mask(tree)
    leaves, treedef = jax.tree.flatten(tree)
    chosen = [True] * len(leaves) if mask is None else treedef.flatten_up_to(mask)
    earlier = [None] * len(leaves) if previous is None else treedef.flatten_up_to(previous)
    stats = [
        _stats(leaf, before, rank, max_side, sketch)
        if use and jnp.ndim(leaf) > 1 and leaf.size
        else None
        for leaf, use, before in zip(leaves, chosen, earlier, strict=True)
    ]
    return treedef.unflatten(stats)


def _stats(x, before: SpectrumStats | None, rank: int, max_side: int, sketch: int):
    x = x.astype(jnp.float32)
    x = x if x.shape[-2] <= x.shape[-1] else x.mT
    q = x.shape[-2]
    largest = jnp.max(jnp.abs(x), axis=(-2, -1))
    finite = jnp.isfinite(largest)
    # Scaled, so that squares neither overflow nor vanish. LAPACK must not see a NaN.
    x = x / jnp.where(finite & (largest > 0), largest, 1.0)[..., None, None]
    x = jnp.where(finite[..., None, None], x, 0.0)
    total = jnp.sum(jnp.square(x), axis=(-2, -1))

    if q <= max_side:
        energies, basis = _eigen(_gram(x), rank)
    else:
        energies, basis = _sketched(x, rank, min(sketch, q))
    values = _spectrum(energies, total, q)

    def good(value):
        value = jnp.asarray(value, jnp.float32)  # shares of integers are float64 if that is enabled
        return jnp.where(finite, jnp.where(total > 0, value, 0.0), jnp.nan)

    values["sigma_1"] *= jnp.where(finite, largest, 0.0)
    stats = SpectrumStats(**{name: good(value) for name, value in values.items()})
    if basis is None:
        return stats
    alignment = jnp.full(total.shape, jnp.nan, jnp.float32)
    if before is not None:
        k = basis.shape[-1]
        overlap = jnp.einsum("...qk,...qj->...kj", basis, before.basis, precision=_HIGHEST)
        alignment = good(jnp.sum(jnp.square(overlap), axis=(-2, -1)) / k)
    return stats._replace(basis=basis, alignment=alignment)


def _gram(x):
    return jnp.einsum("...qn,...pn->...qp", x, x, precision=_HIGHEST)


def _eigen(gram, rank: int):
    """Eigenvalues in falling order, and the first `rank` eigenvectors if there are to be any."""
    if not rank:
        return jnp.linalg.eigvalsh(gram)[..., ::-1], None
    energies, vectors = jnp.linalg.eigh(gram)
    return energies[..., ::-1], vectors[..., ::-1][..., :rank]


def _sketched(x, rank: int, r: int):
    """The r leading energies and singular vectors of x [..., q, n] by subspace iteration."""
    q = x.shape[-2]
    start = jax.random.normal(jax.random.key(0), (*x.shape[:-2], q, r), jnp.float32)
    basis = jnp.linalg.qr(start)[0]
    for _ in range(2):
        across = jnp.einsum("...qn,...qr->...nr", x, basis, precision=_HIGHEST)
        basis = jnp.linalg.qr(jnp.matmul(x, across, precision=_HIGHEST))[0]
    inner = jnp.einsum("...qn,...qr->...rn", x, basis, precision=_HIGHEST)
    energies, vectors = _eigen(_gram(inner), rank)
    if vectors is None:
        return energies, None
    return energies, jnp.matmul(basis, vectors, precision=_HIGHEST)


def _spectrum(energies, total, q: int) -> dict[str, jax.Array]:
    """The scalars from leading energies [..., r], the energy [...] of all q, and a flat rest."""
    energies = jnp.maximum(energies, 0.0)
    r = energies.shape[-1]
    safe = jnp.maximum(total, _TINY)[..., None]
    shares = energies / safe
    cumulative = jnp.cumsum(shares, axis=-1)
    rest = jnp.maximum(1.0 - cumulative[..., -1], 0.0)

    def spike(level):
        count = 1 + jnp.sum(cumulative < level, axis=-1)
        if r == q:
            # Rounding may leave the whole a hair below 1.
            return jnp.minimum(count, q) / q
        beyond = (level - cumulative[..., -1]) * (q - r) / jnp.maximum(rest, _TINY)
        within = cumulative[..., -1] >= level
        return jnp.where(within, count, r + jnp.ceil(jnp.minimum(beyond, q - r))) / q

    entropy = -jnp.sum(shares * jnp.log(jnp.maximum(shares, _TINY)), axis=-1)
    sigma = jnp.sqrt(energies)
    first = sigma[..., 0]
    upper, lower = (q - 1) // 2, q // 2
    if lower < r:
        median = (sigma[..., upper] + sigma[..., lower]) / 2
    else:
        median = jnp.sqrt(rest * safe[..., 0] / (q - r))
    if r < q:
        flat = rest / (q - r)
        entropy = entropy - rest * jnp.log(jnp.maximum(flat, _TINY))
    return {
        "spike_50": spike(0.5),
        "spike_90": spike(0.9),
        "sigma_1": first,
        "sigma_ratio": first / jnp.maximum(median, jnp.maximum(_FLOOR * first, _TINY)),
        "entropy_rank": jnp.exp(entropy),
        "stable_rank": total / jnp.maximum(energies[..., 0], _TINY),
    }
