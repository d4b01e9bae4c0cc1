"""config.json in and out: files of published models, and what is refused."""

import json

import pytest

import lm.hf
from lm.config import ConfigError, RopeScaling
from lm.hf.config import read_config, write_config

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
    "name,keys,message",
    [
        ("llama", {"model_type": "mamba"}, "model_type 'mamba' is not known; there are llama"),
        ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map.*code of its own"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantized checkpoints cannot be read"),
        ("llama", {"architectures": ["LlamaForTokenClassification"]}, "not a language model"),
        ("llama", {"residual_multiplier": 0.2}, "key 'residual_multiplier' is not understood"),
        ("llama", {"a_scale": 1, "b_scale": 2}, "keys 'a_scale', 'b_scale' are not understood"),
        ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'.*'silu'"),
        ("llama", {"hidden_size": None}, "key 'hidden_size' is missing"),
        ("llama", {"hidden_size": "32"}, "hidden_size must be a number, got '32'"),
        ("llama", {"num_attention_heads": 0}, "num_heads must be above 0, got 0"),
        ("llama", {"num_attention_heads": 5}, "num_heads .5. must be a multiple of num_kv_heads"),
        ("llama", {"mlp_bias": "no"}, "mlp_bias must be true or false"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        ("llama", {"rope_parameters": {"rope_theta": "x"}}, "base of a rotary embedding"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a number"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "odd": 1}}, "'odd'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types must hold 2 names"),
        ("qwen2", {"layer_types": ["full_attention", "chunked"]}, "layer_types must hold 2 names"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types differs"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers is .0."),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
    ],
    ids=str,
)
def test_what_is_not_understood_is_an_error_that_names_the_key(altered, name, keys, message):
    folder = altered(name, **keys)
    with pytest.raises(ConfigError, match=message) as error:
        lm.hf.load(folder)
    assert f"{folder}/config.json" in str(error.value) and "\n" not in str(error.value)


def test_yarn_with_two_scales_becomes_their_ratio(altered):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    content = json.loads((altered("qwen2") / "config.json").read_text())
    content["rope_parameters"] = rope | {"mscale": 1.0, "mscale_all_dim": 0.5}
    _, config = read_config(content, "", "float32")
    # (0.1 ln 4 + 1) / (0.05 ln 4 + 1), the formula of the YaRN code for two scales
    assert config.rope_scaling.attention_factor == pytest.approx(1.138629 / 1.069315, rel=1e-5)
