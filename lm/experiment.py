"""The same small training run many times over: optimizers, learning rates and seeds compared.

A run here writes no folder and no checkpoint: the tokens stay in memory, the held-out batches on
the device, and the peak learning rate is an argument of the compiled step, so that a sweep
compiles once for each contender instead of once for each run.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm import model
from lm.data import Loader, eval_batches, load_tokenizer, open_stores
from lm.train.config import RunConfig
from lm.train.guard import init_guard
from lm.train.loop import enable_compilation_cache
from lm.train.optimizer import make_optimizer, make_schedule
from lm.train.quantization import make_quantization
from lm.train.state import TrainState
from lm.train.step import make_eval_step, make_train_step

MakeTx = Callable[[optax.Schedule], optax.GradientTransformation]
"""From the learning-rate schedule to the optimizer, clipping excluded."""
MakeStep = Callable[[optax.GradientTransformation, optax.Schedule], Callable]
"""From the optimizer to the step: (TrainState, batch) -> (TrainState, metrics)."""


@dataclasses.dataclass
class Curve:
    """What a run measured."""

    steps: list[int]
    """Steps done at each evaluation; the last step is always one."""
    valid: list[float]
    """Held-out loss there, nats per token; not finite if the run diverged."""
    train: float
    """Mean training loss of the last tenth of the steps."""
    seconds: float
    """Wall time of the steps, evaluations and compilation excluded."""
    state: Any = dataclasses.field(repr=False, default=None)
    """The last TrainState."""

    @property
    def final(self) -> float:
        """Held-out loss after the last step."""
        return self.valid[-1]

    def steps_to(self, loss: float) -> float | None:
        """Steps until the held-out loss first reached `loss`, by linear interpolation."""
        return steps_to(self.steps, self.valid, loss)

    def as_row(self) -> dict[str, Any]:
        """Plain values for a sweep's file; None stands for what is not finite."""
        number = lambda x: round(x, 4) if math.isfinite(x) else None  # noqa: E731
        return {
            "final": number(self.final),
            "train": number(self.train),
            "train_seconds": round(self.seconds, 2),
            "steps": self.steps,
            "valid": [number(x) for x in self.valid],
        }


def steps_to(steps: list[int], valid: list[float | None], loss: float) -> float | None:
    """Steps until `valid` first reached `loss`, linear between evaluations; None if never."""
    before = None
    for step, value in zip(steps, valid, strict=True):
        if value is not None and value <= loss:
            if before is None or before[1] is None or before[1] <= loss:
                return float(step)
            share = (before[1] - loss) / (before[1] - value)
            return before[0] + share * (step - before[0])
        before = (step, value)
    return None


class Experiment:
    """One model, one corpus, one schedule; what varies is given to `run`.

    Held-out batches, initialization and data order depend on the configuration and the seed
    alone, so runs of one seed are paired.
    """

    def __init__(self, config: RunConfig, eval_batch_count: int | None = None):
        enable_compilation_cache()
        self.config = config
        tokenizer = load_tokenizer(config.data.tokenizer)
        self.stores = open_stores(config.data, tokenizer=tokenizer)
        count = eval_batch_count or config.eval.batches
        batches = eval_batches(
            self.stores["valid"], config.batch_size, config.sequence_length, count
        )
        self.held_out = [jax.device_put(batch) for batch, _ in batches]
        self.quantization = make_quantization(config)
        held_out = self.quantization and self.quantization.for_evaluation()
        self._evaluate = jax.jit(make_eval_step(config, held_out))
        self._compiled: dict[Hashable, Callable] = {}

    def loader(self, seed: int) -> Loader:
        """The training batches of a seed."""
        return Loader(
            self.stores["train"],
            batch_size=self.config.batch_size,
            sequence_length=self.config.sequence_length,
            seed=seed,
        )

    def init(self, tx: optax.GradientTransformation, seed: int) -> TrainState:
        """Fresh state of a seed."""
        params = model.init(self.config.model, jax.random.key(seed))
        zero = jnp.zeros((), jnp.int32)
        bases = self.quantization.init() if self.quantization else {}
        return TrainState(zero, params, tx.init(params), init_guard(self.config.guard), bases)

    def evaluate(self, params) -> float:
        """Held-out loss, nats per token."""
        sums = [self._evaluate(params, batch) for batch in self.held_out]
        total, tokens = np.sum([(float(a), float(b)) for a, b in sums], axis=0)
        return total / tokens

    def optimizer(self, make_tx: MakeTx | None, peak) -> tuple[Any, optax.Schedule]:
        """The optimizer (clipping first) and its schedule, for a peak that may be traced."""
        config = dataclasses.replace(self.config.optim, learning_rate=1.0)
        unit = make_schedule(config, self.config.steps)
        schedule = lambda count: peak * unit(count)  # noqa: E731
        if make_tx is None:
            return make_optimizer(self.config.optim, self.config.steps, schedule)
        tx = make_tx(schedule)
        if config.clip:
            tx = optax.chain(optax.clip_by_global_norm(config.clip), tx)
        return tx, schedule

    def run(
        self,
        name: Hashable,
        make_tx: MakeTx | None = None,
        *,
        learning_rate: float,
        seed: int,
        eval_every: int,
        make_step: MakeStep | None = None,
        observe: Callable[[int, TrainState, dict[str, jax.Array]], None] | None = None,
    ) -> Curve:
        """Train `config.steps` steps.

        Args:
          name: of the contender; runs of one name share their compiled step.
          make_tx: its optimizer; None takes `config.optim`.
          learning_rate: peak.
          seed: of initialization and data order.
          eval_every: steps between evaluations.
          make_step: another step than `make_train_step` of the configuration.
          observe: called after every step with (steps done, state, metrics).
        """
        peak = jnp.asarray(learning_rate, jnp.float32)
        loader, total = self.loader(seed), self.config.steps
        if name not in self._compiled:
            self._compiled[name] = self.compile(make_tx, loader.batch(0), make_step)
        init, step = self._compiled[name]
        state = init(seed)
        curve, losses, seconds = Curve([], [], math.nan, 0.0), [], 0.0
        began = time.perf_counter()
        for index in range(total):
            state, metrics = step(state, loader.batch(index), peak)
            losses.append(metrics["loss"])
            if observe:
                observe(index + 1, state, metrics)
            if (index + 1) % eval_every == 0 or index + 1 == total:
                jax.block_until_ready(state)
                seconds += time.perf_counter() - began
                curve.steps.append(index + 1)
                curve.valid.append(self.evaluate(state.params))
                began = time.perf_counter()
        tail = [float(loss) for loss in losses[-max(total // 10, 1) :]]
        curve.train, curve.seconds, curve.state = float(np.mean(tail)), seconds, state
        return curve

    def compile(self, make_tx: MakeTx | None, batch, make_step: MakeStep | None = None):
        """(init, step) of a contender: seed -> state; (state, batch, peak) -> (state, metrics)."""

        def step(state, batch, peak):
            tx, schedule = self.optimizer(make_tx, peak)
            make = make_step or (
                lambda tx, s: make_train_step(self.config, tx, s, self.quantization)
            )
            return make(tx, schedule)(state, batch)

        init = jax.jit(lambda seed: self.init(self.optimizer(make_tx, 1.0)[0], seed))
        abstract = jax.eval_shape(init, 0)
        peak = jax.ShapeDtypeStruct((), jnp.float32)
        return init, jax.jit(step, donate_argnums=0).lower(abstract, batch, peak).compile()
