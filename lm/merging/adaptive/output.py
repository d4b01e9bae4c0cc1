"""The folder of a merged model: the same files as those of the static methods."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lm.merging.adaptive.config import AdaptiveConfig
from lm.merging.adaptive.models import Models, Piece
from lm.merging.folder import write_folder
from lm.merging.output_files import card, tokenizer_files
from lm.merging.types import TensorInfo

__all__ = ["Result", "replay", "write_result"]

FORMAT = 1
"""Of the files that `lm.merging.adaptive.load` reads."""


class Result:
    """What a method made.

    Args:
      piece: the merged values of a piece, flat.
      files: further small files by name.
      parts: name -> arrays that are written to NAME.safetensors in a folder NAME.
      settings: goes into adaptive.json, by which the parts are loaded again.
    """

    def __init__(
        self,
        piece: Callable[[Piece], np.ndarray],
        files: Mapping[str, bytes] | None = None,
        parts: Mapping[str, Mapping[str, np.ndarray]] | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        self.piece, self.files = piece, dict(files or {})
        self.parts, self.settings = dict(parts or {}), dict(settings or {})


def write_result(
    out: Path,
    config: AdaptiveConfig,
    models: Models,
    result: Result,
    *,
    record: Mapping[str, Any],
    shard_size: int,
) -> None:
    """Write the merged model, and beside it what belongs to single tasks."""
    dtype = config.dtype
    tensors = []
    for name, info in models.infos.items():

        def make(name: str = name) -> Iterable[np.ndarray]:
            return (result.piece(piece) for piece in models.cuts[name])

        tensors.append((TensorInfo(name, info.shape, dtype or info.dtype), make))
    settings = dict(models.stores[0].config)
    key = "dtype" if "dtype" in settings else "torch_dtype"
    settings[key] = dtype or models.dtype
    files = tokenizer_files(models.stores[0], None)
    files["config.json"] = _json(settings)
    files["README.md"] = _card(config).encode()
    files["merge_config.yml"] = config.text.encode()
    files |= result.files
    if result.settings:
        files["adaptive.json"] = _json({"format": FORMAT, **result.settings})
    metadata = {"merge": json.dumps({"merge_method": config.merge_method, **record})}
    write_folder(out, tensors, files, record, metadata=metadata, shard_size=shard_size)
    for name, arrays in result.parts.items():
        infos = [
            (TensorInfo(key, array.shape, str(array.dtype)), lambda array=array: [array])
            for key, array in arrays.items()
        ]
        file = f"{name}.safetensors"
        write_folder(out / name, infos, {}, {}, metadata=metadata, file_name=file)


def replay(config: AdaptiveConfig, names: Iterable[str], weights: Mapping[str, np.ndarray]) -> str:
    """YAML of task_arithmetic with these coefficients: the merge again, without text.

    Every tensor has a filter that is its whole name, longer names first: the first filter that is
    part of a tensor's name is then its own.
    """
    ordered = sorted(names, key=lambda name: (-len(name), name))
    models = [
        {
            "model": task.model,
            "parameters": {
                "weight": [{"filter": n, "value": float(weights[n][k])} for n in ordered]
            },
        }
        for k, task in enumerate(config.models)
    ]
    value = {
        "merge_method": "task_arithmetic",
        "base_model": config.base_model,
        "models": models,
        **({"dtype": config.dtype} if config.dtype else {}),
    }
    return json.dumps(value, indent=1) + "\n"  # JSON is YAML


def _card(config: AdaptiveConfig) -> str:
    text = card(config)
    return text.replace("merge_config.yml OUT`.", "merge_config.yml OUT`, with the same text.")


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
