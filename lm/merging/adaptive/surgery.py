"""Representation Surgery (Yang et al., arXiv 2402.02705) and SurgeryV2 (arXiv 2410.14389).

The merged model is frozen; every task k gets low-rank corrections of its features, trained to give
those of the individual model k on unlabelled text:

    z' = z - relu(z D) U,      D [d, r], U [r, d],  U = 0 at first: nothing is changed

Surgery corrects the final features z (before the head) of every token; SurgeryV2 the output x_b of
every layer b too, and the corrected output is what the next layer sees:

    loss_k = sum_b mean |pool(x_b) - pool(x_b of model k)| + mean |z' - z of model k|

pool: mean over a row's tokens. Both act token by token, so the corrected model generates from its
cache as any other. Every task has an optimizer of its own.

SurgeryV2 reaches the layers' outputs by following the residual stream through the products that
write to it, which needs models whose norms stand before the branches and dense MLPs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lm import model
from lm.config import ModelConfig
from lm.layers.linear import Site
from lm.layers.merged import corrected
from lm.merging.adaptive.data import Batch
from lm.merging.adaptive.objective import unrolled
from lm.merging.types import MergeError

__all__ = ["check_layers", "features", "init_surgery", "surgery_loss"]

Correction = dict[str, Any]
"""{"final": {down [d, r], up [r, d]}}, and for SurgeryV2 {"layers": the same behind [L]}."""


def init_surgery(config: ModelConfig, rank: int, layers: bool, seed: int) -> Correction:
    """Corrections that change nothing: D uniform in +-1 / sqrt(d), U zero; float32.

    Args:
      config: of the merged model.
      rank: r.
      layers: whether every layer's output is corrected (SurgeryV2).
      seed: of D.
    """
    d, bound = config.d_model, config.d_model**-0.5
    keys = jax.random.split(jax.random.key(seed))

    def pair(key, *stack):
        down = jax.random.uniform(key, (*stack, d, rank), minval=-bound, maxval=bound)
        return {"down": down, "up": jnp.zeros((*stack, rank, d))}

    found = {"final": pair(keys[0])}
    return found | ({"layers": pair(keys[1], config.num_layers)} if layers else {})


def check_layers(config: ModelConfig) -> None:
    """MergeError for models whose layers SurgeryV2 cannot follow."""
    if config.norm_position != "pre" or config.mlp == "moe":
        what = "experts" if config.mlp == "moe" else "norms behind the branches"
        raise MergeError(
            f"surgery_v2 needs dense layers with norms before the branches, and this model has "
            f"{what}: use surgery, which corrects the final features alone"
        )


class _Residual:
    """Follows the residual stream x through the products of an unrolled model."""

    def __init__(self, config, params, correction: Correction | None, tokens):
        self.config, self.params, self.correction = config, params, correction
        self.layer, self.outputs = 0, []
        x = params["embedding"][jnp.asarray(tokens).reshape(-1)].astype(config.dtype)
        if config.embedding_scale:
            x = x * jnp.asarray(config.d_model**0.5, x.dtype)
        self.x = x
        self._shape = tokens.shape
        if config.positions == "learned":
            table = params["position_embedding"].astype(config.dtype)
            self.x = x + jnp.tile(table[: tokens.shape[1]], (tokens.shape[0], 1))

    def plug(self, site: Site):
        if site.name == "layers.attention.out":
            return self._attention
        return self._mlp if site.name == "layers.mlp.down" else None

    def _attention(self, x, w, dims):
        y = jax.lax.dot_general(x, w, dims)
        self.x = self.x + y + self._bias("attention", "out")
        return y

    def _mlp(self, x, w, dims):
        y = jax.lax.dot_general(x, w, dims)
        new = self.x + y + self._bias("mlp", "down")
        self.x = new
        if self.correction is not None:
            pair = jax.tree.map(lambda a: a[self.layer], self.correction["layers"])
            self.x = corrected(new, pair)
            y = y + (self.x - new)
        self.outputs.append(self.x.reshape(*self._shape, -1))
        self.layer += 1
        return y

    def _bias(self, part: str, name: str):
        linear = self.params["layers"][part][name]
        return linear["bias"][self.layer].astype(self.config.dtype)[None] if "bias" in linear else 0


def features(
    config: ModelConfig, params: model.Params, tokens, correction: Correction | None, layers: bool
) -> tuple[Array, list[Array]]:
    """Final features [B, T, D], corrected if there is a correction, and the layers' outputs."""
    follow = _Residual(config, params, correction, tokens)
    plug = follow.plug if layers else None
    run = unrolled(config) if layers else config
    z, _ = model.hidden(run, params, jnp.asarray(tokens), plug=plug)
    z = z if correction is None else corrected(z, correction["final"])
    return z, follow.outputs


def surgery_loss(
    config: ModelConfig,
    merged: model.Params,
    individual: model.Params,
    correction: Correction,
    batch: Batch,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss of a task's batch, and its parts."""
    layers = "layers" in correction
    z, outputs = features(config, merged, batch.tokens, correction, layers)
    target = features(config, individual, batch.tokens, None, layers)
    target_z, target_outputs = jax.lax.stop_gradient(target)
    real = jnp.asarray(batch.real)[..., None]
    count = jnp.maximum(real.sum(), 1.0) * config.d_model
    final = jnp.sum(jnp.abs(z - target_z).astype(jnp.float32) * real) / count
    parts = {"final": final}

    def pool(x):
        return jnp.sum(x * real, 1) / jnp.maximum(real.sum(1), 1.0)

    for number, (x, y) in enumerate(zip(outputs, target_outputs, strict=True)):
        parts[f"layer {number}"] = jnp.mean(jnp.abs(pool(x) - pool(y)))
    return sum(parts.values()), parts
