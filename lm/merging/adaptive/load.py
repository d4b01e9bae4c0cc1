"""A merged model with what belongs to it: corrections of tasks, or routers.

>>> from lm.merging.adaptive.load import load
>>> merged = load("merged/surgery")  # doctest: +SKIP
>>> merged.logits(tokens, task="french")  # doctest: +SKIP
>>> merged.generate([[72, 105]], max_tokens=20, task="french")  # doctest: +SKIP
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lm import hf, model
from lm.config import ConfigError, ModelConfig
from lm.generate import Sampling, generate, sample
from lm.merging.adaptive import surgery, wemoe
from lm.merging.adaptive.objective import unrolled
from lm.merging.adaptive.parts import unflatten
from lm.merging.store import open_store
from lm.merging.store.files import read_json

__all__ = ["Merged", "load"]


@dataclasses.dataclass
class Merged:
    """A model that was merged by a method of this package."""

    config: ModelConfig
    params: model.Params
    kind: str
    """"dense" (all methods that give just weights), "surgery" or "wemoe"."""
    tasks: tuple[str, ...] = ()
    corrections: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of surgery, by task."""
    routed: wemoe.Routed | None = None
    """Of WEMoE."""

    def logits(self, tokens: Int[Array, "B T"], task: str | None = None) -> Float[Array, "B T V"]:
        """Logits in f32; every row by itself.

        Args:
          tokens: ids; rows may be padded on the right.
          task: of surgery whose corrections act; None: none. Others route without being told.
        """
        return _logits(self.config, self.params, self._parts(task), jnp.asarray(tokens))

    def routes(self, tokens: Int[Array, "B T"]) -> Float[Array, "B L K"]:
        """Of WEMoE: the coefficients of every task vector in every layer, by each row's tokens."""
        if self.routed is None:
            raise ConfigError(f"this model ({self.kind}) has no routers")
        return wemoe.routes(self.config, self.params, self.routed, jnp.asarray(tokens))

    def dense(self, prompt: Sequence[int] | None = None) -> model.Params:
        """Parameters of the dense model that this is: of WEMoE for a prompt (or for any text, if
        the routers are of depth 0), for `lm.apply`, `lm.generate` and `lm.hf.save`.

        Raises:
          ConfigError: there is no such model: routers that look at the text, and no prompt;
            corrections, which are no change of weights.
        """
        if self.routed is not None:
            if prompt is None and "out" in self.routed.router:
                raise ConfigError("these routers look at the text: give a prompt, or load the rest")
            tokens = jnp.asarray([list(prompt or [0])])
            return _specialized(self.config, self.params, self.routed, tokens)
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
        """The next `max_tokens` tokens of every prompt.

        WEMoE routes by the prompt alone: what is drawn does not move the coefficients.
        """
        found, sampling = [], sampling or Sampling()
        for prompt in prompts:
            if self.corrections and task is not None:
                found.append(self._corrected(prompt, max_tokens, task, sampling, seed))
                continue
            params = self.params if self.corrections else self.dense(prompt)
            tokens = generate(
                self.config, params, [prompt], max_tokens=max_tokens, sampling=sampling, seed=seed
            )
            found.append(np.concatenate(list(tokens)))
        return found

    def _parts(self, task: str | None) -> Any:
        if task is not None and task not in self.tasks:
            raise ConfigError(f"there is no task {task!r}: there are {', '.join(self.tasks)}")
        return self.routed if self.routed is not None else self.corrections.get(task)

    def _corrected(self, prompt, count, task, sampling, seed) -> np.ndarray:
        length = len(prompt) + count
        if length > self.config.max_context:
            raise ConfigError(
                f"{length} tokens exceed the model's max_context {self.config.max_context}"
            )
        correction = self._parts(task)
        cache = model.init_cache(self.config, 1, length)
        tokens, index, drawn = jnp.asarray([list(prompt)]), 0, []
        for number in range(count):
            key = jax.random.fold_in(jax.random.key(seed), number)
            token, cache = _next(
                self.config, sampling, self.params, correction, tokens, cache, index, key
            )
            index += tokens.shape[1]
            tokens = token[:, None]
            drawn.append(int(token[0]))
        return np.asarray(drawn, np.int32)


def load(folder: str | Path, dtype: str | None = None) -> Merged:
    """Read a merged folder; `dtype` as of `lm.hf.load`.

    Raises:
      ConfigError: it is no model, or its parts are of a later format.
    """
    folder = Path(folder)
    config, params = hf.load(folder, dtype)
    file = folder / "adaptive.json"
    if not file.is_file():
        return Merged(config, params, "dense")
    settings = read_json(file)
    if settings.get("format") != 1:
        raise ConfigError(f"{file} has the format {settings.get('format')}, known is 1")
    kind, tasks = settings["kind"], tuple(settings["tasks"])
    store = open_store(str(folder / kind / f"{kind}.safetensors"))
    arrays = {name: store.read(name).reshape(info.shape) for name, info in store.tensors.items()}
    if kind == "wemoe":
        return Merged(config, params, kind, tasks, routed=wemoe.Routed(**unflatten(arrays)))
    corrections = {
        task: unflatten(
            {name.split("/")[1]: a for name, a in arrays.items() if name.split("/")[0] == task}
        )
        for task in tasks
    }
    return Merged(config, params, kind, tasks, corrections)


@partial(jax.jit, static_argnames=("config",))
def _logits(config: ModelConfig, params, parts, tokens):
    if parts is None:
        return model.apply(config, params, tokens)
    if isinstance(parts, wemoe.Routed):
        plug = wemoe.plug_of(config, parts, tokens.shape)
    else:
        config = unrolled(config) if "layers" in parts else config
        plug = surgery.plug_of(config, params, parts, tokens)
    return model.apply(config, params, tokens, plug=plug)


@partial(jax.jit, static_argnames=("config",))
def _specialized(config: ModelConfig, params, routed, tokens):
    r = wemoe.routes(config, params, routed, tokens)[0]
    return wemoe.specialized(config, params, routed, r)


@partial(jax.jit, static_argnames=("config", "sampling"), donate_argnames=("cache",))
def _next(config: ModelConfig, sampling, params, correction, tokens, cache, index, key):
    run = unrolled(config) if "layers" in correction else config
    positions = index + jnp.arange(tokens.shape[1])[None]
    plug = surgery.plug_of(run, params, correction, tokens, positions)
    found, cache = model.decode(run, params, tokens, cache, index, last_only=True, plug=plug)
    return sample(key, found[:, -1], sampling), cache
