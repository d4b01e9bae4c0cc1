"""Folders of merged models that have more than weights: what `lm.merging.adaptive` writes.

    adaptive.json                 {"format": 1, "kind": "wemoe" or "surgery", "tasks": [...]}
    wemoe/wemoe.safetensors       router.{out, out_bias, hidden, hidden_bias}, weights,
                                  vectors.{gate, up, down}.{kernel, bias}
    surgery/surgery.safetensors   TASK/{final, layers}.{down, up}

Every other loader sees the dense model beside them, and so does `task="none"` here.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lm import model
from lm.config import ConfigError, ModelConfig, check
from lm.config_merged import MergedConfig
from lm.files import atomic_write_json
from lm.hf import reader
from lm.hf.tensors import by_path
from lm.layers.merged import is_part
from lm.merging.folder import write_folder
from lm.merging.store import open_store
from lm.merging.store.files import read_json
from lm.merging.types import Store, TensorInfo

__all__ = [
    "check_parts",
    "join",
    "load",
    "load_config",
    "load_params",
    "part_arrays",
    "plain",
    "read_parts",
    "settings",
    "write_parts",
]

FILE, FORMAT, NONE = "adaptive.json", 1, "none"
Place = tuple[str, ...]


def load(
    path: str | os.PathLike, dtype: str | None = None, sharding: Any = None, task: str | None = None
) -> tuple[ModelConfig, model.Params]:
    """Configuration and parameters, for `lm.apply` and all that is built on it.

    Args:
      path, dtype, sharding: as of `lm.hf.reader.load`.
      task: whose corrections a folder of surgery gives; "none" is the model without them, or
        without routers. Ordinary folders have none.

    Raises:
      ConfigError: as of `lm.hf.reader.load`; a folder of surgery without a task, or another task.
    """
    found = _read_settings(path, task)
    if found.kind == "none":
        return reader.load(path, dtype, sharding)
    tree = not (sharding is None or isinstance(sharding, Mesh | jax.sharding.Sharding))
    base = _nested(_divide(by_path(sharding))[0]) if tree else sharding
    config, params = reader.load(path, dtype, base)
    config = dataclasses.replace(config, merged=found)
    if isinstance(sharding, Mesh):
        where = by_path(model.shardings(config, sharding))
    elif tree:
        where = by_path(sharding)
    else:
        where = dict.fromkeys(by_path(model.abstract_params(config)), sharding)
    return config, join(params, read_parts(path, config, where))


def load_config(
    path: str | os.PathLike, dtype: str | None = None, task: str | None = None
) -> ModelConfig:
    """The model that a folder describes; no weight is read. Arguments are those of `load`."""
    config = reader.load_config(path, dtype)
    return dataclasses.replace(config, merged=_read_settings(path, task))


def load_params(
    path: str | os.PathLike, config: ModelConfig, abstract: model.Params
) -> model.Params:
    """Parameters alone, as by `lm.hf.reader.load_params`; `config.merged` says which task's."""
    ordinary, parts = _divide(by_path(abstract))
    params = reader.load_params(path, plain(config), _nested(ordinary))
    if config.merged.kind == "none":
        return params
    (task, *_) = config.merged.tasks
    found = _read_settings(path, task if config.merged.kind == "surgery" else None)
    check(
        found == config.merged,
        f"{path} holds {found}, and the model is to be {config.merged}",
    )
    return join(params, read_parts(path, config, {p: a.sharding for p, a in parts.items()}))


def plain(config: ModelConfig) -> ModelConfig:
    """The dense model in it."""
    return dataclasses.replace(config, merged=MergedConfig())


def check_parts(config: ModelConfig, params: Mapping[Place, Any]) -> None:
    """ConfigError if the parts among `params`, by path, are not those of `config`."""
    whole = {} if config.merged.kind == "none" else by_path(model.abstract_params(config))
    expected = _divide(whole)[1]
    found = {place: a.shape for place, a in params.items() if is_part(place)}
    for place in expected | found:
        here, there = found.get(place), expected[place].shape if place in expected else None
        check(
            here == there,
            f"params: {'/'.join(place)} has the shape {here}, and model.merged of kind "
            f"{config.merged.kind!r} has {there} there",
        )


def write_parts(folder: Path, config: ModelConfig, params: Mapping[Place, Any]) -> None:
    """Write the parts among `params`, by path, beside a model's weights."""
    c = config.merged
    if c.kind == "none":
        return
    arrays = part_arrays(config, params)
    tensors = [
        (TensorInfo(name, array.shape, array.dtype.name), lambda array=array: [array])
        for name, array in arrays.items()
    ]
    write_folder(folder / c.kind, tensors, {}, {}, metadata={}, file_name=f"{c.kind}.safetensors")
    content = {"format": FORMAT, "kind": c.kind, "tasks": list(c.tasks)}
    atomic_write_json(folder / FILE, content)


def part_arrays(config: ModelConfig, params: Mapping[Place, Any]) -> dict[str, np.ndarray]:
    """The parts among `params`, by path, under the names of their file."""
    c = config.merged
    arrays = {_name(path, c): np.asarray(a) for path, a in params.items() if is_part(path)}
    return arrays | ({"weights": np.asarray(c.weights, "f4")} if c.kind == "wemoe" else {})


def settings(path: str | os.PathLike) -> tuple[str, tuple[str, ...]] | None:
    """(kind, tasks) of what a folder has besides weights; None: nothing.

    Raises:
      ConfigError: a later format, or an unknown kind.
    """
    file = Path(path) / FILE
    if not file.is_file():
        return None
    content = read_json(file)
    if content.get("format") != FORMAT:
        raise ConfigError(f"{file} has the format {content.get('format')}, known is {FORMAT}")
    kind, tasks = content.get("kind"), content.get("tasks", ())
    check(kind in ("wemoe", "surgery"), f"{file} has the kind {kind!r}, which is not known")
    return kind, tuple(tasks)


def _read_settings(path: str | os.PathLike, task: str | None) -> MergedConfig:
    found = settings(path)
    if found is None:
        known = f"{path} is no model of surgery: it has no task {task!r}"
        check(task in (None, NONE), known)
        return MergedConfig()
    kind, tasks = found
    if task == NONE:
        return MergedConfig()
    store = _store(path, kind)
    if kind == "wemoe":
        check(task is None, f"{path} routes by the text itself: give no task ({task!r})")
        hidden = "router.hidden" in store.tensors
        return MergedConfig(
            kind="wemoe",
            tasks=tasks,
            weights=tuple(float(w) for w in store.read("weights")),
            depth=2 if hidden else int("router.out" in store.tensors),
            shared=len(store.tensors["router.out_bias"].shape) == 1,
        )
    if task not in tasks:
        asked = f"there is no task {task!r}" if task else "it corrects the model for one task"
        raise ConfigError(
            f"{path} holds corrections of the tasks {', '.join(tasks)}, and {asked}: name one "
            f'(--task NAME, or task="NAME"), or "{NONE}" for the model without corrections'
        )
    rank = store.tensors[f"{task}/final.down"].shape[1]
    layers = f"{task}/layers.down" in store.tensors
    return MergedConfig(kind="surgery", tasks=(task,), rank=rank, layers=layers)


def _store(path: str | os.PathLike, kind: str) -> Store:
    return open_store(str(Path(path) / kind / f"{kind}.safetensors"))


def read_parts(
    path: str | os.PathLike, config: ModelConfig, where: Mapping[Place, Any] | None = None
) -> dict[Place, jax.Array]:
    """What a folder has for `config` besides dense parameters, in the shardings `where`."""
    store = _store(path, config.merged.kind)
    found = {}
    for place, leaf in _divide(by_path(model.abstract_params(config)))[1].items():
        name = _name(place, config.merged)
        info = store.tensors.get(name)
        shape = None if info is None else info.shape
        check(shape == leaf.shape, f"{path}: {name} has the shape {shape} instead of {leaf.shape}")
        values = np.asarray(store.read(name)).reshape(leaf.shape).astype(leaf.dtype)
        found[place] = jax.device_put(values, where[place] if where else None)
    return found


def _name(path: Place, config: MergedConfig) -> str:
    """Of a part in its file."""
    if config.kind == "surgery":
        return f"{config.tasks[0]}/{'layers' if path[0] == 'layers' else 'final'}.{path[-1]}"
    if "vectors" in path:
        return ".".join(path[-3:])
    return f"router.{path[-2]}{'_bias' * (path[-1] == 'bias')}"


def _divide(tree: dict[Place, Any]) -> tuple[dict[Place, Any], dict[Place, Any]]:
    """Ordinary parameters, and parts."""
    parts = {path: leaf for path, leaf in tree.items() if is_part(path)}
    return {path: leaf for path, leaf in tree.items() if path not in parts}, parts


def join(params: model.Params, parts: Mapping[Place, Any]) -> model.Params:
    """Dense parameters with parts, by path."""
    return _nested(by_path(params) | dict(parts))


def _nested(tree: Mapping[Place, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for path, leaf in tree.items():
        node = result
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return result
