"""WEMoE (Tang et al., arXiv 2402.00433) and E-WEMoE (arXiv 2410.21804): routed task vectors.

The MLP of every layer becomes, for each input,

    W(x) = W_0 + sum_k r_k(x) tau_k        all matrices and biases of the MLP, one r for all of them

    r = mean over tokens of router(h),     h: the input of the MLP
    router: depth 0 a constant; 1: h A + a; 2: relu(h B + b) A + a;  no softmax

and everything else is merged once, by task arithmetic with the models' weights. At first the last
bias is those weights and A = N(0, 0.01^2), B = N(0, 0.01^2): about task arithmetic. Only routers
learn, by entropy. In E-WEMoE all layers share one router and the tau_k keep the share `density` of
their largest magnitudes, per tensor.

A language model predicts at every token, so the mean is over the tokens up to it: at the last token
of a prompt this is the paper's mean, and no prediction sees what comes after it. r belongs to a row
(and a token), never to a batch. Nothing is materialized: y = x W_0 + sum_k r_k (x tau_k + b_k).

The dense weights that are stored are W_d = W_0 + sum_k w_k tau_k for the models' weights w, so that
the folder by itself is a model for every loader; routers act on top: W = W_d + sum_k (r_k - w_k)
tau_k. For one prompt (r of its last token) or a router of depth 0, `specialized` gives the dense
model that the ensemble is. A standard expert layer, which mixes outputs and not weights, can be the
same function only where r is one-hot, which these routers never are: there is no such conversion.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lm import model
from lm.config import ModelConfig
from lm.layers.linear import Plug, Site
from lm.merging.adaptive.objective import unrolled
from lm.merging.types import MergeError

__all__ = ["Routed", "check_mlp", "init_router", "projections", "route", "routes", "specialized"]

STD = 0.01


@dataclasses.dataclass(frozen=True)
class Routed:
    """What a weight ensemble has besides its dense parameters."""

    router: dict[str, Array]
    """Behind [L] unless shared: "out" [d, K] or nothing, "out_bias" [K], "hidden" [d, d] and
    "hidden_bias" [d] for depth 2."""
    vectors: dict[str, dict[str, Array]]
    """tau by projection: {"kernel": [L, K, in, out], "bias": [L, K, out] if there is one}."""
    weights: Array
    """w [K], which the dense parameters contain already."""

    @property
    def shared(self) -> bool:
        """Whether one router serves all layers."""
        return self.router["out_bias"].ndim == 1

    def at(self, layer) -> dict[str, Array]:
        """A layer's router."""
        return self.router if self.shared else {k: v[layer] for k, v in self.router.items()}


jax.tree_util.register_dataclass(Routed, ["router", "vectors", "weights"], [])


def projections(config: ModelConfig) -> tuple[str, ...]:
    """The linear layers of an MLP, in the order of their calls."""
    return ("up", "down") if config.mlp == "gelu" else ("gate", "up", "down")


def check_mlp(config: ModelConfig) -> None:
    """MergeError for models without dense MLPs."""
    if config.mlp not in ("swiglu", "geglu", "gelu"):
        raise MergeError(f"wemoe routes dense MLPs, and this model's are {config.mlp!r}")


def init_router(
    config: ModelConfig, weights: list[float], *, depth: int, shared: bool, seed: int
) -> dict[str, Array]:
    """A fresh router, float32.

    Args:
      config: the model.
      weights: its output at first, about.
      depth: 0, 1 or 2 linear layers.
      shared: one for all layers.
      seed: of its matrices.
    """
    stack = () if shared else (config.num_layers,)
    d, count = config.d_model, len(weights)
    keys = jax.random.split(jax.random.key(seed))
    start = jnp.asarray(weights, jnp.float32)
    router = {"out_bias": jnp.broadcast_to(start, (*stack, count))}
    if depth > 0:
        router["out"] = STD * jax.random.normal(keys[0], (*stack, d, count))
    if depth > 1:
        router["hidden"] = STD * jax.random.normal(keys[1], (*stack, d, d))
        router["hidden_bias"] = jnp.zeros((*stack, d))
    return router


def route(router: dict[str, Array], h: Float[Array, "*batch D"]) -> Float[Array, "*batch K"]:
    """The router's output for each token, before the mean, float32."""
    front, h = h.shape[:-1], h.reshape(-1, h.shape[-1]).astype(jnp.float32)
    if "hidden" in router:
        h = jax.nn.relu(h @ router["hidden"] + router["hidden_bias"][None])
    bias = jnp.broadcast_to(router["out_bias"], (len(h), router["out_bias"].size))
    y = h @ router["out"] + bias if "out" in router else bias
    return y.reshape(*front, -1)


def plug_of(
    config: ModelConfig, routed: Routed, shape: tuple[int, int], real=None, fixed=None
) -> Plug:
    """The plug that routes a model with the dense parameters; a new one for every traced program.

    Args:
      config: the model.
      routed: its routers and task vectors.
      shape: (B, T) of the tokens.
      real: [B, T], 1 for tokens that count in the mean (padding on the left of prompts); None: all.
      fixed: [B, L, K] to use in place of the routers' outputs (of a prompt, for what follows it).
    """
    return _Ensemble(config, routed, shape, real, fixed).plug


class _Ensemble:
    def __init__(self, config: ModelConfig, routed: Routed, shape, real, fixed):
        self.config, self.routed, self.shape = config, routed, shape
        self.real = jnp.ones(shape) if real is None else jnp.asarray(real, jnp.float32)
        self.fixed, self.first = fixed, projections(config)[0]
        self.now: Any = None
        self.seen: list[Array] = []
        """r [B, T, K] of every call: of every layer, where the model is unrolled."""

    def plug(self, site: Site):
        name = site.name.removeprefix("layers.mlp.")
        if name == site.name or name not in self.routed.vectors:
            return None

        def product(x, w, dims):
            if name == self.first:
                self.now = self._route(x, site.layer)
                self.seen.append(self.now)
            y = jax.lax.dot_general(x, w, dims)
            return y + self._routed(name, x, site.layer).astype(y.dtype)

        return product

    def _route(self, x, layer) -> Float[Array, "B T K"]:
        batch, length = self.shape
        if self.fixed is not None:
            fixed = jnp.asarray(self.fixed)[:, layer][:, None]
            return jnp.broadcast_to(fixed, (batch, length, fixed.shape[-1]))
        found = route(self.routed.at(layer), x.reshape(batch, length, -1))
        real = self.real[..., None]
        return jnp.cumsum(found * real, 1) / jnp.maximum(jnp.cumsum(real, 1), 1.0)

    def _routed(self, name: str, x, layer) -> Float[Array, "N F"]:
        """sum_k (r_k - w_k) (x tau_k + b_k)."""
        weights = self.routed.weights
        share = self.now.reshape(-1, weights.size) - weights[None]
        vectors = {key: value[layer] for key, value in self.routed.vectors[name].items()}

        def add(total, each):
            weight, vector = each
            y = (x @ vector["kernel"].astype(x.dtype)).astype(jnp.float32)
            y = y + vector["bias"].astype(jnp.float32)[None] if "bias" in vector else y
            return total + weight[:, None] * y, None

        zero = jnp.zeros((x.shape[0], vectors["kernel"].shape[-1]), jnp.float32)
        return jax.lax.scan(add, zero, (share.T, vectors))[0]


def routes(
    config: ModelConfig, params: model.Params, routed: Routed, tokens, real=None
) -> Float[Array, "B L K"]:
    """r of every layer at the last token of each row: what the paper routes by."""
    ensemble = _Ensemble(config, routed, tokens.shape, real, None)
    model.hidden(unrolled(config), params, jnp.asarray(tokens), plug=ensemble.plug)
    return jnp.stack([r[:, -1] for r in ensemble.seen], 1)


def specialized(
    config: ModelConfig, params: model.Params, routed: Routed, r: Float[Array, "L K"]
) -> model.Params:
    """The dense parameters that the ensemble has for these coefficients, in the parameters' dtypes.

    Exact for a prompt's continuation with r of the prompt, and for every text if the routers are
    of depth 0 (then r is their bias).
    """
    share = r - routed.weights[None]
    mlp = dict(params["layers"]["mlp"])
    for name, vectors in routed.vectors.items():
        mlp[name] = {
            key: (
                value.astype(jnp.float32)
                + jnp.einsum("lk,lk...->l...", share, vectors[key].astype(jnp.float32))
            ).astype(value.dtype)
            for key, value in mlp[name].items()
        }
    return params | {"layers": params["layers"] | {"mlp": mlp}}
