"""The hardware's block-scaled product, in JAX's own emulation, against this package's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quant
from quant.native import pack, paths, scaled_product

DIMS = (((1,), (0,)), ((), ()))
KEY = jax.random.key(3)
MXFP8 = quant.Recipe("mxfp8", *[quant.Operand(quant.MXFP8)] * 6)


def both(recipe, x, w, d):
    def run(implementation):
        f = quant.dot_general(recipe, key=KEY, implementation=implementation)

        @jax.jit
        def products(x, w, d):
            y, pull = jax.vjp(lambda x, w: f(x, w, DIMS), x, w)
            return y, *pull(d)

        return products(x, w, d)

    return zip(run("native"), run("emulated"), strict=True)


@pytest.mark.parametrize("recipe", ["nvidia", "mean", "metis", MXFP8], ids=str)
def test_the_two_paths_agree(recipe, rng):
    """Square blocks, Hadamard, means, factors, and sizes that are no multiple of a block."""
    x, w, d = (np.float32(rng.standard_normal(s)) for s in ((100, 72), (72, 88), (100, 88)))
    # Alone, factors are not rounded to bfloat16 a second time as columns of the large product.
    tolerance = 5e-3 if recipe == "metis" else 1e-6
    for native, emulated in both(recipe, x + np.float32(1), w, d):
        np.testing.assert_allclose(
            native, emulated, rtol=0, atol=tolerance * np.abs(emulated).max()
        )


def test_nan_goes_through(rng):
    x, w, d = (np.float32(rng.standard_normal(s)) for s in ((96, 64), (64, 48), (96, 48)))
    x[7, 5] = np.nan
    (y, _), _, (dw, _) = both("nvidia", x, w, d)
    assert np.isnan(y[7]).all() and np.isnan(dw[5]).all() and np.isfinite(y[8:]).all()


@pytest.mark.parametrize(
    "fmt,square", [(quant.NVFP4, False), (quant.NVFP4, True), (quant.MXFP8, False)]
)
def test_packed_operands(fmt, square, rng):
    a, b = (np.float32(rng.standard_normal(s)) for s in ((40, 50), (24, 50)))
    qa, qb = (quant.quantize(t, fmt, axis=1, block_2d=square) for t in (a, b))
    pa, pb = pack(qa), pack(qb)
    blocks = -(-50 // fmt.block)
    assert pa.elements.shape == (40, blocks * fmt.block) and pa.scales.shape == (40, blocks)
    assert pa.elements.dtype == fmt.element.dtype and pa.scales.dtype == fmt.scale_dtype
    got = np.asarray(scaled_product(pa, pb), np.float64)
    for q in (qa, qb):
        got = got * (1.0 if q.tensor_scale is None else float(q.tensor_scale))
    want = np.asarray(quant.dequantize(qa), float) @ np.asarray(quant.dequantize(qb), float).T
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_paths():
    assert paths(quant.get_recipe("nvidia")) == dict.fromkeys(
        ["fprop", "dgrad", "wgrad"], "emulated"
    )
    native = quant.dot_general("nvidia", key=KEY, implementation="native").paths
    assert native == dict.fromkeys(["fprop", "dgrad", "wgrad"], "native")
    for name in ("mxfp4", "fp8"):  # no unit takes these
        assert set(paths(quant.get_recipe(name), "native").values()) == {"emulated"}
    nvfp4 = quant.Operand(quant.NVFP4)
    mixed = quant.Recipe("m", nvfp4, nvfp4, nvfp4, None, nvfp4, quant.Operand(quant.MXFP8))
    assert paths(mixed, "native") == {"fprop": "native", "dgrad": "emulated", "wgrad": "emulated"}
    half = dataclasses.replace(mixed, fprop_x=None, fprop_w=None)
    assert paths(half, "native")["fprop"] == "high"


def test_a_device_with_units_is_found(monkeypatch):
    from quant import native

    for backend, capability, found in (
        ("gpu", "10.0", True),
        ("gpu", "12.0", True),
        ("gpu", "9.0", False),
        ("gpu", "gfx942", False),
        ("cpu", "10.0", False),
    ):
        device = type("Device", (), {"compute_capability": capability})
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        native._has_units.cache_clear()
        assert native._has_units() is found
    native._has_units.cache_clear()


def test_hardware_runs_the_native_product():
    """On the emulating CPU, what is lowered is JAX's scaled product and no dot of this package."""
    spec = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
    f = quant.dot_general("nvidia", key=KEY, implementation="native")
    assert "scaled_matmul" in str(jax.make_jaxpr(lambda x, w: f(x, w, DIMS))(spec, spec))
    f = quant.dot_general("nvidia", key=KEY)
    assert "scaled_matmul" not in str(jax.make_jaxpr(lambda x, w: f(x, w, DIMS))(spec, spec))
