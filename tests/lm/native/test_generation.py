"""Text is generated with the products in C where the weights lie whole on one CPU."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm
from lm import generate, model, native
from lm.config import ModelConfig
from lm.layers.stack import unstack

CONFIG = ModelConfig(vocab_size=48, num_layers=2, d_model=32, num_heads=4, d_ff=48, dtype="float32")
GREEDY = generate.Sampling(temperature=0)


def sharpened(config, factor):
    """Parameters whose logits are far enough apart that rounding does not decide."""
    params = jax.jit(lm.init, static_argnums=0)(config, jax.random.key(0))
    return jax.tree.map(lambda p: np.asarray(p) * factor, params)


def tokens(config, params, prompts, **arguments):
    return np.stack(list(generate.generate(config, params, prompts, **arguments)), axis=1)


@pytest.fixture
def traced_anew():
    """Programs of other tests are not used here, nor those of this one elsewhere."""
    clear = lambda: (generate._prefill.clear_cache(), generate._next.clear_cache())  # noqa: E731
    clear()
    yield clear
    clear()


def native_products(program) -> int:
    """Native products of matrices; those of attention are of stacks of matrices."""
    calls = re.findall(r"ffi_call\[.*?target_name=\w+", str(program), re.S)
    native = [call for call in calls if "=aniso_rows" in call]
    return sum("input_layouts=((1, 0), (1, 0))" in call for call in native)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(
    "prepared, rows, expected", [(True, 1, 15), (True, 32, 15), (True, 33, 0), (False, 1, 0)]
)
def test_few_rows_of_whole_weights_take_the_native_products(
    compiled, traced_anew, prepared, rows, expected, tie
):
    """Seven matrices in each of the two layers and the head; stacks may lie on several devices."""
    config = dataclasses.replace(CONFIG, tie_embeddings=tie)
    params, cache = sharpened(config, 3), model.init_cache(config, rows, 16)
    if prepared:
        params, cache = generate.prepare(config, params), unstack(cache)
    program = jax.make_jaxpr(generate._next, static_argnums=(0, 1))(
        *(config, GREEDY, params, jnp.zeros((rows, 48)), cache, np.int32(4)),
        *(jnp.zeros(rows, jnp.int32), jax.random.key(0)),
    )
    assert native_products(program) == expected


@pytest.mark.parametrize(
    "changes, lengths",
    [
        (dict(), (19,)),
        (dict(num_kv_heads=2, qk_norm=True, tie_embeddings=True, head_dim=16), (3, 19)),
    ],
)
def test_greedy_tokens_are_the_same_with_and_without_the_native_products(
    rng, compiled, traced_anew, monkeypatch, changes, lengths
):
    config = dataclasses.replace(CONFIG, **changes)
    params = sharpened(config, 2)
    prompts = [rng.integers(0, 48, n).tolist() for n in lengths]
    arguments = dict(max_tokens=8, sampling=GREEDY)
    calls, few_rows = [], native.few_rows

    def counted(*args, **kwargs):
        calls.append(args)
        return few_rows(*args, **kwargs)

    monkeypatch.setattr(native, "few_rows", counted)
    wanted = tokens(config, params, prompts, **arguments)
    assert calls
    calls.clear()
    traced_anew()
    monkeypatch.setenv("ANISO_NATIVE", "0")
    np.testing.assert_array_equal(tokens(config, params, prompts, **arguments), wanted)
    assert not calls


def test_weights_on_several_devices_take_no_native_products(compiled, traced_anew, monkeypatch):
    params = sharpened(CONFIG, 3)
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("devices",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    several = jax.device_put(params, whole)
    arguments = dict(max_tokens=3, sampling=GREEDY)
    wanted = tokens(CONFIG, params, [[1, 2, 3]], **arguments)
    monkeypatch.setattr(native, "few_rows", None)  # would be called in vain
    got = tokens(CONFIG, several, [[1, 2, 3]], **arguments)
    np.testing.assert_array_equal(got, wanted)
