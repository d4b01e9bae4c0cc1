"""Tiny checkpoints, and ways to merge them."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from lm.merging.types import TensorInfo

ROOT = Path(__file__).parents[3]
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64", "int64": "I64"}
CODES |= {"uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "int32": "I32"}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "torch_dtype": "bfloat16",
}


class MemoryStore:
    """`lm.merging.types.Store` of arrays."""

    def __init__(self, path, arrays, config=None, aliases=None):
        self.path, self.arrays, self.config = str(path), arrays, config or {}
        self.aliases = aliases or {}
        self.tensors = {
            name: TensorInfo(name, value.shape, str(value.dtype)) for name, value in arrays.items()
        }

    def read(self, name, start=0, stop=None, buffer=None):
        return self.arrays[self.aliases.get(name, name)].reshape(-1)[start:stop]

    def identity(self):
        return f"{self.path}: {sorted(self.tensors)}"


@pytest.fixture
def memory_store():
    """`memory_store(path, arrays, config, aliases)`: a store of arrays."""
    return MemoryStore


@pytest.fixture
def decoder():
    """`decoder(path, layers=4, rows=20, width=4, head=True, dtype=..., **config)`: a store."""

    def make(path, layers=4, rows=20, width=4, head=True, dtype="float32", **config):
        arrays = {"model.embed_tokens.weight": np.zeros((rows, width), dtype)}
        for i in range(layers):
            arrays[f"model.layers.{i}.self_attn.q_proj.weight"] = np.zeros((width, width), dtype)
            arrays[f"model.layers.{i}.input_layernorm.weight"] = np.zeros(width, dtype)
        arrays["model.norm.weight"] = np.zeros(width, dtype)
        if head:
            arrays["lm_head.weight"] = np.zeros((rows, width), dtype)
        base = {"model_type": "llama", "num_hidden_layers": layers, "vocab_size": rows}
        return MemoryStore(path, arrays, base | {"tie_word_embeddings": not head} | config)

    return make


@pytest.fixture
def tokenizer_folder(tmp_path):
    """`tokenizer_folder(name, tokens, added=(), kind=..., **settings)`: tokenizer files."""

    def make(name, tokens, added=(), kind="WordLevel", **settings):
        folder = tmp_path / name
        folder.mkdir()
        vocab = {token: index for index, token in enumerate(tokens)}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        items = [
            {"id": len(tokens) + index, "content": token, "special": True} | flags
            for index, token in enumerate(added)
        ]
        content = {"added_tokens": items, "model": {"type": kind, "vocab": vocab}}
        if kind == "BPE":
            content["model"]["merges"] = [f"{t[0]} {t[1:]}" for t in tokens if len(t) > 1]
        (folder / "tokenizer.json").write_text(json.dumps(content))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return make


def safetensors_bytes(tensors):
    """The format written by hand, independent of the code under test."""
    header, data = {}, b""
    for name, value in tensors.items():
        value = np.asarray(value)
        raw = value.tobytes()
        header[name] = {
            "dtype": CODES[value.dtype.name],
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write_model(folder, tensors, shards=1, config=CONFIG):
    folder.mkdir(parents=True)
    names = list(tensors)
    parts = [names[i::shards] for i in range(shards)]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = "model.safetensors" if shards == 1 else f"model-{number:05d}-of-{shards:05d}"
        file += "" if shards == 1 else ".safetensors"
        (folder / file).write_bytes(safetensors_bytes({name: tensors[name] for name in part}))
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def llama_tensors(rng, dtype, layers=2, width=32, vocabulary=40, ff=48):
    shapes = {"model.embed_tokens.weight": (vocabulary, width)}
    for n in range(layers):
        for name in ("q", "k", "v", "o"):
            shapes[f"model.layers.{n}.self_attn.{name}_proj.weight"] = (width, width)
        shapes[f"model.layers.{n}.mlp.gate_proj.weight"] = (ff, width)
        shapes[f"model.layers.{n}.mlp.up_proj.weight"] = (ff, width)
        shapes[f"model.layers.{n}.mlp.down_proj.weight"] = (width, ff)
        shapes[f"model.layers.{n}.input_layernorm.weight"] = (width,)
        shapes[f"model.layers.{n}.post_attention_layernorm.weight"] = (width,)
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}
    return {n: rng.standard_normal(s, np.float32).astype(dtype) for n, s in shapes.items()}


def read_output(folder):
    """All tensors of a merged folder, by a reader of the test's own."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        names = {code: name for name, code in CODES.items()}
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            dtype = np.dtype(getattr(ml_dtypes, names[entry["dtype"]], names[entry["dtype"]]))
            found[name] = np.frombuffer(data[begin:end], dtype).reshape(entry["shape"])
    return found


def digest(folder):
    """Hash of every file by its path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_config(folder, method="linear", names=("a", "b"), base="base", **changes):
    each = {"weight": 0.5, "density": 0.5} if method != "linear" else {"weight": 0.5}
    value = {
        "merge_method": method,
        "models": [{"model": str(folder / name), "parameters": each} for name in names],
        "dtype": "bfloat16",
    }
    if method != "linear":
        value["base_model"] = str(folder / base)
    path = folder / f"{method}.yml"
    path.write_text(json.dumps(value | changes))
    return path


def run(*words, env=None, script=None):
    """merge.py in a process of its own; gives returncode, stdout, stderr and peak bytes."""
    command = [sys.executable, *(["-c", script] if script else [str(ROOT / "scripts/merge.py")])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    child = subprocess.Popen(
        [*command, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    out, err = child.communicate(timeout=120)
    return SimpleNamespace(code=child.returncode, out=out, err=err)


def make_family(folder):
    """`base`, `a` and `b` in bfloat16, `b` in three files; gives their folder and tensors."""
    rng = np.random.default_rng(1)
    base = llama_tensors(rng, ml_dtypes.bfloat16)
    tensors = {"base": base}
    for name in ("a", "b"):
        tensors[name] = {
            key: (value.astype(np.float32) + 0.1 * rng.standard_normal(value.shape)).astype(
                ml_dtypes.bfloat16
            )
            for key, value in base.items()
        }
    for name, values in tensors.items():
        write_model(folder / name, values, shards=3 if name == "b" else 1)
    return SimpleNamespace(folder=folder, tensors=tensors)


@pytest.fixture(scope="session")
def tools():
    return SimpleNamespace(
        write_model=write_model,
        llama_tensors=llama_tensors,
        make_family=make_family,
        read_output=read_output,
        digest=digest,
        write_config=write_config,
        run=run,
        safetensors_bytes=safetensors_bytes,
        root=ROOT,
    )


@pytest.fixture
def family(tmp_path):
    return make_family(tmp_path)
