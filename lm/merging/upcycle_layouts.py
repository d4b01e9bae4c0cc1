"""How mixture models name their tensors and what their config.json says.

Every layout normalizes the weights of the chosen experts to sum 1, so that equal experts make the
dense model. The facts are those of transformers' configurations and, for DeepSeek-MoE 16B (whose
attention is Llama's), of its own code on the hub.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from lm.merging import architecture as arch
from lm.merging.types import MergeError, Store
from lm.merging.upcycle_config import MoeConfig

__all__ = ["Layout", "choose_layout"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Names are behind `model.layers.N.`."""

    name: str
    model_type: str
    architecture: str
    router: str
    expert: str
    """With {expert} and {projection}."""
    projections: Mapping[str, str]
    shared: str | None = None
    """With {projection}; None: no shared expert."""
    shared_gate: str | None = None
    """[1, d]: the shared expert's output is multiplied by sigmoid(gate . x)."""
    needs_shared: bool = False
    dropped: tuple[str, ...] = ()
    """Keys of the base's config.json that mean nothing here."""

    def settings(self, config: MoeConfig, base: Mapping[str, Any], width: int) -> dict[str, Any]:
        """config.json: the base's with the layout's type and counts. `width`: of an MLP."""
        count, chosen = len(config.experts), config.experts_per_token
        result = {key: value for key, value in base.items() if key not in self.dropped}
        result.pop("auto_map", None)
        result |= {"model_type": self.model_type, "architectures": [self.architecture]}
        result |= {"num_experts_per_tok": chosen, "intermediate_size": width}
        if self.name == "mixtral":
            return result | {"num_local_experts": count, "output_router_logits": False}
        result |= {"moe_intermediate_size": width, "norm_topk_prob": True}
        if self.name == "deepseek":
            shared = len(config.shared_experts)
            hub = "deepseek-ai/deepseek-moe-16b-base--"
            code = {
                "AutoConfig": f"{hub}configuration_deepseek.DeepseekConfig",
                "AutoModel": f"{hub}modeling_deepseek.DeepseekModel",
                "AutoModelForCausalLM": f"{hub}modeling_deepseek.DeepseekForCausalLM",
            }
            return result | {
                "n_routed_experts": count,
                "n_shared_experts": shared or None,
                "first_k_dense_replace": 0,
                "moe_layer_freq": 1,
                "scoring_func": "softmax",
                "auto_map": code,
            }
        result |= {"num_experts": count, "decoder_sparse_step": 1, "mlp_only_layers": []}
        if self.shared:
            result["shared_expert_intermediate_size"] = width
        return result


_SAME = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
_EXPERT = "mlp.experts.{expert}.{projection}.weight"
LAYOUTS = {
    "mixtral": Layout(
        "mixtral",
        "mixtral",
        "MixtralForCausalLM",
        "block_sparse_moe.gate.weight",
        "block_sparse_moe.experts.{expert}.{projection}.weight",
        {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
        dropped=("attention_bias", "mlp_bias", "pretraining_tp"),
    ),
    "qwen2_moe": Layout(
        "qwen2_moe",
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        "mlp.gate.weight",
        _EXPERT,
        _SAME,
        shared="mlp.shared_expert.{projection}.weight",
        shared_gate="mlp.shared_expert_gate.weight",
        needs_shared=True,
    ),
    "qwen3_moe": Layout(
        "qwen3_moe", "qwen3_moe", "Qwen3MoeForCausalLM", "mlp.gate.weight", _EXPERT, _SAME
    ),
    "deepseek": Layout(
        "deepseek",
        "deepseek",
        "DeepseekForCausalLM",
        "mlp.gate.weight",
        _EXPERT,
        _SAME,
        shared="mlp.shared_experts.{projection}.weight",
        dropped=("mlp_bias",),
    ),
}
_INPUTS = {
    "mixtral": ("llama", "mistral"),
    "qwen2_moe": ("qwen2",),
    "qwen3_moe": ("qwen3",),
    "deepseek": ("llama", "mistral"),
}
_HEAD_NORM = re.compile(r"\.self_attn\.[qk]_norm\.weight$")


def choose_layout(config: MoeConfig, base: Store) -> Layout:
    """The layout asked for, or the one that suits the base model.

    Raises:
        MergeError: no layout has what this base and these experts need.
    """
    kind = str(base.config.get("model_type", "unknown"))
    fitting = [name for name, kinds in _INPUTS.items() if kind in kinds]
    if config.architecture is not None:
        name = config.architecture
    elif not fitting:
        known = sorted({kind for kinds in _INPUTS.values() for kind in kinds})
        raise MergeError(
            f"{config.base_model} is of type {kind}: mixtures are made of {', '.join(known)}"
        )
    else:
        name = "deepseek" if config.shared_experts and "deepseek" in fitting else fitting[0]
    layout = LAYOUTS[name]
    if kind not in _INPUTS[name]:
        raise MergeError(
            f"architecture: {name} takes base models of type {', '.join(_INPUTS[name])}, not {kind}"
            + (f"; write architecture: {fitting[0]}" if fitting else "")
        )
    shared = len(config.shared_experts)
    if shared > (1 if layout.shared else 0):
        most = "one shared expert" if layout.shared else "no shared experts"
        raise MergeError(f"{name} models have {most}, got {shared}")
    if layout.needs_shared and not shared:
        raise MergeError(f"{name} models need one shared expert: add shared_experts")
    _check_tensors(layout, base)
    return layout


def _check_tensors(layout: Layout, base: Store) -> None:
    biases = [name for name in arch.names(base) if name.endswith(".bias")]
    allowed = ("q_proj.bias", "k_proj.bias", "v_proj.bias") if layout.name == "qwen2_moe" else ()
    if extra := [name for name in biases if not name.endswith(allowed or ("\0",))]:
        raise MergeError(f"{layout.name} models have no tensor like {extra[0]} of {base.path}")
    norms = [name for name in arch.names(base) if _HEAD_NORM.search(name)]
    if bool(norms) != (layout.name == "qwen3_moe"):
        raise MergeError(f"{base.path} and {layout.name} differ in norms of queries and keys")
