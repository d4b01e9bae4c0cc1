"""Configurations of several stages: YAML documents with names, in the format of mergekit-multi.

Each document is a configuration of its own with a `name`; wherever a model is expected, a stage's
name stands for its result. The document without a name, or else the only stage that no other uses,
is the final one.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lm.merging.config import MergeConfig, parse_config
from lm.merging.types import MergeError
from lm.merging.yaml_text import nearest, read_documents, show

__all__ = ["Stage", "Stages", "read_stages"]

_REFERENCES = ("model", "base_model", "tokenizer_source", "source", "path")
_RESERVED = ("base", "union", "auto", "zero", ".", "..")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One document."""

    name: str | None
    document: Mapping[str, Any]
    needs: tuple[str, ...]
    """Names of the stages whose results it takes."""
    text: str
    """Its YAML as written, without the name."""
    models: tuple[str, ...]
    """Models that are no stages."""

    @property
    def title(self) -> str:
        """For messages."""
        return "the final stage" if self.name is None else f"stage {self.name!r}"


@dataclasses.dataclass(frozen=True)
class Stages:
    """A checked file of several documents."""

    place: str
    text: str
    order: tuple[Stage, ...]
    """Every stage after those it needs; the last one becomes OUT."""
    unused: tuple[str, ...]
    """Names that no stage uses, without the final stage."""

    def folder(self, out: Path, intermediate: Path | None) -> Path:
        """Where the results of all stages but the last are."""
        return intermediate or out.absolute().parent / f".{out.absolute().name}.stages"

    def config(self, stage: Stage, folder: Path) -> MergeConfig:
        """The configuration of a stage with paths in place of names."""
        names = [each.name for each in self.order if each.name]
        document, _ = _with_paths(stage.document, names, folder)
        return parse_config(document, f"{self.place}, {stage.title}", stage.text)


def read_stages(path: Path) -> Stages | None:
    """The stages of a configuration file, or None if it holds one merge (or cannot be read).

    Raises:
      MergeError: a document is wrong, a name is unknown, repeated or no folder's name, stages
        need each other in a circle, or it is not clear which one is the final one.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None  # reading it as one configuration says what is wrong
    if "\n---" not in text:
        return None
    documents = [item for item in read_documents(text, path.name) if item is not None]
    if len(documents) < 2:
        return None
    names = _names(documents, path.name)
    stages = {
        name: _stage(name, document, names, path.name)
        for name, document in zip(names, documents, strict=True)
    }
    used = {need for stage in stages.values() for need in stage.needs}
    order = _ordered(stages, path.name)  # circles first: in one, every stage is used
    ends = [name for name in names if name not in used]
    if None not in names and len(ends) != 1:
        raise MergeError(
            f"{path.name}: no stage uses any of {', '.join(map(str, ends))}: leave the name of the "
            "one out that is to become OUT"
        )
    final = None if None in names else ends[0]
    order.append(order.pop(next(n for n, stage in enumerate(order) if stage.name == final)))
    unused = tuple(name for name in ends if name is not None and name != final)
    return Stages(path.name, text, tuple(order), unused)


def _names(documents: Iterable[Any], place: str) -> list[str | None]:
    names: list[str | None] = []
    for number, document in enumerate(documents, 1):
        if not isinstance(document, Mapping):
            raise MergeError(f"{place}: document {number} must be a mapping, got {show(document)}")
        name = document.get("name")
        if name is None and None in names:
            raise MergeError(
                f"{place}: documents {names.index(None) + 1} and {number} have no name; only the "
                "final stage may do without"
            )
        if name is not None:
            plain = isinstance(name, str) and name.strip() == name and name.isprintable()
            if not plain or not name or set(name) & set("/\\+:") or name.startswith("."):
                raise MergeError(
                    f"{place}: document {number}: name must be a plain folder name, got "
                    f"{show(name)}"
                )
            if name in _RESERVED:
                raise MergeError(f"{place}: a stage cannot be called {name!r}, which means a rule")
            if name in names:
                raise MergeError(f"{place}: two stages are called {name!r}")
        names.append(name)
    return names


def _stage(name: str | None, document: Mapping, names: list[str | None], place: str) -> Stage:
    rest = {key: value for key, value in document.items() if key != "name"}
    where = place if name is None else f"{place}, stage {name!r}"
    config = parse_config(rest, where)
    known = [each for each in names if each]
    _, needs = _with_paths(rest, known, Path())
    own = tuple(ref for ref in config.references() if ref.split("+")[0] not in known)
    for ref in own:
        start = ref.rpartition("+")[0] or ref
        if not Path(ref).expanduser().exists() and not Path(start).expanduser().exists():
            raise MergeError(
                f"{where}: there is neither a stage nor a folder {start!r}{nearest(start, known)}"
            )
    return Stage(name, rest, tuple(needs), config.text, own)


def _with_paths(document: Any, names: Iterable[str], folder: Path) -> tuple[Any, dict[str, None]]:
    """A document with paths in place of stages' names, and the names that were found."""
    found: dict[str, None] = {}

    def visit(value: Any, key: str) -> Any:
        if isinstance(value, Mapping):
            return {name: visit(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [visit(item, key) for item in value]
        if isinstance(value, str) and key in _REFERENCES:
            start, plus, adapter = value.partition("+")
            if start in names:
                found[start] = None
                return f"{folder / start}{plus}{adapter}"
        return value

    return visit(document, ""), found


def _ordered(stages: Mapping[str | None, Stage], place: str) -> list[Stage]:
    """Every stage after those it needs, otherwise as written."""
    order: list[Stage] = []
    done: set[str | None] = set()
    path: list[str | None] = []
    pending: list[tuple[str | None, bool]] = [(name, False) for name in reversed(list(stages))]
    while pending:
        name, left = pending.pop()
        if left:
            path.pop()
            if name not in done:
                done.add(name)
                order.append(stages[name])
        elif name in path:
            circle = " -> ".join(map(str, [*path[path.index(name) :], name]))
            raise MergeError(f"{place}: the stages need each other in a circle: {circle}")
        elif name not in done:
            path.append(name)
            pending.append((name, True))
            pending += [(need, False) for need in reversed(stages[name].needs)]
    return order
