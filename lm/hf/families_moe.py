"""The families with experts; see `lm.hf.families`."""

from lm.hf.family import Family, Tensor
from lm.hf.keys import Choice, Field, Fixed, Flag, LayerWindows, Rope
from lm.hf.keys_moe import FirstDense, Groups, SharedWidth, SparseLayers, Unread
from lm.hf.parts import ALL_BIASES, BODY, LAYER, MLP, PRE_NORMS, SIZES, linear, norm

__all__ = ["WITH_EXPERTS"]


def _experts(router: str, experts: str, gate: str, up: str, down: str) -> tuple[Tensor, ...]:
    """A router and numbered experts, whose three matrices have these names."""
    front = LAYER + experts + ".{expert}."
    return (
        Tensor("layers/mlp/router/kernel", f"{LAYER}{router}.weight", transpose=True),
        Tensor("layers/mlp/experts/gate", f"{front}{gate}.weight", transpose=True),
        Tensor("layers/mlp/experts/up", f"{front}{up}.weight", transpose=True),
        Tensor("layers/mlp/experts/down", f"{front}{down}.weight", transpose=True),
    )


def _shared(name: str) -> tuple[Tensor, ...]:
    """The shared experts, stored as one MLP."""
    return (
        *linear("layers/mlp/shared/gate", f"{LAYER}{name}.gate_proj", bias=False),
        *linear("layers/mlp/shared/up", f"{LAYER}{name}.up_proj", bias=False),
        *linear("layers/mlp/shared/down", f"{LAYER}{name}.down_proj", bias=False),
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
        *SIZES,
        Field("num_key_value_heads", "num_kv_heads", 8, nullable=True),
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
        *BODY,
        *PRE_NORMS,
        *_experts("block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", "w2"),
    ),
    fields=_NO_Z_LOSS | {"moe.order": "softmax_topk", "moe.normalize": True},
)

QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    rules=(
        *SIZES,
        Field("num_key_value_heads", "num_kv_heads", 4),
        Field("head_dim", "head_dim", None),
        Field("rms_norm_eps", "norm_eps", 1e-6),
        _ACTIVATION,
        Flag("attention_bias", ALL_BIASES, False),
        Flag("tie_word_embeddings", ("tie_embeddings",), False),
        LayerWindows("switch", 4096),
        Rope(),
        Field("num_experts", "moe.experts", 128, alias="num_local_experts"),
        Field(_TOP_K, "moe.top_k", 8),
        Field("moe_intermediate_size", "moe.d_expert", 768),
        Flag("norm_topk_prob", ("moe.normalize",), False),
        Field("router_aux_loss_coef", "moe.balance_weight", 0.001),
        SparseLayers(),
    ),
    tensors=(*BODY, *PRE_NORMS, *MLP, *_experts("mlp.gate", "mlp.experts", *_PROJECTIONS)),
    fields=_NO_Z_LOSS | {"qk_norm": True},
)

QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    rules=(
        *SIZES,
        Field("num_key_value_heads", "num_kv_heads", 16, nullable=True),
        Field("head_dim", "head_dim", None),
        Field("rms_norm_eps", "norm_eps", 1e-6),
        _ACTIVATION,
        Flag("qkv_bias", ("qkv_bias",), True),
        Flag("tie_word_embeddings", ("tie_embeddings",), False),
        LayerWindows("even", 4096),
        Rope(),
        Fixed("use_mrope", False),
        Field("num_experts", "moe.experts", 60),
        Field(_TOP_K, "moe.top_k", 4),
        Field("moe_intermediate_size", "moe.d_expert", 1408),
        SharedWidth(5632),
        Flag("norm_topk_prob", ("moe.normalize",), False),
        Field("router_aux_loss_coef", "moe.balance_weight", 0.001),
        SparseLayers(),
    ),
    tensors=(
        *BODY,
        *PRE_NORMS,
        *MLP,
        *_experts("mlp.gate", "mlp.experts", *_PROJECTIONS),
        *_shared("mlp.shared_expert"),
        *linear("layers/mlp/shared/router", LAYER + "mlp.shared_expert_gate", bias=False),
    ),
    fields=_NO_Z_LOSS | {"moe.shared_gate": True},
)

OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    rules=(
        *SIZES,
        Field("num_key_value_heads", "num_kv_heads", None),
        Field("rms_norm_eps", "norm_eps", 1e-5),
        _ACTIVATION,
        Flag("attention_bias", ALL_BIASES, False),
        Flag("tie_word_embeddings", ("tie_embeddings",), False),
        Rope(),
        Field("num_experts", "moe.experts", 64),
        Field(_TOP_K, "moe.top_k", 8),
        Flag("norm_topk_prob", ("moe.normalize",), False),
        Field("router_aux_loss_coef", "moe.balance_weight", 0.01),
        Fixed("clip_qkv"),
    ),
    tensors=(*BODY, *PRE_NORMS, *_experts("mlp.gate", "mlp.experts", *_PROJECTIONS)),
    fields=_NO_Z_LOSS | {"qk_norm": True, "qk_norm_full": True},
)

_ATTENTION = LAYER + "self_attn."
_DEEPSEEK_TENSORS = (
    Tensor("embedding", "model.embed_tokens.weight"),
    *linear("layers/attention/query", _ATTENTION + "q_proj", bias=False),
    *linear("layers/attention/query_down", _ATTENTION + "q_a_proj", bias=False),
    norm("layers/attention/query_norm", _ATTENTION + "q_a_layernorm"),
    *linear("layers/attention/query_up", _ATTENTION + "q_b_proj", bias=False),
    *linear("layers/attention/kv_down", _ATTENTION + "kv_a_proj_with_mqa", bias=False),
    norm("layers/attention/kv_norm", _ATTENTION + "kv_a_layernorm"),
    *linear("layers/attention/kv_up", _ATTENTION + "kv_b_proj", bias=False),
    *linear("layers/attention/out", _ATTENTION + "o_proj", bias=False),
    *PRE_NORMS,
    *MLP,
    *_experts("mlp.gate", "mlp.experts", *_PROJECTIONS),
    *_shared("mlp.shared_experts"),
    norm("final_norm", "model.norm"),
    *linear("head", "lm_head", bias=False),
)


def _deepseek_rules(experts: int, first_dense: int, scale: float, width: int, heads: int | None):
    """What V2 and V3 have in common, with their own defaults."""
    return (
        *SIZES,
        Field("num_key_value_heads", "num_kv_heads", heads, nullable=True),
        Field("rms_norm_eps", "norm_eps", 1e-6),
        _ACTIVATION,
        Fixed("attention_bias", False),
        Fixed("mlp_bias", False),
        Flag("tie_word_embeddings", ("tie_embeddings",), False),
        Rope(mscale=True),
        Field("q_lora_rank", "mla.q_lora_rank", 1536, nullable=True),
        Field("kv_lora_rank", "mla.kv_lora_rank", 512),
        Field("qk_nope_head_dim", "mla.qk_nope_head_dim", 128),
        Field("qk_rope_head_dim", "mla.qk_rope_head_dim", 64),
        Field("v_head_dim", "mla.v_head_dim", 128),
        # Both follow from the last three, also in transformers.
        Unread(("head_dim", "qk_head_dim")),
        Field("n_routed_experts", "moe.experts", experts),
        Field("n_shared_experts", "moe.shared"),
        Field(_TOP_K, "moe.top_k"),
        Field("moe_intermediate_size", "moe.d_expert", width),
        Field("routed_scaling_factor", "moe.scale", scale),
        Field("aux_loss_alpha", "moe.balance_weight", 0.001),
        Flag("seq_aux", ("moe.balance_per_sequence",), True),
        FirstDense(first_dense),
        Fixed("moe_layer_freq", 1, written=True),
        Unread(("ep_size",)),  # devices along which experts lie
    )


def _code(version: str) -> tuple[str, ...]:
    """What `auto_map` names in the files of a version: its classes, since in transformers."""
    names = ("Config", "Model", "ForCausalLM")
    modules = ("configuration", "modeling", "modeling")
    return tuple(f"{m}_deepseek.Deepseek{version}{n}" for m, n in zip(modules, names, strict=True))


DEEPSEEK_V2 = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    rules=(
        *_deepseek_rules(64, first_dense=0, scale=1.0, width=1407, heads=None),
        Groups((("greedy", "plain"), ("group_limited_greedy", "grouped")), "greedy"),
        Fixed("scoring_func", "softmax", written=True),
        # transformers reads it and does not apply it, the model's first code divides by the sum
        # but leaves out the factor: what is meant would be a guess.
        Fixed("norm_topk_prob", False, written=True),
    ),
    tensors=_DEEPSEEK_TENSORS,
    fields=_NO_Z_LOSS | {"moe.scoring": "softmax", "moe.normalize": False, "rope_interleave": True},
    code=_code("V2"),
)

DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    rules=(
        *_deepseek_rules(256, first_dense=3, scale=2.5, width=2048, heads=128),
        Groups((("noaux_tc", "grouped"),), "noaux_tc", groups=8, kept=4),
        Fixed("scoring_func", "sigmoid", written=True),
        Flag("norm_topk_prob", ("moe.normalize",), True, nullable=True),
        Flag("rope_interleave", ("rope_interleave",), True, nullable=True),
        # Heads that predict further tokens: they change nothing of the next token's logits.
        Unread(("num_nextn_predict_layers", "num_mtp_layers"), (("num_nextn_predict_layers", 0),)),
    ),
    tensors=(
        *_DEEPSEEK_TENSORS,
        Tensor("layers/mlp/router/bias", LAYER + "mlp.gate.e_score_correction_bias"),
    ),
    # The rate with which V3 moved its selection biases (arXiv 2412.19437, section 4.2).
    fields=_NO_Z_LOSS | {"moe.scoring": "sigmoid", "moe.bias_rate": 1e-3},
    code=_code("V3"),
    more_layers=True,
)

WITH_EXPERTS = (MIXTRAL, QWEN3_MOE, QWEN2_MOE, OLMOE, DEEPSEEK_V2, DEEPSEEK_V3)
"""In the order in which they are tried for a model of ours."""
