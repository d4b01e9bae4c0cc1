"""config.json: what is refused (test_published.py has what is not)."""

import json

import pytest

import lm.hf
from lm.config import ConfigError
from lm.hf.config import read_config


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
        ("olmo2", {"rope_parameters": {"type": "linear", "factor": "2"}}, "factor must be a num"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "odd": 1}}, "'odd'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types must hold 2 names"),
        ("qwen2", {"layer_types": ["full_attention", "chunked"]}, "layer_types must hold 2 names"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types differs"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}, "leave no layer with experts"),
        ("qwen3_moe", {"mlp_only_layers": [7]}, "mlp_only_layers must list layers below 2"),
        ("qwen3_moe", {"decoder_sparse_step": 1.5}, "decoder_sparse_step must be a whole number"),
        ("qwen2_moe", {"use_sliding_window": False}, "layer_types has sliding layers"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'.*'greedy'"),
        ("deepseek_v2", {"n_group": None}, "n_group must be a whole number for group_limited"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ("deepseek_v2", {"n_shared_experts": None}, "key 'n_shared_experts' is missing"),
        ("deepseek_v2", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map.*code of its own"),
        ("deepseek_v3", {"first_k_dense_replace": 3}, "first_k_dense_replace is 3"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias is True"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_kv_heads is 2.*must be 4"),
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
