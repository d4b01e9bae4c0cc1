"""Whole conversations packed into rows: none is cut, none sees another.

Best fit, longest first: every conversation goes to the row whose free space it fills best
("best-fit decreasing" of the bin packing literature; Ding et al., arXiv 2404.10830, use it for
documents). What goes together depends on the lengths and their order alone.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lm.data.sources import DataError

if TYPE_CHECKING:
    from lm.data.store import Store

__all__ = ["PackedRows", "best_fit"]


def best_fit(sizes: Sequence[int] | np.ndarray, space: int) -> list[list[int]]:
    """Indices of `sizes` by row, so that no row holds more than `space`; all are at most that.

    At equal sizes the first comes first; of equally full rows the one that got so last is taken.
    """
    sizes = np.asarray(sizes)
    rows: list[list[int]] = []
    free: dict[int, list[int]] = {}  # rows by what is free in them
    present = 0  # bit n is set if free[n] has a row: the smallest n that suffices is a bit away
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        enough = present >> size
        if enough:
            left = size + (enough & -enough).bit_length() - 1
            row = free[left].pop()
            if not free[left]:
                present &= ~(1 << left)
            rows[row].append(index)
        else:
            left, row = space, len(rows)
            rows.append([index])
        free.setdefault(left - size, []).append(row)
        present |= 1 << (left - size)
    return rows


class PackedRows:
    """The rows of a store of conversations, T positions each.

    A conversation of n tokens takes n - 1 positions: its last token predicts nothing.

    Attributes:
      rows: how many.
      left_out: conversations that are too long, if the store leaves them out.
    """

    def __init__(self, store: "Store", length: int):
        """Args:
          store: of conversations (`store.masked`).
          length: T.

        Raises:
          DataError: a conversation is longer than T + 1 tokens, unless `store.skip_long`.
        """
        self._store, self._length = store, length
        sizes = np.diff(store.offsets) - 1
        fits = np.flatnonzero(sizes <= length)
        self.left_out = len(sizes) - len(fits)
        if self.left_out and not store.skip_long:
            worst = int(np.argmax(sizes))
            first = int(np.flatnonzero(sizes > length)[0])
            raise DataError(
                f"{store.origin(first)}: the conversation has {sizes[first] + 1} tokens, and a "
                f"sequence_length of {length} holds {length + 1}; so it is with {self.left_out} of "
                f"{len(sizes)} in {store.name}, the longest has {sizes[worst] + 1}: raise "
                "sequence_length, shorten them, or leave them out with --data.skip-long"
            )
        if not len(fits):
            raise DataError(
                f"all {len(sizes)} conversations of {store.name} are longer than a "
                f"sequence_length of {length}: raise it"
            )
        packed = best_fit(sizes[fits], length)
        self.rows = len(packed)
        self._order = np.concatenate([fits[row] for row in packed])
        self._bounds = np.concatenate([[0], np.cumsum([len(row) for row in packed])])

    def fill(self, batch: dict[str, np.ndarray], row: int, index: int) -> None:
        """Write row `index` into row `row` of a batch (as `lm.data.loader.pack_rows` makes it).

        Positions behind the last conversation have segment 0 and weight 0.
        """
        for values in batch.values():
            values[row] = 0
        at = 0
        members = self._order[self._bounds[index] : self._bounds[index + 1]]
        for segment, document in enumerate(members.tolist(), 1):
            start, stop = self._store.offsets[document : document + 2].tolist()
            count = stop - start - 1
            place = row, slice(at, at + count)
            tokens = self._store.window(start, count + 1)
            batch["tokens"][place], batch["targets"][place] = tokens[:-1], tokens[1:]
            batch["weights"][place] = self._store.mask(start + 1, count)
            batch["segment_ids"][place] = segment
            batch["positions"][place] = np.arange(count)
            at += count
