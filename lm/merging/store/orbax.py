"""Orbax checkpoints: reading through TensorStore, writing through Orbax.

`_METADATA` of an Orbax folder lists the leaves of its tree; a leaf is an array of that name in zarr
format (2 or 3), all of them in one OCDBT database or each in a folder of its own. Reading needs
neither Orbax nor JAX. Names of leaves are joined by dots; of a whole training state only what is
under `params` counts, and that prefix is dropped.
"""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from lm.files import explain_os_error, sync_folder
from lm.merging.store.files import open_for_reading, read_config, read_json
from lm.merging.store.safetensors import read_header
from lm.merging.store.writer import Layout
from lm.merging.types import StorageError, TensorInfo

__all__ = ["FOLDER", "OrbaxStore", "convert", "is_orbax", "open_orbax"]

FOLDER = "orbax"
"""Sub-folder of an output that holds the checkpoint."""
_METADATA = "_METADATA"
_ITEMS = ("", "arrays", "default", "params", "state", FOLDER)
_CACHE = 256 << 20
_PREFIX = "params."


def _item(path: Path) -> Path | None:
    """The folder with the arrays, for a checkpoint or one of its steps; of steps the newest."""
    for name in _ITEMS:
        if (path / name / _METADATA).is_file():
            return path / name
    for folder in (path, path / "checkpoints"):
        if folder.is_dir():
            steps = [each for each in folder.iterdir() if each.is_dir() and each.name.isdigit()]
            for step in sorted(steps, key=lambda each: -int(each.name)):
                for name in _ITEMS:
                    if (step / name / _METADATA).is_file():
                        return step / name
    return None


def is_orbax(path: Path) -> bool:
    """Whether a folder is an Orbax checkpoint, has one inside, or steps of a training run."""
    return _item(path) is not None


def open_orbax(reference: str, path: Path) -> "OrbaxStore":
    """A store of the checkpoint at `path`.

    Raises:
      StorageError: it is damaged, or TensorStore is not installed.
    """
    return OrbaxStore(reference, _item(path), read_config(path))


class OrbaxStore:
    """Arrays of one Orbax folder, opened when first read.

    TensorStore reads whole chunks, so those of recent blocks are kept: unlike the other stores
    this one takes memory for a few chunks (by default a chunk is a whole tensor).
    """

    def __init__(self, reference: str, folder: Path, config: dict[str, Any]):
        self.path, self.config, self._folder = reference, config, folder
        self.aliases: dict[str, str] = {}
        try:
            import tensorstore
        except ImportError as error:
            raise StorageError(f"{folder} needs TensorStore: install orbax-checkpoint") from error
        self._tensorstore = tensorstore
        metadata = read_json(folder / _METADATA)
        leaves = metadata.get("tree_metadata")
        if not isinstance(leaves, dict):
            raise StorageError(f"{folder / _METADATA} lists no leaves: it is damaged")
        paths = [".".join(str(k["key"]) for k in leaf["key_metadata"]) for leaf in leaves.values()]
        if any(path.startswith(_PREFIX) for path in paths):
            paths = [path for path in paths if path.startswith(_PREFIX)]
        self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE}})
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        self._arrays: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        largest = 0
        for path in paths:
            array = self._open(path, driver, bool(metadata.get("use_ocdbt", True)))
            name = path.removeprefix(_PREFIX)
            self._arrays[name] = array
            self.tensors[name] = TensorInfo(name, tuple(array.shape), array.dtype.name)
            chunk = array.chunk_layout.read_chunk.shape or (1,)
            largest = max(largest, math.prod(chunk) * array.dtype.numpy_dtype.itemsize)
        if 3 * largest > _CACHE:  # a chunk that does not fit would be read anew for every block
            self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 3 * largest}})
            for path in paths:
                array = self._open(path, driver, bool(metadata.get("use_ocdbt", True)))
                self._arrays[path.removeprefix(_PREFIX)] = array

    def read(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        buffer: np.ndarray | None = None,
    ) -> np.ndarray:
        """Elements [start, stop) of the flattened tensor; see `lm.merging.types.Store`."""
        array, info = self._arrays[name], self.tensors[name]
        stop = info.size if stop is None else stop
        if not info.shape:
            return np.asarray(self._get(name, array)).reshape(-1)[start:stop]
        row = max(1, math.prod(info.shape[1:]))
        first, last = start // row, -(-stop // row)
        values = np.asarray(self._get(name, array[first:last])).reshape(-1)
        return values[start - first * row : stop - first * row]

    def will_need(self, name: str, start: int, stop: int) -> None:
        """Nothing: TensorStore reads whole chunks."""

    def identity(self) -> str:
        """Hash of the names, sizes and modification times of all files."""
        digest = hashlib.blake2b(digest_size=16)
        for file in sorted(path for path in self._folder.rglob("*") if path.is_file()):
            stat = file.stat()
            name = file.relative_to(self._folder)
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        digest.update(json.dumps(self.config, sort_keys=True).encode())
        return digest.hexdigest()

    def _open(self, path: str, driver: str, database: bool) -> Any:
        base = f"file://{self._folder.absolute()}/"
        if database:
            place = {"driver": "ocdbt", "base": base, "path": f"{path}/"}
        else:
            place = {"driver": "file", "path": f"{self._folder.absolute()}/{path}/"}
        spec = {"driver": driver, "kvstore": place, "recheck_cached_data": False}
        try:
            return self._tensorstore.open(spec, context=self._context, read=True).result()
        except ValueError as error:
            raise StorageError(
                f"{self._folder}: {path} is damaged or missing ({_first_line(error)})"
            ) from error

    def _get(self, name: str, array: Any) -> Any:
        try:
            return array.read().result()
        except (ValueError, OSError) as error:
            raise StorageError(
                f"{self._folder}: {name} cannot be read ({_first_line(error)})"
            ) from error


def convert(out: Path, layout: Layout) -> None:
    """Turn a finished output into Orbax: OUT/orbax in place of the safetensors files.

    The result is one flat tree {name: array}. May be repeated after an interruption. The tensors
    are mapped from the files, and Orbax holds those that it is writing.

    Raises:
      StorageError: Orbax cannot write.
    """
    import orbax.checkpoint as ocp

    files = [out / shard.name for shard in layout.shards]
    building, done = out / f".{FOLDER}-building", out / FOLDER
    try:
        if not done.exists():
            shutil.rmtree(building, ignore_errors=True)
            tree = {name: array for file in files for name, array in _mapped(file).items()}
            handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)
            with ocp.Checkpointer(handler) as checkpointer:
                checkpointer.save(building.absolute(), args=ocp.args.PyTreeSave(tree))
            os.rename(building, done)
            sync_folder(out)
        for file in (*files, out / "model.safetensors.index.json"):
            file.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot write {done}: {explain_os_error(error)}") from error


def _mapped(file: Path) -> dict[str, np.ndarray]:
    """Tensors of a safetensors file as views of the mapped file; those without elements left out,
    which Orbax refuses."""
    handle = open_for_reading(file)
    try:
        header = read_header(handle, file)
    finally:
        os.close(handle)
    data = np.memmap(file, np.uint8, "r")
    return {
        name: data[header.offsets[name] :][: info.nbytes].view(info.dtype).reshape(info.shape)
        for name, info in header.tensors.items()
        if info.size
    }


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
