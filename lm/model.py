"""The decoder: embedding, a scanned stack of blocks, final norm, head.

`init` and `apply` are pure; parameters are a nested dict of arrays. The Flax NNX modules below are
thin parameter containers: they are split into (structure, parameters) once per configuration, and
merged again while tracing, so that no module is traversed at run time.

    x = embedding[tokens]
    for each layer:  x += attention(norm(x));  x += mlp(norm(x))
    logits = head(norm(x))

(OLMo 2 and Gemma have norms behind the branches too: `ModelConfig.norm_position`.)

Initial scales: embedding N(0, init_std^2) with init_std 0.02 (GPT-2); projections N(0, 1 / fan_in)
(LeCun 1998); the two that write to the residual stream divided by sqrt(2 * num_layers) (GPT-2,
section 2.3); norms 1; biases 0; an untied head N(0, 1 / d_model).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from lm import native
from lm.config import ConfigError, ModelConfig
from lm.config_merged import MergedConfig
from lm.layers import rotary, skip
from lm.layers.adapters import attach
from lm.layers.attention_context import Pieces, cut, join, pieces_of, row_segments
from lm.layers.embedding import lookup
from lm.layers.linear import Linear, Plug, Site, linear, native_products, two_rows
from lm.layers.merged import Correction, Ensemble, RoutedCache, Router, make_routing
from lm.layers.mla import make_attention
from lm.layers.mlp import make_mlp
from lm.layers.norms import make_norm
from lm.layers.parameters import SINGLE, Stack, fan_in_std, normal
from lm.layers.self_attention import Cache, Rotation, make_rotation
from lm.layers.stack import REMAT_POLICIES as REMAT_POLICIES
from lm.layers.stack import run_layers
from lm.sharding import constrain, constrain_residual, spec, whole_sequence

FEW_ROWS = 16
"""Tokens whose product with the head reads the matrix, rather than computes, on CPUs."""

Params = dict[str, Any]
"""Nested dict of arrays; leaves of "layers" (and "dense_layers": `ModelConfig.stacks`) have a
leading layer axis."""


class Block(nnx.Module):
    """One transformer layer."""

    def __init__(self, key: jax.Array, config: ModelConfig, stack: Stack):
        attention_key, mlp_key = jax.random.split(key)
        self.attention = make_attention(attention_key, config, stack)
        self.mlp = make_mlp(mlp_key, config, stack)
        if config.merged.kind == "wemoe":
            self.ensemble = Ensemble(jax.random.fold_in(key, 2), config, stack)
        if config.merged.layers:
            self.correction = Correction(jax.random.fold_in(key, 3), config, stack)
        if config.norm_position != "post":
            self.attention_norm = make_norm(config, config.d_model, stack)
            self.mlp_norm = make_norm(config, config.d_model, stack)
        if config.norm_position != "pre":
            self.attention_post_norm = make_norm(config, config.d_model, stack)
            self.mlp_post_norm = make_norm(config, config.d_model, stack)

    def __call__(
        self, x, rotation: Rotation, window, plug, layer, cache, active=None, routing=None
    ):
        active, total = active or {}, None
        if isinstance(cache, RoutedCache):
            cache, total = cache
        with jax.named_scope("attention"):
            if "attention" in active:
                y = self._gated("attention", active, x, rotation, window, plug, layer)
            else:
                context = rotation, window, plug, layer, cache, active.get("heads")
                y, cache = _branch(self._parts("attention"), "attention", x, *context)
            x = constrain_residual(x + y)
        with jax.named_scope("mlp"):
            if "mlp" in active:
                y, auxiliary = self._gated("mlp", active, x, rotation, window, plug, layer)
            elif routing is not None:
                routed = {"mlp": self.ensemble.around(self.mlp, routing, total)}
                y, (auxiliary, total) = _branch(self._parts("mlp") | routed, "mlp", x, plug, layer)
                cache = cache and RoutedCache(cache, total)
            else:
                y, auxiliary = _branch(self._parts("mlp"), "mlp", x, plug, layer)
            x = constrain_residual(x + y)
        return self.correction(x) if hasattr(self, "correction") else x, auxiliary, cache

    def _parts(self, name: str) -> dict[str, nnx.Module]:
        """The module of a branch and those norms that it has."""
        names = f"{name}_norm", name, f"{name}_post_norm"
        return {each: getattr(self, each) for each in names if hasattr(self, each)}

    def _gated(self, name: str, active, x, rotation, window, plug, layer):
        """A branch, norms included, that is back-propagated only if it is active."""
        if name == "mlp" and hasattr(self, "ensemble"):
            raise ConfigError("layers with routed weights cannot be left out of the backward pass")
        graphdef, state = nnx.split(self._parts(name))

        def branch(inputs, rotation, layer):
            state, x = inputs
            parts = nnx.merge(graphdef, state)
            if name == "attention":
                return _branch(parts, name, x, rotation, window, plug, layer)[0]
            return _branch(parts, name, x, plug, layer)

        return skip.gate(branch, active[name], (state, x), rotation, layer)


def _branch(parts: dict[str, nnx.Module], name: str, x, *context):
    x = parts[f"{name}_norm"](x) if f"{name}_norm" in parts else x
    y, other = parts[name](whole_sequence(x), *context)
    if f"{name}_post_norm" in parts:
        y = parts[f"{name}_post_norm"](constrain_residual(y))
    return y, other


class Decoder(nnx.Module):
    """Parameters of the whole model."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.config = config
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        shape = (config.vocab_size, config.d_model)
        dtype = config.param_dtype
        self.embedding = normal(
            embed_key, shape, ("vocab", "embed"), std=config.init_std, dtype=dtype
        )
        for number, (name, layers) in enumerate(config.stacks.items()):
            kind = config.dense if name == "dense_layers" else config
            block_key = jax.random.fold_in(layers_key, number) if number else layers_key
            block = Block(block_key, kind, Stack(len(layers)))
            attach(block, kind, jax.random.fold_in(key, 4 + 2 * number), Stack(len(layers)))
            setattr(self, name, block)
        if config.positions == "learned":
            position_key, shape = jax.random.fold_in(key, 3), (config.max_context, config.d_model)
            axes, std = ("positions", "embed"), config.init_std
            self.position_embedding = normal(position_key, shape, axes, std=std, dtype=dtype)
        self.final_norm = make_norm(config, config.d_model)
        if config.merged.shared:
            self.router = Router(jax.random.fold_in(key, 8), config, SINGLE)
        if config.merged.kind == "surgery":
            self.correction = Correction(jax.random.fold_in(key, 9), config)
        if not config.tie_embeddings:
            self.head = Linear(
                head_key,
                "head",
                config.d_model,
                config.vocab_size,
                ("embed", "vocab"),
                std=fan_in_std(config.d_model),
                dtype=dtype,
            )

    def __call__(
        self, tokens, rotation: Rotation, plug: Plug | None, cache: Cache | None, active=None
    ):
        dtype = self.config.dtype
        x = lookup(jnp.asarray(self.embedding[...]), tokens, dtype)
        if self.config.embedding_scale:  # rounded to the dtype, as in Gemma
            x *= jnp.asarray(self.config.d_model**0.5, dtype)
        if self.config.positions == "learned":
            x += lookup(
                jnp.asarray(self.position_embedding[...]), rotation.positions, dtype, "positions"
            )
        x = constrain_residual(x)
        blocks = {name: getattr(self, name) for name in self.config.stacks}
        per_layer = (cache, active)
        routing = None
        if self.config.merged.kind == "wemoe":
            routing = make_routing(getattr(self, "router", None), rotation, tokens)
        x, auxiliary, cache = run_layers(blocks, x, rotation, self.config, plug, per_layer, routing)
        x = self.final_norm(x)
        return self.correction(x) if hasattr(self, "correction") else x, auxiliary, cache


@functools.lru_cache(maxsize=64)
def _structure(config: ModelConfig):
    """(graphdef, abstract state) of the model, made without allocating anything."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, jax.random.key(0))))


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters, in `config.param_dtype`.

    Args:
      config: the model.
      key: a `jax.random.key`.
    """
    return nnx.to_pure_dict(nnx.state(Decoder(config, key), nnx.Param))


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters, as `jax.ShapeDtypeStruct`s."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def logical_axes(config: ModelConfig) -> Params:
    """The logical axis names (a tuple of str) of every parameter, in the structure of `init`."""
    _, state = _structure(config)
    axes: Params = {}
    for path, param in nnx.to_flat_state(state):
        node = axes
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = param.get_metadata("logical_axes")
    return axes


def shardings(config: ModelConfig, mesh: Mesh) -> Params:
    """The `NamedSharding` of every parameter on a mesh (`lm.sharding.RULES`)."""
    return jax.tree.map(
        lambda axes, leaf: NamedSharding(mesh, spec(axes, mesh, leaf.shape)),
        logical_axes(config),
        abstract_params(config),
        is_leaf=lambda node: isinstance(node, tuple),
    )


def apply(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    plug: Plug | None = None,
) -> Float[Array, "B T V"]:
    """Logits in f32.

    Args:
      config: the model.
      params: as from `init`.
      tokens: ids in [0, vocab_size); any other id gives NaN logits.
      segment_ids: document of each token; tokens attend within their document only. None is one
        document per row. Documents must be contiguous; by convention 0 marks padding.
      positions: position of each token in its document; None counts from the document's start.
      plug: chooses the product of each linear layer (`lm.layers.linear.Plug`).
    """
    x, _ = hidden(config, params, tokens, segment_ids=segment_ids, positions=positions, plug=plug)
    return logits(config, params, x, plug)


def hidden(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    plug: Plug | None = None,
    active: dict[str, Any] | None = None,
    pieces: Pieces | None = None,
) -> tuple[Float[Array, "B T D"], dict[str, jax.Array]]:
    """Normalized states before the head, and what the layers report besides.

    Arguments are those of `apply`, and `active`: which branches are back-propagated, bools by
    "attention" [L], "mlp" [L] or "heads" [L, num_kv_heads]; traced, or NumPy arrays, which choose
    while tracing where layers are not looped over (`lm.layers.skip`). None back-propagates all,
    by the ordinary program. `pieces`: tokens, segment_ids and positions (which must be given) are
    pieces of rows already (`lm.layers.attention_context.cut`), and so is the result.

    The second value maps names to arrays with a leading layer axis
    (`lm.layers.mlp.Auxiliary`); it is empty for dense models. The training loss takes this path,
    so that the logits need never exist as a whole (`lm.loss`).
    """
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be [batch, time], got shape {tokens.shape}")
    if positions is None:
        if segment_ids is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        else:
            positions = rotary.positions_from_segments(segment_ids)
    whole = None if pieces else pieces_of(tokens.shape)
    if whole:
        tokens, positions = cut(whole, tokens, positions)
        segment_ids = segment_ids if segment_ids is None else cut(whole, segment_ids)[0]
    others: dict[str, Any] = {"segment_ids": segment_ids, "pieces": pieces or whole}
    if others["pieces"] and segment_ids is not None:
        others["row_segment_ids"] = row_segments(others["pieces"], segment_ids)
    rotation = make_rotation(config, positions, **others)
    x, auxiliary, _ = _model(config, params)(tokens, rotation, plug, None, active)
    return join(whole, x) if whole else x, auxiliary


def decode(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    cache: Cache,
    index: Int[Array, ""],
    *,
    padding: Int[Array, " B"] | None = None,
    last_only: bool = False,
    reach: int | None = None,
    plug: Plug | None = None,
) -> tuple[Float[Array, "B T V"], Cache]:
    """Logits of T new tokens that follow those in the cache, and the cache with them added.

    Args:
      config: the model.
      params: as from `init`.
      tokens: the new tokens; they take slots index .. index + T - 1 of the cache.
      cache: as from `init_cache` or an earlier call.
      index: number of slots filled before.
      padding: slots at the start of each row that hold no token (prompts padded on the left).
      last_only: return the logits of the last token alone, [B, 1, V].
      reach: a number of slots that holds all tokens, these included; the others are not looked at.
      plug: as in `apply`.
    """
    positions = index + jnp.arange(tokens.shape[1])[None]
    if padding is not None:
        positions = jnp.maximum(positions - padding[:, None], 0)
    positions = jnp.broadcast_to(positions, tokens.shape)
    rotation = make_rotation(config, positions, cache_index=index, padding=padding, reach=reach)
    x, _, cache = _model(config, params)(tokens, rotation, plug, cache)
    x = x[:, -1:] if last_only else x
    return logits(config, params, x, plug), cache


def init_cache(config: ModelConfig, batch: int, length: int) -> Cache | RoutedCache:
    """An empty cache for `length` tokens in each of `batch` rows, stacked over layers."""
    if config.merged.kind == "wemoe":
        plain = dataclasses.replace(config, merged=MergedConfig())
        total = jnp.zeros((config.num_layers, batch, len(config.merged.weights)))
        return RoutedCache(init_cache(plain, batch, length), total)
    if config.attention_kind == "mla":
        width = config.mla.kv_lora_rank + config.mla.qk_rope_head_dim
        return Cache(jnp.zeros((config.num_layers, batch, 1, length, width), config.dtype), None)
    shape = (config.num_layers, batch, config.num_kv_heads, length, config.head_dim)
    return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def head_kernel(config: ModelConfig, params: Params) -> Float[Array, "D V"]:
    """The matrix that turns hidden states into logits."""
    return params["embedding"].T if config.tie_embeddings else params["head"]["kernel"]


def logits(
    config: ModelConfig, params: Params, x: Float[Array, "B T D"], plug: Plug | None = None
) -> Float[Array, "B T V"]:
    """head(x) in f32, soft-capped if the configuration says so (arXiv 2408.00118, section 2)."""
    dot_general = plug(Site("head")) if plug else None
    head = head_kernel(config, params)
    if dot_general is None:
        # Accumulated in f32 and left there, as the training loss does.
        y = _head_product(x, head.astype(x.dtype), config.tie_embeddings)
    else:
        y = linear(x, head, dot_general).astype(jnp.float32)
    y = constrain(y, ("batch", "sequence", "act_vocab"))
    cap = config.logit_soft_cap
    return y if cap is None else cap * jnp.tanh(y / cap)


def _head_product(x: Float[Array, "B T D"], head: Float[Array, "D V"], tied: bool) -> jax.Array:
    rows = math.prod(x.shape[:-1])
    flat = x.reshape(rows, -1)
    if native_products() and native.takes_few_rows(flat, head):
        w = head.T if tied else head  # as it lies in memory
        y = native.few_rows(flat, w, transposed=tied, dtype=jnp.float32)
    elif jax.default_backend() != "cpu" or rows > FEW_ROWS:
        return jnp.matmul(x, head, preferred_element_type=jnp.float32)
    # XLA:CPU at 1 x 768 x 32,000 of a tied matrix, which lies by rows of the vocabulary: in
    # float32 8 ms this way round and 25 the other; in bfloat16 5 against 50, but as [B, T, D].
    elif tied and x.dtype == jnp.float32:
        y = jnp.matmul(head.T, flat.T).T
    else:
        two = two_rows(flat)[:, None]
        y = jnp.matmul(two, head, preferred_element_type=jnp.float32)[:rows, 0]
    return y.reshape(*x.shape[:-1], -1)


def _model(config: ModelConfig, params: Params) -> Decoder:
    graphdef, state = _structure(config)
    state = jax.tree.map(lambda leaf: leaf, state)  # a copy: the cached one stays abstract
    try:
        nnx.replace_by_pure_dict(state, params)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"these parameters are not of this model configuration: {error}"
        ) from None
    return nnx.merge(graphdef, state)
