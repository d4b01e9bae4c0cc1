"""Batches addressed by index: step s, row r is a pure function of (seed, s, r).

A row is a window of T tokens of a store's stream, and one more as the last target; windows do not
overlap, so an epoch trains every token once (the last at most T tokens of a store are left out).
Rows of conversations hold whole ones (`lm.data.packing`).
"""

import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lm.data.sources import DataError
from lm.data.store import Store

Batch = dict[str, np.ndarray]


class Rows(NamedTuple):
    """Some rows of a batch and where each begins in the stream of one store."""

    store: Store
    rows: np.ndarray
    starts: np.ndarray


def pack_rows(parts: Sequence[Rows], n_rows: int, length: int) -> Batch:
    """Windows of token streams, with what a packed batch needs.

    Args:
      parts: every row once; all stores frame documents alike.
      n_rows: rows of the batch.
      length: T; each row needs T + 1 tokens from its start on.

    Returns:
      tokens, targets, segment_ids, positions (int32) and weights (float32), all [n_rows, T].
      Segments count the documents in a row from 1; positions restart with each. The last token of
      a document predicts the separator of the next one, except behind an end token: what follows
      that is another document's business and has weight 0.
    """
    tokens = np.empty((n_rows, length), np.int32)
    targets = np.empty((n_rows, length), np.int32)
    begins = np.zeros((n_rows, length + 1), bool)
    for store, rows, starts in parts:
        for row, start in zip(rows.tolist(), starts.tolist(), strict=True):
            window = store.window(start, length + 1)
            tokens[row], targets[row] = window[:-1], window[1:]
        # Which tokens begin a document: the offsets inside each row, flattened over rows.
        first = np.searchsorted(store.offsets, starts, "left")
        counts = np.searchsorted(store.offsets, starts + length + 1, "left") - first
        owner = np.repeat(np.arange(len(rows)), counts)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        begins[rows[owner], store.offsets[first[owner] + within] - starts[owner]] = True

    inside = begins[:, :length]
    segment_ids = np.cumsum(inside, axis=1, dtype=np.int32)
    segment_ids += ~inside[:, :1]
    index = np.arange(length, dtype=np.int32)
    latest = np.maximum.accumulate(inside * index, axis=1)
    weights = np.ones((n_rows, length), np.float32)
    if parts and parts[0].store.end_id is not None:
        weights[begins[:, 1:]] = 0
    return {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": segment_ids,
        "positions": np.subtract(index, latest, out=latest),
        "weights": weights,
    }


class Loader:
    """An endless, weighted, shuffled sequence of batches over token stores.

    Row `step * batch_size + r` of the sequence takes its window from `grain.MapDataset`s: one per
    store, shuffled anew in every epoch, repeated, and mixed by weight. Nothing is remembered
    between calls, so resuming at a step costs nothing.
    """

    def __init__(
        self,
        stores: Sequence[tuple[Store, float]],
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        shuffle: bool = True,
        sources: bool = False,
    ):
        """Args:
          stores: (store, weight) pairs; weights are shares of the rows.
          batch_size: rows of a global batch.
          sequence_length: T, tokens of a row.
          seed: of the order; in [0, 2^31).
          shuffle: False reads every store front to back.
          sources: add each row's store to the batches.

        Raises:
          DataError: no store, a weight not above 0, stores of different tokenizers, or a store
            with fewer than T + 1 tokens.
        """
        import grain

        if not stores:
            raise DataError("a Loader needs at least one store")
        self.stores = [store for store, _ in stores]
        self.batch_size, self.sequence_length = batch_size, sequence_length
        self._sources = sources
        if len({store.tokenizer_fingerprint for store in self.stores}) > 1:
            raise DataError("all stores of a Loader must come from the same tokenizer")
        for store, weight in stores:
            if not weight > 0:
                raise DataError(f"the weight of {store.name} must be above 0, got {weight}")
            if store.tokens <= sequence_length and not store.masked:
                raise DataError(
                    f"{store.name} holds {store.tokens} tokens, too few for one row of "
                    f"sequence_length {sequence_length} (and one more as target): give it more "
                    "text or lower sequence_length"
                )
        self._rows = [
            store.packed(sequence_length).rows
            if store.masked
            else (store.tokens - 1) // sequence_length
            for store in self.stores
        ]
        self._first_row = np.concatenate([[0], np.cumsum(self._rows)])
        # grain mixes by integers; the smallest weight becomes 100, like grain's own rounding.
        smallest = min(weight for _, weight in stores)
        parts = [round(100 * weight / smallest) for _, weight in stores]
        self._weights = [part / sum(parts) for part in parts]
        orders = []
        for number, rows in enumerate(self._rows):
            order = grain.MapDataset.range(
                int(self._first_row[number]), int(self._first_row[number]) + rows
            )
            if shuffle:
                # hashed: grain adds the epoch to the seed, so near seeds would share orders
                hashed = np.random.SeedSequence((seed, number)).generate_state(1)
                order = order.shuffle(seed=int(hashed[0]))
            orders.append(order.repeat())
        self._order = orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, parts)

    def batch(self, step: int, rows: slice | range | None = None) -> Batch:
        """`rows` (default: all) of the global batch of `step`.

        Returns:
          int32 tokens, targets, segment_ids, positions and float32 weights, [len(rows), T];
          `batch(step, slice(a, b))` equals rows a to b of `batch(step)`. If asked for, int32
          sources [len(rows)] too, the number of each row's store.
        """
        every = range(self.batch_size)
        if rows is None:
            rows = every
        elif isinstance(rows, slice):
            rows = every[rows]
        if step < 0 or (rows and not (min(rows) >= 0 and max(rows) < self.batch_size)):
            raise IndexError(f"step {step}, {rows} is outside of batches of {self.batch_size}")
        picks = np.array([self._order[step * self.batch_size + row] for row in rows], np.int64)
        owner = np.searchsorted(self._first_row, picks, "right") - 1
        inside = picks - self._first_row[owner]
        mine = [np.flatnonzero(owner == number) for number in range(len(self.stores))]
        parts = [
            Rows(store, these, inside[these] * self.sequence_length)
            for store, these in zip(self.stores, mine, strict=True)
            if not store.masked
        ]
        batch = pack_rows(parts, len(rows), self.sequence_length)
        for store, these in zip(self.stores, mine, strict=True):
            if store.masked:
                packed = store.packed(self.sequence_length)
                for row in these.tolist():
                    packed.fill(batch, row, int(inside[row]))
        return batch | {"sources": owner.astype(np.int32)} if self._sources else batch

    @property
    def tokens_per_byte(self) -> float:
        """Tokens of the mixture per byte of its text (UTF-8); framing counts as tokens.

        Of conversations what is learnt counts.
        """
        pairs = zip(self._weights, self.stores, strict=True)
        return 1 / sum(weight * store.bytes / store.targets for weight, store in pairs)

    def statistics(self) -> dict[str, dict[str, float]]:
        """Per source: documents, tokens, bytes, skipped (files and rows passed over when read),
        share (of all tokens there are), weight (of all rows read), rows (of one epoch) and
        epochs_per_step; of conversations targets (tokens that are learnt) and left_out too."""
        total = sum(store.tokens for store in self.stores)
        return {
            store.name: {
                "documents": store.documents,
                "tokens": store.tokens,
                "bytes": store.bytes,
                "skipped": store.skipped,
                **self._of_conversations(store),
                "share": store.tokens / total,
                "weight": weight,
                "rows": rows,
                "epochs_per_step": self.batch_size * weight / rows,
            }
            for store, weight, rows in zip(self.stores, self._weights, self._rows, strict=True)
        }

    def _of_conversations(self, store: Store) -> dict[str, float]:
        if not store.masked:
            return {}
        left_out = store.packed(self.sequence_length).left_out
        return {"targets": store.targets, "left_out": left_out}


def eval_batches(
    stores: Store | Sequence[tuple[Store, float]],
    batch_size: int,
    sequence_length: int,
    limit: int | None = None,
) -> Iterator[tuple[Batch, int]]:
    """Held-out text in order, every target once: (batch, bytes of text its targets stand for).

    Args:
      stores: one store, or (store, weight) pairs read one after the other; weights do not matter.
      batch_size: rows B of every batch; the last one is filled up with rows of weight 0 and
        segment 0, as is the end of a store's last row.
      sequence_length: T.
      limit: at most this many batches, of rows spread evenly over everything, always the same.

    Yields:
      batch: as `Loader.batch`, [B, T].
      n_bytes: UTF-8 bytes of the targets with weight above 0, so that
        bits per byte = summed loss / (ln 2 * summed n_bytes).
    """
    whole = [stores] if isinstance(stores, Store) else [store for store, _ in stores]
    counts = [
        store.packed(sequence_length).rows
        if store.masked
        else -(-(store.tokens - 1) // sequence_length)
        for store in whole
    ]
    begins = np.concatenate([[0], np.cumsum(counts)]).tolist()
    total = begins[-1]
    if not total:
        raise DataError("the held-out text has fewer than 2 tokens: give data.valid_path")
    wanted = total if limit is None else min(total, limit * batch_size)
    for first in range(0, wanted, batch_size):
        batch: Batch = {}
        n_bytes = 0
        for row in range(min(batch_size, wanted - first)):
            index = (first + row) * total // wanted
            number = bisect.bisect_right(begins, index) - 1
            store, inside = whole[number], index - begins[number]
            start = inside * sequence_length
            if store.masked:
                length = sequence_length
                packed = pack_rows([], 1, length)
                store.packed(length).fill(packed, 0, inside)
            else:
                length = min(sequence_length, store.tokens - 1 - start)
                packed = pack_rows([Rows(store, np.array([0]), np.array([start]))], 1, length)
            counted = packed["targets"][packed["weights"] > 0]
            n_bytes += int(store.token_bytes[counted].sum())
            for name, values in packed.items():
                shape = batch_size, sequence_length
                batch.setdefault(name, np.zeros(shape, values.dtype))[row, :length] = values[0]
        yield batch, n_bytes
