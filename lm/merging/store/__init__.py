"""Checkpoints as named tensors that are read in pieces.

>>> from lm.merging.store import open_store
>>> store = open_store("models/base")  # doctest: +SKIP
>>> store.tensors["model.norm.weight"]  # doctest: +SKIP
TensorInfo(name='model.norm.weight', shape=(1024,), dtype='bfloat16')
"""

from pathlib import Path

from lm.merging.store.bin import open_bin
from lm.merging.store.lora import LoraStore
from lm.merging.store.safetensors import find_files, open_safetensors
from lm.merging.types import MergeError, StorageError, Store

__all__ = ["open_store"]

_BIN = (".bin", ".pt", ".pth")


def open_store(reference: str) -> Store:
    """The checkpoint that a reference names: a folder or a file, or `base+adapter`.

    A folder holds safetensors (preferred), PyTorch files, or an Orbax checkpoint (of arrays, or of
    a training run of ours). A reference with "+" is split at its last one unless it exists as it
    stands, and the part behind is a LoRA adapter's folder.

    Raises:
      MergeError: there is no such model here.
      StorageError: it cannot be read, or is damaged; the message names the file.
    """
    try:
        path = Path(reference).expanduser()
        there = path.exists()
    except (RuntimeError, OSError) as error:  # an unknown ~user; a name too long; no permission
        raise MergeError(f"there is no model at {reference} that can be read: {error}") from error
    if there:
        return _open(reference, path)
    base, plus, adapter = reference.rpartition("+")
    if plus and base and adapter:
        folder = Path(adapter).expanduser()
        if not (folder / "adapter_config.json").is_file():
            raise MergeError(f"{adapter} is no LoRA adapter here: it has no adapter_config.json")
        return LoraStore(open_store(base), folder, _open_adapter(folder))
    raise MergeError(
        f"there is no model at {reference}: give the path of a local folder (models are not "
        "downloaded)"
    )


def _open(reference: str, path: Path) -> Store:
    if path.is_file():
        if path.suffix in _BIN:
            return open_bin(reference, [path])
        return open_safetensors(reference, [path])
    files, weight_map = find_files(path, "model", ".safetensors")
    if files:
        if (path / "adapter_config.json").is_file() and files[
            0
        ].name == "adapter_model.safetensors":
            raise MergeError(f"{path} is a LoRA adapter: write base+{path}")
        return open_safetensors(reference, files, weight_map)
    for stem, suffix in (("pytorch_model", ".bin"), ("model", ".pt"), ("model", ".pth")):
        files, weight_map = find_files(path, stem, suffix)
        if files:
            return open_bin(reference, files, weight_map)
    from lm.merging.store.orbax import is_orbax, open_orbax

    if is_orbax(path):
        return open_orbax(reference, path)
    raise StorageError(
        f"{path} holds no checkpoint: no .safetensors, no .bin and no Orbax arrays are there"
    )


def _open_adapter(folder: Path) -> Store:
    safetensors, binary = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if safetensors.is_file():
        return open_safetensors(str(folder), [safetensors])
    if binary.is_file():
        return open_bin(str(folder), [binary])
    raise StorageError(f"{folder} has neither adapter_model.safetensors nor adapter_model.bin")
