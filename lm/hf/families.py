"""The families, each one table. A new family is one entry here, and one fixture in the tests.

Names and defaults are those of the configuration and model classes of transformers.
"""

from lm.hf.family import Family, Tensor
from lm.hf.keys import Choice, Field, Fixed, Flag, LayerWindows, MlpWidth, Rope

__all__ = ["FAMILIES"]

_LAYER = "model.layers.{layer}."
_SIZES = (
    Field("vocab_size", "vocab_size"),
    Field("hidden_size", "d_model"),
    Field("intermediate_size", "d_ff"),
    Field("num_hidden_layers", "num_layers"),
    Field("num_attention_heads", "num_heads"),
    Field("max_position_embeddings", "max_context"),
    Fixed("is_encoder_decoder", False),
    Fixed("per_layer_config"),
)
_SILU = Choice("hidden_act", "mlp", {"silu": "swiglu", "swish": "swiglu"}, "silu")
_ALL_BIASES = ("qkv_bias", "attention_out_bias")


def _linear(param: str, name: str, bias: bool = True) -> tuple[Tensor, ...]:
    """A torch.nn.Linear: weight [out, in] and, if it may have one, bias."""
    weight = Tensor(f"{param}/kernel", f"{name}.weight", transpose=True)
    return (weight, Tensor(f"{param}/bias", f"{name}.bias")) if bias else (weight,)


def _norm(param: str, name: str) -> Tensor:
    return Tensor(f"{param}/scale", f"{name}.weight")


_BODY = (
    Tensor("embedding", "model.embed_tokens.weight"),
    *_linear("layers/attention/query", _LAYER + "self_attn.q_proj"),
    *_linear("layers/attention/key", _LAYER + "self_attn.k_proj"),
    *_linear("layers/attention/value", _LAYER + "self_attn.v_proj"),
    *_linear("layers/attention/out", _LAYER + "self_attn.o_proj"),
    _norm("layers/attention/query_norm", _LAYER + "self_attn.q_norm"),
    _norm("layers/attention/key_norm", _LAYER + "self_attn.k_norm"),
    _norm("final_norm", "model.norm"),
    *_linear("head", "lm_head", bias=False),
)
_MLP = (
    *_linear("layers/mlp/gate", _LAYER + "mlp.gate_proj"),
    *_linear("layers/mlp/up", _LAYER + "mlp.up_proj"),
    *_linear("layers/mlp/down", _LAYER + "mlp.down_proj"),
)
_PRE_NORMS = (
    _norm("layers/attention_norm", _LAYER + "input_layernorm"),
    _norm("layers/mlp_norm", _LAYER + "post_attention_layernorm"),
)
_POST_NORMS = (
    _norm("layers/attention_post_norm", _LAYER + "post_attention_layernorm"),
    _norm("layers/mlp_post_norm", _LAYER + "post_feedforward_layernorm"),
)
_BOTH_NORMS = (
    _norm("layers/attention_norm", _LAYER + "input_layernorm"),
    _norm("layers/mlp_norm", _LAYER + "pre_feedforward_layernorm"),
    *_POST_NORMS,
)
_LLAMA_TENSORS = (*_BODY, *_MLP, *_PRE_NORMS)

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    rules=(
        *_SIZES,
        Field("num_key_value_heads", "num_kv_heads", None),
        Field("head_dim", "head_dim", None),
        Field("rms_norm_eps", "norm_eps", 1e-6),
        _SILU,
        Flag("attention_bias", _ALL_BIASES, False),
        Flag("mlp_bias", ("mlp_bias",), False),
        Flag("tie_word_embeddings", ("tie_embeddings",), False),
        Rope(),
    ),
    tensors=_LLAMA_TENSORS,
)

MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    rules=(
        *_SIZES,
        Field("num_key_value_heads", "num_kv_heads", 8),
        Field("head_dim", "head_dim", None),
        Field("rms_norm_eps", "norm_eps", 1e-6),
        _SILU,
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
        *_SIZES,
        Field("num_key_value_heads", "num_kv_heads", 32),
        Field("head_dim", "head_dim", None),
        Field("rms_norm_eps", "norm_eps", 1e-6),
        _SILU,
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
        *_SIZES,
        Field("num_key_value_heads", "num_kv_heads", 32),
        Field("head_dim", "head_dim", 128),
        Field("rms_norm_eps", "norm_eps", 1e-6),
        _SILU,
        Flag("attention_bias", _ALL_BIASES, False),
        Flag("tie_word_embeddings", ("tie_embeddings",), False),
        LayerWindows("upper", 4096),
        Rope(),
    ),
    tensors=_LLAMA_TENSORS,
    fields={"qk_norm": True},
)

_GEMMA_RULES = (
    *_SIZES,
    Field("num_key_value_heads", "num_kv_heads", 4),
    Field("head_dim", "head_dim", 256),
    Field("rms_norm_eps", "norm_eps", 1e-6),
    Choice("hidden_activation", "mlp", {"gelu_pytorch_tanh": "geglu"}, "gelu_pytorch_tanh"),
    # transformers does not read it, but files hold it, and another value would be a surprise.
    Fixed("hidden_act", "gelu_pytorch_tanh"),
    Flag("attention_bias", _ALL_BIASES, False),
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
    tensors=(*_BODY, *_MLP, *_BOTH_NORMS),
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
    tensors=(*_BODY, *_MLP, *_BOTH_NORMS),
    fields=_GEMMA_FIELDS | {"qk_norm": True},
)

OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    rules=(
        *_SIZES,
        Field("num_key_value_heads", "num_kv_heads", None),
        Field("head_dim", "head_dim", None),
        Field("rms_norm_eps", "norm_eps", 1e-5),
        _SILU,
        Flag("attention_bias", _ALL_BIASES, False),
        Flag("tie_word_embeddings", ("tie_embeddings",), False),
        Rope(),
    ),
    tensors=(*_BODY, *_MLP, *_POST_NORMS),
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
    return _norm(param, name), Tensor(f"{param}/bias", f"{name}.bias")


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
        *_linear("head", "lm_head", bias=False),
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


def _experts(router: str, experts: str, gate: str, up: str, down: str) -> tuple[Tensor, ...]:
    """A router and numbered experts, whose three matrices have these names."""
    front = _LAYER + experts + ".{expert}."
    return (
        Tensor("layers/mlp/router/kernel", f"{_LAYER}{router}.weight", transpose=True),
        Tensor("layers/mlp/experts/gate", f"{front}{gate}.weight", transpose=True),
        Tensor("layers/mlp/experts/up", f"{front}{up}.weight", transpose=True),
        Tensor("layers/mlp/experts/down", f"{front}{down}.weight", transpose=True),
    )


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Fields of `MoEConfig` with other defaults than training from scratch has.
_NO_Z_LOSS = {"moe.z_weight": 0.0}
_ACTIVATION = Choice("hidden_act", "moe.activation", {"silu": "swiglu", "swish": "swiglu"}, "silu")
_TOP_K = "num_experts_per_tok"

MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    rules=(
        *_SIZES,
        Field("num_key_value_heads", "num_kv_heads", 8),
        Field("head_dim", "head_dim", None),
        Field("rms_norm_eps", "norm_eps", 1e-5),
        _ACTIVATION,
        Flag("tie_word_embeddings", ("tie_embeddings",), False),
        LayerWindows("all", None),
        Rope(1_000_000.0),
        Field("num_local_experts", "moe.experts", 8),
        Field(_TOP_K, "moe.top_k", 2),
        Field("router_aux_loss_coef", "moe.balance_weight", 0.001),
    ),
    tensors=(
        *_BODY,
        *_PRE_NORMS,
        *_experts("block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", "w2"),
    ),
    fields=_NO_Z_LOSS | {"moe.order": "softmax_topk", "moe.normalize": True},
)

QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    rules=(
        *_SIZES,
        Field("num_key_value_heads", "num_kv_heads", 4),
        Field("head_dim", "head_dim", None),
        Field("rms_norm_eps", "norm_eps", 1e-6),
        _ACTIVATION,
        Flag("attention_bias", _ALL_BIASES, False),
        Flag("tie_word_embeddings", ("tie_embeddings",), False),
        LayerWindows("switch", 4096),
        Rope(),
        Field("num_experts", "moe.experts", 128, alias="num_local_experts"),
        Field(_TOP_K, "moe.top_k", 8),
        Field("moe_intermediate_size", "moe.d_expert", 768),
        Flag("norm_topk_prob", ("moe.normalize",), False),
        Field("router_aux_loss_coef", "moe.balance_weight", 0.001),
        Fixed("decoder_sparse_step", 1, written=True),
        Fixed("mlp_only_layers", []),
    ),
    tensors=(*_BODY, *_PRE_NORMS, *_experts("mlp.gate", "mlp.experts", *_PROJECTIONS)),
    fields=_NO_Z_LOSS | {"qk_norm": True},
)

OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    rules=(
        *_SIZES,
        Field("num_key_value_heads", "num_kv_heads", None),
        Field("rms_norm_eps", "norm_eps", 1e-5),
        _ACTIVATION,
        Flag("attention_bias", _ALL_BIASES, False),
        Flag("tie_word_embeddings", ("tie_embeddings",), False),
        Rope(),
        Field("num_experts", "moe.experts", 64),
        Field(_TOP_K, "moe.top_k", 8),
        Flag("norm_topk_prob", ("moe.normalize",), False),
        Field("router_aux_loss_coef", "moe.balance_weight", 0.01),
        Fixed("clip_qkv"),
    ),
    tensors=(*_BODY, *_PRE_NORMS, *_experts("mlp.gate", "mlp.experts", *_PROJECTIONS)),
    fields=_NO_Z_LOSS | {"qk_norm": True, "qk_norm_full": True},
)

_DENSE = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, OLMO2, GPT2)
FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (*_DENSE, MIXTRAL, QWEN3_MOE, OLMOE)
}
"""By `model_type`. A model of ours is written as the first family that can hold it."""
