"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

All keys and values of a token are made of one latent c; what carries the rotary embedding is a
part of its own, which in keys is shared by the heads:

    c = norm(x W_DKV)            k_i = [c W_UK_i ; rope(x W_KR)]            v_i = c W_UV_i
    q = x W_Q, or norm(x W_DQ) W_UQ    q_i = [q_i^C ; rope(q_i^R)]
    out = concat_i softmax(q_i k_i^T scale + mask) v_i W_O

In the tree of parameters, behind the layer axis, with N heads:

    query/kernel [D, N (nope + rope)], or query_down/kernel [D, q_lora_rank], query_norm/scale and
    query_up/kernel [q_lora_rank, N (nope + rope)]
    kv_down/kernel [D, kv_lora_rank + rope]             W_DKV and W_KR side by side
    kv_norm/scale [kv_lora_rank]
    kv_up/kernel [kv_lora_rank, N (nope + v)]           W_UK_i and W_UV_i of each head in turn
    out/kernel [N v, D]

The cache holds [c ; rope(x W_KR)] of each token, kv_lora_rank + rope numbers whatever N is. With it
W_UK goes to the queries and W_UV behind the sum (the end of that section): the heads
then share one key, [c ; rope(x W_KR)], and one value, c, and neither is made for any head.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lm.config import ConfigError, ModelConfig
from lm.layers.attention_context import mesh_attention
from lm.layers.linear import Linear, Plug
from lm.layers.norms import RMSNorm
from lm.layers.parameters import Stack, fan_in_std
from lm.layers.rotary import yarn_mscale
from lm.layers.self_attention import Cache, Rotation, SelfAttention, append, attend_cache
from lm.sharding import constrain

EPS = 1e-6
"""Of the norms of the latents: DeepSeek's code has this number there whatever the other norms'."""


class MLA(nnx.Module):
    """Latent attention as `ModelConfig.mla` describes it."""

    def __init__(self, key: jax.Array, config: ModelConfig, stack: Stack):
        self.config = config
        d, heads, mla = config.d_model, config.num_heads, config.mla
        keys = iter(jax.random.split(key, 5))

        def project(name, d_in, d_out, axes, residual=None):
            return Linear(
                next(keys),
                f"layers.attention.{name}",
                d_in,
                d_out,
                axes,
                std=fan_in_std(d_in, residual),
                bias=name == "out" and config.attention_out_bias,
                dtype=config.param_dtype,
                stack=stack,
            )

        q_dim, rank = heads * mla.qk_head_dim, mla.q_lora_rank
        if rank is None:
            self.query = project("query", d, q_dim, ("embed", "heads"))
        else:
            self.query_down = project("query_down", d, rank, ("embed", "latent"))
            self.query_norm = RMSNorm(rank, eps=EPS, dtype=config.param_dtype, stack=stack)
            self.query_up = project("query_up", rank, q_dim, ("latent_in", "heads"))
        rank = mla.kv_lora_rank
        self.kv_down = project("kv_down", d, rank + mla.qk_rope_head_dim, ("embed", "latent"))
        self.kv_norm = RMSNorm(rank, eps=EPS, dtype=config.param_dtype, stack=stack)
        kv_dim = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        self.kv_up = project("kv_up", rank, kv_dim, ("latent_in", "heads"))
        axes = ("heads", "embed")
        self.out = project("out", heads * mla.v_head_dim, d, axes, config.num_layers)
        self.scale = softmax_scale(config)

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
        """As `SelfAttention`; with a cache `plug` does not reach kv_up, which is split there."""
        if active is not None:
            raise ConfigError(
                "heads cannot be left out one by one in latent attention: set --mat.family layers"
            )
        config, mla = self.config, self.config.mla
        q = self._queries(x, plug, layer)
        q_nope, q_rope = jnp.split(q, [mla.qk_nope_head_dim], axis=-1)
        q_rope = rotation.turn(q_rope, window, config.rope_interleave)
        latent, k_rope = jnp.split(self.kv_down(x, plug, layer), [mla.kv_lora_rank], axis=-1)
        latent = self.kv_norm(latent)
        k_rope = rotation.turn(k_rope[:, :, None], window, config.rope_interleave)
        if cache is None:
            out = self._attend(q_nope, q_rope, latent, k_rope, rotation, window, plug, layer)
        else:
            new = jnp.concatenate([latent[:, :, None], k_rope], axis=-1)
            cache = Cache(append(cache.keys, new, rotation.cache_index), None)
            out = self._attend_cache(q_nope, q_rope, cache, rotation, window)
        return self.out(out.reshape(*x.shape[:2], -1), plug, layer), cache

    def _queries(self, x, plug, layer):
        if self.config.mla.q_lora_rank is None:
            return self._heads(self.query(x, plug, layer))
        latent = self.query_norm(self.query_down(x, plug, layer))
        return self._heads(self.query_up(latent, plug, layer))

    def _attend(self, q_nope, q_rope, latent, k_rope, rotation, window, plug, layer):
        config, mla = self.config, self.config.mla
        kv = self._heads(self.kv_up(latent, plug, layer))
        k_nope, v = jnp.split(kv, [mla.qk_nope_head_dim], axis=-1)
        q = jnp.concatenate([q_nope, q_rope], axis=-1)
        k = jnp.concatenate([k_nope, jnp.broadcast_to(k_rope, q_rope.shape)], axis=-1)
        # Attention kernels take heads of one width, so the narrower ones are filled up with zeros.
        width = max(mla.qk_head_dim, mla.v_head_dim)
        q, k, v = (jnp.pad(y, [(0, 0)] * 3 + [(0, width - y.shape[-1])]) for y in (q, k, v))
        out = mesh_attention(
            q,
            k,
            v,
            segment_ids=rotation.segment_ids,
            window=window,
            scale=self.scale,
            soft_cap=config.attention_soft_cap,
            implementation=config.attention,
            pieces=rotation.pieces,
            row_segment_ids=rotation.row_segment_ids,
        )
        return out[..., : mla.v_head_dim]

    def _attend_cache(self, q_nope, q_rope, cache: Cache, rotation, window):
        config, mla = self.config, self.config.mla
        kernel = self.kv_up.kernel[...].astype(q_nope.dtype)
        up = kernel.reshape(mla.kv_lora_rank, config.num_heads, -1)
        up_key, up_value = jnp.split(up, [mla.qk_nope_head_dim], axis=-1)
        q = jnp.concatenate([jnp.einsum("btnd,rnd->btnr", q_nope, up_key), q_rope], axis=-1)
        # The values are the latents in the keys. Taking the rotary part along and dropping it
        # behind the sum costs less than a copy of the cache without it.
        both = Cache(cache.keys, cache.keys)
        out = attend_cache(q, both, rotation, window, self.scale, config.attention_soft_cap)
        return jnp.einsum("btnr,rnd->btnd", out[..., : mla.kv_lora_rank], up_value)

    def _heads(self, x):
        x = x.reshape(*x.shape[:2], self.config.num_heads, -1)
        return constrain(x, ("batch", "sequence", "act_heads", "act_embed"))


def softmax_scale(config: ModelConfig) -> float:
    """Factor of the scores: 1 / sqrt(width of a head), times YaRN's m(mscale_all_dim)^2."""
    scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
    scaling = config.rope_scaling
    if scaling is not None and scaling.mscale_all_dim:
        scale *= yarn_mscale(scaling, scaling.mscale_all_dim) ** 2
    return scale


def make_attention(key: jax.Array, config: ModelConfig, stack: Stack) -> "SelfAttention | MLA":
    """The layer that `config.attention_kind` names."""
    kind = MLA if config.attention_kind == "mla" else SelfAttention
    return kind(key, config, stack)


def parameter_count(config: ModelConfig) -> int:
    """Parameters of one layer that multiply; its two norms have kv_lora_rank + q_lora_rank more."""
    d, heads, mla = config.d_model, config.num_heads, config.mla
    q_dim, rank = heads * mla.qk_head_dim, mla.q_lora_rank
    query = d * q_dim if rank is None else rank * (d + q_dim)
    kv = d * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    kv += mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return query + kv + heads * mla.v_head_dim * d
