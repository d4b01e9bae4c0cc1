"""Weight ensembles as models of standard layouts, where they are the same function.

    ensemble       y = down(act(x (G + sum_k s_k tau_k^G)) * (x (U + sum_k s_k tau_k^U))) ...
    expert layer   y = sum_e g_e down_e(act(x G_e) * (x U_e))

The first mixes weights before the nonlinearity, the second outputs behind it, with weights that are
a softmax of the token alone. For routers that look at the text they differ. For constant routers
(depth 0, or matrices of zeros) the ensemble is a dense model, and that is an expert layer with
equal experts, whose weights add up to 1.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lm import model
from lm.config import ConfigError, ModelConfig
from lm.config_moe import MoEConfig
from lm.merging.adaptive import wemoe

__all__ = ["as_dense", "as_experts"]

Model = tuple[ModelConfig, model.Params]


def as_dense(config: ModelConfig, params: model.Params) -> Model:
    """The dense model that a merged model is.

    Raises:
      ConfigError: it is none, with the reason.
    """
    kind = config.merged.kind
    if kind == "none":
        return config, params
    if kind == "surgery":
        raise ConfigError(
            f"the correction of {config.merged.tasks[0]}, x - relu(x D) U, is no change of "
            'weights: no dense model does the same; task "none" is the model without it'
        )
    if not wemoe.constant(config, params):
        raise ConfigError(
            "the routers of this ensemble look at the text, and mix weights before the "
            "nonlinearity: no dense model and no standard expert layer, which mixes outputs behind "
            "it, is the same function (with router_depth 0 one is); keep the ensemble (--to hf), "
            "or take the dense model of one prompt (lm.merging.adaptive.load, dense)"
        )
    r = wemoe.routes(config, params, jnp.zeros((1, 1), jnp.int32))[0]
    return wemoe.specialized(config, params, r)


def as_experts(config: ModelConfig, params: model.Params) -> Model:
    """The same function with standard expert layers: an expert for every task vector, all equal.

    Raises:
      ConfigError: as of `as_dense`; no task vectors; an MLP that experts cannot be.
    """
    count = len(config.merged.weights)
    plain, dense = as_dense(config, params)
    if not count:
        raise ConfigError(
            "this model has no task vectors: aniso-upcycle makes expert layers of a dense model"
        )
    if plain.mlp != "swiglu" or plain.mlp_bias:
        bias = " with biases" if plain.mlp_bias else ""
        raise ConfigError(f"experts are SwiGLU without biases, and this MLP is {plain.mlp}{bias}")
    mlp = dense["layers"]["mlp"]
    experts = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf[:, None], (len(leaf), count, *leaf.shape[1:])),
        {name: mlp[name]["kernel"] for name in ("gate", "up", "down")},
    )
    shape = (plain.num_layers, plain.d_model, count)
    router = {"kernel": jnp.zeros(shape, mlp["up"]["kernel"].dtype)}
    layers = dense["layers"] | {"mlp": {"router": router, "experts": experts}}
    moe = MoEConfig(experts=count, top_k=min(2, count))
    return dataclasses.replace(plain, mlp="moe", moe=moe), dense | {"layers": layers}
