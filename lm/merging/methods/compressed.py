"""Several task models in little more than one: what `emr`, `tall` and `bitdelta` write.

In place of a tensor W of n elements and shape s the output holds

    emr, tall   W.unified  [s], W.mask.<k> uint8 [ceil(n / 8)], W.scale float32 [K]
    bitdelta    W.sign.<k> uint8 [ceil(n / 8)], W.scale float32 [K]; W.delta.<k> [s] where W is no
                matrix

for tasks k = 0 .. K - 1. Bits are of the flattened tensor, the first element in the highest bit.
`rebuild` gives a task's tensor, with the base's tensor from the base's checkpoint:
W + scale_k mask_k unified, W + scale_k (2 sign_k - 1), or W + delta_k.
"""

from collections.abc import Callable, Container, Sequence
from typing import Any

import numpy as np

from lm.merging.types import Block, MergeError, TensorInfo

__all__ = ["bits", "pack", "rebuild", "sign_outputs", "unified_outputs", "whole_outputs"]


def bits(block: Block, mask: Any) -> Any:
    """A mask in bytes; blocks must begin at multiples of 8 elements."""
    if block.start % 8:
        raise MergeError(f"a block begins at {block.start}: masks need multiples of 8")
    return block.xp.packbits(mask)


def pack(block: Block, unified: Any, masks: Sequence[Any], scales: Sequence[float]) -> Any:
    """Pieces of a unified vector with masks; the scales come with the first block."""
    pieces = {".unified": unified}
    pieces |= {f".mask.{k}": bits(block, mask) for k, mask in enumerate(masks)}
    if block.start == 0:
        pieces[".scale"] = np.array(scales, np.float32)
    return pieces


def unified_outputs(info: TensorInfo, count: int) -> tuple[TensorInfo, ...]:
    """Tensors of `emr` and `tall` for one tensor of `count` tasks."""
    name = info.name
    whole = TensorInfo(f"{name}.unified", info.shape, info.dtype)
    return (whole, *_packed(info, "mask", count), TensorInfo(f"{name}.scale", (count,), "float32"))


def sign_outputs(info: TensorInfo, count: int) -> tuple[TensorInfo, ...]:
    """Tensors of `bitdelta` for one matrix of `count` tasks."""
    return (*_packed(info, "sign", count), TensorInfo(f"{info.name}.scale", (count,), "float32"))


def whole_outputs(info: TensorInfo, count: int) -> tuple[TensorInfo, ...]:
    """Tensors of `bitdelta` for one tensor that is no matrix."""
    return tuple(TensorInfo(f"{info.name}.delta.{k}", info.shape, info.dtype) for k in range(count))


def _packed(info: TensorInfo, what: str, count: int) -> list[TensorInfo]:
    shape = ((info.size + 7) // 8,)
    return [TensorInfo(f"{info.name}.{what}.{k}", shape, "uint8") for k in range(count)]


def rebuild(
    read: Callable[[str], np.ndarray],
    names: Container[str],
    name: str,
    base: np.ndarray,
    task: int,
) -> np.ndarray:
    """One tensor of one task's model, float32 in the base's shape.

    Args:
      read: gives a tensor of the compressed output by name.
      names: of the tensors there.
      name: of the tensor to rebuild.
      base: the base model's tensor of that name.
      task: number of the task, in the order of the models that were merged.

    Raises:
      MergeError: the output holds nothing for that tensor and task.
    """
    base = np.asarray(base, np.float32)

    def flags(what: str) -> np.ndarray:
        packed = np.asarray(read(f"{name}.{what}.{task}"), np.uint8)
        return np.unpackbits(packed, count=base.size).reshape(base.shape)

    if f"{name}.delta.{task}" in names:
        return base + np.asarray(read(f"{name}.delta.{task}"), np.float32).reshape(base.shape)
    for what in "sign", "mask":
        if f"{name}.{what}.{task}" in names:
            scale = np.float32(read(f"{name}.scale")[task])
            if what == "sign":
                return base + scale * (2 * flags(what).astype(np.float32) - 1)
            unified = np.asarray(read(f"{name}.unified"), np.float32).reshape(base.shape)
            return base + scale * flags(what) * unified
    raise MergeError(f"the compressed model holds no tensor {name!r} of task {task}")
