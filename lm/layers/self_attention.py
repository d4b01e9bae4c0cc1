"""Grouped-query self-attention: projections, optional query/key norms, rotary embedding, cache."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lm import native
from lm.config import ModelConfig, check
from lm.layers import rotary, skip
from lm.layers.attention_common import contiguous, masked, product
from lm.layers.attention_context import Pieces, mesh_attention
from lm.layers.linear import Linear, Plug, native_products
from lm.layers.norms import make_norm
from lm.layers.parameters import Stack, fan_in_std
from lm.sharding import constrain


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far; stacked over layers outside of the scan."""

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"] | None
    """None where both are made of one latent, which `keys` then holds (`lm.layers.mla`)."""


class Rotation(NamedTuple):
    """What attention needs to know of the tokens, shared by all layers."""

    cos: Float[Array, "B T half"] | None
    """None without rotary embedding."""
    sin: Float[Array, "B T half"] | None
    segment_ids: Int[Array, "B T"] | None = None
    cache_index: Int[Array, ""] | None = None
    """Slot of the first of the T tokens in the cache; None without a cache."""
    padding: Int[Array, " B"] | None = None
    """Slots at the start of each row's cache that hold no token; None is no such slot."""
    local: tuple[Float[Array, "B T half"], Float[Array, "B T half"]] | None = None
    """cos and sin of sliding layers, where they have their own."""
    positions: Int[Array, "B T"] | None = None
    pieces: Pieces | None = None
    """How rows are cut over devices; None: not at all."""
    row_segment_ids: Int[Array, "R S"] | None = None
    """Documents of whole rows, if rows are cut (`attention_context.row_segments`)."""
    reach: int | None = None
    """Slots of the cache from this on are known to be empty; None: nothing is known."""

    def turn(
        self, x: Float[Array, "B T N H"], window: int | None, interleave: bool = False
    ) -> Float[Array, "B T N H"]:
        """Queries or keys of a layer with this window, rotated by their positions."""
        if self.cos is None:
            return x
        cos, sin = self.local if self.local and window is not None else (self.cos, self.sin)
        return rotary.rotate(x, cos, sin, interleave)


def make_rotation(config: ModelConfig, positions: Int[Array, "B T"], **others) -> Rotation:
    """The `Rotation` of tokens at `positions`; `others` are fields that it holds besides."""
    if config.positions != "rotary":
        return Rotation(None, None, positions=positions, **others)
    local = rotary.cos_sin(positions, config, True) if config.rope_theta_local else None
    cos, sin = rotary.cos_sin(positions, config)
    return Rotation(cos, sin, local=local, positions=positions, **others)


class SelfAttention(nnx.Module):
    """softmax(cap(q k^T / sqrt(head_dim)) + mask) v, then the output projection."""

    def __init__(self, key: jax.Array, config: ModelConfig, stack: Stack):
        self.config = config
        q_dim = config.num_heads * config.head_dim
        kv_dim = config.num_kv_heads * config.head_dim
        keys = iter(jax.random.split(key, 4))

        def project(name, d_in, d_out, axes, std, bias):
            return Linear(
                next(keys),
                f"layers.attention.{name}",
                d_in,
                d_out,
                axes,
                std=std,
                bias=bias,
                dtype=config.param_dtype,
                stack=stack,
            )

        std, bias = fan_in_std(config.d_model), config.qkv_bias
        self.query = project("query", config.d_model, q_dim, ("embed", "heads"), std, bias)
        self.key = project("key", config.d_model, kv_dim, ("embed", "kv_heads"), std, bias)
        self.value = project("value", config.d_model, kv_dim, ("embed", "kv_heads"), std, bias)
        self.out = project(
            "out",
            q_dim,
            config.d_model,
            ("heads", "embed"),
            fan_in_std(q_dim, config.num_layers),
            config.attention_out_bias,
        )
        if config.qk_norm:
            widths = (q_dim, kv_dim) if config.qk_norm_full else (config.head_dim,) * 2
            self.query_norm, self.key_norm = (make_norm(config, width, stack) for width in widths)
        self.scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        window: int | None,
        plug: Plug | None = None,
        layer=None,
        cache: Cache | None = None,
        active=None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Attend within each document; with a cache, also to the tokens that it holds.

        `active`: bool [K], key/value heads (with their queries) that are back-propagated; None is
        all of them, by the ordinary program. Only without a cache.
        """
        if active is not None:
            return self._attend_active(x, rotation, window, plug, layer, active), None
        config = self.config
        q, k, v = self._project(x, rotation, window, plug, layer, config.num_kv_heads)
        if cache is None:
            out = self._attend(q, k, v, rotation, window)
        else:
            cache = _append(cache, k, v, rotation.cache_index)
            out = attend_cache(q, cache, rotation, window, self.scale, config.attention_soft_cap)
        return self.out(out.reshape(*x.shape[:2], -1), plug, layer), cache

    def _attend(self, q, k, v, rotation: Rotation, window):
        return mesh_attention(
            q,
            k,
            v,
            segment_ids=rotation.segment_ids,
            window=window,
            scale=self.scale,
            soft_cap=self.config.attention_soft_cap,
            implementation=self.config.attention,
            pieces=rotation.pieces,
            row_segment_ids=rotation.row_segment_ids,
        )

    def _project(self, x, rotation: Rotation, window, plug, layer, kv_heads: int):
        config = self.config
        group = config.num_heads // config.num_kv_heads
        q, k = self.query(x, plug, layer), self.key(x, plug, layer)
        if config.qk_norm_full:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = self._heads(q, kv_heads * group), self._heads(k, kv_heads)
        v = self._heads(self.value(x, plug, layer), kv_heads)
        if config.qk_norm and not config.qk_norm_full:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = (rotation.turn(x, window, config.rope_interleave) for x in (q, k))
        return q, k, v

    def _attend_active(self, x, rotation: Rotation, window, plug, layer, active):
        """The same forward pass, with a backward pass of the active heads (`lm.layers.skip`)."""
        config = self.config
        check(
            not config.qk_norm_full,
            "heads cannot be left out one by one under qk_norm_full: it normalizes all of them "
            "together",
        )
        graphdef, state = nnx.split(self)

        def module(state, heads):
            """This layer with the weights of some heads, and their number."""
            if heads is None:
                return nnx.merge(graphdef, state), config.num_kv_heads
            return nnx.merge(graphdef, _select(state, heads, config.num_kv_heads)), heads.size

        def project(state, heads, x, context):
            layer, count = module(state, heads)
            q, k, v = layer._project(x, context[0], window, plug, context[1], count)
            return q.reshape(*k.shape[:3], -1, config.head_dim), k, v

        def attend(q, k, v, context):
            q = q.reshape(*q.shape[:2], -1, config.head_dim)
            return self._attend(q, k, v, context[0], window).reshape(*k.shape[:3], -1)

        def out(state, heads, o, context):
            layer, _ = module(state, heads)
            layer.out.has_bias = False  # it belongs to no head
            return layer.out(o.reshape(*o.shape[:2], -1), plug, context[1])

        context = (rotation, layer)
        y = skip.gathered((project, attend, out), active, state, x, context)
        return y + self.out.bias[...].astype(y.dtype)[None, None] if self.out.has_bias else y

    def _heads(self, x, heads):
        x = x.reshape(*x.shape[:2], heads, self.config.head_dim)
        return constrain(x, ("batch", "sequence", "act_heads", "act_embed"))


def _select(state, heads, num_kv_heads: int):
    """The state of a layer with the projections of some key/value heads and their queries."""

    def select(path, leaf):
        if path[0].key not in ("query", "key", "value", "out"):
            return leaf
        axis, shape = 0 if path[0].key == "out" else leaf.ndim - 1, leaf.shape
        split = leaf.reshape(*shape[:axis], num_kv_heads, -1, *shape[axis + 1 :])
        taken = jnp.take(split, heads, axis=axis)
        return taken.reshape(*shape[:axis], -1, *shape[axis + 1 :])

    return jax.tree_util.tree_map_with_path(select, state)


def _append(cache: Cache, k, v, index) -> Cache:
    return Cache(append(cache.keys, k, index), append(cache.values, v, index))


def append(
    cached: Float[Array, "B K S H"], new: Float[Array, "B T K H"], index
) -> Float[Array, "B K S H"]:
    """The cache with T tokens in its slots from `index` on."""
    new = new.swapaxes(1, 2).astype(cached.dtype)
    # Without the barrier XLA:CPU fuses the update into the product as well, which makes it two
    # updates, and then neither is in place: three copies of the cache.
    return jax.lax.optimization_barrier(jax.lax.dynamic_update_slice(cached, new, (0, 0, index, 0)))


def attend_cache(q, cache: Cache, rotation: Rotation, window: int | None, scale, soft_cap):
    """Attention of T new tokens to the slots of the cache; holds T x S scores, T is small."""
    assert cache.values is not None
    b, t, n, h = q.shape
    keys, values = (x[:, :, : rotation.reach].astype(q.dtype) for x in cache)
    groups, s = keys.shape[1:3]
    q = q.reshape(b, t, groups, n // groups, h).transpose(0, 2, 3, 1, 4)
    q = q.reshape(b, groups, -1, h)
    few = native_products() and native.takes_few_rows(q, keys)
    if not few and q.shape[2] == 1 and q.dtype != jnp.float32 and jax.default_backend() == "cpu":
        # XLA:CPU has no fast product of one 16-bit row: 2.4 ms against 0.4 for 12 heads, 1088
        # slots. Eight equal rows cost what they would cost elsewhere.
        q = jnp.broadcast_to(q, (b, groups, 8, h))
    if few:
        scores = native.few_rows(q, keys, transposed=True, dtype=jnp.float32) * scale
    else:
        scores = product(contiguous(q), keys, (3, 3)) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    query_slot = rotation.cache_index + jnp.arange(t)[:, None]
    slot = jnp.arange(s)[None]
    visible = slot <= query_slot
    if window is not None:
        visible &= slot > query_slot - window
    visible = visible[None]
    if rotation.padding is not None:
        visible &= slot[None] >= rotation.padding[:, None, None]
    scores = masked(scores, visible)
    # A padded query sees no slot: it gets zeros instead of NaN, and nobody reads it.
    highest = jnp.maximum(scores.max(-1, keepdims=True), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - highest)
    weights /= jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    weights = weights.astype(q.dtype)
    if few:
        out = native.few_rows(weights, values)
    else:
        out = product(weights, values, (3, 2)).astype(q.dtype)
    out = out[:, :, : n // groups * t].reshape(b, groups, n // groups, t, h)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)
