"""The gradient of entropies in a model's weights, in the memory of the weights.

Two parts of it would take a model's memory again where the vocabulary is large: logits with their
gradient (the head works on some words at a time, `lm.merging.adaptive.head`), and the gradient of
the embedding, of which a batch touches a few rows: these are looked up first and are what is
differentiated.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import model
from lm.config import ModelConfig
from lm.merging.adaptive.data import Batch
from lm.merging.adaptive.head import CHUNK, Head, head_entropies
from lm.merging.adaptive.models import Models, Piece, Tree, host
from lm.merging.adaptive.objective import Sums, at_positions, task_entropies

__all__ = ["Gradient", "entropy_gradient"]

EMBEDDING = ("embedding",)


class Gradient(NamedTuple):
    """G, with that of the looked-up rows of the embedding by itself."""

    tree: Tree
    """NumPy arrays; no embedding where that is no head."""
    tokens: np.ndarray
    """int32 [N]: rows of the embedding; empty if `tree` holds all of its gradient."""
    rows: np.ndarray
    """[N, D]: to be added to these."""

    def flat(self, models: Models, piece: Piece) -> np.ndarray:
        """The piece of the gradient, flat, float32."""
        if models.places[piece.name][0].leaf.path != EMBEDDING:
            return models.flat(self.tree, piece)
        if EMBEDDING in self.tree:
            found = models.flat(self.tree, piece).copy()  # of float32 it is a view
        else:
            found = np.zeros((piece.stop - piece.start) * piece.width, np.float32)
        if not len(self.tokens):
            return found
        inside = (self.tokens >= piece.start) & (self.tokens < piece.stop)
        places = self.tokens[inside] - piece.start
        np.add.at(found.reshape(-1, piece.width), places, self.rows[inside].astype(np.float32))
        return found


def entropy_gradient(
    config: ModelConfig,
    params: model.Params,
    batch: Batch,
    answers: Sequence[np.ndarray | None],
    *,
    average_logits: bool = False,
    diversity: float = 0.0,
    chunk: int = CHUNK,
) -> tuple[list[Sums], Gradient]:
    """Entropies of every task, and the gradient of the sum of their `Sums.loss`.

    Args:
      config, params: the model.
      batch: of all tasks at once, equally many rows each, so that no second gradient exists to be
        added to (`lm.merging.adaptive.data.stacked`).
      answers: tokens that are compared, or None, for each task.
      average_logits: see `lm.merging.adaptive.objective.entropy`; by all logits at once.
      diversity: see `Sums.loss`.
      chunk: words whose logits exist at a time.
    """
    if average_logits:
        sums, grads = _averaged(config, diversity, params, batch, list(answers))
        return sums, Gradient(host(grads), np.zeros(0, np.int32), np.zeros((0, 0), np.float32))
    allowed = np.ones((len(answers), config.vocab_size), bool)
    for own, row in zip(answers, allowed, strict=True):
        if own is not None:
            row[:] = False
            row[own] = True
    (values, marginals), (layers, rows, head) = _chunked(
        config, chunk, diversity, params, batch, allowed
    )
    tree = host(layers) | {
        EMBEDDING if config.tie_embeddings else ("head", "kernel"): np.asarray(head)
    }
    sums = [Sums(*pair) for pair in zip(np.asarray(values), np.asarray(marginals), strict=True)]
    return sums, Gradient(tree, np.asarray(batch.tokens).reshape(-1), np.asarray(rows))


@partial(jax.jit, static_argnames=("config", "chunk", "diversity"))
def _chunked(config: ModelConfig, chunk: int, diversity: float, params, batch: Batch, allowed):
    names = ("embedding",) if config.tie_embeddings else ("embedding", "head")
    layers = {name: value for name, value in params.items() if name not in names}
    shape = batch.tokens.shape
    rows = params["embedding"].at[jnp.asarray(batch.tokens).reshape(-1)].get()
    places = jnp.arange(rows.shape[0]).reshape(shape)
    tasks = len(allowed)
    counts = jnp.asarray(batch.counts).reshape(tasks, -1)
    share = (counts / jnp.maximum(counts.sum(1, keepdims=True), 1.0)).reshape(-1)
    task = jnp.repeat(jnp.arange(tasks), counts.shape[1])
    head = Head(config.tie_embeddings, config.logit_soft_cap, chunk)

    def loss(layers, rows, w):
        own = params | layers | {"embedding": rows}  # by place in the batch, not by word
        x, _ = model.hidden(config, own, places)
        z = at_positions(x, batch)
        values, marginals = head_entropies(
            head, w, z.reshape(-1, z.shape[-1]), task, share, jnp.asarray(allowed)
        )
        return jnp.sum(Sums(values, marginals).loss(diversity)), (values, marginals)

    grads, sums = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(
        layers, rows, params["embedding"] if config.tie_embeddings else params["head"]["kernel"]
    )
    return sums, grads


@partial(jax.jit, static_argnames=("config", "diversity"))
def _averaged(config: ModelConfig, diversity: float, params, batch: Batch, answers):
    def loss(params):
        sums = task_entropies(config, params, batch, answers, True)
        return sum(each.loss(diversity) for each in sums), sums

    grads, sums = jax.grad(loss, has_aux=True)(params)
    return sums, grads
