"""mergekit-moe's YAML, read strictly."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from lm.merging.types import MergeError
from lm.merging.yaml_text import (
    fields,
    items_of,
    nearest,
    read_documents,
    reference_of,
    show,
    text_of,
)

__all__ = ["Expert", "MoeConfig", "load_moe_config", "parse_moe_config"]

GATE_MODES = ("cheap_embed", "random", "uniform_random")
FORWARD_MODES = ("hidden", "hidden_avg")
LAYOUTS = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek")
ALSO = {"qwen": "qwen2_moe", "qwen3": "qwen3_moe"}
DTYPES = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Expert:
    """One entry of `experts` or `shared_experts`."""

    source_model: str
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    residual_scale: float = 1.0
    noise_scale: float = 0.0


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """A whole mixture as its author wrote it."""

    base_model: str
    experts: tuple[Expert, ...]
    gate_mode: str = "cheap_embed"
    experts_per_token: int = 2
    shared_experts: tuple[Expert, ...] = ()
    dtype: str | None = None
    architecture: str | None = None
    """One of mixtral, qwen2_moe, qwen3_moe, deepseek; None: by the base model's type."""
    text: str = ""

    def references(self) -> tuple[str, ...]:
        """All models, each once, the base first."""
        every = (*self.experts, *self.shared_experts)
        return tuple(dict.fromkeys([self.base_model, *(each.source_model for each in every)]))


def load_moe_config(path: str | Path) -> MoeConfig:
    """Read a configuration file of one document."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MergeError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise MergeError(f"{path} cannot be read: {error.strerror}") from None
    documents = read_documents(text, path.name)
    if len(documents) != 1:
        raise MergeError(f"{path.name} holds {len(documents)} documents instead of one mixture")
    return parse_moe_config(documents[0], path.name, text)


def parse_moe_config(
    data: Any, place: str = "the configuration", text: str | None = None
) -> MoeConfig:
    """A configuration from what YAML gave.

    Raises:
        MergeError: one line with the place, the value and the remedy.
    """
    known = ("base_model", "experts", "gate_mode", "experts_per_token", "shared_experts", "dtype")
    data = fields(data, place, (*known, "architecture"), ("base_model", "experts"))
    mode = text_of(data.get("gate_mode") or "hidden", "gate_mode")  # mergekit's default
    if mode in FORWARD_MODES:
        raise MergeError(
            f"gate_mode: {mode}{'' if data.get('gate_mode') else ' (the default)'} needs hidden "
            "states of the base model, which is not run here: write gate_mode: cheap_embed (the "
            "prompts' embeddings) or gate_mode: random"
        )
    if mode not in GATE_MODES:
        raise MergeError(f"gate_mode: unknown mode {show(mode)}{nearest(mode, GATE_MODES)}")
    prompts = mode == "cheap_embed"
    experts = _experts(data["experts"], "experts", prompts)
    if len(experts) < 2:
        raise MergeError(f"experts: a mixture needs at least 2, got {len(experts)}")
    shared = _experts(data.get("shared_experts"), "shared_experts", False)
    count = data.get("experts_per_token", 2)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(experts):
        raise MergeError(
            f"experts_per_token must be a whole number from 1 to {len(experts)} (the number of "
            f"experts), got {show(count)}"
        )
    layout = data.get("architecture")
    if layout is not None:
        layout = ALSO.get(layout, layout) if isinstance(layout, str) else layout
        if layout not in LAYOUTS:
            raise MergeError(
                f"architecture: unknown layout {show(layout)}{nearest(layout, LAYOUTS)}"
            )
    dtype = data.get("dtype")
    if dtype is not None:
        dtype = text_of(dtype, "dtype").removeprefix("torch.")
        if dtype not in DTYPES:
            raise MergeError(f"dtype: unknown type {show(dtype)}{nearest(dtype, DTYPES)}")
    return MoeConfig(
        reference_of(data["base_model"], "base_model"),
        experts,
        mode,
        count,
        shared,
        dtype,
        layout,
        json.dumps(data, indent=1) if text is None else text,
    )


def _experts(value: Any, place: str, need_prompts: bool) -> tuple[Expert, ...]:
    experts = []
    names = tuple(field.name for field in dataclasses.fields(Expert))
    for where, item in items_of(value, place):
        item = fields(item, where, names, ("source_model",))
        prompts = {
            key: _prompts(item.get(key), f"{where}.{key}")
            for key in ("positive_prompts", "negative_prompts")
        }
        if need_prompts and not prompts["positive_prompts"]:
            raise MergeError(
                f"{where}: positive_prompts is missing: give some, or write gate_mode: random"
            )
        scales = {
            key: _number(item[key], f"{where}.{key}")
            for key in ("residual_scale", "noise_scale")
            if item.get(key) is not None
        }
        if scales.get("noise_scale", 0) < 0:
            raise MergeError(f"{where}.noise_scale must not be negative")
        source = reference_of(item["source_model"], f"{where}.source_model")
        experts.append(Expert(source, **prompts, **scales))
    return tuple(experts)


def _prompts(value: Any, place: str) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    return tuple(text_of(item, where) for where, item in items_of(value, place))


def _number(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise MergeError(f"{place} must be a finite number, got {show(value)}")
    return float(value)
