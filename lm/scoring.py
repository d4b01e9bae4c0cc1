"""Log-likelihoods and continuations of many token sequences, batched in few shapes.

Sequences are sorted by length, the longest first (what does not fit the memory fails at once), and
padded to the next power of two, batches to their full number of rows: a handful of compiled
programs serves every length.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lm import model, sharding
from lm.config import ConfigError, ModelConfig, check
from lm.generate import Sampling, generate, prepare
from lm.layers.linear import Plug

__all__ = ["Scorer", "rolling_windows"]

_SHORTEST = 16
"""Tokens of the smallest program."""
_LOGITS = 1 << 26
"""Logits that exist at a time (256 MB in f32), or those of one position of each row."""

Ids = Sequence[int]


class Scorer:
    """A model that says how likely sequences are, and continues them."""

    def __init__(
        self,
        config: ModelConfig,
        params: model.Params,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
        mesh: Mesh | None = None,
        plug: Plug | None = None,
    ):
        """Args:
          config, params: the model.
          batch_size: rows of every batch.
          max_length: most tokens that the model reads; None is its max_context.
          mesh: devices to spread rows and parameters over (`lm.sharding.RULES`); None is one.
          plug: product of the linear layers, as in `lm.apply`.

        Raises:
          ConfigError: a length beyond the model's, or a batch or a model that does not divide
            over the mesh.
        """
        self.config, self.batch_size = config, batch_size
        self.max_length = max_length or config.max_context
        check(batch_size > 0, f"batch_size must be above 0, got {batch_size}")
        check(
            0 < self.max_length <= config.max_context,
            f"max_length {max_length} must lie between 1 and the model's max_context "
            f"{config.max_context}",
        )
        self.mesh = mesh or sharding.make_mesh({"data": 1})
        sharding.check_mesh(config, batch_size, 1, self.mesh)
        self.params = jax.device_put(params, model.shardings(config, self.mesh))
        self._rows = sharding.batch_sharding(self.mesh)
        self._score = jax.jit(functools.partial(_score, config, plug))

    @property
    def programs(self) -> int:
        """Programs compiled for log-likelihoods so far."""
        return self._score._cache_size()

    def loglikelihoods(
        self, pairs: Sequence[tuple[Ids, Ids]], done: Callable[[int], object] = lambda count: None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood (nats, summed) of each continuation behind its context.

        Args:
          pairs: (context, continuation), at least one token in each context. Of what is longer
            than `max_length` the front is cut off.
          done: called with the number of pairs that are ready.

        Returns:
          (log-likelihood, whether every token of the continuation is the likeliest) of each pair.
        """
        rows = []
        for context, continuation in pairs:
            check(len(context) > 0, "a context needs a token or more")
            ids = [*context, *continuation][-self.max_length - 1 :]
            rows.append((ids, min(len(continuation), len(ids) - 1)))
        self._check_ids(ids for ids, _ in rows)
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        waiting = None
        for batch in self._batches([len(ids) - 1 for ids, _ in rows]):
            # The device works on this batch while the host reads the one before.
            scored = batch, self._dispatch([rows[index][0] for index in batch])
            if waiting:
                self._collect(*waiting, rows, found, done)
            waiting = scored
        if waiting:
            self._collect(*waiting, rows, found, done)
        return found

    def _dispatch(self, sequences: list[list[int]]) -> tuple[jax.Array, jax.Array]:
        length = _bucket(max(len(ids) - 1 for ids in sequences), self.max_length)
        shape = self.batch_size, length
        tokens, targets, segments = (np.zeros(shape, np.int32) for _ in range(3))
        for row, ids in enumerate(sequences):
            count = len(ids) - 1
            tokens[row, :count], targets[row, :count] = ids[:-1], ids[1:]
            segments[row, :count] = 1
        arrays = jax.device_put((tokens, targets, segments), self._rows)
        with jax.set_mesh(self.mesh):
            return self._score(self.params, *arrays)

    def _collect(self, batch, scored, rows, found, done) -> None:
        scores, likeliest = jax.device_get(scored)
        for row, index in enumerate(batch):
            ids, count = rows[index]
            span = slice(len(ids) - 1 - count, len(ids) - 1)
            total = float(np.sum(scores[row, span], dtype=np.float64))
            found[index] = total, bool(likeliest[row, span].all())
        done(len(batch))

    def rolling(
        self,
        documents: Sequence[Ids],
        prefix: int,
        done: Callable[[int], object] = lambda count: None,
    ) -> list[float]:
        """Log-likelihood (nats) of whole documents, each token predicted once (`rolling_windows`).

        `prefix` is the token that stands before a document; `done` is called with the number of
        windows that are ready.
        """
        windows, owners = [], []
        for number, ids in enumerate(documents):
            for window in rolling_windows(ids, prefix, self.max_length):
                windows.append(window)
                owners.append(number)
        totals = [0.0] * len(documents)
        for owner, (score, _) in zip(owners, self.loglikelihoods(windows, done), strict=True):
            totals[owner] += score
        return totals

    def continuations(
        self,
        prompts: Sequence[Ids],
        *,
        max_tokens: int,
        sampling: Sampling,
        finished: Callable[[list[int]], bool],
        seed: int = 0,
        done: Callable[[int], object] = lambda count: None,
    ) -> list[list[int]]:
        """What the model makes of each prompt.

        Args:
          prompts: at least one token in each; their fronts are cut off so that `max_tokens` fit.
          max_tokens: most tokens to draw for each.
          sampling: how they are drawn.
          finished: whether what was drawn for a prompt (the newest token last) ends here.
          seed: equal seeds draw equal tokens.
          done: called with the number of prompts that are ready.

        Raises:
          ConfigError: an empty prompt, or `max_tokens` that leave no room for a prompt.
        """
        room = self.max_length - max_tokens
        check(
            room > 0,
            f"{max_tokens} new tokens leave no room for a prompt in {self.max_length}: ask for "
            "fewer",
        )
        short = [list(ids)[-room:] for ids in prompts]
        found: list[list[int]] = [[] for _ in prompts]
        params = prepare(self.config, self.params)
        for batch in self._batches([len(ids) for ids in short]):
            rows = [short[index] for index in batch]
            rows += rows[-1:] * (self.batch_size - len(rows))  # one shape for all batches
            alive = dict(enumerate(batch))
            with jax.set_mesh(self.mesh):
                tokens = generate(
                    self.config,
                    params,
                    rows,
                    max_tokens=max_tokens,
                    sampling=sampling,
                    seed=(seed + batch[0]) % 2**31,
                )
                for drawn in tokens:
                    for row, index in list(alive.items()):
                        found[index].append(int(drawn[row]))
                        if finished(found[index]):
                            del alive[row]
                    if not alive:
                        break
            done(len(batch))
        return found

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Indices, longest first, in batches whose rows share a bucket."""
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        for _, members in itertools.groupby(
            order, lambda index: _bucket(lengths[index], self.max_length)
        ):
            for batch in itertools.batched(members, self.batch_size):
                yield list(batch)

    def _check_ids(self, sequences: Iterable[list[int]]) -> None:
        size = self.config.vocab_size
        for ids in sequences:
            if ids and not 0 <= min(ids) <= max(ids) < size:
                bad = next(i for i in ids if not 0 <= i < size)
                raise ConfigError(f"token id {bad} is outside of [0, {size})")


def rolling_windows(ids: Ids, prefix: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, continuation) pairs that predict each token of a document once.

    The first `length` tokens are predicted behind `prefix`; each further window predicts the next
    `length`, behind the one token before them, and the last window, if it is shorter, behind as
    many as make it full.
    """
    whole = [prefix, *ids]
    for start in range(0, len(ids), length):
        stop = min(start + length, len(ids))
        front = max(0, stop - length) if start else 0
        yield whole[front : start + 1], whole[start + 1 : stop + 1]


def _bucket(length: int, longest: int) -> int:
    """Tokens that a row of `length` is padded to."""
    power = max(_SHORTEST, 1 << max(length - 1, 0).bit_length())
    return min(power, -(-longest // _SHORTEST) * _SHORTEST)


def _score(
    config: ModelConfig,
    plug: Plug | None,
    params: model.Params,
    tokens: Any,
    targets: Any,
    segment_ids: Any,
) -> tuple[jax.Array, jax.Array]:
    """Log-likelihood of every target f32 [B, T], and whether it is the likeliest token.

    The head is applied to some positions at a time: logits of all would take B x T x V.
    """
    x, _ = model.hidden(config, params, tokens, segment_ids=segment_ids, plug=plug)
    batch, length = tokens.shape
    part = length & -length  # the largest power of two that divides it
    while part > 1 and batch * part * config.vocab_size > _LOGITS:
        part //= 2

    def piece(inputs):
        x, targets = inputs
        logits = model.logits(config, params, x, plug)
        best = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return best - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets

    def parts(array):
        return jnp.swapaxes(array.reshape(batch, length // part, part, *array.shape[2:]), 0, 1)

    scores, likeliest = jax.lax.map(piece, (parts(x), parts(targets)))
    return tuple(jnp.swapaxes(a, 0, 1).reshape(batch, length) for a in (scores, likeliest))
