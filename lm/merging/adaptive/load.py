"""A merged model with what belongs to it: corrections of tasks, or routers.

>>> from lm.merging.adaptive.load import load
>>> merged = load("merged/surgery")  # doctest: +SKIP
>>> merged.logits(tokens, task="french")  # doctest: +SKIP
>>> merged.generate([[72, 105]], max_tokens=20, task="french")  # doctest: +SKIP

`lm.hf.load` gives one of its models, as configuration and parameters like any other's.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lm import hf, model
from lm.config import ConfigError, ModelConfig
from lm.generate import Sampling, generate
from lm.hf.merged import join, read_parts, settings
from lm.merging.adaptive import wemoe

__all__ = ["Merged", "load"]

Parts = tuple[ModelConfig, dict[tuple[str, ...], jax.Array]]
"""A configuration, and what its parameters have besides the dense ones, by path."""


@dataclasses.dataclass
class Merged:
    """A model that was merged by a method of this package."""

    config: ModelConfig
    params: model.Params
    """The dense model."""
    kind: str
    """"dense" (all methods that give just weights), "surgery" or "wemoe"."""
    tasks: tuple[str, ...] = ()
    corrections: dict[str, Parts] = dataclasses.field(default_factory=dict)
    """Of surgery, by task."""
    routed: Parts | None = None
    """Of WEMoE."""

    def for_task(self, task: str | None = None) -> tuple[ModelConfig, model.Params]:
        """Configuration and parameters, for `lm.apply` and all that is built on it.

        Args:
          task: of surgery whose corrections act; None: none. Others route without being told.
        """
        if task is not None and task not in self.tasks:
            raise ConfigError(f"there is no task {task!r}: there are {', '.join(self.tasks)}")
        parts = self.routed if self.routed else self.corrections.get(task or "")
        return (parts[0], join(self.params, parts[1])) if parts else (self.config, self.params)

    def logits(self, tokens: Int[Array, "B T"], task: str | None = None) -> Float[Array, "B T V"]:
        """Logits in f32; every row by itself.

        Args:
          tokens: ids; rows may be padded on the right.
          task: see `for_task`.
        """
        return _logits(*self.for_task(task), jnp.asarray(tokens))

    def routes(self, tokens: Int[Array, "B T"]) -> Float[Array, "B L K"]:
        """Of WEMoE: the coefficients of every task vector in every layer, by each row's tokens."""
        if self.routed is None:
            raise ConfigError(f"this model ({self.kind}) has no routers")
        return wemoe.routes(*self.for_task(), jnp.asarray(tokens))

    def dense(self, prompt: Sequence[int] | None = None) -> model.Params:
        """Parameters of the dense model that this is: of WEMoE for a prompt (or for any text, if
        the routers are constant), for `lm.apply`, `lm.generate` and `lm.hf.save`.

        Raises:
          ConfigError: there is no such model: routers that look at the text, and no prompt;
            corrections, which are no change of weights.
        """
        if self.routed is not None:
            config, params = self.for_task()
            tokens = [0] if prompt is None else [int(token) for token in prompt]
            if not tokens or (prompt is None and not wemoe.constant(config, params)):
                raise ConfigError("these routers look at the text: give a prompt, or load the rest")
            r = wemoe.routes(config, params, jnp.asarray([tokens]))[0]
            return wemoe.specialized(config, params, r)[1]
        if self.corrections:
            raise ConfigError("corrections are no change of weights: use logits and generate")
        return self.params

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        task: str | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> list[np.ndarray]:
        """The next `max_tokens` tokens of every prompt, each as by itself (`lm.generate`)."""
        found, (config, params) = [], self.for_task(task)
        for prompt in prompts:
            tokens = generate(
                config,
                params,
                [prompt],
                max_tokens=max_tokens,
                sampling=sampling or Sampling(),
                seed=seed,
            )
            found.append(np.concatenate(list(tokens)))
        return found


def load(folder: str | Path, dtype: str | None = None) -> Merged:
    """Read a merged folder; `dtype` as of `lm.hf.load`.

    Raises:
      ConfigError: it is no model, or its parts are of a later format.
    """
    found = settings(folder)
    config, params = hf.load(folder, dtype, task=None if found is None else "none")
    if found is None:
        return Merged(config, params, "dense")
    kind, tasks = found

    def parts(task: str | None) -> Parts:
        merged = hf.load_config(folder, task=task).merged
        whole = dataclasses.replace(config, merged=merged)
        return whole, read_parts(folder, whole)

    if kind == "wemoe":
        return Merged(config, params, kind, tasks, routed=parts(None))
    return Merged(config, params, kind, tasks, {task: parts(task) for task in tasks})


@partial(jax.jit, static_argnames=("config",))
def _logits(config: ModelConfig, params, tokens):
    return model.apply(config, params, tokens)
