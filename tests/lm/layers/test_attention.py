"""Every attention implementation against float64 NumPy, and what none of them may do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lm.layers import attention_blocked
from lm.layers.attention import IMPLEMENTATIONS, attention
from lm.layers.attention_common import Spec

ANYWHERE = ("reference", "dense", "blocked")
KERNELS = tuple(
    pytest.param(name, marks=pytest.mark.accelerator)
    for name in IMPLEMENTATIONS
    if name not in (*ANYWHERE, "xla")
)
everywhere = pytest.mark.parametrize("name", ANYWHERE)


def run_or_skip(name, *args, **options):
    """A library kernel may refuse a case (by raising), the XLA forms may not."""
    try:
        return attention(*args, implementation=name, **options)
    except NotImplementedError as e:
        if name in ANYWHERE:
            raise
        pytest.skip(str(e))


def numpy_attention(q, k, v, grad, mask, scale):
    """Output and the gradients of sum(out * grad), in float64; mask [B, T, S]."""
    q, k, v, grad = (np.asarray(x, np.float64) for x in (q, k, v, grad))
    group = q.shape[2] // k.shape[2]
    keys, values = np.repeat(k, group, 2), np.repeat(v, group, 2)
    scores = np.einsum("btnh,bsnh->bnts", q, keys) * scale
    scores = np.where(mask[:, None], scores, -np.inf)
    highest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isinf(highest), 0, highest))
    total = weights.sum(-1, keepdims=True)
    weights = weights / np.where(total == 0, 1, total)
    out = np.einsum("bnts,bsnh->btnh", weights, values)
    dweights = np.einsum("btnh,bsnh->bnts", grad, values)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) * scale
    dq = np.einsum("bnts,bsnh->btnh", dscores, keys)
    dk = np.einsum("bnts,btnh->bsnh", dscores, q)
    dv = np.einsum("bnts,btnh->bsnh", weights, grad)
    fold = (*k.shape[:3], group, k.shape[3])
    return out, dq, dk.reshape(fold).sum(3), dv.reshape(fold).sum(3)


def numpy_mask(batch, length, kv_length, causal, window, q_ids, kv_ids):
    t, s = np.arange(length)[:, None], np.arange(kv_length)[None]
    mask = np.ones((batch, length, kv_length), bool)
    if causal:
        mask &= s <= t
    if window is not None:
        mask &= t - s < window
    if q_ids is not None:
        mask &= q_ids[:, :, None] == kv_ids[:, None, :]
    return mask


def inputs(rng, batch, length, kv_length, heads, kv_heads, width, dtype):
    shapes = [(batch, length, heads, width)] + [(batch, kv_length, kv_heads, width)] * 2
    return [jnp.asarray(rng.normal(size=s), dtype) for s in (*shapes, shapes[0])]


def packed(rng, batch, length):
    return np.sort(rng.integers(0, 4, (batch, length)), axis=1).astype(np.int32)


# length, kv_length, heads, kv_heads, options ("segments" is replaced by ids)
CASES = {
    "one token": (1, 1, 2, 2, {}),
    "a few": (16, 16, 4, 4, {"scale": 0.3}),
    "ragged blocks, grouped": (150, 150, 4, 2, {}),
    "several blocks": (300, 300, 2, 1, {}),
    "window": (300, 300, 2, 2, {"window": 40}),
    "window of 1": (70, 70, 2, 2, {"window": 1}),
    "packed": (150, 150, 4, 1, {"segments": True}),
    "packed, window": (300, 300, 2, 1, {"segments": True, "window": 100}),
    "not causal": (33, 33, 2, 2, {"causal": False}),
    "cross, some rows see nothing": (20, 290, 4, 2, {"causal": False, "segments": True}),
    "causal, longer keys": (40, 70, 2, 2, {}),
    "causal, longer queries": (300, 40, 2, 2, {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [*ANYWHERE, *KERNELS])
def test_values_and_gradients(rng, name, case, dtype=None):
    dtype = dtype or (jnp.float32 if name in ANYWHERE else jnp.bfloat16)
    length, kv_length, heads, kv_heads, options = CASES[case]
    options = dict(options)
    batch, width = 2, 8 if name in ANYWHERE else 64
    q, k, v, grad = inputs(rng, batch, length, kv_length, heads, kv_heads, width, dtype)
    q_ids = kv_ids = None
    if options.pop("segments", False):
        q_ids = packed(rng, batch, length)
        kv_ids = q_ids if length == kv_length else packed(rng, batch, kv_length)
        if length != kv_length:
            q_ids[:, -3:] = 9  # a document without keys
        options |= {"segment_ids": jnp.asarray(q_ids), "kv_segment_ids": jnp.asarray(kv_ids)}

    def f(q, k, v):
        return run_or_skip(name, q, k, v, **options)

    @jax.jit
    def both(q, k, v, grad):
        out, pull = jax.vjp(f, q, k, v)
        return out, *pull(grad)

    mask = numpy_mask(
        batch,
        length,
        kv_length,
        options.get("causal", True),
        options.get("window"),
        q_ids,
        kv_ids,
    )
    want = numpy_attention(q, k, v, grad, mask, options.get("scale", width**-0.5))
    got = both(q, k, v, grad)
    tolerance = 3e-6 if dtype == jnp.float32 else 2e-2
    for label, x, y in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert x.dtype == dtype
        error = np.abs(np.asarray(x, np.float64) - y).max() / max(np.abs(y).max(), 1)
        assert error < tolerance, f"{label}: {error}"
    blind = ~mask.any(-1)
    assert not np.any(np.asarray(got[0], np.float32)[blind])
    assert not np.any(np.asarray(got[1], np.float32)[blind])


@pytest.mark.parametrize("case", ["one token", "ragged blocks, grouped", "packed, window"])
@pytest.mark.parametrize("name", ANYWHERE)
def test_values_and_gradients_in_bfloat16(rng, name, case):
    test_values_and_gradients(rng, name, case, jnp.bfloat16)


@pytest.mark.parametrize("length", [130, 300])
@pytest.mark.parametrize("name", [*ANYWHERE, *KERNELS])
def test_documents_do_not_leak(rng, name, length):
    """Whatever happens in document A, the output and gradients of document B keep every bit."""
    dtype = jnp.float32 if name in ANYWHERE else jnp.bfloat16
    q, k, v, grad = inputs(rng, 2, length, length, 4, 2, 64, dtype)
    ids = np.ones((2, length), np.int32)
    ids[:, length // 3 : length - 17] = 2
    ids[:, length - 17 :] = 0
    in_b = ids[0] == 2
    run = functools.partial(run_or_skip, name, segment_ids=jnp.asarray(ids))

    @jax.jit
    def both(q, k, v, grad):
        out, pull = jax.vjp(run, q, k, v)
        return out, *pull(grad)

    before = both(q, k, v, grad)
    outside = jnp.asarray(~in_b)[None, :, None, None]
    changed = [jnp.where(outside, 100 * x + 3, x) for x in (q, k, v, grad)]
    after = both(*changed)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.asarray(x)[:, in_b], np.asarray(y)[:, in_b])
        assert np.any(np.asarray(x)[:, ~in_b] != np.asarray(y)[:, ~in_b])
    only_b = both(q, k, v, jnp.where(outside, 0, grad))[1:]
    for x in only_b:
        assert not np.any(np.asarray(x)[:, ~in_b]), "document A has a gradient of B's output"


@everywhere
def test_the_future_does_not_leak(rng, name):
    q, k, v, _ = inputs(rng, 1, 290, 290, 2, 2, 8, jnp.float32)
    run = jax.jit(functools.partial(attention, implementation=name))
    late = (jnp.arange(290) >= 200)[None, :, None, None]
    before = run(q, k, v)
    after = run(q, jnp.where(late, 50.0, k), jnp.where(late, 50.0, v))
    np.testing.assert_array_equal(before[:, :200], after[:, :200])
    assert np.any(np.asarray(before[:, 200:] != after[:, 200:]))


@everywhere
def test_large_scores_stay_finite(rng, name):
    q, k, v, grad = inputs(rng, 1, 80, 80, 2, 2, 8, jnp.float32)
    out, pull = jax.vjp(functools.partial(attention, implementation=name), q * 1e3, k * 1e3, v)
    assert all(np.isfinite(x).all() for x in (out, *pull(grad)))


def _grad_program(name, length, **options):
    x = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)

    def total(q, k, v):
        return attention(q, k, v, implementation=name, **options).sum()

    return jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(x, x, x)


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_of_long_rows_is_linear(gradient):
    def temporaries(name, length):
        x = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)
        run = functools.partial(attention, implementation=name)
        lowered = _grad_program(name, length) if gradient else jax.jit(run).lower(x, x, x)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    for name in ("blocked", "xla"):
        assert temporaries(name, 4096) < 2.2 * temporaries(name, 2048)
        assert temporaries(name, 4096) < 4096 * 4096 * 4  # scores of one head of four
    assert temporaries("reference", 4096) > 3.5 * temporaries("reference", 2048)


def test_program_size_does_not_grow_with_length():
    short, long = (_grad_program("blocked", t).as_text().count("\n") for t in (1024, 8192))
    assert long == short


def test_blocked_visits_only_blocks_with_visible_keys():
    pairs = functools.partial(attention_blocked._pairs, size=64, q_blocks=8, kv_blocks=8)
    for window in (None, 1, 64, 65, 100):
        rows, columns = pairs(Spec(1.0, True, window))
        visited = set(zip(rows.tolist(), columns.tolist(), strict=True))
        mask = numpy_mask(1, 512, 512, True, window, None, None)[0]
        needed = mask.reshape(8, 64, 8, 64).any((1, 3))
        assert visited == set(zip(*np.nonzero(needed), strict=True))


def test_dense_skips_products_above_the_diagonal():
    def flops(**options):
        return _grad_program("dense", 512, **options).compile().cost_analysis()["flops"]

    full = flops(causal=False)
    assert flops() < 0.66 * full  # 4 blocks: 10 / 16
    assert flops(window=64) < 0.5 * full  # 7 / 16


@pytest.mark.parametrize("name", ["dense", "blocked"])
def test_named_residuals_spare_the_second_forward_pass(name):
    x = jnp.ones((1, 64, 2, 8))

    def products(policy):
        f = jax.checkpoint(functools.partial(attention, implementation=name), policy=policy)
        return str(jax.make_jaxpr(jax.grad(lambda x: f(x, x, x).sum()))(x)).count("dot_general[")

    saved = products(jax.checkpoint_policies.save_only_these_names("attention"))
    assert saved == 7  # 2 forward, 5 backward
    assert products(jax.checkpoint_policies.nothing_saveable) > saved


@pytest.mark.parametrize("name", ["dense", "blocked"])
def test_sharded_equals_unsharded_without_communication(rng, name):
    q, k, v, grad = inputs(rng, 4, 300, 300, 4, 2, 16, jnp.bfloat16)
    ids = jnp.asarray(packed(rng, 4, 300))

    @jax.jit
    def both(q, k, v, grad, ids):
        run = functools.partial(attention, segment_ids=ids, implementation=name)
        out, pull = jax.vjp(run, q, k, v)
        return out, *pull(grad)

    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    heads = NamedSharding(mesh, P("data", None, "tensor"))
    args = [jax.device_put(x, heads) for x in (q, k, v, grad)]
    args.append(jax.device_put(ids, NamedSharding(mesh, P("data"))))
    program = both.lower(*args).compile()
    text = program.as_text()
    assert not any(op in text for op in ("all-gather", "all-reduce", "all-to-all", "permute("))
    for x, y in zip(program(*args), both(q, k, v, grad, ids), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=2e-2)


def test_xla_is_dense_for_short_rows_and_blocked_for_long_ones(rng):
    for length, name in ((512, "dense"), (513, "blocked")):
        q, k, v, _ = inputs(rng, 1, length, length, 1, 1, 8, jnp.float32)
        got = attention(q, k, v, implementation="xla")
        np.testing.assert_array_equal(got, attention(q, k, v, implementation=name))
        if jax.default_backend() == "cpu":
            np.testing.assert_array_equal(got, attention(q, k, v))


def test_refusals(rng):
    q, k, v, _ = inputs(rng, 1, 8, 8, 2, 2, 64, jnp.bfloat16)
    ids = jnp.ones((1, 8), jnp.int32)
    with pytest.raises(NotImplementedError, match="no segment ids"):
        attention(q, k, v, segment_ids=ids, implementation="cudnn")
    if jax.default_backend() == "cpu":
        for name in ("cudnn", "tokamax"):
            with pytest.raises(NotImplementedError, match=f"{name}.*needs gpu"):
                attention(q, k, v, implementation=name)
    with pytest.raises(ValueError, match="unknown attention implementation 'flash'; there are ref"):
        attention(q, k, v, implementation="flash")
    with pytest.raises(ValueError, match="multiple of K"):
        attention(q[:, :, :1], k, v)
    with pytest.raises(ValueError, match="share a dtype"):
        attention(q.astype(jnp.float32), k, v)
    with pytest.raises(ValueError, match="window=0"):
        attention(q, k, v, window=0)
    with pytest.raises(ValueError, match="needs causal=True"):
        attention(q, k, v, window=4, causal=False)
    with pytest.raises(ValueError, match=r"kv_segment_ids must be \(1, 8\)"):
        attention(q[:, :4], k, v, segment_ids=ids[:, :4])
    with pytest.raises(ValueError, match="give both"):
        attention(q, k, v, kv_segment_ids=ids)
