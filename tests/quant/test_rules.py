"""Which layers stay in high precision."""

import jax
import jax.numpy as jnp
import pytest

from quant import NVIDIA, Rules


def quantized_layers(rules, blocks):
    return [i for i in range(blocks) if rules.quantized("mlp.up", i, blocks)]


def test_nvidia_keeps_16_percent_of_62_blocks():
    kept = set(range(62)) - set(quantized_layers(NVIDIA, 62))
    assert kept == {0, 1, *range(54, 62)}


@pytest.mark.parametrize(
    "last,blocks,kept", [(0.15, 20, 3), (0.15, 10, 2), (0.07, 100, 7), (1, 4, 1), (0, 4, 0)]
)
def test_share_of_blocks_is_rounded_up(last, blocks, kept):
    assert quantized_layers(Rules(last=last), blocks) == list(range(blocks - kept))


def test_names():
    rules = Rules(high=("head", "*router*"))
    assert not rules.quantized("head") and not rules.quantized("layers.moe.router", 3, 8)
    assert rules.quantized("layers.mlp.up", 3, 8) is True
    assert rules.quantized("lm_head") is True


def test_traced_layers_agree_with_numbers():
    rules = Rules(first=1, last=2)
    traced = jax.jit(jax.vmap(lambda i: rules.quantized("mlp.up", i, 6)))(jnp.arange(6))
    assert [i for i in range(6) if traced[i]] == quantized_layers(rules, 6) == [1, 2, 3]
    # Nothing kept: no condition to compile.
    assert Rules().quantized("mlp.up", jnp.int32(0), 6) is True


def test_more_kept_than_there_are():
    assert quantized_layers(Rules(first=3, last=3), 4) == []


@pytest.mark.parametrize("fields", [{"first": -1}, {"last": -0.5}, {"last": 1.5}])
def test_refusals(fields):
    with pytest.raises(ValueError, match="first and last are numbers of blocks"):
        Rules(**fields)
