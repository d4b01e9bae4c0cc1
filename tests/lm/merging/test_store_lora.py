"""LoRA adapters as factors, against the full product."""

import json

import ml_dtypes
import numpy as np
import pytest

from lm.merging.store import open_store
from lm.merging.types import MergeError, StorageError


@pytest.fixture
def base(tmp_path, tools, rng):
    tensors = {
        "model.q.weight": rng.standard_normal((300, 500)).astype(ml_dtypes.bfloat16),
        "model.k.weight": rng.standard_normal((6, 8)).astype(np.float32),
        "model.embed.weight": rng.standard_normal((11, 4)).astype(np.float32),
        "model.norm.weight": rng.standard_normal(8).astype(np.float32),
    }
    tools.write_model(tmp_path / "base", tensors)
    return tensors


def write_adapter(folder, tools, tensors, **settings):
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6} | settings
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    named = {f"base_model.model.{name}": value for name, value in tensors.items()}
    (folder / "adapter_model.safetensors").write_bytes(tools.safetensors_bytes(named))
    return f"{folder.parent / 'base'}+{folder}"


def factors(rng, module, out, into, rank=2, kind="lora_"):
    a = rng.standard_normal((rank, into)).astype(np.float32)
    b = rng.standard_normal((out, rank)).astype(np.float32)
    suffix = "" if "embedding" in kind else ".weight"
    return {f"{module}.{kind}A{suffix}": a, f"{module}.{kind}B{suffix}": b}, b.astype(float) @ a


def test_base_plus_scaled_product(tmp_path, tools, base, rng):
    pair, product = factors(rng, "model.q", 300, 500)
    reference = write_adapter(tmp_path / "lora", tools, pair)
    store = open_store(reference)
    expected = (base["model.q.weight"].astype(float) + 3 * product).reshape(-1)
    got = store.read("model.q.weight")
    assert got.dtype == np.float32 and store.tensors["model.q.weight"].dtype == "bfloat16"
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    for start, stop in [(0, 1), (499, 501), (66_000, 140_001), (149_999, 150_000), (7, 7)]:
        np.testing.assert_array_equal(store.read("model.q.weight", start, stop), got[start:stop])
    np.testing.assert_array_equal(store.read("model.norm.weight"), base["model.norm.weight"])
    assert open_store(str(tmp_path / "base")).identity() != store.identity()


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"use_rslora": True}, 6 / np.sqrt(2)),
        ({"alpha_pattern": {"k": 10}}, 5),
        ({"alpha_pattern": {"model.k": 10, "k": 2}}, 5),
        ({"alpha_pattern": {"q": 10}}, 3),
    ],
)
def test_scales(tmp_path, tools, base, rng, settings, scale):
    pair, product = factors(rng, "model.k", 6, 8)
    store = open_store(write_adapter(tmp_path / "lora", tools, pair, **settings))
    expected = base["model.k.weight"] + scale * product
    np.testing.assert_allclose(store.read("model.k.weight"), expected.reshape(-1), rtol=1e-5)


def test_transposed_weights_and_embeddings(tmp_path, tools, base, rng):
    pair, product = factors(rng, "model.k", 8, 6)  # Conv1D keeps [in, out]
    store = open_store(write_adapter(tmp_path / "lora", tools, pair, fan_in_fan_out=True))
    expected = base["model.k.weight"] + 3 * product.T
    np.testing.assert_allclose(store.read("model.k.weight"), expected.reshape(-1), rtol=1e-5)
    pair, product = factors(rng, "model.embed", 4, 11, kind="lora_embedding_")
    store = open_store(write_adapter(tmp_path / "lora", tools, pair))
    expected = base["model.embed.weight"] + 3 * product.T
    np.testing.assert_allclose(store.read("model.embed.weight"), expected.reshape(-1), rtol=1e-5)


def test_modules_saved_whole_replace_the_base(tmp_path, tools, base, rng):
    pair, _ = factors(rng, "model.k", 6, 8)
    pair["model.norm.weight"] = np.arange(8, dtype=np.float32)
    store = open_store(write_adapter(tmp_path / "lora", tools, pair))
    np.testing.assert_array_equal(store.read("model.norm.weight", 2, 5), [2, 3, 4])


def test_adapters_that_do_not_fit(tmp_path, tools, base, rng):
    pair, _ = factors(rng, "model.k", 6, 8)
    for tensors, settings, error, words in [
        ({k.replace("model.k", "model.zz"): v for k, v in pair.items()}, {}, MergeError, "zz"),
        (factors(rng, "model.k", 6, 9)[0], {}, MergeError, r"\[2, 9\] of .*k do not make"),
        ({k: v for k, v in pair.items() if "lora_A" in k}, {}, StorageError, "only lora_A"),
        (pair, {"use_dora": True}, MergeError, "use_dora"),
        (pair, {"peft_type": "IA3"}, MergeError, "IA3"),
        (pair, {"lora_alpha": "x"}, StorageError, "lora_alpha"),
        ({}, {}, StorageError, "no LoRA factors"),
        ({"model.other": np.ones(2, np.float32)}, {}, MergeError, "no tensor of the base"),
    ]:
        with pytest.raises(error, match=words):
            open_store(write_adapter(tmp_path / "lora", tools, tensors, **settings))
    with pytest.raises(MergeError, match="no LoRA adapter"):
        open_store(f"{tmp_path / 'base'}+{tmp_path / 'base'}")
    with pytest.raises(MergeError, match=r"is a LoRA adapter: write base\+"):
        open_store(str(tmp_path / "lora"))
