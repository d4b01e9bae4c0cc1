"""The models of a merge as streams of pieces, in the layout that the decoder takes.

Every checkpoint tensor belongs to one or more parameters of `lm.model` (GPT-2 keeps query, key and
value side by side). `Models.pieces` cuts the tensors into runs of rows; `read` gives a run of one
model in float32, `view` the same run of a tree of parameters or gradients, so that

    for piece in models.pieces:
        base = models.read(0, piece)
        ... <gradient, model - base> ...

needs memory for a few runs whatever the number of models. Numbers come from NumPy: the device
holds one model and, while learning, one gradient.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lm import model
from lm.config import ConfigError, ModelConfig
from lm.data import load_tokenizer
from lm.data.tokenizer import Tokenizer
from lm.hf.config import read_config
from lm.hf.tensors import Leaf, by_path, check_tensors, leaves, stored_shape
from lm.hf.tokenizer import prompt_ids
from lm.merging.numbers import to_float32
from lm.merging.store import open_store
from lm.merging.tokenizer import folder_of
from lm.merging.types import MergeError, Store, TensorInfo

__all__ = ["Models", "Piece", "Place", "Tree", "host", "joined", "nested"]

PIECE = 1 << 20
"""Elements of a piece, or one row if that is longer; vectors are whole."""

Tree = dict[tuple[str, ...], Any]
"""Arrays by the path of their parameter."""


class Piece(NamedTuple):
    """Rows [start, stop) of a checkpoint's tensor."""

    name: str
    start: int
    stop: int
    width: int
    """Elements of a row."""

    @property
    def span(self) -> tuple[int, int]:
        """Its elements in the flat tensor."""
        return self.start * self.width, self.stop * self.width


class Place(NamedTuple):
    """Where a tensor lies in the tree of parameters."""

    leaf: Leaf
    index: tuple[int, ...]
    """Of the stacked axes."""


class Models:
    """Checkpoints of one architecture and one vocabulary.

    Args:
      references: folders in Hugging Face layout, or folder+adapter; configuration and tokenizer
        are those of the first, which is the base where there is one.
      mesh: devices that parameters are spread over by `lm.sharding.RULES`; None: the first device.

    Raises:
      MergeError: other architectures, tensors or tokenizers, named.
    """

    def __init__(self, references: Sequence[str], mesh: Mesh | None = None):
        self.references = tuple(references)
        self.stores: list[Store] = [open_store(reference) for reference in references]
        first = self.stores[0]
        self.family, self.config = self._config(first)
        self.leaves = leaves(self.family, self.config)
        self._stored = []
        for store in self.stores:
            if (folder_of(store) / "adaptive.json").is_file():
                raise MergeError(
                    f"{store.path} has routers or corrections besides its weights, which would be "
                    "lost: merge what it was made of, or its weights alone (convert.py DIR OUT "
                    "--to hf --task none)"
                )
            family, config = self._config(store)
            if (family, config) != (self.family, self.config):
                raise MergeError(
                    f"{store.path} is not a model of the kind of {first.path}: they differ in "
                    f"{', '.join(_differing(self.config, config)) or 'model_type'}"
                )
            present = {
                name: store.tensors[store.aliases.get(name, name)]
                for name in (*store.tensors, *store.aliases)
            }
            try:
                self._stored.append(check_tensors(family, self.leaves, present, store.path)[0])
            except ConfigError as error:
                raise MergeError(str(error)) from None
        self.places: dict[str, list[Place]] = {}
        for leaf in self.leaves:
            for number, name in enumerate(leaf.names):
                index = np.unravel_index(number, leaf.stack) if leaf.stack else ()
                self.places.setdefault(name, []).append(Place(leaf, tuple(map(int, index))))
        order = {name: number for number, name in enumerate(first.tensors)}
        where = [self._stored[0][name] for name in self.places]
        where = [order[first.aliases.get(name, name)] for name in where]
        names = [name for _, name in sorted(zip(where, self.places, strict=True))]
        self.infos = {
            name: TensorInfo(name, stored_shape(self.places[name][0].leaf), self._dtype(name))
            for name in names
        }
        for at in self.places.values():
            at.sort(key=lambda place: place.leaf.tensor.part or (0, 0))
        self.cuts = {name: _cut(info) for name, info in self.infos.items()}
        self.pieces = [piece for cut in self.cuts.values() for piece in cut]
        self.dtype = max(self.infos.values(), key=lambda info: info.size).dtype
        self.config = dataclasses.replace(
            self.config, dtype=self.dtype, param_dtype=self.dtype, remat="none"
        )
        self.sharding = None if mesh is None else by_path(model.shardings(self.config, mesh))

    def _config(self, store: Store) -> tuple[Any, ModelConfig]:
        if not store.config:
            raise MergeError(f"{store.path} has no config.json: methods that learn run the model")
        try:
            return read_config(store.config, f"{store.path}/config.json", "float32")
        except ConfigError as error:
            raise MergeError(str(error)) from None

    def _dtype(self, name: str) -> str:
        store, stored = self.stores[0], self._stored[0][name]
        return store.tensors[store.aliases.get(stored, stored)].dtype

    @property
    def folder(self) -> Path:
        """The first model's folder: its tokenizer goes along."""
        return folder_of(self.stores[0])

    @property
    def nbytes(self) -> int:
        """Of one model, as stored."""
        return sum(info.nbytes for info in self.infos.values())

    def tokenizer(self) -> tuple[Tokenizer, list[int]]:
        """The models' tokenizer, and what it puts in front of a document.

        Raises:
          MergeError: the first model has none, or another one has a different one.
        """
        folder = self.folder
        if not (folder / "tokenizer.json").is_file():
            raise MergeError(f"{folder} has no tokenizer.json: text cannot be read without one")
        found = load_tokenizer(str(folder))
        for store in self.stores[1:]:
            other = folder_of(store)
            if not (other / "tokenizer.json").is_file():
                continue
            if load_tokenizer(str(other)).fingerprint != found.fingerprint:
                raise MergeError(
                    f"{store.path} has another tokenizer than {folder}: its text would be read "
                    "wrongly by the merged model; align the vocabularies first (tokenizer: union)"
                )
        return found, prompt_ids(folder)

    def read(self, number: int, piece: Piece) -> np.ndarray:
        """The piece of a model, flat, float32."""
        values = self.stores[number].read(self._stored[number][piece.name], *piece.span)
        return to_float32(values, np.empty(values.size, np.float32))

    def view(self, tree: Tree, piece: Piece) -> list[np.ndarray]:
        """The piece in a tree of NumPy arrays: parts that lie side by side in the tensor."""
        return self.parts(piece, lambda place: tree[place.leaf.path][place.index])

    def parts(self, piece: Piece, get: Callable[[Place], np.ndarray]) -> list[np.ndarray]:
        """The parts of a piece, where `get(place)` gives the parameter at a place."""
        found = []
        for place in self.places[piece.name]:
            array = get(place)
            array = array.T if place.leaf.tensor.transpose else array
            found.append(array[piece.start : piece.stop])
        return found

    def flat(self, tree: Tree, piece: Piece) -> np.ndarray:
        """The piece of a tree, flat, float32, in the order of the tensor; perhaps a view of it."""
        return joined(self.view(tree, piece))

    def put(self, tree: Tree, piece: Piece, values: np.ndarray) -> None:
        """Write flat values of a piece into a tree of NumPy arrays, in their dtypes."""
        fill(self.view(tree, piece), values, piece)

    def empty(self) -> Tree:
        """Uninitialized parameters."""
        return {leaf.path: np.empty(leaf.shape, np.dtype(self.dtype)) for leaf in self.leaves}

    def build(self, values: Callable[[Piece], np.ndarray]) -> Tree:
        """Parameters out of the flat values of every piece."""
        tree = self.empty()
        for piece in self.pieces:
            self.put(tree, piece, values(piece))
        return tree

    def params(self, number: int) -> model.Params:
        """A model's parameters on the devices."""
        return self.place(self.build(lambda piece: self.read(number, piece)))

    def place(self, tree: Tree) -> model.Params:
        """A tree on the devices, spread over those of the mesh if there is one. The tree is empty
        afterwards: a second copy on the host is gone as soon as it can be."""
        where, found = self.sharding or dict.fromkeys(tree), {}
        for path in list(tree):
            found[path] = jax.device_put(tree.pop(path), where[path])
        return nested(found)

    def layer(self, number: int, layer: int) -> Tree:
        """The parameters of one layer of a model (layer `num_layers`: those outside of layers)."""
        inside = layer < self.config.num_layers
        wanted = [leaf for leaf in self.leaves if bool(leaf.stack) == inside]
        tree = {leaf.path: np.empty(leaf.shape[inside:], np.float32) for leaf in wanted}
        tree = {path: array[None] if inside else array for path, array in tree.items()}
        for piece in self.pieces:
            at = self.places[piece.name]
            if at[0].leaf.path not in tree or (inside and at[0].index[0] != layer):
                continue
            values = self.read(number, piece)
            parts = self.parts(piece, lambda p: tree[p.leaf.path][(0, *p.index[1:]) * inside])
            fill(parts, values, piece)
        return {path: array[0] if inside else array for path, array in tree.items()}


def joined(parts: list[np.ndarray]) -> np.ndarray:
    """Parts of a piece, flat, in float32."""
    wide = [np.asarray(part, np.float32) for part in parts]
    return (wide[0] if len(wide) == 1 else np.concatenate(wide, -1)).reshape(-1)


def fill(parts: list[np.ndarray], values: np.ndarray, piece: Piece) -> None:
    """Write flat values into the parts of a piece."""
    rows = values.reshape(piece.stop - piece.start, -1) if parts[0].ndim == 2 else values
    start = 0
    for part in parts:
        part[...] = rows[..., start : start + part.shape[-1]]
        start += part.shape[-1]


def nested(tree: Tree) -> model.Params:
    """The tree as the decoder takes it."""
    result: model.Params = {}
    for path, array in tree.items():
        node = result
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = array
    return result


def host(params: model.Params) -> Tree:
    """The arrays of a nested tree as NumPy's, by path."""
    return {path: np.asarray(leaf) for path, leaf in by_path(params).items()}


def _cut(info: TensorInfo) -> list[Piece]:
    rows = info.shape[0]
    if len(info.shape) == 1:
        return [Piece(info.name, 0, rows, 1)]
    width = info.size // rows
    step = max(1, PIECE // width)
    return [Piece(info.name, s, min(rows, s + step), width) for s in range(0, rows, step)]


def _differing(first: ModelConfig, other: ModelConfig) -> list[str]:
    names = [field.name for field in dataclasses.fields(first)]
    return [
        f"{name} ({getattr(first, name)} and {getattr(other, name)})"
        for name in names
        if getattr(first, name) != getattr(other, name)
    ]
