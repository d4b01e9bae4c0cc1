"""Feed-forward layers, and the table through which an expert layer takes their place.

A layer kind is a class with `__init__(key, config, stack)` and `__call__(x, plug, layer)` that
returns `(y, auxiliary)`: y has the shape of x, and `auxiliary` is a dict of f32 values (losses, by
names that start with "loss/", and statistics) that the training step sums over layers; {} for
dense layers. `ModelConfig.mlp` names the kind.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lm.config import ConfigError, ModelConfig
from lm.layers.linear import Linear, Plug
from lm.layers.parameters import Stack, fan_in_std
from lm.sharding import constrain

Auxiliary = dict[str, jax.Array]


@jax.custom_vjp
def silu_product(gate: Float[Array, "*dims"], up: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """silu(gate) * up, computed in f32, in the dtype of `gate`.

    Its own gradient keeps only the two inputs: automatic differentiation would keep the sigmoid and
    both factors besides.
    """
    gate32 = gate.astype(jnp.float32)
    return (gate32 * jax.nn.sigmoid(gate32) * up.astype(jnp.float32)).astype(gate.dtype)


def _silu_product_fwd(gate, up):
    return silu_product(gate, up), (gate, up)


def _silu_product_bwd(residuals, g):
    gate, up = residuals
    gate32, up32, g32 = (a.astype(jnp.float32) for a in (gate, up, g))
    sigmoid = jax.nn.sigmoid(gate32)
    silu = gate32 * sigmoid
    dgate = g32 * up32 * (sigmoid + silu * (1 - sigmoid))
    return dgate.astype(gate.dtype), (g32 * silu).astype(up.dtype)


silu_product.defvjp(_silu_product_fwd, _silu_product_bwd)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, key: jax.Array, config: ModelConfig, stack: Stack):
        self.gate, self.up, self.down = _projections(key, config, stack, ("gate", "up", "down"))

    def __call__(self, x, plug: Plug | None = None, layer=None) -> tuple[jax.Array, Auxiliary]:
        h = silu_product(self.gate(x, plug, layer), self.up(x, plug, layer))
        h = constrain(h, ("batch", "sequence", "act_mlp"))
        return self.down(h, plug, layer), {}


class GeGLU(SwiGLU):
    """down(gelu(gate(x)) * up(x)), the tanh approximation (arXiv 2002.05202; Gemma)."""

    def __call__(self, x, plug: Plug | None = None, layer=None) -> tuple[jax.Array, Auxiliary]:
        h = jax.nn.gelu(self.gate(x, plug, layer), approximate=True) * self.up(x, plug, layer)
        h = constrain(h, ("batch", "sequence", "act_mlp"))
        return self.down(h, plug, layer), {}


class GELU(nnx.Module):
    """down(gelu(up(x))), the tanh approximation of GPT-2."""

    def __init__(self, key: jax.Array, config: ModelConfig, stack: Stack):
        self.up, self.down = _projections(key, config, stack, ("up", "down"))

    def __call__(self, x, plug: Plug | None = None, layer=None) -> tuple[jax.Array, Auxiliary]:
        h = jax.nn.gelu(self.up(x, plug, layer), approximate=True)
        h = constrain(h, ("batch", "sequence", "act_mlp"))
        return self.down(h, plug, layer), {}


def _projections(key, config: ModelConfig, stack: Stack, names) -> list[Linear]:
    d, f = config.d_model, config.d_ff
    layers = []
    for name, name_key in zip(names, jax.random.split(key, len(names)), strict=True):
        down = name == "down"
        layers.append(
            Linear(
                name_key,
                f"layers.mlp.{name}",
                *((f, d) if down else (d, f)),
                ("mlp", "embed") if down else ("embed", "mlp"),
                std=fan_in_std(f, config.num_layers) if down else fan_in_std(d),
                bias=config.mlp_bias,
                dtype=config.param_dtype,
                stack=stack,
            )
        )
    return layers


MLPS: dict[str, Callable[[jax.Array, ModelConfig, Stack], nnx.Module]] = {
    "swiglu": SwiGLU,
    "gelu": GELU,
    "geglu": GeGLU,
}


def make_mlp(key: jax.Array, config: ModelConfig, stack: Stack) -> nnx.Module:
    """The layer that `config.mlp` names; an unknown name is a ConfigError that lists the known."""
    from lm.layers.moe import MoE  # which is made of the layers of this file
    from lm.layers.moe_heads import HeadWiseMoE, MultiHeadMoE

    experts = {"token": MoE, "head_wise": HeadWiseMoE, "multi_head": MultiHeadMoE}
    kinds = MLPS | {"moe": experts[config.moe.kind]}
    if config.mlp not in kinds:
        raise ConfigError(f"model.mlp must be one of {', '.join(kinds)}, got {config.mlp!r}")
    return kinds[config.mlp](key, config, stack)
