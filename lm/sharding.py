"""One table from logical axis names to mesh axes; every array's layout follows from it.

Meshes have Auto axes: the compiler propagates layouts from parameters, inputs and the constraints
placed on activations. A logical axis that the table does not know is an error, and so is a
dimension that its mesh axes do not divide, or a mesh axis used twice in one array.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm.config import ConfigError, ModelConfig

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
"""Slowest-varying first: tensor parallelism talks most, so its devices are nearest."""

RULES: Mapping[str, tuple[str, ...]] = {
    # parameters
    "layers": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "latent": (),  # what latent attention projects down to, ...
    "latent_in": ("fsdp",),  # ... and up from
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "router": (),
    "norm": (),
    "adapter": (),  # too small to be worth sharding
    "positions": (),
    # activations
    "batch": ("data", "fsdp", "expert"),
    "sequence": ("context",),
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
}


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all) with the sizes given; `data` = -1 takes what is left.

    Raises:
      ConfigError: unknown axis, or sizes whose product does not fit the number of devices.
    """
    if unknown := sorted(set(sizes) - set(MESH_AXES)):
        raise ConfigError(f"unknown mesh axis {unknown[0]!r}: there are {', '.join(MESH_AXES)}")
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
    rest = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values():
        free = next(axis for axis, size in sizes.items() if size == -1)
        if rest > len(devices) or len(devices) % rest:
            raise ConfigError(
                f"mesh.{free} cannot be filled: the other axes ({_shown(sizes)}) need a multiple "
                f"of {rest} devices and there are {len(devices)}"
            )
        sizes[free] = len(devices) // rest
    elif rest > len(devices) or (jax.process_count() > 1 and rest != len(devices)):
        raise ConfigError(
            f"the mesh ({_shown(sizes)}) needs {rest} devices and there are {len(devices)}"
        )
    used = devices[: math.prod(sizes.values())]
    shape = tuple(sizes.values())
    return jax.make_mesh(
        shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=used
    )


def _shown(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1) or "all 1"


def spec(axes: tuple[str, ...], mesh: Any, shape: tuple[int, ...] | None = None) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions have these logical axes.

    Mesh axes of size 1 are left out. `shape`, if given, is checked for divisibility.

    Raises:
      ConfigError: unknown logical axis, mesh axis used twice, or size that does not divide.
    """
    entries, seen = [], set()
    sizes = dict(mesh.shape)
    for dim, axis in enumerate(axes):
        if axis not in RULES:
            raise ConfigError(
                f"logical axis {axis!r} has no sharding rule: add it to lm.sharding.RULES "
                f"(known: {', '.join(RULES)})"
            )
        names = tuple(name for name in RULES[axis] if sizes.get(name, 1) > 1)
        repeated = seen.intersection(names)
        if repeated:
            raise ConfigError(
                f"logical axes {axes} map mesh axis {repeated.pop()!r} to two dimensions"
            )
        seen.update(names)
        ways = math.prod(sizes[name] for name in names)
        if shape is not None and shape[dim] % ways:
            raise ConfigError(
                f"dimension {dim} ({axis}) of an array of shape {shape} is {shape[dim]}, which "
                f"mesh axes {' x '.join(names)} = {ways} do not divide: change the size or the mesh"
            )
        entries.append(names[0] if len(names) == 1 else (names or None))
    return PartitionSpec(*entries)


def constrain(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Pin the layout of an activation by its logical axes; does nothing outside a mesh.

    A dimension that its mesh axes do not divide stays unpinned: activations of odd sizes (one
    prompt on eight devices) are the compiler's business.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    entries = []
    for dim, entry in zip(x.shape, spec(axes, mesh), strict=True):
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        entries.append(entry if dim % math.prod(mesh.shape[n] for n in names) == 0 else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of token arrays [B, T]."""
    return NamedSharding(mesh, spec(("batch", "sequence"), mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of scalars and other small arrays."""
    return NamedSharding(mesh, PartitionSpec())


def check_mesh(model: ModelConfig, batch_size: int, micro_batches: int, mesh: Mesh) -> None:
    """Refuse, before anything is compiled, a mesh that the model or the batch cannot fill."""
    ways = math.prod(mesh.shape[name] for name in RULES["batch"])
    rows = batch_size // micro_batches
    if rows % ways:
        raise ConfigError(
            f"each micro-batch has {rows} sequences (batch_size {batch_size} / micro_batches "
            f"{micro_batches}), which data x fsdp x expert = {ways} devices do not divide"
        )
    sizes = {
        "tensor": {
            "num_heads": model.num_heads,
            "num_kv_heads": model.num_kv_heads,
            "d_ff": model.d_ff,
            "vocab_size": model.vocab_size,
        },
        "fsdp": {"d_model": model.d_model},
    }
    if model.attention_kind == "mla":
        ranks = {"kv_lora_rank": model.mla.kv_lora_rank, "q_lora_rank": model.mla.q_lora_rank}
        sizes["fsdp"] |= {f"mla.{name}": rank for name, rank in ranks.items() if rank}
    if model.mlp == "moe":
        sizes["expert"] = {"moe.experts": model.moe.experts}
        sizes["tensor"]["moe.d_expert"] = model.d_expert
    for axis, fields in sizes.items():
        for name, size in fields.items():
            if size % mesh.shape[axis]:
                raise ConfigError(
                    f"mesh.{axis} = {mesh.shape[axis]} does not divide model.{name} = {size}"
                )
