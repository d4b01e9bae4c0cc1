"""Compressed multi-task outputs: what is written can be turned back into every task's model."""

import jax.numpy as jnp
import numpy as np
import pytest

from lm.merging.methods import get
from lm.merging.methods.compressed import rebuild
from lm.merging.types import MergeError, TensorInfo

SHAPE = (13, 11)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(31)
    base = rng.normal(size=SHAPE).astype(np.float32)
    return base, (base + 0.1 * rng.normal(size=(3, *SHAPE))).astype(np.float32)


def restored(pieces, base, task):
    tensors = {"w" + key: value for key, value in pieces.items()}
    return rebuild(tensors.__getitem__, tensors, "w", base, task)


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
@pytest.mark.parametrize("name", ["emr", "tall", "bitdelta"])
@pytest.mark.parametrize("kind", ["matrix", "vector"])
def test_pieces_are_the_declared_tensors(run, inputs, name, kind, xp):
    base, models = inputs
    for block in 16, 1 << 16:
        pieces = run(name, base, models, block=block, kind=kind, xp=xp)
        declared = get(name, None, kind).outputs(TensorInfo("w", SHAPE, "bfloat16"), 3)
        assert {"w" + key for key in pieces} == {info.name for info in declared}
        for info in declared:
            piece = pieces[info.name[1:]]
            assert piece.size == info.size
            fixed = info.dtype in ("uint8", "float32")
            assert piece.dtype == (info.dtype if fixed else np.float32)


def test_emr_of_each_task(run, inputs):
    base, models = inputs
    deltas = models.astype(np.float64) - base
    sign = np.where(deltas.sum(0) > 0, 1, -1)
    unified = sign * np.maximum(deltas * sign, 0).max(0)
    pieces = run("emr", base, models, block=32)
    for k in range(3):
        masked = np.where(deltas[k] * sign > 0, unified, 0)
        scale = np.abs(deltas[k]).mean() / np.abs(masked).mean()
        np.testing.assert_allclose(
            restored(pieces, base, k), base + scale * masked, rtol=1e-5, atol=1e-6
        )


def test_emr_scales_sum_means_over_tensors(run, inputs):
    base, models = inputs
    rows, bigger = slice(0, 2), 3 * (models - base)[:, :2] + base[:2]
    pieces = run("emr", base, models, more=[("v", base[rows], bigger)])
    before = after = 0
    for b, m in ((base, models), (base[rows], bigger)):
        deltas = m.astype(np.float64) - b
        sign = np.where(deltas.sum(0) > 0, 1, -1)
        unified = sign * np.maximum(deltas * sign, 0).max(0)
        before = before + np.abs(deltas).mean((1, 2))
        after = after + np.abs((deltas * sign > 0) * unified).mean((1, 2))
    np.testing.assert_allclose(pieces[".scale"], before / after, rtol=1e-5)


def test_one_task_is_exact_with_emr_and_tall(run, inputs):
    base, models = inputs
    for name in "emr", "tall":
        got = restored(run(name, base, models[:1], block=8), base, 0)
        np.testing.assert_allclose(got, models[0], rtol=1e-6, atol=1e-6)


def test_tall_of_each_task(run, inputs):
    base, models = inputs
    deltas = models.astype(np.float64) - base
    total = deltas.sum(0)
    pieces = run("tall", base, models, each=[{"tall_threshold": 0.5}] * 3)
    for k in range(3):
        kept = np.abs(deltas[k]) > 0.5 * np.abs(total - deltas[k])
        np.testing.assert_allclose(
            restored(pieces, base, k), base + kept * total, rtol=1e-5, atol=1e-6
        )


def test_bitdelta_keeps_signs_and_the_mean(run, inputs):
    base, models = inputs
    deltas = models.astype(np.float64) - base
    pieces = run("bitdelta", base, models, block=40)
    for k in range(3):
        want = base + np.abs(deltas[k]).mean() * np.where(deltas[k] < 0, -1, 1)
        np.testing.assert_allclose(restored(pieces, base, k), want, rtol=1e-5, atol=1e-6)
    pieces = run("bitdelta", base, models, kind="vector")
    for k in range(3):
        np.testing.assert_allclose(restored(pieces, base, k), models[k], rtol=1e-6, atol=1e-6)


def test_a_task_that_is_not_there(run, inputs):
    base, models = inputs
    with pytest.raises(MergeError, match="no tensor 'w' of task 3"):
        restored(run("bitdelta", base, models), base, 3)


def test_blocks_must_begin_at_whole_bytes(run, inputs):
    base, models = inputs
    with pytest.raises(MergeError, match="multiples of 8"):
        run("tall", base, models, block=12)
