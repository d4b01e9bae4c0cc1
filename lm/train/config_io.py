"""Run configurations as plain dictionaries (config.json), read back strictly."""

import dataclasses
import difflib
import types
import typing
from typing import Any

from lm.config import ConfigError, ModelConfig
from lm.train.config import RunConfig

ADDED = {
    "checkpoint": {"patience", "local_dir", "local_every"},
    "data": {"format", "chat_template", "skip_long"},
    "init": {"peft", "task"},
    "log": {"spectra", "experts"},
    "mesh": {"replica", "sequence_norms"},
    "model": {
        *("adapter", "moe", "attention_kind", "mla", "rope_interleave"),
        *("rope_theta_local", "positions", "norm", "norm_position", "norm_unit_offset"),
        *("qk_norm_full", "query_pre_attn_scalar", "attention_soft_cap", "embedding_scale"),
        "merged",
    },
    "model.moe": {"d_shared", "shared_gate", "dense_layers"},
    "model.rope_scaling": {"mscale", "mscale_all_dim"},
    "profile": {"on_signal"},
    "optim": {
        *("rank_ratio", "min_rank", "rank", "power_iters", "nesterov", "normalization"),
        *("tasks", "joint_tasks", "sequential_tasks", "dominance_decay"),
    },
    "": {"init", "mat", "sd", "flags"},
}
"""Fields that run folders of earlier versions lack; their defaults are what those runs did."""


def config_to_dict(config: Any) -> dict[str, Any]:
    """A frozen dataclass as nested dicts of JSON values; tuples become lists."""
    return {f.name: _to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def config_from_dict(values: dict[str, Any]) -> RunConfig:
    """The `RunConfig` that `config_to_dict` wrote.

    Raises `ConfigError` that names every unknown or missing key, a value of the wrong type, or
    what the dataclasses themselves refuse.
    """
    return _build(RunConfig, values, "")


def model_from_dict(values: dict[str, Any]) -> ModelConfig:
    """The `ModelConfig` that `config_to_dict` wrote; errors as those of `config_from_dict`."""
    return _build(ModelConfig, values, "model")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Leaf fields of a nested dataclass by dotted name: {"steps": 600, "optim.beta1": 0.9}."""
    leaves = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            leaves |= flatten(value, name + ".")
        else:
            leaves[name] = value
    return leaves


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return config_to_dict(value)
    return [_to_plain(item) for item in value] if isinstance(value, tuple) else value


def _build(cls: type, values: Any, path: str) -> Any:
    where = path or "the configuration"
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be an object with the fields of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    prefix = f"{path}." if path else ""
    problems = []
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f" (did you mean {prefix}{near[0]}?)" if near else ""
            problems.append(f"unknown key {prefix}{key}{hint}")
    present = [name for name in names if name in values]
    absent = {name for name in names if name not in values}
    problems += [f"missing key {prefix}{n}" for n in names if n in absent - ADDED.get(path, set())]
    if problems:
        raise ConfigError("; ".join(problems))
    return cls(**{name: _convert(values[name], hints[name], prefix + name) for name in present})


def _convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as JSON gave it, checked against a field's annotation."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None:
            return None
        (hint,) = (a for a in arguments if a is not types.NoneType)
        return _convert(value, hint, path)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path)
    if origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_convert(item, arguments[0], path) for item in value)
    elif origin is typing.Literal:
        if value in arguments:
            return value
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif type(value) is hint:
        return value
    wanted = " or ".join(map(str, arguments)) if arguments else hint.__name__
    raise ConfigError(f"{path} must be {wanted}, got {value!r}")
