"""Training of what a merged model has besides weights, which are small parts beside frozen ones.

Corrections (`surgery`) and routers (`wemoe`) are parameters of the layers of `lm.layers.merged`, so
the merged model is run, generates and is evaluated by the functions of every other model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm.merging.adaptive.objective import Monitor
from lm.merging.adaptive.work import Work

__all__ = ["Training", "flatten", "make_step", "train"]


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """Arrays of nested dicts by their path, joined by dots."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in pairs}


class Training(NamedTuple):
    """How `train` trains."""

    steps: int
    rate: Callable[[int], float]
    """Of every step."""
    monitor: Monitor | None = None
    """Warns by the auxiliary values of a step, which are then the `Sums` of every task."""
    stop: bool = False
    """Stop at the first warning."""


def make_step(loss: Callable[[Any, Any], tuple[jax.Array, Any]]) -> Callable:
    """A compiled step of Adam on `loss(trained, inputs)`, which gives (value, auxiliary values).

    The step takes (trained, state, inputs, rate) and gives (trained, state, value, auxiliary).
    """
    adam = optax.scale_by_adam()

    @jax.jit
    def step(trained, state, inputs, rate):
        (value, auxiliary), grads = jax.value_and_grad(loss, has_aux=True)(trained, inputs)
        updates, state = adam.update(grads, state)
        trained = jax.tree.map(lambda p, u: p - rate * u, trained, updates)
        return trained, state, value, auxiliary

    return step


def train(
    name: str,
    how: Training,
    trained: Any,
    step: Callable,
    batch: Callable[[int], Any],
    work: Work,
    say: Callable[[str], None],
) -> Any:
    """Train, with checkpoints in `work`, from which it continues.

    Args:
      name: of the checkpoint.
      how: steps and rate.
      trained: nested dicts of arrays.
      step: from `make_step`.
      batch: the inputs of a step, by its number.
      work: where progress is kept.
      say: takes a line now and then.
    """
    state, start = optax.scale_by_adam().init(trained), 0
    leaves, structure = jax.tree.flatten((trained, state))
    if before := work.load(name):
        arrays, meta = before
        leaves = [jnp.asarray(arrays[str(n)]) for n in range(len(leaves))]
        (trained, state), start = jax.tree.unflatten(structure, leaves), meta["step"]
        if how.monitor:
            how.monitor.restore(meta["monitor"])
        say(f"{name}: continuing at step {start}")
    every = max(1, how.steps // 10)
    for number in range(start, how.steps):
        rate = jnp.float32(how.rate(number))
        trained, state, value, auxiliary = step(trained, state, batch(number), rate)
        if not np.isfinite(float(value)):
            raise FloatingPointError(f"{name}: the loss of step {number} is {value}")
        lines = how.monitor.see([float(s.marginal) for s in auxiliary]) if how.monitor else []
        for line in lines:
            say(f"warning: {line}")
        if (number + 1) % every == 0 or number == 0:
            say(f"{name}: step {number + 1} of {how.steps}: loss {float(value):.4f}")
        stop = bool(lines) and how.stop
        done = number + 1 == how.steps or stop
        if done or work.due():
            leaves = jax.tree.leaves((trained, state))
            arrays = {str(n): np.asarray(leaf) for n, leaf in enumerate(leaves)}
            meta = {"monitor": how.monitor.state()} if how.monitor else {}
            work.save(name, arrays, meta | {"step": how.steps if done else number + 1})
        if stop:
            say(f"{name}: stopped at step {number + 1}: stop_on_collapse")
            break
    return trained
