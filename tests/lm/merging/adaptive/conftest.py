"""A tiny base, models fine-tuned from it in name only, and text for each."""

import json
import string
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import lm
import lm.hf

FAMILIES = {
    "llama": {"num_kv_heads": 2},
    "gpt2": {
        "mlp": "gelu",
        "norm": "layer",
        "positions": "learned",
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "tie_embeddings": True,
    },
}


def model_config(family="llama", **changes):
    fields = {
        "vocab_size": 260,
        "num_layers": 2,
        "d_model": 32,
        "num_heads": 4,
        "d_ff": 48,
        "max_context": 64,
        "dtype": "float32",
    }
    return lm.ModelConfig(**(fields | FAMILIES[family] | changes))


def moved(params, seed, scale):
    """Every array plus noise, relative to its own size."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    new = [
        np.asarray(x) + scale * (np.std(x) + 0.02) * rng.standard_normal(x.shape).astype("f4")
        for x in leaves
    ]
    return jax.tree.unflatten(tree, new)


@pytest.fixture
def family(tmp_path):
    """`family(kind, count, scale)`: folders base, a, b, ... with their text; a namespace."""

    def make(kind="llama", count=3, scale=0.2, **changes):
        config = model_config(kind, **changes)
        base = jax.tree.map(np.asarray, lm.init(config, jax.random.key(0)))
        names = list(string.ascii_lowercase[:count])
        params = {"base": base} | {n: moved(base, k + 1, scale) for k, n in enumerate(names)}
        for name, value in params.items():
            lm.hf.save(tmp_path / name, config, value, "byte")
        rng = np.random.default_rng(7)
        for k, name in enumerate(names):
            letters = rng.permutation(list(string.printable))[: 10 + 10 * k]
            text = "".join(rng.choice(letters, 3000))
            (tmp_path / f"{name}.txt").write_text(text)
        return SimpleNamespace(config=config, params=params, names=names, folder=tmp_path)

    return make


@pytest.fixture
def settings():
    """`settings(models, method, **changes)`: path of a configuration file."""

    def make(models, method, data=None, each=None, base=True, **changes):
        parameters = {"examples": 8, "sequence_length": 16} | changes.pop("parameters", {})
        value = {
            "merge_method": method,
            "models": [
                {
                    "model": str(models.folder / name),
                    "data": (data or {}).get(name, str(models.folder / f"{name}.txt")),
                    **({"parameters": each} if each else {}),
                }
                for name in models.names
            ],
            "parameters": parameters,
        }
        if base:
            value["base_model"] = str(models.folder / "base")
        path = models.folder / f"{method}.yml"
        path.write_text(json.dumps(value | changes))
        return path

    return make


@pytest.fixture
def merge(tmp_path, monkeypatch):
    """`merge(path, name, **options)`: the merged folder, by `AdaptiveSession`.

    On one device, which compiles faster, unless `devices=8`.
    """
    from lm.merging.adaptive import session
    from lm.sharding import make_mesh

    def run(path, name="out", resume=False, devices=1, **options):
        mesh = make_mesh({"fsdp": devices}, jax.devices()[:devices])
        monkeypatch.setattr(session, "_mesh", lambda device: mesh)
        lines = []
        out = tmp_path / name
        session.AdaptiveSession(path, out, say=lines.append, **options).run(resume)
        return SimpleNamespace(out=out, lines=lines)

    return run
