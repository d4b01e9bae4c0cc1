"""Fisher merging (Matena and Raffel, arXiv 2111.09832): averages by the precision of each element.

    theta = sum_k c_k F_k theta_k / sum_k c_k F_k

    F_k = E_x sum_y p(y | x) (d log p(y | x) / d theta)^2      diagonal, of model k on its own text

The sum over y of a vocabulary is estimated by labels drawn from the model's own predictions, or
formed exactly over a task's answers. Squares are of the gradient of one row by itself. Within a row
the drawn labels of all positions are independent given the text, so that their cross terms vanish
on average: one backward pass per row and draw. (Squares of a batch's summed gradient, as in
other implementations, grow with the batch and hold the cross terms of rows.)
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import model
from lm.config import ModelConfig
from lm.merging.adaptive.data import Batch, Rows, take
from lm.merging.adaptive.objective import chosen_logits

__all__ = ["fisher_diagonal", "fisher_mean"]


def fisher_diagonal(
    config: ModelConfig, params: model.Params, rows: Rows, *, draws: int, seed: int
) -> model.Params:
    """F of a model on a task's text, float32: mean over rows (of text: of sums over positions).

    Args:
      config, params: the model.
      rows: its text.
      draws: labels drawn for each row's positions; answers need none.
      seed: of the draws.
    """
    total = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    count = len(rows.tokens)
    answers = None if rows.answers is None else jnp.asarray(rows.answers)
    for number in range(count):
        batch = take(rows, np.asarray([number]), rows.tokens.shape[1])
        for draw in range(1 if answers is not None else draws):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), draw)
            total = _add_squares(config, total, params, batch, answers, key)
    scale = 1 / count if answers is not None else 1 / (count * draws)
    return jax.tree.map(lambda leaf: leaf * scale, total)


@partial(jax.jit, static_argnames=("config",), donate_argnames=("total",))
def _add_squares(config, total, params, batch: Batch, answers, key):
    """total + sum_y p(y) grad^2, over all answers or one draw."""

    def log_likelihood(params, label):
        log_p = jax.nn.log_softmax(chosen_logits(config, params, batch, answers))
        own = jnp.take_along_axis(log_p, label[..., None], -1)[..., 0]
        return jnp.sum(own * batch.counts)

    def add(total, label, weight):
        grads = jax.grad(log_likelihood)(params, label)
        square = lambda t, g: t + weight * jnp.square(g.astype(jnp.float32))  # noqa: E731
        return jax.tree.map(square, total, grads)

    logits = jax.lax.stop_gradient(chosen_logits(config, params, batch, answers))
    if answers is None:
        return add(total, jax.random.categorical(key, logits), 1.0)
    weights = jax.nn.softmax(logits[0, -1])

    def body(label, total):
        return add(total, jnp.full(batch.index.shape, label), weights[label])

    return jax.lax.fori_loop(0, logits.shape[-1], body, total)


def fisher_mean(
    values: list[np.ndarray], fishers: list[np.ndarray], weights: list[float], floor: float
) -> np.ndarray:
    """The weighted mean of one tensor's values.

    Args:
      values: of each model.
      fishers: its diagonal, perhaps divided by its norm over the whole model.
      weights: c_k.
      floor: least F; where no model has more, or all have 0, the mean is by c_k alone.
    """
    nothing = np.all([fisher <= floor for fisher in fishers], axis=0)
    top: Any = 0.0
    bottom: Any = 0.0
    for value, fisher, weight in zip(values, fishers, weights, strict=True):
        share = np.float32(weight) * np.where(
            nothing, np.float32(1), np.maximum(fisher, np.float32(floor))
        )
        top, bottom = top + share * value, bottom + share
    return top / bottom
