"""Embeddings over another vocabulary: where every row comes from, model by model."""

import dataclasses
from collections.abc import Callable

import numpy as np

__all__ = ["Fetch", "RowMap"]

Fetch = Callable[[int, np.ndarray], np.ndarray]
"""`fetch(participant, rows)`: those rows [len(rows), columns] of its own tensor, in float32."""


@dataclasses.dataclass(frozen=True, eq=False)
class RowMap:
    """How the embeddings of all models are brought to one vocabulary, a block of rows at a time.

    Participants are numbered as in `Job`: the sources in order, then the base if there is one.
    """

    rows: tuple[np.ndarray, ...]
    """For each participant int32 [vocabulary]: its own row, or -1 - j for row j of `made`."""
    made: tuple[tuple[tuple[int, int], ...], ...] = ()
    """Rows that a participant lacks or that are forced: the mean of (participant, row) pairs in
    that order; without pairs, zeros."""
    padding: int = 0
    """Rows behind the vocabulary: each is the mean of all rows before (Hewitt 2021)."""

    @property
    def vocabulary(self) -> int:
        """Rows without the padding."""
        return len(self.rows[0])

    @property
    def height(self) -> int:
        """Rows of the rearranged embedding."""
        return self.vocabulary + self.padding

    def is_identity(self, heights: tuple[int, ...]) -> bool:
        """Whether nothing changes for participants whose tensors have these numbers of rows."""
        own = np.arange(self.vocabulary)
        return self.padding == 0 and all(
            height == self.vocabulary and np.array_equal(rows, own)
            for rows, height in zip(self.rows, heights, strict=True)
        )

    def read(
        self,
        participant: int,
        start: int,
        stop: int,
        fetch: Fetch,
        mean: np.ndarray | None = None,
    ) -> np.ndarray:
        """Rows [start, stop) of a participant's rearranged embedding, float32 [rows, columns].

        `mean` is `self.mean(participant, fetch)`; only rows of the padding need it.
        """
        wanted = self.rows[participant][start : min(stop, self.vocabulary)]
        own = wanted >= 0
        parts = []
        if own.all() and len(wanted):
            parts.append(np.asarray(fetch(participant, wanted), np.float32))
        elif len(wanted):
            made = [self._make(-1 - int(row), fetch) for row in wanted[~own]]
            out = np.empty((len(wanted), *made[0].shape), np.float32)
            if own.any():
                out[own] = fetch(participant, wanted[own])
            out[~own] = made
            parts.append(out)
        if stop > self.vocabulary:
            count = stop - max(start, self.vocabulary)
            mean = self.mean(participant, fetch) if mean is None else mean
            parts.append(np.broadcast_to(mean.astype(np.float32), (count, *mean.shape)))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def mean(self, participant: int, fetch: Fetch, chunk: int = 4096) -> np.ndarray:
        """Mean of a participant's rearranged rows without the padding, float64 [columns]."""
        total = None
        for start in range(0, self.vocabulary, chunk):
            rows = self.read(participant, start, min(start + chunk, self.vocabulary), fetch)
            part = rows.sum(0, dtype=np.float64)
            total = part if total is None else total + part
        return total / self.vocabulary

    def _make(self, index: int, fetch: Fetch) -> np.ndarray:
        pairs = self.made[index]
        if not pairs:
            return np.zeros_like(fetch(0, np.zeros(1, np.int32))[0], dtype=np.float32)
        total = None
        for participant, row in pairs:
            value = np.asarray(fetch(participant, np.array([row], np.int32))[0], np.float32)
            total = value if total is None else total + value
        return total if len(pairs) == 1 else total / np.float32(len(pairs))
