"""Training on the sources of a mixture as tasks: whose row is whose, losses, gradients, metrics.

A row of a batch belongs to one source (`Loader(sources=True)`). The loss of task k is the part of
the run's loss that its rows make up, so the gradients of the tasks add up to the gradient that any
other optimizer would see.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optim
from lm.config import ConfigError
from lm.data.mixture import members
from lm.train.config import RunConfig


def task_names(config: RunConfig) -> list[str]:
    """The sources of the run in the order of their numbers, as they appear in metrics."""
    names = [re.sub(r"[^A-Za-z0-9_.\-]", "_", member.name) for member in members(config.data)]
    return [f"{number}-{name}" for number, name in enumerate(names)] if _repeats(names) else names


def _repeats(names: list[str]) -> bool:
    return len(set(names)) < len(names)


def with_tasks(config: RunConfig) -> RunConfig:
    """`config` with `optim.tasks` set to the number of sources if the optimizer is adatask.

    Raises:
      ConfigError: there are no tasks to tell apart, or what adatask cannot be combined with.
    """
    if config.optim.name != "adatask":
        return config
    if config.data.source != "mixture":
        raise ConfigError(
            "optim.name adatask trains on the sources of a mixture, but data.source is "
            f"{config.data.source}: give --data.source mixture and the file as --data.path, or "
            "another optimizer"
        )
    found = len(members(config.data))
    if found < 2:
        raise ConfigError(
            f"optim.name adatask needs a mixture of 2 sources or more, and {config.data.path} has "
            f"{found}: add one, or take adamw"
        )
    if config.optim.tasks not in (0, found):
        raise ConfigError(
            f"optim.tasks is {config.optim.tasks}, but {config.data.path} has {found} sources: "
            "leave the flag out"
        )
    if config.micro_batches > 1:
        raise ConfigError(
            f"optim.name adatask takes the whole batch at once: micro_batches must be 1, got "
            f"{config.micro_batches}; use --optim.sequential-tasks or --model.remat full to "
            "save memory"
        )
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, tasks=found))


def clip_tasks(max_norm: float, joint: bool) -> optax.GradientTransformation:
    """Scale gradients [K, ...] down to a global norm of `max_norm`: each task's, or their sum's."""
    clip = optax.clip_by_global_norm(max_norm)

    def update(grads, params=None):
        del params
        if not joint:
            return jax.vmap(lambda g: clip.update(g, optax.EmptyState())[0])(grads)
        norm = optax.tree.norm(summed(grads))
        scale = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)

    return optax.stateless(update)


def summed(grads: Any) -> Any:
    """The gradient of the run's loss from those of the tasks, [K, ...]."""
    return jax.tree.map(lambda g: jnp.sum(g, axis=0), grads)


def make_task_gradient(
    config: RunConfig, loss_sum: Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]]
) -> Callable[[Any, Any], tuple[jax.Array, Any, dict[str, jax.Array], jax.Array]]:
    """The function (params, batch) -> (loss, gradients [K, ...], auxiliaries, present [K]).

    Args:
      config: the run, with `optim.tasks` set.
      loss_sum: (params, batch) to the weighted sum of negative log-likelihoods and the layers'
        auxiliaries; the forward pass before the head runs once, whatever K.

    The auxiliaries gain `source_loss/NAME`, the mean loss of a source's tokens; NaN for a source
    without a row in the batch.
    """
    count, names = config.optim.tasks, task_names(config)

    def losses(params, batch):
        mine = batch["sources"][None, :, None] == jnp.arange(count)[:, None, None]
        weights = jnp.where(mine, batch["weights"][None], 0.0)
        totals, auxiliary = jax.vmap(
            lambda weights: loss_sum(params, batch | {"weights": weights}), out_axes=(0, None)
        )(weights)
        tokens = jnp.sum(weights, axis=(1, 2))
        share = 1 / jnp.maximum(jnp.sum(tokens), 1.0)
        extra = sum(
            (jnp.sum(value) for name, value in auxiliary.items() if name.startswith("loss/")),
            start=jnp.zeros((), jnp.float32),
        )
        return (totals + extra * tokens) * share, (totals, tokens, auxiliary)

    fn = optim.per_task_value_and_grad(
        losses, has_aux=True, sequential=config.optim.sequential_tasks
    )

    def gradient(params, batch):
        (_, (totals, tokens, auxiliary)), grads = fn(params, batch)
        means = totals / tokens
        auxiliary |= {f"source_loss/{name}": means[k] for k, name in enumerate(names)}
        return jnp.sum(totals) / jnp.maximum(jnp.sum(tokens), 1.0), grads, auxiliary, tokens > 0

    return gradient


def dominance(config: RunConfig, opt_state: Any) -> dict[str, jax.Array]:
    """`dominance/NAME`: the source's share in the updates, averaged over all parameters moved."""
    if not config.optim.dominance_decay:
        return {}
    relative = jax.tree.leaves(optim.task_dominance(opt_state).relative)
    sums = sum(jnp.sum(leaf, axis=range(1, leaf.ndim)) for leaf in relative)
    shares = sums / jnp.maximum(jnp.sum(sums), 1.0)  # each moved parameter's shares add up to 1
    return {f"dominance/{name}": shares[k] for k, name in enumerate(task_names(config))}
