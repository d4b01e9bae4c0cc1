"""What quantization does to each layer, in the metrics: `--log.quant N`.

Rows of metrics.jsonl then hold `quant/SITE.LAYER/WHAT` every N steps, with SITE such as
attention.query and WHAT as in `quant.NAMES`: shares of the mean and of the leading directions, and
for each operand of the three products its signal to noise (dB) and the shares of values that round
to zero or saturate. Measured on the batch of the step, before its update, in one more forward and
backward pass.
"""

import dataclasses
from typing import Any

import jax

import quant
from lm.train.config import RunConfig
from lm.train.quantization import Quantization
from lm.train.state import TrainState
from lm.train.step import Batch, loss_sum


class QuantLog:
    """Measures at the steps that are logged, by one jitted function."""

    def __init__(self, config: RunConfig, quantization: Quantization | None):
        self._every = config.log.quant if quantization else 0
        if quantization:
            self._names = [
                i
                for i, name in enumerate(quant.NAMES)
                if "_share" in name or name.split("/")[1] in quantization.recipe.operands
            ]
            self._measure = jax.jit(_measurement(config, quantization))

    def due(self, step: int) -> bool:
        """Whether step `step` (0, 1, ...) is measured."""
        return self._every > 0 and (step + 1) % self._every == 0

    def measure(self, state: TrainState, batch: Batch, step: int) -> dict[str, jax.Array]:
        """Metrics of the step to come; none where none are due."""
        if not self.due(step):
            return {}
        return {
            f"quant/{site.removeprefix('layers.')}.{layer}/{quant.NAMES[i]}": row[i]
            for site, rows in jax.device_get(self._measure(state, batch)).items()
            for layer, row in enumerate(rows)
            for i in self._names
        }


def _measurement(config: RunConfig, quantization: Quantization) -> Any:
    """The function (state, batch) -> {site: [layers, len(quant.NAMES)]}."""

    # Looped over layers, whatever training does: a site takes seconds to compile.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, unroll=1))

    def measure(state: TrainState, batch: Batch):
        if config.micro_batches > 1:  # one part is enough, and what memory was planned for
            rows = config.batch_size // config.micro_batches
            batch = jax.tree.map(lambda x: x[:rows], batch)

        def loss(probes):
            plug = quantization.at(state.step, bases=state.quant, probes=probes)
            return loss_sum(config, state.params, batch, plug)[0] / batch["weights"].sum()

        return jax.grad(loss)(quantization.probes())

    return measure
