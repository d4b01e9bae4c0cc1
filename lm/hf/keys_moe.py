"""Rules for keys that only models with experts or latent attention have (`lm.hf.keys`)."""

import dataclasses
from typing import Any

from lm.config import ConfigError, ModelConfig
from lm.hf.keys import REQUIRED, Reader

__all__ = ["FirstDense", "Groups", "SharedWidth", "SparseLayers", "Unread"]


def _whole(keys: Reader, key: str, default: Any) -> int:
    value = keys.take(key, default)
    if type(value) is not int or value < 0:
        raise ConfigError(f"{key} must be a whole number of 0 or more, got {value!r}")
    return value


@dataclasses.dataclass(frozen=True)
class SparseLayers:
    """Layers with experts: each `decoder_sparse_step`-th, but those in `mlp_only_layers` (Qwen)."""

    def read(self, keys: Reader) -> dict[str, Any]:
        step, only = _whole(keys, "decoder_sparse_step", 1), keys.take("mlp_only_layers", [])
        layers = range(keys.take("num_hidden_layers", REQUIRED))
        if not isinstance(only, list) or not set(only) <= set(layers):
            raise ConfigError(f"mlp_only_layers must list layers below {len(layers)}, got {only!r}")
        dense = tuple(i for i in layers if i in only or step == 0 or (i + 1) % step)
        if len(dense) == len(layers):
            raise ConfigError(
                f"decoder_sparse_step {step} and mlp_only_layers {only} leave no layer with "
                "experts: make it a dense model of the same weights"
            )
        return {"moe.dense_layers": dense}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"decoder_sparse_step": 1, "mlp_only_layers": list(config.moe.dense_layers)}


@dataclasses.dataclass(frozen=True)
class FirstDense:
    """The first `first_k_dense_replace` layers have no experts, and all others have (DeepSeek)."""

    default: int

    def read(self, keys: Reader) -> dict[str, Any]:
        count = _whole(keys, "first_k_dense_replace", self.default)
        layers = keys.take("num_hidden_layers", REQUIRED)
        if count >= layers:
            raise ConfigError(
                f"first_k_dense_replace is {count}, which leaves none of {layers} layers to experts"
            )
        return {"moe.dense_layers": tuple(range(count))}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"first_k_dense_replace": len(config.moe.dense_layers)}


@dataclasses.dataclass(frozen=True)
class Groups:
    """Groups that the router chooses first: `topk_method`, `n_group`, `topk_group` (DeepSeek).

    `methods`: the names that are understood, by what they stand for: "grouped", or "plain" without
    groups, whatever the two numbers say.
    """

    methods: tuple[tuple[str, str], ...]
    default: str
    groups: int | None = None
    """Default of `n_group`."""
    kept: int | None = None
    """Default of `topk_group`."""

    def read(self, keys: Reader) -> dict[str, Any]:
        method = keys.take("topk_method", self.default)
        groups = keys.take("n_group", self.groups, nullable=True)
        kept = keys.take("topk_group", self.kept, nullable=True)
        kind = dict(self.methods).get(method)
        if kind is None:
            known = " or ".join(repr(name) for name, _ in self.methods)
            raise ConfigError(f"topk_method is {method!r}; this model is known with {known} only")
        if kind == "plain":
            return {"moe.groups": 1, "moe.groups_kept": 1}
        for key, value in (("n_group", groups), ("topk_group", kept)):
            if type(value) is not int:
                raise ConfigError(f"{key} must be a whole number for {method}, got {value!r}")
        return {"moe.groups": groups, "moe.groups_kept": kept}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        plain = config.moe.groups == 1 and any(kind == "plain" for _, kind in self.methods)
        kind = "plain" if plain else "grouped"
        method = next(name for name, what in self.methods if what == kind)
        groups, kept = config.moe.groups, config.moe.groups_kept
        return {"topk_method": method, "n_group": groups, "topk_group": kept}


@dataclasses.dataclass(frozen=True)
class SharedWidth:
    """`shared_expert_intermediate_size`: one shared expert of a width of its own (Qwen2-MoE)."""

    default: int

    def read(self, keys: Reader) -> dict[str, Any]:
        width = _whole(keys, "shared_expert_intermediate_size", self.default)
        return {"moe.shared": 1, "moe.d_shared": width}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"shared_expert_intermediate_size": config.shared_width}


@dataclasses.dataclass(frozen=True)
class Unread:
    """Keys that say nothing about this family's models, whatever they hold.

    `written` are those of them that a file should have all the same.
    """

    keys: tuple[str, ...]
    written: tuple[tuple[str, Any], ...] = ()

    def read(self, keys: Reader) -> dict[str, Any]:
        for key in self.keys:
            keys.take(key)
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return dict(self.written)
