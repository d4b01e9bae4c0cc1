"""What a merge that learns keeps on the disk until it is done: a hidden folder beside OUT.

    .OUT.adaptive/state.json     what is merged, by names for the message
    .OUT.adaptive/lock           held by the process at work
    .OUT.adaptive/NAME/          finished arrays (a Fisher diagonal, merged matrices, a run of ours)
    .OUT.adaptive/NAME.npz       the last checkpoint of learning
    .OUT.adaptive/output/        the output as it is written; renamed to OUT when it is complete

Everything is written under another name and renamed, so that after a kill at any moment what has
its name is whole, and OUT is there as a whole or not at all.
"""

import fcntl
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lm.files import atomic_write_bytes, atomic_write_json, sync_folder
from lm.merging.manifest import MANIFEST, check_output
from lm.merging.store.files import read_json
from lm.merging.types import MergeError

__all__ = ["Work"]


class Work:
    """The folder of one merge.

    Args:
      out: the output folder.
      identity: what must be the same for work to be continued.
      resume: continue what is there.

    Raises:
      MergeError: unfinished work without `resume`, or of another merge; OUT is not free.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], resume: bool):
        self.out, self.folder = out, folder_of(out)
        check_free(out, resume)
        state = self.folder / "state.json"
        self.continues = state.is_file()
        if self.continues:
            before = read_json(state)
            if changed := [name for name in identity if before.get(name) != identity[name]]:
                raise MergeError(
                    f"{out} was begun with another configuration or other inputs (different: "
                    f"{', '.join(changed)}): repeat the first command with --resume, or remove "
                    f"{self.folder}"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise MergeError(f"another process is writing to {out}") from None
        if not self.continues:
            atomic_write_json(state, dict(identity))
        self._saved = time.monotonic()

    def made(self, name: str, make: Callable[[Path], None]) -> Path:
        """A sub-folder that `make` fills, made once: whole, or not there."""
        folder, building = self.folder / name, self.folder / f"{name}.building"
        if not folder.is_dir():
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            make(building)
            sync_folder(building)
            os.rename(building, folder)
        return folder

    def arrays(
        self, name: str, make: Callable[[], Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Arrays that are computed once, mapped into memory from then on."""

        def write(folder: Path) -> None:
            keys = []
            for number, (key, value) in enumerate(make().items()):
                np.save(folder / f"{number}.npy", value)
                keys.append(key)
            atomic_write_json(folder / "keys.json", keys)

        folder = self.made(name, write)
        keys = json.loads((folder / "keys.json").read_text())
        return {key: np.load(folder / f"{n}.npy", mmap_mode="r") for n, key in enumerate(keys)}

    def save(self, name: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """The checkpoint of learning."""
        buffer = io.BytesIO()
        text = np.frombuffer(json.dumps(dict(meta)).encode(), np.uint8)
        np.savez(buffer, meta=text, **{f"array {key}": value for key, value in arrays.items()})
        atomic_write_bytes(self.folder / f"{name}.npz", buffer.getvalue())
        self._saved = time.monotonic()

    def due(self, seconds: float = 30.0) -> bool:
        """Whether the last checkpoint is that old."""
        return time.monotonic() - self._saved >= seconds

    def load(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The checkpoint, if there is one."""
        path = self.folder / f"{name}.npz"
        if not path.is_file():
            return None
        with np.load(path) as file:
            meta = json.loads(file["meta"].tobytes())
            names = [key for key in file.files if key != "meta"]
            return {key.removeprefix("array "): file[key] for key in names}, meta

    def publish(self, write: Callable[[Path], None]) -> None:
        """Write the output, give it its name, and remove everything else."""
        building = self.folder / "output"
        shutil.rmtree(building, ignore_errors=True)
        write(building)
        if self.out.is_dir():
            self.out.rmdir()  # `check_free` found it empty
        os.rename(building, self.out)
        sync_folder(self.out.absolute().parent)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1

    def close(self) -> None:
        """Let go of the folder; what is finished stays for --resume, an empty folder does not."""
        if self._lock < 0:
            return
        if {path.name for path in self.folder.iterdir()} <= {"state.json", "lock"}:
            shutil.rmtree(self.folder)
        os.close(self._lock)
        self._lock = -1


def folder_of(out: Path) -> Path:
    """Where the work for an output is kept."""
    return out.absolute().parent / f".{out.absolute().name}.adaptive"


def check_free(out: Path, resume: bool) -> str:
    """ "complete" if OUT is finished and may be so, else "new" or "resume".

    Raises:
      MergeError: something is there that must not be overwritten.
    """
    if resume and (out / MANIFEST).is_file():
        return "complete"
    check_output(out, resume=False)
    if folder_of(out).joinpath("state.json").is_file():
        if not resume:
            raise MergeError(
                f"{folder_of(out)} holds an unfinished merge: add --resume to continue it, or "
                "remove the folder"
            )
        return "resume"
    return "new"
