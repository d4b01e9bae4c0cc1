"""The k-th largest value of a streamed tensor, exactly, without sorting it.

Values are compared as 32-bit keys: a float's bit pattern without its sign orders magnitudes
(`magnitude_keys`), and with a twist orders signed values (`value_keys`). These passes find a rank:

1. a strided sample of 65536 keys or more brackets it between two keys (4 standard deviations of
   the sample's rank); over a whole model, or where the bracket missed, a histogram of the upper 16
   bits brackets it instead, and never misses;
2. keys above the bracket are counted, keys within are kept (1 or 2 % of the tensor), and the rank
   is selected among them. Where many keys are equal, as deltas of bfloat16 files are, the bracket
   usually is one key and nothing is kept, or a few, of which only the numbers are kept. Over a
   whole model a second histogram, of the lower 16 bits, tells the key: nothing is kept at all;
3. where some of several equal elements are above the cut, the pass is repeated up to the place.

Keys of other namespaces than NumPy come to the host for it: the sizes above depend on the data.

Ties: the first positions count as larger, so a rank always separates exactly that many elements.
(mergekit sorts with an unstable sort: which of equal elements it keeps is unspecified.)
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.merging.methods.arrays import flat
from lm.merging.types import Block, Blocks

__all__ = [
    "EVERYTHING",
    "NOTHING",
    "Cut",
    "element_count",
    "key_value",
    "keep_count",
    "magnitude_keys",
    "select",
    "survivors",
    "value_keys",
]

SAMPLE = 65536
TOP = 0xFFFFFFFF
END = 1 << 62

Run = Callable[[Callable[[Block], Any]], Iterator[Any]]
"""`Blocks.map`, or the same over the blocks of several tensors."""


class Cut(NamedTuple):
    """Separates the largest elements of a tensor from the others."""

    key: int
    """Larger keys are above the cut, smaller below."""
    position: int
    """Elements equal to the key are above if they come before this position."""


EVERYTHING = Cut(0, END)
NOTHING = Cut(TOP, 0)


def magnitude_keys(xp: Any, values: Any) -> Any:
    """Flat uint32 keys that order |values|; NaN is above infinity."""
    return flat(xp, values).view(xp.uint32) & xp.uint32(0x7FFFFFFF)


def value_keys(xp: Any, values: Any) -> Any:
    """Flat uint32 keys that order signed values."""
    bits = flat(xp, values).view(xp.uint32)
    return xp.where(bits >> xp.uint32(31) == 1, ~bits, bits | xp.uint32(0x80000000))


def key_value(key: int, signed: bool = False) -> float:
    """The float32 number whose key that is."""
    if signed:
        key = key & 0x7FFFFFFF if key >> 31 else ~key & TOP
    return float(np.uint32(key).view(np.float32))


def keep_count(density: float, size: int) -> int:
    """int(density * size), but at least one of a tensor that is not to vanish."""
    return 0 if density <= 0 or size == 0 else max(1, int(density * size))


def survivors(xp: Any, keys: Any, cut: Cut, start: int) -> Any:
    """Mask of the elements above the cut; `start` is the position of the first key."""
    if start + keys.shape[0] <= cut.position:
        return keys >= xp.uint32(cut.key)
    above = keys > xp.uint32(cut.key)
    if start >= cut.position:
        return above
    early = xp.arange(keys.shape[0]) < cut.position - start
    return above | (early & (keys == xp.uint32(cut.key)))


def element_count(blocks: Blocks) -> int:
    """Elements of the tensor."""
    return math.prod(blocks.job.shape)


def select(
    run: Run,
    streams: Callable[[Block], Sequence[Any]],
    ranks: Sequence[Sequence[int]],
    size: int,
    *,
    sample: bool = True,
    ties: bool = False,
) -> list[list[Cut]]:
    """Cuts after the given ranks.

    Args:
      run: applies a function to every block: `blocks.map`.
      streams: a block's keys, for each stream a flat uint32 array.
      ranks: for each stream, how many elements shall be above each cut; 0 gives `NOTHING`, the
        size and more `EVERYTHING`.
      size: elements of a stream over all blocks.
      sample: find brackets by a sample; False where blocks of several tensors follow another,
        which goes with `ties` alone: positions in several tensors are no order.
      ties: all elements equal to the last are above too (thresholds compared by >=).
    """
    wanted = [[rank if 0 < rank < size else 0 for rank in each] for each in ranks]
    keys_of, streams = streams, lambda block: [np.asarray(keys) for keys in keys_of(block)]
    found: dict[tuple[int, int], Cut] = {}
    for find in (_sampled, _binned) if sample else (_binned,):
        missed = [[r if (s, r) not in found else 0 for r in each] for s, each in enumerate(wanted)]
        if any(any(each) for each in missed):
            brackets = find(run, streams, missed, size)
            if ties and not sample:
                found |= _refined(run, streams, brackets)
            else:
                found |= _collected(run, streams, brackets, ties)
    return [
        [
            found[stream, rank] if 0 < rank < size else NOTHING if rank <= 0 else EVERYTHING
            for rank in each
        ]
        for stream, each in enumerate(ranks)
    ]


def _sampled(run: Run, streams: Any, wanted: list[list[int]], size: int) -> dict[Any, Any]:
    """Brackets {(stream, rank): (lowest, highest key)} from every stride-th key."""
    # Odd: must not meet the same columns of every row. At most 255: what is kept in the next pass
    # grows with size / sqrt(sample).
    stride = max(1, min(size // SAMPLE, 255)) | 1

    def look(block: Block) -> list[np.ndarray]:
        first = -block.start % stride
        step = stride
        if block.xp is np and block.models[0].ndim == 1:  # make keys of the sample only
            base = None if block.base is None else block.base[first::stride]
            models = tuple(model[first::stride] for model in block.models)
            block, first, step = dataclasses.replace(block, base=base, models=models), 0, 1
        keys = zip(streams(block), wanted, strict=True)
        return [np.array(key[first::step]) if any(each) else _NONE for key, each in keys]

    parts = list(run(look))
    brackets = {}
    for stream, each in enumerate(wanted):
        keys = np.sort(np.concatenate([part[stream] for part in parts]))[::-1]
        for rank in filter(None, each):
            share = rank / size
            middle = share * keys.size
            slack = 0 if stride == 1 else 4 * math.sqrt(keys.size * share * (1 - share)) + 4
            above, below = math.floor(middle - slack) - 1, math.ceil(middle + slack) - 1
            high = int(keys[above]) if above >= 0 else TOP
            low = int(keys[below]) if below < keys.size else 0
            brackets[stream, rank] = (low, high)
    return brackets


def _binned(run: Run, streams: Any, wanted: list[list[int]], _size: int) -> dict[Any, Any]:
    """Brackets from the full histogram of the keys' upper halves."""
    totals = np.zeros((len(wanted), 1 << 16), np.int64)

    def count(block: Block) -> list[Any]:
        pairs = zip(streams(block), wanted, strict=True)
        return [_tally(keys >> np.uint32(16)) if any(each) else (_NONE, 0) for keys, each in pairs]

    for part in run(count):
        for total, (bins, counts) in zip(totals, part, strict=True):
            total[bins] += counts
    brackets = {}
    for stream, each in enumerate(wanted):
        above = np.cumsum(totals[stream, ::-1])
        for rank in filter(None, each):
            low = (0xFFFF - int(np.searchsorted(above, rank))) << 16
            brackets[stream, rank] = (low, low | 0xFFFF)
    return brackets


def _tally(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the numbers below 65536 occur, and how often: a few hundred of a block's."""
    counts = np.bincount(values)
    bins = np.flatnonzero(counts)
    return bins.astype(np.uint16), counts[bins].astype(np.int32)


def _refined(run: Run, streams: Any, brackets: dict[Any, Any]) -> dict[Any, Cut]:
    """Cuts within the brackets of `_binned`, by a histogram of the keys' lower halves."""
    totals = {each: np.zeros(1 << 16, np.int64) for each in brackets}
    larger = dict.fromkeys(brackets, 0)

    def count(block: Block) -> dict[Any, Any]:
        keys, parts = streams(block), {}
        for (stream, rank), (low, high) in brackets.items():
            key = keys[stream]
            inside = key[np.flatnonzero((key - np.uint32(low)) <= np.uint32(high - low))]
            above = int(np.count_nonzero(key > np.uint32(high)))
            parts[stream, rank] = above, _tally(inside - np.uint32(low))
        return parts

    for part in run(count):
        for each, (above, (bins, counts)) in part.items():
            larger[each] += above
            totals[each][bins] += counts
    cuts = {}
    for each, total in totals.items():
        place = int(np.searchsorted(np.cumsum(total[::-1]), each[1] - larger[each]))
        cuts[each] = Cut(brackets[each][0] + 0xFFFF - place, END)
    return cuts


def _collected(run: Run, streams: Any, brackets: dict[Any, Any], ties: bool) -> dict[Any, Cut]:
    """Cuts of the ranks that lie within their brackets; the others are left out."""

    def look(block: Block) -> Any:
        keys, parts = streams(block), {}
        for (stream, rank), (low, high) in brackets.items():
            key = keys[stream]
            if low == high:
                inside = int(np.count_nonzero(key == np.uint32(low)))
            else:
                inside = key[np.flatnonzero((key - np.uint32(low)) <= np.uint32(high - low))]
                crowded = inside.size > key.size // 8  # the same few keys again and again
                inside = np.unique(inside, return_counts=True) if crowded else (inside, None)
            parts[stream, rank] = (int(np.count_nonzero(key > np.uint32(high))), inside)
        return block.start, parts

    blocks = list(run(look))
    cuts: dict[Any, Cut] = {}
    split: dict[int, list[Any]] = {}
    for (stream, rank), (low, high) in brackets.items():
        parts = [(start, *part[stream, rank]) for start, part in blocks]
        need = rank - sum(above for _, above, _ in parts)
        kept = [inside for _, _, inside in parts]
        total = sum(kept) if low == high else sum(_count(*each) for each in kept)
        if not 0 < need <= total:
            continue
        key = low
        if low != high:
            key, need = _largest(kept, low, high, need)
            kept = [_count(keys, counts, keys == key) for keys, counts in kept]
        cuts[stream, rank] = Cut(key, END)
        if not ties and need < sum(kept):
            before = np.cumsum([0, *kept])
            index = int(np.searchsorted(before, need)) - 1
            place = parts[index][0]
            split.setdefault(place, []).append((stream, rank, key, need - int(before[index])))
    return cuts | _placed(run, streams, split)


def _placed(run: Run, streams: Any, split: dict[int, list[Any]]) -> dict[Any, Cut]:
    """Cuts that part equal elements: {block start: [(stream, rank, key, how many are above)]}."""

    def look(block: Block) -> Any:
        wanted = split.get(block.start)
        if not wanted:
            return None
        keys = streams(block)
        return {
            (stream, rank): Cut(
                key, block.start + int(np.flatnonzero(keys[stream] == key)[n - 1]) + 1
            )
            for stream, rank, key, n in wanted
        }

    cuts: dict[Any, Cut] = {}
    wanted = sum(len(each) for each in split.values())
    if wanted:
        for found in run(look):
            cuts |= found or {}
            if len(cuts) == wanted:
                break
    return cuts


def _count(keys: np.ndarray, counts: np.ndarray | None, chosen: Any = slice(None)) -> int:
    """How many elements the chosen keys stand for: one each, or as `counts` says."""
    return keys[chosen].size if counts is None else int(counts[chosen].sum())


def _largest(kept: Sequence[Any], low: int, high: int, need: int) -> tuple[int, int]:
    """The key of that rank among keys in [low, high], and the rank among its equals.

    Two histograms: introselect is slow where many keys are equal.
    """
    keys, counts = np.concatenate([keys for keys, _ in kept]), None
    if any(each is not None for _, each in kept):
        counts = np.concatenate([np.ones(k.size, np.int32) if c is None else c for k, c in kept])
    shift = max(0, (high - low).bit_length() - 16)
    for step in (shift, 0) if shift else (0,):
        upper = (keys - np.uint32(low)) >> np.uint32(step)
        above = np.cumsum(np.bincount(upper, counts)[::-1])
        place = int(np.searchsorted(above, need))
        need -= int(above[place - 1]) if place else 0
        chosen = above.size - 1 - place
        inside = upper == chosen
        keys, counts = keys[inside], None if counts is None else counts[inside]
        low += chosen << step
    return low, need


_NONE = np.zeros(0, np.uint32)
