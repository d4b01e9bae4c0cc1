"""What a decoder is: one frozen, hashable, validated dataclass.

`ModelConfig` covers Llama 2/3, Mistral, Qwen2, Qwen3, Gemma 2/3, OLMo 2 and GPT-2, and with experts
Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE and DeepSeek-V2/V3 (`lm.hf`). It imports neither JAX nor Flax,
so reading or checking a configuration costs nothing.
"""

import dataclasses
import math
from typing import Literal

from lm.checks import ConfigError as ConfigError
from lm.checks import check as check
from lm.checks import check_positive as check_positive
from lm.config_merged import MergedConfig
from lm.config_mla import MLAConfig
from lm.config_moe import MoEConfig

DTYPES = ("float32", "bfloat16", "float16")


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
    mscale: float | None = None
    """yarn, mla: with both, cos and sin are multiplied by m(mscale) / m(mscale_all_dim), with
    m(s) = 0.1 s ln(factor) + 1, where attention_factor does not say otherwise (DeepSeek)."""
    mscale_all_dim: float | None = None
    """yarn, mla: attention scores are multiplied by m(mscale_all_dim)^2 (DeepSeek)."""

    def __post_init__(self):
        check_positive(self, "factor", "original_context", "low_freq_factor", "high_freq_factor")
        check_positive(self, "beta_fast", "beta_slow")
        for name in ("mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                check_positive(self, name)
                check(self.kind == "yarn", f"RopeScaling.{name} is for kind yarn, not {self.kind}")
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
class AdapterConfig:
    """Small trained parts beside frozen projections (`lm.layers.adapters`)."""

    kind: Literal["none", "lora", "loramoe", "head_wise", "multi_head"] = "none"
    """lora: one low-rank pair. loramoe: several behind a router. head_wise: routers and pairs of
    their own for each slice of the input (arXiv 2602.12587). multi_head: one router for parts of
    the low-rank states (after arXiv 2404.15045). none trains the model itself."""
    rank: int = 8
    """Rank of the pair, with lora. The other kinds get the ranks with which as many parameters
    work on a token (`moe.matched_ranks`); multi_head has this one."""
    alpha: float = 32.0
    """What an adapter adds is scaled by alpha / its rank."""
    targets: tuple[str, ...] = ("gate", "up", "down")
    """Projections that get one: query, key, value, out (of attention), gate, up, down."""
    heads: int = 4
    """head_wise, multi_head: slices."""
    experts: int = 4
    """Experts behind each router."""
    top_k: int = 1
    """Experts that work on a token (on a slice of it)."""

    def __post_init__(self):
        kinds = ("none", "lora", "loramoe", "head_wise", "multi_head")
        check(
            self.kind in kinds,
            f"model.adapter.kind must be one of {', '.join(kinds)}, got {self.kind!r}",
        )
        object.__setattr__(self, "targets", tuple(self.targets))
        read = {"kind"}
        read |= {"rank", "alpha", "targets"} if self.kind != "none" else set()
        read |= {"experts", "top_k"} if self.kind not in ("none", "lora") else set()
        read |= {"heads"} if self.kind in ("head_wise", "multi_head") else set()
        for field in dataclasses.fields(self):
            check(
                field.name in read or getattr(self, field.name) == field.default,
                f"model.adapter.{field.name} is given, which adapters of kind {self.kind!r} do not "
                "have: set model.adapter.kind",
            )
        for name in ("rank", "heads", "experts", "top_k"):
            value = getattr(self, name)
            check(
                type(value) is int and value > 0,
                f"model.adapter.{name} must be a whole number above 0, got {value!r}",
            )
        check(
            math.isfinite(self.alpha) and self.alpha > 0,
            f"model.adapter.alpha must be above 0, got {self.alpha}",
        )
        check(
            self.top_k <= self.experts,
            f"model.adapter.top_k ({self.top_k}) exceeds model.adapter.experts ({self.experts})",
        )
        check(
            self.kind != "multi_head" or self.rank % self.heads == 0,
            f"model.adapter.rank ({self.rank}) must be a multiple of model.adapter.heads "
            f"({self.heads}) for kind multi_head",
        )
        check(
            len(self.targets) > 0 and len(set(self.targets)) == len(self.targets),
            f"model.adapter.targets must name each projection once, got {self.targets}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer; by default with pre-RMSNorm, rotary embedding, SwiGLU."""

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
    attention_kind: Literal["grouped", "mla"] = "grouped"
    """grouped: multi-head attention, in which several query heads may share a key and value head.
    mla: multi-head latent attention, which `mla` below describes."""
    mla: MLAConfig = MLAConfig()
    """Latent attention."""
    mlp: str = "swiglu"
    """Registered MLP kind (`lm.layers.mlp.MLPS`): "swiglu", "gelu", "geglu", or "moe", which `moe`
    below describes."""
    moe: MoEConfig = MoEConfig()
    """Expert layers."""
    max_context: int = 4096
    """Longest sequence the model is meant for, in tokens."""
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rope_theta_local: float | None = None
    """Rotary base of "sliding" layers, which rope_scaling then leaves alone (Gemma 3); None is
    rope_theta and its scaling."""
    rope_interleave: bool = False
    """The pairs that are rotated are neighbours, (x[2 i], x[2 i + 1]) (DeepSeek), instead of
    (x[i], x[i + width / 2])."""
    positions: Literal["rotary", "learned"] = "rotary"
    """How a token's position enters: by rotating queries and keys, or by an embedding with
    max_context rows that is added to the tokens' (GPT-2)."""
    norm: Literal["rms", "layer"] = "rms"
    """rms: x / rms(x) * w. layer: (x - mean) / std * w + b (GPT-2)."""
    norm_position: Literal["pre", "post", "both"] = "pre"
    """Where a branch has its norms: before it; behind it, before the residual sum (OLMo 2); or
    both (Gemma 2)."""
    norm_unit_offset: bool = False
    """The factor of an RMSNorm is 1 + w (Gemma)."""
    qk_norm: bool = False
    """RMSNorm on each query and key head before the rotary embedding (Qwen3)."""
    qk_norm_full: bool = False
    """With qk_norm: one norm over all query heads together and one over all key heads (OLMo 2)."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    attention_out_bias: bool = False
    query_pre_attn_scalar: float | None = None
    """Attention scores are divided by the square root of this; None is head_dim (Gemma)."""
    attention_soft_cap: float | None = None
    """Attention scores become cap * tanh(scores / cap) (Gemma 2)."""
    mlp_bias: bool = False
    sliding_window: int | None = None
    """Tokens that a "sliding" layer attends to, itself included; None means all."""
    attention_pattern: tuple[Literal["full", "sliding"], ...] = ()
    """Kinds of attention, repeated over the layers; () means "sliding" everywhere if
    sliding_window is set, else "full"."""
    tie_embeddings: bool = False
    embedding_scale: bool = False
    """The tokens' embeddings are multiplied by sqrt(d_model) (Gemma)."""
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
    adapter: AdapterConfig = AdapterConfig()
    """What is trained beside frozen projections."""
    merged: MergedConfig = MergedConfig()
    """Parts of merged models besides weights."""

    def __post_init__(self):
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        check_positive(self, "vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads")
        check_positive(self, "unroll", "d_ff", "max_context", "norm_eps", "rope_theta", "init_std")
        self._check_experts()
        self._check_latents()
        if self.head_dim is None:
            check(
                self.d_model % self.num_heads == 0,
                f"d_model ({self.d_model}) is not a multiple of num_heads ({self.num_heads}): "
                "change one of them or give head_dim",
            )
            object.__setattr__(self, "head_dim", self.d_model // self.num_heads)
        check_positive(self, "head_dim")
        check(
            self.rope_dim % 2 == 0,
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
        for name in ("logit_soft_cap", "attention_soft_cap", "query_pre_attn_scalar"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        self._check_kinds()

    def _check_kinds(self):
        for name, known in (
            ("positions", ("rotary", "learned")),
            ("norm", ("rms", "layer")),
            ("norm_position", ("pre", "post", "both")),
        ):
            value = getattr(self, name)
            check(value in known, f"{name} must be one of {', '.join(known)}, got {value!r}")
        check(
            not self.norm_unit_offset or self.norm == "rms",
            "norm_unit_offset is for norm 'rms' only",
        )
        check(self.qk_norm or not self.qk_norm_full, "qk_norm_full needs qk_norm")
        if self.rope_theta_local is not None:
            check_positive(self, "rope_theta_local")

    def _check_latents(self):
        """Heads of latent attention follow from `mla`; without it nothing reads `mla`."""
        scaling = self.rope_scaling
        if self.attention_kind != "mla":
            check(
                self.attention_kind == "grouped",
                f"attention_kind must be grouped or mla, got {self.attention_kind!r}",
            )
            for field in dataclasses.fields(self.mla):
                check(
                    getattr(self.mla, field.name) == field.default,
                    f"model.mla.{field.name} is given but model.attention_kind is "
                    f"{self.attention_kind}: add --model.attention-kind mla",
                )
            check(
                scaling is None or not (scaling.mscale or scaling.mscale_all_dim),
                "model.rope_scaling.mscale and mscale_all_dim are for model.attention_kind mla: "
                "give attention_factor instead",
            )
            return
        for name, needed in (
            ("num_kv_heads", self.num_heads),
            ("head_dim", self.mla.qk_head_dim),
            *(("qk_norm", False), ("qkv_bias", False), ("positions", "rotary")),
        ):
            value = getattr(self, name)
            check(
                value in (None, needed),
                f"model.{name} is {value!r}, which latent attention does not have (model."
                f"attention_kind mla): it must be {needed!r}, so leave it out",
            )
        object.__setattr__(self, "head_dim", self.mla.qk_head_dim)

    def _check_experts(self):
        """A flag that no layer would read is a mistake, not a wish."""
        if self.mlp == "moe":
            dense = self.moe.dense_layers
            check(
                all(layer < self.num_layers for layer in dense) and len(dense) < self.num_layers,
                f"model.moe.dense_layers {dense} must lie below model.num_layers "
                f"({self.num_layers}) and leave a layer to the experts",
            )
            check(not self.mlp_bias, "model.mlp_bias is not for model.mlp moe: experts have none")
            inside = {"gate", "up", "down"}.intersection(self.adapter.targets)
            check(
                self.adapter.kind == "none" or not inside,
                "adapters sit on dense projections and model.mlp is moe: set model.adapter.targets "
                "to those of attention (query, key, value, out)",
            )
            return
        for field in dataclasses.fields(self.moe):
            check(
                getattr(self.moe, field.name) == field.default,
                f"model.moe.{field.name} is given but model.mlp is {self.mlp}: add --model.mlp moe",
            )

    @property
    def d_expert(self) -> int:
        """Hidden width of one expert."""
        return self.moe.d_expert or self.d_ff

    @property
    def shared_width(self) -> int:
        """Hidden width of all shared experts of a layer together."""
        return self.moe.shared * (self.moe.d_shared or self.d_expert)

    @property
    def rope_dim(self) -> int:
        """Dimensions of a head that the rotary embedding turns."""
        return self.mla.qk_rope_head_dim if self.attention_kind == "mla" else self.head_dim

    @property
    def stacks(self) -> dict[str, tuple[int, ...]]:
        """Layers of each stack of like ones in the tree of parameters, by the stack's name.

        "layers" are all of them, or those with experts; "dense_layers", which only models with
        `moe.dense_layers` have, are the others.
        """
        dense = self.moe.dense_layers
        layers = tuple(i for i in range(self.num_layers) if i not in dense)
        return {"layers": layers} | ({"dense_layers": dense} if dense else {})

    @property
    def dense(self) -> "ModelConfig":
        """The same model with the MLP of `moe.dense_layers` in all layers."""
        return dataclasses.replace(self, mlp=self.moe.activation, moe=MoEConfig())

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer kind in one period of the pattern (None: full)."""
        kinds = self.attention_pattern or (("sliding",) if self.sliding_window else ("full",))
        return tuple(self.sliding_window if kind == "sliding" else None for kind in kinds)
