"""Rotary position embedding (arXiv 2104.09864), in the half-split layout of Llama checkpoints."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lm.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig, local: bool = False) -> tuple[np.ndarray, float]:
    """Angular frequency of each pair of dimensions, and the factor on cos and sin.

    `local`: those of sliding layers, if `config.rope_theta_local` gives them their own.

    Returns:
      (inv_freq, attention_factor): f64 array [rope_dim / 2] in radians per token, and the scalar
      that YaRN multiplies cos and sin by (1.0 otherwise).
    """
    width = config.rope_dim
    half = np.arange(0, width, 2, dtype=np.float64)
    theta = config.rope_theta_local if local else config.rope_theta
    # Rounded to f32 at each step, as in the code that pretrained models were made with: an angle is
    # frequency times position, so at position 3,000 a last bit shows in the logits.
    exponents = (half / width).astype(np.float32)
    powers = (theta ** exponents.astype(np.float64)).astype(np.float32)
    inv_freq = (np.float32(1) / powers).astype(np.float64)
    scaling = config.rope_scaling
    if scaling is None or local:
        return inv_freq, 1.0
    if scaling.kind == "linear":
        return inv_freq / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(inv_freq, scaling), 1.0
    factor = scaling.attention_factor
    if factor is None and scaling.mscale and scaling.mscale_all_dim:
        factor = yarn_mscale(scaling, scaling.mscale) / yarn_mscale(scaling, scaling.mscale_all_dim)
    elif factor is None:
        factor = yarn_mscale(scaling)
    return _yarn(inv_freq, scaling, width, config.rope_theta), factor


def yarn_mscale(scaling: RopeScaling, mscale: float = 1.0) -> float:
    """0.1 mscale ln(factor) + 1 (arXiv 2309.00071, section 3.4; mscale is DeepSeek-V2's)."""
    return 0.1 * mscale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0


def _llama3(inv_freq, scaling: RopeScaling):
    # Rotations over the original context decide: few are interpolated, many are kept.
    rotations = scaling.original_context * inv_freq / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return (1 - keep) * inv_freq / scaling.factor + keep * inv_freq


def _yarn(inv_freq, scaling: RopeScaling, width: int, theta: float):
    def dimension(rotations: float) -> float:
        # Index of the pair that turns `rotations` times over the original context.
        log_ratio = math.log(scaling.original_context / (rotations * 2 * math.pi))
        return width * log_ratio / (2 * math.log(theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), width - 1)
    ramp = (np.arange(width // 2) - low) / max(high - low, 1e-3)
    interpolate = np.clip(ramp, 0.0, 1.0)
    return interpolate * inv_freq / scaling.factor + (1 - interpolate) * inv_freq


def cos_sin(
    positions: Int[Array, "B T"], config: ModelConfig, local: bool = False
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """cos and sin of position times frequency, in f32 (bf16 cannot tell positions above 256)."""
    inv_freq, factor = inverse_frequencies(config, local)
    inv_freq = jnp.asarray(inv_freq, jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * inv_freq[None, None]
    # Made once: XLA would make them again within each product of each layer and head.
    return jax.lax.optimization_barrier((jnp.cos(angles) * factor, jnp.sin(angles) * factor))


def rotate(
    x: Float[Array, "B T N H"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    interleave: bool = False,
) -> Float[Array, "B T N H"]:
    """Turn each pair (x[i], x[i + H/2]) by its position's angle; f32 inside, dtype of x out.

    `interleave`: the pairs are (x[2 i], x[2 i + 1]).
    """
    x32 = x.astype(jnp.float32)
    if interleave:
        first, second = x32[..., 0::2], x32[..., 1::2]
    else:
        first, second = jnp.split(x32, 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = (first * cos - second * sin, second * cos + first * sin)
    if interleave:
        return jnp.stack(turned, axis=-1).reshape(x.shape).astype(x.dtype)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def positions_from_segments(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Index of each token within its document: restarts at 0 wherever the segment id changes."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1])[None], segment_ids.shape)
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = jnp.pad(starts, ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
