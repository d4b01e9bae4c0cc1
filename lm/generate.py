"""Text from a model: prefill in chunks, then one token at a time from a key/value cache.

Prompts are padded on the left to one of a few lengths, and the cache has room for a power of two of
tokens or three quarters of it, so prompts of many lengths share a few compiled programs.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lm import model
from lm.config import ConfigError, ModelConfig, check
from lm.layers.linear import with_native_products
from lm.layers.self_attention import Cache
from lm.layers.stack import unstack

PREFILL_CHUNK = 512
"""Most prompt tokens per prefill call: bounds the chunk x cache scores that it holds."""
PREFILL_STEP = 16
"""What is left of a prompt is padded to a multiple of this, or of more if it is long."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from the logits."""

    temperature: float = 0.8
    """Logits are divided by this; 0 takes the most likely token."""
    top_k: int = 0
    """Draw from this many most likely tokens; 0 is all."""
    top_p: float = 1.0
    """Draw from the fewest most likely tokens whose probabilities reach this sum."""

    def __post_init__(self):
        check(self.temperature >= 0, f"temperature must be 0 or more, got {self.temperature}")
        check(self.top_k >= 0, f"top_k must be 0 or more, got {self.top_k}")
        check(0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}")


def sample(key: Array, logits: Float[Array, "B V"], sampling: Sampling) -> Int[Array, " B"]:
    """One token per row."""
    if sampling.temperature == 0:
        # The first of the largest, as argmax: two reductions that XLA:CPU vectorizes, in 0.3 ms of
        # 8 x 32,000 instead of 0.7.
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        below = logits < logits.max(axis=-1, keepdims=True)
        return jnp.where(below, logits.shape[1], ids).min(axis=-1)
    logits = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k:
        kth = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        # A token stays while the mass before it is below top_p: the first one always does.
        stays = jnp.cumsum(probabilities, axis=-1) - probabilities < sampling.top_p
        lowest = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("config", "reach"), donate_argnames=("cache",))
def _prefill(config, reach, params, tokens, cache, index, padding):
    with with_native_products(isinstance(params, Prepared)):
        logits, cache = model.decode(
            config, params, tokens, cache, index, padding=padding, last_only=True, reach=reach
        )
    return logits[:, -1], cache


@functools.partial(jax.jit, static_argnames=("config", "sampling"), donate_argnames=("cache",))
def _next(config, sampling, params, logits, cache, index, padding, key):
    token = sample(jax.random.fold_in(key, index), logits, sampling)
    with with_native_products(isinstance(params, Prepared)):
        logits, cache = model.decode(config, params, token[:, None], cache, index, padding=padding)
    return token, logits[:, -1], cache


def prepare(config: ModelConfig, params: model.Params) -> model.Params:
    """The parameters in the layout that generation is fastest with; `generate` takes either.

    On a CPU every layer gets arrays of its own, a second copy of the weights; elsewhere, and for
    sharded parameters, nothing changes. Worth calling once where `generate` is called often.
    """
    several = any(
        isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
        for leaf in jax.tree.leaves(params)
    )
    if jax.default_backend() != "cpu" or several or isinstance(params, Prepared):
        return params
    loose = {name: unstack(params[name]) for name in config.stacks}
    return Prepared(params | loose)


@jax.tree_util.register_pytree_with_keys_class
class Prepared(dict):
    """Parameters as from `prepare`."""

    def tree_flatten_with_keys(self):
        names = sorted(self)
        return [(jax.tree_util.DictKey(name), self[name]) for name in names], tuple(names)

    @classmethod
    def tree_unflatten(cls, names, values):
        return cls(zip(names, values, strict=True))


def _bucket(length: int) -> int:
    return max(16, 1 << (length - 1).bit_length())


def _slots(length: int) -> int:
    """Of a cache: the next of 16, 32, 48, 64, 96, 128, 192, ... Each step looks at all of them.

    >>> _slots(52), _slots(96), _slots(736)
    (64, 96, 768)
    """
    whole = _bucket(length)
    return whole * 3 // 4 if whole > 32 and length <= whole * 3 // 4 else whole


def _pieces(longest: int) -> list[int]:
    """Lengths of the prefill calls for a prompt: whole chunks, and a rest that is padded by less
    than an eighth, so that there are a few lengths of rests.

    >>> _pieces(20), _pieces(200), _pieces(700)
    ([32], [224], [512, 192])
    """
    whole, rest = divmod(longest, PREFILL_CHUNK)
    step = max(PREFILL_STEP, _bucket(rest) // 8) if rest else 1
    return [PREFILL_CHUNK] * whole + [-(-rest // step) * step] * (rest > 0)


def generate(
    config: ModelConfig,
    params: model.Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    stop_id: int | None = None,
) -> Iterator[np.ndarray]:
    """Yield the next token of every row, [B] int32, as soon as it is known.

    A row that has drawn `stop_id` yields -1 from then on, itself included; the iteration ends when
    all rows have, or after `max_tokens`.

    Args:
      config: the model.
      params: as from `lm.init`.
      prompts: token ids of each row, at least one each.
      max_tokens: most tokens to draw per row.
      sampling: how they are drawn.
      seed: equal seeds draw equal tokens.
      stop_id: the id that ends a row.

    Raises:
      ConfigError: an empty prompt, an id outside of the vocabulary, or too many tokens.
    """
    longest = max((len(prompt) for prompt in prompts), default=0)
    check(min((len(prompt) for prompt in prompts), default=0) > 0, "a prompt needs a token or more")
    check(max_tokens > 0, f"max_tokens must be above 0, got {max_tokens}")
    for prompt in prompts:
        bad = [t for t in prompt if not 0 <= t < config.vocab_size]
        if bad:
            raise ConfigError(f"token id {bad[0]} is outside of [0, {config.vocab_size})")
    check(
        longest + max_tokens <= config.max_context,
        f"a prompt of {longest} tokens and {max_tokens} new ones exceed the model's max_context "
        f"{config.max_context}",
    )
    return _generate(config, params, prompts, longest, max_tokens, sampling, seed, stop_id)


def _generate(config, params, prompts, longest, max_tokens, sampling, seed, stop_id):
    pieces = _pieces(longest)
    width = sum(pieces)
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
    padding = jnp.asarray([width - len(prompt) for prompt in prompts], jnp.int32)
    params = prepare(config, params)
    slots = _slots(width + max_tokens)
    cache: Cache = model.init_cache(config, len(tokens), slots)
    cache = unstack(cache) if isinstance(params, Prepared) else cache
    start = 0
    for length in pieces:
        piece = jnp.asarray(tokens[:, start : start + length])
        reach = min(slots, _bucket(start + length))
        logits, cache = _prefill(config, reach, params, piece, cache, np.int32(start), padding)
        start += length
    key = jax.random.key(seed)
    alive = np.ones(len(prompts), bool)
    drawn = None
    for i in range(max_tokens + 1):
        previous = drawn
        if i < max_tokens:
            # Dispatched before the previous token is read: the device does not wait for the host.
            drawn, logits, cache = _next(
                config, sampling, params, logits, cache, np.int32(width + i), padding, key
            )
        if previous is not None:
            row = np.asarray(previous)
            if stop_id is not None:
                alive &= row != stop_id
            if not alive.any():
                return
            yield np.where(alive, row, -1)


def continue_text(
    config: ModelConfig,
    params: model.Params,
    tokenizer: Any,
    prompt: str,
    max_tokens: int,
    sampling: Sampling,
    seed: int,
    prefix: Sequence[int] | None = None,
) -> Iterator[str]:
    """Pieces of text that continue `prompt`; every piece is whole characters.

    The prompt stands behind `prefix`, by default the tokenizer's separator, where documents start
    in training. The text ends at the separator or end token.
    """
    prefix = [tokenizer.separator_id] if prefix is None else prefix
    ids = [*prefix, *tokenizer.encode(prompt).tolist()] or [tokenizer.separator_id]
    end = tokenizer.separator_id if tokenizer.end_id is None else tokenizer.end_id
    rows = generate(
        config, params, [ids], max_tokens=max_tokens, sampling=sampling, seed=seed, stop_id=end
    )
    known = min(tokenizer.vocab_size, config.vocab_size)
    drawn: list[int] = []
    shown = ""
    for row in rows:
        # Ids between the tokenizer's size and the rounded-up vocabulary stand for nothing.
        drawn += [int(row[0])] if row[0] < known else []
        text = tokenizer.decode(drawn)
        # The last character may be half of one: wait for the rest of its bytes.
        whole = text[:-1] if text.endswith("\ufffd") else text
        if whole.startswith(shown):
            yield whole[len(shown) :]
            shown = whole
    yield tokenizer.decode(drawn)[len(shown) :]
