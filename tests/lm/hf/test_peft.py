"""LoRA in PEFT's format, against the reader of the merging tools, which was written apart."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import lm
import lm.hf
from lm.config import AdapterConfig, ConfigError
from lm.hf.tensors import by_path
from lm.layers import adapters
from lm.merging.store import open_store

TARGETS = ("query", "value", "down")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """(base folder, configuration and parameters with LoRA, the adapter's folder)."""
    from pathlib import Path

    base = Path(__file__).parent / "fixtures" / "qwen3"
    config, params = lm.hf.load(base)
    adapter = AdapterConfig(kind="lora", rank=3, alpha=5.0, targets=TARGETS)
    config = dataclasses.replace(config, adapter=adapter)
    fresh = jax.jit(lm.init, static_argnums=0)(config, jax.random.key(0))
    added = jax.tree.map(lambda x: x + 0.1, adapters.divide(fresh)[1])  # lora_b starts at 0
    params = adapters.join(params, added)
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    lm.hf.save_adapter(folder, config, params, base="qwen3")
    return base, config, params, folder


def test_there_and_back(tuned):
    base, config, params, folder = tuned
    again, loaded = lm.hf.load_adapter(folder, *lm.hf.load(base))
    assert again == config
    ours, theirs = by_path(params), by_path(loaded)
    assert ours.keys() == theirs.keys()
    assert all(ours[path].tobytes() == theirs[path].tobytes() for path in ours)


def test_the_merging_tools_read_the_same_model(tuned, tmp_path):
    base, config, params, folder = tuned
    _, merged = adapters.merge(config, params)
    store = open_store(f"{base}+{folder}")
    for name, ours in (
        ("model.layers.1.self_attn.q_proj.weight", merged["layers"]["attention"]["query"]),
        ("model.layers.0.self_attn.v_proj.weight", None),
        ("model.layers.1.mlp.down_proj.weight", merged["layers"]["mlp"]["down"]),
        ("model.layers.1.mlp.up_proj.weight", merged["layers"]["mlp"]["up"]),
    ):
        layer = int(name.split(".")[2])
        ours = ours or merged["layers"]["attention"]["value"]
        matrix = np.asarray(ours["kernel"][layer]).T
        theirs = store.read(name).reshape(matrix.shape)
        np.testing.assert_allclose(theirs, matrix, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "keys,message",
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"r": 4}, r"has the shape \(3, 32\), the base asks for \(4, 32\)"),
        ({"r": "3"}, "must be numbers"),
    ],
)
def test_other_adapters_are_refused(tuned, tmp_path, keys, message):
    base, _, _, folder = tuned
    settings = json.loads((folder / "adapter_config.json").read_text()) | keys
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "adapter_model.safetensors").symlink_to(folder / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=message):
        lm.hf.load_adapter(tmp_path, *lm.hf.load(base))


def test_an_adapter_of_another_base_is_told(tuned, fixtures):
    with pytest.raises(ConfigError, match="no adapter of this model: .*q_proj.lora_B.weight has"):
        lm.hf.load_adapter(tuned[3], *lm.hf.load(fixtures / "qwen2"))
    with pytest.raises(ConfigError, match="no adapter of this model"):
        lm.hf.load_adapter(tuned[3], *lm.hf.load(fixtures / "gpt2"))
    with pytest.raises(ConfigError, match="of kind lora, not none"):
        lm.hf.save_adapter(tuned[3] / "x", *lm.hf.load(fixtures / "qwen2"))
