"""Merges in several stages, in the format of mergekit-multi.

One file holds several YAML documents. Each is a configuration of its own with a `name`; wherever a
model is expected, a stage's name stands for its result. The document without a name, or else the
only stage that no other uses, is the final one and becomes OUT. The others are made first, in the
order of what needs what, in folders of their names within the intermediate folder. Each is an
ordinary merge there, so an interrupted one continues and a finished one is checked and kept.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from lm.merging.config import MergeConfig, parse_config
from lm.merging.manifest import MANIFEST, check_output
from lm.merging.pieces import pieces_of
from lm.merging.session import Session
from lm.merging.store import open_store
from lm.merging.store.files import read_json
from lm.merging.types import MergeError, StorageError
from lm.merging.yaml_text import nearest, read_documents, show

__all__ = ["Stage", "Stages", "describe_stages", "finished", "read_stages", "run_stages"]

RECORD = "merge_stages.json"
_REFERENCES = ("model", "base_model", "tokenizer_source", "source", "path")
_RESERVED = ("base", "union", "auto", "zero", ".", "..")

MakeSession = Callable[[MergeConfig, Path, bool], Session]
"""`make(config, out, final)`: the session of one stage."""


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
    unused = tuple(name for name in ends if name != final)
    return Stages(path.name, text, tuple(order), unused)


def run_stages(
    stages: Stages,
    out: Path,
    make: MakeSession,
    *,
    options: str = "",
    intermediate: Path | None = None,
    resume: bool = False,
    progress: TextIO | None = None,
    say: Callable[[str], None] = print,
    after: Callable[[Session], None] = lambda _: None,
) -> None:
    """Make all stages; OUT is complete afterwards.

    Args:
      stages: what is merged.
      out: the folder of the final stage.
      make: gives the session of a stage.
      options: everything given to `make`'s sessions that changes results (seed, flavour).
      intermediate: folder for the other stages, kept; None makes a hidden one beside OUT and
        removes it at the end.
      resume: continue where an interrupted run of the same stages stopped.
      progress: where the progress of every stage goes.
      say: takes the lines meant for the user.
      after: called with the final session while the intermediate models are still there.

    Raises:
      MergeError, OSError: one clear line; finished work stays for `resume`.
    """
    folder = _check_folders(stages, out, intermediate, resume)
    digest = _digest(stages, options)
    for number, stage in enumerate(stages.order, 1):
        final = number == len(stages.order)
        target = out if final else folder / str(stage.name)
        say(f"stage {number} of {len(stages.order)}: {target.name}")
        try:
            state = check_output(target, resume)
            session = make(stages.config(stage, folder), target, final)
            if final:
                record = json.dumps({"config": stages.text, "digest": digest}, indent=1) + "\n"
                files = {**session.plan.files, RECORD: record.encode()}
                session.plan = dataclasses.replace(session.plan, files=files)
            session.run(resume, progress)
            if state == "complete" and not final:
                _verify(session, target)
        except MergeError as error:
            raise type(error)(f"{stage.title}: {error}") from error
        if final:
            after(session)
    if intermediate is None:
        # Under its name the folder is there as a whole or not at all, whenever a kill comes.
        os.replace(folder, _removed(folder))
        shutil.rmtree(_removed(folder))


def finished(stages: Stages, out: Path, intermediate: Path | None, options: str = "") -> bool:
    """Whether OUT is the finished result of these very stages and the others are removed already.

    Raises:
      MergeError: OUT is the finished result of others.
    """
    folder = stages.folder(out, intermediate)
    if folder.exists() or not (out / MANIFEST).is_file():
        return False
    record = read_json(out / RECORD) if (out / RECORD).is_file() else {}
    if record.get("digest") != _digest(stages, options):
        raise MergeError(
            f"{out} holds a finished merge of another configuration or other inputs: give another "
            "output folder"
        )
    if intermediate is None:
        shutil.rmtree(_removed(folder), ignore_errors=True)
    return True


def describe_stages(
    stages: Stages,
    out: Path,
    make: MakeSession,
    *,
    intermediate: Path | None = None,
    resume: bool = False,
) -> tuple[str, Session | None]:
    """What every stage would do, as far as the models it needs are there; writes nothing.

    Returns:
      The text, and the final stage's session if all it needs is there.
    """
    folder = _check_folders(stages, out, intermediate, resume)
    lines, session = [], None
    for stage in stages.order:
        final = stage is stages.order[-1]
        target = out if final else folder / str(stage.name)
        lines.append(f"== {stage.title}: {target}")
        missing = [name for name in stage.needs if not (folder / name / MANIFEST).is_file()]
        if missing:
            lines.append(f"can be described when {', '.join(missing)} is made")
            stages.config(stage, folder)
            continue
        if check_output(target, resume) == "complete":
            lines.append("finished")
            continue
        made = make(stages.config(stage, folder), target, final)
        lines.append(made.describe(resume))
        session = made if final else None
    return "\n".join(lines), session


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


def _check_folders(stages: Stages, out: Path, intermediate: Path | None, resume: bool) -> Path:
    """The intermediate folder, if nothing stands in the way there or in OUT."""
    folder = stages.folder(out, intermediate)
    if intermediate is None and stages.unused:
        raise MergeError(
            f"{stages.place}: no stage uses {', '.join(stages.unused)}, and without "
            "--intermediate-dir the result would be removed: remove the stage or add the flag"
        )
    if folder.exists() and not folder.is_dir():
        raise MergeError(f"{folder} is not a folder: give another --intermediate-dir")
    inside = [folder / str(stage.name) for stage in stages.order[:-1]]
    if not resume and any(path.exists() for path in inside):
        raise MergeError(
            f"{folder} holds stages of an earlier run: add --resume to continue it, or remove the "
            "folder"
        )
    if intermediate is None and folder.exists():
        foreign = {path.name for path in folder.iterdir()} - {path.name for path in inside}
        if foreign:
            raise MergeError(
                f"{folder} holds {min(foreign)}, which is no stage, and would be removed: choose "
                "--intermediate-dir"
            )
    check_output(out, resume)
    if out.absolute() in {path.absolute() for path in (folder, *inside)}:
        raise MergeError(f"{out} is in the intermediate folder: give another output folder")
    return folder


def _removed(folder: Path) -> Path:
    return folder.with_name(folder.name + ".removed")


def _digest(stages: Stages, options: str) -> str:
    """Hash of the text, the options that change results and all models that are no stages."""
    refs = dict.fromkeys(ref for stage in stages.order for ref in stage.models)
    digest = hashlib.blake2b(digest_size=16)
    for part in (stages.text, options, *(open_store(ref).identity() for ref in refs)):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def _verify(session: Session, folder: Path) -> None:
    """Compare the bytes of a finished stage with its manifest.

    Raises:
      StorageError: they differ.
    """
    recorded, store = read_json(folder / MANIFEST)["crc32"], open_store(os.fspath(folder))
    pieces = pieces_of(session.plan, session.methods)
    for info, spans in zip(session.outputs, pieces, strict=True):
        for (start, stop), crc in zip(spans, recorded[info.name], strict=True):
            values = np.ascontiguousarray(store.read(info.name, start, stop))
            if f"{zlib.crc32(values.view(np.uint8)):08x}" != crc:
                raise StorageError(
                    f"{folder} is damaged ({info.name}): remove it and repeat the command with "
                    "--resume"
                )
