"""config.json of published models, read and written."""

import pytest

from lm.config import RopeScaling
from lm.hf.config import read_config, write_config
from lm.train.flops import parameter_count

COMMON = {"torch_dtype": "bfloat16", "use_cache": True, "transformers_version": "4.44.0"}


def sizes(d, f, layers, heads, kv_heads, vocabulary, context):
    return {
        "hidden_size": d,
        "intermediate_size": f,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
    }


# What the files of these models on the Hub say, as transformers 4 wrote them.
PUBLISHED = {
    "Llama-3.2-1B": (
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            **sizes(2048, 8192, 16, 32, 8, 128_256, 131_072),
            "head_dim": 64,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "bos_token_id": 128_000,
            "eos_token_id": 128_001,
        },
        {
            "rope_scaling": RopeScaling(kind="llama3", factor=32.0, original_context=8192),
            "tie_embeddings": True,
            "num_kv_heads": 8,
            "windows": (None,),
        },
    ),
    "Mistral-7B-v0.1": (
        {
            "model_type": "mistral",
            **sizes(4096, 14_336, 32, 32, 8, 32_000, 32_768),
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
        },
        {"windows": (4096,), "head_dim": 128},
    ),
    "Mistral-7B-v0.3": (
        {
            "model_type": "mistral",
            **sizes(4096, 14_336, 32, 32, 8, 32_768, 32_768),
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "sliding_window": None,
        },
        {"windows": (None,), "rope_theta": 1e6},
    ),
    "Qwen2.5-0.5B": (
        {
            "model_type": "qwen2",
            **sizes(896, 4864, 24, 14, 2, 151_936, 32_768),
            "hidden_act": "silu",
            "max_window_layers": 24,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000.0,
            "sliding_window": 32_768,
            "use_mrope": False,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
        },
        {"windows": (None,), "qkv_bias": True, "attention_out_bias": False},
    ),
    "gemma-2-2b": (
        {
            "model_type": "gemma2",
            **sizes(2304, 9216, 26, 8, 4, 256_000, 8192),
            "head_dim": 256,
            "attention_bias": False,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "cache_implementation": "hybrid",
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10_000.0,
            "sliding_window": 4096,
        },
        {
            "windows": (4096, None),
            "attention_soft_cap": 50.0,
            "logit_soft_cap": 30.0,
            "tie_embeddings": True,
            "norm_position": "both",
            "mlp": "geglu",
        },
    ),
    "gemma-3-1b-pt": (
        {
            "model_type": "gemma3_text",
            **sizes(1152, 6912, 26, 4, 1, 262_144, 32_768),
            "head_dim": 256,
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "cache_implementation": "hybrid",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-6,
            "rope_local_base_freq": 10_000,
            "rope_scaling": None,
            "rope_theta": 1_000_000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
        {
            "windows": (512, 512, 512, 512, 512, None),
            "rope_theta": 1e6,
            "rope_theta_local": 1e4,
            "qk_norm": True,
            "logit_soft_cap": None,
        },
    ),
    "OLMo-2-1124-7B": (
        {
            "model_type": "olmo2",
            **sizes(4096, 11_008, 32, 32, 32, 100_352, 4096),
            "attention_bias": False,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 500_000,
            "tie_word_embeddings": False,
        },
        {"norm_position": "post", "qk_norm_full": True, "windows": (None,)},
    ),
    "Mixtral-8x7B-v0.1": (
        {
            "model_type": "mixtral",
            **sizes(4096, 14_336, 32, 32, 8, 32_000, 32_768),
            "hidden_act": "silu",
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
        },
        {"mlp": "moe", "d_expert": 14_336, "windows": (None,)},
    ),
    "Qwen3-30B-A3B": (
        {
            "model_type": "qwen3_moe",
            **sizes(2048, 6144, 48, 32, 4, 151_936, 40_960),
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_act": "silu",
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 1_000_000.0,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "use_sliding_window": False,
        },
        {"mlp": "moe", "d_expert": 768, "qk_norm": True, "head_dim": 128},
    ),
    "Qwen1.5-MoE-A2.7B": (
        {
            "model_type": "qwen2_moe",
            **sizes(2048, 5632, 24, 16, 16, 151_936, 8192),
            "decoder_sparse_step": 1,
            "hidden_act": "silu",
            "max_window_layers": 21,
            "moe_intermediate_size": 1408,
            "norm_topk_prob": False,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "output_router_logits": False,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000.0,
            "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": 5632,
            "sliding_window": 32_768,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
        },
        {"mlp": "moe", "d_expert": 1408, "shared_width": 5632, "qkv_bias": True},
    ),
    "DeepSeek-V2-Lite": (
        {
            "model_type": "deepseek_v2",
            "architectures": ["DeepseekV2ForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_deepseek.DeepseekV2Config",
                "AutoModel": "modeling_deepseek.DeepseekV2Model",
                "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
            },
            **sizes(2048, 10_944, 27, 16, 16, 102_400, 163_840),
            "attention_bias": False,
            "aux_loss_alpha": 0.001,
            "first_k_dense_replace": 1,
            "hidden_act": "silu",
            "kv_lora_rank": 512,
            "moe_intermediate_size": 1408,
            "moe_layer_freq": 1,
            "n_group": 1,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "num_experts_per_tok": 6,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 40,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
                "original_max_position_embeddings": 4096,
                "type": "yarn",
            },
            "rope_theta": 10_000,
            "routed_scaling_factor": 1.0,
            "scoring_func": "softmax",
            "seq_aux": True,
            "topk_group": 1,
            "topk_method": "greedy",
            "v_head_dim": 128,
        },
        {
            "attention_kind": "mla",
            "head_dim": 192,
            "stacks": {"layers": tuple(range(1, 27)), "dense_layers": (0,)},
            "shared_width": 2816,
            "rope_scaling": RopeScaling(
                kind="yarn", factor=40, original_context=4096, mscale=0.707, mscale_all_dim=0.707
            ),
        },
    ),
    "DeepSeek-V3": (  # without quantization_config, as after a conversion to bfloat16
        {
            "model_type": "deepseek_v3",
            "auto_map": {
                "AutoConfig": "configuration_deepseek.DeepseekV3Config",
                "AutoModel": "modeling_deepseek.DeepseekV3Model",
                "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
            },
            **sizes(7168, 18_432, 61, 128, 128, 129_280, 163_840),
            "aux_loss_alpha": 0.001,
            "ep_size": 1,
            "first_k_dense_replace": 3,
            "kv_lora_rank": 512,
            "moe_intermediate_size": 2048,
            "moe_layer_freq": 1,
            "n_group": 8,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_experts_per_tok": 8,
            "num_nextn_predict_layers": 1,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 40,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096,
                "type": "yarn",
            },
            "rope_theta": 10_000,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "seq_aux": True,
            "topk_group": 4,
            "topk_method": "noaux_tc",
            "v_head_dim": 128,
        },
        {
            "stacks": {"layers": tuple(range(3, 61)), "dense_layers": (0, 1, 2)},
            "shared_width": 2048,
            "rope_interleave": True,
        },
    ),
    "OLMoE-1B-7B-0924": (
        {
            "model_type": "olmoe",
            **sizes(2048, 1024, 16, 16, 16, 50_304, 4096),
            "attention_bias": False,
            "clip_qkv": None,
            "hidden_act": "silu",
            "norm_topk_prob": False,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 10_000.0,
            "router_aux_loss_coef": 0.01,
        },
        {"mlp": "moe", "qk_norm_full": True, "d_expert": 1024},
    ),
    "gpt2": (
        {
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "architectures": ["GPT2LMHeadModel"],
            "attn_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05,
            "n_ctx": 1024,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "resid_pdrop": 0.1,
            "summary_activation": None,
            "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            "vocab_size": 50_257,
        },
        {"d_ff": 3072, "positions": "learned", "norm": "layer", "tie_embeddings": True},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_of_published_models_are_understood_and_written_alike(name):
    content, fields = PUBLISHED[name]
    family, config = read_config(COMMON | content, name, "bfloat16")
    assert {field: getattr(config, field) for field in fields} == fields
    again = read_config(write_config(family, config, "bfloat16"), name, "bfloat16")
    assert again == (family, config)


@pytest.mark.parametrize(
    "name,total,active",
    [
        # Bytes of the safetensors index over 2; the others as their model cards say.
        ("DeepSeek-V2-Lite", 15_706_484_224, None),
        ("DeepSeek-V3", 671e9, 37e9),
        ("Qwen1.5-MoE-A2.7B", 14.3e9, 2.7e9),
    ],
)
def test_published_sizes_are_those_of_the_models_read(name, total, active):
    _, config = read_config(COMMON | PUBLISHED[name][0], name, "bfloat16")
    assert parameter_count(config) == pytest.approx(total, rel=0 if type(total) is int else 2e-3)
    assert active is None or parameter_count(config, True) == pytest.approx(active, rel=0.02)
