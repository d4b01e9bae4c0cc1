"""LoRA adapters in the format of PEFT, in and out.

A folder holds adapter_config.json and adapter_model.safetensors, and in it for a module M of the
base model `base_model.model.M.lora_A.weight` [rank, in] and `...lora_B.weight` [out, rank]; the
module's weight is W + alpha / rank B A (arXiv 2106.09685). Ours are lora_a [in, rank] and lora_b
[rank, out], stacked over layers.
"""

import dataclasses
import math
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import model
from lm.config import AdapterConfig, ConfigError, ModelConfig, check
from lm.files import atomic_write_json, explain_os_error, sync_folder
from lm.hf.config import choose_family
from lm.hf.tensors import by_path
from lm.layers import adapters
from lm.merging.store.files import read_json
from lm.merging.store.safetensors import open_safetensors
from lm.merging.store.writer import ShardFiles, make_layout
from lm.merging.types import StorageError, TensorInfo

__all__ = ["load_adapter", "save_adapter"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FRONT = "base_model.model."
# What changes the product and is not understood: key -> the only values that are.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "layers_to_transform": ([], None),
    "trainable_token_indices": ([], None),
}


def _modules(config: ModelConfig, family: str | None) -> dict[str, tuple[tuple[str, ...], str]]:
    """Targets: name of ours -> (path of the projection, name of the module in the base)."""
    plain = dataclasses.replace(config, adapter=AdapterConfig())
    kind = choose_family(plain, family)
    found = {}
    for tensor in kind.tensors:
        *path, last = tensor.param.split("/")
        if path[:1] == ["layers"] and last == "kernel" and tensor.transpose:
            found[path[-1]] = tuple(path), tensor.name.removesuffix(".weight")
    return found


def save_adapter(
    path: str | os.PathLike,
    config: ModelConfig,
    params: model.Params,
    *,
    family: str | None = None,
    base: str = "",
) -> None:
    """Write the LoRA adapters of a model as PEFT does.

    Args:
      path: the folder; must not exist, or be empty.
      config: the model, with `adapter.kind` "lora".
      params: its parameters; only the adapters are written.
      family: `model_type` of the base; None takes the first that can hold it.
      base: what adapter_config.json calls the base model.

    Raises:
      ConfigError: no LoRA here, a projection that is no module by itself in this family (GPT-2's
        are fused), or a folder that is not empty.
      StorageError: the folder cannot be written.
    """
    adapter, folder = config.adapter, Path(path)
    check(adapter.kind == "lora", f"PEFT's format is for adapters of kind lora, not {adapter.kind}")
    modules = _modules(config, family)
    if lost := [target for target in adapter.targets if target not in modules]:
        raise ConfigError(f"{lost[0]} is no linear module by itself in this family of models")
    check(not folder.exists() or not any(folder.iterdir()), f"{folder} is not empty")
    arrays, outputs = by_path(params), {}
    for target in adapter.targets:
        place, name = modules[target]
        for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            for layer, matrix in enumerate(np.asarray(arrays[(*place, "adapter", ours)])):
                full = f"{_FRONT}{name.format(layer=layer)}.{theirs}.weight"
                outputs[full] = np.ascontiguousarray(matrix.T)
    infos = [TensorInfo(name, x.shape, x.dtype.name) for name, x in outputs.items()]
    layout = make_layout(infos, 1 << 62, {"format": "pt"})
    layout = dataclasses.replace(
        layout, shards=(dataclasses.replace(layout.shards[0], name=_WEIGHTS),)
    )
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules[target][1].split(".")[-1] for target in adapter.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    building = folder.absolute().parent / f".{folder.name}-{uuid.uuid4().hex[:8]}.tmp"
    try:
        building.mkdir(parents=True)
        files = ShardFiles(building, layout, infos)
        try:
            for number, values in enumerate(outputs.values()):
                files.write(number, 0, values.reshape(-1))
            files.sync()
        finally:
            files.close()
        atomic_write_json(building / _CONFIG, settings)
        sync_folder(building)
        if folder.exists():
            folder.rmdir()
        os.rename(building, folder)
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {explain_os_error(error)}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def load_adapter(
    path: str | os.PathLike, config: ModelConfig, params: model.Params, family: str | None = None
) -> tuple[ModelConfig, model.Params]:
    """A base model with the LoRA adapters of a PEFT folder beside its projections.

    Args:
      path: folder with adapter_config.json and adapter_model.safetensors.
      config, params: the base, as from `lm.hf.load`.
      family: as for `save_adapter`.

    Raises:
      ConfigError: another kind of adapter, or one of another base: what does not fit is named.
      StorageError: a damaged or missing file.
    """
    folder = Path(path)
    settings = read_json(folder / _CONFIG)
    for key, known in _PLAIN.items():
        value = settings.get(key)
        if value not in known and not (key == "peft_type" and value is None):
            raise ConfigError(f"{folder}/{_CONFIG}: {key} is {value!r}, which is not supported")
    rank, alpha = settings.get("r"), settings.get("lora_alpha", 8)
    if type(rank) is not int or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ConfigError(
            f"{folder}/{_CONFIG}: r {rank!r} and lora_alpha {alpha!r} must be numbers"
        )
    if settings.get("use_rslora"):
        alpha = alpha * math.sqrt(rank)  # its scale is alpha / sqrt(rank), arXiv 2312.03732
    store = open_safetensors(str(folder), [folder / _WEIGHTS])
    left = set(store.tensors)
    added: dict[str, Any] = {}
    targets = []
    for target, (place, name) in _modules(config, family).items():
        names = [f"{_FRONT}{name.format(layer=i)}.lora_" for i in range(config.num_layers)]
        if f"{names[0]}A.weight" not in left:
            continue
        targets.append(target)
        kernel = by_path(params)[(*place, "kernel")]
        node = added
        for step in (*place, "adapter"):
            node = node.setdefault(step, {})
        for ours, theirs, shape in (
            ("lora_a", "A.weight", (rank, kernel.shape[1])),
            ("lora_b", "B.weight", (kernel.shape[2], rank)),
        ):
            layers = []
            for front in names:
                info = store.tensors.get(front + theirs)
                if info is None or info.shape != shape:
                    found = "is missing" if info is None else f"has the shape {info.shape}"
                    raise ConfigError(
                        f"{folder} is no adapter of this model: {front}{theirs} {found}, the base "
                        f"asks for {shape}"
                    )
                left.discard(front + theirs)
                layers.append(store.read(front + theirs).reshape(shape).T)
            node[ours] = jnp.asarray(np.stack(layers), config.param_dtype)
    store.close()
    if left or not targets:
        what = f"it has {min(left)}" if left else "nothing in it has a place there"
        raise ConfigError(f"{folder} is no adapter of this model: {what}")
    adapter = AdapterConfig(kind="lora", rank=rank, alpha=float(alpha), targets=tuple(targets))
    config = dataclasses.replace(config, adapter=adapter)
    merged = adapters.join(params, added)
    expected = jax.tree.structure(model.abstract_params(config))
    check(jax.tree.structure(merged) == expected, f"{folder} does not fit the parameters given")
    return config, merged
