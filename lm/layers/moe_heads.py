"""Expert layers that route parts of tokens: head-wise MH-MoE and Microsoft's MH-MoE, from scratch.

In the tree of parameters, behind the layer axis, with H = moe.heads and S = D / H:

    head_wise     router/kernel [H, S, E],
                  experts/{gate, up} [H, E, S, F], experts/down [H, E, F, D]
    multi_head    head, merge/{kernel [D, D], bias [D]}, router/kernel [S, E],
                  experts/{gate, up} [E, S, F], experts/down [E, F, S]

Both run on one device: their experts are not exchanged between devices.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import moe
from lm.config import ConfigError, ModelConfig
from lm.layers.linear import Linear, Plug, Site
from lm.layers.mlp import Auxiliary
from lm.layers.parameters import Stack, fan_in_std, normal


class Bank(nnx.Module):
    """Router and experts of an input width, one for each of `banks`."""

    def __init__(self, key, config: ModelConfig, stack: Stack, d_out: int, banks=()):
        width, hidden = config.d_model // config.moe.heads, config.d_expert
        experts, swiglu = config.moe.experts, config.moe.activation == "swiglu"
        shapes = {"gate": (width, hidden)} if swiglu else {}
        shapes |= {"up": (width, hidden), "down": (hidden, d_out)}
        for name, name_key in zip(shapes, jax.random.split(key, 3), strict=False):
            std = fan_in_std(hidden, config.num_layers) if name == "down" else fan_in_std(width)
            shape = (*banks, experts, *shapes[name])
            axes = ("router",) * len(shape)
            value = normal(name_key, shape, axes, std=std, dtype=config.param_dtype, stack=stack)
            setattr(self, name, value)

    def arrays(self) -> dict[str, jax.Array]:
        names = ("gate", "up", "down")
        return {name: getattr(self, name)[...] for name in names if hasattr(self, name)}


class Router(nnx.Module):
    """A matrix for each bank of experts."""

    def __init__(self, key, config: ModelConfig, stack: Stack, banks=()):
        shape = (*banks, config.d_model // config.moe.heads, config.moe.experts)
        self.kernel = normal(
            key,
            shape,
            ("router",) * len(shape),
            std=config.init_std,
            dtype=config.param_dtype,
            stack=stack,
        )


class HeadWiseMoE(nnx.Module):
    """Every slice of a token has a router and experts of its own (`moe.head_wise_mlp`)."""

    def __init__(self, key: jax.Array, config: ModelConfig, stack: Stack):
        self.config = config
        _check(config)
        router_key, experts_key = jax.random.split(key)
        banks = (config.moe.heads,)
        self.router = Router(router_key, config, stack, banks)
        self.experts = Bank(experts_key, config, stack, config.d_model, banks)

    def __call__(self, x, plug: Plug | None = None, layer=None) -> tuple[jax.Array, Auxiliary]:
        config = self.config.moe
        _check_product(plug, layer)
        params = self.experts.arrays() | {"router": self.router.kernel[...]}
        y, routing = moe.head_wise_mlp(
            x.reshape(-1, x.shape[-1]),
            params,
            k=config.top_k,
            activation=config.activation,
            implementation=config.implementation,
        )
        banks = [moe.bank(routing, head) for head in range(config.heads)]
        return y.reshape(x.shape), _auxiliary(self.config, banks)


class MultiHeadMoE(nnx.Module):
    """Parts of a projected token share one router and one pool (`moe.multi_head_mlp`)."""

    def __init__(self, key: jax.Array, config: ModelConfig, stack: Stack):
        self.config = config
        _check(config)
        head_key, merge_key, router_key, experts_key = jax.random.split(key, 4)
        d = config.d_model

        def dense(key, name, axes, std):
            return Linear(
                key,
                f"layers.mlp.{name}",
                d,
                d,
                axes,
                std=std,
                bias=True,
                dtype=config.param_dtype,
                stack=stack,
            )

        # Xavier, the head layer's with gain 1 / sqrt(2); merge as whatever writes to the stream.
        self.head = dense(head_key, "head", ("embed", "router"), fan_in_std(d) / 2**0.5)
        self.merge = dense(
            merge_key, "merge", ("router", "embed"), fan_in_std(d, config.num_layers)
        )
        self.router = Router(router_key, config, stack)
        self.experts = Bank(experts_key, config, stack, d // config.moe.heads)

    def __call__(self, x, plug: Plug | None = None, layer=None) -> tuple[jax.Array, Auxiliary]:
        config = self.config.moe
        _check_product(plug, layer)
        u = self.head(x, plug, layer).reshape(-1, x.shape[-1])
        z, routing = moe.multi_head_experts(
            u,
            self.experts.arrays() | {"router": self.router.kernel[...]},
            heads=config.heads,
            k=config.top_k,
            activation=config.activation,
            capacity_factor=config.capacity_factor,
            implementation=config.implementation,
        )
        drops = moe.capacity_drops(routing.indices, config.experts, config.capacity_factor)
        y = self.merge(z.reshape(x.shape), plug, layer)
        return y, _auxiliary(self.config, [routing], drops)


def size(config: ModelConfig) -> moe.Size:
    """Parameters of one layer; biases multiply nothing and count among all of them only."""
    layer = config.moe
    shapes = dict(heads=layer.heads, experts=layer.experts, k=layer.top_k)
    shapes["matrices"] = 3 if layer.activation == "swiglu" else 2
    if layer.kind == "head_wise":
        return moe.head_wise_mlp_size(config.d_model, config.d_expert, **shapes)
    found = moe.multi_head_mlp_size(config.d_model, config.d_expert, **shapes)
    return found + moe.Size(2 * config.d_model, 0)


def _auxiliary(config: ModelConfig, routings, drop_share=0.0) -> Auxiliary:
    """Statistics and losses, the mean over banks; as of `lm.layers.moe.MoE`."""
    statistics = [moe.routing_statistics(routing, drop_share) for routing in routings]
    mean = jax.tree.map(lambda *values: jnp.mean(jnp.stack(values), axis=0), *statistics)
    values = {f"experts/{name}": value for name, value in mean.items()}
    if config.moe.balance_weight:
        losses = jnp.stack([moe.load_balance_loss(routing) for routing in routings])
        values["loss/load_balance"] = config.moe.balance_weight * jnp.mean(losses)
    return values


def _check(config: ModelConfig) -> None:
    if config.d_model % config.moe.heads:
        raise ConfigError(
            f"model.moe.heads ({config.moe.heads}) must divide model.d_model ({config.d_model})"
        )


def _check_product(plug: Plug | None, layer) -> None:
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        raise NotImplementedError(
            "model.moe.kind head_wise and multi_head run on one device: set the mesh to 1 "
            "(--mesh.data 1), or model.moe.kind to token"
        )
    if plug and plug(Site("layers.mlp.experts", layer)) is not None:
        raise NotImplementedError(
            "model.moe.kind head_wise and multi_head have no quantized experts: keep them in high "
            "precision (--quant.high head '*router*' '*experts*')"
        )
