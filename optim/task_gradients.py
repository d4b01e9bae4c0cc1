"""Gradients of several losses from one forward pass, and which parameters the losses share."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

__all__ = ["JOINT", "SHARED", "leaf_paths", "per_task_value_and_grad", "task_owners"]

SHARED: Literal[-1] = -1
"""`task_owners` of a parameter that all tasks share."""
JOINT: Literal[-2] = -2
"""`task_owners` of a parameter without a task axis that no one task owns."""

SharedMask = optax.Params | Callable[[str], bool | int] | None


def leaf_paths(tree: Any) -> list[str]:
    """The paths of the leaves of `tree`, keys joined by "/"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def task_owners(shared: SharedMask, tree: Any, num_tasks: int) -> list[int]:
    """For each leaf of `tree`, in order: `SHARED`, `JOINT`, or the one task it belongs to.

    Args:
      shared: None (everything is shared), a tree with the structure of `tree` or a prefix of it, or
        a function of a leaf's path, the keys joined by "/" (``"encoder/0/kernel"``). Its values are
        True (shared), False (specific to some tasks) or an int in [0, num_tasks), the task that
        alone uses the parameter.
      tree: parameters or updates.
      num_tasks: K.

    Raises:
      ValueError: a value that is none of these, or a tree that is no prefix.
    """
    paths = leaf_paths(tree)
    if not paths:  # also the placeholder with which optax.tree.map_params calls init
        return []
    if shared is None:
        values: list[Any] = [True] * len(paths)
    elif callable(shared):
        values = [shared(path) for path in paths]
    else:
        values = jax.tree.leaves(jax.tree.broadcast(shared, tree))
    owners = []
    for path, value in zip(paths, values, strict=True):
        if isinstance(value, (bool, np.bool_)):
            owners.append(SHARED if value else JOINT)
        elif isinstance(value, (int, np.integer)) and 0 <= value < num_tasks:
            owners.append(int(value))
        else:
            raise ValueError(
                f"shared must be True, False or a task in [0, {num_tasks}) for every parameter; "
                f"for {path!r} it is {value!r}"
            )
    return owners


def per_task_value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    shared: SharedMask = None,
    sequential: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    r"""Creates a function that evaluates K losses and the gradient of each.

    With losses :math:`L_1 \dots L_K` and parameters :math:`\theta`, the function computes
    :math:`L_k(\theta)` and :math:`\partial L_k / \partial \theta` for all k from a single forward
    pass: the pullback of ``loss_fn`` is applied to the K unit vectors.

    Args:
      loss_fn: a function whose first argument is the tree of parameters and which returns the
        vector of losses, [K]; with ``has_aux`` the pair of that and anything else.
      has_aux: whether ``loss_fn`` returns such a pair.
      shared: which parameters the tasks share, as in :func:`optim.scale_by_adatask`. The gradients
        of the others have no task axis: they are those of the sum of all losses, or of its own
        task's loss where a parameter belongs to one task.
      sequential: pull back one task after the other (``jax.lax.map``) instead of all at once: the
        memory of one backward pass, at the speed of K.

    Returns:
      A function with the arguments of ``loss_fn`` that returns ``(losses, gradients)``, or
      ``((losses, aux), gradients)``; the gradient of a shared parameter [...] is [K, ...].

    Examples:
      >>> import jax.numpy as jnp
      >>> import optim
      >>> def losses(w, x):
      ...     return jnp.stack([jnp.sum(w * x), jnp.sum(w**2)])
      >>> value, grads = optim.per_task_value_and_grad(losses)(jnp.ones(2), jnp.array([3.0, 4.0]))
      >>> value.tolist(), grads.tolist()
      ([7.0, 2.0], [[3.0, 4.0], [2.0, 2.0]])
    """

    def value_and_grad(params, *args, **kwargs):
        def of_params(params):
            return loss_fn(params, *args, **kwargs)

        losses, pull, *aux = jax.vjp(of_params, params, has_aux=has_aux)
        if getattr(losses, "ndim", None) != 1:
            raise ValueError(
                "loss_fn must return a vector with one loss per task, got "
                f"{jax.tree.map(jnp.shape, losses)}"
            )
        num_tasks = losses.shape[0]
        owners = task_owners(shared, params, num_tasks)
        over = jax.lax.map if sequential else lambda f, x: jax.vmap(f)(x)
        (grads,) = over(pull, jnp.eye(num_tasks, dtype=losses.dtype))
        leaves, treedef = jax.tree.flatten(grads)
        grads = jax.tree.unflatten(
            treedef, [_of_owner(g, owner) for g, owner in zip(leaves, owners, strict=True)]
        )
        return ((losses, *aux) if has_aux else losses), grads

    return value_and_grad


def _of_owner(g: jax.Array, owner: int) -> jax.Array:
    if owner == SHARED:
        return g
    return jnp.sum(g, axis=0) if owner == JOINT else g[owner]
