"""Merges in several stages: each an ordinary merge in a folder of its own.

The stages before the final one are made in the order of what needs what, in folders of their names
within the intermediate folder; the final one becomes OUT. Before any of them all are planned, on
the tensors that the earlier ones will have, so that what cannot work shows at once. An interrupted
stage continues, and a finished one is checked and kept.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from lm.merging.config import MergeConfig
from lm.merging.manifest import MANIFEST, check_output
from lm.merging.pieces import pieces_of
from lm.merging.progress import size
from lm.merging.session import Session
from lm.merging.stages import Stage, Stages
from lm.merging.store import open_store
from lm.merging.store.files import read_json
from lm.merging.types import MergeError, StorageError, Store, TensorInfo

__all__ = ["PlannedStore", "describe_stages", "finished", "run_stages"]

RECORD = "merge_stages.json"

MakeSession = Callable[[MergeConfig, Path, bool, Mapping[str, Store]], Session]
"""`make(config, out, final, stores)`: the session of one stage; `stores` are those open already."""


class PlannedStore:
    """What a stage will have made: all that a plan asks of a store, but no numbers yet."""

    def __init__(self, session: Session):
        self.path = os.fspath(session.out)
        self.config: dict[str, Any] = json.loads(session.plan.files.get("config.json", b"{}"))
        self.tensors: Mapping[str, TensorInfo] = {info.name: info for info in session.outputs}
        self.aliases = session.plan.aliases
        self._identity = session.plan.fingerprint

    def read(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        buffer: np.ndarray | None = None,
    ) -> np.ndarray:
        """There is nothing to read yet."""
        raise StorageError(f"{self.path} is not made yet: {name} cannot be read")

    def will_need(self, name: str, start: int, stop: int) -> None:
        """Nothing to fetch."""

    def identity(self) -> str:
        """The plan's fingerprint."""
        return self._identity


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
    for _ in _planned(stages, out, folder, make):
        pass  # raises before anything is done
    for number, stage in enumerate(stages.order, 1):
        final = number == len(stages.order)
        target = out if final else folder / str(stage.name)
        say(f"stage {number} of {len(stages.order)}: {target.name}")
        with _titled(stage):
            state = check_output(target, resume)
            session = make(stages.config(stage, folder), target, final, {})
            if final:
                record = json.dumps({"config": stages.text, "digest": digest}, indent=1) + "\n"
                files = {**session.plan.files, RECORD: record.encode()}
                session.plan = dataclasses.replace(session.plan, files=files)
            session.run(resume, progress)
            if state == "complete" and not final:
                _verify(session, target)
        if final:
            after(session)
    if intermediate is None:
        # Under its name the folder is there as a whole or not at all, whenever a kill comes.
        shutil.rmtree(_removed(folder), ignore_errors=True)
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
    lines, last = [], None
    for stage, target, session in _planned(stages, out, folder, make):
        lines.append(f"== {stage.title}: {target}")
        missing = [name for name in stage.needs if not (folder / name / MANIFEST).is_file()]
        if check_output(target, resume) == "complete":
            lines.append("finished")
        elif session is not None and not missing:
            lines.append(session.describe(resume))
            last = session if target == out else None
        else:
            known = "cannot be planned yet"
            if session is not None:
                known = f"{len(session.outputs)} tensors, {size(session.layout.nbytes)}"
            lines.append(f"{known}; more can be said when {', '.join(missing)} is made")
    return "\n".join(lines), last


def _planned(
    stages: Stages, out: Path, folder: Path, make: MakeSession
) -> Iterator[tuple[Stage, Path, Session | None]]:
    """Every stage with its folder and its session.

    Where the results it needs are not made yet, the session is planned on those of the sessions
    before. There is none (None) where that is not enough: for tokenizers and adapters the files
    themselves are needed.
    """
    planned: dict[str, Store] = {}
    for stage in stages.order:
        final = stage is stages.order[-1]
        target = out if final else folder / str(stage.name)
        config = stages.config(stage, folder)
        missing = [name for name in stage.needs if not (folder / name / MANIFEST).is_file()]
        paths = {str(folder / name) for name in missing}
        known = paths <= set(planned) and paths <= set(config.references())
        session = None
        if not missing or (known and config.tokenizer is None):
            stores = {path: planned[path] for path in paths}
            with _titled(stage):
                session = make(config, target, final, stores)
            planned[str(target)] = PlannedStore(session)
        yield stage, target, session


@contextlib.contextmanager
def _titled(stage: Stage) -> Iterator[None]:
    """Let errors name the stage."""
    try:
        yield
    except MergeError as error:
        raise type(error)(f"{stage.title}: {error}") from error


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
