"""config.json to `ModelConfig` and back, by the tables of `lm.hf.families`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lm.config import ConfigError, ModelConfig
from lm.config_mla import MLAConfig
from lm.config_moe import MoEConfig
from lm.hf.families import FAMILIES
from lm.hf.family import UNIMPORTANT, Family
from lm.hf.keys import Reader

# Losses, and how experts are computed.
_MOE_TRAINING = ("balance_weight", "balance_per_sequence", "z_weight", "implementation", "exchange")

__all__ = ["choose_family", "read_config", "write_config"]

# What says how a model is run or was initialized, not which function it is.
_NOT_ARCHITECTURE = ("init_std", "dtype", "param_dtype", "remat", "unroll", "attention", "loss")


def read_config(content: Mapping[str, Any], where: str, dtype: str) -> tuple[Family, ModelConfig]:
    """The family and the model of a config.json.

    Args:
      content: the parsed file.
      where: its path, for messages.
      dtype: of parameters and activations in the result.

    Raises:
      ConfigError: an unknown kind of model, code of its own, or a key that changes the
        computation and is not understood; the message names the key.
    """
    family = _family_of(content, where)
    keys = Reader(content)
    for known in ("auto_map", "quantization_config"):  # looked at by _family_of
        keys.take(known)
    fields: dict[str, Any] = dict(family.fields)
    try:
        for rule in family.rules:
            fields |= rule.read(keys)
        if unknown := sorted(keys.left - UNIMPORTANT):
            raise ConfigError(
                f"the key{'s' * bool(unknown[1:])} {', '.join(map(repr, unknown))} "
                f"{'are' if unknown[1:] else 'is'} not understood for {family.model_type} and may "
                "change what the model computes: if not, remove from the file"
            )
        if experts := _part(fields, "moe."):
            fields |= {"mlp": "moe", "moe": MoEConfig(**experts)}
        if latents := _part(fields, "mla."):
            fields |= {"attention_kind": "mla", "mla": MLAConfig(**latents)}
        return family, ModelConfig(**fields, dtype=dtype, param_dtype=dtype)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"{where} holds a value of a wrong type: {error}") from None


def _part(fields: dict[str, Any], front: str) -> dict[str, Any]:
    """The fields of a nested configuration, taken out of all fields."""
    return {key.removeprefix(front): fields.pop(key) for key in [*fields] if key.startswith(front)}


def _family_of(content: Mapping[str, Any], where: str) -> Family:
    kind = content.get("model_type")
    kind = kind if isinstance(kind, str) else ""
    known = FAMILIES[kind].code if kind in FAMILIES else ()
    code = content.get("auto_map", {})
    # "REPOSITORY--module.Class" where a copy of the file names the place of the code.
    values = code.values() if isinstance(code, dict) else [code]
    names = [str(name).rpartition("--")[2] for name in values]
    if not set(names) <= set(known):
        raise ConfigError(
            f"{where} has auto_map: this model brings Python code of its own (trust_remote_code), "
            "which is not run here"
        )
    if content.get("quantization_config") is not None:
        raise ConfigError(
            f"{where} has quantization_config: quantized checkpoints cannot be read; give the "
            "model in bfloat16, float16 or float32"
        )
    if kind not in FAMILIES:
        raise ConfigError(
            f"{where}: model_type {content.get('model_type')!r} is not known; there are "
            f"{', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    classes = content.get("architectures") or [family.architecture]
    if family.architecture not in classes:
        raise ConfigError(
            f"{where}: architectures is {classes}, not a language model: only "
            f"{family.architecture} can be loaded"
        )
    return family


def write_config(family: Family, config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The content of config.json for a model that `family` can hold; without token ids."""
    content: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": dtype,
    }
    for rule in family.rules:
        content |= rule.write(config)
    return content


def choose_family(config: ModelConfig, name: str | None = None) -> Family:
    """The family called `name`, or the first, that can hold a model.

    A family can hold a model if reading what it writes gives the same model again.

    Raises:
      ConfigError: it cannot, or none can; the differing fields of the nearest are named.
    """
    if name is not None and name not in FAMILIES:
        raise ConfigError(f"there is no family {name!r}; there are {', '.join(FAMILIES)}")
    families = FAMILIES.values() if name is None else [FAMILIES[name]]
    nearest: tuple[Family, list[str]] | None = None
    for family in families:
        lost = _lost(family, config)
        if lost == []:
            return family
        if lost is None:
            continue
        if nearest is None or len(lost) < len(nearest[1]):
            nearest = family, lost
    lacks = f"; {nearest[0].model_type} lacks {', '.join(nearest[1])}" if nearest else ""
    known = ", ".join(FAMILIES) if name is None else name
    raise ConfigError(f"no family of Hugging Face models ({known}) can hold this model{lacks}")


def _lost(family: Family, config: ModelConfig) -> list[str] | None:
    """What would change if the model were written as `family`; None: it cannot be written."""
    try:
        _, back = read_config(write_config(family, config, "float32"), "", "float32")
    except ConfigError:
        return None
    ours, theirs = _architecture(config), _architecture(back)
    return [f"{name} {ours[name]!r}" for name in ours if ours[name] != theirs.get(name)]


def _architecture(config: ModelConfig) -> dict[str, Any]:
    """The fields that make the function, with equal functions described alike."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name in (*_NOT_ARCHITECTURE, "attention_pattern", "sliding_window"):
        del fields[name]
    moe = dataclasses.asdict(fields.pop("moe"))
    if config.mlp == "moe":
        moe |= {"d_expert": config.d_expert, "d_shared": None, "shared": config.shared_width}
        moe["bias_rate"] = config.moe.bias_rate > 0  # whether there is a bias; its rate is training
        fields |= {f"moe.{name}": value for name, value in moe.items() if name not in _MOE_TRAINING}
        if not config.moe.dense_layers:
            del fields["d_ff"]  # their width
    windows = config.windows
    fields["windows"] = tuple(windows[i % len(windows)] for i in range(config.num_layers))
    if config.query_pre_attn_scalar is None:
        fields["query_pre_attn_scalar"] = config.head_dim
    if config.positions != "rotary":
        for name in ("rope_theta", "rope_scaling", "rope_theta_local"):
            del fields[name]
    elif config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        fields["rope_scaling"] = ("linear", config.rope_scaling.factor)
    return fields
