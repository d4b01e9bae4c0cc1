"""Rules between keys of a config.json and fields of `ModelConfig`, used in both directions.

A rule reads its keys from a `Reader`, which remembers what was asked for: a key that no rule of the
family has read, and that is not known to leave the computation alone, is an error. Defaults are
those of the configuration classes of transformers, for keys that a file leaves out.

Written are the keys that all versions of transformers since 4.40 read.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

from lm.config import ConfigError, ModelConfig, RopeScaling
from lm.config_mla import MLAConfig
from lm.config_moe import MoEConfig

__all__ = ["Choice", "Field", "Fixed", "Flag", "LayerWindows", "MlpWidth", "Reader", "Rope", "Rule"]

REQUIRED = object()
"""Default of a key that every file has."""


class Reader:
    """A config.json whose keys are taken one by one; `left` are those nobody took."""

    def __init__(self, content: Mapping[str, Any]):
        self._content = content
        self.left = set(content)

    def take(self, key: str, default: Any = None, *, nullable: bool = False) -> Any:
        """The value of `key`; `default` where it is absent, or null unless that is a value too."""
        self.left.discard(key)
        value = self._content.get(key)
        if nullable and key in self._content:
            return value
        if value is None and default is REQUIRED:
            raise ConfigError(f"the key {key!r} is missing")
        return default if value is None else value


def read_flag(keys: Reader, key: str, default: bool, *, nullable: bool = False) -> bool:
    """A switch; with `nullable` null is off."""
    value = keys.take(key, default, nullable=nullable)
    if not isinstance(value, bool) and value is not None:
        raise ConfigError(f"{key} must be true or false, got {value!r}")
    return bool(value)


def get(config: ModelConfig, field: str) -> Any:
    """A field of the model, or of its experts: "moe.top_k"."""
    if field == "moe.d_expert":
        return config.d_expert  # also where it is that of dense layers
    for name in field.split("."):
        config = getattr(config, name)
    return config


def _type(field: str) -> Any:
    part, _, name = field.rpartition(".")
    holder = {"": ModelConfig, "moe": MoEConfig, "mla": MLAConfig}[part]
    return holder.__dataclass_fields__[name].type


class Rule(Protocol):
    """Some keys of a config.json and the fields of `ModelConfig` that they stand for."""

    def read(self, keys: Reader) -> dict[str, Any]:
        """The fields; ConfigError for a value that cannot be had here."""
        ...

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys."""
        ...


@dataclasses.dataclass(frozen=True)
class Field:
    """A number under another name; with `nullable` null says None, not the default.

    `whole`: it is a float here, and transformers wants an integer where it is one.
    """

    key: str
    field: str
    default: Any = REQUIRED
    nullable: bool = False
    whole: bool = False
    alias: str = ""
    """Another key that files may have instead."""

    def read(self, keys: Reader) -> dict[str, Any]:
        default = self.default
        if self.alias:
            default = keys.take(self.alias, default)
        value = keys.take(self.key, default, nullable=self.nullable)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigError(f"{self.key} must be a number, got {value!r}")
        is_float = _type(self.field) in (float, float | None)
        return {self.field: float(value) if is_float and value is not None else value}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        value = get(config, self.field)
        if self.whole and value is not None and value == int(value):
            value = int(value)
        return {self.key: value}


@dataclasses.dataclass(frozen=True)
class Flag:
    """A switch that sets one or more fields alike."""

    key: str
    fields: tuple[str, ...]
    default: bool
    nullable: bool = False
    """Whether null is false, not the default."""

    def read(self, keys: Reader) -> dict[str, Any]:
        value = read_flag(keys, self.key, self.default, nullable=self.nullable)
        return dict.fromkeys(self.fields, value)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.key: get(config, self.fields[0])}


@dataclasses.dataclass(frozen=True)
class Choice:
    """A name that chooses a field's value; the first of several names for one value is written."""

    key: str
    field: str
    values: Mapping[str, Any]
    default: str

    def read(self, keys: Reader) -> dict[str, Any]:
        value = keys.take(self.key, self.default)
        if value not in self.values:
            known = " or ".join(map(repr, self.values))
            raise ConfigError(f"{self.key} is {value!r}; this model is known with {known} only")
        return {self.field: self.values[value]}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        value = get(config, self.field)
        return {self.key: next((n for n, v in self.values.items() if v == value), self.default)}


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A key that would change the computation in a way that no model here has.

    `value` is what it must be (or null); with `written` it goes into the file.
    """

    key: str
    value: Any = None
    written: bool = False

    def read(self, keys: Reader) -> dict[str, Any]:
        value = keys.take(self.key, self.value)
        if value != self.value:
            raise ConfigError(
                f"{self.key} is {value!r}, which changes the computation in a way that is not "
                f"supported (only {self.value!r} is)"
            )
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.key: self.value} if self.written else {}


@dataclasses.dataclass(frozen=True)
class MlpWidth:
    """`n_inner` of GPT-2: null is four times the width of the model."""

    def read(self, keys: Reader) -> dict[str, Any]:
        return {"d_ff": keys.take("n_inner", 4 * keys.take("n_embd", 768))}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"n_inner": config.d_ff}


_ROPE_KEYS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_context",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_context",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
    },
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding: `rope_theta` and `rope_scaling`, or `rope_parameters` that holds both.

    With `local_theta` sliding layers have their own base and no scaling (Gemma 3):
    `rope_local_base_freq`, or `rope_parameters` by kind of layer.
    """

    theta: float = 10_000.0
    local_theta: float | None = None
    mscale: bool = False
    """Whether `mscale` and `mscale_all_dim` of yarn are kept (latent attention also scales its
    scores by the second); else they become the factor of cos and sin."""

    def read(self, keys: Reader) -> dict[str, Any]:
        parameters = keys.take("rope_parameters", {})
        scaling = keys.take("rope_scaling", {})
        theta = keys.take("rope_theta", self.theta)
        share = keys.take("partial_rotary_factor", 1.0)
        local = keys.take("rope_local_base_freq", self.local_theta)
        if not isinstance(parameters, dict) or not isinstance(scaling, dict):
            raise ConfigError("rope_parameters and rope_scaling must be objects or null")
        if parameters and scaling:
            # transformers forgets what the first one says, the base of the angles included.
            raise ConfigError(
                "rope_parameters and rope_scaling are both given: put what the second says (and "
                "rope_theta) into the first, and remove the second"
            )
        if self.local_theta is not None and parameters:
            if other := sorted(set(parameters) - set(_NAMES)):
                raise ConfigError(
                    f"rope_parameters has {other[0]!r}; in this family it holds one object for "
                    f"each kind of layer: {', '.join(_NAMES)}"
                )
            sliding = dict(parameters.get("sliding_attention") or {})
            parameters = parameters.get("full_attention") or {}
            local = sliding.pop("rope_theta", local)
            kind = sliding.pop("rope_type", "default")
            if kind != "default" or sliding:
                raise ConfigError(f"rope_parameters of sliding layers: {kind!r} is not supported")
        rope = {**parameters, **scaling}
        theta = rope.pop("rope_theta", theta)
        share = rope.pop("partial_rotary_factor", share)
        if share != 1.0:
            raise ConfigError(
                f"partial_rotary_factor is {share!r}: only whole heads are rotated here"
            )
        context = keys.take("max_position_embeddings", 0)
        for base in (theta, local):
            if isinstance(base, bool) or not isinstance(base, int | float | None):
                raise ConfigError(f"the base of a rotary embedding must be a number, got {base!r}")
        scaling = _read_scaling(rope, context, self.mscale)
        result = {"rope_theta": float(theta), "rope_scaling": scaling}
        return result | ({"rope_theta_local": float(local)} if self.local_theta is not None else {})

    def write(self, config: ModelConfig) -> dict[str, Any]:
        keys: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": None}
        if self.local_theta is not None:
            keys["rope_local_base_freq"] = config.rope_theta_local
        if scaling := config.rope_scaling:
            fields = {k: getattr(scaling, f) for k, f in _ROPE_KEYS[scaling.kind].items()}
            fields = {k: v for k, v in fields.items() if v is not None}
            keys["rope_scaling"] = {"rope_type": scaling.kind, **fields}
        return keys


def _read_scaling(rope: dict[str, Any], context: int, mscale: bool) -> RopeScaling | None:
    kind = rope.pop("rope_type", None) or rope.get("type", "default")
    rope.pop("type", None)
    if kind == "default":
        if rope:
            raise ConfigError(f"rope_parameters has {min(rope)!r}, which needs a rope_type")
        return None
    if kind not in _ROPE_KEYS:
        raise ConfigError(f"rope_type {kind!r} is not supported (linear, llama3 and yarn are)")
    if rope.pop("truncate", True) is not True:
        raise ConfigError("rope_parameters.truncate false is not supported")
    if kind == "yarn":
        scale, all_dim = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
        if mscale:
            rope |= {"mscale": scale or None, "mscale_all_dim": all_dim or None}  # 0 means none
        elif scale and all_dim and rope.get("attention_factor") is None:
            growth = 0.1 * math.log(max(rope.get("factor", 1.0), 1.0))
            rope["attention_factor"] = (scale * growth + 1) / (all_dim * growth + 1)
    names = _ROPE_KEYS[kind]
    if "original_max_position_embeddings" in names:
        rope.setdefault("original_max_position_embeddings", context)
    elif rope.get("original_max_position_embeddings"):
        rope.pop("original_max_position_embeddings")  # linear scaling does not use it
    if unknown := sorted(set(rope) - set(names)):
        raise ConfigError(f"rope_scaling of type {kind} has the unknown key {unknown[0]!r}")
    if kind == "yarn" and "factor" in rope and rope["factor"] is None and context:
        rope["factor"] = context / (rope["original_max_position_embeddings"] or context)
    for key in ("factor", "low_freq_factor", "high_freq_factor"):  # the others have defaults
        if key in names and rope.get(key) is None:
            raise ConfigError(f"rope_scaling of type {kind} lacks the key {key!r}")
    values = {names[key]: value for key, value in rope.items() if value is not None}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"rope_scaling.{name} must be a number, got {value!r}")
    if kind == "linear":
        values["original_context"] = RopeScaling.original_context
    return RopeScaling(kind=kind, **values)


@dataclasses.dataclass(frozen=True)
class LayerWindows:
    """Which layers attend within a window: `layer_types`, or what stands in for it.

    kind "all": every layer, if `sliding_window` is set (Mistral). "switch": every layer, if
    `use_sliding_window` is set besides (Qwen3-MoE). "upper": layers from
    `max_window_layers` on, if `use_sliding_window` is (Qwen). "even": layers 0, 2, ... below
    `max_window_layers`, if `use_sliding_window` is (Qwen2-MoE). "period": all but every n-th, n
    being `sliding_window_pattern` (Gemma).
    """

    kind: str
    window: int | None
    """Default of `sliding_window`."""
    period: int = 0
    """Default of `sliding_window_pattern`."""

    def read(self, keys: Reader) -> dict[str, Any]:
        layers = keys.take("num_hidden_layers", REQUIRED)
        window = keys.take("sliding_window", self.window, nullable=True)
        types = keys.take("layer_types")
        if self.kind in ("all", "switch"):
            on = self.kind == "all" or read_flag(keys, "use_sliding_window", False)
            if self.kind == "switch":
                keys.take("max_window_layers")  # files hold it, this family does not use it
            sliding = [on and window is not None] * layers
            if types is not None and types != _types(sliding):
                raise ConfigError("layer_types differs from sliding_window, which this family uses")
        elif self.kind in ("upper", "even"):
            limit = keys.take("max_window_layers", 28)
            used = read_flag(keys, "use_sliding_window", False) and window is not None
            among = (lambda i: i >= limit) if self.kind == "upper" else (lambda i: i < limit)
            step = 1 if self.kind == "upper" else 2
            sliding = [used and among(i) and i % step == 0 for i in range(layers)]
            if types and not used and _NAMES[1] in types:
                raise ConfigError("layer_types has sliding layers, but use_sliding_window is not")
        else:
            period = keys.take("_sliding_window_pattern", self.period)  # as version 5 writes it
            period = keys.take("sliding_window_pattern", period)
            sliding = [(i + 1) % period != 0 for i in range(layers)]
        if types is not None and self.kind not in ("all", "switch"):
            known = isinstance(types, list) and set(types) <= set(_NAMES) and len(types) == layers
            if not known:
                raise ConfigError(
                    f"layer_types must hold {layers} names, each one of {' or '.join(_NAMES)}"
                )
            sliding = [name == _NAMES[1] for name in types]
        if not any(sliding):
            return {"sliding_window": None, "attention_pattern": ()}
        return {"sliding_window": window, "attention_pattern": _pattern(sliding)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        windows = config.windows
        sliding = [windows[i % len(windows)] is not None for i in range(config.num_layers)]
        if self.kind in ("all", "switch"):
            window = {"sliding_window": config.sliding_window if all(sliding) else None}
            return window | ({"use_sliding_window": all(sliding)} if self.kind == "switch" else {})
        keys: dict[str, Any] = {"sliding_window": config.sliding_window if any(sliding) else None}
        if self.kind == "upper":
            first = sliding.index(True) if any(sliding) else config.num_layers
            keys |= {"use_sliding_window": any(sliding), "max_window_layers": first}
        elif self.kind == "even":
            limit = len(sliding) if any(sliding) else 0
            keys |= {"use_sliding_window": any(sliding), "max_window_layers": limit}
        else:
            keys |= {"sliding_window": config.sliding_window or self.window}
            period = sliding.index(False) + 1 if not all(sliding) else len(sliding) + 1
            regular = sliding == [(i + 1) % period != 0 for i in range(len(sliding))]
            if self.period > 2 and regular:  # in Gemma 2 the pattern is part of the family
                keys["sliding_window_pattern"] = period
        return keys | {"layer_types": _types(sliding)}


_NAMES = ("full_attention", "sliding_attention")


def _types(sliding: list[bool]) -> list[str]:
    return [_NAMES[each] for each in sliding]


def _pattern(sliding: list[bool]) -> tuple[str, ...]:
    """The shortest pattern that repeats over the layers to `sliding`; () is sliding everywhere."""
    if all(sliding):
        return ()
    lengths = range(1, len(sliding) + 1)
    size = next(
        n for n in lengths if all(sliding[i] == sliding[i % n] for i in range(len(sliding)))
    )
    return tuple("sliding" if each else "full" for each in sliding[:size])
