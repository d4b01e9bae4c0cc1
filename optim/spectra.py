"""Spectra: lower the spike of the momentum's spectrum to the level of its tail.

A few directions of a gradient matrix hold most of its energy. Spectra finds them by a power
iteration whose basis is kept between steps, replaces their singular values by the root mean square
of all others, and leaves those others as they are (arXiv 2602.11185).
"""

import functools
import numbers
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim._matrices import DimensionNumbers, matrix_views
from optim._orthogonal import unit_columns
from optim._spike import normalize, shape_spike
from optim.labels import matrix_labels


class ScaleBySpectraState(NamedTuple):
    """State of the Spectra algorithm."""

    count: jax.Array
    """Number of updates so far, int32."""
    mu: optax.Updates
    """Momentum of every parameter, in `momentum_dtype`."""
    basis: optax.Updates
    """Cached basis of the spike, [..., min(m, n), k] for a parameter of stacked m x n matrices."""
    row_nu: optax.Updates | None = None
    """Average square of the rows of the shaped update, [..., m]; None without normalization."""
    column_nu: optax.Updates | None = None
    """Average square of its columns, [..., n]; None without normalization."""


def spike_rank(rows: int, columns: int, rank_ratio: float, min_rank: int) -> int:
    """k = max(min_rank, round(rank_ratio * q)), at most q - 1, for q = min(rows, columns)."""
    q = min(rows, columns)
    return max(min(max(min_rank, round(rank_ratio * q)), q - 1), 0)


def scale_by_spectra(
    rank_ratio: float = 0.015,
    min_rank: int = 1,
    power_iters: int = 1,
    momentum: float = 0.95,
    init_iters: int = 8,
    eps: float = 1e-8,
    momentum_dtype: Any | None = None,
    dimension_numbers: DimensionNumbers = None,
    *,
    rank: Literal["share", "auto"] = "share",
    nesterov: bool = False,
    normalization: Literal["factored"] | None = None,
    normalization_decay: float = 0.95,
) -> optax.GradientTransformation:
    r"""Rescale updates by the Spectra algorithm.

    For a parameter of shape :math:`m \times n`, with :math:`q = \min(m, n)` and spike rank
    :math:`k`, an update is

    .. math::
      M &\leftarrow \mu M + G \\
      U &= \mathrm{orth}(M V), \quad W = M^\top U \\
      V &\leftarrow W \, \mathrm{diag}(\lVert w_1 \rVert, \dots, \lVert w_k \rVert)^{-1} \\
      \sigma^2 &= (\lVert M \rVert_F^2 - \lVert W \rVert_F^2) / (q - k) \\
      \Delta &= 0.2 \sqrt{\max(m, n)} \; (M + U (\sigma V - W)^\top) / \sigma

    with :math:`\mu` = ``momentum``, :math:`M` the ``mu`` and :math:`V` the ``basis`` of the state
    (for :math:`m < n` the roles of :math:`M` and :math:`M^\top` are exchanged, so the basis lies on
    the shorter side). The second to fourth lines are repeated ``power_iters`` times. Because
    :math:`U U^\top M = U W^\top` exactly, the tail is never formed, and the root mean square of
    :math:`\Delta` is 0.2 by construction.

    The update does not change when the gradients are scaled (as long as the root mean square of the
    momentum is well above ``eps``), and turns with them under rotations of either side. A zero
    gradient history gives a zero update. Where the momentum has rank k or less there is no tail to
    take :math:`\sigma` from: it is then bounded below by rounding, so that noise is not blown up,
    and the update is the polar factor of the spike, whose root mean square is less than 0.2. NaN
    and infinities in a gradient give NaN in that parameter's update and state;
    :func:`optax.apply_if_finite` keeps them out. That needs float32 gradients, since it returns
    updates in the gradients' dtype; for lower precision there is ``optax.MultiSteps(tx, 1,
    should_skip_update_fn=optax.skip_not_finite)``.

    Args:
      rank_ratio: Share of the singular directions taken to be the spike; 0.015 is the paper's.
      min_rank: Smallest number of spike directions. Below a width of about 512, where the paper's
        share is a handful of directions, more are advised.
      power_iters: Sweeps of the power iteration a step.
      momentum: Decay of the momentum, a sum without the factor ``1 - momentum``.
      init_iters: Sweeps of the first step, whose basis is random.
      eps: Added to the root mean square of the shaped momentum, by which it is divided.
      momentum_dtype: Dtype of the momentum; ``None`` is float32, or the parameter's dtype where
        that is wider. All arithmetic is in that of the two which is wider.
      dimension_numbers: A :class:`optax.contrib.MuonDimensionNumbers`, a tree of them with the
        structure of the parameters, or a function from the parameters to such a tree: which axes
        are rows and columns. All other axes are a stack of independent matrices (layers, experts,
        heads). By default the last two axes are the matrix, which is wrong for kernels that spread
        a matrix over three axes (Flax's attention: [features, heads, head_dim]) and for
        convolutions with the window last: name their axes, or leave them to another optimizer.
      rank: ``"share"``: the spike is k directions. ``"auto"``: k is the largest number; the spike
        is those of them that stand above the edge of the spectrum that noise of the same level
        would have (Marchenko and Pastur 1967), at least ``min_rank``; :math:`\sigma` is the level
        of all others. Not in the paper.
      nesterov: Shape ``momentum * M + G`` instead of :math:`M`.
      normalization: ``"factored"`` divides :math:`\Delta` by the square root of
        :math:`r_i c_j / \bar r`, where r and c are bias-corrected averages of the squares of its
        rows and columns over time (Adafactor's second moment, arXiv 1804.04235), and brings the
        root mean square back to 0.2. Not in the paper.
      normalization_decay: Decay of those averages.

    Returns:
      A :class:`optax.GradientTransformation`. Updates are float32 or wider.

    Examples:
      >>> import optim, jax, jax.numpy as jnp
      >>> tx = optim.scale_by_spectra()
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> state = tx.init(params)
      >>> gradients = {"kernel": 3.0 + jax.random.normal(jax.random.key(0), (64, 32))}
      >>> updates, state = tx.update(gradients, state)
      >>> print(f"{jnp.sqrt(jnp.mean(updates['kernel'] ** 2)):.4f}")
      0.2000

    References:
      Huang et al., `Spectra <https://arxiv.org/abs/2602.11185>`_, 2026
    """
    _check(rank_ratio, min_rank, power_iters, init_iters, rank, normalization)

    shape = functools.partial(
        shape_spike,
        power_iters=power_iters,
        init_iters=init_iters,
        eps=eps,
        auto=rank == "auto",
        min_rank=min_rank,
    )

    def rank_of(view):
        return spike_rank(view.shape[-2], view.shape[-1], rank_ratio, min_rank)

    def init(params) -> Any:
        leaves, structure = jax.tree.flatten(params)
        mu, basis, rows, columns = [], [], [], []
        for number, (leaf, view) in enumerate(
            zip(leaves, matrix_views(params, dimension_numbers), strict=True)
        ):
            wide = _wide(leaf.dtype)
            mu.append(jnp.zeros_like(leaf, dtype=momentum_dtype or wide))
            key = jax.random.fold_in(jax.random.key(0), number)
            size = (*view.shape[:-2], min(view.shape[-2:]), rank_of(view))
            basis.append(unit_columns(jax.random.normal(key, size, wide))[0])
            rows.append(jnp.zeros(view.shape[:-1], wide))
            columns.append(jnp.zeros((*view.shape[:-2], view.shape[-1]), wide))
        return ScaleBySpectraState(
            jnp.zeros([], jnp.int32),
            structure.unflatten(mu),
            structure.unflatten(basis),
            structure.unflatten(rows) if normalization else None,
            structure.unflatten(columns) if normalization else None,
        )

    def update(updates, state, params=None) -> Any:
        del params
        gradients, structure = jax.tree.flatten(updates)
        views = matrix_views(updates, dimension_numbers)
        count = jnp.asarray(optax.safe_increment(state.count))
        old = [state.mu, state.basis]
        old += [state.row_nu, state.column_nu] if normalization else []
        shaped, new = [], [[] for _ in old]
        for g, view, mu, v, *nu in zip(
            gradients, views, *map(structure.flatten_up_to, old), strict=True
        ):
            g = g.astype(v.dtype)
            # A NumPy scalar would widen everything where 64 bits are enabled.
            decay = jnp.asarray(momentum, v.dtype)
            total = decay * mu.astype(v.dtype) + g
            m = view.split(decay * total + g if nesterov else total)
            with jax.named_scope("spectra"):
                delta, v = shape(m, v, state.count == 0)
                if normalization:
                    delta, *nu = normalize(delta, nu[0], nu[1], normalization_decay, count)
            shaped.append(view.join(delta))
            for leaves, leaf in zip(new, (total.astype(mu.dtype), v, *nu), strict=True):
                leaves.append(leaf)
        trees: list[Any] = [structure.unflatten(leaves) for leaves in new] + [None, None]
        return structure.unflatten(shaped), ScaleBySpectraState(
            count, mu=trees[0], basis=trees[1], row_nu=trees[2], column_nu=trees[3]
        )

    return optax.GradientTransformation(init, update)


def spectra(
    learning_rate: optax.ScalarOrSchedule,
    rank_ratio: float = 0.015,
    min_rank: int = 1,
    power_iters: int = 1,
    momentum: float = 0.95,
    init_iters: int = 8,
    eps: float = 1e-8,
    momentum_dtype: Any | None = None,
    dimension_numbers: DimensionNumbers = None,
    weight_decay: float = 0.0,
    weight_decay_mask: Any | Callable[[Any], Any] | None = None,
    adam_b1: float = 0.9,
    adam_b2: float = 0.95,
    adam_eps: float = 1e-8,
    label_fn: Callable[[Any], Any] | None = None,
    *,
    rank: Literal["share", "auto"] = "share",
    nesterov: bool = False,
    normalization: Literal["factored"] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Spectra on hidden matrices, AdamW on everything else, at one learning rate.

    Args:
      learning_rate: A fixed or scheduled learning rate; updates of both parts have about AdamW's
        root mean square, so AdamW's learning rate is where to start.
      rank_ratio: See :func:`scale_by_spectra`, as for all arguments up to ``dimension_numbers``.
      min_rank: See :func:`scale_by_spectra`.
      power_iters: See :func:`scale_by_spectra`.
      momentum: See :func:`scale_by_spectra`.
      init_iters: See :func:`scale_by_spectra`.
      eps: See :func:`scale_by_spectra`.
      momentum_dtype: See :func:`scale_by_spectra`; also the dtype of AdamW's first moment.
      dimension_numbers: See :func:`scale_by_spectra`.
      weight_decay: Strength of the decoupled weight decay, times the learning rate.
      weight_decay_mask: A tree of bools with the structure of the parameters, or a function from
        the parameters to one: what weight decay applies to. ``None`` is everything.
      adam_b1: Decay of AdamW's first moment.
      adam_b2: Decay of AdamW's second moment.
      adam_eps: AdamW's epsilon.
      label_fn: A function from the parameters to a tree of ``"spectra"`` and ``"adamw"``. By
        default :func:`matrix_labels`: hidden matrices to Spectra; embeddings, heads, routers,
        norms, biases and vectors to AdamW.
      rank: See :func:`scale_by_spectra`.
      nesterov: See :func:`scale_by_spectra`.
      normalization: See :func:`scale_by_spectra`.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optim
      >>> x, y = jax.random.normal(jax.random.key(0), (2, 64, 16))
      >>> params = {"dense": {"kernel": jnp.eye(16), "bias": jnp.zeros(16)}}
      >>> def loss(params):
      ...   kernel, bias = params["dense"]["kernel"], params["dense"]["bias"]
      ...   return jnp.mean((x @ kernel + bias[None] - y) ** 2)
      >>> tx = optim.spectra(learning_rate=0.1)
      >>> state = tx.init(params)
      >>> for _ in range(30):
      ...   updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...   params = optax.apply_updates(params, updates)
      >>> print(f"{loss(params):.1f}")
      0.9

    References:
      Huang et al., `Spectra <https://arxiv.org/abs/2602.11185>`_, 2026
    """
    decayed = _prune(weight_decay_mask)
    matrices = optax.chain(
        scale_by_spectra(
            rank_ratio,
            min_rank,
            power_iters,
            momentum,
            init_iters,
            eps,
            momentum_dtype,
            dimension_numbers,
            rank=rank,
            nesterov=nesterov,
            normalization=normalization,
        ),
        optax.add_decayed_weights(weight_decay, decayed),
        optax.scale_by_learning_rate(learning_rate),
    )
    others = optax.adamw(
        learning_rate,
        b1=adam_b1,
        b2=adam_b2,
        eps=adam_eps,
        mu_dtype=momentum_dtype,
        weight_decay=weight_decay,
        mask=decayed,
    )
    return optax.partition(
        {"spectra": matrices, "adamw": others},
        label_fn or (lambda params: matrix_labels(params, "spectra", "adamw")),
    )


def _prune(mask):
    """A tree of bools as a function that leaves out what another part of the optimizer takes."""
    if mask is None or callable(mask):
        return mask
    masked = lambda p: isinstance(p, optax.MaskedNode)  # noqa: E731
    return lambda params: jax.tree.map(
        lambda p, m: p if masked(p) else m, params, mask, is_leaf=masked
    )


def _wide(dtype):
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"a parameter of dtype {dtype} is no real matrix: leave it to another optimizer with "
            "optax.partition or optax.masked"
        )
    return jnp.promote_types(dtype, jnp.float32)


def _check(rank_ratio, min_rank, power_iters, init_iters, rank, normalization):
    static = dict(
        rank_ratio=rank_ratio, min_rank=min_rank, power_iters=power_iters, init_iters=init_iters
    )
    for name, value in static.items():
        if isinstance(value, jax.Array):
            raise TypeError(
                f"{name} decides what is compiled, so it cannot be an array: give "
                f"optax.inject_hyperparams static_args={tuple(static)}"
            )
    if not 0 <= rank_ratio <= 1:
        raise ValueError(f"rank_ratio must lie in [0, 1], got {rank_ratio}")
    for name in ("min_rank", "power_iters", "init_iters"):
        if not isinstance(static[name], numbers.Integral):
            raise TypeError(f"{name} must be a whole number, got {static[name]!r}")
    if min_rank < 0:
        raise ValueError(f"min_rank must be 0 or more, got {min_rank}")
    for name in ("power_iters", "init_iters"):
        if static[name] < 1:
            raise ValueError(f"{name} must be 1 or more, got {static[name]}")
    if rank not in ("share", "auto"):
        raise ValueError(f"rank must be 'share' or 'auto', got {rank!r}")
    if normalization not in ("factored", None):
        raise ValueError(f"normalization must be 'factored' or None, got {normalization!r}")
