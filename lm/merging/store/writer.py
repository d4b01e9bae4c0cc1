"""The output: safetensors files whose layout is known before the first number is.

Names, shapes and dtypes of all tensors follow from the plan, so the headers are written first, the
files get their full size at once (a full disk shows before any work, not after), and every piece of
every tensor goes straight to its place, in any order and from any thread.
"""

import dataclasses
import errno
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm.files import explain_os_error, sync_folder
from lm.merging.numbers import dtype_of
from lm.merging.store.safetensors import DTYPES
from lm.merging.types import StorageError, TensorInfo

__all__ = ["Layout", "Shard", "ShardFiles", "make_layout"]

_NAMES = {name: code for code, name in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of the output."""

    name: str
    header: bytes
    size: int
    """Bytes of the whole file."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where everything goes."""

    shards: tuple[Shard, ...]
    places: tuple[tuple[int, int], ...]
    """(shard, first byte) of every output."""
    index: bytes | None
    """model.safetensors.index.json, if there are several shards."""

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)


def make_layout(
    outputs: Sequence[TensorInfo], shard_size: int, metadata: Mapping[str, str]
) -> Layout:
    """Share the outputs out among files of at most `shard_size` bytes of data, in their order.

    A tensor larger than that has a file of its own. One file is called model.safetensors, several
    model-00001-of-0000N.safetensors with an index, as Hugging Face's libraries expect them.
    """
    groups: list[list[int]] = [[]]
    filled = 0
    for number, info in enumerate(outputs):
        if groups[-1] and filled + info.nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(number)
        filled += info.nbytes
    shards: list[Shard] = []
    places: dict[int, tuple[int, int]] = {}
    weight_map = {}
    for position, numbers in enumerate(groups, 1):
        name = f"model-{position:05d}-of-{len(groups):05d}.safetensors"
        name = "model.safetensors" if len(groups) == 1 else name
        # Wide numbers first: then every tensor lies at a multiple of its numbers' width.
        numbers.sort(key=lambda n: -dtype_of(outputs[n].dtype).itemsize)
        header, offsets = _header([outputs[n] for n in numbers], metadata)
        for number, offset in zip(numbers, offsets, strict=True):
            places[number] = (len(shards), offset)
            weight_map[outputs[number].name] = name
        total = sum(outputs[n].nbytes for n in numbers)
        shards.append(Shard(name, header, len(header) + total))
    index = None
    if len(groups) > 1:
        total = sum(info.nbytes for info in outputs)
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        index = (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
    return Layout(tuple(shards), tuple(places[n] for n in range(len(outputs))), index)


def _header(infos: Iterable[TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, list[int]]:
    """The bytes before the data, and the first byte of each tensor."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)}
    starts, place = [], 0
    for info in infos:
        end = place + info.nbytes
        starts.append(place)
        content[info.name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, [len(header) + start for start in starts]


class ShardFiles:
    """The files of a layout, open in a folder of their own until `publish` moves them.

    Args:
      folder: where they are built; must be on the output's file system.
      layout: what they hold.
      outputs: the tensors, as given to `make_layout`.

    Raises:
      StorageError: they cannot be made: no space, no permission.
    """

    def __init__(self, folder: Path, layout: Layout, outputs: Sequence[TensorInfo]):
        self.folder, self.layout = folder, layout
        self._widths = [dtype_of(output.dtype).itemsize for output in outputs]
        self._handles: list[int] = []
        try:
            for shard in layout.shards:
                path = folder / shard.name
                handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
                self._handles.append(handle)
                self._claim(handle, shard)
        except OSError as error:
            self.close()
            raise StorageError(
                f"cannot make room for {layout.nbytes:,} bytes of output in {folder.parent}: "
                f"{explain_os_error(error)}"
            ) from error

    @staticmethod
    def _claim(handle: int, shard: Shard) -> None:
        if os.fstat(handle).st_size != shard.size:
            os.ftruncate(handle, shard.size)
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(handle, 0, shard.size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise  # some file systems cannot reserve: there `check_disk` must do
        _write(handle, shard.header, 0)

    def write(self, output: int, start: int, values: np.ndarray) -> None:
        """Put flat `values` at element `start` of an output."""
        shard, first = self.layout.places[output]
        # Bytes: NumPy's buffers know no bfloat16.
        data = values.view(np.uint8) if values.size else b""
        try:
            _write(self._handles[shard], data, first + start * self._widths[output])
        except OSError as error:
            path = self.folder / self.layout.shards[shard].name
            raise StorageError(f"cannot write {path}: {explain_os_error(error)}") from error

    def read(self, output: int, start: int, count: int) -> bytes:
        """`count` bytes from element `start` of an output on, as they are now."""
        shard, first = self.layout.places[output]
        return os.pread(self._handles[shard], count, first + start * self._widths[output])

    def flush(self, output: int, start: int, stop: int) -> None:
        """Begin to bring these elements to the disk, without waiting: `sync` has less to do."""
        if stop > start and hasattr(os, "posix_fadvise"):
            shard, first = self.layout.places[output]
            width = self._widths[output]
            # Linux starts to write dirty pages that are declared useless, and keeps them meanwhile.
            place, count = first + start * width, (stop - start) * width
            os.posix_fadvise(self._handles[shard], place, count, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Force the files to the disk."""
        try:
            for handle in self._handles:
                os.fsync(handle)
        except OSError as error:
            raise StorageError(f"cannot write {self.folder}: {explain_os_error(error)}") from error

    def publish(self, out: Path) -> None:
        """Give the files their places in `out`, each by one rename."""
        for shard in self.layout.shards:
            source = self.folder / shard.name
            if source.exists():
                os.replace(source, out / shard.name)
        sync_folder(out)

    def close(self) -> None:
        """Close the files."""
        while self._handles:
            os.close(self._handles.pop())


def _write(handle: int, data: Any, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count
