"""The forms of a configuration (models, slices, modules) brought to one: groups of layers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lm.merging.architecture import Architecture
from lm.merging.config import MergeConfig, Module, Slice, SliceSource
from lm.merging.parameters import Scope
from lm.merging.types import MergeError, Method

__all__ = ["Group", "Part", "groups_of", "modules_of", "pairs"]


@dataclasses.dataclass(frozen=True)
class Part:
    """A model as it takes part in one slice."""

    ref: str
    start: int
    """Its first layer."""
    scope: Scope | None
    """Parameters of its entry; None for a base that is not listed."""


@dataclasses.dataclass(frozen=True)
class Group:
    """One slice: who takes part, and the scopes behind each model's own."""

    parts: tuple[Part, ...]
    base: int | None
    """Which part is the base: the first of that name."""
    anchor: str | None
    """The base_model as written, also for methods that take it as one model among others."""
    length: int
    scopes: tuple[Scope, ...]
    place: str

    @property
    def lead(self) -> Part:
        """Whose names and settings the output takes: the base_model, or the first part."""
        return next((part for part in self.parts if part.ref == self.anchor), self.parts[0])


def pairs(values: Mapping[str, Any]) -> str:
    """ "a has 1, b has 2": for error messages."""
    return ", ".join(f"{name} has {value}" for name, value in values.items())


def modules_of(config: MergeConfig, donor: str, described: Architecture) -> dict[str, Module]:
    """The configuration by module, whatever form it has; `described` is the donor's."""
    stacks = described.stacks
    known = list(stacks) or ["default"]
    loose = dict.fromkeys(described.loose.values())
    if config.models:
        everything = dict.fromkeys([*known, *loose])
        return {name: Module(models=config.models) for name in everything}
    if config.slices:
        if len(known) > 1:
            raise MergeError(
                f"these models have several stacks of layers: use modules with {known}"
            )
        return {known[0]: Module(slices=config.slices)}
    modules = {}
    for name, module in config.modules.items():
        if name not in stacks and name not in loose:
            if len(known) > 1 or name not in ("text_decoder", "default"):
                raise MergeError(f"modules: no module {name!r} in {donor} (it has {known})")
            name = known[0]
        modules[name] = module
    return modules


def groups_of(
    config: MergeConfig,
    method: Method,
    architectures: Mapping[str, Architecture],
    name: str,
    module: Module,
) -> list[Group]:
    """The slices of the module `name`; a list of models is one slice of all layers.

    Raises:
        MergeError: layers that do not exist, or too few or too many models for the method.
    """
    where = f"modules.{name}." if config.modules else ""
    outer = [Scope(f"{where}parameters", module.parameters)] if config.modules else []
    outer.append(Scope("parameters", config.parameters))
    pieces, places = list(module.slices), [f"{where}slices[{i}]" for i in range(len(module.slices))]
    if module.models:
        listed = [(entry.model, entry.parameters) for entry in module.models]
        if config.base_model and config.base_model not in dict(listed):
            listed.append((config.base_model, {}))
        sources = []
        for ref, settings in listed:
            stack = architectures[ref].stacks.get(name)
            sources.append(SliceSource(ref, (0, stack.count if stack else 0), settings))
        counts = {source.model: source.layer_range[1] for source in sources}
        if len(set(counts.values())) > 1:
            raise MergeError(
                f"{where}models: numbers of layers differ: {pairs(counts)}; choose layers with "
                "slices and layer_range"
            )
        pieces, places = [Slice(tuple(sources))], [f"{where}models"]
    groups = []
    for piece, place in zip(pieces, places, strict=True):
        parts, in_slice = [], bool(module.slices)
        for index, source in enumerate(piece.sources):
            entry = f"{place}.sources[{index}]" if in_slice else f"{place}[{index}]"
            scope = Scope(f"{entry}.parameters", source.parameters, True)
            parts.append(Part(source.model, source.layer_range[0], scope))
            if in_slice:
                _check_range(architectures, name, source, entry)
        anchor = piece.base_model or config.base_model
        base = _base_of(method, anchor, parts, place)
        start, stop = piece.sources[0].layer_range
        scopes = [Scope(f"{place}.parameters", piece.parameters)] if in_slice else []
        groups.append(Group(tuple(parts), base, anchor, stop - start, (*scopes, *outer), place))
    return groups


def _check_range(
    architectures: Mapping[str, Architecture], module: str, source: SliceSource, place: str
) -> None:
    stack = architectures[source.model].stacks.get(module)
    count = stack.count if stack else 0
    if source.layer_range[1] > count:
        raise MergeError(
            f"{place}.layer_range {list(source.layer_range)} goes beyond the {count} layers of "
            f"{source.model}"
        )


def _base_of(method: Method, base: str | None, parts: list[Part], place: str) -> int | None:
    """Which part is the base; checks the method's demands on base and number of models."""
    if method.base == "none":
        base = None
    refs = [part.ref for part in parts]
    if method.base in ("required", "one of the models") and base is None:
        raise MergeError(f"{method.name} needs base_model: give it for the whole merge")
    if base is not None and base not in refs:
        raise MergeError(
            f"{place}: the base_model {base} is not among the sources: list it with the "
            "layer_range that the others are compared with"
        )
    count = len(refs) - (base is not None)
    low, high = method.models
    if count < low or (high is not None and count > high):
        need = f"{low}" if high == low else f"{low} or more" if high is None else f"{low} to {high}"
        besides = " besides the base" if base is not None else ""
        raise MergeError(f"{place}: {method.name} needs {need} models{besides}, got {count}")
    return None if base is None else refs.index(base)
