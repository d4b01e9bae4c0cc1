"""mergekit's YAML, read strictly into frozen dataclasses.

Accepted are the keys of mergekit 0.1.x. Where mergekit ignores what it does not know, here every
unknown or repeated key, every value of the wrong kind and every unknown method or parameter is a
`MergeError` of one line: the place, the value, and the nearest known name.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm.merging.types import MergeError
from lm.merging.yaml_text import (
    Settings,
    fields,
    items_of,
    nearest,
    read_documents,
    reference_of,
    settings_of,
    show,
    text_of,
)

__all__ = [
    "MergeConfig",
    "ModelEntry",
    "Module",
    "Slice",
    "SliceSource",
    "TokenSource",
    "TokenizerConfig",
    "load_config",
    "load_text",
    "parse_config",
    "parse_yaml",
]

DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True)
class ModelEntry:
    """An entry of `models`."""

    model: str
    parameters: Settings = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SliceSource:
    """An entry of a slice's `sources`: layers [start, stop) of a model."""

    model: str
    layer_range: tuple[int, int]
    parameters: Settings = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Slice:
    """A run of output layers."""

    sources: tuple[SliceSource, ...]
    base_model: str | None = None
    parameters: Settings = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Module:
    """A part of a model with its own layers (a text decoder, a vision tower)."""

    models: tuple[ModelEntry, ...] = ()
    slices: tuple[Slice, ...] = ()
    parameters: Settings = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TokenSource:
    """Where a token's embedding comes from when a model lacks it, or for all models if forced."""

    kind: str
    """"auto" (mergekit's rules), "zero", "model" (the token in `model`), "model_token"."""
    model: str | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """`tokenizer:`, or `tokenizer_source:` as its short form."""

    source: str
    """"base", "union" or a model's path."""
    tokens: Mapping[str, TokenSource] = dataclasses.field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """A whole merge as its author wrote it; exactly one of models, slices and modules."""

    merge_method: str
    models: tuple[ModelEntry, ...] = ()
    slices: tuple[Slice, ...] = ()
    modules: Mapping[str, Module] = dataclasses.field(default_factory=dict)
    base_model: str | None = None
    parameters: Settings = dataclasses.field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: TokenizerConfig | None = None
    chat_template: str | None = None
    text: str = ""
    """The YAML it was read from, for the record."""

    def references(self) -> tuple[str, ...]:
        """All models whose tensors take part, each once: the base first, then as they appear."""
        seen = dict.fromkeys([self.base_model] if self.base_model else [])
        for part in (self, *self.modules.values()):
            for entry in part.models:
                seen[entry.model] = None
            for piece in part.slices:
                seen |= dict.fromkeys([piece.base_model] if piece.base_model else [])
                seen |= dict.fromkeys(source.model for source in piece.sources)
        return tuple(seen)


def load_config(path: str | Path) -> MergeConfig:
    """Read a configuration file of one document."""
    path = Path(path)
    return parse_yaml(load_text(path), place=path.name)


def load_text(path: Path) -> str:
    """A configuration file's text, or `MergeError` saying why it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MergeError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise MergeError(f"{path} cannot be read: {error.strerror}") from None


def parse_yaml(text: str, place: str = "the configuration") -> MergeConfig:
    """A configuration from YAML text."""
    documents = read_documents(text, place)
    if len(documents) != 1:
        raise MergeError(f"{place} holds {len(documents)} documents instead of one merge")
    return parse_config(documents[0], place, text)


def parse_config(
    data: Any, place: str = "the configuration", text: str | None = None
) -> MergeConfig:
    """A configuration from what YAML gave; its parameters are checked against the method.

    Args:
        data: mappings, lists and scalars.
        place: what to call it in errors.
        text: the YAML it came from, for the record; None writes it anew.

    Raises:
        MergeError: one line with the place (`slices[1].sources[0].layer_range`), the value and
            the remedy.
    """
    known = ("merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype")
    known += ("out_dtype", "tokenizer_source", "tokenizer", "chat_template")
    _refuse_adaptive(data, place)
    data = fields(data, place, known, ("merge_method",))
    parts = [key for key in ("models", "slices", "modules") if data.get(key)]
    if len(parts) != 1:
        found = " and ".join(parts) or "none of them"
        raise MergeError(f"{place}: give one of models, slices or modules, got {found}")
    method = text_of(data["merge_method"], "merge_method")
    models, slices = _models_or_slices(data, "")
    modules = {}
    if data.get("modules"):
        if not isinstance(data["modules"], Mapping):
            raise MergeError(f"modules must be a mapping from names, got {show(data['modules'])}")
        for name, value in data["modules"].items():
            modules[text_of(name, "modules: a name")] = _module(value, f"modules.{name}")
    template = data.get("chat_template")
    config = MergeConfig(
        merge_method=method,
        models=models,
        slices=slices,
        modules=modules,
        base_model=reference_of(data.get("base_model"), "base_model", optional=True),
        parameters=settings_of(data.get("parameters"), "parameters"),
        dtype=_dtype(data.get("dtype"), "dtype"),
        out_dtype=_dtype(data.get("out_dtype"), "out_dtype"),
        tokenizer=_tokenizer(data),
        chat_template=None if template is None else text_of(template, "chat_template"),
        text=_as_text(data) if text is None else text,
    )
    from lm.merging.parameters import check_parameters

    check_parameters(config)
    return config


def _refuse_adaptive(data: Any, place: str) -> None:
    from lm.merging.adaptive.options import METHODS
    from lm.merging.methods import METHODS as STATIC

    method = data.get("merge_method") if isinstance(data, Mapping) else None
    if not isinstance(method, str) or method in STATIC:
        return
    if method in METHODS:
        raise MergeError(
            f"{place}: {method} learns from text, so it is a merge of its own and no stage: make "
            "it by a configuration file that holds nothing else, and name its folder here"
        )
    hint = nearest(method, [*STATIC, *METHODS])
    if any(f"'{name}'" in hint for name in METHODS):
        raise MergeError(f"unknown merge_method {method!r}{hint}")


def _as_text(data: Mapping) -> str:
    """YAML of a checked configuration that was made by a program."""
    import yaml

    plain = json.loads(json.dumps(data, default=str))  # NumPy's numbers, tuples: no YAML types
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _module(value: Any, place: str) -> Module:
    value = fields(value, place, ("models", "slices", "parameters"))
    if bool(value.get("models")) == bool(value.get("slices")):
        raise MergeError(f"{place}: give either models or slices")
    models, slices = _models_or_slices(value, f"{place}.")
    return Module(models, slices, settings_of(value.get("parameters"), f"{place}.parameters"))


def _models_or_slices(value: Mapping, place: str) -> tuple:
    models = []
    for where, item in items_of(value.get("models"), f"{place}models"):
        item = fields(item, where, ("model", "parameters"), ("model",))
        reference = reference_of(item["model"], f"{where}.model")
        if any(reference == entry.model for entry in models):
            raise MergeError(
                f"{where}: {reference!r} is listed twice; list it once and set its weight"
            )
        settings = settings_of(item.get("parameters"), f"{where}.parameters")
        models.append(ModelEntry(reference, settings))
    slices = [
        _slice(item, where) for where, item in items_of(value.get("slices"), f"{place}slices")
    ]
    return tuple(models), tuple(slices)


def _slice(value: Any, place: str) -> Slice:
    known = ("sources", "base_model", "parameters", "residual_weight")
    value = fields(value, place, known, ("sources",))
    if value.get("residual_weight") is not None:
        raise MergeError(f"{place}.residual_weight never had an effect in any method: remove it")
    sources = []
    for where, item in items_of(value["sources"], f"{place}.sources"):
        names = ("model", "layer_range", "parameters")
        item = fields(item, where, names, ("model", "layer_range"))
        sources.append(
            SliceSource(
                reference_of(item["model"], f"{where}.model"),
                _layer_range(item["layer_range"], f"{where}.layer_range"),
                settings_of(item.get("parameters"), f"{where}.parameters"),
            )
        )
    if not sources:
        raise MergeError(f"{place}.sources is empty: name at least one model and its layer_range")
    lengths = {stop - start for start, stop in (source.layer_range for source in sources)}
    if len(lengths) > 1:
        ranges = ", ".join(str(list(source.layer_range)) for source in sources[:8])
        raise MergeError(f"{place}: all sources need equally many layers, got {ranges}")
    base = reference_of(value.get("base_model"), f"{place}.base_model", optional=True)
    return Slice(tuple(sources), base, settings_of(value.get("parameters"), f"{place}.parameters"))


def _layer_range(value: Any, place: str) -> tuple[int, int]:
    whole = isinstance(value, list) and len(value) == 2
    if not whole or any(not isinstance(end, int) or isinstance(end, bool) for end in value):
        raise MergeError(f"{place} must be [first, behind the last], got {show(value)}")
    start, stop = value
    if not 0 <= start < stop:
        raise MergeError(f"{place} must hold 0 <= first < behind the last, got {show(value)}")
    return start, stop


def _dtype(value: Any, place: str) -> str | None:
    if value is None:
        return None
    name = text_of(value, place).removeprefix("torch.")
    if name not in DTYPES:
        raise MergeError(f"{place}: unknown type {show(value)}{nearest(name, DTYPES)}")
    return name


def _tokenizer(data: Mapping) -> TokenizerConfig | None:
    short, value = data.get("tokenizer_source"), data.get("tokenizer")
    if short is not None and value is not None:
        raise MergeError("give tokenizer or tokenizer_source, not both")
    if value is None:
        short = reference_of(short, "tokenizer_source", optional=True)
        return None if short is None else TokenizerConfig(short)
    value = fields(value, "tokenizer", ("source", "tokens", "pad_to_multiple_of"))
    source = reference_of(value.get("source", "union"), "tokenizer.source")
    pad = value.get("pad_to_multiple_of")
    if pad is not None and (not isinstance(pad, int) or isinstance(pad, bool) or pad < 1):
        raise MergeError(f"tokenizer.pad_to_multiple_of must be a whole number, got {show(pad)}")
    tokens = value.get("tokens") or {}
    if not isinstance(tokens, Mapping):
        raise MergeError(f"tokenizer.tokens must be a mapping from tokens, got {show(tokens)}")
    parsed = {}
    for token, item in tokens.items():
        if not isinstance(token, str) or not token:
            raise MergeError(f"tokenizer.tokens: a token must be text, got {show(token)}")
        parsed[token] = _token(item, f"tokenizer.tokens[{token!r}]")
    return TokenizerConfig(source, parsed, pad)


def _token(value: Any, place: str) -> TokenSource:
    value = fields({} if value is None else value, place, ("source", "force"))
    force, source, place = value.get("force", False), value.get("source"), f"{place}.source"
    if not isinstance(force, bool):
        raise MergeError(f"{place[:-7]}.force must be true or false, got {show(force)}")
    if source is None:
        return TokenSource("auto", force=force)
    if not isinstance(source, Mapping) or "kind" not in source:
        return TokenSource("model", reference_of(source, place), force=force)
    kind = source["kind"]
    if kind == "zero":
        fields(source, place, ("kind",))
        return TokenSource("zero", force=force)
    if kind != "model_token":
        raise MergeError(f"{place}.kind must be zero or model_token, got {show(kind)}")
    source = fields(source, place, ("kind", "model", "token_id", "token"), ("model",))
    token, number = source.get("token"), source.get("token_id")
    if (token is None) == (number is None):
        raise MergeError(f"{place}: give either token or token_id")
    if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
        raise MergeError(f"{place}.token_id must be a whole number, got {show(number)}")
    token = None if token is None else text_of(token, f"{place}.token")
    model = reference_of(source["model"], f"{place}.model")
    return TokenSource("model_token", model, token, number, force)
