"""Files that transformers refuses or reads otherwise than a reader would guess; and odd folders."""

import json
import os
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm.hf
from lm.cli import convert
from lm.config import ConfigError
from lm.data.tokenizer import ByteTokenizer
from lm.generate import Sampling
from lm.harness import HarnessModel, _settings
from lm.hf.config import read_config
from lm.scoring import Scorer

YARN = {"rope_type": "yarn", "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "name,keys,message",
    [
        # Numbers that no default can stand for.
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "lacks the key 'factor'"),
        ("llama", {"rope_parameters": YARN}, "lacks the key 'factor'"),
        ("llama", {"rope_parameters": LLAMA3}, "lacks the key 'low_freq_factor'"),
        # transformers takes the second alone, and with it another base of the angles.
        ("qwen2", {"rope_scaling": YARN | {"factor": 2.0}}, "are both given"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 5.0}}, "has 'rope_theta'; in this"),
        ("qwen2", {"use_sliding_window": False}, "layer_types has sliding layers"),
        ("qwen2", {"use_sliding_window": "no"}, "use_sliding_window must be true or false"),
        ("deepseek_v3", {"n_group": None}, "n_group must be a whole number"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved is True"),
        ("llama", {"model_type": ["llama"]}, r"model_type \['llama'\] is not known"),
    ],
    ids=str,
)
def test_files_that_say_too_little_or_two_things_are_refused(altered, name, keys, message):
    with pytest.raises(ConfigError, match=message):
        lm.hf.load(altered(name, **keys))


def fields(altered, name, **keys):
    folder = altered(name, **keys)
    return read_config(json.loads((folder / "config.json").read_text()), "", "float32")[1]


def test_null_says_what_transformers_takes_it_for(altered):
    # Not the default 32 of Qwen2, but as many as there are heads.
    assert fields(altered, "qwen2", num_key_value_heads=None).num_kv_heads == 4
    assert fields(altered, "mistral", num_key_value_heads=None).num_kv_heads == 4
    off = fields(altered, "deepseek_v3", norm_topk_prob=None, rope_interleave=None)
    assert not off.moe.normalize and not off.rope_interleave
    scaled = fields(altered, "qwen3", rope_parameters=YARN | {"factor": None})
    assert scaled.rope_scaling.factor == 128 / 32  # the whole context over the original
    assert fields(altered, "llama", quantization_config=None).num_layers == 2


def test_keys_of_published_files_that_say_nothing_of_the_computation(altered):
    for keys in (
        {"is_llama_config": True, "rope_interleaved": False},  # SmolLM2
        {"_num_labels": 1},  # DistilGPT2
        {"unsloth_fixed": True},
    ):
        assert fields(altered, "llama", **keys) == fields(altered, "llama")


def test_what_float16_cannot_hold_is_told(fixtures, altered, tmp_path):
    config, params = lm.hf.load(fixtures / "qwen3")
    for dtype in ("float32", "bfloat16"):
        cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params)  # noqa: B023
        cast["final_norm"] = {"scale": cast["final_norm"]["scale"].at[3].set(7e4)}
        with pytest.raises(ConfigError, match="model.norm.weight has values that float16 cannot"):
            lm.hf.save(tmp_path / "half", config, cast, dtype="float16")
        assert not list(tmp_path.glob("*half*")) and not list(tmp_path.glob(".*"))
        lm.hf.save(tmp_path / dtype, config, cast)
        with pytest.raises(ConfigError, match="model.norm.weight has values that float16 cannot"):
            lm.hf.load(tmp_path / dtype, "float16")
        assert np.isfinite(np.asarray(lm.hf.load(tmp_path / dtype)[1]["final_norm"]["scale"])).all()


def test_a_link_to_an_empty_folder_is_written_through(fixtures, tmp_path):
    config, params = lm.hf.load(fixtures / "qwen3")
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "out")
    os.symlink(tmp_path / "later", tmp_path / "soon")
    for link in ("out", "soon"):
        lm.hf.save(tmp_path / link, config, params)
        assert (tmp_path / link).is_symlink()
        again = lm.hf.load(tmp_path / link)[1]
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), params, again)))
    assert (tmp_path / "later" / "config.json").is_file()


def test_a_tokenizer_of_another_format_goes_along_unread(fixtures, tmp_path, capsys):
    """tokenizer.model alone (sentencepiece): its ids and files are kept, a run is refused."""
    source = tmp_path / "source"
    shutil.copytree(fixtures / "mistral", source)
    (source / "tokenizer.model").write_bytes(b"pieces")
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    convert.main([str(source), str(tmp_path / "half"), "--to", "hf", "--dtype", "bfloat16"])
    for name in ("tokenizer.model", "generation_config.json"):
        assert (tmp_path / "half" / name).read_bytes() == (source / name).read_bytes()
    content = json.loads((tmp_path / "half" / "config.json").read_text())
    assert (content["bos_token_id"], content["eos_token_id"]) == (1, 2)
    # Not silently one of bytes, of which a larger vocabulary has room for all.
    with pytest.raises(SystemExit):
        convert.main([str(source), str(tmp_path / "run")])
    assert "tokenizer.json" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_harness_settings_and_what_is_longer_than_the_model_reads(fixtures):
    greedy = Sampling(temperature=0.0)
    for given in ({}, {"do_sample": True, "temperature": 0}, {"do_sample": False}):
        assert _settings(given)[2] == greedy
    assert _settings({"do_sample": True})[2].temperature == 1
    assert _settings({"temperature": 0.5})[2].temperature == 0.5
    config, params = lm.hf.load(fixtures / "qwen3")
    model = HarnessModel(Scorer(config, params, max_length=20), ByteTokenizer())
    request = types.SimpleNamespace(args=("a", "b" * 21))
    with pytest.raises(ConfigError, match="a continuation has 21 tokens, and the model reads 20"):
        model.loglikelihood([request])


@pytest.mark.parametrize(
    "keys",
    [
        {"init_lora_weights": "pissa_niter_4"},  # its base is not the plain one
        {"layer_replication": [[0, 2], [1, 2]]},
        {"alora_invocation_tokens": [5]},
    ],
    ids=str,
)
def test_adapters_of_a_changed_base_are_refused(fixtures, tmp_path, keys):
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | keys
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    config = lm.hf.load_config(fixtures / "qwen3")
    with pytest.raises(ConfigError, match=f"{min(keys)} is .*, which is not supported"):
        lm.hf.adapter_config(tmp_path, config)
