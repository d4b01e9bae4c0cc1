"""A small model, tasks for experts, and scores: what `scripts/reproduce_merging.py` compares.

Domains are texts of bytes. A task is to continue a domain's text (`language`), or to tell which of
several domains a short text is from by one letter behind it (`choice`). The score of either is the
share of right predictions: of the next byte, or of the letter among those that are answers.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm import model
from lm.config import ConfigError, ModelConfig

__all__ = ["Domain", "Sample", "TaskSpec", "fit", "read_domains", "sample_of", "score"]

QUESTION = b"\n# "
SNIPPET = 40
"""Bytes of the text that a choice is about."""


class Domain(NamedTuple):
    """Text of one kind."""

    train: bytes
    valid: bytes
    """Half of it chooses parameters, half measures."""


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """What an expert learns."""

    name: str
    domains: tuple[str, ...]
    """One to continue, or several to tell apart."""
    steps: int = 300
    """Of fine-tuning: tasks are of different sizes."""

    @property
    def answers(self) -> tuple[str, ...]:
        """The letters of a choice."""
        return tuple("ABCDEFGH"[: len(self.domains)]) if len(self.domains) > 1 else ()


class Sample(NamedTuple):
    """Rows with the predictions that count."""

    tokens: np.ndarray
    """int32 [N, T]."""
    targets: np.ndarray
    """int32 [N, T]."""
    weights: np.ndarray
    """float32 [N, T]."""


def read_domains(folder: str | None, most: int = 1 << 20) -> dict[str, Domain]:
    """Domains by name.

    Args:
      folder: of NAME.train.parquet and NAME.valid.parquet with a column `text`; None takes the
        packages of Python's own library, of which each is a domain.
      most: bytes of training text of a domain; a quarter of it for validation.
    """
    if folder is None:
        return _library(most)
    names = sorted(path.name.split(".")[0] for path in Path(folder).glob("*.train.parquet"))
    if not names:
        raise ConfigError(f"{folder} holds no *.train.parquet")
    return {
        name: Domain(
            *(
                _column(Path(folder) / f"{name}.{split}.parquet", limit)
                for split, limit in (("train", most), ("valid", most // 4))
            )
        )
        for name in names
    }


def _column(path: Path, limit: int) -> bytes:
    import pyarrow.parquet as parquet

    text = b""
    for batch in parquet.ParquetFile(path).iter_batches(columns=["text"]):
        for value in batch.column(0).to_pylist():
            text += value.encode() + b"\n"
            if len(text) >= limit:
                return text[:limit]
    return text


def _library(most: int) -> dict[str, Domain]:
    """The eleven largest packages of the standard library, in the order of their sizes."""
    import sysconfig

    texts = {}
    for folder in sorted(Path(sysconfig.get_paths()["stdlib"]).iterdir()):
        if folder.name in ("test", "site-packages", "idlelib") or not folder.is_dir():
            continue
        text = b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))
        texts[folder.name] = text[: most * 5 // 4]
    largest = sorted(texts, key=lambda name: -len(texts[name]))[:11]
    return {
        name: Domain(
            texts[name][: len(texts[name]) * 4 // 5], texts[name][-len(texts[name]) // 5 :]
        )
        for name in largest
    }


def sample_of(
    spec: TaskSpec, domains: Mapping[str, Domain], part: str, count: int, length: int, seed: int
) -> Sample:
    """Rows of a task.

    Args:
      spec: the task.
      domains: the text.
      part: "train", "tune" or "test": the last two are the halves of the validation text.
      count, length: rows and tokens of a row.
      seed: of where they are taken.
    """
    texts = []
    for name in spec.domains:
        domain = domains[name]
        half = len(domain.valid) // 2
        parts = {"train": domain.train, "tune": domain.valid[:half], "test": domain.valid[half:]}
        texts.append(np.frombuffer(parts[part], np.uint8))
    rng = np.random.default_rng([seed, len(part), *spec.name.encode()])
    if not spec.answers:
        rows = np.stack([_cut(rng, texts[0], length + 1) for _ in range(count)]).astype(np.int32)
        return Sample(rows[:, :-1], rows[:, 1:], np.ones((count, length), np.float32))
    found = Sample(
        np.zeros((count, length), np.int32),
        np.zeros((count, length), np.int32),
        np.zeros((count, length), np.float32),
    )
    size = min(SNIPPET, length - len(QUESTION))
    for row in range(count):
        label = int(rng.integers(len(texts)))
        prompt = [*_cut(rng, texts[label], size), *QUESTION]
        found.tokens[row, : len(prompt)] = prompt
        found.targets[row, len(prompt) - 1] = ord(spec.answers[label])
        found.weights[row, len(prompt) - 1] = 1
    return found


def _cut(rng: np.random.Generator, text: np.ndarray, length: int) -> np.ndarray:
    start = int(rng.integers(0, len(text) - length))
    return text[start : start + length]


def corrupted(sample: Sample, share: float, seed: int) -> Sample:
    """The sample with a share of its text's bytes replaced by letters; targets stay."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(97, 123, sample.tokens.shape)
    hit = rng.random(sample.tokens.shape) < share
    if sample.weights.sum() == len(sample.tokens):  # a choice: the question stays as it is
        last = sample.weights.argmax(1)
        hit &= np.arange(hit.shape[1])[None] <= last[:, None] - len(QUESTION)
    return sample._replace(tokens=np.where(hit, noise, sample.tokens).astype(np.int32))


def fit(
    config: ModelConfig,
    params: model.Params,
    batch: Callable[[int], Sample],
    *,
    steps: int,
    rate: float,
) -> model.Params:
    """Parameters after AdamW (0.9, 0.95, decay 0.01) with a cosine and a tenth of warm-up."""
    optimizer = _optimizer()
    state = _start(optimizer, params)
    for step in range(steps):
        warm = min(1.0, (step + 1) / max(1, steps // 10))
        now = rate * warm * (1 + np.cos(np.pi * step / steps)) / 2
        params, state = _fit_step(config, params, state, batch(step), jnp.float32(now))
    return params


@functools.cache
def _optimizer() -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.95),
        optax.add_decayed_weights(0.01),
    )


def _start(optimizer: optax.GradientTransformation, params: model.Params) -> Any:
    return jax.jit(optimizer.init)(params)


@functools.partial(jax.jit, static_argnames=("config",))
def _fit_step(config: ModelConfig, params, state, batch: Sample, rate):
    def loss(params):
        log_p = jax.nn.log_softmax(model.apply(config, params, batch.tokens))
        own = jnp.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0]
        return -jnp.sum(own * batch.weights) / jnp.sum(batch.weights)

    updates, state = _optimizer().update(jax.grad(loss)(params), state, params)
    return jax.tree.map(lambda p, u: p - rate * u, params, updates), state


def score(
    logits: Callable[[np.ndarray], Any], sample: Sample, answers: Sequence[str] = ()
) -> tuple[float, float]:
    """(share of right predictions in per cent, mean negative log-likelihood in nats).

    Args:
      logits: [B, T] tokens -> [B, T, V].
      sample: rows, in batches of 32.
      answers: letters that are compared; all tokens without them.
    """
    right = nats = 0.0
    ids = np.asarray([ord(a) for a in answers])
    for start in range(0, len(sample.tokens), 32):
        part = Sample(*(array[start : start + 32] for array in sample))
        found = np.asarray(logits(part.tokens), np.float32)
        targets = part.targets
        if answers:
            found = found[..., ids]
            targets = (targets[..., None] == ids).argmax(-1)
        found = found - found.max(-1, keepdims=True)
        log_p = found - np.log(np.exp(found).sum(-1, keepdims=True))
        own = np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
        right += float((part.weights * (found.argmax(-1) == targets)).sum())
        nats -= float((part.weights * own).sum())
    count = float(sample.weights.sum())
    return 100 * right / count, nats / count
