"""What has been done: the journal of a merge under way and the manifest of a finished one.

While a merge runs, OUT holds only the hidden folder `.merge-in-progress`:

    state.json   what is merged: the plan's fingerprint and the layout of the output
    journal      one line for every finished piece: output, piece, CRC-32 of its bytes
    *            the output's files, at their full sizes, with the finished pieces filled in

A line is written after its piece. So after a kill at any moment, every piece in the journal whose
bytes still have that CRC is finished, and all others are made again. At the end the files are
moved to OUT and `merge_manifest.json` is written there last: its presence says "complete".
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import threading
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm.files import atomic_write_bytes, atomic_write_json, explain_os_error, sync_folder
from lm.merging.pieces import PIECE
from lm.merging.store.files import read_json
from lm.merging.store.writer import Layout, ShardFiles
from lm.merging.types import MergeError, StorageError, TensorInfo

__all__ = ["INDEX", "MANIFEST", "PARTIAL", "Workplace", "check_output"]

MANIFEST = "merge_manifest.json"
INDEX = "model.safetensors.index.json"
PARTIAL = ".merge-in-progress"


def check_output(out: Path, resume: bool) -> str:
    """What to do with the output folder: "new", "resume" or "complete".

    Raises:
      MergeError: something is there that must not be overwritten.
    """
    if out.exists() and not out.is_dir():
        raise MergeError(f"{out} exists and is not a folder: give another output folder")
    if (out / PARTIAL / "state.json").is_file():
        if resume:
            return "resume"
        raise MergeError(
            f"{out} holds an unfinished merge: add --resume to continue it, or remove the folder"
        )
    if (out / MANIFEST).is_file():
        if resume:
            return "complete"
        raise MergeError(f"{out} holds a finished merge: give another output folder")
    if out.is_dir() and any(path.name != PARTIAL for path in out.iterdir()):
        raise MergeError(f"{out} is not empty: nothing is overwritten, give another output folder")
    return "new"


class Workplace:
    """The folder in which an output grows, and the record of what is finished.

    Args:
      out: the output folder; made if missing.
      layout, outputs: what will be there.
      pieces: for every output the elements of its pieces, as (start, stop) in order.
      identity: what must be the same for work to be continued, by names for the message.

    Raises:
      MergeError: an unfinished merge of something else is there.
      StorageError: the folder cannot be written, or there is no room.
    """

    def __init__(
        self,
        out: Path,
        layout: Layout,
        outputs: Sequence[TensorInfo],
        pieces: Sequence[Sequence[tuple[int, int]]],
        identity: Mapping[str, Any],
    ):
        self.out, self.folder = out, out / PARTIAL
        self.done: dict[tuple[int, int], int] = {}
        self._outputs, self._pieces, self._layout = outputs, pieces, layout
        headers = hashlib.blake2b(digest_size=16)
        for shard in layout.shards:
            headers.update(f"{shard.name}\0".encode() + shard.header)
        self._state = {**identity, "layout": headers.hexdigest()}
        self._lock = threading.Lock()
        self._journal: int | None = None
        self._files: ShardFiles | None = None
        made = not out.exists()
        known = (self.folder / "state.json").is_file()
        try:
            if known:
                self._compare()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_journal()
            if known:
                self._take_back()
            self._files = ShardFiles(self.folder, layout, outputs)
            if known:
                self._verify()
            else:
                atomic_write_json(self.folder / "state.json", self._state)
        except (MergeError, OSError) as error:
            self.close()
            if not known and not isinstance(error, _Busy):
                shutil.rmtree(out if made else self.folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise StorageError(f"cannot write to {out}: {explain_os_error(error)}") from error
            raise

    def write(self, output: int, start: int, values: Any) -> None:
        """Put a flat part of an output where it belongs."""
        self._files.write(output, start, values)

    def finish_piece(self, output: int, piece: int, crc: int) -> None:
        """Record that a piece is written, and let its bytes begin to go to the disk."""
        self._files.flush(output, *self._pieces[output][piece])
        line = f"{output} {piece} {crc:08x}\n".encode()
        try:
            with self._lock:
                self.done[output, piece] = crc
                os.write(self._journal, line)
        except OSError as error:
            raise StorageError(f"cannot write to {self.out}: {explain_os_error(error)}") from error

    def complete(self, files: Mapping[str, bytes], provenance: Mapping[str, Any]) -> None:
        """Move the output to its place: nothing is under its final name before this."""
        tensors = {
            info.name: [f"{self.done[n, k]:08x}" for k in range(len(self._pieces[n]))]
            for n, info in enumerate(self._outputs)
        }
        manifest = {
            **provenance,
            **self._state,
            "files": {shard.name: shard.size for shard in self._layout.shards},
            "piece_elements": PIECE,
            "crc32": tensors,
        }
        try:
            self._files.sync()
            self._files.publish(self.out)
            index = {INDEX: self._layout.index} if self._layout.index else {}
            for name, data in {**files, **index}.items():
                self._place(name, data)
            sync_folder(self.out)
            self._place(MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
            self.close()
            shutil.rmtree(self.folder)
            sync_folder(self.out)
        except OSError as error:
            raise StorageError(f"cannot write to {self.out}: {explain_os_error(error)}") from error

    def close(self) -> None:
        """Release the files; what is finished stays for --resume."""
        if self._files is not None:
            self._files.close()
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None

    def _place(self, name: str, data: bytes) -> None:
        """A small file, by way of our own folder: a kill leaves no temporary name in the output."""
        built = self.folder / "small" / name
        built.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(built, data)
        (self.out / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(built, self.out / name)

    def _compare(self) -> None:
        before = read_json(self.folder / "state.json")
        changed = [name for name in self._state if before.get(name) != self._state[name]]
        if changed:
            raise MergeError(
                f"{self.out} was begun with another configuration or other inputs (different: "
                f"{', '.join(changed)}): repeat the first command with --resume, or give another "
                "output folder"
            )

    def _take_journal(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0)
        self._journal = os.open(self.folder / "journal", flags, 0o666)
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _Busy(f"another process is writing to {self.out}") from error

    def _take_back(self) -> None:
        """A kill while the files were being moved: put those moved already back."""
        for shard in self._layout.shards:
            if (self.out / shard.name).exists():
                os.replace(self.out / shard.name, self.folder / shard.name)

    def _verify(self) -> None:
        """Keep the journal's pieces whose bytes are there; write a journal of just these."""
        size = os.fstat(self._journal).st_size
        for line in os.pread(self._journal, size, 0).split(b"\n")[:-1]:
            with contextlib.suppress(ValueError, IndexError):
                output, piece, crc = line.split()
                output, piece, crc = int(output), int(piece), int(crc, 16)
                self._pieces[output][piece]
                self.done[output, piece] = crc
        for (output, piece), crc in list(self.done.items()):
            start, stop = self._pieces[output][piece]
            size = self._outputs[output].nbytes // max(1, self._outputs[output].size)
            if zlib.crc32(self._files.read(output, start, (stop - start) * size)) != crc:
                del self.done[output, piece]
        kept = "".join(f"{o} {p} {crc:08x}\n" for (o, p), crc in self.done.items())
        os.ftruncate(self._journal, 0)
        os.write(self._journal, kept.encode())


class _Busy(MergeError):
    """Somebody else works in the folder."""
