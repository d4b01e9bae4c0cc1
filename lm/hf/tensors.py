"""Which tensors of a checkpoint hold which parts of our parameters."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from lm import model
from lm.config import ConfigError, ModelConfig
from lm.hf.family import Family, Tensor
from lm.merging.types import TensorInfo

__all__ = ["Leaf", "by_path", "check_range", "check_tensors", "dtypes", "leaves", "stored_shape"]

_LISTED = 8


class Leaf(NamedTuple):
    """One parameter of ours."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    tensor: Tensor
    stack: tuple[int, ...]
    """Leading axes of `shape` along which tensors of the checkpoint are stacked: (), (layers,) or
    (layers, experts)."""
    names: tuple[str, ...]
    """Those tensors, in order."""
    layers: tuple[int, ...]
    """Numbers of the model's layers that lie along the first axis; () outside of layers."""


def by_path(tree: model.Params) -> dict[tuple[str, ...], jax.Array]:
    """Leaves of a tree of parameters by their path."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(entry.key for entry in path): leaf for path, leaf in pairs}


def leaves(family: Family, config: ModelConfig) -> list[Leaf]:
    """All parameters of the model in the order of the family's table, with their tensors.

    Raises:
      ConfigError: the table lacks a parameter that the model has.
    """
    shapes = dict(_shapes(dataclasses.replace(config, dtype="float32", param_dtype="float32")))
    result = []
    for tensor in family.tensors:
        front, *rest = tensor.param.split("/")
        stacks = config.stacks if front == "layers" else {front: ()}
        for name, layers in stacks.items():
            path = (name, *rest)
            shape = shapes.pop(path, None)
            if shape is None:  # this model has no such bias, norm, expert or head
                continue
            stack = shape[: bool(layers) + ("{expert}" in tensor.name)]
            axes = [layers] * bool(layers) + [range(n) for n in stack[bool(layers) :]]
            every = itertools.product(*axes)
            named = (dict(zip(("layer", "expert"), index, strict=False)) for index in every)
            names = tuple(tensor.name.format(**numbers) for numbers in named)
            result.append(Leaf(path, shape, tensor, stack, names, layers))
    if shapes:
        missing = ", ".join("/".join(path) for path in shapes)
        raise ConfigError(f"models of the family {family.model_type} have no {missing}")
    return result


@functools.lru_cache(maxsize=64)
def _shapes(config: ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in by_path(model.abstract_params(config)).items()}


def dtypes(config: ModelConfig, dtype: str) -> dict[tuple[str, ...], str]:
    """Of each parameter of a model in `dtype`; selection biases of experts are float32 in all."""
    params = model.abstract_params(dataclasses.replace(config, dtype=dtype, param_dtype=dtype))
    return {path: leaf.dtype.name for path, leaf in by_path(params).items()}


def check_range(name: str, values: np.ndarray) -> None:
    """ConfigError if what was cast to float16 went beyond its largest number, 65,504."""
    if values.dtype == np.float16 and np.isinf(values).any():
        raise ConfigError(
            f"{name} has values that float16 cannot hold (above 65,504): take bfloat16 or float32"
        )


def stored_shape(leaf: Leaf) -> tuple[int, ...]:
    """Shape of each of the checkpoint's tensors that hold `leaf`."""
    shape = leaf.shape[len(leaf.stack) :]
    if leaf.tensor.transpose:
        return shape[::-1]
    if leaf.tensor.part:
        return (*shape[:-1], shape[-1] * leaf.tensor.part[1])
    return shape


def check_tensors(
    family: Family, wanted: list[Leaf], present: Mapping[str, TensorInfo], where: str
) -> tuple[dict[str, str], str | None]:
    """Compare a checkpoint's tensors with what the model needs.

    Returns:
      The name under which each wanted tensor is stored (checkpoints of a bare model lack the
      family's prefix), and the name of a stored head that the model ties to its embedding, if any.

    Raises:
      ConfigError: tensors are missing, superfluous or of other shapes; they are listed.
    """
    shapes = {name: stored_shape(leaf) for leaf in wanted for name in leaf.names}
    bare = not any(name.startswith(family.prefix) for name in present)
    stored = {name: name.removeprefix(family.prefix) if bare else name for name in shapes}
    problems = []
    if missing := sorted(name for name in shapes if stored[name] not in present):
        problems.append(f"missing: {_listed(missing)}")
    buffers = [re.compile(pattern) for pattern in family.buffers]
    extra = sorted(
        name
        for name in set(present) - set(stored.values())
        if not any(pattern.fullmatch(name) for pattern in buffers)
    )
    if family.more_layers:
        # Layers that predict further tokens have a projection of two inputs; others are of a
        # deeper model than its configuration says.
        number = re.compile(re.escape(family.prefix) + r"layers\.(\d+)\.(eh_proj\.weight$)?")
        found = {name: number.match(name) for name in extra}
        predict = {m[1] for m in found.values() if m and m[2]}
        extra = [name for name in extra if not (m := found[name]) or m[1] not in predict]
    head = next((t.name for t in family.tensors if t.param == "head/kernel"), None)
    tied = head if head in extra and head not in shapes else None
    if extra := [name for name in extra if name != tied]:
        problems.append(f"not of this model: {_listed(extra)}")
    for name, shape in shapes.items():
        info = present.get(stored[name])
        if info is not None and info.shape != shape:
            problems.append(f"{stored[name]} has the shape {info.shape} instead of {shape}")
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ConfigError(
            f"the tensors in {where} are not those of its config.json: "
            f"{'; '.join(problems[:_LISTED])}{more}"
        )
    return stored, tied


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
