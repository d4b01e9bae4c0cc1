"""Quantization of a sharded array: the same bits, and no communication that it can do without."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import quant

COLLECTIVE = re.compile(
    r"= .*? (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


@pytest.fixture
def mesh():
    return jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def parts(x, fmt, rounding, square):
    key = jax.random.key(7) if rounding == "stochastic" else None
    q = quant.quantize(x, fmt, axis=-1, rounding=rounding, key=key, block_2d=square)
    fake = quant.fake_quant(x, fmt, axis=-1, rounding=rounding, key=key, block_2d=square)
    return q.codes, q.scales, q.tensor_scale, fake


@pytest.mark.parametrize("fmt", [quant.NVFP4, quant.MXFP4, quant.FP8], ids=lambda f: f.name)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("spec", [P("data", None), P(None, "tensor"), P("data", "tensor")], ids=str)
def test_sharded_equals_unsharded(mesh, fmt, rounding, spec, rng):
    x = rng.standard_normal((128, 256)).astype(np.float32)
    square = fmt.block is not None and rounding == "nearest"
    f = jax.jit(parts, static_argnums=(1, 2, 3))
    expected = f(jnp.asarray(x), fmt, rounding, square)
    sharded = jax.device_put(x, NamedSharding(mesh, spec))
    got = f(sharded, fmt, rounding, square)
    assert got[3].sharding.is_equivalent_to(sharded.sharding, 2)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(
            np.asarray(a).view(f"u{a.dtype.itemsize}"), np.asarray(b).view(f"u{b.dtype.itemsize}")
        )


@pytest.mark.parametrize(
    "fmt,found", [(quant.NVFP4, ["all-reduce"]), (quant.MXFP4, []), (quant.FP8, ["all-reduce"])]
)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("spec", [P("data", None), P(("data", "tensor"), None)], ids=str)
def test_the_tensor_scale_is_the_only_communication(mesh, fmt, found, rounding, spec):
    sharding = NamedSharding(mesh, spec)
    x = jax.ShapeDtypeStruct((128, 256), jnp.float32, sharding=sharding)

    def f(x):
        key = jax.random.key(7) if rounding == "stochastic" else None
        q = quant.quantize(x, fmt, axis=-1, rounding=rounding, key=key)
        return q, quant.dequantize(q)

    text = jax.jit(f).lower(x).compile().as_text()
    assert COLLECTIVE.findall(text) == found


def test_the_check_finds_communication(mesh):
    x = jax.ShapeDtypeStruct((128, 256), jnp.float32, sharding=NamedSharding(mesh, P("data", None)))
    text = jax.jit(lambda x: x.sum(0)).lower(x).compile().as_text()
    assert COLLECTIVE.findall(text) == ["all-reduce"]
