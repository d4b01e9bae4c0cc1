"""safetensors checkpoints, one file or several with an index.

A file is an unsigned 64-bit length, a JSON header of that length naming dtype, shape and place of
every tensor, and the data (format: huggingface/safetensors). Everything the header says is checked
before it is used, so that a damaged or cut file is named at once instead of giving wrong numbers.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm.merging.numbers import dtype_of
from lm.merging.store.files import Entry, FileStore, open_for_reading, read_exactly, read_json
from lm.merging.types import StorageError, TensorInfo

__all__ = ["DTYPES", "Header", "find_files", "open_safetensors", "read_header"]

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Names of the format and of NumPy."""
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
_HEADER_LIMIT = 100_000_000  # the format's own


class _UnknownDtype(Exception):
    """The file is sound, but holds numbers of a format that is not known here."""


class Header(NamedTuple):
    """What a file's header says."""

    tensors: dict[str, TensorInfo]
    offsets: dict[str, int]
    """First byte of each tensor in the file."""
    metadata: dict[str, str]
    raw: bytes


def read_header(handle: int, file: Path) -> Header:
    """Header of an open file; `StorageError` naming the file where anything in it cannot be."""
    size = os.fstat(handle).st_size
    if size < 8:
        raise StorageError(f"{file} is truncated: {size} bytes are no safetensors file")
    prefix = bytearray(8)
    read_exactly(handle, prefix, 0, file, "the header")
    length = int.from_bytes(prefix, "little")
    if length > _HEADER_LIMIT:
        raise StorageError(f"{file} is no safetensors file, or damaged: header of {length} bytes")
    if 8 + length > size:
        raise StorageError(f"{file} is truncated: {size} bytes, its header alone has {length}")
    raw = bytearray(length)
    read_exactly(handle, raw, 8, file, "the header")
    try:
        content = json.loads(bytes(raw), object_pairs_hook=_unique)
        if not isinstance(content, dict):
            raise ValueError("not an object")
        metadata = content.pop("__metadata__", None) or {}
        spans = [_span(name, value) for name, value in content.items()]
    except _UnknownDtype as error:
        raise StorageError(
            f"{file}: {error}, which cannot be read: give the model in another format"
        ) from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StorageError(f"{file}: the header is damaged ({error}); copy it again") from error
    _check_layout(spans, size - 8 - length, file)
    return Header(
        {info.name: info for info, _, _ in spans},
        {info.name: 8 + length + begin for info, begin, _ in spans},
        metadata,
        bytes(raw),
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _span(name: str, value: Any) -> tuple[TensorInfo, int, int]:
    dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in DTYPES:
        raise _UnknownDtype(f"{name} has the dtype {dtype}")
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name} has an impossible shape or place")
    info = TensorInfo(name, tuple(shape), DTYPES[dtype])
    if end - begin != math.prod(shape) * dtype_of(info.dtype).itemsize:
        raise ValueError(f"{name}: shape {shape} of {dtype} does not fill its {end - begin} bytes")
    return info, begin, end


def _check_layout(spans: list, size: int, file: Path) -> None:
    """The format allows neither gaps nor overlaps, and the data end with the file."""
    place, before = 0, "the header"
    for info, begin, end in sorted(spans, key=lambda span: span[1:]):
        if begin != place:
            kind = "overlaps" if begin < place else "leaves a gap behind"
            raise StorageError(f"{file} is damaged: {info.name} {kind} {before}; copy it again")
        place, before = end, info.name
    if place != size:
        kind = "truncated" if size < place else "damaged"
        raise StorageError(f"{file} is {kind}: {size} bytes of data, {place} expected; copy it")


def find_files(folder: Path, stem: str, suffix: str) -> tuple[list[Path], dict[str, str] | None]:
    """Files of a checkpoint in a folder, with the index's {tensor: file} where there is one.

    Taken are STEM.SUFFIX.index.json and what it names, else STEM.SUFFIX, else a complete set of
    STEM-00001-of-0000N.SUFFIX, else the only *.SUFFIX there is. Nothing found: ([], None).
    """
    index = folder / f"{stem}{suffix}.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise StorageError(f"{index} has no weight_map: copy it again")
        names = sorted(set(map(str, weight_map.values())))
        if bad := [name for name in names if Path(name).name != name]:
            raise StorageError(f"{index} names {bad[0]!r}, which is not a file beside it")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise StorageError(
                f"{folder} lacks {missing[0]}, which {index.name} names"
                + (f" (and {len(missing) - 1} more)" if missing[1:] else "")
            )
        return [folder / name for name in names], weight_map
    if (folder / (stem + suffix)).is_file():
        return [folder / (stem + suffix)], None
    files = sorted(path for path in folder.glob(f"*{suffix}") if path.is_file())
    files = [path for path in files if path.name not in _NO_WEIGHTS]
    pattern = re.compile(rf"{re.escape(stem)}-(\d+)-of-(\d+){re.escape(suffix)}")
    shards = [match for path in files if (match := pattern.fullmatch(path.name))]
    if shards:
        wanted = {int(match[2]) for match in shards}
        if len(wanted) > 1 or len(shards) != max(wanted):
            raise StorageError(
                f"{folder} has {len(shards)} of {max(wanted)} files like {shards[0][0]}: "
                "copy the missing ones"
            )
        return [folder / match[0] for match in shards], None
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:4])
        raise StorageError(f"{folder} has several {suffix} files without an index: {names}")
    return files, None


def open_safetensors(
    path: str, files: Sequence[Path], weight_map: dict[str, str] | None = None
) -> FileStore:
    """A store of the tensors of `files`; with `weight_map` each must lie where it says."""
    handles: list[int] = []
    try:
        tensors: dict[str, TensorInfo] = {}
        entries: dict[str, Entry] = {}
        headers = []
        for number, file in enumerate(files):
            handles.append(open_for_reading(file))
            header = read_header(handles[-1], file)
            headers.append(header.raw)
            for name, info in header.tensors.items():
                if weight_map is not None and weight_map.get(name, file.name) != file.name:
                    continue
                if name in tensors:
                    raise StorageError(
                        f"{name} is both in {files[entries[name].file]} and in {file}: "
                        "an index must tell which one is meant"
                    )
                tensors[name] = info
                entries[name] = Entry(number, header.offsets[name])
        for name, file in (weight_map or {}).items():
            if name not in tensors:
                raise StorageError(f"{Path(path) / file} lacks {name}, which the index names there")
        return FileStore(path, files, handles, tensors, entries, {}, headers)
    except BaseException:
        for handle in handles:
            os.close(handle)
        raise
