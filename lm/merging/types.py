"""What the parts of the merging tool say to each other."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

import numpy as np

from lm.config import ConfigError

__all__ = [
    "Block",
    "Blocks",
    "Job",
    "MergeError",
    "Method",
    "Parameter",
    "Params",
    "Plan",
    "Source",
    "StorageError",
    "Store",
    "TensorInfo",
]

Params = Mapping[str, Any]
"""Resolved parameters by mergekit's names; see `Block`."""


class MergeError(ConfigError):
    """Something about the configuration, an input or an output cannot work; one clear line."""


class StorageError(MergeError):
    """A file that cannot be read or written: damaged, missing, no space; one clear line."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor of a store. `dtype` is NumPy's name ("bfloat16" and "float8_*" from ml_dtypes)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy

        return self.size * np.dtype(self.dtype).itemsize


class Store(Protocol):
    """Named tensors of one checkpoint, read lazily. `lm.merging.store.open_store` makes them."""

    path: str
    config: dict[str, Any]
    """Content of config.json; empty where there is none."""
    tensors: Mapping[str, TensorInfo]
    aliases: Mapping[str, str]
    """Names that are stored once (tied or shared tensors): other name -> stored name."""

    def read(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        buffer: np.ndarray | None = None,
    ) -> np.ndarray:
        """Elements [start, stop) of the flattened tensor, in the file's dtype (a tensor that an
        adapter changes: float32).

        `buffer`, of bytes, may be used for the result, which is then a view of it.
        """
        ...

    def will_need(self, name: str, start: int, stop: int) -> None:
        """These elements will be read soon: begin to fetch them, without waiting."""
        ...

    def identity(self) -> str:
        """A hash that changes when the files do (names, sizes, modification times, headers)."""
        ...


@dataclasses.dataclass(frozen=True)
class Source:
    """One input of a job: a tensor of a model, with that model's parameters for this tensor."""

    model: int
    """Index into `Plan.models`."""
    name: str
    params: Params = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Job:
    """How one output tensor is made."""

    output: str
    shape: tuple[int, ...]
    dtype: str
    """Of the output file."""
    method: str
    sources: tuple[Source, ...]
    """The models to be merged, without the base."""
    base: Source | None
    params: Params
    """Parameters of the method as a whole, resolved for this tensor."""
    kind: Literal["matrix", "embedding", "vector", "other"] = "other"
    """What the tensor is: methods that treat matrices specially go by it."""
    transform: Any = None
    """A `lm.merging.row_map.RowMap` for embeddings whose vocabulary is rearranged."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole merge, resolved: nothing in it depends on time, machine or order of execution."""

    models: tuple[str, ...]
    """References in order of first use: path, or path+lora."""
    jobs: tuple[Job, ...]
    """In the order of the output."""
    files: Mapping[str, bytes]
    """Small files of the output by name: config.json, tokenizer files, README.md."""
    aliases: Mapping[str, str]
    """Output names that are not written because they are tied: name -> the name written."""
    seed: int
    flavor: Literal["paper", "mergekit"]
    fingerprint: str
    """Hash of the configuration and the inputs' identities."""
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Provenance, for the `__metadata__` of the safetensors files."""
    warnings: tuple[str, ...] = ()
    """What the user should read before the merge; one line each."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A piece of one tensor of all models, as a method sees it; float32 throughout.

    For `scope="block"` the arrays are flat and any piece may come alone; for "row" they are
    [rows, columns]; for "tensor" they have the tensor's shape.
    """

    base: Any | None
    """The base's values, or None without a base."""
    models: tuple[Any, ...]
    """The models' values; `deltas` subtracts the base."""
    per_model: tuple[Params, ...]
    """Parameters of each model for this tensor (weight, density, ...)."""
    params: Params
    """Parameters of the method for this tensor (lambda, normalize, t, ...)."""
    start: int
    """Position of the first element in the flattened tensor."""
    random: Callable[[int], Any]
    """`random(k)`: uniform [0, 1) numbers for model k in the shape of its block, a function of
    (seed, method, model, tensor name, position) alone."""
    xp: Any = np
    """The array namespace of the inputs: numpy or jax.numpy."""
    statistics: Any = None
    """What `Method.measure` returned for this tensor."""
    whole: Any = None
    """What `Method.survey` returned for the whole model."""
    info: TensorInfo | None = None
    """The output tensor."""

    @property
    def deltas(self) -> tuple[Any, ...]:
        """Task vectors: models minus base, in float32."""
        if self.base is None:
            raise MergeError("this method works on differences: it needs a base_model")
        return tuple(model - self.base for model in self.models)


class Blocks(Protocol):
    """All blocks of one tensor, as often as wanted; always cut in the same places.

    A block's arrays are reused: they hold only until the next block, or the function's return.
    """

    job: Job
    """What the blocks are of: its shape and parameters can be read before any block is."""

    def __call__(self) -> Iterator[Block]:
        """The blocks from the first, one after the other; call it again for another pass."""
        ...

    def map(self, function: Callable[[Block], Any]) -> Iterator[Any]:
        """`function(block)` of every block, in order of the blocks, computed by several threads.

        What the function returns must not be views of the block's arrays.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter that a method takes, by mergekit's name."""

    name: str
    default: Any = None
    required: bool = False
    kind: Literal["number", "bool", "integer"] = "number"
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """A merge method: one pure function and what it asks of its inputs.

    `apply(block)` gives the merged piece. A method whose pieces depend on the whole tensor
    (a threshold, an angle) first gets `measure(blocks)`, which may make several passes; one that
    depends on the whole model gets `survey(job_blocks)`, where `job_blocks()` gives (name, blocks)
    of every tensor. Both return small values only.
    """

    name: str
    apply: Callable[[Block], Any]
    scope: Literal["block", "row", "tensor"] = "block"
    measure: Callable[[Blocks], Any] | None = None
    survey: Callable[..., Any] | None = None
    per_model: tuple[Parameter, ...] = ()
    params: tuple[Parameter, ...] = ()
    base: Literal["required", "optional", "none", "one of the models"] = "required"
    models: tuple[int, int | None] = (1, None)
    """Smallest and largest number of models besides the base (None: no limit)."""
    flavor: Literal["paper", "mergekit"] | None = None
    """None: both readings agree, or the method has one only."""
    elsewhere: "Method | None" = None
    """Used instead for every `Job` whose kind is not "matrix" (methods of singular vectors average
    embeddings and vectors). `lm.merging.methods.get(name, flavor, kind)` follows it."""
    many: bool = False
    """The result is a compressed multi-task output instead of one tensor: `apply` gives a dict of
    suffix -> flat piece, and the output tensor `<name><suffix>` is the pieces of all blocks in
    order, joined. Block starts must be multiples of 8 (masks are packed bits)."""
    outputs: "Callable[[TensorInfo, int], tuple[TensorInfo, ...]] | None" = None
    """Of `many`: the output tensors for (the tensor, number of models)."""
    check: "Callable[[Job], None] | None" = None
    """Raises `MergeError` before any work where the parameters of a job do not go together."""
    memory: Callable[[tuple[int, ...], int], int] | None = None
    """Of scope "tensor": bytes that the inputs and all that `apply` makes of them take at most, for
    (shape, number of models besides the base). None: twice the inputs and two more arrays."""
