"""What a decoder is: one frozen, hashable, validated dataclass.

`ModelConfig` covers Llama 2/3, Mistral, Qwen2, Qwen3 and GPT-style sizes. It imports neither JAX
nor Flax, so reading or checking a configuration costs nothing.
"""

import dataclasses
import math
from typing import Any, Literal

DTYPES = ("float32", "bfloat16", "float16")


class ConfigError(ValueError):
    """A configuration value that cannot work; the message names the value and the remedy."""


def check(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def check_positive(config: Any, *names: str) -> None:
    """Raise `ConfigError` unless each named field of `config` is a number above zero."""
    for name in names:
        value = getattr(config, name)
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        check(
            good and math.isfinite(value) and value > 0,
            f"{type(config).__name__}.{name} must be above 0, got {value!r}",
        )
        whole = type(config).__dataclass_fields__[name].type in (int, int | None)
        check(
            isinstance(value, int) or not whole,
            f"{type(config).__name__}.{name} must be a whole number, got {value!r}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context they were trained on.

    kind "linear" divides every frequency by `factor` (arXiv 2306.15595). "llama3" divides only low
    frequencies and interpolates in between (Llama 3.1 model card). "yarn" ramps per dimension and
    scales attention by 0.1 ln(factor) + 1 (arXiv 2309.00071, sections 3.2 and 3.4).
    """

    kind: Literal["linear", "llama3", "yarn"] = "llama3"
    factor: float = 8.0
    original_context: int = 8192
    """Context length of the original training, in tokens."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_context / low_freq_factor are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_context / high_freq_factor are kept."""
    beta_fast: float = 32.0
    """yarn: dimensions with more rotations than this over the original context are kept."""
    beta_slow: float = 1.0
    """yarn: dimensions with fewer rotations than this are divided by `factor`."""
    attention_factor: float | None = None
    """yarn: multiplies cos and sin; None is 0.1 ln(factor) + 1."""

    def __post_init__(self):
        check_positive(self, "factor", "original_context", "low_freq_factor", "high_freq_factor")
        check_positive(self, "beta_fast", "beta_slow")
        check(
            self.kind in ("linear", "llama3", "yarn"),
            f"RopeScaling.kind must be linear, llama3 or yarn, got {self.kind!r}",
        )
        check(
            self.high_freq_factor > self.low_freq_factor,
            f"RopeScaling.high_freq_factor ({self.high_freq_factor}) must exceed low_freq_factor "
            f"({self.low_freq_factor})",
        )
        check(
            self.beta_fast > self.beta_slow,
            f"RopeScaling.beta_fast ({self.beta_fast}) must exceed beta_slow ({self.beta_slow})",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer with RMSNorm, rotary embedding and grouped-query attention."""

    vocab_size: int = 32_000
    """Rows of the embedding. May exceed the tokenizer's size (rounding up helps sharding)."""
    num_layers: int = 12
    d_model: int = 768
    """Width of the residual stream."""
    num_heads: int = 12
    num_kv_heads: int | None = None
    """Key/value heads; None means num_heads (no grouping)."""
    head_dim: int | None = None
    """Width of one head; None means d_model / num_heads."""
    d_ff: int = 2048
    """Hidden width of the MLP."""
    mlp: str = "swiglu"
    """Registered MLP kind (`lm.layers.mlp.MLPS`): "swiglu", "gelu", or an expert layer."""
    max_context: int = 4096
    """Longest sequence the model is meant for, in tokens."""
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    """RMSNorm on each query and key head before the rotary embedding (Qwen3)."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    attention_out_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    """Tokens that a "sliding" layer attends to, itself included; None means all."""
    attention_pattern: tuple[Literal["full", "sliding"], ...] = ()
    """Kinds of attention, repeated over the layers; () means "sliding" everywhere if
    sliding_window is set, else "full"."""
    tie_embeddings: bool = False
    logit_soft_cap: float | None = None
    """logits become cap * tanh(logits / cap)."""
    init_std: float = 0.02
    """Standard deviation of the embedding's normal initialization (see lm/model.py)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Dtype of activations and matrix products."""
    param_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype in which parameters are held and updated."""
    remat: Literal["none", "dots", "attention", "full"] = "none"
    """What the backward pass recomputes (`lm.model.REMAT_POLICIES`)."""
    unroll: int = 1
    """Models of at most this many layers are compiled without a loop over them: a few per cent
    faster on CPUs, slower to compile."""
    attention: str | None = None
    """Attention implementation by name (`lm.layers.attention`); None picks for the device."""
    loss: str | None = None
    """Cross-entropy implementation by name (`lm.loss`); None picks for the device."""

    def __post_init__(self):
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        check_positive(self, "vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads")
        check_positive(self, "unroll", "d_ff", "max_context", "norm_eps", "rope_theta", "init_std")
        if self.head_dim is None:
            check(
                self.d_model % self.num_heads == 0,
                f"d_model ({self.d_model}) is not a multiple of num_heads ({self.num_heads}): "
                "change one of them or give head_dim",
            )
            object.__setattr__(self, "head_dim", self.d_model // self.num_heads)
        check_positive(self, "head_dim")
        check(
            self.head_dim % 2 == 0,
            f"head_dim must be even for the rotary embedding, got {self.head_dim}",
        )
        check(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
            f"({self.num_kv_heads})",
        )
        for name in ("dtype", "param_dtype"):
            value = getattr(self, name)
            check(value in DTYPES, f"{name} must be one of {', '.join(DTYPES)}, got {value!r}")
        check(
            self.remat in ("none", "dots", "attention", "full"),
            f"remat must be none, dots, attention or full, got {self.remat!r}",
        )
        object.__setattr__(self, "attention_pattern", tuple(self.attention_pattern))
        for kind in self.attention_pattern:
            check(
                kind in ("full", "sliding"),
                f"attention_pattern holds {kind!r}; each entry is 'full' or 'sliding'",
            )
        if self.sliding_window is not None:
            check_positive(self, "sliding_window")
        check(
            self.sliding_window is not None or "sliding" not in self.attention_pattern,
            "attention_pattern has 'sliding' layers but sliding_window is not set",
        )
        if self.logit_soft_cap is not None:
            check_positive(self, "logit_soft_cap")

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer kind in one period of the pattern (None: full)."""
        kinds = self.attention_pattern or (("sliding",) if self.sliding_window else ("full",))
        return tuple(self.sliding_window if kind == "sliding" else None for kind in kinds)
