"""Parameters of a method for one tensor: filters, gradients and scopes as mergekit reads them.

A setting is looked up from the narrowest scope to the widest: the model's entry, the slice, the
module, the whole configuration, the method's default. A list of conditions gives the value of the
first whose filter is contained in the tensor's name (none or `*` fits always); where none fits,
the next scope is asked. A gradient of n values is interpolated linearly at position t (n - 1),
where t runs from 0 in the first layer of a slice to 1 in the last. A slice of one layer has
t = 1; tensors outside the layers (embedding, final norm, head) have t = 0: the first value.
Confirmed against mergekit 0.1.5 by `tests/lm/merging/test_mergekit.py`.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lm.merging.types import MergeError, Method, Parameter
from lm.merging.yaml_text import Condition, Setting, Settings, nearest, show

__all__ = ["Scope", "check_parameters", "evaluate", "find_method", "resolve", "unused_parameters"]

TRUE = ("1", "true", "t", "yes", "y", "on")
FLAVORS = (None, "paper", "mergekit")
KINDS = ("matrix", "vector")
FALSE = ("0", "false", "f", "no", "n", "off")


@dataclasses.dataclass(frozen=True)
class Scope:
    """One `parameters:` mapping and where it stands."""

    place: str
    settings: Settings
    of_model: bool = False
    """Whether it stands in a model's or a source's entry: only per-model parameters count."""


def find_method(name: str, flavor: str | None = None, kind: str = "matrix") -> Method:
    """The method of that name for tensors of a kind, or `MergeError` with the nearest one."""
    from lm.merging import methods

    if name not in methods.METHODS:
        raise MergeError(f"unknown merge_method {name!r}{nearest(name, methods.METHODS)}")
    return methods.get(name, flavor, kind)


def evaluate(setting: Setting, parameter: Parameter, tensor: str, t: float, place: str) -> Any:
    """The value of a setting for a tensor, or None if no condition fits it.

    Args:
        setting: as written.
        parameter: its declaration: kind and range.
        tensor: the name that filters look at.
        t: position of the layer within its slice, in [0, 1].
        place: where the setting stands, for errors.
    """
    if isinstance(setting, tuple) and setting and isinstance(setting[0], Condition):
        for condition in setting:
            if condition.filter in (None, "*") or condition.filter in tensor:
                return evaluate(condition.value, parameter, tensor, t, place)
        return None
    if not isinstance(setting, tuple):
        return _value(setting, parameter, place)
    values = [_value(item, parameter, place) for item in setting]
    position = t * (len(values) - 1)
    low = int(position)
    if parameter.kind == "bool":
        return values[low]
    high, share = min(len(values) - 1, low + 1), position - low
    return _value((1 - share) * values[low] + share * values[high], parameter, place)


def resolve(
    parameters: Sequence[Parameter], scopes: Sequence[Scope], tensor: str, t: float, what: str
) -> dict[str, Any]:
    """Values of all parameters for a tensor; `scopes` run from the narrowest to the widest.

    Raises:
        MergeError: a required parameter has no value; `what` says for which model or method.
    """
    values = {}
    for parameter in parameters:
        value = None
        for scope in scopes:
            if parameter.name in scope.settings:
                place = f"{scope.place}.{parameter.name}"
                value = evaluate(scope.settings[parameter.name], parameter, tensor, t, place)
                if value is not None:
                    break
        if value is None:
            if parameter.required:
                raise MergeError(
                    f"{parameter.name} is missing for {what} (tensor {tensor}): give it in that "
                    "entry's parameters, or in the parameters of the whole merge"
                )
            value = parameter.default
        values[parameter.name] = value
    return values


def check_parameters(config: Any) -> None:
    """Check the method, and the name, kind and range of every parameter of a `MergeConfig`."""
    from lm.merging import methods

    own, everyone = _declared(config.merge_method), {}
    for name in methods.METHODS:
        everyone |= _declared(name)
    for scope in _scopes(config):
        for name, setting in scope.settings.items():
            if name not in everyone:
                known = own or everyone
                raise MergeError(f"{scope.place}: unknown parameter {name!r}{nearest(name, known)}")
            if name in own:
                for value in _scalars(setting):
                    _value(value, own[name], f"{scope.place}.{name}")


def unused_parameters(config: Any) -> list[str]:
    """A line for every parameter that other methods know and this one does not look at."""
    every = _declared(config.merge_method)
    readings = [
        find_method(config.merge_method, flavor, kind) for flavor in FLAVORS for kind in KINDS
    ]
    each = {parameter.name for method in readings for parameter in method.per_model}
    lines = []
    for scope in _scopes(config):
        for name in scope.settings:
            if name not in every:
                reason = f"{config.merge_method} has no such parameter"
            elif scope.of_model and name not in each:
                reason = "it belongs to the whole merge, not to one model"
            else:
                continue
            lines.append(f"{scope.place}.{name} has no effect: {reason}")
    return lines


def _declared(name: str) -> dict[str, Parameter]:
    """All parameters of a method in any reading and for any kind of tensor."""
    readings = [find_method(name, flavor, kind) for flavor in FLAVORS for kind in KINDS]
    return {item.name: item for method in readings for item in (*method.per_model, *method.params)}


def _scopes(config: Any) -> Iterator[Scope]:
    yield Scope("parameters", config.parameters)
    parts = [("", config)] + [(f"modules.{name}.", part) for name, part in config.modules.items()]
    for place, part in parts:
        if place:
            yield Scope(f"{place}parameters", part.parameters)
        for index, entry in enumerate(part.models):
            yield Scope(f"{place}models[{index}].parameters", entry.parameters, True)
        for index, piece in enumerate(part.slices):
            yield Scope(f"{place}slices[{index}].parameters", piece.parameters)
            for number, source in enumerate(piece.sources):
                where = f"{place}slices[{index}].sources[{number}].parameters"
                yield Scope(where, source.parameters, True)


def _scalars(setting: Setting) -> Iterable[Any]:
    if isinstance(setting, Condition):
        return _scalars(setting.value)
    if isinstance(setting, tuple):
        return [value for item in setting for value in _scalars(item)]
    return [setting]


def _value(value: Any, parameter: Parameter, place: str) -> Any:
    kind = parameter.kind
    if kind == "bool":
        word = str(value).lower() if isinstance(value, str) else str(int(value))
        whole = isinstance(value, str | bool) or value in (0, 1)
        if not whole or word not in TRUE + FALSE:
            raise MergeError(f"{place} must be true or false, got {show(value)}")
        return word in TRUE
    try:
        number = float(value)
    except ValueError:
        raise MergeError(f"{place} must be a number, got {show(value)}") from None
    if not math.isfinite(number):
        raise MergeError(f"{place} must be finite, got {show(value)}")
    if kind == "integer":
        if not number.is_integer():
            raise MergeError(f"{place} must be a whole number, got {show(value)}")
        number = int(number)
    low, high = parameter.low, parameter.high
    if (low is not None and number < low) or (high is not None and number > high):
        limits = f"at least {low:g}" if high is None else f"at most {high:g}"
        if low is not None and high is not None:
            limits = f"between {low:g} and {high:g}"
        raise MergeError(f"{place} must be {limits}, got {show(value)}")
    return number
