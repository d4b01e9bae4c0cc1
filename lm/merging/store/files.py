"""Tensors that lie as plain bytes somewhere in files: the common part of the file formats."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm.merging.numbers import dtype_of
from lm.merging.types import StorageError, TensorInfo

__all__ = ["Entry", "FileStore", "open_for_reading", "read_config", "read_exactly", "read_json"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes [offset, offset + nbytes) of a file, in C order.

    With `strides` (in elements) its elements lie scattered from there on instead.
    """

    file: int
    offset: int
    strides: tuple[int, ...] | None = None


class FileStore:
    """Tensors at known places of open files, read by `pread`: no mapped pages stay in memory.

    Args:
      path: what the user named.
      files: the files of the checkpoint, whose names, sizes and times make the identity.
      handles: their open descriptors; closed with the store.
      tensors: all tensors by name.
      entries: where each of them lies.
      aliases: other names of some of them.
      headers: what was read to find them, for the identity.
    """

    _handles: list[int] = []  # until __init__ has finished

    def __init__(
        self,
        path: str,
        files: Sequence[Path],
        handles: Sequence[int],
        tensors: Mapping[str, TensorInfo],
        entries: Mapping[str, Entry],
        aliases: Mapping[str, str],
        headers: Sequence[bytes],
    ):
        self.path = path
        self.config = read_config(Path(path).expanduser())
        self.tensors = tensors
        self.aliases = aliases
        self._files = list(files)
        self._entries = entries
        self._dtypes = {name: dtype_of(info.dtype) for name, info in tensors.items()}
        self._headers = headers
        self._handles = list(handles)  # last: whoever made them closes them after an error here

    def read(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        buffer: np.ndarray | None = None,
    ) -> np.ndarray:
        """Elements [start, stop) of the flattened tensor; see `lm.merging.types.Store`."""
        name = self.aliases.get(name, name)
        info, entry, dtype = self.tensors[name], self._entries[name], self._dtypes[name]
        stop = info.size if stop is None else stop
        if entry.strides is not None:
            return self._gather(info, entry, dtype, start, stop)
        count = (stop - start) * dtype.itemsize
        if buffer is None or buffer.nbytes < count:
            buffer = np.empty(count, np.uint8)
        buffer = buffer[:count]
        place = entry.offset + start * dtype.itemsize
        read_exactly(self._handles[entry.file], buffer, place, self._files[entry.file], name)
        return buffer.view(dtype)

    def will_need(self, name: str, start: int, stop: int) -> None:
        """Let the system begin to read these elements; several threads share a file, so it cannot
        guess by itself what comes next."""
        name = self.aliases.get(name, name)
        entry, width = self._entries[name], self._dtypes[name].itemsize
        if entry.strides is None and stop > start and hasattr(os, "posix_fadvise"):
            offset, count = entry.offset + start * width, (stop - start) * width
            os.posix_fadvise(self._handles[entry.file], offset, count, os.POSIX_FADV_WILLNEED)

    def _gather(
        self, info: TensorInfo, entry: Entry, dtype: np.dtype, start: int, stop: int
    ) -> np.ndarray:
        """Part of a transposed or otherwise strided tensor, through a map of the file."""
        reach = 1 + sum((n - 1) * s for n, s in zip(info.shape, entry.strides, strict=True))
        if stop <= start:
            return np.empty(0, dtype)
        mapped = np.memmap(
            self._files[entry.file], np.uint8, "r", entry.offset, reach * dtype.itemsize
        )
        strides = [s * dtype.itemsize for s in entry.strides]
        view = np.lib.stride_tricks.as_strided(mapped.view(dtype), info.shape, strides)
        return np.array(view.flat[start:stop])

    def identity(self) -> str:
        """Hash of the files' names, sizes, modification times and headers, and of the config."""
        digest = hashlib.blake2b(digest_size=16)
        for file, handle in zip(self._files, self._handles, strict=True):
            stat = os.fstat(handle)
            digest.update(f"{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        for header in self._headers:
            digest.update(hashlib.blake2b(header).digest())
        digest.update(json.dumps(self.config, sort_keys=True).encode())
        return digest.hexdigest()

    def close(self) -> None:
        """Close the files; reading fails afterwards."""
        while self._handles:
            os.close(self._handles.pop())

    def __del__(self):
        self.close()


def open_for_reading(path: Path) -> int:
    """A descriptor, or `StorageError` naming the file."""
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error


def read_exactly(handle: int, buffer: Any, offset: int, file: Path, what: str) -> None:
    """Fill `buffer` from `offset` on, or `StorageError`: the file became shorter or unreadable."""
    view = memoryview(buffer)
    while len(view):
        try:
            count = os.preadv(handle, [view], offset)
        except OSError as error:
            raise StorageError(f"cannot read {what} of {file}: {error.strerror}") from error
        if not count:
            raise StorageError(f"{file} ends within {what}: it is truncated, copy it again")
        view, offset = view[count:], offset + count


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or `StorageError` naming the file."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} is not valid JSON ({error}): copy it again") from error
    if not isinstance(value, dict):
        raise StorageError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder (or beside a checkpoint file); {} without one."""
    folder = path if path.is_dir() else path.parent
    file = folder / "config.json"
    return read_json(file) if file.is_file() else {}
