"""LoRA adapters on top of a checkpoint: `path+adapter`, as factors.

A tensor W [out, in] that the adapter changes is read as W + scale * B @ A, one band of rows at a
time, in float32: nothing is written to the disk and no whole product is ever held. The adapter is
PEFT's: adapter_config.json and adapter_model.safetensors (or .bin), scale = alpha / rank, or
alpha / sqrt(rank) with rsLoRA (arXiv 2312.03732).
"""

import hashlib
import json
import math
import re
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm.merging.numbers import to_float32
from lm.merging.store.files import read_json
from lm.merging.types import MergeError, StorageError, Store, TensorInfo

__all__ = ["LoraStore"]

_PREFIXES = ("base_model.model.", "")
_FACTOR = re.compile(r"(.+)\.(lora_(?:embedding_)?[AB])(?:\.[^.]+)?(?:\.weight)?")
_BAND = 1 << 16  # elements; bands do not depend on what is asked for, so that rounding does not
_KEPT = 64 << 20  # bytes of factors in float32 that are kept for the next blocks


class _Update(NamedTuple):
    a: str
    b: str
    scale: float
    transposed: bool
    """Whether the weight is [in, out]: embeddings, and Conv1D of GPT-2 (fan_in_fan_out)."""


class LoraStore:
    """`base` with the updates of the adapter in the folder `path`, whose tensors are `factors`.

    Raises:
      StorageError: the adapter's files are damaged or do not belong together.
      MergeError: it does not fit the base, or is of a kind that is no product of two factors.
    """

    def __init__(self, base: Store, path: Path, factors: Store):
        self.path = f"{base.path}+{path}"
        self.config = base.config
        self.tensors = dict(base.tensors)
        self.aliases = base.aliases
        self._base, self._factors, self._folder = base, factors, path
        self._settings = read_json(path / "adapter_config.json")
        self._replaced: dict[str, str] = {}
        self._updates: dict[str, _Update] = {}
        self._loaded: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()
        for setting in ("use_dora", "use_qalora", "lora_bias"):
            if self._settings.get(setting):
                raise MergeError(f"{path}: {setting} is not supported; merge that adapter first")
        if (kind := str(self._settings.get("peft_type", "LORA")).upper()) != "LORA":
            raise MergeError(f"{path}: an adapter of type {kind} is not supported, only LORA")
        self._match()

    def read(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        buffer: np.ndarray | None = None,
    ) -> np.ndarray:
        """Elements [start, stop) of the flattened tensor; float32 where the adapter changes it."""
        name = self.aliases.get(name, name)
        if name in self._replaced:
            return self._factors.read(self._replaced[name], start, stop, buffer)
        values = self._base.read(name, start, stop, buffer)
        if name not in self._updates:
            return values
        stop = self.tensors[name].size if stop is None else stop
        out = to_float32(values, np.empty(values.size, np.float32))
        columns = self.tensors[name].shape[1]
        band = max(1, _BAND // columns)
        for row in range(start // columns // band * band, -(-stop // columns), band):
            first = row * columns
            product = self._product(self._updates[name], row, row + band).reshape(-1)
            lower, upper = max(start, first), min(stop, first + product.size)
            out[lower - start : upper - start] += product[lower - first : upper - first]
        return out

    def will_need(self, name: str, start: int, stop: int) -> None:
        """Let the system begin to read these elements of the base."""
        self._base.will_need(name, start, stop)

    def identity(self) -> str:
        """Hash of the base's and the adapter's identities."""
        settings = json.dumps(self._settings, sort_keys=True)
        text = "\0".join((self._base.identity(), self._factors.identity(), settings))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def _product(self, update: _Update, start: int, stop: int) -> np.ndarray:
        a, b = self._load(update.a), self._load(update.b)
        left, right = (a.T, b.T) if update.transposed else (b, a)
        product = left[start:stop] @ right
        product *= np.float32(update.scale)
        return product

    def _load(self, name: str) -> np.ndarray:
        """A factor in float32; those used last are kept, as far as `_KEPT` allows."""
        with self._lock:
            if (found := self._loaded.pop(name, None)) is not None:
                self._loaded[name] = found  # now the last to be given up
                return found
        values = self._factors.read(name)
        shape = self._factors.tensors[name].shape
        found = to_float32(values, np.empty(values.size, np.float32)).reshape(shape)
        with self._lock:
            self._loaded[name] = found
            while sum(each.nbytes for each in self._loaded.values()) > max(_KEPT, found.nbytes):
                del self._loaded[next(iter(self._loaded))]
        return found

    def _match(self) -> None:
        """Find the weight that each tensor of the adapter belongs to."""
        pairs: dict[str, dict[str, str]] = {}
        for name, info in self._factors.tensors.items():
            if match := _FACTOR.fullmatch(name):
                pairs.setdefault(match[1], {})[match[2]] = name
                continue
            target = self._weight(name.replace(".modules_to_save.default", ""))
            if target is None:
                raise MergeError(f"{self._folder}: {name} belongs to no tensor of the base")
            if info.shape != self.tensors[target].shape:
                raise MergeError(
                    f"{self._folder}: {name} is {list(info.shape)}, the base has "
                    f"{list(self.tensors[target].shape)}"
                )
            self._replaced[target] = name
            self.tensors[target] = TensorInfo(target, info.shape, info.dtype)
        for module, names in pairs.items():
            self._add(module, names)
        if not self._updates and not self._replaced:
            raise StorageError(f"{self._folder} changes no tensor: it holds no LoRA factors")

    def _add(self, module: str, names: dict[str, str]) -> None:
        embedding = any("embedding" in kind for kind in names)
        kinds = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        if set(names) != set(kinds):
            raise StorageError(f"{self._folder} has only {', '.join(names)} of {module}")
        a, b = (self._factors.tensors[names[kind]] for kind in kinds)
        target = self._weight(f"{module}.weight")
        if target is None:
            raise MergeError(f"{self._folder}: {module} is no module of {self._base.path}")
        transposed = embedding or bool(self._settings.get("fan_in_fan_out"))
        product = (a.shape[1], b.shape[0]) if transposed else (b.shape[0], a.shape[1])
        shape = self.tensors[target].shape
        if len(a.shape) != 2 or b.shape[1:] != a.shape[:1] or product != shape:
            raise MergeError(
                f"{self._folder}: factors {list(b.shape)} and {list(a.shape)} of {module} do not "
                f"make a weight of shape {list(shape)}"
            )
        path = module.removeprefix("base_model.model.")
        scale = self._scale(path, a.shape[0])
        self._updates[target] = _Update(names[kinds[0]], names[kinds[1]], scale, transposed)

    def _weight(self, name: str) -> str | None:
        """The base's name (of a stored tensor) for the adapter's."""
        for prefix in _PREFIXES:
            if name.startswith(prefix):
                bare = name.removeprefix(prefix)
                bare = self.aliases.get(bare, bare)
                if bare in self.tensors:
                    return bare
        return None

    def _scale(self, module: str, rank: int) -> float:
        alpha = _pattern(self._settings.get("alpha_pattern"), module)
        if alpha is None:
            alpha = self._settings.get("lora_alpha", 8)
        try:
            root = math.sqrt(rank) if self._settings.get("use_rslora") else rank
            return float(alpha) / root
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise StorageError(f"{self._folder}: lora_alpha {alpha!r} is no number") from error


def _pattern(patterns: Any, module: str) -> Any:
    """Value of the first pattern that fits the end of a module's name, as PEFT reads them."""
    for key, value in (patterns or {}).items():
        try:
            if re.fullmatch(rf"(.*\.)?({key})", module):
                return value
        except re.error:
            continue
    return None
