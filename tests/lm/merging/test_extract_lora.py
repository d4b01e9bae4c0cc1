"""Adapters out of fine-tuned models."""

import json

import ml_dtypes
import numpy as np
import pytest

from lm.merging import low_rank
from lm.merging.extract_lora import Extraction, extract_lora
from lm.merging.low_rank import truncate
from lm.merging.store import open_store
from lm.merging.types import MergeError

Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


def silent(_):
    pass


@pytest.fixture
def models(tmp_path, tools, rng):
    """A base and a tuned model: rank 3 in Q, full rank in UP, a norm, the embedding."""
    base = tools.llama_tensors(rng, np.float32)
    tuned = {name: value.copy() for name, value in base.items()}
    tuned[Q] += (rng.standard_normal((32, 3)) @ rng.standard_normal((3, 32))).astype(np.float32)
    tuned[UP] += rng.standard_normal((48, 32)).astype(np.float32)
    tuned[NORM] += 1
    tuned[EMBEDDING] += rng.standard_normal((40, 1)).astype(np.float32)
    paths = []
    for name, tensors in (("base", base), ("tuned", tuned)):
        paths.append(str(tools.write_model(tmp_path / name, tensors)))
    return base, tuned, *paths


def read(store, name):
    return np.array(store.read(name), np.float64).reshape(store.tensors[name].shape)


def best(delta, rank):
    u, s, vt = np.linalg.svd(delta.astype(np.float64))
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("embeddings", ["whole", "lora", "skip"])
def test_base_plus_adapter_is_the_best_approximation(tmp_path, models, tools, embeddings):
    base, tuned, path, other = models
    out = tmp_path / "lora"
    settings = Extraction(max_rank=4, embeddings=embeddings)
    report = extract_lora(path, other, out, settings, silent)
    store = open_store(f"{path}+{out}")
    for name, value in base.items():
        delta = tuned[name].astype(np.float64) - value
        expected = value + (best(delta, 4) if delta.ndim == 2 else delta)
        if name == EMBEDDING and embeddings == "skip":
            expected = value
        np.testing.assert_allclose(read(store, name), expected, rtol=1e-5, atol=1e-5)
    config = json.loads((out / "adapter_config.json").read_text())
    assert report[Q]["rank"] == 3 and report[Q]["kept_energy"] > 1 - 1e-9
    s = np.linalg.svd((tuned[UP] - base[UP]).astype(np.float64), compute_uv=False)
    assert report[UP]["kept_energy"] == pytest.approx((s[:4] ** 2).sum() / (s**2).sum(), rel=1e-6)
    assert report[NORM] == {"saved": "whole", "kept_energy": 1.0}
    ranks = dict.fromkeys([Q[:-7], UP[:-7]], config["r"]) | config["rank_pattern"]
    assert (ranks[Q[:-7]], ranks[UP[:-7]]) == (3, 4)
    assert config["lora_alpha"] == config["r"] and config["alpha_pattern"] == config["rank_pattern"]
    wanted = {"whole": True, "lora": False, "skip": False}[embeddings]
    assert (EMBEDDING[:-7] in config["modules_to_save"]) is wanted
    assert (EMBEDDING in report) is (embeddings != "skip")
    names = set(tools.read_output(out))
    prefix = "base_model.model."
    assert prefix + Q.replace("weight", "lora_A.weight") in names
    # Nothing of what did not change.
    assert not any("k_proj" in name or "lm_head" in name for name in names)
    # Only one layer's q_proj is changed, so its full name is given.
    assert Q[:-7] in config["target_modules"] and "q_proj" not in config["target_modules"]


def test_ranks_by_energy_and_by_both(tmp_path, models):
    base, tuned, path, other = models
    shares = np.linalg.svd((tuned[UP] - base[UP]).astype(np.float64), compute_uv=False) ** 2
    shares = np.cumsum(shares) / shares.sum()
    wanted = int((shares < 0.8).sum()) + 1
    for number, (max_rank, rank) in enumerate([(None, wanted), (wanted - 1, wanted - 1), (99, 0)]):
        settings = Extraction(max_rank=max_rank, energy=0.8)
        report = extract_lora(path, other, tmp_path / f"lora{number}", settings, silent)
        assert report[UP]["rank"] == (rank or wanted)
        assert (report[UP]["kept_energy"] >= 0.8) is (rank != wanted - 1)


def test_modules_with_a_changed_bias_are_saved_whole(tmp_path, tools, rng):
    base = {
        "model.layers.0.q.weight": rng.standard_normal((8, 8)).astype(np.float32),
        "model.layers.0.q.bias": rng.standard_normal(8).astype(np.float32),
        "model.layers.0.experts": rng.standard_normal((2, 4, 4)).astype(np.float32),
    }
    tuned = {name: value + 1 for name, value in base.items()}
    paths = [
        str(tools.write_model(tmp_path / name, tensors))
        for name, tensors in (("base", base), ("tuned", tuned))
    ]
    extract_lora(*paths, tmp_path / "lora", None, silent)
    store = open_store(f"{paths[0]}+{tmp_path / 'lora'}")
    for name, value in tuned.items():
        np.testing.assert_array_equal(read(store, name), value)


def test_half_precision_and_gpt2(tmp_path, tools, rng):
    base = {"h.0.attn.c_attn.weight": rng.standard_normal((6, 18)).astype(ml_dtypes.bfloat16)}
    tuned = {
        name: (value.astype(np.float32) + np.outer(np.arange(6), np.ones(18))).astype(value.dtype)
        for name, value in base.items()
    }
    config = {"model_type": "gpt2"}
    paths = [
        str(tools.write_model(tmp_path / name, tensors, config=config))
        for name, tensors in (("base", base), ("tuned", tuned))
    ]
    settings = Extraction(max_rank=6, dtype="float16")
    extract_lora(*paths, tmp_path / "lora", settings, silent)
    factors = tools.read_output(tmp_path / "lora")
    assert {value.dtype for value in factors.values()} == {np.dtype(np.float16)}
    assert factors["base_model.model.h.0.attn.c_attn.lora_A.weight"].shape[1] == 6  # [r, in]
    store = open_store(f"{paths[0]}+{tmp_path / 'lora'}")
    for name, value in tuned.items():
        np.testing.assert_allclose(read(store, name), value.astype(float), rtol=0.01, atol=0.02)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (50, 50)])
@pytest.mark.parametrize("way", ["randomized", "gram"])
def test_large_matrices_against_the_exact_decomposition(monkeypatch, rng, shape, way):
    monkeypatch.setattr(low_rank, "EXACT", 8)
    monkeypatch.setattr(low_rank, "OVERSAMPLING", 4)
    decay = 0.7 ** np.arange(min(shape))
    u, _ = np.linalg.qr(rng.standard_normal((shape[0], min(shape))))
    v, _ = np.linalg.qr(rng.standard_normal((shape[1], min(shape))))
    delta = ((u * decay) @ v.T).astype(np.float32)
    rank = 4 if way == "randomized" else 9
    cut = truncate(delta, rank, None, seed=1, name="x")
    assert cut.way == way and cut.s.shape == (rank,)
    np.testing.assert_allclose(cut.s, decay[:rank], rtol=1e-4)
    error = np.square(delta - (cut.u * cut.s) @ cut.vt, dtype=np.float64).sum()
    norm = np.square(delta, dtype=np.float64).sum()
    assert 1 - cut.kept == pytest.approx(error / norm, rel=1e-3)  # the stated error is the error
    assert error < 1.001 * (decay[rank:] ** 2).sum()
    again = truncate(delta, rank, None, seed=1, name="x")
    np.testing.assert_array_equal(cut.u, again.u)


def test_the_sketch_grows_until_the_energy_is_kept(rng):
    delta = (rng.standard_normal((330, 3)) @ rng.standard_normal((3, 400))).astype(np.float32)
    cut = truncate(delta, None, 0.999)
    assert cut.way == "randomized" and len(cut.s) == 3
    noise = rng.standard_normal((300, 310)).astype(np.float32)
    cut = truncate(noise, None, 0.9)
    exact = np.linalg.svd(noise.astype(np.float64), compute_uv=False) ** 2
    assert cut.way == "gram"
    assert len(cut.s) == 1 + int((np.cumsum(exact) / exact.sum() < 0.9).sum())


def test_what_cannot_work(tmp_path, models, tools, rng):
    _, tuned, path, other = models
    for settings, words in [
        ({"max_rank": 0}, "max-rank must"),
        ({"energy": 1.5}, "energy must"),
        ({"max_rank": None}, "give a rank"),
        ({"include": "("}, "no regular"),
        ({"dtype": "int8"}, "dtype"),
    ]:
        with pytest.raises(MergeError, match=words):
            Extraction(**settings)
    out = tmp_path / "lora"
    with pytest.raises(MergeError, match="do not differ"):
        extract_lora(path, path, out, None, silent)
    with pytest.raises(MergeError, match="do not differ"):
        extract_lora(path, other, out, Extraction(include="k_proj"), silent)
    smaller = tuned | {EMBEDDING: tuned[EMBEDDING][:39]}
    tools.write_model(tmp_path / "small", smaller)
    with pytest.raises(MergeError, match=r"embed_tokens.weight is \[40, 32\] and \[39, 32\]"):
        extract_lora(path, str(tmp_path / "small"), out, None, silent)
    tools.write_model(tmp_path / "nan", tuned | {Q: tuned[Q] * np.nan})
    with pytest.raises(MergeError, match=f"{Q}.*NaN"):
        extract_lora(path, str(tmp_path / "nan"), out, None, silent)
    # Found only while writing: what was written is gone again.
    tools.write_model(tmp_path / "late", tuned | {NORM: tuned[NORM] * np.inf})
    with pytest.raises(MergeError, match=f"{NORM}.*NaN or infinity"):
        extract_lora(path, str(tmp_path / "late"), out, None, silent)
    assert not out.exists()
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(MergeError, match="not empty"):
        extract_lora(path, other, out, None, silent)
