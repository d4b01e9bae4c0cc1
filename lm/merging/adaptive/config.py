"""The YAML of methods that learn, read as strictly as that of the static ones."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from lm.merging.adaptive.options import METHODS, AdaptiveMethod
from lm.merging.config import DTYPES, load_text
from lm.merging.parameters import Scope, resolve
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

__all__ = ["AdaptiveConfig", "Task", "TaskData", "adaptive_method", "load_adaptive"]

KINDS = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".json": "jsonl"}
_STATIC = ("slices", "modules", "tokenizer", "tokenizer_source", "out_dtype", "chat_template")


@dataclasses.dataclass(frozen=True)
class TaskData:
    """Unlabelled text of a task: `data:` of a model."""

    path: str
    kind: str
    """"text": one text, cut into rows. "jsonl": a document a line, in `field`. "prompts": a prompt
    a line; what counts is the prediction behind its last token."""
    field: str = "text"
    answers: tuple[str, ...] = ()
    """Classification: only these tokens behind each prompt, one token each, are compared."""

    @property
    def prompts(self) -> bool:
        """Whether the last prediction of a row alone counts."""
        return self.kind == "prompts" or bool(self.answers)


@dataclasses.dataclass(frozen=True)
class Task:
    """An entry of `models`."""

    model: str
    name: str
    data: TaskData
    parameters: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class AdaptiveConfig:
    """A whole merge that learns, as its author wrote it."""

    merge_method: str
    models: tuple[Task, ...]
    base_model: str | None
    parameters: dict[str, Any]
    merged: str | None = None
    """Surgery: the model that is corrected, where it is not made by task arithmetic."""
    coefficients: str | None = None
    """AdaMerging: a coefficients.json to begin with."""
    dtype: str | None = None
    text: str = ""

    @property
    def method(self) -> AdaptiveMethod:
        """What is declared of the method."""
        return METHODS[self.merge_method]

    def references(self) -> tuple[str, ...]:
        """All models, each once, the base first."""
        seen = dict.fromkeys([self.base_model] if self.base_model else [])
        seen |= dict.fromkeys(task.model for task in self.models)
        return (*seen, *([self.merged] if self.merged else []))


def adaptive_method(path: Path) -> str | None:
    """The method of a configuration file if it is one that learns; None for all other files."""
    try:
        documents = read_documents(path.read_text(encoding="utf-8"), path.name)
    except (OSError, UnicodeDecodeError, MergeError):
        return None  # read as a static merge, which says what is wrong
    first = documents[0] if len(documents) == 1 else None
    method = first.get("merge_method") if isinstance(first, dict) else None
    return method if isinstance(method, str) and method in METHODS else None


def load_adaptive(path: str | Path) -> AdaptiveConfig:
    """Read a configuration file.

    Raises:
        MergeError: one line with the place, the value and the remedy.
    """
    path = Path(path)
    text = load_text(path)
    return parse_adaptive(read_documents(text, path.name)[0], path.name, text)


def parse_adaptive(
    data: Any, place: str = "the configuration", text: str | None = None
) -> AdaptiveConfig:
    """A configuration from what YAML gave.

    Raises:
        MergeError: as `load_adaptive`.
    """
    known = ("merge_method", "models", "base_model", "parameters", "dtype", "merged")
    known += ("coefficients",)
    for key in _STATIC:
        if isinstance(data, dict) and data.get(key) is not None:
            raise MergeError(f"{place}: {key} is for static methods: make such a model first")
    data = fields(data, place, known, ("merge_method", "models"))
    method = METHODS[text_of(data["merge_method"], "merge_method")]
    base = reference_of(data.get("base_model"), "base_model", optional=True)
    if method.base and base is None and data.get("merged") is None:
        raise MergeError(f"{method.name} works on task vectors: give the base_model they are from")
    if not method.base and base is not None:
        raise MergeError(f"{method.name} takes no base_model: list it under models, or remove it")
    extras = {}
    for key, methods in {
        "merged": ("surgery", "surgery_v2"),
        "coefficients": ("adamerging", "adamerging++"),
    }.items():
        extras[key] = reference_of(data.get(key), key, optional=True)
        if extras[key] is not None and method.name not in methods:
            raise MergeError(f"{key} is for {' and '.join(methods)}, not for {method.name}")
    whole = _single(settings_of(data.get("parameters"), "parameters"), "parameters")
    names = [parameter.name for parameter in (*method.params, *method.per_model)]
    _check_names(whole, "parameters", names)
    tasks = tuple(_task(item, where, method, whole) for where, item in _models(data, method))
    for key, what in (("name", "name"), ("model", "model")):
        values = [getattr(task, key) for task in tasks]
        if repeated := [value for value in values if values.count(value) > 1]:
            raise MergeError(f"{place}: two tasks have the {what} {repeated[0]!r}")
    _check_tasks(method, tasks, base)
    file = extras["coefficients"]
    if file is not None and not Path(file).expanduser().is_file():
        raise MergeError(f"coefficients: there is no file {file}")
    scope = [Scope("parameters", whole)]
    dtype = data.get("dtype")
    if dtype is not None:
        dtype = text_of(dtype, "dtype").removeprefix("torch.")
        if dtype not in DTYPES[:3]:
            raise MergeError(f"dtype: unknown type {show(dtype)}{nearest(dtype, DTYPES[:3])}")
    return AdaptiveConfig(
        method.name,
        tasks,
        base,
        resolve(method.params, scope, "", 0.0, f"the method {method.name}"),
        dtype=dtype,
        text=json.dumps(data, indent=1) if text is None else text,
        **extras,
    )


def _check_tasks(method: AdaptiveMethod, tasks: tuple[Task, ...], base: str | None) -> None:
    for task in tasks:
        if task.model == base:
            raise MergeError(
                f"{base} is the base_model and a model to merge: its task vector is zero, so leave "
                "it out of models"
            )
        if task.name == "none" and method.name.startswith("surgery"):
            raise MergeError("none names the model without corrections: give the task another name")
    if method.name == "fisher" and not any(task.parameters["weight"] for task in tasks):
        raise MergeError("fisher: all weights are 0: give a model more")


def _models(data: dict, method: AdaptiveMethod) -> list[tuple[str, Any]]:
    found = items_of(data["models"], "models")
    if len(found) < method.models:
        raise MergeError(f"{method.name} needs {method.models} models or more, got {len(found)}")
    return found


def _task(value: Any, place: str, method: AdaptiveMethod, whole: Settings) -> Task:
    value = fields(value, place, ("model", "name", "data", "parameters"), ("model",))
    model = reference_of(value["model"], f"{place}.model")
    if value.get("data") is None:
        raise MergeError(
            f"{place}: {method.name} learns from text, and {model} has no data: give data: FILE "
            f"(text, .jsonl or prompts; no labels), or use a method without data: {method.fallback}"
        )
    own = _single(settings_of(value.get("parameters"), f"{place}.parameters"), place)
    _check_names(own, f"{place}.parameters", [p.name for p in method.per_model])
    scopes = [Scope(f"{place}.parameters", own, True), Scope("parameters", whole)]
    name = value.get("name") or Path(model.rpartition("+")[2]).name
    name = text_of(name, f"{place}.name")
    if set(name) & set("/\\") or name.startswith("."):
        raise MergeError(f"{place}.name must be a plain file name, got {show(name)}")
    return Task(
        model,
        name,
        _data(value["data"], f"{place}.data"),
        resolve(method.per_model, scopes, "", 0.0, f"the model {model}"),
    )


def _data(value: Any, place: str) -> TaskData:
    if isinstance(value, str):
        value = {"path": value}
    value = fields(value, place, ("path", "kind", "field", "answers"), ("path",))
    path = text_of(value["path"], f"{place}.path")
    if not Path(path).expanduser().is_file():
        raise MergeError(f"{place}: there is no file {path}")
    kind = value.get("kind") or KINDS.get(Path(path).suffix)
    if kind not in ("text", "jsonl", "prompts"):
        raise MergeError(
            f"{place}.kind must be text, jsonl or prompts, got {show(kind)} for {path}"
        )
    answers = [text_of(item, where) for where, item in items_of(value.get("answers"), place)]
    if len(answers) == 1 or len(set(answers)) < len(answers):
        raise MergeError(f"{place}.answers must be two or more different ones, got {answers}")
    if answers and kind == "text":
        raise MergeError(f"{place}.answers follow prompts: set kind to prompts or jsonl")
    field = text_of(value.get("field", "text"), f"{place}.field")
    return TaskData(path, kind, field, tuple(answers))


def _single(settings: Settings, place: str) -> Settings:
    for name, value in settings.items():
        if isinstance(value, tuple):
            raise MergeError(f"{place}.{name} must be one value: it is not chosen by tensor here")
    return settings


def _check_names(settings: Settings, place: str, known: list[str]) -> None:
    for name in settings:
        if name not in known:
            raise MergeError(f"{place}: unknown parameter {name!r}{nearest(name, known)}")
