import math

import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import ModelConfig, RopeScaling
from lm.layers.rotary import cos_sin, inverse_frequencies, positions_from_segments, rotate

# ROPE_INIT_FUNCTIONS of transformers 5.23.0 (modeling_rope_utils) on a LlamaConfig with the same
# values, printed with 7 digits: (head_dim, theta, scaling, inv_freq, attention factor).
GOLDEN = {
    "linear": (
        16,
        1e4,
        RopeScaling(kind="linear", factor=4.0),
        [0.25, 0.07905694, 0.025, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-05],
        1.0,
    ),
    "llama3": (
        16,
        5e5,
        RopeScaling(kind="llama3", factor=8.0, original_context=8192),
        [1.0, 0.1939228, 0.03760603, 0.007292665, 0.000524846, 3.428102e-05, 6.64787e-06,
         1.289173e-06],
        1.0,
    ),
    "yarn": (
        16,
        1e4,
        RopeScaling(kind="yarn", factor=4.0, original_context=4096),
        [1.0, 0.3162278, 0.1, 0.02569351, 0.00625, 0.001383497, 0.00025, 7.905695e-05],
        1.138629436111989,
    ),
    "yarn_qwen": (
        32,
        1e6,
        RopeScaling(kind="yarn", factor=4.0, original_context=32768),
        [1.0, 0.4216965, 0.1778279, 0.07498942, 0.03162278, 0.01333521, 0.004779901, 0.001659962,
         0.00055, 0.0001686786, 4.445699e-05, 1.874736e-05, 7.905694e-06, 3.333804e-06,
         1.405853e-06, 5.928434e-07],
        1.138629436111989,
    ),
}  # fmt: skip


def config(head_dim=16, theta=1e4, scaling=None):
    return ModelConfig(
        d_model=2 * head_dim, num_heads=2, rope_theta=theta, rope_scaling=scaling, vocab_size=64
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_frequencies_equal_those_of_transformers(name):
    head_dim, theta, scaling, expected, factor = GOLDEN[name]
    inv_freq, attention_factor = inverse_frequencies(config(head_dim, theta, scaling))
    np.testing.assert_allclose(inv_freq, expected, rtol=1e-6)
    assert attention_factor == pytest.approx(factor, rel=1e-12)


def test_plain_frequencies():
    inv_freq, factor = inverse_frequencies(config(8, 100.0))
    np.testing.assert_allclose(inv_freq, [1, 100**-0.25, 0.1, 100**-0.75], rtol=1e-6)
    assert factor == 1


def test_llama3_keeps_short_waves_and_stretches_long_ones():
    scaling = RopeScaling(kind="llama3", factor=8.0, original_context=8192)
    plain, _ = inverse_frequencies(config(64, 5e5))
    scaled, _ = inverse_frequencies(config(64, 5e5, scaling))
    wavelength = 2 * math.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    assert short.any() and long.any() and not (short | long).all()
    np.testing.assert_array_equal(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-12)
    between = (scaled / plain)[~short & ~long]
    assert ((between > 1 / 8) & (between < 1)).all()


def test_yarn_by_parts_and_its_attention_factor():
    """arXiv 2309.00071, equations 17 to 22: gamma by rotations over the original context."""
    scaling = RopeScaling(kind="yarn", factor=16.0, original_context=4096)
    plain, _ = inverse_frequencies(config(128))
    scaled, factor = inverse_frequencies(config(128, 1e4, scaling))
    rotations = 4096 * plain / (2 * math.pi)
    # One dimension of slack: the ramp begins and ends at whole dimensions.
    fast, slow = rotations > 32 * plain[0] / plain[1], rotations < plain[1] / plain[0]
    np.testing.assert_array_equal(scaled[fast], plain[fast])
    np.testing.assert_allclose(scaled[slow], plain[slow] / 16, rtol=1e-12)
    assert (np.diff(scaled / plain) <= 0).all()
    assert factor == pytest.approx(0.1 * math.log(16) + 1)
    explicit = RopeScaling(kind="yarn", factor=16.0, original_context=4096, attention_factor=1.0)
    assert inverse_frequencies(config(128, 1e4, explicit))[1] == 1
    halved = RopeScaling(kind="yarn", factor=0.5, original_context=4096)
    assert inverse_frequencies(config(128, 1e4, halved))[1] == 1


def test_the_attention_factor_scales_cos_and_sin():
    scaling = RopeScaling(kind="yarn", factor=16.0, original_context=4096)
    cos, sin = cos_sin(jnp.asarray([[0, 7]]), config(16, 1e4, scaling))
    norm = 0.1 * math.log(16) + 1
    np.testing.assert_allclose(cos**2 + sin**2, np.full((1, 2, 8), norm**2), rtol=1e-6)


def test_rotation_is_a_complex_product(rng):
    """arXiv 2104.09864, section 3.2: the pair (i, i + H/2) turns by position * frequency."""
    shape = config(8)
    x = rng.normal(size=(2, 5, 3, 8))
    positions = np.asarray([[0, 1, 2, 3, 4], [0, 1, 0, 1, 900]])
    inv_freq = 1e4 ** (-np.arange(4) / 4)
    turn = np.exp(1j * positions[..., None, None] * inv_freq)
    turned = (x[..., :4] + 1j * x[..., 4:]) * turn
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    cos, sin = cos_sin(jnp.asarray(positions), shape)
    got = rotate(jnp.asarray(x, jnp.float32), cos, sin)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert rotate(jnp.asarray(x, jnp.bfloat16), cos, sin).dtype == jnp.bfloat16


def test_scores_depend_on_the_distance_only(rng):
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(at, to):
        turned = [rotate(x, *cos_sin(jnp.asarray([[p]]), config(8))) for x, p in ((q, at), (k, to))]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(10, 3) == pytest.approx(score(107, 100), abs=1e-4)
    assert abs(score(10, 3) - score(10, 4)) > 1e-3


def test_positions_restart_in_every_document():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 3, 0, 0], [5, 5, 5, 5, 5, 5, 5, 5]])
    np.testing.assert_array_equal(
        positions_from_segments(segments), [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]
    )
