import dataclasses

import pytest

from lm.config import ConfigError, ModelConfig, RopeScaling


def test_defaults_are_derived():
    config = ModelConfig(d_model=96, num_heads=6)
    assert (config.num_kv_heads, config.head_dim) == (6, 16)
    assert config.windows == (None,)


def test_configurations_are_values():
    a, b = ModelConfig(d_model=96, num_heads=6), ModelConfig(d_model=96, num_heads=6)
    assert a == b and hash(a) == hash(b)
    assert dataclasses.replace(a, attention_pattern=["full"]) == dataclasses.replace(
        b, attention_pattern=("full",)
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.d_model = 1


@pytest.mark.parametrize(
    "pattern,window,expected",
    [
        ((), None, (None,)),
        ((), 8, (8,)),
        (("sliding", "full"), 8, (8, None)),
        (("full",), 8, (None,)),
    ],
)
def test_windows_of_one_period(pattern, window, expected):
    assert ModelConfig(attention_pattern=pattern, sliding_window=window).windows == expected


BAD_MODELS = [
    (dict(d_model=100, num_heads=12), r"d_model \(100\).*num_heads \(12\)"),
    (dict(d_model=36, num_heads=12), "head_dim must be even.*3"),
    (dict(num_heads=12, num_kv_heads=5), r"num_heads \(12\).*num_kv_heads \(5\)"),
    (dict(num_layers=1.5), "num_layers must be a whole number, got 1.5"),
    (dict(num_layers=0), "num_layers must be above 0, got 0"),
    (dict(vocab_size=-1), "vocab_size must be above 0, got -1"),
    (dict(d_ff=True), "d_ff must be above 0, got True"),
    (dict(norm_eps=float("nan")), "norm_eps must be above 0, got nan"),
    (dict(rope_theta=float("inf")), "rope_theta must be above 0, got inf"),
    (dict(dtype="fp32"), "dtype must be one of float32, bfloat16, float16, got 'fp32'"),
    (dict(param_dtype="int8"), "param_dtype must be one of"),
    (dict(remat="half"), "remat must be none, dots, attention or full, got 'half'"),
    (dict(attention_pattern=("local",)), "attention_pattern holds 'local'"),
    (dict(attention_pattern=("sliding",)), "sliding_window is not set"),
    (dict(sliding_window=0), "sliding_window must be above 0"),
    (dict(logit_soft_cap=0.0), "logit_soft_cap must be above 0"),
    (dict(head_dim=0), "head_dim must be above 0"),
]


@pytest.mark.parametrize("values,message", BAD_MODELS)
def test_impossible_models_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**values)


@pytest.mark.parametrize(
    "values,message",
    [
        (dict(kind="ntk"), "kind must be linear, llama3 or yarn, got 'ntk'"),
        (dict(factor=0), "factor must be above 0"),
        (dict(low_freq_factor=4.0, high_freq_factor=4.0), "high_freq_factor.*must exceed"),
        (dict(beta_fast=1.0, beta_slow=2.0), "beta_fast.*must exceed beta_slow"),
        (dict(original_context=-1), "original_context must be above 0"),
    ],
)
def test_impossible_scalings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        RopeScaling(**values)
