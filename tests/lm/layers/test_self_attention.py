import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import ModelConfig
from lm.layers import rotary
from lm.layers.parameters import SINGLE
from lm.layers.self_attention import Cache, Rotation, SelfAttention

T = 7


def make(getkey, **changes):
    sizes = dict(vocab_size=64, num_layers=2, d_model=16, num_heads=4, dtype="float32")
    config = ModelConfig(**sizes | changes)
    return config, SelfAttention(getkey(), config, SINGLE)


def rotation(config, positions, segment_ids=None, index=None, padding=None):
    positions = jnp.asarray(positions)
    cos, sin = rotary.cos_sin(positions, config)
    return Rotation(cos, sin, segment_ids, index, padding)


@pytest.mark.parametrize(
    "changes,window,names",
    [
        (dict(), None, {"query", "key", "value", "out"}),
        (dict(num_kv_heads=1), 3, {"query", "key", "value", "out"}),
        (dict(num_kv_heads=2, qk_norm=True), 2, {"query_norm", "key_norm"}),
        (dict(num_kv_heads=2, head_dim=8), 100, set()),
    ],
)
def test_one_token_at_a_time_equals_all_at_once(getkey, rng, changes, window, names):
    config, layer = make(getkey, **changes)
    assert names <= set(vars(layer))
    assert hasattr(layer, "query_norm") == config.qk_norm
    x = jnp.asarray(rng.normal(size=(2, T, 16)), jnp.float32)
    whole, none = layer(x, rotation(config, np.arange(T)[None].repeat(2, 0)), window)
    assert none is None
    shape = (2, config.num_kv_heads, 12, config.head_dim)
    cache = Cache(jnp.full(shape, 1e3), jnp.full(shape, 1e3))  # what is not written is not read
    step = jax.jit(lambda x, r, cache: layer(x, r, window, cache=cache))
    for t in range(T):
        r = rotation(config, [[t], [t]], index=jnp.int32(t))
        y, cache = step(x[:, t : t + 1], r, cache)
        np.testing.assert_allclose(y[:, 0], whole[:, t], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(cache.keys[:, :, T:], 1e3)


def test_padding_on_the_left_is_never_seen(getkey, rng):
    config, layer = make(getkey)
    x = jnp.asarray(rng.normal(size=(1, T, 16)), jnp.float32)
    expected, _ = layer(x, rotation(config, [np.arange(T)]), None)
    junk = jnp.full((1, 3, 16), 50.0)
    positions = [np.maximum(np.arange(T + 3) - 3, 0)]
    r = rotation(config, positions, index=jnp.int32(0), padding=jnp.asarray([3]))
    empty = Cache(*(jnp.zeros((1, 4, T + 3, 4)) for _ in range(2)))
    y, _ = layer(jnp.concatenate([junk, x], axis=1), r, None, cache=empty)
    np.testing.assert_allclose(y[:, 3:], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(y[:, :3], 0)  # padding sees nothing, and is finite


def test_segments_reach_the_attention(getkey, rng):
    config, layer = make(getkey)
    x = jnp.asarray(rng.normal(size=(1, T, 16)), jnp.float32)
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 2]])
    r = rotation(config, rotary.positions_from_segments(segments), segments)
    packed, _ = layer(x, r, None)
    alone, _ = layer(x[:, 3:], rotation(config, [np.arange(4)]), None)
    np.testing.assert_allclose(packed[:, 3:], alone, rtol=1e-4, atol=1e-5)


def test_cache_keeps_its_dtype(getkey, rng):
    config, layer = make(getkey)
    empty = Cache(*(jnp.zeros((1, 4, 4, 4), jnp.bfloat16) for _ in range(2)))
    x = jnp.asarray(rng.normal(size=(1, 1, 16)), jnp.float32)
    y, cache = layer(x, rotation(config, [[0]], index=jnp.int32(0)), None, cache=empty)
    assert cache.keys.dtype == cache.values.dtype == jnp.bfloat16 and y.dtype == jnp.float32
