"""What is learnt from text without labels: the entropy of chosen predictions.

H(p) = -sum_v p_v log p_v of the next-token distribution, over the vocabulary or, for a task of
classification, over its answers alone (AdaMerging, arXiv 2310.02575; Tent, arXiv 2006.10726).
Entropy can fall because every prediction becomes the same one, so the entropy of the mean
prediction is watched as well.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lm import model
from lm.config import ModelConfig
from lm.merging.adaptive.data import Batch

__all__ = [
    "Monitor",
    "Sums",
    "at_positions",
    "chosen_logits",
    "entropy",
    "task_entropies",
    "unrolled",
]


class Sums(NamedTuple):
    """Of one task's batch, float32."""

    entropy: Float[Array, ""]
    """Mean entropy of the predictions that count, nats."""
    marginal: Float[Array, ""]
    """Entropy of their mean, nats."""

    def loss(self, diversity: float) -> Float[Array, ""]:
        """What is minimized: certain predictions, and with `diversity` not all the same."""
        return self.entropy - diversity * self.marginal if diversity else self.entropy


def unrolled(config: ModelConfig) -> ModelConfig:
    """The model without loops over layers: a plug is called for every layer, in their order, and
    may hand arrays from one call to the next and out of the program."""
    return dataclasses.replace(config, unroll=config.num_layers, remat="none")


def at_positions(x: Float[Array, "B T D"], batch: Batch) -> Float[Array, "B P D"]:
    """States at the positions that count."""
    return jnp.take_along_axis(x, batch.index[..., None], axis=1)


def chosen_logits(
    config: ModelConfig,
    params: model.Params,
    batch: Batch,
    answers: Any = None,
) -> Float[Array, "B P V"]:
    """Logits of the predictions that count; the others never exist."""
    x, _ = model.hidden(config, params, jnp.asarray(batch.tokens))
    found = model.logits(config, params, at_positions(x, batch))
    return found if answers is None else found[..., jnp.asarray(answers)]


def entropy(
    logits: Float[Array, "B P V"], counts: Float[Array, "B P"], average_logits: bool = False
) -> Sums:
    """Entropies of a task's predictions.

    Args:
      logits: of any scale.
      counts: 1 for predictions that count.
      average_logits: the entropy of the batch's mean logits in place of the mean entropy, as
        FusionBench takes it for text models: it rewards predictions that agree.
    """
    share = (counts / jnp.maximum(jnp.sum(counts), 1.0))[..., None]
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    mean = jnp.sum(jnp.exp(log_p) * share, axis=(0, 1))
    marginal = -jnp.sum(mean * jnp.log(jnp.maximum(mean, 1e-30)))
    if average_logits:
        log_p = jax.nn.log_softmax(jnp.sum(logits * share, axis=(0, 1)))
        return Sums(-jnp.sum(jnp.exp(log_p) * log_p), marginal)
    return Sums(-jnp.sum(jnp.exp(log_p) * log_p * share), marginal)


def task_entropies(
    config: ModelConfig,
    params: model.Params,
    batch: Batch,
    answers: Sequence[Any],
    average_logits: bool = False,
) -> list[Sums]:
    """Entropies of every task of a batch in which all have equally many rows, task by task.

    Args:
      config, params: the model.
      batch: from `lm.merging.adaptive.data.stacked`.
      answers: tokens that are compared, or None, for each task.
      average_logits: see `entropy`.
    """
    logits = chosen_logits(config, params, batch)
    size, sums = len(batch.tokens) // len(answers), []
    for number, own in enumerate(answers):
        part = slice(number * size, (number + 1) * size)
        found = logits[part] if own is None else logits[part][..., jnp.asarray(own)]
        sums.append(entropy(found, jnp.asarray(batch.counts)[part], average_logits))
    return sums


class Monitor:
    """Watches the marginal entropy of every task for collapse.

    Early values are averaged for comparison (10 batches), later ones smoothed with 0.9. A task
    that starts below 0.05 nats predicts the same already, and is left alone.
    """

    EARLY = 10

    def __init__(self, share: float, tasks: list[str]):
        self.share, self.tasks = share, tasks
        self.first = [0.0] * len(tasks)
        self.now = [math.nan] * len(tasks)
        self.steps = 0
        self.warned: set[int] = set()

    def see(self, marginals: list[float]) -> list[str]:
        """Take a step's values; gives a line for each task that has just collapsed."""
        lines = []
        self.steps += 1
        for task, value in enumerate(marginals):
            if self.steps <= self.EARLY:
                self.first[task] += (value - self.first[task]) / self.steps
            old = self.now[task]
            self.now[task] = value if math.isnan(old) else 0.9 * old + 0.1 * value
            low = self.now[task] < self.share * self.first[task]
            early = self.steps <= self.EARLY or self.first[task] < 0.05
            if low and not early and task not in self.warned:
                self.warned.add(task)
                lines.append(
                    f"{self.tasks[task]}: predictions collapse: the entropy of their mean fell "
                    f"from {self.first[task]:.3f} to {self.now[task]:.3f} nats; learn fewer steps, "
                    "at a lower learning_rate, or without this task"
                )
        return lines

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {name: value for name, value in vars(self).items() if name != "tasks"} | {
            "warned": sorted(self.warned)
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        for name, value in state.items():
            setattr(self, name, set(value) if name == "warned" else value)
