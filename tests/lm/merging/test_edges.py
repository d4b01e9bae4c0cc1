"""Unusual tensors, paths and files, from the command line's side: one line or the right result."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from lm.merging.architecture import describe
from lm.merging.config import parse_yaml
from lm.merging.methods import METHODS
from lm.merging.plan import make_plan
from lm.merging.preflight import lost_deltas
from lm.merging.session import Session
from lm.merging.store import lora, open_store
from lm.merging.types import MergeError, StorageError

EMPTY = {"a": (0, 5), "b": (5, 0), "c": (0,), "d": (2, 0, 3), "one": (), "m": (3, 4)}
SINGLE = [name for name, readings in METHODS.items() if not readings[0].many]


def merged(tools, folder, method, count, **more):
    readings = METHODS[method]
    known = {p.name for r in readings for p in (*r.per_model, *r.params)}
    wanted = {"weight": 0.5, "density": 0.5, "t": 0.3, "ratio": 0.5}
    config = {
        "merge_method": method,
        "models": [{"model": str(folder / name)} for name in "xyz"[:count]],
        "parameters": {k: v for k, v in wanted.items() if k in known},
        **more,
    }
    if readings[0].base in ("required", "one of the models"):
        config["base_model"] = str(folder / "base")
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    out = folder / f"out-{method}"
    Session(path, out, say=lambda _: None).run()
    return tools.read_output(out)


@pytest.mark.parametrize("method", SINGLE)
def test_empty_tensors_pass_through_every_method(method, tmp_path, tools, rng):
    for name in ("base", "x", "y", "z"):
        tensors = {n: np.asarray(rng.normal(size=s), np.float32) for n, s in EMPTY.items()}
        tools.write_model(tmp_path / name, tensors, config=None)
    got = merged(tools, tmp_path, method, min(3, METHODS[method][0].models[1] or 3))
    assert {name: value.shape for name, value in got.items()} == EMPTY


def test_pcb_over_tensors_with_equal_elements(tmp_path, tools):
    """The rank falls among equals of several tensors, whose blocks all begin at 0."""
    for number, name in enumerate(("base", "x", "y", "z")):
        values = {"p": (7,), "q": (40,), "r": (3, 4)}
        tensors = {n: np.full(s, number / 2, np.float32) for n, s in values.items()}
        tensors["q"][::3] += number
        tools.write_model(tmp_path / name, tensors, config=None)
    got = merged(tools, tmp_path, "pcb", 3)
    assert all(np.isfinite(value).all() for value in got.values())


def test_a_bias_of_the_head_under_another_vocabulary(tmp_path, tools, tokenizer_folder, rng):
    words = ["a", "b", "c", "d", "e"]
    found = {}
    for name, tokens in (("x", words), ("y", words[::-1])):
        folder = tokenizer_folder(name, tokens)
        found[name] = {
            "model.embed_tokens.weight": rng.standard_normal((5, 4), np.float32),
            "lm_head.weight": rng.standard_normal((5, 4), np.float32),
            "lm_head.bias": rng.standard_normal(5, np.float32),
        }
        tools.write_model(tmp_path / "parts" / name, found[name], config={"vocab_size": 5})
        for file in (tmp_path / "parts" / name).iterdir():
            file.rename(folder / file.name)
    for method, pad in (("linear", 1), ("linear", 8), ("nuslerp", 8)):
        extra = {"tokenizer": {"source": str(tmp_path / "x"), "pad_to_multiple_of": pad}}
        got = merged(tools, tmp_path, method, 2, **extra)["lm_head.bias"]
        (tmp_path / f"out-{method}").rename(tmp_path / f"{method}{pad}")
        assert got.shape == (5 if pad == 1 else 8,)
        x, y = found["x"]["lm_head.bias"], found["y"]["lm_head.bias"][::-1]
        if method == "linear":
            np.testing.assert_allclose(got[:5], (x + y) / 2, rtol=1e-6)
            np.testing.assert_allclose(got[5:], np.mean((x + y) / 2), rtol=1e-5)


def test_merge_keys_of_yaml_are_understood():
    text = """
merge_method: linear
models:
- {model: a, parameters: &shared {weight: 0.5}}
- model: b
  parameters:
    <<: *shared
- model: c
  parameters:
    <<: *shared
    weight: 0.25
"""
    weights = [entry.parameters["weight"] for entry in parse_yaml(text).models]
    assert weights == [0.5, 0.5, 0.25]


def test_the_home_folder_has_a_config_too(tmp_path, tools, monkeypatch):
    tools.write_model(tmp_path / "m", {"w": np.ones(3, np.float32)}, config={"model_type": "x"})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_store("~/m").config == {"model_type": "x"}
    for bad in ("~nobody-of-that-name/m", "x" * 300):
        with pytest.raises(MergeError, match="no model at"):
            open_store(bad)


def test_unknown_number_formats_are_not_called_damage(tmp_path):
    header = json.dumps({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    with pytest.raises(StorageError, match="w has the dtype F4, which cannot be read"):
        open_store(str(tmp_path))


def test_quantized_models_are_refused(decoder):
    text = "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n"
    store = decoder("a", quantization_config={"quant_method": "gptq"})
    with pytest.raises(MergeError, match="a is quantized .*gptq.*dequantize"):
        make_plan(parse_yaml(text), {"a": store})
    copied = parse_yaml("merge_method: passthrough\nmodels: [{model: a}]")
    assert make_plan(copied, {"a": store}).jobs


def test_biases_of_adapters_are_not_lost_silently(tmp_path, tools, rng):
    tools.write_model(tmp_path / "base", {"k.weight": np.ones((6, 8), np.float32)})
    factors = {"k.lora_A.weight": np.ones((2, 8), np.float32)}
    factors |= {"k.lora_B.bias": np.ones(6, np.float32)}
    factors |= {"k.lora_B.weight": np.ones((6, 2), np.float32)}
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_bias": true}')
    (folder / "adapter_model.safetensors").write_bytes(tools.safetensors_bytes(factors))
    with pytest.raises(MergeError, match="lora_bias"):
        open_store(f"{tmp_path / 'base'}+{folder}")


def test_a_small_adapter_is_not_lost_in_its_file(tmp_path, tools, rng):
    """Its change is known in float32, though the base's numbers are bfloat16."""
    weight = rng.standard_normal((16, 16)).astype(ml_dtypes.bfloat16)
    tools.write_model(tmp_path / "base", {"k.weight": weight}, config=None)
    folder = tmp_path / "lora"
    folder.mkdir()
    pair = {"k.lora_A.weight": np.full((1, 16), 1e-3, np.float32)}
    pair |= {"k.lora_B.weight": np.full((16, 1), 1e-2, np.float32)}
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 1}')
    (folder / "adapter_model.safetensors").write_bytes(tools.safetensors_bytes(pair))
    base = str(tmp_path / "base")
    config = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [{"model": f"{base}+{folder}", "parameters": {"weight": 1}}],
    }
    plan = make_plan(parse_yaml(json.dumps(config)), open_store)
    assert lost_deltas(plan, [open_store(ref) for ref in plan.models]) == []


def test_factors_of_adapters_are_given_up_again(tmp_path, tools, rng, monkeypatch):
    names = "abcdef"
    tools.write_model(tmp_path / "base", {f"{n}.weight": np.ones((8, 8), "f4") for n in names})
    folder = tmp_path / "lora"
    folder.mkdir()
    pairs = {f"{n}.lora_A.weight": rng.standard_normal((2, 8), np.float32) for n in names}
    pairs |= {f"{n}.lora_B.weight": rng.standard_normal((8, 2), np.float32) for n in names}
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 2}')
    (folder / "adapter_model.safetensors").write_bytes(tools.safetensors_bytes(pairs))
    store = open_store(f"{tmp_path / 'base'}+{folder}")
    monkeypatch.setattr(lora, "_KEPT", 3 * 64)
    for n in names:
        product = pairs[f"{n}.lora_B.weight"] @ pairs[f"{n}.lora_A.weight"]
        got = store.read(f"{n}.weight").reshape(8, 8)
        np.testing.assert_allclose(got, 1 + product, rtol=1e-5, atol=1e-5)
        assert sum(each.nbytes for each in store._loaded.values()) <= 3 * 64
    assert set(store._loaded) >= {"f.lora_A.weight", "f.lora_B.weight"}


def test_bad_probabilities_are_told_before_the_work(tmp_path, tools):
    """Also those that a gradient reaches in the last layer only."""
    tensors = {f"model.layers.{n}.k.weight": np.ones((4, 4), np.float32) for n in range(3)}
    for name in ("base", "a"):
        tools.write_model(tmp_path / name, tensors, config=None)
    each = {"weight": 1, "density": [0.5, 0.9]}
    models = [{"model": str(tmp_path / "a"), "parameters": each}]
    config = tools.write_config(tmp_path, "della", models=models)
    with pytest.raises(MergeError, match=r"layers.2.*density 0.9 and epsilon 0.15: lower epsilon"):
        Session(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lists_with_holes_are_plain_tensors(memory_store):
    """nn.Sequential counts modules without weights too."""
    arrays = {f"net.{n}.weight": np.zeros((2, 2), "f4") for n in (0, 2, 4)}
    found = describe(memory_store("m", arrays))
    assert not found.stacks and set(found.loose) == set(arrays)


def test_the_fingerprint_is_of_the_tokenizers_too(memory_store, tokenizer_folder):
    folders = [tokenizer_folder(n, ["a", "b", "c"], unk_token="a") for n in "xy"]
    arrays = {"model.embed_tokens.weight": np.zeros((3, 2), "f4")}
    stores = {str(f): memory_store(f, arrays, {"vocab_size": 3}) for f in folders}
    models = [{"model": ref, "parameters": {"weight": 1}} for ref in stores]
    text = json.dumps({"merge_method": "linear", "models": models, "tokenizer_source": "base"})
    first = make_plan(parse_yaml(text), stores).fingerprint
    file = folders[1] / "tokenizer.json"
    file.write_text(file.read_text().replace('"b": 1, "c": 2', '"c": 1, "b": 2'))
    assert make_plan(parse_yaml(text), stores).fingerprint != first


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ulimit of Linux")
def test_more_shards_than_open_files_are_allowed_at_first(tmp_path, tools, rng):
    tensors = {f"t{n}": np.ones(4, np.float32) for n in range(90)}
    for name in ("a", "b"):
        tools.write_model(tmp_path / name, tensors, shards=45, config=None)
    config = tools.write_config(tmp_path, base=None)
    command = 'ulimit -Sn 64; exec "$@"'
    script = "from lm.cli.merge import main; main()"
    words = [config, tmp_path / "out", "--quiet", "--out-shard-size", "8"]
    done = subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, "-c", script, *map(str, words)],
        capture_output=True, text=True, cwd=tools.root, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 90
