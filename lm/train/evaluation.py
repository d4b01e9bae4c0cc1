"""Loss on held-out text."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from lm.data import to_global


class EvalResult(NamedTuple):
    """Sums over the text that was read, and what follows from them."""

    nats: float
    tokens: float
    text_bytes: int

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood in nats per token."""
        return self.nats / max(self.tokens, 1.0)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """nats / (ln 2 * UTF-8 bytes of the text): independent of the tokenizer."""
        return self.nats / math.log(2) / max(self.text_bytes, 1)


def evaluate(
    eval_step: Callable[[Any, dict], tuple[jax.Array, jax.Array]],
    params: Any,
    batches: Iterable[tuple[dict[str, np.ndarray], int]],
    sharding: jax.sharding.NamedSharding,
    on_batch: Callable[[], None] = lambda: None,
) -> EvalResult:
    """Sum `eval_step` (jitted; lm.train.step.make_eval_step) over (batch, bytes) pairs.

    The next batch is dispatched before the last one's sums are read; they are added in float64.
    """
    pending: list[tuple[jax.Array, jax.Array]] = []
    nats = tokens = 0.0
    text_bytes = 0
    for batch, batch_bytes in batches:
        rows = len(batch["tokens"])
        arrays = to_global(lambda span: {k: v[span] for k, v in batch.items()}, sharding, rows)  # noqa: B023
        pending.append(eval_step(params, arrays))
        text_bytes += batch_bytes
        if len(pending) > 1:
            total, count = jax.device_get(pending.pop(0))
            nats, tokens = nats + float(total), tokens + float(count)
        on_batch()
    for total, count in jax.device_get(pending):
        nats, tokens = nats + float(total), tokens + float(count)
    return EvalResult(nats, tokens, text_bytes)
