import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import quant

MX_RULES = {rule: dataclasses.replace(quant.MXFP4, rule=rule) for rule in ("floor", "ceil", "oas")}
ALL = (quant.NVFP4, *MX_RULES.values(), quant.MXFP8, quant.FP8)
GOLDEN = np.array(
    [
        [.03, -.4, 1, 2.7, -3.1, 0, .55, -.75, 1.25, 5, -6.3, 4.4, .9, -1.9, 2.5, 7],
        [.0013, -.0021, .0004, .003, -.0029, .0017, .0001, -.0007,
         .0025, .0011, -.0003, .0019, .0023, -.0015, .0005, -.0009],
        [1e-5] * 16,
        [0] * 16,
    ],
    np.float32,
)  # fmt: skip


def same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape
        if x.dtype == np.float32:  # the sign of NaN means nothing and compilers do as they like
            x, y = (np.where(np.isnan(v), np.float32(np.nan), v) for v in (x, y))
        np.testing.assert_array_equal(x.view(f"u{x.itemsize}"), y.view(f"u{y.itemsize}"))


def wild(rng, shape):
    """Values over many orders of magnitude, blocks of zeros and exact ties."""
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 4, shape)
    x = np.where(rng.random(shape) < 0.2, rng.choice([0.25, 0.75, 1.5, 3.5, 5, 6], shape), x)
    if x.ndim and x.shape[0] > 1:
        x[0] = 0
    return x.astype(np.float32)


def test_golden_vector():
    """Made with the printed formula in float32; the first two rows confirmed with torchao 0.18."""
    q = quant.quantize(GOLDEN, quant.NVFP4, axis=-1)
    codes = ["".join(f"{byte & 15:x}{byte >> 4:x}" for byte in row) for row in np.asarray(q.codes)]
    assert codes == ["0924d01926f62b47", "5e27f50b74966d2c", "7" * 16, "0" * 16]
    assert np.asarray(q.scales).view(np.uint8).ravel().tolist() == [0x7E, 0x24, 0, 0]
    assert float(q.tensor_scale) == np.float32(1) / np.float32(384)
    x = np.asarray(quant.dequantize(q))
    assert (x[2:] == 0).all() and x[0, 15] == 7


@pytest.mark.parametrize("underflow,byte", [("zero", 0), ("floor", 0x08), ("one", 0x38)])
def test_conventions_for_scales_that_underflow(underflow, byte):
    fmt = dataclasses.replace(quant.NVFP4, underflow=underflow)
    q = quant.quantize(GOLDEN, fmt, axis=-1)
    assert np.asarray(q.scales).view(np.uint8).ravel().tolist() == [0x7E, 0x24, byte, byte]
    assert (np.asarray(quant.dequantize(q))[3] == 0).all()


shapes = st.sampled_from([(16,), (5,), (3, 40), (33, 17), (2, 3, 16), (2, 19, 34)])


@settings(max_examples=15, deadline=None)
@given(
    shape=shapes,
    axis=st.integers(-3, 2),
    dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16, np.float16]),
    kind=st.sampled_from(["nvfp4", "floor", "ceil", "oas"]),
    square=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_the_formulas_in_numpy(reference, codes_of, shape, axis, dtype, kind, square, seed):
    axis = max(-len(shape), min(axis, len(shape) - 1))
    square = square and len(shape) > 1 and axis % len(shape) >= len(shape) - 2
    x = np.clip(wild(np.random.default_rng(seed), shape), -6e4, 6e4).astype(dtype)
    if kind == "nvfp4":
        fmt = quant.NVFP4
        numbers, codes, _ = reference["nvfp4"](x, axis, square)
    else:
        fmt = MX_RULES[kind]
        numbers, codes, _ = reference["mxfp4"](x, axis, kind, square)
    q = quant.quantize(x, fmt, axis=axis, block_2d=square)
    assert q.shape == shape and q.dtype == x.dtype
    got = codes_of(q)
    live = numbers != 0  # the sign of a zero and codes under a zero scale mean nothing
    np.testing.assert_array_equal(got[live], codes[live])
    dequantized = np.asarray(quant.dequantize(q, jnp.float32))
    same_bits(np.abs(dequantized), np.abs(numbers))
    fake = quant.fake_quant(x, fmt, axis=axis, block_2d=square)
    same_bits(fake, dequantized.astype(dtype))


def test_block_scales_equal_the_formulas(reference, rng):
    x = wild(rng, (64, 64))
    _, _, scales = reference["nvfp4"](x, -1)
    q = quant.quantize(x, quant.NVFP4, axis=-1)
    np.testing.assert_array_equal(np.asarray(q.scales).view(np.uint8), scales[:, ::16])
    for rule, fmt in MX_RULES.items():
        _, _, exponents = reference["mxfp4"](x, 0, rule)
        q = quant.quantize(x, fmt, axis=0)
        stored = np.asarray(q.scales).view(np.uint8).astype(int) - 127
        np.testing.assert_array_equal(stored, exponents[::32])


def test_power_of_two_scales_for_every_mantissa():
    """Ceil never clips and is the smallest such; floor and oas against exact integers."""
    mantissa = np.arange(2**23, 2**24, 4093, dtype=np.int64)  # amax = mantissa * 2**-23
    x = (mantissa * 2.0**-23).astype(np.float32)[:, None]
    k = {
        rule: np.asarray(quant.quantize(x, fmt, axis=1).scales).view(np.uint8)[:, 0].astype(int)
        for rule, fmt in MX_RULES.items()
    }
    top = 6 * 2**23
    ceil = k["ceil"] - 127 + 4  # scale in sixteenths is 2**ceil
    assert (mantissa * 16 <= top * 2**ceil).all() and (mantissa * 32 > top * 2**ceil).all()
    assert (k["floor"] == 125).all()
    oas = k["oas"] - 127 + 4
    assert (2**oas * 7 * 2**23 <= mantissa * 32).all()
    assert (2 ** (oas + 1) * 7 * 2**23 > mantissa * 32).all()


@pytest.mark.parametrize("element", [quant.E4M3, quant.E5M2], ids=lambda e: e.name)
@pytest.mark.parametrize("base", [quant.MXFP8, quant.FP8], ids=lambda f: f.name)
def test_eight_bit_values_equal_the_cast(base, element, rng):
    fmt, top = dataclasses.replace(base, element=element), np.float32(element.max)
    x = rng.standard_normal((4, 64)).astype(np.float32)
    if base is quant.FP8:
        scale = top / np.abs(x).max()
        decode = np.float32(1) / scale
    else:
        amax = np.abs(x).reshape(4, 2, 32).max(-1)
        decode = 2 ** np.ceil(np.log2(amax.astype(float) / top)).astype(np.float32)
        decode = np.repeat(decode, 32, -1)
        scale = 1 / decode
    expected = np.clip(x * scale, -top, top).astype(element.dtype)
    q = quant.quantize(x, fmt, axis=-1)
    same_bits(q.codes, expected)
    same_bits(quant.dequantize(q), expected.astype(np.float32) * decode)
    same_bits(quant.fake_quant(x, fmt, axis=-1), quant.dequantize(q))


def context(x, fmt, key, **options):
    """Quantization in the middle of other work that XLA could fuse or cancel with it."""
    x = (x.astype(jnp.float32) * 1.25).astype(x.dtype)
    q = quant.quantize(x, fmt, axis=-1, key=key, **options)
    fake = quant.fake_quant(x, fmt, axis=-1, key=key, **options)
    return q, quant.dequantize(q), fake, quant.dequantize(q, jnp.float32) * 3 + 1


@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f"{f.name}-{f.rule}")
@pytest.mark.parametrize(
    "rounding,dtype", [("nearest", jnp.float32), ("stochastic", jnp.bfloat16)], ids=str
)
def test_jit_equals_op_by_op(fmt, rounding, dtype, rng, getkey):
    x = jnp.asarray(wild(rng, (6, 72))).astype(dtype)
    key = getkey() if rounding == "stochastic" else None
    jitted = jax.jit(lambda x, key: context(x, fmt, key, rounding=rounding))(x, key)
    with jax.disable_jit():
        eager = context(x, fmt, key, rounding=rounding)
    same_bits(jitted[:3], eager[:3])
    same_bits(jitted[1], jitted[2])


@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f"{f.name}-{f.rule}")
def test_padding_changes_nothing(fmt, rng, getkey):
    x = wild(rng, (5, 20))
    padded = np.pad(x, [(0, 0), (0, 44)])
    for options in ({}, {"rounding": "stochastic", "key": getkey()}):
        # Random numbers follow from the place in the padded array, the same here for one row only.
        rows = slice(None) if not options else slice(2, 3)
        got = quant.fake_quant(x[rows], fmt, axis=1, **options)
        whole = quant.fake_quant(padded[rows], fmt, axis=1, **options)
        same_bits(got, whole[:, :20])
        assert not np.asarray(whole[:, 20:]).any()


@pytest.mark.parametrize("fmt", [quant.NVFP4, quant.MXFP4])
def test_square_blocks_do_not_depend_on_the_axis(fmt, rng):
    w = rng.standard_normal((2, 40, 70)).astype(np.float32)
    a = quant.quantize(w, fmt, axis=-1, block_2d=True)
    b = quant.quantize(w, fmt, axis=-2, block_2d=True)
    t = quant.quantize(w.swapaxes(1, 2), fmt, axis=-1, block_2d=True)
    assert a.scales.shape == (2, -(-40 // fmt.block), -(-70 // fmt.block))
    same_bits(a.scales, b.scales)
    same_bits(quant.dequantize(a), quant.dequantize(b))
    same_bits(quant.dequantize(b), quant.dequantize(t).swapaxes(1, 2))
    assert (quant.dequantize(a) != quant.fake_quant(w, fmt, axis=-1)).any()


@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f"{f.name}-{f.rule}")
def test_scaling_by_a_power_of_two_commutes(fmt, rng):
    x = rng.standard_normal((4, 64)).astype(np.float32)
    y = quant.fake_quant(x, fmt, axis=-1)
    for power in (2.0**-20, 2.0**9):
        same_bits(quant.fake_quant(x * np.float32(power), fmt, axis=-1), y * np.float32(power))


@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f"{f.name}-{f.rule}")
@pytest.mark.parametrize("stochastic", [False, True])
def test_what_is_not_finite_stays_not_finite(fmt, stochastic, rng, getkey):
    x = rng.standard_normal((5, 64)).astype(np.float32)
    clean = x.copy()
    x[1:4, 5] = [np.nan, np.inf, -np.inf]
    clean[1:4, 5] = 0
    options = {"rounding": "stochastic", "key": getkey()} if stochastic else {}
    y = quant.dequantize(quant.quantize(x, fmt, axis=-1, **options))
    same_bits(y, quant.fake_quant(x, fmt, axis=-1, **options))
    width = fmt.block or 1
    start = 5 - 5 % width
    hit = np.zeros(x.shape, bool)
    hit[1:4, start : start + width] = True
    np.testing.assert_array_equal(np.isnan(y), hit)
    expected = quant.fake_quant(clean, fmt, axis=-1, **options)
    np.testing.assert_array_equal(np.asarray(y)[~hit], np.asarray(expected)[~hit])


@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f"{f.name}-{f.rule}")
def test_extreme_magnitudes_are_finite(fmt):
    for top in (1e38, 1e-30, 1e-37, 1.2e-38):
        x = np.float32(top) * np.linspace(-1, 1, 32, dtype=np.float32)
        y = np.asarray(quant.fake_quant(x, fmt, axis=0))
        assert np.isfinite(y).all() and (np.abs(y) <= np.float32(1.34 * top)).all()
    assert not np.asarray(quant.fake_quant(np.zeros((2, 32), np.float32), fmt, axis=0)).any()


@pytest.mark.parametrize("fmt", [quant.NVFP4, quant.MXFP4, quant.FP8], ids=lambda f: f.name)
@pytest.mark.parametrize("shape,axis", [((0,), 0), ((0, 16), 1), ((3, 0), 1), ((3, 0), 0)])
def test_empty_arrays(fmt, shape, axis):
    q = quant.quantize(jnp.zeros(shape), fmt, axis=axis)
    assert q.shape == shape and quant.dequantize(q).shape == shape
    assert quant.fake_quant(jnp.zeros(shape), fmt, axis=axis).shape == shape


def test_bytes_are_honest():
    x = jnp.ones((64, 128), jnp.bfloat16)
    n = 64 * 128
    size = {fmt.name: quant.quantize(x, fmt, axis=-1).nbytes for fmt in ALL}
    assert size == {
        "nvfp4": n // 2 + n // 16 + 4,
        "mxfp4": n // 2 + n // 32,
        "mxfp8": n + n // 32,
        "fp8": n + 4,
    }
    q = quant.quantize(x, quant.NVFP4, axis=0, block_2d=True)
    assert q.nbytes == n // 2 + n // 256 + 4
    assert sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(q)) == q.nbytes
    assert quant.quantize(x[:, :5], quant.MXFP4, axis=1).nbytes == 64 * (3 + 1)


def test_gradient_is_straight_through(rng):
    x = jnp.asarray(rng.standard_normal((4, 40)), jnp.bfloat16)
    c = jnp.asarray(rng.standard_normal((4, 40)), jnp.bfloat16)
    grad = jax.jit(jax.grad(lambda x: (c * quant.fake_quant(x, quant.NVFP4, axis=1)).sum()))(x)
    same_bits(grad, c)
    key = jax.random.key(0)
    f = lambda x: quant.fake_quant(x, quant.NVFP4, axis=1, rounding="stochastic", key=key)  # noqa: E731
    value, tangent = jax.jvp(f, (x,), (c,))
    same_bits((value, tangent), (f(x), c))
    through = jax.grad(lambda x: quant.dequantize(quant.quantize(x, quant.NVFP4, axis=1)).sum())
    assert not np.asarray(through(x).astype(jnp.float32)).any()


def test_vmap_scan_and_indexing(rng):
    x = jnp.asarray(rng.standard_normal((3, 4, 40)).astype(np.float32))
    each = [quant.quantize(row, quant.NVFP4, axis=0) for row in x]
    stacked = jax.vmap(lambda row: quant.quantize(row, quant.NVFP4, axis=0))(x)
    assert stacked.shape == x.shape and stacked.tensor_scale.shape == (3,)
    for i, one in enumerate(each):
        same_bits(jax.tree.map(lambda leaf: leaf[i], stacked), one)  # noqa: B023
    values = jnp.stack([quant.dequantize(one) for one in each])
    same_bits(quant.dequantize(stacked), values)
    same_bits(jax.lax.scan(lambda c, q: (c, quant.dequantize(q)), 0, stacked)[1], values)


def test_no_recompilation():
    f = jax.jit(lambda x, fmt: quant.quantize(x, fmt, axis=0), static_argnums=1)
    for _ in range(2):
        f(jnp.ones((32, 2)), dataclasses.replace(quant.NVFP4))
    assert f._cache_size() == 1


X = jnp.ones((4, 32))
SR = {"rounding": "stochastic", "key": jax.random.key(0)}


@pytest.mark.parametrize(
    "x,fmt,options,error,message",
    [
        (X, "nvfp4", {}, TypeError, "fmt must be a quant.Format such as quant.NVFP4, not str"),
        (X.astype(jnp.int32), quant.NVFP4, {}, TypeError, "dtype int32.*cast it first"),
        (jnp.ones(()), quant.NVFP4, {}, ValueError, "scalar"),
        (X, quant.NVFP4, {"axis": 2}, ValueError, r"axis 2 is out of range for x of shape \(4, 32"),
        (X, quant.NVFP4, {"axis": -3}, ValueError, "axis -3 is out of range"),
        (X, quant.NVFP4, {"rounding": "up"}, ValueError, "not 'up'"),
        (X, quant.NVFP4, {"rounding": "stochastic"}, ValueError, "needs a key, see quant.fold_key"),
        (X, quant.NVFP4, {"key": jax.random.key(0)}, ValueError, "rounding is 'nearest'"),
        (X, quant.NVFP4, {**SR, "sr_headroom": 0.5}, ValueError, "1 or more, not 0.5"),
        (X, quant.NVFP4, {**SR, "sr_headroom": np.inf}, ValueError, "1 or more, not inf"),
        (X[None], quant.NVFP4, {"axis": 0, "block_2d": True}, ValueError, "last two axes; axis 0"),
        (X[0], quant.NVFP4, {"axis": 0, "block_2d": True}, ValueError, "two axes"),
        (X, quant.FP8, {"block_2d": True}, ValueError, "fp8 has no blocks"),
    ],
)
def test_bad_arguments_say_why(x, fmt, options, error, message):
    for function in (quant.quantize, quant.fake_quant):
        with pytest.raises(error, match=message):
            function(x, fmt, **{"axis": -1, **options})


def test_dequantize_wants_a_qarray():
    with pytest.raises(TypeError, match="expected a quant.QArray, not ndarray"):
        quant.dequantize(np.ones(4))
