"""What merged models have besides weights: routed task vectors (WEMoE) and corrections (Surgery).

In the tree of parameters, for `config.merged.kind`

    wemoe      layers/ensemble/vectors/{gate, up, down}/kernel [L, K, in, out] (and bias)
               layers/ensemble/router/..., or router/... where all layers share one
                   (`moe.weight_ensemble.Router`)
    surgery    correction/{down [D, r], up [r, D]}, and with merged.layers those of every layer's
               output as layers/correction

Routers and corrections are float32 whatever the model's dtype: they learn by small steps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lm.config import ModelConfig, check
from lm.layers.linear import Plug, Site, linear
from lm.layers.parameters import SINGLE, Stack, constant, normal
from lm.layers.self_attention import Cache, Rotation
from moe import weight_ensemble

STD = 0.01
"""Of fresh routers' matrices, as in the paper's code."""


class RoutedCache(NamedTuple):
    """A layer's cache, with the sum of what its router gave for the tokens seen so far."""

    attention: Cache
    total: Float[Array, "B K"]


class Routing(NamedTuple):
    """What routers need to know of the tokens, shared by all layers."""

    router: Any
    """The router of all layers; None: each has its own."""
    start: Int[Array, "B T"] | None
    """See `moe.weight_ensemble.running_mean`."""
    before: tuple[Int[Array, "B T"], Int[Array, "B T"]] | None


def make_routing(router: "Router | None", rotation: Rotation, tokens) -> Routing:
    """The `Routing` of tokens that attention sees by `rotation`."""
    own = None if router is None else router.arrays()
    whole = getattr(rotation, "pieces", None) is None
    check(whole, "models with routed weights need whole rows: set mesh.context to 1")
    if rotation.cache_index is not None:
        slot = rotation.cache_index + jnp.arange(tokens.shape[1])[None]
        front = 0 if rotation.padding is None else rotation.padding[:, None]
        count = jnp.broadcast_to(slot - front + 1, tokens.shape)
        return Routing(own, None, ((count > 0).astype(jnp.int32), count))
    segments = rotation.segment_ids
    start = None if segments is None else weight_ensemble.document_starts(segments)
    return Routing(own, start, None)


class Affine(nnx.Module):
    """A matrix (or none) and a bias of a router."""

    def __init__(self, key, shape: tuple[int, int], stack: Stack, *, matrix=True, value=0.0):
        axes = ("router", "router")
        if matrix:
            self.kernel = normal(key, shape, axes, std=STD, dtype="float32", stack=stack)
        self.bias = constant(value, shape[1:], axes[1:], dtype="float32", stack=stack)

    def arrays(self) -> dict[str, jax.Array]:
        return {n: getattr(self, n)[...] for n in ("kernel", "bias") if hasattr(self, n)}


class Router(nnx.Module):
    """Gives every token a coefficient for each task vector."""

    def __init__(self, key: jax.Array, config: ModelConfig, stack: Stack):
        d, depth, count = config.d_model, config.merged.depth, len(config.merged.weights)
        out_key, hidden_key = jax.random.split(key)
        start = sum(config.merged.weights) / count
        self.out = Affine(out_key, (d, count), stack, matrix=depth > 0, value=start)
        if depth > 1:
            self.hidden = Affine(hidden_key, (d, d), stack)

    def arrays(self) -> weight_ensemble.Router:
        return {n: getattr(self, n).arrays() for n in ("out", "hidden") if hasattr(self, n)}


class Vectors(nnx.Module):
    """tau of one projection, which starts as 0."""

    def __init__(self, config: ModelConfig, name: str, stack: Stack):
        d, f, count = config.d_model, config.d_ff, len(config.merged.weights)
        shape, axes = ((f, d), ("mlp", "embed")) if name == "down" else ((d, f), ("embed", "mlp"))
        dtype = config.param_dtype
        self.kernel = constant(0.0, (count, *shape), ("router", *axes), dtype=dtype, stack=stack)
        if config.mlp_bias:
            ends = (count, shape[1]), ("router", axes[1])
            self.bias = constant(0.0, *ends, dtype=dtype, stack=stack)

    def arrays(self) -> dict[str, jax.Array]:
        return {n: getattr(self, n)[...] for n in ("kernel", "bias") if hasattr(self, n)}


class Bank(nnx.Module):
    """Task vectors by projection."""

    def __init__(self, config: ModelConfig, stack: Stack):
        for name in projections(config):
            setattr(self, name, Vectors(config, name, stack))


def projections(config: ModelConfig) -> tuple[str, ...]:
    """The linear layers of an MLP."""
    return ("up", "down") if config.mlp == "gelu" else ("gate", "up", "down")


class Ensemble(nnx.Module):
    """The routed part of an MLP."""

    def __init__(self, key: jax.Array, config: ModelConfig, stack: Stack):
        self.config = config
        check(
            config.mlp != "moe", "model.merged.kind wemoe routes dense MLPs, and model.mlp is moe"
        )
        self.vectors = Bank(config, stack)
        if not config.merged.shared:
            self.router = Router(key, config, stack)

    def around(self, mlp: nnx.Module, routing: Routing, total):
        """The MLP as a function of the same arguments with routed weights, which gives (y,
        (auxiliary, new total)); `total` is that of the cache."""

        def run(h, plug: Plug | None, layer):
            router = routing.router if self.config.merged.shared else self.router.arrays()
            found = weight_ensemble.ensemble_router(router, h)
            before = routing.before and (total, *routing.before)
            r, new = weight_ensemble.running_mean(found, start=routing.start, before=before)
            share = r - jnp.asarray(self.config.merged.weights, jnp.float32)[None, None]
            share = share.reshape(-1, share.shape[-1])
            y, auxiliary = mlp(h, self._plug(plug, share, mlp), layer)
            return y, (auxiliary, new)

        return run

    def _plug(self, outer: Plug | None, share, mlp: nnx.Module) -> Plug:
        def plug(site: Site):
            product = outer(site) if outer else None
            name = site.name.removeprefix("layers.mlp.")
            if name == site.name or not hasattr(self.vectors, name):
                return product

            def routed(x, w, dims):
                # Not w, which is in the dtype of x already: its gradient would be rounded to it.
                y = linear(x, getattr(mlp, name).kernel[...], product)
                vectors = getattr(self.vectors, name).arrays()
                added = weight_ensemble.ensemble_product(x, share, vectors, linear)
                return y + added.astype(y.dtype)

            return routed

        return plug


class Correction(nnx.Module):
    """x - relu(x D) U; U starts as 0."""

    def __init__(self, key: jax.Array, config: ModelConfig, stack: Stack = SINGLE):
        d, rank = config.d_model, config.merged.rank
        axes, std = ("embed", "adapter"), (3 * d) ** -0.5  # the variance of U(-1, 1) / sqrt(d)
        self.down = normal(key, (d, rank), axes, std=std, dtype="float32", stack=stack)
        self.up = constant(0.0, (rank, d), axes[::-1], dtype="float32", stack=stack)

    def __call__(self, x):
        return corrected(x, {"down": self.down[...], "up": self.up[...]})


def corrected(x: Float[Array, "*batch D"], pair: dict[str, Array]) -> Float[Array, "*batch D"]:
    """x - relu(x D) U, computed in float32, in the dtype of x."""
    hidden = jax.nn.relu(x.astype(jnp.float32) @ pair["down"])
    return (x.astype(jnp.float32) - hidden @ pair["up"]).astype(x.dtype)


def is_part(path: tuple[str, ...]) -> bool:
    """Whether a parameter belongs to what this file adds to a decoder."""
    return path[0] in ("router", "correction") or path[1:2] in (("ensemble",), ("correction",))


def parameter_count(config: ModelConfig) -> int:
    """Parameters that are there besides those of the dense model."""
    c, d = config.merged, config.d_model
    if c.kind == "surgery":
        return 2 * d * c.rank * (1 + c.layers * config.num_layers)
    if c.kind != "wemoe":
        return 0
    count, matrices = len(c.weights), len(projections(config))
    router = count * (1 + d * (c.depth > 0)) + (d * d + d) * (c.depth > 1)
    biases = ((matrices - 1) * config.d_ff + d) * config.mlp_bias
    vectors = count * (matrices * d * config.d_ff + biases)
    return config.num_layers * vectors + router * (1 if c.shared else config.num_layers)
