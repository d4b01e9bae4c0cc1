"""PyTorch checkpoints (.bin, .pt, .pth): the zip format of torch.save, read without PyTorch.

The archive holds one pickle that describes the tensors (`lm.merging.store.unpickle` reads it
without running it) and each storage as an uncompressed member, whose bytes are read in place.
"""

import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm.merging.numbers import dtype_of
from lm.merging.store.files import Entry, FileStore, open_for_reading, read_exactly
from lm.merging.store.unpickle import TensorPlace, UnsafePickle, load
from lm.merging.types import StorageError, TensorInfo

__all__ = ["open_bin"]

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_PICKLE_LIMIT = 1 << 30


def open_bin(
    path: str, files: Sequence[Path], weight_map: dict[str, str] | None = None
) -> FileStore:
    """A store of the tensors of `files`; tensors that share their bytes become aliases."""
    handles: list[int] = []
    tensors: dict[str, TensorInfo] = {}
    entries: dict[str, Entry] = {}
    aliases: dict[str, str] = {}
    headers = []
    try:
        for number, file in enumerate(files):
            handles.append(open_for_reading(file))
            pickle, members = _open_archive(handles[-1], file)
            headers.append(pickle)
            stored: dict[tuple, str] = {}
            for name, place in _tensors(pickle, file).items():
                if weight_map is not None and weight_map.get(name, file.name) != file.name:
                    continue
                if name in tensors or name in aliases:
                    raise StorageError(f"{name} is in {file} and in another file of {path}")
                if place in stored:
                    aliases[name] = stored[place]
                    continue
                stored[place] = name
                tensors[name] = TensorInfo(name, place.shape, place.dtype)
                entries[name] = _entry(number, name, place, members, file)
        for name, file in (weight_map or {}).items():
            if name not in tensors and name not in aliases:
                raise StorageError(f"{Path(path) / file} lacks {name}, which the index names there")
        return FileStore(path, files, handles, tensors, entries, aliases, headers)
    except BaseException:
        for handle in handles:
            os.close(handle)
        raise


def _open_archive(handle: int, file: Path) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The pickle, and (first byte, length) of every storage by its name."""
    head = bytearray(min(4, os.fstat(handle).st_size))
    read_exactly(handle, head, 0, file, "the header")
    if head != b"PK\x03\x04":
        raise StorageError(
            f"{file} is not in the zip format of torch.save: if it comes from an old PyTorch, save "
            "it again with torch.save(torch.load(FILE, weights_only=True), FILE)"
        )
    try:
        with open(handle, "rb", closefd=False) as stream, zipfile.ZipFile(stream) as archive:
            infos = archive.infolist()
            pickles = [info for info in infos if info.filename.split("/", 1)[-1] == "data.pkl"]
            if len(pickles) != 1:
                raise StorageError(f"{file} holds no data.pkl: it was not made by torch.save")
            if pickles[0].file_size > _PICKLE_LIMIT:
                raise StorageError(f"{file}: data.pkl has {pickles[0].file_size} bytes, too many")
            pickle = archive.read(pickles[0])
            folder = pickles[0].filename.removesuffix("data.pkl")
            orders = [info for info in infos if info.filename == f"{folder}byteorder"]
            if orders and archive.read(orders[0]) != b"little":
                raise StorageError(f"{file} was written on a big-endian machine: save it again")
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise StorageError(f"{file} is truncated or damaged ({error}): copy it again") from error
    members = {}
    size = os.fstat(handle).st_size
    for info in infos:
        if not info.filename.startswith(f"{folder}data/"):
            continue
        if info.compress_type != zipfile.ZIP_STORED:
            raise StorageError(f"{file}: {info.filename} is compressed; torch.save does not do so")
        local = bytearray(30)
        read_exactly(handle, local, info.header_offset, file, info.filename)
        names = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        begin = info.header_offset + 30 + names
        if begin + info.file_size > size:
            raise StorageError(f"{file} ends within {info.filename}: it is truncated, copy it")
        members[info.filename.removeprefix(f"{folder}data/")] = (begin, info.file_size)
    return pickle, members


def _tensors(pickle: bytes, file: Path) -> dict[str, TensorPlace]:
    try:
        content: Any = load(pickle)
    except UnsafePickle as error:
        raise StorageError(f"{file}: its pickle {error}") from error
    for _ in range(2):  # a training checkpoint may hold the weights one level down
        if not isinstance(content, dict):
            break
        found = {str(k): v for k, v in content.items() if isinstance(v, TensorPlace)}
        if found:
            return found
        content = next((content[key] for key in _WRAPPERS if key in content), None)
    raise StorageError(f"{file} holds no tensors by name: save a model's state_dict()")


def _entry(
    number: int, name: str, place: TensorPlace, members: dict[str, tuple[int, int]], file: Path
) -> Entry:
    if place.key not in members:
        raise StorageError(f"{file} lacks the data of {name}: copy it again")
    begin, length = members[place.key]
    width = dtype_of(place.dtype).itemsize
    reach = 0
    if math.prod(place.shape):
        reach = 1 + sum((n - 1) * s for n, s in zip(place.shape, place.strides, strict=True))
    if (place.offset + reach) * width > length:
        raise StorageError(f"{file}: {name} reaches beyond its {length} bytes; copy it again")
    offset = begin + place.offset * width
    return Entry(number, offset, None if _is_contiguous(place) else place.strides)


def _is_contiguous(place: TensorPlace) -> bool:
    expected = 1
    for size, stride in zip(reversed(place.shape), reversed(place.strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
