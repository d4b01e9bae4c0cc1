"""PCB merging (NeurIPS 2024, arXiv 2410.02396): parameters compete within and between tasks.

With F the K x d matrix of flattened task vectors of the whole model (the authors' script):

    A = |F| clipped to its row's values number int(q d) and int((1 - q) d - 1), C = sign(F) A
    score = exp(K minmax(A)^2) tanh(F * sum over rows of F)
    s = max(score, its row's value number int((1 - ratio) d)), min-max scaled to [0, 1]
    theta = theta_0 + lambda sum of w_k C_k s_k / max(sum of s_k, 1e-12)

Numbers count from 0 for the smallest over the whole model: four streamed passes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lm.merging.methods.arrays import add, divide, multiply
from lm.merging.methods.elect import LAMBDA, onto_base, weights
from lm.merging.methods.thresholds import (
    Run,
    element_count,
    key_value,
    magnitude_keys,
    select,
    value_keys,
)
from lm.merging.types import Block, Method, Parameter

__all__ = ["PCB"]


class Clip(NamedTuple):
    """Limits of one task vector's magnitudes."""

    low: float
    high: float


class Survey(NamedTuple):
    """What PCB knows about the whole model, for each task vector."""

    clips: tuple[Clip, ...]
    floors: tuple[float, ...]
    """Scores that get no weight: up to here."""
    peaks: tuple[float, ...]
    """Largest scores."""


def order_statistics(
    run: Run,
    streams: Callable[[Block], Sequence[Any]],
    indices: Sequence[int],
    count: int,
    size: int,
    signed: bool = False,
) -> list[list[float]]:
    """Values number `indices`, counted from 0 for the smallest, of each of `count` streams."""
    # A rank of `size`, the smallest value, shall be a cut like the others: hence size + 1.
    ranks = [[size - index for index in indices]] * count
    cuts = select(run, streams, ranks, size + 1, sample=False, ties=True)
    return [[key_value(cut.key, signed) for cut in each] for each in cuts]


def clipped(block: Block, clips: Sequence[Clip]) -> list[Any]:
    """A: the clipped magnitudes."""
    xp = block.xp
    return [
        xp.clip(xp.abs(delta), clip.low, clip.high)
        for delta, clip in zip(block.deltas, clips, strict=True)
    ]


def scores(block: Block, clips: Sequence[Clip]) -> list[Any]:
    """Score of every element in each task vector."""
    xp, deltas = block.xp, block.deltas
    total = sum(deltas)
    result = []
    for delta, magnitude, clip in zip(deltas, clipped(block, clips), clips, strict=True):
        width = clip.high - clip.low
        unit = (magnitude - clip.low) / width if width > 0 else xp.zeros_like(magnitude)
        intra = xp.exp(len(deltas) * xp.square(unit))
        result.append(multiply(xp, intra, xp.tanh(delta * total)))
    return result


def survey(job_blocks: Callable[[], Any]) -> Survey:
    """Limits of the magnitudes, then of the scores that follow from them."""
    size, first = 0, None
    for _, blocks in job_blocks():
        size += element_count(blocks)
        first = first or blocks.job
    count = len(first.sources)
    q, ratio = (float(first.params[name]) for name in ("quantile", "ratio"))

    def run(function: Callable[[Block], Any]) -> Any:
        for _, blocks in job_blocks():
            yield from blocks.map(function)

    def magnitudes(block: Block) -> list[Any]:
        return [magnitude_keys(block.xp, delta) for delta in block.deltas]

    ends = [int(size * q), max(0, int(size * (1 - q) - 1))]
    clips = tuple(Clip(*each) for each in order_statistics(run, magnitudes, ends, count, size))

    def ordered(block: Block) -> list[Any]:
        return [value_keys(block.xp, score) for score in scores(block, clips)]

    ends = [min(int(size * (1 - ratio)), size - 1), size - 1]
    limits = order_statistics(run, ordered, ends, count, size, signed=True)
    return Survey(clips, tuple(low for low, _ in limits), tuple(high for _, high in limits))


def pcb(block: Block) -> Any:
    """The weighted mean of the clipped task vectors by their scores."""
    xp, seen = block.xp, block.whole
    total = divisor = None
    each = zip(
        scores(block, seen.clips), clipped(block, seen.clips), block.deltas, weights(block),
        seen.floors, seen.peaks, strict=True,
    )  # fmt: skip
    for score, magnitude, delta, weight, floor, peak in each:
        width = peak - floor
        share = xp.maximum(score, floor) - floor
        share = divide(xp, share, width) if width > 0 else xp.zeros_like(share)
        part = multiply(xp, multiply(xp, magnitude, xp.sign(delta)), share)
        if weight != 1:
            part = multiply(xp, part, weight)
        total = part if total is None else add(xp, total, part)
        divisor = share if divisor is None else add(xp, divisor, share)
    return onto_base(block, divide(xp, total, xp.maximum(divisor, 1e-12)))


PCB = Method(
    "pcb",
    pcb,
    survey=survey,
    per_model=(Parameter("weight", 1.0),),
    params=(
        LAMBDA,
        Parameter("ratio", 0.1, low=0.0, high=1.0),
        Parameter("quantile", 1e-4, low=0.0, high=0.5),
    ),
)
