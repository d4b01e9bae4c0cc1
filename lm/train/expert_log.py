"""What experts have in common, in the metrics: `--log.experts N`.

Rows of metrics.jsonl then hold `experts/STATISTIC` every N steps, with the statistics of
`moe.expert_metrics` (similarity of experts, alignment of routers, means over layers), and, with
decomposed experts, `experts/refresh_change`: what the last refresh changed of them.
"""

import jax

import moe
from lm.train.config import RunConfig
from lm.train.state import TrainState

SWEEPS = 16
"""Of subspace iteration: a singular value decomposition of every expert would take much longer."""


class ExpertLog:
    """Measures after the steps that are logged; by a jitted function."""

    def __init__(self, config: RunConfig):
        self._every = config.log.experts
        self._describe = jax.jit(_describe)

    def prepare(self, state: TrainState) -> None:
        """Compile, so that the first measurement costs what the others do."""
        if self._every:
            self._describe(state)

    def after(self, state: TrainState, step: int) -> dict[str, jax.Array]:
        """Metrics of the state after step `step` (0, 1, ...); none where none are due."""
        due = self._every and (step + 1) % self._every == 0
        return self._describe(state) if due else {}


def _describe(state: TrainState) -> dict[str, jax.Array]:
    metrics = moe.expert_metrics(state.params, sweeps=SWEEPS)
    if isinstance(state.opt_state, moe.SDMoEState):
        metrics["refresh_change"] = state.opt_state.refresh_change
    return {f"experts/{name}": value for name, value in metrics.items()}
