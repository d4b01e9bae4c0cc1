"""The commands beside merge.py, as their users meet them."""

import json
import sys

import numpy as np
import pytest


@pytest.fixture
def door(tools):
    """`door("upcycle", words...)`: the script in a process of its own."""

    def run(name, *words):
        path = tools.root / "scripts" / f"{name}.py"
        code = f"import runpy, sys; sys.argv[0] = {str(path)!r}\n"
        code += f"runpy.run_path({str(path)!r}, run_name='__main__')"
        return tools.run(*words, script=code)

    return run


def test_an_adapter_is_merged_back(family, tools, door):
    base, tuned, lora = (family.folder / name for name in ("base", "a", "lora"))
    done = door("extract_lora", base, tuned, lora, "--max-rank", "32", "--embeddings", "lora")
    assert done.code == 0 and "matrices of ranks" in done.err, done.err
    config = family.folder / "m.yml"
    model = {"model": f"{base}+{lora}"}
    config.write_text(
        json.dumps({"merge_method": "passthrough", "models": [model], "dtype": "bfloat16"})
    )
    done = tools.run(config, family.folder / "out", "--quiet")
    assert done.code == 0, done.err
    merged = tools.read_output(family.folder / "out")
    for name, value in family.tensors["a"].items():
        # Full rank: all of it, but for rounding to bfloat16 at ties.
        got, wanted = merged[name].astype(np.float64), value.astype(np.float64)
        np.testing.assert_allclose(got, wanted, rtol=2**-7, atol=1e-5, err_msg=name)


def test_a_model_is_aligned(family, tools, door):
    base, order = family.tensors["base"], np.arange(48)[::-1]
    other = dict(base)
    for name in ("gate_proj", "up_proj"):
        full = f"model.layers.1.mlp.{name}.weight"
        other[full] = base[full][order]
    full = "model.layers.1.mlp.down_proj.weight"
    other[full] = np.ascontiguousarray(base[full][:, order])
    tools.write_model(family.folder / "other", other)
    out = family.folder / "aligned"
    done = door("align", family.folder / "base", family.folder / "other", out)
    assert done.code == 0 and "3 tensors permuted" in done.err, done.err
    for name, value in tools.read_output(out).items():
        np.testing.assert_array_equal(value.view(np.uint16), base[name].view(np.uint16))


def test_a_mixture_is_made_and_a_search_is_run(family, tools, door):
    folder = family.folder
    config = folder / "moe.yml"
    experts = [{"source_model": str(folder / name)} for name in ("a", "b")]
    value = {"base_model": str(folder / "base"), "gate_mode": "random", "experts": experts}
    config.write_text(json.dumps(value))
    done = door("upcycle", config, folder / "moe", "--out-shard-size", "20KB")
    assert done.code == 0, done.err
    index = json.loads((folder / "moe" / "model.safetensors.index.json").read_text())
    assert "model.layers.1.block_sparse_moe.experts.1.w2.weight" in index["weight_map"]
    pytest.importorskip("cmaes")
    config = tools.write_config(folder, "linear")
    value = json.loads(config.read_text())
    value["models"][0]["parameters"]["weight"] = {"search": [0, 1]}
    config.write_text(json.dumps(value))
    command = f"{sys.executable} -S -c \"import sys; print('{{}}' != sys.argv[1])\" {{model}}"
    done = door("evolve_merge", config, folder / "o", "--command", command, "--budget", "1")
    assert done.code == 2 and "no finite score" in done.err
    command = f"{sys.executable} -S -c 'print(4)' {{model}}"
    words = [config, folder / "p", "--command", command, "--budget", "2", "--quiet"]
    done = door("evolve_merge", *words)
    assert done.code == 0 and done.out.startswith("best score 4:"), done.err
    assert "search" not in (folder / "p" / "best.yml").read_text()


@pytest.mark.parametrize("name", ["extract_lora", "upcycle", "evolve_merge", "align"])
def test_mistakes_are_one_line(tmp_path, door, name):
    words = {
        "extract_lora": ["no", "no", tmp_path / "o"],
        "align": ["no", "no", tmp_path / "o"],
        "upcycle": [tmp_path / "no.yml", tmp_path / "o"],
        "evolve_merge": [tmp_path / "no.yml", tmp_path / "o", "--command", "x {model}"],
    }[name]
    done = door(name, *words)
    assert done.code == 2 and done.err.count("\n") == 1, done.err
    assert done.err.startswith(f"{name}.py: error:")
    done = door(name, *words, "--sede", "1")
    assert done.code == 2 and ("did you mean --seed" in done.err or "unknown flag" in done.err)
    assert not (tmp_path / "o").exists()
