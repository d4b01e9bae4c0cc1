"""What tables of several families share: sizes, and a decoder's tensors as Llama names them."""

from lm.hf.family import Tensor
from lm.hf.keys import Choice, Field, Fixed

LAYER = "model.layers.{layer}."
SIZES = (
    Field("vocab_size", "vocab_size"),
    Field("hidden_size", "d_model"),
    Field("intermediate_size", "d_ff"),
    Field("num_hidden_layers", "num_layers"),
    Field("num_attention_heads", "num_heads"),
    Field("max_position_embeddings", "max_context"),
    Fixed("is_encoder_decoder", False),
    Fixed("per_layer_config"),
)
SILU = Choice("hidden_act", "mlp", {"silu": "swiglu", "swish": "swiglu"}, "silu")
ALL_BIASES = ("qkv_bias", "attention_out_bias")


def linear(param: str, name: str, bias: bool = True) -> tuple[Tensor, ...]:
    """A torch.nn.Linear: weight [out, in] and, if it may have one, bias."""
    weight = Tensor(f"{param}/kernel", f"{name}.weight", transpose=True)
    return (weight, Tensor(f"{param}/bias", f"{name}.bias")) if bias else (weight,)


def norm(param: str, name: str) -> Tensor:
    """The factor of an RMSNorm or a layer normalization."""
    return Tensor(f"{param}/scale", f"{name}.weight")


BODY = (
    Tensor("embedding", "model.embed_tokens.weight"),
    *linear("layers/attention/query", LAYER + "self_attn.q_proj"),
    *linear("layers/attention/key", LAYER + "self_attn.k_proj"),
    *linear("layers/attention/value", LAYER + "self_attn.v_proj"),
    *linear("layers/attention/out", LAYER + "self_attn.o_proj"),
    norm("layers/attention/query_norm", LAYER + "self_attn.q_norm"),
    norm("layers/attention/key_norm", LAYER + "self_attn.k_norm"),
    norm("final_norm", "model.norm"),
    *linear("head", "lm_head", bias=False),
)
MLP = (
    *linear("layers/mlp/gate", LAYER + "mlp.gate_proj"),
    *linear("layers/mlp/up", LAYER + "mlp.up_proj"),
    *linear("layers/mlp/down", LAYER + "mlp.down_proj"),
)
PRE_NORMS = (
    norm("layers/attention_norm", LAYER + "input_layernorm"),
    norm("layers/mlp_norm", LAYER + "post_attention_layernorm"),
)
POST_NORMS = (
    norm("layers/attention_post_norm", LAYER + "post_attention_layernorm"),
    norm("layers/mlp_post_norm", LAYER + "post_feedforward_layernorm"),
)
BOTH_NORMS = (
    norm("layers/attention_norm", LAYER + "input_layernorm"),
    norm("layers/mlp_norm", LAYER + "pre_feedforward_layernorm"),
    *POST_NORMS,
)
