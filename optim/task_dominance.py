"""How much of the updates of shared parameters each task causes (AdaTask's AU metric)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax import MaskedNode

from optim.adatask import ScaleByAdataskState

__all__ = ["TaskDominance", "task_dominance"]


class TaskDominance(NamedTuple):
    """Relative dominance of K tasks.

    Attributes:
      relative: tree of [K, ...], for each shared parameter the tasks' shares, which add up to 1
        (0 where nothing has moved the parameter yet).
      mean: tree of [K], the mean over those elements of a parameter that something has moved.
    """

    relative: Any
    mean: Any


def task_dominance(state: Any) -> TaskDominance:
    r"""Each task's share in the average of squared updates.

    .. math::

      rAU_k = AU_k / \sum_{j=1}^K AU_j

    for every element of every shared parameter, where :math:`AU_k` is the average of squared
    updates that :func:`optim.scale_by_adatask` keeps if ``dominance_decay`` is given. 1 / K is
    balance. Under the base optimizer alone (``joint=True``) the shares show which tasks it favours.

    Args:
      state: the state of an optimizer that holds one of :func:`optim.scale_by_adatask` anywhere.

    Returns:
      A :class:`TaskDominance`; both trees hold :class:`optax.MaskedNode` for parameters that are
      not shared.

    Raises:
      ValueError: the state holds no averages of updates, or more than one set of them.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optim
      >>> tx = optim.adatask(0.1, num_tasks=2, joint=True, dominance_decay=0.9)
      >>> x = jnp.zeros(2)
      >>> grads = jnp.array([[1.0, 1.0], [3.0, 1.0]])
      >>> _, state = tx.update(grads, tx.init(x), x)
      >>> [round(float(share), 2) for share in optim.task_dominance(state).mean]
      [0.3, 0.7]

    References:
      Yang et al., `AdaTask: A Task-aware Adaptive Learning Rate Approach to Multi-task Learning
      <https://arxiv.org/abs/2211.15055>`_, 2023
    """
    is_state = lambda node: isinstance(node, ScaleByAdataskState)  # noqa: E731
    found = [
        node
        for node in jax.tree.leaves(state, is_leaf=is_state)
        if is_state(node) and node.au is not None
    ]
    if len(found) != 1:
        raise ValueError(
            f"expected the state of one scale_by_adatask with dominance_decay, found {len(found)}"
        )

    def leaves(fn, tree):
        masked = lambda node: isinstance(node, MaskedNode)  # noqa: E731
        return jax.tree.map(lambda x: x if masked(x) else fn(x), tree, is_leaf=masked)

    def share(au):
        total = jnp.sum(au, axis=0, keepdims=True)
        return jnp.where(total > 0, au / jnp.where(total > 0, total, 1), 0)

    def mean(relative):
        relative = relative.reshape(relative.shape[0], -1)
        moved = jnp.sum(jnp.any(relative > 0, axis=0))
        return jnp.sum(relative, axis=1) / jnp.maximum(moved, 1)

    relative = leaves(share, found[0].au)
    return TaskDominance(relative=relative, mean=leaves(mean, relative))
