"""Continual learning: a frozen decoder, adapters, one domain of text after the other.

`Stream.learn` trains the adapters of one method on every domain in turn (a fresh optimizer and a
warm-up each) and measures held-out bits per byte. With l[t][i] those of domain i after t domains,

    op          mean_i l[T][i]                          final quality, lower is better
    forgetting  mean_{i < T} (l[T][i] - l[i][i])        what later domains cost earlier ones (-BWT)

where the papers have task scores, higher is better, and report -BWT in points.

Besides adapters by themselves there are two methods that act on plain LoRA: EWC (arXiv 1612.00796)
pulls every parameter to where earlier domains left it, by strength / 2 sum F (w - w*)^2 with F the
mean square of the gradients of batches, added up over domains; O-LoRA (arXiv 2310.14152) learns
each domain by a new pair, whose A is to be orthogonal to those before, strength sum |A_old^T A|.
The old pairs are merged into the frozen matrices, which is exact.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm import model
from lm.config import AdapterConfig, ModelConfig
from lm.data import Loader, eval_batches
from lm.layers import adapters
from lm.train.config import RunConfig
from lm.train.loop import enable_compilation_cache
from lm.train.optimizer import decay_mask, make_schedule
from lm.train.step import loss_sum


class Domain(NamedTuple):
    """Text of one kind: (store, weight) pairs as `lm.data.open_stores` gives them."""

    name: str
    train: Sequence[tuple[Any, float]]
    valid: Sequence[tuple[Any, float]]


@dataclasses.dataclass(frozen=True)
class Method:
    """Adapters, and what protects earlier domains besides."""

    adapter: AdapterConfig
    memory: Literal["none", "ewc", "olora"] = "none"
    strength: float = 0.0

    def __post_init__(self):
        if self.memory != "none" and self.adapter.kind != "lora":
            raise ValueError(f"{self.memory} is for adapters of kind lora, not {self.adapter.kind}")


class Learned(NamedTuple):
    """What a stream measured; bits per byte."""

    losses: np.ndarray
    """[T + 1, T]: of domain i after t domains (t = 0: the base model)."""
    params: model.Params
    """The model after the last domain."""
    halfway: model.Params
    """The model after the first T // 2 domains (of O-LoRA with its pairs merged)."""

    @property
    def op(self) -> float:
        return float(np.mean(self.losses[-1]))

    @property
    def forgetting(self) -> float:
        learned = np.diagonal(self.losses[1:])
        return float(np.mean((self.losses[-1] - learned)[:-1]))


class Stream:
    """A frozen model and the domains that are learned on top of it.

    `config` is a domain's run: steps, batch, schedule and optimizer (AdamW) of each of them.
    """

    def __init__(
        self, config: RunConfig, params: model.Params, domains: Sequence[Domain], held_out: int
    ):
        enable_compilation_cache()
        self.config, self.base, self.domains = config, params, list(domains)
        size, length = config.batch_size, config.sequence_length
        self.held_out = [
            [(jax.device_put(b), n) for b, n in eval_batches(d.valid, size, length, held_out)]
            for d in domains
        ]
        self._programs: dict[Any, Any] = {}

    def learn(self, method: Method, order: Sequence[int], *, rate: float, seed: int) -> Learned:
        """Learn the domains in this order; `losses` are in the order of learning."""
        step, measure, fisher = self._compile(method)
        config = dataclasses.replace(self.config.model, adapter=method.adapter)
        frozen, trained = self.base, fresh(config, seed)
        memory = _no_memory(method, trained, len(order))
        peak, halfway = jnp.asarray(rate, jnp.float32), None
        rows = [self._losses(measure, frozen, trained, order)]
        for place, number in enumerate(order):
            domain = self.domains[number]
            loader = Loader(
                domain.train,
                batch_size=self.config.batch_size,
                sequence_length=self.config.sequence_length,
                seed=seed,
            )
            state = _optimizer(self.config, 1.0).init(trained)
            for index in range(self.config.steps):
                trained, state = step(trained, state, frozen, memory, loader.batch(index), peak)
            if method.memory == "ewc":
                batches = (loader.batch(index) for index in range(FISHER_BATCHES))
                memory = _consolidate(fisher, memory, frozen, trained, batches)
            if method.memory == "olora":
                memory = _keep_a(memory, trained, place)
                _, frozen = adapters.merge(config, adapters.join(frozen, trained))
                trained = fresh(config, seed + 1000 * (place + 1))
            rows.append(self._losses(measure, frozen, trained, order))
            if place + 1 == len(order) // 2:
                # A copy: the step gives the parameters' own buffers away.
                halfway = adapters.join(frozen, jax.tree.map(jnp.copy, trained))
        return Learned(np.array(rows), adapters.join(frozen, trained), halfway)

    def _losses(self, measure, frozen, trained, order) -> list[float]:
        losses = []
        for number in order:
            sums = [(measure(frozen, trained, b), n) for b, n in self.held_out[number]]
            nats = math.fsum(float(nats) for nats, _ in sums)
            losses.append(nats / math.log(2) / sum(n for _, n in sums))
        return losses

    def _compile(self, method: Method):
        if method not in self._programs:
            config = self.config
            config = dataclasses.replace(
                config, model=dataclasses.replace(config.model, adapter=method.adapter)
            )
            self._programs[method] = _programs(config, method)
        return self._programs[method]


FISHER_BATCHES = 16
"""Batches whose gradients EWC squares after each domain."""


def fresh(config: ModelConfig, seed: int) -> model.Params:
    """Adapters that change nothing yet."""
    return _init(config)(seed)


@functools.cache
def _init(config: ModelConfig):
    def init(seed):
        return adapters.partition(config, model.init(config, jax.random.key(seed)))[1]

    return jax.jit(init)


def _programs(config: RunConfig, method: Method):
    """(train step, held-out loss, gradient), compiled when first called."""

    def total(trained, frozen, batch):
        return loss_sum(config, adapters.join(frozen, trained), batch)[0]

    def mean_loss(trained, frozen, batch):
        return total(trained, frozen, batch) / jnp.maximum(jnp.sum(batch["weights"]), 1.0)

    def loss(trained, frozen, memory, batch):
        return mean_loss(trained, frozen, batch) + penalty(method, memory, trained)

    def step(trained, state, frozen, memory, batch, peak):
        grads = jax.grad(loss)(trained, frozen, memory, batch)
        updates, state = _optimizer(config, peak).update(grads, state, trained)
        return optax.apply_updates(trained, updates), state

    def squares(trained, frozen, batch):
        return jax.tree.map(jnp.square, jax.grad(mean_loss)(trained, frozen, batch))

    return (
        jax.jit(step, donate_argnums=(0, 1)),
        jax.jit(lambda frozen, trained, batch: total(trained, frozen, batch)),
        jax.jit(squares),
    )


def _optimizer(config: RunConfig, peak) -> optax.GradientTransformation:
    unit = make_schedule(dataclasses.replace(config.optim, learning_rate=1.0), config.steps)
    adamw = optax.adamw(
        lambda count: peak * unit(count),
        b1=config.optim.beta1,
        b2=config.optim.beta2,
        eps=config.optim.eps,
        weight_decay=config.optim.weight_decay,
        mask=decay_mask,
    )
    clip = config.optim.clip
    return optax.chain(optax.clip_by_global_norm(clip), adamw) if clip else adamw


def penalty(method: Method, memory: Any, trained: model.Params) -> jax.Array:
    """What EWC or O-LoRA add to the loss; 0 before the second domain."""
    if method.memory == "ewc":
        terms = jax.tree.map(
            lambda f, w, start: jnp.sum(f * jnp.square(w - start)),
            memory["fisher"],
            trained,
            memory["anchor"],
        )
        return 0.5 * method.strength * sum(jax.tree.leaves(terms))
    if method.memory == "olora":
        # [T, L, D, r] of all domains so far (zeros: not yet) against [L, D, r]
        terms = [
            jnp.sum(jnp.abs(jnp.einsum("tldr,lds->tlrs", old, new)))
            for old, new in zip(memory, _lora_a(trained), strict=True)
        ]
        return method.strength * sum(terms)
    return jnp.zeros((), jnp.float32)


def _lora_a(trained) -> list[jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(trained)
    return [leaf for path, leaf in leaves if path[-1].key == "lora_a"]


def _no_memory(method: Method, trained, count: int):
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    if method.memory == "ewc":
        return {"fisher": zeros(trained), "anchor": zeros(trained)}
    if method.memory == "olora":
        return [jnp.zeros((count, *a.shape), a.dtype) for a in _lora_a(trained)]
    return ()


def _consolidate(fisher, memory, frozen, trained, batches):
    total = memory["fisher"]
    for batch in batches:
        squares = fisher(trained, frozen, batch)
        total = jax.tree.map(lambda f, s: f + s / FISHER_BATCHES, total, squares)
    # A copy, for the same reason.
    return {"fisher": total, "anchor": jax.tree.map(jnp.copy, trained)}


def _keep_a(memory, trained, place: int):
    return [old.at[place].set(a) for old, a in zip(memory, _lora_a(trained), strict=True)]
