"""Adapters: small trained parts beside the frozen projections of a decoder.

A `Linear` with an adapter gives x W + adapter(x) (+ bias). In the tree of parameters the adapter of
a projection is its entry "adapter":

    lora        lora_a [D, r], lora_b [r, F]                              (arXiv 2106.09685)
    loramoe     lora_a [1, E, D, r], lora_b [1, E, r, F], router [1, D, E]    (arXiv 2312.09979)
    head_wise   lora_a [H, E, D/H, r], lora_b [H, E, r, F], router [H, D/H, E]    (2602.12587)
    multi_head  lora_a [D, r], router [r/h, E], expert [E, r/h, r/h], lora_b [r, F]

behind the layer axis; the router's array is router.kernel. lora_b starts at 0, so that a fresh
adapter changes nothing; lora_a and routers have the variance of uniform(-1, 1) / sqrt(fan in), as
in the reference implementation of LoRA; the experts of multi_head start as N(0, 1 / fan in).

`partition` takes the tree apart into what is frozen and what is trained, so that gradients and the
optimizer's state exist for the latter alone.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import moe
from lm.config import AdapterConfig, ConfigError, ModelConfig, check
from lm.layers.linear import Linear
from lm.layers.parameters import Stack, constant, normal

Params = dict[str, Any]

PLACES = {
    "attention": ("query", "key", "value", "out"),
    "mlp": ("gate", "up", "down"),
}
"""Where the targets of `AdapterConfig` are found in a layer."""


class Kernel(nnx.Module):
    """A matrix by itself, so that its name in the tree is that of other routers."""

    def __init__(self, kernel: nnx.Param):
        self.kernel = kernel


class Adapter(nnx.Module):
    """What is added to one projection."""

    def __init__(
        self,
        key: jax.Array,
        config: AdapterConfig,
        d_in: int,
        d_out: int,
        rank: int,
        *,
        dtype: str,
        stack: Stack,
    ):
        self.config, self.rank = config, rank
        a_key, router_key, expert_key = jax.random.split(key, 3)

        def declare(key, shape, fan_in, spread=3.0):
            std, axes = (spread * fan_in) ** -0.5, ("adapter",) * len(shape)
            return normal(key, shape, axes, std=std, dtype=dtype, stack=stack)

        banks: tuple[int, ...] = ()
        width, part = d_in, rank // config.heads
        if config.kind in ("loramoe", "head_wise"):
            heads = heads_of(config)
            banks, width = (heads, config.experts), d_in // heads
            router = declare(router_key, (heads, width, config.experts), width)
            self.router = Kernel(router)
        elif config.kind == "multi_head":
            self.router = Kernel(declare(router_key, (part, config.experts), part))
            self.expert = declare(expert_key, (config.experts, part, part), part, spread=1.0)
        self.lora_a = declare(a_key, (*banks, width, rank), width)
        shape = (*banks, rank, d_out)
        self.lora_b = constant(0.0, shape, ("adapter",) * len(shape), dtype=dtype, stack=stack)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., D] -> [..., F], in the dtype of x."""
        y, _ = self.routed(x.reshape(-1, x.shape[-1]))
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def routed(self, x: jax.Array) -> tuple[jax.Array, moe.Routing | None]:
        """x: [N, D] -> [N, F], and where its tokens (or their parts) went."""
        config, scale = self.config, self.config.alpha / self.rank
        params = {"lora_a": self.lora_a[...], "lora_b": self.lora_b[...]}
        if config.kind == "lora":
            hidden = x @ params["lora_a"].astype(x.dtype)
            return scale * (hidden @ params["lora_b"].astype(x.dtype)), None
        params["router"] = self.router.kernel[...]
        if config.kind == "multi_head":
            params["expert"] = self.expert[...]
            k, heads = config.top_k, config.heads
            return moe.multi_head_lora(x, params, heads=heads, k=k, scale=scale)
        return moe.head_wise_lora(x, params, k=config.top_k, scale=scale)


def heads_of(config: AdapterConfig) -> int:
    """Slices of the input that are routed by themselves."""
    return config.heads if config.kind == "head_wise" else 1


def attach(layers: Any, config: ModelConfig, key: jax.Array, stack: Stack) -> None:
    """Give the projections of `layers`, a block, that `config.adapter` targets their adapters.

    Raises:
      ConfigError: a target that these layers do not have, or an input that the heads do not divide.
    """
    adapter = config.adapter
    if adapter.kind == "none":
        return
    found = {
        name: getattr(getattr(layers, place), name, None)
        for place, names in PLACES.items()
        for name in names
        if name in adapter.targets
    }
    for target in adapter.targets:
        check(
            isinstance(found.get(target), Linear),
            f"model.adapter.targets has {target!r}, which is no projection of these layers (mlp "
            f"{config.mlp!r}, attention_kind {config.attention_kind!r}): name those that are, of "
            f"{', '.join(sum(PLACES.values(), ()))}",
        )
    shapes = target_shapes(config)
    for number, (name, rank) in enumerate(ranks(adapter, shapes).items()):
        found[name].adapter = Adapter(
            jax.random.fold_in(key, number),
            adapter,
            *shapes[name],
            rank,
            dtype=config.param_dtype,
            stack=stack,
        )
        found[name].has_adapter = True


def target_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of the projections that `config.adapter` targets, in the order of a layer."""
    d, f = config.d_model, config.d_ff
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    o = config.num_heads * config.mla.v_head_dim if config.attention_kind == "mla" else q
    shapes = {"query": (d, q), "key": (d, kv), "value": (d, kv), "out": (o, d)}
    shapes |= {"gate": (d, f), "up": (d, f), "down": (f, d)}
    return {name: shape for name, shape in shapes.items() if name in config.adapter.targets}


def ranks(config: AdapterConfig, shapes: dict[str, tuple[int, int]]) -> dict[str, int]:
    """The rank of every pair, by target; `shapes` are the projections' (d_in, d_out)."""
    if config.kind in ("lora", "multi_head"):
        return dict.fromkeys(shapes, config.rank)
    try:
        found = moe.matched_ranks(
            list(shapes.values()), config.rank, heads=heads_of(config), k=config.top_k
        )
    except ValueError as error:
        raise ConfigError(f"model.adapter.heads: {error}") from None
    return dict(zip(shapes, found, strict=True))


def layer_size(model: ModelConfig) -> moe.Size:
    """Parameters of the adapters of one layer: all of them, and those that work on a token."""
    config, shapes, total = model.adapter, target_shapes(model), moe.Size(0, 0)
    if config.kind == "none":
        return total
    for name, rank in ranks(config, shapes).items():
        if config.kind == "multi_head":
            heads, experts, k = config.heads, config.experts, config.top_k
            part = moe.multi_head_lora_size(*shapes[name], rank, heads=heads, experts=experts, k=k)
        elif config.kind == "lora":
            part = moe.lora_size(*shapes[name], rank)
        else:
            heads, experts, k = heads_of(config), config.experts, config.top_k
            part = moe.lora_size(*shapes[name], rank, heads=heads, experts=experts, k=k)
        total = total + part
    return total


def partition(config: ModelConfig, params: Params) -> tuple[Params, Params]:
    """(frozen, trained): without adapters nothing is frozen. `join` puts them together again."""
    if config.adapter.kind == "none":
        return {}, params
    return divide(params)


def divide(node: Params) -> tuple[Params, Params]:
    """(everything but adapters, adapters) of a tree of parameters."""
    frozen: Params = {}
    trained: Params = {}
    for name, value in node.items():
        if name == "adapter":
            trained[name] = value
        elif isinstance(value, dict):
            rest, adapters = divide(value)
            if rest:
                frozen[name] = rest
            if adapters:
                trained[name] = adapters
        else:
            frozen[name] = value
    return frozen, trained


def join(frozen: Params, trained: Params) -> Params:
    """The whole tree out of the two parts that `partition` gave."""
    whole = dict(frozen)
    for name, value in trained.items():
        whole[name] = join(whole[name], value) if name in whole else value
    return whole


def merge(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The dense model that a model with LoRA adapters is: W + alpha / r A B, summed in f32.

    Raises:
      ConfigError: adapters with routers, which no dense matrix equals.
    """
    adapter = config.adapter
    if adapter.kind != "lora":
        raise ConfigError(
            f"adapters of kind {adapter.kind!r} cannot be merged into dense weights: only those of "
            "kind 'lora' add the same matrix to every token"
        )
    scale = adapter.alpha / adapter.rank

    def fold(node):
        if not isinstance(node, dict):
            return node
        rest = {name: fold(value) for name, value in node.items() if name != "adapter"}
        if "adapter" in node:
            a, b = (node["adapter"][name].astype(jnp.float32) for name in ("lora_a", "lora_b"))
            kernel = rest["kernel"]
            wide = kernel.astype(jnp.float32) + scale * (a @ b)
            rest["kernel"] = wide.astype(kernel.dtype)
        return rest

    return dataclasses.replace(config, adapter=AdapterConfig()), fold(params)
