"""Grouped products against a loop over rows in float64, and their FLOPs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import _tiled
from moe.grouped_matmul import IMPLEMENTATIONS, grouped_matmul, grouped_outer

RUNNABLE = ("reference", "xla", "tiled")
K, N = 10, 6

# Group sizes, and rows beyond the groups; most of one shape, so that one program serves them.
CASES = {
    "awkward": ([3, 0, 71, 1, 130], 0),
    "one hot": ([0, 0, 205, 0, 0], 0),
    "all empty": ([0, 0, 0, 0, 0], 205),
    "rows beyond": ([4, 9, 66, 0, 2], 124),
    "no rows": ([0, 0], 0),
    "single": ([1], 0),
    "tile edges": ([64, 128, 63, 65], 0),
    "crowded end": ([201, 1, 1, 1, 1], 0),
}


def by_row(lhs, rhs, sizes):
    out = np.zeros((lhs.shape[0], rhs.shape[2]))
    expert = np.repeat(np.arange(len(sizes)), sizes)
    for row, e in enumerate(expert):
        out[row] = lhs[row] @ rhs[e]
    return out


def outer_by_row(lhs, grad, sizes):
    out = np.zeros((len(sizes), lhs.shape[1], grad.shape[1]))
    for row, e in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        out[e] += np.outer(lhs[row], grad[row])
    return out


def operands(rng, case):
    sizes, beyond = CASES[case]
    rows = sum(sizes) + beyond
    lhs, grad = rng.normal(size=(rows, K)), rng.normal(size=(rows, N))
    return lhs, rng.normal(size=(len(sizes), K, N)), grad, np.array(sizes)


def f32(*arrays):
    return tuple(jnp.asarray(a, jnp.int32 if a.dtype == int else jnp.float32) for a in arrays)


@functools.cache
def program(implementation):
    def run(x, w, g, s):
        out, vjp = jax.vjp(
            lambda x, w: grouped_matmul(x, w, s, implementation=implementation), x, w
        )
        return out, *vjp(g), grouped_outer(x, g, s, implementation=implementation)

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize(
    "implementation,case",
    [("tiled", case) for case in CASES]
    + [(name, case) for name in ("reference", "xla") for case in ("rows beyond", "no rows")],
)
def test_product_and_gradients_equal_a_loop_over_rows(implementation, case, rng):
    lhs, rhs, grad, sizes = operands(rng, case)
    out, dx, dw, outer = program(implementation)(*f32(lhs, rhs, grad, sizes))
    inside = (np.arange(len(lhs)) < sizes.sum())[:, None]
    expected = outer_by_row(lhs * inside, grad * inside, sizes)
    for got, want in (
        (out, by_row(lhs, rhs, sizes)),
        (dx, by_row(grad, rhs.swapaxes(1, 2), sizes)),
        (dw, expected),
        (outer, expected),
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    assert not out[sizes.sum() :].any() and not dx[sizes.sum() :].any()


@pytest.mark.parametrize("implementation", ("reference", "tiled"))
def test_infinite_rows_stay_in_their_group(implementation, rng):
    lhs, rhs, grad, sizes = operands(rng, "rows beyond")
    end = sizes[0]
    lhs[end:], grad[end:] = np.inf, np.nan
    x, w, g, s = f32(lhs, rhs, grad, sizes)
    out = grouped_matmul(x, w, s, implementation=implementation)
    outer = grouped_outer(x, g, s, implementation=implementation)
    assert jnp.isfinite(out[:end]).all() and jnp.isfinite(outer[0]).all()
    assert not out[sizes.sum() :].any()


@pytest.mark.parametrize("implementation", RUNNABLE)
def test_bf16_accumulates_in_f32_and_keeps_f32_weight_gradients(implementation, rng):
    sizes = np.array([300, 212])
    lhs, grad = (jnp.asarray(rng.normal(size=(512, n)), jnp.bfloat16) for n in (64, 32))
    rhs = jnp.asarray(rng.normal(size=(2, 64, 32)), jnp.float32)
    s = jnp.asarray(sizes, jnp.int32)
    out, vjp = jax.vjp(
        lambda x, w: grouped_matmul(x, w, s, implementation=implementation), lhs, rhs
    )
    dx, dw = vjp(grad)
    assert (out.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    exact = by_row(np.asarray(lhs, float), np.asarray(rhs.astype(jnp.bfloat16), float), sizes)
    np.testing.assert_allclose(np.asarray(out, float), exact, rtol=2**-7, atol=0.05)
    exact = outer_by_row(np.asarray(lhs, float), np.asarray(grad, float), sizes)
    # Rounded to bf16 the error would be about 2^-9 of values near 30.
    np.testing.assert_allclose(dw, exact, rtol=1e-5, atol=1e-4)


def spied_loops(monkeypatch):
    """Loops of moe._tiled unrolled while tracing: the program holds what would run, once each.

    XLA's cost analysis counts the body of a loop once, however often it runs.
    """

    class Lax:
        def __getattr__(self, name):
            return getattr(jax.lax, name)

        def fori_loop(self, low, high, body, carry):
            for i in range(int(low), int(high)):
                carry = body(i, carry)
            return carry

        def switch(self, index, branches, *operands):
            return branches[int(index)](*operands)

    monkeypatch.setattr(_tiled, "lax", Lax())


def executed_flops(function, *shapes):
    def traced(*args):
        with jax.ensure_compile_time_eval():  # sizes and offsets are known, operands are not
            return function(*args)

    return jax.jit(traced).lower(*shapes).cost_analysis()["flops"]  # compiling adds none


@pytest.mark.parametrize("experts", [8, 64])
def test_flops_are_ideal_up_to_padding(experts, rng, monkeypatch):
    rows, k, n = experts * 100, 96, 80
    share = rng.dirichlet(np.full(experts, 4.0))
    sizes = jnp.asarray(rng.multinomial(rows, share), jnp.int32)
    lhs, grad = (jax.ShapeDtypeStruct((rows, width), jnp.float32) for width in (k, n))
    rhs = jax.ShapeDtypeStruct((experts, k, n), jnp.float32)
    ideal = 2 * rows * k * n
    looped = jax.jit(_tiled.matmul).lower(lhs, rhs, sizes).cost_analysis()["flops"]
    assert looped < ideal  # the reason for unrolling
    spied_loops(monkeypatch)
    programs = {
        "forward": (lambda x, w: _tiled.matmul(x, w, sizes), (lhs, rhs)),
        "dlhs": (lambda g, w: _tiled.matmul(g, w, sizes, transpose=True), (grad, rhs)),
        "drhs": (lambda x, g: _tiled.outer(x, g, sizes), (lhs, grad)),
    }
    for name, (function, shapes) in programs.items():
        ratio = executed_flops(function, *shapes) / ideal
        assert 1.0 <= ratio < 1.3, f"{name}: {ratio:.2f} of the ideal FLOPs"


def test_ragged_dot_is_dense_on_cpu():
    # When this fails, "xla" has become good enough to be the default here.
    lhs, rhs = jnp.zeros((256, 16)), jnp.zeros((8, 16, 16))
    run = jax.jit(lambda x, w, s: grouped_matmul(x, w, s, implementation="xla"))
    flops = run.lower(lhs, rhs, jnp.zeros(8, jnp.int32)).compile().cost_analysis()["flops"]
    assert flops > 6 * 2 * 256 * 16 * 16


def test_one_program_for_all_sizes(rng):
    lhs, rhs, _, _ = operands(rng, "awkward")
    x, w = f32(lhs, rhs)
    run = jax.jit(grouped_matmul)
    for sizes in ([205, 0, 0, 0, 0], [1, 1, 1, 1, 1], [41, 41, 41, 41, 41]):
        out = run(x, w, jnp.array(sizes, jnp.int32))
        np.testing.assert_allclose(out, by_row(lhs, rhs, sizes), rtol=1e-5, atol=1e-4)
    assert run._cache_size() == 1


def test_default_on_cpu_is_tiled(rng, monkeypatch):
    x, w, _, s = f32(*operands(rng, "awkward"))
    seen = []
    row = IMPLEMENTATIONS["tiled"]
    spied = row._replace(matmul=lambda *a: seen.append("tiled") or row.matmul(*a))
    monkeypatch.setitem(IMPLEMENTATIONS, "tiled", spied)
    grouped_matmul(x, w, s)
    assert seen == ["tiled"]


def test_named_kernel_runs_or_raises(rng):
    x, w, _, s = f32(*operands(rng, "awkward"))
    with pytest.raises(NotImplementedError, match="tokamax"):
        grouped_matmul(x, w, s, implementation="tokamax")
    with pytest.raises(ValueError, match="unknown implementation.*'cuda'"):
        grouped_matmul(x, w, s, implementation="cuda")


def test_tokamax_is_called_with_its_dimension_numbers(rng, monkeypatch):
    """Through a stand-in with the library's signature; the kernels need a GPU."""
    import sys
    import types

    def general(lhs, rhs, sizes, numbers, *, preferred_element_type, implementation):
        assert implementation == ("mosaic", "triton")
        out = jax.lax.ragged_dot_general(
            lhs, rhs, sizes, numbers, preferred_element_type=preferred_element_type
        )
        if numbers.rhs_group_dimensions:  # leaves the rest as it was
            return jnp.where((jnp.arange(len(lhs)) < sizes.sum())[:, None], out, jnp.nan)
        return out

    module = types.ModuleType("tokamax")
    module.ragged_dot_general = general
    module.__spec__ = object()
    monkeypatch.setitem(sys.modules, "tokamax", module)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    lhs, rhs, grad, sizes = operands(rng, "rows beyond")
    x, w, g, s = f32(lhs, rhs, grad, sizes)
    out, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, s, implementation="tokamax"), x, w)
    dx, dw = vjp(g)
    inside = (np.arange(len(lhs)) < sizes.sum())[:, None]
    np.testing.assert_allclose(out, by_row(lhs, rhs, sizes), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(dx, by_row(grad, rhs.swapaxes(1, 2), sizes), rtol=1e-5, atol=1e-4)
    expected = outer_by_row(lhs * inside, grad * inside, sizes)
    np.testing.assert_allclose(dw, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "shapes,message",
    [
        (((4, 3), (2, 5, 6), (2,)), r"lhs must be \[rows, 5\]"),
        (((4, 3), (3, 6), (2,)), r"rhs must be \[E, K, N\]"),
        (((4, 3), (2, 3, 6), (3,)), r"shape \(2,\)"),
    ],
)
def test_bad_shapes(shapes, message):
    lhs, rhs, sizes = shapes
    with pytest.raises(ValueError, match=message):
        grouped_matmul(jnp.zeros(lhs), jnp.zeros(rhs), jnp.zeros(sizes, jnp.int32))


def test_bad_dtypes_and_rows():
    with pytest.raises(ValueError, match="whole numbers"):
        grouped_matmul(jnp.zeros((4, 3)), jnp.zeros((2, 3, 6)), jnp.zeros(2))
    with pytest.raises(ValueError, match="the 4 rows of lhs"):
        grouped_outer(jnp.zeros((4, 3)), jnp.zeros((5, 3)), jnp.zeros(2, jnp.int32))
