"""Spectra of weights and momenta in the metrics: `--log.spectra N`.

Rows of metrics.jsonl then hold `spectrum/WHAT/LEAF/STATISTIC` every N steps, the mean over layers,
with WHAT `weights` or `momentum` and statistics as in `optim.SpectrumStats`. The alignment is that
of the leading directions before and after the one step that is logged.
"""

from typing import Any

import jax
import jax.numpy as jnp

import optim
from lm.train.config import RunConfig
from lm.train.optimizer import parameter_labels
from lm.train.state import TrainState

RANK = 8
"""Leading directions whose alignment is followed."""
MOMENTA = ("mu", "momentum", "trace")
"""Names under which optimizers keep a first moment."""


def momentum(params: Any, opt_state: Any) -> Any:
    """The first moment of each parameter, in the structure of `params`; None where there is none.

    Found by name and shape, wherever wrappers have put it.
    """
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        names = [str(getattr(entry, "name", getattr(entry, "key", ""))) for entry in path]
        at = next((i for i, name in enumerate(names) if name in MOMENTA), None)
        if at is not None:
            found[tuple(names[at + 1 :]), leaf.shape] = leaf

    def pick(path, leaf):
        return found.get((tuple(entry.key for entry in path), leaf.shape))

    return jax.tree_util.tree_map_with_path(pick, params)


class SpectrumLog:
    """Measures before and after the steps that are logged; by jitted functions."""

    def __init__(self, config: RunConfig):
        self._every = config.log.spectra
        self._measure = jax.jit(_measure)
        self._describe = jax.jit(_describe)

    def prepare(self, state: TrainState) -> None:
        """Compile, so that the first measurement costs what the others do."""
        if self._every:
            self._describe(state, self._measure(state))

    def _due(self, step: int) -> bool:
        return self._every > 0 and (step + 1) % self._every == 0

    def before(self, state: TrainState, step: int) -> Any:
        """What the measurement after step `step` (0, 1, ...) is to be compared with."""
        return self._measure(state) if self._due(step) else None

    def after(self, state: TrainState, step: int, before: Any) -> dict[str, jax.Array]:
        """Metrics of the state after step `step`; none where none are due."""
        return self._describe(state, before) if self._due(step) else {}


def _measure(state: TrainState, before: Any = None) -> Any:
    labels = parameter_labels(state.params)
    trees = {"weights": state.params, "momentum": momentum(state.params, state.opt_state)}
    measured = {}
    for what, tree in trees.items():
        matrices = jax.tree.map(
            lambda label, leaf: leaf if label in ("matrix", "head", "router") else None,
            labels,
            tree,
        )
        measured[what] = optim.spectrum_stats(matrices, before and before[what], rank=RANK)
    return measured


def _describe(state: TrainState, before: Any) -> dict[str, jax.Array]:
    metrics = {}
    is_stats = lambda node: isinstance(node, optim.SpectrumStats)  # noqa: E731
    for what, tree in _measure(state, before).items():
        for path, stats in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_stats):
            names = [entry.key for entry in path]
            leaf = ".".join(name for name in names if name not in ("layers", "kernel"))
            for name, value in stats._asdict().items():
                if name != "basis":
                    metrics[f"spectrum/{what}/{leaf}/{name}"] = jnp.mean(value)
    return metrics
