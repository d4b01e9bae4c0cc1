"""The output's config.json: layer counts, per-layer lists, type, vocabulary and tied flag."""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lm.merging.architecture import Architecture, layer_count_path

__all__ = ["config_differences", "output_config"]

Origins = Sequence[tuple[str, int]]
"""For every output layer the (model, layer) whose place in per-layer settings it takes."""

NOT_PER_LAYER = re.compile(
    r"token|architectures|rope_(?!layers)|factor|label|size|shape|mean|std|modal"
)
INDEX_LISTS = (
    "mlp_only_layers",
    "cross_attention_layers",
    "full_attn_idxs",
    "attn_layer_indices",
)
"""Lists of the numbers of layers that are of a kind."""
MEANING = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "sliding_window",
)
"""Settings that change what the weights mean without changing any shape."""
PERIODS = (
    "sliding_window_pattern",
    "full_attention_interval",
    "decoder_sparse_step",
    "interleave_moe_layer_step",
    "no_rope_layer_interval",
    "attn_layer_period",
    "expert_layer_period",
)
"""Settings by which a model derives a layer's kind from its number."""


def output_config(
    configs: Mapping[str, Mapping[str, Any]],
    donor: str,
    described: Architecture,
    layers: Mapping[str, Origins],
    *,
    dtype: str | None,
    tied: bool | None,
    vocabulary: int | None,
) -> tuple[dict[str, Any], list[str]]:
    """config.json of the output, made from the donor's, and warnings.

    Args:
        configs: config.json of every model.
        donor: the model whose config is taken: the base, or the first.
        described: the donor's architecture.
        layers: for every module the origins of its layers.
        dtype: type of the weights.
        tied: whether the output's head is its embedding; None to leave it.
        vocabulary: rows of the embedding if they changed.
    """
    result, warnings = copy.deepcopy(dict(configs[donor])), []
    for module, origins in layers.items():
        stack = described.stacks.get(module)
        if stack is not None and list(origins) != [(donor, i) for i in range(stack.count)]:
            warnings += _set_layers(result, configs, donor, module, stack.count, origins)
    inner = [result.get("text_config"), result.get("vision_config")]
    parts = [result, *(part for part in inner if isinstance(part, dict))]
    if dtype is not None:
        for part in parts:
            known = [key for key in ("torch_dtype", "dtype") if key in part]
            if part is result and not known:
                known = ["torch_dtype"]
            for key in known:
                part[key] = dtype
    if vocabulary is not None:
        holders = [part for part in parts[:2] if "vocab_size" in part] or [result]
        for part in holders:
            part["vocab_size"] = vocabulary
    if tied is not None:
        for part in [part for part in parts if "tie_word_embeddings" in part] or [result]:
            part["tie_word_embeddings"] = tied
    return result, warnings


def config_differences(configs: Mapping[str, Mapping[str, Any]], donor: str) -> list[str]:
    """A line for every model that computes something else with tensors of the same shapes."""
    lines = []
    for ref, config in configs.items():
        own = [_inside(each, ("text_config",)) or each for each in (configs[donor], config)]
        found = [
            f"{key} {own[0][key]!r} and {own[1][key]!r}"
            for key in MEANING
            if key in own[0] and key in own[1] and own[0][key] != own[1][key]
        ]
        if found:
            lines.append(
                f"the configs of {donor} and {ref} differ in {', '.join(found)}: the output has "
                f"those of {donor}"
            )
    return lines


def _set_layers(
    result: dict[str, Any],
    configs: Mapping[str, Mapping[str, Any]],
    donor: str,
    module: str,
    count: int,
    origins: Origins,
) -> list[str]:
    path = layer_count_path(configs[donor], module, count)
    if path is None:
        if len(origins) == count:
            return []
        return [
            f"config.json of {donor} holds no number of layers equal to {count}: set the number "
            f"of layers of {module} to {len(origins)} yourself"
        ]
    holder: Any = result
    for key in path[:-1]:
        holder = holder[key]
    olds = {ref: _inside(configs[ref], path[:-1]) for ref, _ in origins}
    for key, value in list(holder.items()):
        if key in INDEX_LISTS and isinstance(value, list):
            holder[key] = [
                index
                for index, (ref, layer) in enumerate(origins)
                if layer in _list(olds[ref], key)
            ]
        elif isinstance(value, list) and len(value) == count and not NOT_PER_LAYER.search(key):
            lists = {ref: _list(olds[ref], key) or value for ref in olds}
            if all(layer < len(lists[ref]) for ref, layer in origins):
                holder[key] = [lists[ref][layer] for ref, layer in origins]
    if holder.get("max_window_layers") == count:
        holder["max_window_layers"] = len(origins)
    holder[path[-1]] = len(origins)
    moved = any(index != layer for index, (_, layer) in enumerate(origins))
    periods = [key for key in PERIODS if moved and isinstance(holder.get(key), int)]
    explicit = any(key in holder for key in ("layer_types", "no_rope_layers", "layers_block_type"))
    if any(holder[key] > 1 for key in periods) and not explicit:
        return [f"layers change their number, and {periods} give them their kind by number: check"]
    return []


def _inside(config: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
    for key in path:
        config = config.get(key) or {}
    return config


def _list(config: Mapping[str, Any], key: str) -> list:
    value = config.get(key)
    return value if isinstance(value, list) else []
