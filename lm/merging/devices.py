"""Merging on accelerators: blocks as jax.Arrays, sharded over all devices of one kind."""

from collections.abc import Callable
from typing import Any

import numpy as np

from lm.merging.types import MergeError

__all__ = ["DEVICE_BLOCK", "placement"]

DEVICE_BLOCK = 1 << 22
"""Elements of a block on devices, where starting an operation costs more than a cache miss."""


def placement(kind: str) -> tuple[Any, Callable[[np.ndarray], Any], int]:
    """(jax.numpy, function that places a float32 array, number of devices).

    Arrays whose first axis the number of devices divides are split along it, others copied to all
    of them; the arithmetic is done operation by operation, so that nothing is fused and rounded in
    another way than NumPy rounds it.

    Args:
      kind: "cpu", "gpu" (or "cuda"), "tpu".

    Raises:
      MergeError: JAX finds no such device here.
    """
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    try:
        devices = jax.devices("gpu" if kind == "cuda" else kind)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise MergeError(f"--device {kind}: JAX finds none here ({reason})") from error
    mesh = jax.make_mesh((len(devices),), ("split",), (AxisType.Auto,), devices=devices)
    split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("split"), PartitionSpec()))

    def place(values: np.ndarray) -> Any:
        divides = values.ndim > 0 and values.shape[0] % len(devices) == 0
        # A copy: the buffer is used again while the device may still be reading it.
        return jax.device_put(values.copy(), split if divides else whole)

    return jax.numpy, place, len(devices)
