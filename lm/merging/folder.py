"""A checkpoint folder written by a tool that makes its tensors one after the other."""

import contextlib
import dataclasses
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm.merging import preflight
from lm.merging.manifest import PARTIAL, Workplace, check_output
from lm.merging.numbers import all_finite, from_float32, to_float32
from lm.merging.pieces import PIECE
from lm.merging.store.writer import make_layout
from lm.merging.types import MergeError, Store, TensorInfo

__all__ = ["check_folder", "copied", "write_folder"]

Chunks = Iterable[np.ndarray]
"""The flat parts of a tensor in order, in float32 or in the type of the file."""


def check_folder(out: Path) -> None:
    """Refuse an output folder with anything in it, before any work."""
    if (out / PARTIAL).exists():
        raise MergeError(f"{out} holds an unfinished output: remove the folder, or give another")
    check_output(out, resume=False)


def write_folder(
    out: Path,
    tensors: Sequence[tuple[TensorInfo, Callable[[], Chunks]]],
    files: Mapping[str, bytes],
    record: Mapping[str, Any],
    *,
    metadata: Mapping[str, str],
    shard_size: int = 5 * 10**9,
    file_name: str | None = None,
) -> None:
    """Write tensors and small files; nothing has its final name before everything is there.

    Args:
        out: the folder; must be missing or empty.
        tensors: what is written, and a function that makes the values of each.
        files: the small files by name.
        record: goes into merge_manifest.json.
        metadata: of the safetensors files, besides their format.
        shard_size: bytes of data per file.
        file_name: all tensors go into one file of this name.

    Raises:
        MergeError: NaN or infinity in a tensor, named; the folder is removed.
        StorageError: no space, no permission.
    """
    check_folder(out)
    outputs = [info for info, _ in tensors]
    layout = make_layout(
        outputs, 1 << 62 if file_name else shard_size, {"format": "pt", **metadata}
    )
    if file_name:
        shard = dataclasses.replace(layout.shards[0], name=file_name)
        layout = dataclasses.replace(layout, shards=(shard,))
    preflight.check_disk(out, layout)
    pieces = [
        [(start, min(info.size, start + PIECE)) for start in range(0, info.size, PIECE)] or [(0, 0)]
        for info in outputs
    ]
    made = not out.exists()
    place = Workplace(out, layout, outputs, pieces, {})
    try:
        for number, (info, make) in enumerate(tensors):
            for piece, values in enumerate(_regular(info, make(), pieces[number])):
                place.write(number, pieces[number][piece][0], values)
                crc = zlib.crc32(values.view(np.uint8)) if values.size else 0
                place.finish_piece(number, piece, crc)
        place.complete(files, record)
    except BaseException:
        place.close()
        shutil.rmtree(out / PARTIAL, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):
                out.rmdir()
        raise


def copied(store: Store, name: str) -> Iterator[np.ndarray]:
    """A tensor as it is, in parts."""
    size = store.tensors[store.aliases.get(name, name)].size
    for start in range(0, size, PIECE):
        yield store.read(name, start, min(size, start + PIECE))


def _regular(
    info: TensorInfo, chunks: Chunks, pieces: Sequence[tuple[int, int]]
) -> Iterator[np.ndarray]:
    """The chunks in the file's type, cut anew at the pieces' ends."""
    waiting = iter(chunks)
    rest = np.empty(0, info.dtype)
    for start, stop in pieces:
        values, filled = np.empty(stop - start, info.dtype), 0
        while filled < values.size:
            if not rest.size:
                rest = _converted(info, next(waiting))
            count = min(rest.size, values.size - filled)
            values[filled : filled + count] = rest[:count]
            rest, filled = rest[count:], filled + count
        yield values
    if rest.size:
        raise ValueError(f"{info.name}: more values than its shape {info.shape} has")


def _converted(info: TensorInfo, values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values).reshape(-1)
    if values.dtype != info.dtype:
        # By float32: NumPy has no direct way between two small formats.
        wide = to_float32(values, np.empty(values.size, np.float32))
        values = from_float32(wide, np.empty(values.size, info.dtype))
    if not all_finite(values):
        raise MergeError(f"{info.name}: the result holds NaN or infinity (in {info.dtype})")
    return values
