"""WEMoE (Tang et al., arXiv 2402.00433) and E-WEMoE (arXiv 2410.21804): routed task vectors.

The MLP of every layer becomes, for each input,

    W(x) = W_0 + sum_k r_k(x) tau_k        all matrices and biases of the MLP, one r for all of them

    r = mean over tokens of router(h),     h: the input of the MLP
    router: depth 0 a constant; 1: h A + a; 2: relu(h B + b) A + a;  no softmax

and everything else is merged once, by task arithmetic with the models' weights. At first the last
bias is those weights and A = N(0, 0.01^2), B = N(0, 0.01^2): about task arithmetic. Only routers
learn, by entropy. In E-WEMoE all layers share one router and the tau_k keep the share `density` of
their largest elements.

The dense weights that are stored are W_d = W_0 + sum_k w_k tau_k for the models' weights w, so that
the folder by itself is a model for every loader; `lm.layers.merged` routes on top of them: W = W_d
+ sum_k (r_k - w_k) tau_k. For one prompt (r of its last token) or constant routers `specialized`
gives the dense model that the ensemble is.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lm import model
from lm.config import ModelConfig
from lm.config_merged import MergedConfig
from lm.layers.merged import STD
from lm.merging.types import MergeError

__all__ = ["attach", "check_mlp", "constant", "init_router", "routed", "routes", "specialized"]

Router = dict[str, dict[str, Array]]
"""`moe.weight_ensemble.Router`; arrays lie behind [L] unless all layers share it."""


def check_mlp(config: ModelConfig) -> None:
    """MergeError for models without dense MLPs."""
    if config.mlp not in ("swiglu", "geglu", "gelu"):
        raise MergeError(f"wemoe routes dense MLPs, and this model's are {config.mlp!r}")


def routed(
    config: ModelConfig, tasks: list[str], weights: list[float], *, depth: int, shared: bool
) -> ModelConfig:
    """The configuration of the ensemble of a model.

    Args:
      config: the dense model.
      tasks: a name for each task vector.
      weights: w, which the dense parameters contain already.
      depth: linear layers of a router: 0, 1 or 2.
      shared: one router for all layers.
    """
    merged = MergedConfig(
        kind="wemoe", tasks=tuple(tasks), weights=tuple(weights), depth=depth, shared=shared
    )
    return dataclasses.replace(config, merged=merged)


def init_router(config: ModelConfig, seed: int) -> Router:
    """A fresh router of a `routed` configuration, float32; its output is w, about.

    Args:
      config: the ensemble.
      seed: of its matrices.
    """
    c, d = config.merged, config.d_model
    stack = () if c.shared else (config.num_layers,)
    keys = jax.random.split(jax.random.key(seed))
    start = jnp.asarray(c.weights, jnp.float32)
    router: Router = {"out": {"bias": jnp.broadcast_to(start, (*stack, len(c.weights)))}}
    if c.depth > 0:
        shape = (*stack, d, len(c.weights))
        router["out"]["kernel"] = STD * jax.random.normal(keys[0], shape)
    if c.depth > 1:
        hidden = STD * jax.random.normal(keys[1], (*stack, d, d))
        router["hidden"] = {"kernel": hidden, "bias": jnp.zeros((*stack, d))}
    return router


def attach(
    config: ModelConfig, params: model.Params, router: Router, vectors: dict[str, Any]
) -> model.Params:
    """The ensemble's parameters: dense ones, a router, and tau by projection: {"kernel": [L, K, in,
    out], "bias": [L, K, out] if there is one}."""
    own = {"vectors": vectors} | ({} if config.merged.shared else {"router": router})
    layers = params["layers"] | {"ensemble": own}
    return params | {"layers": layers} | ({"router": router} if config.merged.shared else {})


def constant(config: ModelConfig, params: model.Params) -> bool:
    """Whether the routers give the same for every text: then the ensemble is a dense model."""
    router = params["router"] if config.merged.shared else params["layers"]["ensemble"]["router"]
    return "kernel" not in router["out"] or not jnp.any(router["out"]["kernel"])


@functools.partial(jax.jit, static_argnames=("config",))
def routes(config: ModelConfig, params: model.Params, tokens) -> Float[Array, "B L K"]:
    """r of every layer at the last token of each row: what continues it is computed with."""
    cache = model.init_cache(config, *tokens.shape)
    _, cache = model.decode(config, params, tokens, cache, jnp.int32(0), last_only=True)
    return jnp.swapaxes(cache.total, 0, 1) / tokens.shape[1]


def specialized(
    config: ModelConfig, params: model.Params, r: Float[Array, "L K"]
) -> tuple[ModelConfig, model.Params]:
    """The dense model that the ensemble is for these coefficients, in the parameters' dtypes.

    Exact for every text if the routers are constant, with r of any text; with r of a prompt, the
    paper's model of that prompt.
    """
    share = r - jnp.asarray(config.merged.weights, jnp.float32)[None]
    layers = dict(params["layers"])
    mlp = dict(layers["mlp"])
    for name, vectors in layers.pop("ensemble")["vectors"].items():
        mlp[name] = {
            key: (
                value.astype(jnp.float32)
                + jnp.einsum("lk,lk...->l...", share, vectors[key].astype(jnp.float32))
            ).astype(value.dtype)
            for key, value in mlp[name].items()
        }
    dense = {name: value for name, value in params.items() if name != "router"}
    plain = dataclasses.replace(config, merged=MergedConfig())
    return plain, dense | {"layers": layers | {"mlp": mlp}}
