"""Merge configurations with values to be searched for.

A template is a merge configuration in which numbers are replaced by

    {search: [low, high]}                    a number in [low, high]
    {search: [low, high], start: 0.3}        begins there instead of in the middle
    {search: [low, high], log: true}         searched by its logarithm
    {search: [low, high], name: shared}      every place of that name gets the same value
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm.merging.types import MergeError
from lm.merging.yaml_text import fields, read_documents, show

__all__ = ["Dimension", "Template", "load_template"]


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One number that is searched for."""

    name: str
    low: float
    high: float
    start: float
    log: bool = False

    def value(self, position: float) -> float:
        """The number at a position in [0, 1]."""
        position = min(1.0, max(0.0, float(position)))
        if self.log:
            value = self.low * (self.high / self.low) ** position
        else:
            value = self.low + (self.high - self.low) * position
        return min(self.high, max(self.low, value))

    @property
    def position(self) -> float:
        """Where the search begins, in [0, 1]."""
        if self.log:
            return math.log(self.start / self.low) / math.log(self.high / self.low)
        return (self.start - self.low) / (self.high - self.low)


@dataclasses.dataclass(frozen=True)
class Template:
    """A configuration, and the numbers that are to be found."""

    data: Any
    dimensions: tuple[Dimension, ...]

    def fill(self, values: Sequence[float]) -> str:
        """The configuration with these values, one per dimension, as YAML."""
        import yaml

        named = {own.name: float(value) for own, value in zip(self.dimensions, values, strict=True)}

        def filled(value: Any, place: str) -> Any:
            if isinstance(value, dict) and "search" in value:
                return named[value.get("name", place)]
            if isinstance(value, dict):
                return {key: filled(item, _inside(place, key)) for key, item in value.items()}
            if isinstance(value, list):
                return [filled(item, f"{place}[{n}]") for n, item in enumerate(value)]
            return value

        return yaml.safe_dump(filled(self.data, ""), sort_keys=False, allow_unicode=True)


def load_template(path: str | Path) -> Template:
    """Read a template.

    Raises:
        MergeError: one line with the place, the value and the remedy.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MergeError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise MergeError(f"{path} cannot be read: {error.strerror}") from None
    documents = read_documents(text, path.name)
    if len(documents) != 1:
        raise MergeError(f"{path.name} holds {len(documents)} documents instead of one template")
    found: dict[str, Dimension] = {}
    try:
        _collect(documents[0], "", found)
        data = json.loads(json.dumps(documents[0]))  # no YAML anchors: every place is its own
    except (RecursionError, TypeError, ValueError) as error:
        raise MergeError(f"{path.name} is no merge configuration: {error}") from None
    if not found:
        raise MergeError(
            f"{path.name} has nothing to search for: write a number as {{search: [low, high]}}, "
            "for example weight: {search: [0, 1]}"
        )
    return Template(data, tuple(found.values()))


def _collect(value: Any, place: str, found: dict[str, Dimension]) -> None:
    if isinstance(value, list):
        for number, item in enumerate(value):
            _collect(item, f"{place}[{number}]", found)
    elif isinstance(value, dict) and "search" in value:
        own = _dimension(value, place)
        if found.get(own.name, own) != own:
            raise MergeError(f"{place}: {own.name} is searched for in another range elsewhere")
        found[own.name] = own
    elif isinstance(value, dict):
        for key, item in value.items():
            _collect(item, _inside(place, key), found)


def _inside(place: str, key: Any) -> str:
    return f"{place}.{key}" if place else str(key)


def _dimension(value: dict, place: str) -> Dimension:
    shown = place or "the template"
    value = fields(value, shown, ("search", "start", "log", "name"), ("search",))
    ends, log, name = value["search"], value.get("log", False), value.get("name", place)
    numbers = isinstance(ends, list) and len(ends) == 2 and all(map(_is_number, ends))
    if not numbers or not ends[0] < ends[1]:
        raise MergeError(f"{shown}.search must be [low, high] with low < high, got {show(ends)}")
    low, high = map(float, ends)
    if not isinstance(log, bool) or (log and low <= 0):
        raise MergeError(f"{shown}.log: true needs a range above 0, got {show(ends)}")
    if not isinstance(name, str) or not name:
        raise MergeError(f"{shown}.name must be text, got {show(name)}")
    start = value.get("start")
    if start is None:
        start = math.sqrt(low * high) if log else (low + high) / 2
    if not _is_number(start) or not low <= start <= high:
        raise MergeError(f"{shown}.start must lie in {show(ends)}, got {show(start)}")
    return Dimension(name, low, high, float(start), log)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
