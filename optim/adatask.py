"""AdaTask: adaptive optimizers that keep the statistics of every task apart.

One accumulator of squared gradients over all tasks lets a task with large gradients shrink the
steps of the others. AdaTask (Yang et al., AAAI 2023, arXiv 2211.15055) gives each task its own.
"""

import numbers
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import MaskedNode

from optim.task_gradients import JOINT, SHARED, SharedMask, leaf_paths, task_owners

__all__ = ["ScaleByAdataskState", "adatask", "scale_by_adatask"]

Base = Literal["adam", "rmsprop", "adagrad"]
BASES = ("adam", "rmsprop", "adagrad")
NUMERATORS = ("momentum", "gradient")


class ScaleByAdataskState(NamedTuple):
    """State for the AdaTask algorithm; K is the number of tasks.

    Attributes:
      steps: updates so far.
      count: updates so far in which each task was present.
      mu: first moments, [K, ...] for shared parameters; None unless the base is Adam.
      nu: second moments, [K, ...] for shared parameters (without the task axis if ``joint``).
      au: averages of squared updates of shared parameters, [K, ...]; None if not asked for.
    """

    steps: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32.
    count: jax.typing.ArrayLike  # shape=(K,), dtype=jnp.int32.
    mu: Any
    nu: Any
    au: Any


def scale_by_adatask(
    num_tasks: int,
    base: Base = "adam",
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    decay: jax.typing.ArrayLike = 0.9,
    mu_dtype: Any | None = None,
    *,
    shared: SharedMask = None,
    joint: bool = False,
    dominance_decay: jax.typing.ArrayLike | None = None,
    dominance_numerator: Literal["momentum", "gradient"] = "momentum",
) -> optax.GradientTransformationExtraArgs:
    r"""Rescale and sum the gradients of several tasks according to the AdaTask algorithm.

    See :func:`optim.adatask` for the algorithm. Updates go in with a leading task axis, [K, ...],
    for shared parameters, and come out in the parameters' shapes. The extra argument ``present``
    of ``update``, bool [K], names the tasks that have data in this step (default: all). An absent
    task adds nothing to the update, and its moments and step count stay as they are, whatever its
    gradients hold.

    The average of updates of a task, the paper's measure of dominance, is kept on request,

    .. math::

      AU_k \leftarrow \gamma_a AU_k + (1 - \gamma_a) u_k^2

    where :math:`\gamma_a` is ``dominance_decay`` and :math:`u_k` what the task adds to the update
    before the learning rate, 0 while it is absent; :func:`optim.task_dominance` reads it.

    Args:
      num_tasks: number of tasks, K.
      base: the optimizer whose statistics are kept per task.
      b1: Adam: decay rate of the first moments.
      b2: Adam: decay rate of the second moments.
      eps: added to the denominator, outside of the square root.
      decay: RMSProp: decay rate of the second moments.
      mu_dtype: dtype of the first moments; None is that of the parameters. The rest of the state
        is in float32 at least, as is the arithmetic.
      shared: which parameters the tasks share: None (all), a tree like the parameters or a prefix
        of it, or a function of a parameter's path (``"head/0/kernel"``). Values are True, False
        (the gradient has no task axis, and the base optimizer is applied to it) or the number of
        the task that alone uses the parameter, which then rests when that task is absent.
      joint: one second moment of the sum of the gradients for all tasks, which is the base
        optimizer on the summed losses: the baseline for :func:`optim.task_dominance`. There an
        absent task counts as a gradient of 0.
      dominance_decay: decay rate of the averages of updates, which cost K numbers per shared
        parameter; None keeps none.
      dominance_numerator: Adam: whether :math:`u_k` is what the task's first moment adds
        ("momentum", what really moves the parameters) or what its gradient alone would
        ("gradient").

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`.
    """
    if not isinstance(num_tasks, numbers.Integral) or num_tasks < 1:
        raise ValueError(
            f"num_tasks must be a whole number above 0, got {num_tasks!r} (with "
            "optax.inject_hyperparams, give static_args=('num_tasks',))"
        )
    if base not in BASES:
        raise ValueError(f"base must be one of {', '.join(BASES)}, got {base!r}")
    if dominance_numerator not in NUMERATORS:
        raise ValueError(
            f"dominance_numerator must be one of {', '.join(NUMERATORS)}, "
            f"got {dominance_numerator!r}"
        )
    mu_dtype = None if mu_dtype is None else jax.dtypes.canonicalize_dtype(mu_dtype)

    def init_fn(params) -> ScaleByAdataskState:
        leaves, treedef = jax.tree.flatten(params)
        owners = task_owners(shared, params, num_tasks)

        def zeros(dtype_of, stacked=True, specific=True):
            def leaf(p, owner):
                if owner != SHARED and not specific:
                    return MaskedNode()
                zero = jnp.zeros_like(p, dtype=dtype_of(p))  # laid out like the parameter
                if owner != SHARED or not stacked:
                    return zero
                return jnp.broadcast_to(zero[None], (num_tasks, *p.shape))

            pairs = zip(leaves, owners, strict=True)
            return jax.tree.unflatten(treedef, [leaf(p, owner) for p, owner in pairs])

        return ScaleByAdataskState(
            steps=jnp.zeros([], jnp.int32),
            count=jnp.zeros([num_tasks], jnp.int32),
            mu=zeros(lambda p: mu_dtype or p.dtype) if base == "adam" else None,
            nu=zeros(_wide, stacked=not joint),
            au=None if dominance_decay is None else zeros(_wide, specific=False),
        )

    def second_moment(g, nu, t):
        """New second moment, and its estimate free of the bias towards 0."""
        if base == "adagrad":
            nu = nu + g**2
            return nu, nu
        rate = b2 if base == "adam" else decay
        nu = (1 - rate) * (g**2) + rate * nu
        return nu, _unbiased(nu, rate, t) if base == "adam" else nu

    def update_leaf(g, mu, nu, au, t, present):
        """Of one parameter; every argument has an axis of tasks in front, or one of size 1."""
        t = _column(t, g)
        present = None if present is None else _column(present, g)
        pooled = jnp.sum(g, axis=0, keepdims=True) if nu.shape != g.shape else g
        new_nu, nu_hat = second_moment(pooled, nu, t)
        scale = jnp.sqrt(nu_hat) + eps
        numerator = new_mu = g
        if base == "adam":
            new_mu = (1 - b1) * g + b1 * mu
            numerator = _unbiased(new_mu, b1, t)
        update = numerator / scale
        if dominance_decay is not None:
            moved = update if dominance_numerator == "momentum" else g / scale
            moved = moved if present is None else jnp.where(present, moved, 0)
            au = jnp.asarray(au)
            average = dominance_decay * au + (1 - dominance_decay) * moved**2
            au = average.astype(au.dtype)
        if present is None:
            return update, new_mu, new_nu, au
        keep = lambda new, old: jnp.where(present, new, old)  # noqa: E731
        return keep(update, 0), keep(new_mu, mu), keep(new_nu, nu), au

    def update_shared(g, mu, nu, au, steps, count, present):
        if not joint:
            return update_leaf(g, mu, nu, au, count, present)
        # The base optimizer knows of no tasks: absent ones have a gradient of 0.
        g = g if present is None else jnp.where(_column(present, g), g, 0)
        update, mu, nu, au = update_leaf(g, mu, nu[None], au, steps[None], None)
        return update, mu, nu[0], au

    def update_specific(g, mu, nu, steps, count, present, owner):
        t, here = steps[None], None
        if owner != JOINT:
            t, here = count[owner][None], None if present is None else present[owner][None]
        # Its dominance is not asked for: any number will do.
        update, mu, nu, _ = update_leaf(g[None], mu[None], nu[None], 0.0, t, here)
        return update, mu[0], nu[0], MaskedNode()

    def update_fn(updates, state, params=None, *, present=None, **extra_args):
        del params, extra_args
        steps = jnp.asarray(optax.safe_increment(state.steps))
        count = jnp.asarray(optax.safe_increment(state.count))
        if present is not None:
            present = jnp.asarray(present, jnp.bool_)
            if present.shape != (num_tasks,):
                raise ValueError(f"present must be bool [{num_tasks}], got {present.shape}")
            count = jnp.where(present, count, state.count)
        leaves, treedef = jax.tree.flatten(updates)
        paths = leaf_paths(updates)
        owners = task_owners(shared, updates, num_tasks)
        old = [
            [None] * len(leaves) if tree is None else treedef.flatten_up_to(tree)
            for tree in (state.mu, state.nu, state.au)
        ]
        new: tuple[list, ...] = ([], [], [], [])
        for path, g, owner, mu, nu, au in zip(paths, leaves, owners, *old, strict=True):
            split = owner == SHARED
            stacked = nu.shape[1:] if split and not joint else nu.shape
            wanted = (num_tasks, *stacked) if split else nu.shape
            if g.shape != wanted:
                raise ValueError(
                    f"the gradient of {path!r} must have shape {wanted}, "
                    f"{'with' if split else 'without'} the axis of {num_tasks} tasks; got {g.shape}"
                )
            wide = g.astype(_wide(g))
            first = wide if mu is None else mu.astype(_wide(g))  # a base without it: not used
            if split:
                done = update_shared(wide, first, nu, au, steps, count, present)
            else:
                done = update_specific(wide, first, nu, steps, count, present, owner)
            update, new_mu, new_nu, new_au = done
            results = (
                jnp.sum(update, axis=0).astype(g.dtype),
                None if mu is None else new_mu.astype(mu.dtype),
                new_nu.astype(nu.dtype),
                new_au,
            )
            for column, leaf in zip(new, results, strict=True):
                column.append(leaf)
        out, mu, nu, au = (jax.tree.unflatten(treedef, column) for column in new)
        return out, ScaleByAdataskState(
            steps=steps,
            count=count,
            mu=None if state.mu is None else mu,
            nu=nu,
            au=None if state.au is None else au,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def adatask(
    learning_rate: optax.ScalarOrSchedule,
    num_tasks: int,
    base: Base = "adam",
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    decay: jax.typing.ArrayLike = 0.9,
    mu_dtype: Any | None = None,
    *,
    shared: SharedMask = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    joint: bool = False,
    dominance_decay: jax.typing.ArrayLike | None = None,
    dominance_numerator: Literal["momentum", "gradient"] = "momentum",
) -> optax.GradientTransformationExtraArgs:
    r"""The AdaTask optimizer.

    AdaTask trains parameters that several tasks share with an adaptive optimizer whose statistics
    are kept for each task, so that a task with large gradients does not shrink the steps of the
    others. The tasks' updates are added, not averaged: a step is up to K times as long as one of
    the base optimizer on the summed losses.

    Let :math:`g_k` be the gradient of the loss of task k, :math:`\alpha` the ``learning_rate``,
    :math:`\beta_1, \beta_2, \varepsilon, \gamma, \lambda` the arguments ``b1``, ``b2``, ``eps``,
    ``decay`` and ``weight_decay``, and :math:`t_k` the number of steps in which task k was present.
    With ``base="adam"`` a shared parameter :math:`\theta` and its state
    :math:`m_k = v_k = 0` become

    .. math::

      \begin{align*}
        m_k &\leftarrow \beta_1 m_k + (1 - \beta_1) g_k \\
        v_k &\leftarrow \beta_2 v_k + (1 - \beta_2) g_k^2 \\
        \theta &\leftarrow \theta - \alpha \left( \sum_{k=1}^K
          \frac{m_k / (1 - \beta_1^{t_k})}{\sqrt{v_k / (1 - \beta_2^{t_k})} + \varepsilon}
          + \lambda \theta \right)
      \end{align*}

    With ``base="rmsprop"``, :math:`v_k \leftarrow \gamma v_k + (1 - \gamma) g_k^2`, and with
    ``base="adagrad"``, :math:`v_k \leftarrow v_k + g_k^2`; in both the sum is over
    :math:`g_k / (\sqrt{v_k} + \varepsilon)`. Weight decay is decoupled and applied once. Parameters
    that are not shared get the base optimizer on the gradient of the summed losses.

    .. note::
      The state of shared parameters has K times the size of the base optimizer's. Wrappers that
      return updates in the gradients' shapes do not fit: instead of ``optax.apply_if_finite`` use
      ``optax.MultiSteps(tx, 1, should_skip_update_fn=optax.skip_not_finite)``, and give the state
      of ``MultiSteps`` accumulators in the gradients' shapes, ``state._replace(acc_grads=...)``.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optim
      >>> def losses(x):  # one per task; the second is a thousand times as steep
      ...     return jnp.stack([jnp.sum((x - 1.0) ** 2), 1e3 * jnp.sum((x - 2.0) ** 2)])
      >>> x = jnp.zeros(3)
      >>> tx = optim.adatask(learning_rate=0.1, num_tasks=2)
      >>> state = tx.init(x)
      >>> for _ in range(5):
      ...     values, grads = optim.per_task_value_and_grad(losses)(x)  # [2], [2, 3]
      ...     updates, state = tx.update(grads, state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> print("{:.2f}".format(x[0]))
      0.96

    References:
      Yang et al., `AdaTask: A Task-aware Adaptive Learning Rate Approach to Multi-task Learning
      <https://arxiv.org/abs/2211.15055>`_, 2023

    Args:
      learning_rate: a global scaling factor, either fixed or evolving along iterations with a
        scheduler, see :func:`optax.scale_by_learning_rate`.
      num_tasks: number of tasks, K.
      base: the optimizer whose statistics are kept per task.
      b1: Adam: decay rate of the first moments.
      b2: Adam: decay rate of the second moments.
      eps: added to the denominator, outside of the square root.
      decay: RMSProp: decay rate of the second moments.
      mu_dtype: dtype of the first moments; None is that of the parameters.
      shared: which parameters the tasks share, see :func:`optim.scale_by_adatask`.
      weight_decay: strength of the decoupled weight decay, multiplied by the learning rate.
      mask: the parameters that decay, as in :func:`optax.adamw`.
      joint: see :func:`optim.scale_by_adatask`.
      dominance_decay: see :func:`optim.scale_by_adatask`.
      dominance_numerator: see :func:`optim.scale_by_adatask`.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`; ``update`` takes gradients
      with a leading task axis for shared parameters, and the extra argument ``present``.

    .. seealso::
      :func:`optim.per_task_value_and_grad` for the gradients, :func:`optim.task_dominance` for the
      share that each task has in the updates.
    """
    return optax.chain(
        scale_by_adatask(
            num_tasks,
            base,
            b1=b1,
            b2=b2,
            eps=eps,
            decay=decay,
            mu_dtype=mu_dtype,
            shared=shared,
            joint=joint,
            dominance_decay=dominance_decay,
            dominance_numerator=dominance_numerator,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _wide(x: jax.Array) -> jnp.dtype:
    """float32, or the dtype of `x` if that is wider."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _column(x: jax.Array, like: jax.Array) -> jax.Array:
    """[K] as [K, 1, ...] with the rank of `like`."""
    return x.reshape(x.shape + (1,) * (like.ndim - 1))


def _unbiased(moment: jax.Array, rate: Any, t: jax.Array) -> jax.Array:
    return moment / (1 - rate**t).astype(moment.dtype)
