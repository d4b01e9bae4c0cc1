"""Reading YAML strictly: documents without repeated keys, and checked values out of them.

Everything a user can get wrong ends in a `MergeError` of one line that names the place, the value
and what would be right.
"""

import dataclasses
import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from lm.merging.types import MergeError

__all__ = [
    "Condition",
    "Scalar",
    "Setting",
    "Settings",
    "fields",
    "items_of",
    "nearest",
    "read_documents",
    "reference_of",
    "settings_of",
    "show",
    "text_of",
]

Scalar = bool | int | float | str


@dataclasses.dataclass(frozen=True)
class Condition:
    """One entry of a filtered parameter: a value for tensors whose name contains `filter`."""

    value: Scalar | tuple[Scalar, ...]
    filter: str | None = None


Setting = Scalar | tuple[Scalar, ...] | tuple[Condition, ...]
"""A parameter as written: one value, a gradient over the layers, or a list of conditions."""
Settings = Mapping[str, Setting]


def read_documents(source: str, place: str) -> list[Any]:
    """The documents of a YAML text as plain values; a repeated key is an error."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader, node):
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<: *anchor`: own keys may repeat what it brings
            key = loader.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise MergeError(f"{place}, line {line}: the key {show(key)} appears twice")
            seen.add(key)
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    try:
        return list(yaml.load_all(source, Loader))
    except MergeError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = " ".join(str(error.problem or error.context).split())
        raise MergeError(f"{place}{where} is not YAML: {reason[:300]}") from None
    except RecursionError:
        raise MergeError(f"{place} is not YAML that can be read: nested too deeply") from None
    except Exception as error:  # the parser fails in many ways on values of explicit types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MergeError(f"{place} is not YAML that can be read: {reason[:300]}") from None


def show(value: Any) -> str:
    """A short `repr` of something a user wrote, safe for deep and huge values."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return f"a very large {type(value).__name__}"


def nearest(name: Any, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" or the list of known names, for the end of an error message."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name)[:80], known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(known)})"


def fields(value: Any, place: str, known: Iterable[str], required: Iterable[str] = ()) -> dict:
    """`value` as a mapping that has only known keys and all required ones, or `MergeError`."""
    known = tuple(known)
    if not isinstance(value, Mapping):
        raise MergeError(f"{place} must be a mapping with {', '.join(known)}, got {show(value)}")
    for key in value:
        if key not in known:
            raise MergeError(f"{place}: unknown key {show(key)}{nearest(key, known)}")
    for key in required:
        if value.get(key) is None:
            raise MergeError(f"{place}: {key} is missing")
    return dict(value)


def items_of(value: Any, place: str) -> list[tuple[str, Any]]:
    """The items of a list, each with its place; nothing for a missing list."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise MergeError(f"{place} must be a list, got {show(value)}")
    return [(f"{place}[{index}]", item) for index, item in enumerate(value)]


def text_of(value: Any, place: str) -> str:
    """`value` as text that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise MergeError(f"{place} must be text, got {show(value)}")
    return value


def reference_of(value: Any, place: str, optional: bool = False) -> str | None:
    """`path` or `path+lora`, from text or from mergekit's {model: {path}, lora: {path}}."""
    if value is None and optional:
        return None
    if isinstance(value, Mapping):
        value = fields(value, place, ("model", "lora", "override_architecture"), ("model",))
        if value.get("override_architecture") is not None:
            raise MergeError(f"{place}.override_architecture is not needed here: remove it")
        paths = [_path(value[key], f"{place}.{key}") for key in ("model", "lora") if value.get(key)]
        return "+".join(paths)
    value = text_of(value, place)
    if not all(part.strip() for part in value.split("+")):
        raise MergeError(f"{place} must be a path or path+lora, got {show(value)}")
    return value


def _path(value: Any, place: str) -> str:
    if isinstance(value, Mapping):
        value = fields(value, place, ("path", "revision"), ("path",))
        if value.get("revision") is not None:
            raise MergeError(f"{place}.revision: only local folders are read; name a folder")
        value = value["path"]
    return text_of(value, place)


def settings_of(value: Any, place: str) -> dict[str, Setting]:
    """A `parameters:` mapping; settings that are null count as absent."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise MergeError(f"{place} must be a mapping from parameter names, got {show(value)}")
    for name in value:
        text_of(name, f"{place}: a name")
    return {
        name: _setting(item, f"{place}.{name}") for name, item in value.items() if item is not None
    }


def _setting(value: Any, place: str) -> Setting:
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list) or not value:
        return _scalar_or_gradient(value, place)
    if not any(isinstance(item, Mapping) for item in value):
        return _scalar_or_gradient(value, place)
    conditions = []
    for where, item in items_of(value, place):
        item = fields(item, where, ("value", "filter"), ("value",))
        name = item.get("filter")
        if name is not None and not isinstance(name, str):
            raise MergeError(f"{where}.filter must be text, got {show(name)}")
        conditions.append(Condition(_scalar_or_gradient(item["value"], f"{where}.value"), name))
    return tuple(conditions)


def _scalar_or_gradient(value: Any, place: str) -> Any:
    single = not isinstance(value, list)
    for item in [value] if single else value:
        if not isinstance(item, Scalar):
            kinds = "a number, true or false, a list of numbers, or a list of {filter, value}"
            raise MergeError(f"{place} must be {kinds}, got {show(value)}")
        if isinstance(item, int | float) and not abs(item) < 1e300:
            raise MergeError(f"{place} must be finite, got {show(item)}")
    if not single and not value:
        raise MergeError(f"{place} is an empty list: give at least one value")
    return value if single else tuple(value)
