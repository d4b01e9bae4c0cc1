"""Methods against their definitions, written out in float64 on whole arrays."""

import jax.numpy as jnp
import numpy as np
import pytest

from lm.merging.methods.gram import inner
from lm.merging.methods.linear_algebra import polar, svd

SHAPE = (60, 200)  # 12000 elements: more than the exactly multiplied blocks of `gram`
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(11)
    base = rng.normal(size=SHAPE).astype(np.float32)
    models = base + 0.1 * rng.normal(size=(4, *SHAPE)).astype(np.float32)
    return base, models.astype(np.float32)


def arc(u, v, t, axis=None):
    cosine = (u * v).sum(axis, keepdims=True)
    cosine = cosine / np.sqrt((u * u).sum(axis, keepdims=True) * (v * v).sum(axis, keepdims=True))
    w = np.arccos(cosine)
    return (np.sin((1 - t) * w) * u + np.sin(t * w) * v) / np.sin(w)


def doubles(base, models):
    base, models = base.astype(np.float64), models.astype(np.float64)
    return base, models, models - base


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
def test_inner_products_of_large_blocks(xp, rng):
    for size in 1, 1000, 70_000, 262_144 + 7:
        a = rng.normal(size=size).astype(np.float32)
        b = (a + 1e-3 * rng.normal(size=size)).astype(np.float32)
        c = rng.normal(size=size).astype(np.float32)
        for left, right in ((a, a), (a, b), (a, c)):
            want = left.astype(np.float64) @ right.astype(np.float64)
            scale = np.linalg.norm(left.astype(np.float64)) * np.linalg.norm(right)
            got = inner(xp, xp.asarray(left), xp.asarray(right))
            bound = (1e-7 if xp is np else 5e-7) / max(1, size / 1024) ** 0.5
            assert abs(got - want) < bound * scale


def test_slerp_and_its_straight_line(run, inputs, rng):
    base, models, _ = doubles(*inputs)
    for t in 0, 0.25, 1:
        np.testing.assert_allclose(
            run("slerp", base, models[:1], t=t), arc(base, models[0], t), **CLOSE
        )
    near = base + 1e-3 * rng.normal(size=SHAPE)
    got = run("slerp", base, near[None], t=0.25)
    np.testing.assert_allclose(got, 0.75 * base + 0.25 * near, **CLOSE)
    # Opposite vectors have no shortest arc: |cos| > 0.9995 is a line too.
    np.testing.assert_allclose(run("slerp", base, -2 * base[None], t=0.25), 0.25 * base, **CLOSE)


@pytest.mark.parametrize(
    ("params", "axis"),
    [
        ({}, None),
        ({"nuslerp_flatten": False}, 1),
        ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, 0),
    ],
    ids=["whole", "rows", "columns"],
)
def test_nuslerp_turns_the_whole_rows_or_columns(run, inputs, params, axis):
    base, models, deltas = doubles(*inputs)
    each = [{"weight": 1.0}, {"weight": 3.0}]
    for block in 200, 1 << 16:
        got = run("nuslerp", base, models[:2], each=each, block=block, **params)
        want = base + arc(deltas[0], deltas[1], 0.75, axis)
        np.testing.assert_allclose(got, want, **CLOSE)
        swapped = run("nuslerp", base, models[1::-1], each=each[::-1], block=block, **params)
        np.testing.assert_allclose(got, swapped, **CLOSE)
        got = run("nuslerp", None, models[:2], each=each, block=block, **params)
        np.testing.assert_allclose(got, arc(models[0], models[1], 0.75, axis), **CLOSE)


def test_nuslerp_columns_of_three_axes(run, rng):
    models = rng.normal(size=(2, 4, 3, 5)).astype(np.float32)
    params = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
    got = run("nuslerp", None, models, each=[{"weight": 1.0}] * 2, block=10, **params)
    np.testing.assert_allclose(got, arc(*models.astype(np.float64), 0.5, 0), **CLOSE)


def test_nuslerp_of_opposite_vectors_stays_small(run):
    v = np.array([1.0, 2, 3], np.float32)
    got = run("nuslerp", None, [v, -2 * v], each=[{"weight": 1.0}] * 2)
    np.testing.assert_allclose(got, -0.5 * v, **CLOSE)  # mergekit 0.1.4: -2048 v


def test_multislerp_as_defined(run, inputs):
    base, models, deltas = doubles(*inputs)
    weights = np.array([1, 2, 0.5, 1])
    for origin, vectors in ((None, models), (base, deltas)):
        w = (weights / weights.sum())[:, None]
        flat = vectors.reshape(4, -1)
        lengths = np.linalg.norm(flat, axis=1, keepdims=True)
        units = flat / (lengths + 1e-8)
        mean = (w * units).sum(0) / np.linalg.norm((w * units).sum(0))
        tangent = (w * (units - (units @ mean)[:, None] * mean)).sum(0)
        a = np.linalg.norm(tangent) + 1e-8
        want = (mean * np.cos(a) + tangent * np.sin(a) / a) * (w * lengths).sum()
        got = run("multislerp", origin, models, each=[{"weight": x} for x in weights])
        np.testing.assert_allclose(
            got, want.reshape(SHAPE) + (0 if origin is None else base), **CLOSE
        )


def test_karcher_mean_as_defined(run, inputs, rng):
    far = rng.normal(size=(4, *SHAPE)).astype(np.float32) + 0.3
    for models in inputs[1], far:
        flat = models.astype(np.float64).reshape(4, -1)
        lengths = np.linalg.norm(flat, axis=1)
        units = flat / lengths[:, None]
        u = units.mean(0) / np.linalg.norm(units.mean(0))
        for _ in range(100):
            cosine = units @ u
            angle = np.arccos(cosine)
            g = ((angle / np.sin(angle))[:, None] * (units - cosine[:, None] * u)).mean(0)
            size = np.linalg.norm(g)
            u = np.cos(size) * u + np.sinc(size / np.pi) * g
            u /= np.linalg.norm(u)
        got = run("karcher", None, models, max_iter=100, tol=1e-9)
        np.testing.assert_allclose(got, (lengths.mean() * u).reshape(SHAPE), **CLOSE)


def test_karcher_and_multislerp_of_models_that_cancel_are_means(run):
    v = np.array([1.0, -2, 3], np.float32)
    np.testing.assert_allclose(run("karcher", None, [v, -2 * v]), -0.5 * v, **CLOSE)
    each = [{"weight": 1.0}] * 2
    np.testing.assert_allclose(run("multislerp", None, [v, -2 * v], each=each), -0.5 * v, **CLOSE)
    assert not run("karcher", None, [0 * v, 0 * v]).any()


@pytest.mark.parametrize("flavor", ["mergekit", "paper"])
@pytest.mark.parametrize("by_row", [False, True])
def test_model_stock_as_defined(run, inputs, flavor, by_row):
    base, models, deltas = doubles(*inputs)
    deltas = deltas + 0.2 * deltas[0]  # related directions
    models = base + deltas
    vectors = deltas if by_row else deltas.reshape(4, 1, -1)
    lengths = np.linalg.norm(vectors, axis=-1)
    pairs = [(i, j) for i in range(4) for j in range(i)]
    c = np.array([(vectors[i] * vectors[j]).sum(-1) / lengths[i] / lengths[j] for i, j in pairs])
    c = c.mean(0) if flavor == "mergekit" else np.cos(np.arccos(c).mean(0))
    t = 4 * c / (1 + 3 * c)
    t = (t if flavor == "mergekit" else np.clip(t, 0, 1))[:, None]
    got = run("model_stock", base, models, flavor=flavor, filter_wise=by_row, block=1000)
    np.testing.assert_allclose(got, t * models.mean(0) + (1 - t) * base, rtol=2e-6, atol=2e-6)


def test_model_stock_limits(run, toy):
    same = np.stack([toy.M[0]] * 3)
    for flavor in "paper", "mergekit":
        np.testing.assert_allclose(
            run("model_stock", toy.B, same, flavor=flavor), toy.M[0], **CLOSE
        )
    opposed = toy.B + np.stack([toy.T[0], -0.5 * toy.T[0] + 0.1 * toy.T[1]])
    paper, kept = (run("model_stock", toy.B, opposed, flavor=f) for f in ("paper", "mergekit"))
    np.testing.assert_allclose(paper, toy.B, **CLOSE)  # t is limited to 0
    assert np.abs(kept - toy.B).max() > 0.1
    # cos = -1 for two models: t has no value, mergekit gives the base.
    exactly = toy.B + np.stack([toy.T[0], -toy.T[0]])
    np.testing.assert_allclose(run("model_stock", toy.B, exactly), toy.B, **CLOSE)


def test_elementwise_methods(run, inputs):
    base, models, deltas = doubles(*inputs)
    which = np.abs(deltas).argmax(0)
    want = base + 0.5 * np.take_along_axis(deltas, which[None], 0)[0]
    np.testing.assert_allclose(run("magmax", base, models, **{"lambda": 0.5}), want, **CLOSE)
    got = run("expo", base, models[:1], alpha=0.4)
    np.testing.assert_allclose(got, models[0] + 0.4 * deltas[0], **CLOSE)
    w = np.clip(0.05 / np.maximum(np.abs(deltas[0]), 1e-6), 0, 1)
    got = run("nearswap", base, models[:1], t=0.05)
    np.testing.assert_allclose(got, w * models[0] + (1 - w) * base, **CLOSE)
    got = run("passthrough", None, models[:1], each=[{"scale": 0.5}])
    np.testing.assert_array_equal(got, models[0].astype(np.float32) * np.float32(0.5))
    weights = [1, 2, -0.5, 0.7]
    each = [{"weight": w} for w in weights]
    total = np.tensordot(weights, models, 1)
    np.testing.assert_allclose(run("linear", None, models, each=each), total / 3.2, **CLOSE)
    got = run("linear", None, models, each=each, normalize=False)
    np.testing.assert_allclose(got, total, rtol=1e-6, atol=3e-6)
    each = [{"weight": w} for w in (1, -1, 2, -2)]  # sum 0: not divided
    got = run("linear", None, models, each=each)
    np.testing.assert_allclose(got, np.tensordot([1, -1, 2, -2], models, 1), atol=3e-6)


def test_arcee_fusion_takes_what_stands_out(run, inputs):
    base, models, deltas = doubles(*inputs)

    def softmax(x):
        powers = np.exp(x - x.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)

    p, q = softmax(models[0]), softmax(base)
    importance = np.abs(deltas[0]) * (p * np.log(p / q)).sum(-1, keepdims=True)
    ordered = np.sort(importance, axis=None)
    low, median, high = (ordered[int(x * (ordered.size - 1))] for x in (0.25, 0.5, 0.75))
    want = np.where(importance >= median + 1.5 * (high - low), models[0], base)
    got = run("arcee_fusion", base, models[:1], block=1000)
    np.testing.assert_allclose(got, want, **CLOSE)
    assert 0.02 < (want != base).mean() < 0.1


def test_singular_vectors_of_a_known_matrix(rng):
    u = np.linalg.qr(rng.normal(size=(30, 20)))[0]
    v = np.linalg.qr(rng.normal(size=(50, 20)))[0]
    s = np.geomspace(1, 1e-5, 20)
    a = (u * s) @ v.T
    for matrix, left, right in ((a, u, v), (a.T, v, u)):
        gu, gs, gvt = svd(np, matrix)
        np.testing.assert_allclose(gs[:20], s, rtol=1e-5)
        assert not gs[20:].any()
        np.testing.assert_allclose(np.abs((gu[:, :20] * left).sum(0)), 1, rtol=1e-6)
        np.testing.assert_allclose(np.abs((gvt[:20] * right.T).sum(1)), 1, rtol=1e-6)
        np.testing.assert_allclose(gu * gs @ gvt, matrix, atol=1e-12)
        np.testing.assert_allclose(polar(np, matrix), left @ right.T, atol=1e-5)


def test_tsv_by_svd(run, inputs):
    base, models, deltas = doubles(*inputs)
    parts = [np.linalg.svd(d, full_matrices=False) for d in deltas]
    u = np.concatenate([u[:, :15] for u, _, _ in parts], 1)
    s = np.concatenate([s[:15] for _, s, _ in parts])
    vt = np.concatenate([vt[:15] for _, _, vt in parts])

    def orthogonal(a):
        p, _, q = np.linalg.svd(a, full_matrices=False)
        return p @ q

    want = base + 0.7 * orthogonal(u) @ np.diag(s) @ orthogonal(vt)
    got = run("tsv", base, models, **{"lambda": 0.7})
    np.testing.assert_allclose(got, want, rtol=3e-6, atol=3e-6)


def test_knots_is_ties_in_the_common_basis(run, inputs):
    base, models, deltas = doubles(*inputs)
    u, s, vt = np.linalg.svd(np.concatenate(deltas, 1), full_matrices=False)
    aligned = [s[:, None] * vt[:, k * 200 : (k + 1) * 200] for k in range(4)]
    kept = []
    for a in aligned:
        bound = np.sort(np.abs(a), axis=None)[-int(0.3 * a.size)]
        kept.append(np.where(np.abs(a) >= bound, a, 0))
    sign = np.where(sum(kept) >= 0, 1, -1)
    agree = [np.sign(a) == sign for a in kept]
    merged = sum(a * g for a, g in zip(kept, agree, strict=True)) / np.maximum(sum(agree), 1)
    got = run("knots", base, models, each=[{"weight": 1.0, "density": 0.3}] * 4)
    # Entries at the threshold may fall to either side by rounding: all but a few must agree.
    wrong = np.abs(got - base - u @ merged) > 1e-5
    assert wrong.mean() < 0.02


def test_wudi_is_the_minimum(run, inputs):
    base, models, deltas = doubles(*inputs)
    deltas = deltas[:, :40, :30]
    base = base[:40, :30]
    got = run("wudi", base, base + deltas).astype(np.float64) - base

    def gradient(x):
        return sum((x - d) @ d.T @ d / (d * d).sum() for d in deltas)

    assert np.abs(gradient(got)).max() < 1e-4 * np.abs(gradient(deltas.sum(0))).max()


def test_matrix_methods_average_other_tensors(run, rng):
    base = rng.normal(size=7)
    models = base + rng.normal(size=(3, 7))
    want = base + 0.5 * (models - base).mean(0)
    for name in "tsv", "iso_c", "iso_cts", "wudi", "wudi_steps":
        for kind in "matrix", "vector":
            got = run(name, base, models, kind=kind, **{"lambda": 0.5})
            np.testing.assert_allclose(got, want, **CLOSE)
