"""Streamed selection against a stable sort of everything."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.merging.methods import thresholds
from lm.merging.methods.thresholds import (
    EVERYTHING,
    NOTHING,
    keep_count,
    key_value,
    magnitude_keys,
    select,
    survivors,
    value_keys,
)
from lm.merging.types import Block

SPACES = pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])


def pieces(values, length, xp=np):
    """`Blocks.map` over an array cut into pieces, counting passes."""

    def run(function):
        run.passes += 1
        for start in range(0, values.size, length):
            piece = xp.asarray(values[start : start + length])
            yield function(
                Block(
                    base=xp.zeros_like(piece), models=(piece,), per_model=({},), params={},
                    start=start, random=None, xp=xp,
                )
            )  # fmt: skip

    run.passes = 0
    return run


def above(values, cut, length, xp=np):
    masks = []
    for start in range(0, values.size, length):
        keys = magnitude_keys(xp, xp.asarray(values[start : start + length]))
        masks.append(np.asarray(survivors(xp, keys, cut, start)))
    return np.concatenate(masks)


def keys_of(block):
    return [magnitude_keys(block.xp, delta) for delta in block.deltas]


def first_by_size(values, rank):
    """Mask of the `rank` largest magnitudes, of equals the first."""
    order = np.argsort(-np.abs(values.astype(np.float64)), kind="stable")
    mask = np.zeros(values.size, bool)
    mask[order[:rank]] = True
    return mask


@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 400),
    length=st.integers(1, 150),
    distinct=st.sampled_from([1, 2, 5, 40, 0]),
    sample=st.sampled_from([4, 16, 1 << 16]),
    by_sample=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_any_rank_separates_the_first_largest(seed, size, length, distinct, sample, by_sample):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=size).astype(np.float32)
    if distinct:
        values = rng.choice(rng.normal(size=distinct).astype(np.float32), size)
        values[rng.random(size) < 0.1] = 0
        values *= rng.choice([-1, 1], size).astype(np.float32)
    ranks = sorted({0, 1, size, *rng.integers(0, size + 1, 3).tolist()})
    old, thresholds.SAMPLE = thresholds.SAMPLE, sample
    try:
        (cuts,) = select(pieces(values, length), keys_of, [ranks], size, sample=by_sample)
    finally:
        thresholds.SAMPLE = old
    for rank, cut in zip(ranks, cuts, strict=True):
        want = first_by_size(values, rank)
        for other in length, 1 + size // 3:
            np.testing.assert_array_equal(above(values, cut, other), want)


@SPACES
def test_both_namespaces_and_other_blocks_when_measured(xp, rng):
    values = np.round(rng.normal(size=5000), 1).astype(np.float32)
    want = first_by_size(values, 1234)
    for length in 5000, 512, 77:
        for sample in True, False:
            run = pieces(values, length, xp)
            ((cut,),) = select(run, keys_of, [[1234]], values.size, sample=sample)
            np.testing.assert_array_equal(above(values, cut, 640, xp), want)


def test_equal_to_the_last_may_all_survive(rng):
    values = np.round(rng.normal(size=1000), 1).astype(np.float32)
    ((cut,),) = select(pieces(values, 100), keys_of, [[300]], 1000, ties=True)
    bound = np.sort(np.abs(values))[-300]
    np.testing.assert_array_equal(above(values, cut, 64), np.abs(values) >= bound)


def test_two_passes_for_common_data_and_three_where_the_sample_misleads(rng):
    values = rng.normal(size=1 << 19).astype(np.float32)
    run = pieces(values, 1 << 16)
    select(run, keys_of, [[1 << 18, 1000]], values.size)
    assert run.passes == 2
    # Exactly the sampled elements are large: the bracket cannot hold the rank.
    stride = (values.size // thresholds.SAMPLE) | 1
    values[:] = rng.uniform(0, 1, values.size)
    values[::stride] += 10
    run = pieces(values, 1 << 16)
    ((cut,),) = select(run, keys_of, [[1 << 18]], values.size)
    assert run.passes == 4
    want = first_by_size(values, 1 << 18)
    np.testing.assert_array_equal(above(values, cut, 1 << 15), want)


def test_trivial_ranks_make_no_pass(rng):
    run = pieces(rng.normal(size=10).astype(np.float32), 5)
    assert select(run, keys_of, [[0, 10, 11]], 10) == [[NOTHING, EVERYTHING, EVERYTHING]]
    assert run.passes == 0


@SPACES
def test_keys_order_as_numbers_do(xp, rng):
    values = np.sort(
        rng.normal(size=200).astype(np.float32) * np.float32(1e3) ** rng.normal(size=200)
    )
    values = np.sort(np.concatenate([values, [-np.inf, np.inf, 0]]).astype(np.float32))
    keys = np.asarray(value_keys(xp, xp.asarray(values)))
    assert np.all(np.diff(keys.astype(np.int64)) > 0)
    np.testing.assert_array_equal([key_value(int(key), True) for key in keys], values)
    magnitudes = np.asarray(magnitude_keys(xp, xp.asarray(values)))
    np.testing.assert_array_equal([key_value(int(key)) for key in magnitudes], np.abs(values))
    nan = magnitude_keys(xp, xp.asarray(np.array([np.nan, np.inf], np.float32)))
    assert int(nan[0]) > int(nan[1])


def test_how_many_are_kept():
    assert [keep_count(d, 12) for d in (0, 0.01, 0.5, 0.99, 1)] == [0, 1, 6, 11, 12]
    assert keep_count(0.5, 1) == 1


def arrays(value):
    if isinstance(value, np.ndarray):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    nested = isinstance(value, dict | list | tuple)
    return [found for each in values for found in arrays(each)] if nested else []


def test_a_whole_model_keeps_no_keys_and_parts_no_equals(rng, monkeypatch):
    """Blocks of two tensors: both begin at 0, and the cut is among equals of both."""
    values = rng.choice(rng.normal(size=30), 4000).astype(np.float32)
    values[::7] = rng.normal(size=values[::7].size)
    tensors = [values[:2500], values[2500:]]
    kept = []

    def run(function):
        for tensor in tensors:
            for part in pieces(tensor, 300)(function):
                kept.append(part)
                yield part

    order = np.sort(np.abs(values))[::-1]
    for rank in 1, 17, 2000, 3999:
        ((cut,),) = select(run, keys_of, [[rank]], values.size, sample=False, ties=True)
        assert key_value(cut.key) == order[rank - 1]
        np.testing.assert_array_equal(above(values, cut, 100), np.abs(values) >= order[rank - 1])
    assert not any(each.dtype == np.uint32 for each in arrays(kept))


def test_few_different_keys_are_counted_not_kept(rng):
    """The rank lies at the border of two keys that make up everything."""
    values = np.repeat(np.float32([1, 2]), 1 << 19)
    rng.shuffle(values)
    largest = [0]

    def run(function):
        for part in pieces(values, 1 << 17)(function):
            if isinstance(part, tuple):
                ((_, inside),) = part[1].values()
                largest[0] = max(largest[0], np.size(inside[0]))
            yield part

    ((cut,),) = select(run, keys_of, [[(1 << 19) - 5]], values.size)
    assert 0 < largest[0] <= 2
    np.testing.assert_array_equal(above(values, cut, 1 << 16), first_by_size(values, (1 << 19) - 5))
