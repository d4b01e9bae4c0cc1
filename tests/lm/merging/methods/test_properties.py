"""What must hold for whole families of methods, whatever the numbers."""

import dataclasses
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.merging.methods import METHODS, get
from lm.merging.types import Block, TensorInfo

WEIGHTED = [m.name for readings in METHODS.values() for m in readings[:1] if m.per_model]
ALL = [(name, m.flavor) for name, readings in METHODS.items() for m in readings]
ONE = [pair for pair in ALL if not get(*pair).many]
ELEMENTWISE = [p for p in ALL if get(*p).scope != "tensor"]


def arguments(name, count, flavor=None):
    """Base or not, number of models, and parameters under which something happens."""
    method = get(name, flavor)
    high = method.models[1] or count
    count = max(method.models[0], min(high, count))
    known = {parameter.name for parameter in method.per_model}
    each = {"weight": 0.7, "density": 0.6, "gamma": 0.05, "epsilon": 0.1, "scale": 0.5}
    each = {key: value for key, value in each.items() if key in known}
    params = {"t": 0.3, "select_topk": 0.6, "ratio": 0.4}
    params = {k: v for k, v in params.items() if k in {p.name for p in method.params}}
    return {
        "based": method.base not in ("none",),
        "count": count,
        "each": [
            dict(each, **({"weight": 0.7 + 0.2 * k} if "weight" in each else {}))
            for k in range(count)
        ],
        "params": params,
    }


def call(run, name, flavor, base, models, **more):
    setting = arguments(name, len(models), flavor)
    return run(
        name, base if setting["based"] else None, models[: setting["count"]], flavor=flavor,
        each=setting["each"], **setting["params"], **more,
    )  # fmt: skip


def data(seed, shape, count=3, digits=None):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=shape).astype(np.float32)
    models = base + 0.3 * rng.normal(size=(count, *shape)).astype(np.float32)
    if digits is not None:  # many equal entries
        base, models = np.round(base, digits), np.round(models, digits)
    return base.astype(np.float32), models.astype(np.float32)


def same(left, right, **close):
    if isinstance(left, dict):
        assert left.keys() == right.keys()
    else:
        left, right = {"": left}, {"": right}
    for key in left:
        if close:
            np.testing.assert_allclose(left[key], right[key], **close)
        else:
            np.testing.assert_array_equal(left[key], right[key])


@pytest.mark.parametrize(("name", "flavor"), ELEMENTWISE)
def test_pieces_of_any_size_give_the_same_numbers(run, name, flavor):
    base, models = data(1, (24, 40), digits=1)
    whole, seen = call(run, name, flavor, base, models, details=True)
    again = [call(run, name, flavor, base, models, block=size) for size in (40, 320)]
    # Sums of squares over pieces differ in the last bit of float64; thresholds do not.
    sums = {"slerp", "nuslerp", "multislerp", "karcher", "model_stock", "sce", "emr", "bitdelta"}
    scaled = {"dare_linear", "dare_ties", "della", "della_linear"}
    close = {"rtol": 2e-6, "atol": 1e-6} if name in sums | scaled else {}
    for other in again:
        same(whole, other, **close)
    given = call(run, name, flavor, base, models, block=80, statistics=seen.statistics)
    if get(name, flavor).survey is None or not close:
        same(whole, given)


@pytest.mark.parametrize(("name", "flavor"), ALL)
def test_jax_agrees_with_numpy(run, name, flavor):
    base, models = data(2, (16, 24))
    left = call(run, name, flavor, base, models, block=96)
    right = call(run, name, flavor, base, models, block=96, xp=jnp)
    # Singular vectors: float64 Gram matrices against a float32 SVD, divided by spectral gaps.
    close = 2e-4 if get(name, flavor).scope == "tensor" else 2e-5
    same(left, right, rtol=close, atol=close)


@given(
    shape=st.sampled_from([(), (1,), (7,), (1, 1), (5, 1), (1, 6), (6, 5), (5, 6), (2, 3, 4)]),
    seed=st.integers(0, 1000),
    case=st.sampled_from(["normal", "equal", "base", "zero", "opposite"]),
)
@settings(max_examples=25, deadline=None)
def test_any_shape_and_degenerate_inputs_give_finite_results(run, shape, seed, case):
    base, models = data(seed, shape)
    if case == "equal":
        models = np.stack([models[0]] * 3)
    elif case == "base":
        models = np.stack([base] * 3)
    elif case == "zero":
        base, models = 0 * base, 0 * models
    elif case == "opposite":
        models = np.stack([models[0], 2 * base - models[0], base])
        if seed % 2:
            base, models = 0 * base, np.stack([models[0], -2 * models[0], models[0]])
    for name, flavor in ONE:
        got = call(run, name, flavor, base, models)
        assert got.shape == shape, (name, flavor)
        assert np.all(np.isfinite(got)), (name, flavor)
        assert np.abs(got).max() <= 60 * (1 + np.abs(models).max()), (name, flavor)


@pytest.mark.parametrize(("name", "flavor"), ALL)
def test_tensors_without_elements(run, name, flavor):
    got = call(run, name, flavor, np.zeros(0), np.zeros((3, 0)))
    assert isinstance(got, dict) or got.shape == (0,)


@pytest.mark.parametrize(("name", "flavor"), ONE)
def test_nan_is_never_hidden(run, name, flavor):
    base, models = data(3, (6, 8))
    count = arguments(name, 3, flavor)["count"]
    for k in range(count):
        bad = models.copy()
        bad[k, 2, 3] = np.nan
        with np.errstate(invalid="ignore"):
            try:
                got = call(run, name, flavor, base, bad)
            except np.linalg.LinAlgError:
                continue
        assert np.isnan(got).any()


@pytest.mark.parametrize(
    ("name", "flavor", "params"),
    [
        ("linear", None, {}),
        ("task_arithmetic", None, {}),
        ("ties", "mergekit", {"normalize": False}),
        ("ties", "paper", {}),
        ("dare_linear", "mergekit", {}),
        ("dare_ties", "paper", {}),
        ("della", None, {}),
        ("della_linear", None, {}),
        ("breadcrumbs", None, {}),
        ("breadcrumbs_ties", None, {}),
        ("ram", None, {}),
        ("magmax", None, {}),
        ("multislerp", None, {}),
        ("karcher", None, {}),
        ("consensus", None, {"lambda": 1.0, "k_min": 1}),
        ("sce", None, {}),
        ("tsv", None, {}),
        ("knots", None, {}),
        ("wudi", None, {}),
        ("wudi_steps", None, {}),
        ("passthrough", None, {}),
    ],
)
def test_one_model_of_full_density_is_returned(run, name, flavor, params):
    base, models = data(4, (6, 9), 1)
    method = get(name, flavor)
    each = [{"weight": 1.0} if name in WEIGHTED else {}]
    based = base if method.base == "required" else None
    got = run(name, based, models, flavor=flavor, each=each, **params)
    np.testing.assert_allclose(got, models[0], rtol=1e-6, atol=2e-6)


SYMMETRIC = [
    ("linear", None), ("task_arithmetic", None), ("ties", "mergekit"), ("ties", "paper"),
    ("breadcrumbs_ties", None), ("sce", None), ("ram", None), ("ramplus_tl", None),
    ("multislerp", None), ("karcher", None), ("model_stock", "mergekit"), ("model_stock", "paper"),
    ("pcb", None), ("consensus", None), ("magmax", None), ("tsv", None), ("iso_c", None),
    ("iso_cts", None), ("knots", None), ("wudi", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "flavor"), SYMMETRIC)
def test_the_order_of_models_does_not_matter(run, name, flavor):
    base, models = data(5, (8, 12))
    setting = arguments(name, 3, flavor)
    each = setting["each"]
    left = run(
        name,
        base if setting["based"] else None,
        models,
        flavor=flavor,
        each=each,
        **setting["params"],
    )
    order = [2, 0, 1]
    right = run(
        name, base if setting["based"] else None, models[order], flavor=flavor,
        each=[each[k] for k in order], **setting["params"],
    )  # fmt: skip
    np.testing.assert_allclose(left, right, rtol=2e-5, atol=3e-6)


HOMOGENEOUS = [
    ("task_arithmetic", None), ("ties", "mergekit"), ("ties", "paper"), ("dare_ties", "mergekit"),
    ("dare_linear", "paper"), ("della", "mergekit"), ("breadcrumbs", None), ("sce", "paper"),
    ("magmax", None), ("consensus", None), ("tsv", None), ("iso_c", None), ("iso_cts", None),
    ("knots", None), ("wudi", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "flavor"), HOMOGENEOUS)
def test_twice_the_task_vectors_give_twice_the_change(run, name, flavor):
    _, models = data(6, (8, 12))
    zero = np.zeros((8, 12), np.float32)
    once = call(run, name, flavor, zero, models)
    twice = call(run, name, flavor, zero, 2 * models)
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-5, atol=1e-6)


def test_pcb_is_not_homogeneous(run):
    _, models = data(6, (8, 12))
    zero = np.zeros((8, 12), np.float32)
    once = call(run, "pcb", None, zero, models)
    assert np.abs(call(run, "pcb", None, zero, 2 * models) - 2 * once).max() > 1e-3


@pytest.mark.parametrize(("name", "flavor"), [p for p in ONE if p[0] != "passthrough"])
def test_inputs_are_not_overwritten(run, name, flavor):
    base, models = data(7, (6, 8))
    kept = []
    method = get(name, flavor)

    def apply(block):
        arrays = [block.base, *block.models]
        before = [None if a is None else a.copy() for a in arrays]
        result = method.apply(block)
        kept.append(
            all(a is None or np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))
        )
        return result

    setting = arguments(name, 3, flavor)
    run(
        dataclasses.replace(method, apply=apply), base if setting["based"] else None,
        models[: setting["count"]], each=setting["each"], **setting["params"],
    )  # fmt: skip
    assert kept and all(kept)


WHOLE = [pair for pair in ALL if get(*pair).scope == "tensor"]


@pytest.mark.parametrize(("name", "flavor"), WHOLE)
@pytest.mark.parametrize("shape", [(96, 96), (72, 240), (240, 72)], ids=str)
def test_whole_matrices_take_no_more_memory_than_is_said(name, flavor, shape, rng):
    method = get(name, flavor)
    params = {p.name: p.default for p in method.params} | ({"steps": 3} if "_steps" in name else {})
    each = {p.name: p.default for p in method.per_model} | {"weight": 0.5, "density": 0.5}
    for count in 1, 4:
        base, *models = rng.standard_normal((count + 1, *shape), np.float32)
        info = TensorInfo("w", shape, "float32")
        block = Block(base, tuple(models), (each,) * count, params, 0, lambda k: None, info=info)
        tracemalloc.start()
        method.apply(block)
        peak = tracemalloc.get_traced_memory()[1] + 4 * (count + 1) * base.size
        tracemalloc.stop()
        assert peak <= method.memory(shape, count) < 4 * peak, (count, peak / base.nbytes)
