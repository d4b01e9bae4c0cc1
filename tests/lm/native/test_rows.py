"""Products of a few rows in C, for this processor and for lesser ones, against NumPy's float64."""

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import native

# Rows of a group and the padded ones, depths of whole and half pairs, columns of whole and half
# vectors, and several tiles.
SHAPES = [
    (1, 1, 1), (1, 64, 1100), (1, 17, 33), (2, 2, 15), (2, 100, 32), (3, 7, 31), (3, 31, 100),
    (4, 16, 16), (4, 33, 513), (5, 31, 33), (5, 100, 1100), (8, 64, 64), (8, 1, 100), (9, 17, 513),
    (9, 2, 32), (16, 100, 33), (16, 7, 1100), (17, 31, 31), (17, 64, 1), (32, 100, 100),
    (32, 17, 1100), (32, 63, 15),
]  # fmt: skip
OTHERS = SHAPES[1:4] + SHAPES[5:9] + SHAPES[13:17] + SHAPES[20:]
DTYPES = [jnp.float32, jnp.bfloat16]


def ffi(name, x, w, shape, dtype):
    result = jax.ShapeDtypeStruct(shape, dtype)
    return jax.block_until_ready(jax.ffi.ffi_call(name, result)(x, w))


def multiply(name, x, w, transposed, dtype=None):
    if name == "native":
        return native.few_rows(x, w, transposed=transposed, dtype=dtype)
    target = f"aniso_rows{'_t' if transposed else ''}_{name}"
    return ffi(target, x, w, (*x.shape[:-1], w.shape[-2 if transposed else -1]), dtype or x.dtype)


def draw(rng, rows, depth, columns, transposed, dtype, lead=()):
    shape = (columns, depth) if transposed else (depth, columns)
    return [jnp.asarray(rng.normal(size=(*lead, *s)), dtype) for s in ((rows, depth), shape)]


def reference(x, w, transposed):
    """The product and the sum of the sizes of what is added up, in float64."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    w = w.swapaxes(-1, -2) if transposed else w
    with np.errstate(invalid="ignore"):
        return tuple(np.einsum("...rd,...df->...rf", *pair) for pair in ((x, w), (abs(x), abs(w))))


def compare(y, x, w, transposed):
    wanted, size = reference(x, w, transposed)
    assert y.shape == wanted.shape
    got = np.asarray(y, np.float64)
    special = ~np.isfinite(wanted)
    np.testing.assert_array_equal(got[special], wanted[special])
    got, wanted, size = got[~special], wanted[~special], size[~special]
    # As many roundings of float32 as there are products and sums, in whatever order.
    allowed = (x.shape[-1] + 1) * 2.0**-24 * size
    if y.dtype == jnp.bfloat16:
        allowed += 2.0**-8 * (np.abs(wanted) + allowed)
    np.testing.assert_array_less(np.abs(got - wanted), allowed + 1e-30)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_to_float64(rng, built, dtype, transposed):
    name, _ = built
    for rows, depth, columns in SHAPES if name == "native" else OTHERS:
        x, w = draw(rng, rows, depth, columns, transposed, dtype)
        for result in DTYPES:
            y = multiply(name, x, w, transposed, result)
            assert y.dtype == result
            compare(y, x, w, transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_leading_axes_are_products_of_their_own(rng, built, dtype, transposed):
    for lead, *sizes in [
        ((1,), 1, 17, 33),
        ((3,), 5, 31, 1100),
        ((2, 3), 3, 64, 40),
        ((7, 1), 2, 5, 9),
    ]:
        x, w = draw(rng, *sizes, transposed, dtype, tuple(lead))
        for result in DTYPES:
            compare(multiply(built[0], x, w, transposed, result), x, w, transposed)
    # What is no number stays in its own product.
    x, w = draw(rng, 3, 17, 40, transposed, dtype, (3,))
    x, w = x.at[1, 2, 16].set(jnp.nan), w.at[0, 0, 0].set(jnp.inf)
    y = multiply(built[0], x, w, transposed)
    assert np.isfinite(np.asarray(y, np.float32)).sum() == y.size - 3 - 40
    compare(y, x, w, transposed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_has_the_dtype_of_x_unless_told(rng, compiled, dtype):
    x, w = draw(rng, 2, 4, 8, False, dtype)
    assert native.few_rows(x, w).dtype == dtype


@pytest.mark.parametrize("transposed", [False, True])
def test_bfloat16_is_rounded_to_nearest_even_once(built, transposed):
    """At depth 1 and w = 1 the result is x, rounded."""
    ties = [0x3F808000, 0x3F818000, 0xBF808000, 0x3F807FFF, 0x3F808001, 0x3FFFFFFF, 0x3FFF8000]
    ends = [0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F7FFF, 0x7F800000, 0xFF800000, 0x00800000, 0]
    not_numbers = [0x7F800001, 0x7FC00000, 0xFFFFFFFF, 0x7FFFFFFF]
    values = np.asarray([*ties, *ends, *not_numbers], np.uint32).view(np.float32)
    one = jnp.ones((33, 1) if transposed else (1, 33))
    y = multiply(built[0], jnp.asarray(values[:, None]), one, transposed, jnp.bfloat16)
    with np.errstate(invalid="ignore", over="ignore"):
        wanted = values.astype(jnp.bfloat16).astype(np.float32)
    assert np.isnan(wanted).sum() == 4 and np.isinf(wanted).sum() == 4
    got = np.asarray(y, np.float32)
    np.testing.assert_array_equal(got, np.broadcast_to(wanted[:, None], got.shape))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, depth, columns", [(3, 17, 40), (5, 67, 33), (9, 32, 70)])
def test_infinities_and_nan_stay_where_they_belong(
    rng, built, rows, depth, columns, dtype, transposed
):
    """Neither the padding, nor the halves of a pair, nor neighbours see what is not theirs."""
    clean = draw(rng, rows, depth, columns, transposed, jnp.float32)
    at = lambda d, f: (f, d) if transposed else (d, f)  # noqa: E731
    for d in (0, 1, depth - 2, depth - 1):
        for f in (0, 15, 32, columns - 1):
            x, w = map(np.array, clean)
            w[at(d, f)] = np.inf
            x[1, d] = 0  # its product with the infinity is NaN, in this row alone
            x[2, d] = -1
            x, w = jnp.asarray(x, dtype), jnp.asarray(w, dtype)
            wanted, _ = reference(x, w, transposed)
            assert np.isnan(wanted[1, f]) and np.isfinite(wanted).sum() == rows * (columns - 1)
            compare(multiply(built[0], x, w, transposed), x, w, transposed)
            x, w = map(np.array, clean)
            w[at(d, f)], x[rows - 1, d] = np.nan, np.inf
            x[0, depth - 1 - d] = np.nan
            x, w = jnp.asarray(x, dtype), jnp.asarray(w, dtype)
            compare(multiply(built[0], x, w, transposed), x, w, transposed)


@pytest.mark.parametrize("transposed", [False, True])
def test_many_threads_get_what_one_gets(rng, compiled, transposed):
    pairs = [draw(rng, 8, 64, 1100, transposed, jnp.float32) for _ in range(4)]
    run = jax.jit(lambda x, w: native.few_rows(x, w, transposed=transposed))
    wanted = [np.asarray(run(*pair)) for pair in pairs]
    compare(wanted[0], *pairs[0], transposed)
    assert not np.array_equal(wanted[0], wanted[1])

    def many(i):
        return [np.asarray(run(*pairs[i])) for _ in range(20)]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for expected, results in zip(wanted, pool.map(many, range(4)), strict=True):
            for result in results:
                np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_vmap(rng, compiled, transposed):
    pairs = [draw(rng, 3, 17, 40, transposed, jnp.float32) for _ in range(3)]
    xs, ws = (jnp.stack(arrays) for arrays in zip(*pairs, strict=True))
    run = lambda x, w: native.few_rows(x, w, transposed=transposed)  # noqa: E731
    each, shared = jax.vmap(run)(xs, ws), jax.jit(jax.vmap(run, (0, None)))(xs, ws[1])
    assert each.shape == shared.shape == (3, 3, 40)
    for i in range(3):
        compare(each[i], xs[i], ws[i], transposed)
        compare(shared[i], xs[i], ws[1], transposed)


@pytest.mark.parametrize(
    "x, w, y, message",
    [
        (((2, 4), "f4"), ((4, 8), "f4"), ((2, 9), "f4"), "shapes"),
        (((2, 4), "f4"), ((4, 8), "f4"), ((3, 8), "f4"), "shapes"),
        (((2, 4), "f4"), ((5, 8), "f4"), ((2, 8), "f4"), "shapes"),
        (((33, 4), "f4"), ((4, 8), "f4"), ((33, 8), "f4"), "shapes"),
        (((2, 4), "f2"), ((4, 8), "f2"), ((2, 8), "f2"), "float32"),
        (((2, 4), "f4"), ((4, 8), "bfloat16"), ((2, 8), "f4"), "float32"),
        (((2, 4), "f4"), ((4, 8), "f4"), ((2, 8), "f2"), "float32"),
        (((2, 4), "i4"), ((4, 8), "i4"), ((2, 8), "i4"), "float32"),
        (((4,), "f4"), ((4, 8), "f4"), ((2, 8), "f4"), None),
        (((2, 4), "f4"), ((8,), "f4"), ((2, 8), "f4"), None),
        (((2, 4), "f4"), ((4, 8), "f4"), ((16,), "f4"), None),
        (((), "f4"), ((), "f4"), ((), "f4"), None),
        (((2, 3, 4), "f4"), ((3, 4, 8), "f4"), ((2, 3, 8), "f4"), None),
        (((2, 3, 4), "f4"), ((4, 8), "f4"), ((2, 3, 8), "f4"), None),
        (((2, 3, 4), "f4"), ((3, 4, 8), "f4"), ((3, 3, 8), "f4"), "leading axes"),
        (((2, 3, 4), "f4"), ((2, 4, 8), "f4"), ((3, 3, 8), "f4"), "leading axes"),
        (((2, 2, 3, 4), "f4"), ((2, 3, 4, 8), "f4"), ((2, 2, 3, 8), "f4"), "leading axes"),
        (((2, 33, 4), "f4"), ((2, 4, 8), "f4"), ((2, 33, 8), "f4"), "shapes"),
    ],
)
def test_what_does_not_fit_is_an_error_and_no_crash(compiled, x, w, y, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        ffi("aniso_rows", jnp.ones(*x), jnp.ones(*w), *y)
    flipped = (w[0][:-2] + w[0][-2:][::-1], w[1])
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        ffi("aniso_rows_t", jnp.ones(*x), jnp.ones(*flipped), *y)


def test_other_numbers_of_arrays_are_an_error(compiled):
    for operands in ([], [jnp.ones((2, 2))] * 3):
        call = jax.ffi.ffi_call("aniso_rows", jax.ShapeDtypeStruct((2, 2), jnp.float32))
        with pytest.raises(jax.errors.JaxRuntimeError, match="expected x, w and y"):
            jax.block_until_ready(call(*operands))


def test_takes_few_rows(compiled, monkeypatch):
    takes = lambda x, w, *dtypes: native.takes_few_rows(  # noqa: E731
        jnp.ones(x, dtypes[0]), jnp.ones(w, dtypes[-1])
    )
    for dtype in ("float32", "bfloat16"):
        assert takes((1, 4), (4, 8), dtype) and takes((native.MOST_ROWS, 4), (4, 8), dtype)
        assert takes((2, 4), (8, 4), dtype)  # as a transposed one lies
        assert not takes((33, 4), (4, 8), dtype) and not takes((0, 4), (4, 8), dtype)
        assert not takes((2, 4), (4, 0), dtype) and not takes((2, 0), (0, 8), dtype)
    assert takes((2, 3, 2, 4), (2, 3, 4, 8), "float32") and takes((1, 32, 4), (1, 4, 8), "float32")
    assert not takes((2, 33, 4), (2, 4, 8), "float32") and not takes(
        (0, 2, 4), (0, 4, 8), "float32"
    )
    assert native.MOST_ROWS == 32
    assert not takes((2, 4), (4, 8), "float16") and not takes((2, 4), (4, 8), "int32")
    assert not takes((2, 4), (4, 8), "bfloat16", "float32")
    assert not takes((2, 4), (4, 8), "float32", "bfloat16")
    monkeypatch.setenv("ANISO_NATIVE", "0")
    assert native.library() is None
    with pytest.raises(RuntimeError, match="few_rows needs the C code"):
        native.few_rows(jnp.ones((2, 4)), jnp.ones((4, 8)))
    assert not takes((2, 4), (4, 8), "float32")


def test_most_rows_are_taken_and_computed(rng, compiled):
    x, w = draw(rng, native.MOST_ROWS, 5, 40, False, jnp.float32)
    compare(native.few_rows(x, w), x, w, False)
