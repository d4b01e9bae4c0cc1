"""A Hugging Face checkpoint as our parameters, read straight into the layout they are used in.

Tensors are read by `pread` in blocks of rows, transposed (our matrices are [in, out], those of
torch.nn.Linear [out, in]) and put to their places in the stacked arrays, for each device the slice
that it holds. Besides the result only a block for each reading thread exists.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import mmap
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lm import model, native
from lm.config import DTYPES, ConfigError, ModelConfig, check
from lm.hf.config import read_config
from lm.hf.family import Family
from lm.hf.tensors import Leaf, by_path, check_range, check_tensors, dtypes, leaves
from lm.merging.store import open_store
from lm.merging.store.files import FileStore, read_json
from lm.merging.types import Store, TensorInfo

__all__ = ["is_hf", "load", "load_config", "load_params"]

_BLOCK = 4 << 20
"""Bytes read at a time."""
_HUGE = 2 << 20
"""Bytes of a huge page on common processors."""
_THREADS = min(4, os.cpu_count() or 1)
_local = threading.local()
_ALIGNMENT = 64
"""Bytes: at such addresses XLA's CPU client takes NumPy's memory without copying it."""


def is_hf(path: str | os.PathLike) -> bool:
    """Whether a folder holds a checkpoint with the configuration of a Hugging Face model."""
    file = Path(path) / "config.json"
    return file.is_file() and "model_type" in read_json(file)


def load_config(path: str | os.PathLike, dtype: str | None = None) -> ModelConfig:
    """The model that a Hugging Face folder describes; no weight is read.

    `dtype` is that of `load`; None takes the one that config.json names, else float32.
    """
    file = Path(path) / "config.json"
    content = read_json(file)
    named = content.get("torch_dtype") or content.get("dtype")
    return read_config(content, str(file), dtype or (named if named in DTYPES else "float32"))[1]


def load(
    path: str | os.PathLike, dtype: str | None = None, sharding: Any = None
) -> tuple[ModelConfig, model.Params]:
    """Configuration and parameters, for `lm.apply` and all that is built on it.

    Args:
      path: folder with config.json and safetensors files (or PyTorch's, which are read without
        running any code in them).
      dtype: "float32", "bfloat16" or "float16" to cast to; None keeps what is stored. The model's
        activations get the same dtype (`dataclasses.replace(config, dtype=...)` changes that).
      sharding: a mesh, for the layout of `lm.sharding.RULES`; or a `jax.sharding.Sharding` for
        all parameters; or a tree of them. None is the first device.

    Raises:
      ConfigError: a model that cannot be expressed, naming the key; tensors that are missing,
        superfluous or of a wrong shape, listed; a damaged or truncated file, named.
    """
    check(dtype is None or dtype in DTYPES, f"dtype must be {', '.join(DTYPES)}, got {dtype!r}")
    with _opened(path) as store:
        family, config = read_config(store.config, f"{path}/config.json", "float32")
        wanted = leaves(family, config)
        kinds = _dtypes(store, wanted, check_tensors(family, wanted, _present(store), str(path))[0])
        main = dtype or Counter(kinds.values()).most_common(1)[0][0]
        config = dataclasses.replace(config, dtype=main, param_dtype=main)
        kinds = dtypes(config, dtype) if dtype else kinds
        return config, _read(store, family, wanted, kinds, _layout(config, sharding, wanted))


def load_params(
    path: str | os.PathLike, config: ModelConfig, abstract: model.Params
) -> model.Params:
    """Parameters alone, for a configuration that may differ from the folder's.

    Args:
      path: as for `load`.
      config: the model that they are for; must have the tensors that the folder holds.
      abstract: shapes, dtypes (cast to) and shardings of the parameters.

    Raises:
      ConfigError: as `load`.
    """
    with _opened(path) as store:
        family, _ = read_config(store.config, f"{path}/config.json", "float32")
        targets = by_path(abstract)
        kinds = {name: leaf.dtype.name for name, leaf in targets.items()}
        layout = {name: leaf.sharding for name, leaf in targets.items()}
        return _read(store, family, leaves(family, config), kinds, layout)


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Store]:
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}: give that of a Hugging Face checkpoint")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json, so it is not known what model it holds")
    read_json(folder / "config.json")  # before the weights, of which more can be wrong
    store = open_store(str(folder))
    try:
        yield store
    finally:
        if isinstance(store, FileStore):
            store.close()


def _present(store: Store) -> dict[str, TensorInfo]:
    names = set(store.tensors) | set(store.aliases)
    return {name: store.tensors[store.aliases.get(name, name)] for name in names}


def _read(
    store: Store,
    family: Family,
    wanted: list[Leaf],
    dtypes: dict[tuple[str, ...], str],
    layout: dict[tuple[str, ...], jax.sharding.Sharding],
) -> model.Params:
    stored, tied = check_tensors(family, wanted, _present(store), store.path)
    _dtypes(store, wanted, stored)  # refuses what is no weight
    if tied:
        (embedding,) = next(leaf.names for leaf in wanted if leaf.path == ("embedding",))
        _check_tied(store, tied, stored[embedding])
    params: model.Params = {}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for leaf in wanted:
            node = params
            for name in leaf.path[:-1]:
                node = node.setdefault(name, {})
            reader = _Reader(store, leaf, stored, np.dtype(dtypes[leaf.path]), pool)
            where = layout[leaf.path]
            node[leaf.path[-1]] = jax.make_array_from_callback(leaf.shape, where, reader.read)
    return params


def _dtypes(store: Store, wanted: list[Leaf], stored: dict[str, str]) -> dict[tuple, str]:
    present = _present(store)
    return {
        leaf.path: _dtype(leaf, [present[stored[n]].dtype for n in leaf.names]) for leaf in wanted
    }


def _dtype(leaf: Leaf, stored: list[str]) -> str:
    for name, dtype in zip(leaf.names, stored, strict=True):
        if dtype not in DTYPES:
            raise ConfigError(
                f"{name} is stored as {dtype}; only {', '.join(DTYPES)} can be loaded"
            )
    return stored[0] if len(set(stored)) == 1 else "float32"  # which holds both 16-bit formats


def _check_tied(store: Store, head: str, embedding: str) -> None:
    """A checkpoint may hold the tied matrix twice, but then it must be the same."""
    first, second = store.tensors[store.aliases.get(head, head)], store.tensors[embedding]
    same = (first.shape, first.dtype) == (second.shape, second.dtype)
    for start in range(0, first.size, _BLOCK) if same else ():
        stop = min(start + _BLOCK, first.size)
        one, other = store.read(head, start, stop), store.read(embedding, start, stop)
        same &= one.tobytes() == other.tobytes()
    if not same:
        raise ConfigError(
            f"{store.path} ties {head} to {embedding} (tie_word_embeddings), but holds both and "
            "they differ: set tie_word_embeddings to false, or remove one"
        )


def _layout(config: ModelConfig, sharding: Any, wanted: list[Leaf]) -> dict[tuple, Any]:
    if isinstance(sharding, Mesh):
        return by_path(model.shardings(config, sharding))
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if isinstance(sharding, jax.sharding.Sharding):
        return {leaf.path: sharding for leaf in wanted}
    return by_path(sharding)


@dataclasses.dataclass
class _Reader:
    """Slices of one parameter."""

    store: Store
    leaf: Leaf
    stored: dict[str, str]
    dtype: np.dtype
    pool: concurrent.futures.Executor

    def read(self, index: tuple[slice, ...] | None) -> np.ndarray:
        """The part of the parameter that `index` (of the whole, layers included) names."""
        shape = self.leaf.shape
        ranges = [range(n)[part] for n, part in zip(shape, index or (), strict=True)]
        out = _empty([len(each) for each in ranges], self.dtype)
        stack = self.leaf.stack
        lead, ranges = ranges[: len(stack)], ranges[len(stack) :]
        jobs = []
        for index in itertools.product(*lead):
            place = tuple(i - each.start for i, each in zip(index, lead, strict=True))
            name = self.leaf.names[np.ravel_multi_index(index, stack) if stack else 0]
            jobs += self._blocks(self.stored[name], out[place], ranges)
        # One task for each thread, not for each block: handing one out costs what 100 kB cost.
        left = iter(jobs)
        tasks = [self.pool.submit(self._copy_all, left) for _ in range(_THREADS)]
        for task in tasks:
            task.result()  # raises what the thread raised
        return out

    def _copy_all(self, jobs: Iterator) -> None:
        for job in jobs:
            self._copy(job)

    def _blocks(self, name: str, target: np.ndarray, ranges: list[range]):
        """Pieces of one tensor: (name, first row, last + 1, columns, its place in the result)."""
        tensor = self.leaf.tensor
        info = self.store.tensors[self.store.aliases.get(name, name)]
        width = info.shape[-1] if len(info.shape) == 2 else 1
        if tensor.transpose:
            target, ranges = target.T, ranges[::-1]
        if tensor.part:
            offset = tensor.part[0] * (info.shape[-1] // tensor.part[1])
            last = ranges[-1]
            ranges = [*ranges[:-1], range(last.start + offset, last.stop + offset)]
        rows, columns = ranges[0], ranges[1] if len(info.shape) == 2 else range(1)
        step = max(1, _BLOCK // (width * np.dtype(info.dtype).itemsize))
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            yield name, start, stop, width, columns, target[start - rows.start : stop - rows.start]

    def _copy(self, job) -> None:
        name, start, stop, width, columns, target = job
        if not hasattr(_local, "buffer"):
            _local.buffer = np.empty(_BLOCK, np.uint8)
        values = self.store.read(name, start * width, stop * width, _local.buffer)
        block = values.reshape(stop - start, width)[:, columns.start : columns.stop]
        block = block.reshape(target.shape)
        if self.leaf.tensor.transpose:
            if values.dtype == self.dtype and native.transpose(block, target.T):
                return
            block, target = _transposed(block), target.T
        if values.dtype == self.dtype:
            # NumPy holds Python's lock while it copies bfloat16, which is no type of its own.
            bits = np.dtype(f"u{self.dtype.itemsize}")
            block, target = block.view(bits), target.view(bits)
        with np.errstate(over="ignore"):
            np.copyto(target, block, casting="unsafe")
        if values.dtype != self.dtype:
            check_range(name, target)


def _transposed(block: np.ndarray) -> np.ndarray:
    """The transpose [C, R] of a block [R, C], its rows contiguous.

    XLA's CPU client takes any strides and copies such arrays by SIMD transposes: 0.14 ms for 1 MB
    of bfloat16, where NumPy, element by element, needs 0.63.
    """
    try:
        (cpu, *_) = jax.local_devices(backend="cpu")
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return block.T
    return np.asarray(jax.device_put(block.T, cpu))


def _empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Uninitialized memory that XLA's CPU client takes as it is; large ones in huge pages, where
    the system has them: a transpose writes to many places in turn."""
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if count >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        pages = mmap.mmap(-1, count + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(pages, np.uint8, count).view(dtype).reshape(shape)
    memory = np.empty(count + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + count].view(dtype).reshape(shape)
