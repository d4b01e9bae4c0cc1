"""The families, each one table. A new family is one entry here, and one fixture in the tests.

Names and defaults are those of the configuration and model classes of transformers. Families with
experts are in `lm.hf.families_moe`.
"""

from lm.hf.families_moe import WITH_EXPERTS
from lm.hf.family import Family, Tensor
from lm.hf.keys import Choice, Field, Fixed, Flag, LayerWindows, MlpWidth, Rope
from lm.hf.parts import (
    ALL_BIASES,
    BODY,
    BOTH_NORMS,
    MLP,
    POST_NORMS,
    PRE_NORMS,
    SILU,
    SIZES,
    linear,
    norm,
)

__all__ = ["FAMILIES"]

_LLAMA_TENSORS = (*BODY, *MLP, *PRE_NORMS)

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    rules=(
        *SIZES,
        Field("num_key_value_heads", "num_kv_heads", None),
        Field("head_dim", "head_dim", None),
        Field("rms_norm_eps", "norm_eps", 1e-6),
        SILU,
        Flag("attention_bias", ALL_BIASES, False),
        Flag("mlp_bias", ("mlp_bias",), False),
        Flag("tie_word_embeddings", ("tie_embeddings",), False),
        Rope(),
        Fixed("rope_interleaved", False),
    ),
    tensors=_LLAMA_TENSORS,
)

MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    rules=(
        *SIZES,
        Field("num_key_value_heads", "num_kv_heads", 8, nullable=True),
        Field("head_dim", "head_dim", None),
        Field("rms_norm_eps", "norm_eps", 1e-6),
        SILU,
        Flag("tie_word_embeddings", ("tie_embeddings",), False),
        LayerWindows("all", 4096),
        Rope(),
    ),
    tensors=_LLAMA_TENSORS,
)

QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    rules=(
        *SIZES,
        Field("num_key_value_heads", "num_kv_heads", 32, nullable=True),
        Field("head_dim", "head_dim", None),
        Field("rms_norm_eps", "norm_eps", 1e-6),
        SILU,
        Flag("tie_word_embeddings", ("tie_embeddings",), False),
        LayerWindows("upper", 4096),
        Rope(),
        Fixed("use_mrope", False),
    ),
    tensors=_LLAMA_TENSORS,
    fields={"qkv_bias": True},
)

QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    rules=(
        *SIZES,
        Field("num_key_value_heads", "num_kv_heads", 32, nullable=True),
        Field("head_dim", "head_dim", 128),
        Field("rms_norm_eps", "norm_eps", 1e-6),
        SILU,
        Flag("attention_bias", ALL_BIASES, False),
        Flag("tie_word_embeddings", ("tie_embeddings",), False),
        LayerWindows("upper", 4096),
        Rope(),
    ),
    tensors=_LLAMA_TENSORS,
    fields={"qk_norm": True},
)

_GEMMA_RULES = (
    *SIZES,
    Field("num_key_value_heads", "num_kv_heads", 4),
    Field("head_dim", "head_dim", 256),
    Field("rms_norm_eps", "norm_eps", 1e-6),
    Choice("hidden_activation", "mlp", {"gelu_pytorch_tanh": "geglu"}, "gelu_pytorch_tanh"),
    # transformers does not read it, but files hold it, and another value would be a surprise.
    Fixed("hidden_act", "gelu_pytorch_tanh"),
    Flag("attention_bias", ALL_BIASES, False),
    Flag("tie_word_embeddings", ("tie_embeddings",), True),
    Field("query_pre_attn_scalar", "query_pre_attn_scalar", 256, whole=True),
    Fixed("use_bidirectional_attention", False),
)
_GEMMA_FIELDS = {"norm_position": "both", "norm_unit_offset": True, "embedding_scale": True}

GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    rules=(
        *_GEMMA_RULES,
        Field("final_logit_softcapping", "logit_soft_cap", 30.0, nullable=True),
        Field("attn_logit_softcapping", "attention_soft_cap", 50.0, nullable=True),
        LayerWindows("period", 4096, 2),
        Rope(),
    ),
    tensors=(*BODY, *MLP, *BOTH_NORMS),
    fields=_GEMMA_FIELDS,
)

GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    rules=(
        *_GEMMA_RULES,
        Field("final_logit_softcapping", "logit_soft_cap", None),
        # transformers reads it and does not apply it: what is meant would be a guess.
        Fixed("attn_logit_softcapping"),
        LayerWindows("period", 4096, 6),
        Rope(1_000_000.0, local_theta=10_000.0),
    ),
    tensors=(*BODY, *MLP, *BOTH_NORMS),
    fields=_GEMMA_FIELDS | {"qk_norm": True},
)

OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    rules=(
        *SIZES,
        Field("num_key_value_heads", "num_kv_heads", None),
        Field("head_dim", "head_dim", None),
        Field("rms_norm_eps", "norm_eps", 1e-5),
        SILU,
        Flag("attention_bias", ALL_BIASES, False),
        Flag("tie_word_embeddings", ("tie_embeddings",), False),
        Rope(),
    ),
    tensors=(*BODY, *MLP, *POST_NORMS),
    fields={"norm_position": "post", "qk_norm": True, "qk_norm_full": True},
)

_BLOCK = "transformer.h.{layer}."


def _conv1d(param: str, name: str, part: tuple[int, int] | None = None) -> tuple[Tensor, ...]:
    """GPT-2's Conv1D, a matrix [in, out], here perhaps one part of several side by side."""
    return (
        Tensor(f"{param}/kernel", f"{name}.weight", part=part),
        Tensor(f"{param}/bias", f"{name}.bias", part=part),
    )


def _layer_norm(param: str, name: str) -> tuple[Tensor, ...]:
    return norm(param, name), Tensor(f"{param}/bias", f"{name}.bias")


GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    rules=(
        Field("vocab_size", "vocab_size", 50_257),
        Field("n_embd", "d_model", 768),
        Field("n_layer", "num_layers", 12),
        Field("n_head", "num_heads", 12),
        Field("n_positions", "max_context", 1024),
        MlpWidth(),
        Field("layer_norm_epsilon", "norm_eps", 1e-5),
        Choice(
            "activation_function",
            "mlp",
            {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"},
            "gelu_new",
        ),
        Flag("tie_word_embeddings", ("tie_embeddings",), True),
        Fixed("scale_attn_weights", True),
        Fixed("scale_attn_by_inverse_layer_idx", False),
        Fixed("add_cross_attention", False),
        Fixed("is_encoder_decoder", False),
        Fixed("per_layer_config"),
    ),
    tensors=(
        Tensor("embedding", "transformer.wte.weight"),
        Tensor("position_embedding", "transformer.wpe.weight"),
        *_layer_norm("layers/attention_norm", _BLOCK + "ln_1"),
        *_conv1d("layers/attention/query", _BLOCK + "attn.c_attn", (0, 3)),
        *_conv1d("layers/attention/key", _BLOCK + "attn.c_attn", (1, 3)),
        *_conv1d("layers/attention/value", _BLOCK + "attn.c_attn", (2, 3)),
        *_conv1d("layers/attention/out", _BLOCK + "attn.c_proj"),
        *_layer_norm("layers/mlp_norm", _BLOCK + "ln_2"),
        *_conv1d("layers/mlp/up", _BLOCK + "mlp.c_fc"),
        *_conv1d("layers/mlp/down", _BLOCK + "mlp.c_proj"),
        *_layer_norm("final_norm", "transformer.ln_f"),
        *linear("head", "lm_head", bias=False),
    ),
    fields={
        "norm": "layer",
        "positions": "learned",
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
    },
    prefix="transformer.",
    buffers=(r".*h\.\d+\.attn\.(bias|masked_bias)",),
)

_DENSE = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, OLMO2, GPT2)
FAMILIES: dict[str, Family] = {family.model_type: family for family in (*_DENSE, *WITH_EXPERTS)}
"""By `model_type`. A model of ours is written as the first family that can hold it."""
