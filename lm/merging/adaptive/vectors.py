"""Task vectors tau_k = theta_k - theta_0, piece by piece, as they are or as TIES prepares them.

For AdaMerging++ (arXiv 2310.02575) every vector keeps its share `density` of largest magnitudes
over the whole model and, of these, the elements that have the elected sign: that of the sum, and
where the sum is 0 that of the majority (the paper's reading of TIES, arXiv 2306.01708). There is
one vector per task still: nothing is averaged.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from lm.merging.adaptive.models import Models, Piece
from lm.merging.methods.thresholds import Cut, select
from lm.merging.methods.ties import delta_keys, trimmed
from lm.merging.types import Block

__all__ = ["Vectors"]


class Election(NamedTuple):
    """What TIES knows about the whole model."""

    cuts: list[Cut]
    positive: bool
    """The sign of the majority, where the sum is 0."""


class Vectors:
    """Base and task vectors of `models`, of which the first is the base.

    Args:
      density: share of each vector that stays, with elected signs; None takes vectors as they are.
    """

    def __init__(self, models: Models, density: float | None = None):
        self.models = models
        self.count = len(models.stores) - 1
        self._election = None if density is None else self._elect(density)

    def __call__(self, piece: Piece) -> tuple[np.ndarray, list[np.ndarray]]:
        """(theta_0, all tau_k), flat float32 arrays of the caller's own."""
        if self._election is None:
            base, *others = (self.models.read(n, piece) for n in range(self.count + 1))
            for other in others:  # in place: the arrays are fresh
                np.subtract(other, base, out=other)
            return base, others
        block = self._block(piece)
        deltas = self._trimmed(block, self._election.cuts)
        total = _sum(deltas)
        positive = np.where(total == 0, self._election.positive, total > 0)
        return block.base, [delta * ((delta > 0) == positive) for delta in deltas]

    def _block(self, piece: Piece) -> Block:
        base, *others = (self.models.read(n, piece) for n in range(self.count + 1))
        return Block(base, tuple(others), (), {}, piece.span[0], random=np.zeros)

    def _trimmed(self, block: Block, cuts: list[Cut]) -> list[np.ndarray]:
        pairs = zip(block.deltas, cuts, strict=True)
        return [trimmed(block, delta, cut) for delta, cut in pairs]

    def _elect(self, density: float) -> Election:
        def run(function: Callable[[Block], Any]) -> Iterator[Any]:
            for piece in self.models.pieces:
                yield function(self._block(piece))

        size = sum(info.size for info in self.models.infos.values())
        rank = int(density * size) + 1 if 0 < density < 1 else int(density) * size
        ranks = [[rank]] * self.count
        found = select(run, delta_keys, ranks, size, sample=False, ties=True)
        cuts = [each[0] for each in found]

        def balance(block: Block) -> int:
            signs = np.sign(_sum(self._trimmed(block, cuts)))
            return int(signs.sum(dtype=np.int64))

        return Election(cuts, sum(run(balance)) > 0)


def _sum(arrays: list[np.ndarray]) -> np.ndarray:
    total = arrays[0].copy()
    for array in arrays[1:]:
        total += array
    return total
