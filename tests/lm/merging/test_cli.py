"""merge.py as its users meet it."""

import json
import os
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest


def floats(tensors):
    return {name: value.astype(np.float64) for name, value in tensors.items()}


def test_task_arithmetic_from_the_command_line(family, tools):
    out = family.folder / "deep" / "out"
    config = tools.write_config(family.folder, "task_arithmetic")
    done = tools.run(config, out, "--jobs", "2", "--max-memory", "600MB")
    assert done.code == 0, done.err
    assert "done in" in done.err and "/s" in done.err
    base, a, b = (floats(family.tensors[name]) for name in ("base", "a", "b"))
    got = tools.read_output(out)
    assert set(got) == set(base)
    for name, value in got.items():
        assert value.dtype == ml_dtypes.bfloat16
        expected = base[name] + 0.5 * (a[name] - base[name]) + 0.5 * (b[name] - base[name])
        np.testing.assert_allclose(value.astype(np.float64), expected, rtol=2**-7, atol=1e-6)
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 2
    manifest = json.loads((out / "merge_manifest.json").read_text())
    assert set(manifest["crc32"]) == set(base) and manifest["files"] == {
        "model.safetensors": (out / "model.safetensors").stat().st_size
    }
    data = (out / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    record = json.loads(header["__metadata__"]["merge"])
    assert record["merge_method"] == "task_arithmetic" and record["fingerprint"]


def test_a_dry_run_shows_everything_and_writes_nothing(family, tools):
    config = tools.write_config(family.folder, "ties")
    before = tools.digest(family.folder)
    done = tools.run(config, family.folder / "out", "--dry-run")
    assert done.code == 0, done.err
    for name in family.tensors["base"]:
        assert re.search(
            rf"^{re.escape(name)} \[.*bfloat16 ties .*\"?density\"?: 0\.5", done.out, re.M
        )
    for what in ("models ", "output ", "disk ", "memory ", "time "):
        assert re.search(f"^{what}", done.out, re.M), what
    assert tools.digest(family.folder) == before


def test_shards_and_quiet(family, tools):
    config = tools.write_config(family.folder, "linear")
    out = family.folder / "out"
    done = tools.run(config, out, "--out-shard-size", "10KB", "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert {path.name for path in out.glob("*.safetensors")} == set(index["weight_map"].values())
    for file in out.glob("*.safetensors"):
        assert file.stat().st_size < 16_000


def test_seeds_give_other_random_numbers(family, tools):
    config = tools.write_config(family.folder, "dare_linear")
    outs = [family.folder / f"out{n}" for n in range(3)]
    for out, seed in zip(outs, ("3", "3", "4"), strict=True):
        assert tools.run(config, out, "--seed", seed, "--quiet").code == 0
    one, same, other = (tools.read_output(out)["lm_head.weight"] for out in outs)
    np.testing.assert_array_equal(one.view(np.uint16), same.view(np.uint16))
    assert (one != other).any()


def bad(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_whatever_is_wrong_is_one_line(family, tools):
    folder = family.folder
    good = tools.write_config(folder, "linear")
    nowhere = bad(folder, "n.yml", "merge_method: linear\nmodels: [{model: /no/such/model}]")
    method = bad(folder, "m.yml", f"merge_method: linaer\nmodels: [{{model: {folder / 'a'}}}]")
    (folder / "full").mkdir()
    (folder / "full" / "precious.txt").write_text("x")
    (folder / "file").write_text("x")
    broken = tools.write_model(folder / "broken", {"a": np.ones(9, np.float32)})
    (broken / "model.safetensors").write_bytes(b"12")
    damaged = tools.write_config(folder, "slerp", names=("broken",))
    cases = [
        (2, [good], "OUT"),
        (2, [good, folder / "o", "--resme"], "did you mean --resume"),
        (2, [good, folder / "o", "--max-memory", "lots"], "no size"),
        (2, [good, folder / "o", "--max-memory", "2MB"], "--max-memory"),
        (2, [good, folder / "o", "--jobs", "0"], "threads"),
        (2, [good, folder / "o", "--flavor", "sweet"], "flavor"),
        (2, [folder / "missing.yml", folder / "o"], "missing.yml"),
        (2, [bad(folder, "b.yml", "a: [b"), folder / "o"], "b.yml"),
        (2, [nowhere, folder / "o"], "/no/such/model"),
        (2, [method, folder / "o"], "did you mean 'linear'"),
        (2, [good, folder / "full"], "not empty"),
        (2, [good, folder / "file"], "not a folder"),
        (2, [good, folder / "file" / "o"], "not a folder"),
        (4, [damaged, folder / "o"], "truncated"),
    ]
    before = tools.digest(folder)
    for code, words, text in cases:
        done = tools.run(*words)
        assert done.code == code, (words, done.err)
        assert text in done.err and "Traceback" not in done.err, done.err
        assert done.err.count("\n") == 1, done.err
    assert tools.digest(folder) == before


def test_nan_stops_with_tensor_and_model(family, tools):
    values = dict(family.tensors["a"])
    values["model.norm.weight"] = values["model.norm.weight"].copy()
    values["model.norm.weight"][3] = np.nan
    tools.write_model(family.folder / "sick", values)
    config = tools.write_config(family.folder, "linear", names=("a", "sick"))
    done = tools.run(config, family.folder / "out", "--quiet")
    assert done.code == 2 and done.err.count("\n") == 1
    assert "model.norm.weight" in done.err and "sick" in done.err
    assert [path.name for path in (family.folder / "out").iterdir()] == [".merge-in-progress"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_place(family, tools):
    config = tools.write_config(family.folder, "linear")
    folder = family.folder / "locked"
    folder.mkdir(mode=0o500)
    done = tools.run(config, folder / "out")
    assert done.code == 4 and "read-only" in done.err


def test_starting_needs_no_jax(family, tools):
    config = tools.write_config(family.folder, "ties")
    script = (
        "import sys\nfrom lm.cli.merge import main\n"
        "try:\n    main()\nfinally:\n"
        "    print(sorted({'jax', 'orbax', 'flax', 'scipy', 'torch'} & set(sys.modules)))\n"
    )
    done = tools.run(config, family.folder / "out", "--quiet", script=script)
    assert done.code == 0 and done.out == "[]\n"


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_ties", "karcher"])
def test_on_eight_simulated_devices(family, tools, method):
    changes = {"base_model": None} if method == "karcher" else {}
    config = tools.write_config(family.folder, method, dtype="float32", **changes)
    plain, device = family.folder / "plain", family.folder / "device"
    assert tools.run(config, plain, "--quiet").code == 0
    env = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    done = tools.run(config, device, "--quiet", "--device", "cpu", env=env)
    assert done.code == 0, done.err
    one, two = tools.read_output(plain), tools.read_output(device)
    for name in one:
        if method == "task_arithmetic":  # element by element: the same to the last bit
            np.testing.assert_array_equal(one[name].view(np.uint32), two[name].view(np.uint32))
        np.testing.assert_allclose(one[name], two[name], rtol=1e-6, atol=1e-6)


def test_an_adapter_is_merged_by_its_factors(family, tools, rng):
    adapter = family.folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 4}')
    a, b = (rng.standard_normal(shape, np.float32) for shape in ((2, 32), (32, 2)))
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    factors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    data = tools.safetensors_bytes(factors)
    (adapter / "adapter_model.safetensors").write_bytes(data)
    names = (f"a+{adapter}", "b")
    config = tools.write_config(family.folder, "linear", names=names, dtype="float32")
    done = tools.run(config, family.folder / "out", "--quiet")
    assert done.code == 0, done.err
    got = tools.read_output(family.folder / "out")
    for name, first in floats(family.tensors["a"]).items():
        if name == "model.layers.1.self_attn.q_proj.weight":
            first = first + 2 * b.astype(np.float64) @ a
        expected = (first + family.tensors["b"][name].astype(np.float64)) / 2
        np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-5)


def test_orbax_out_and_in_again(family, tools):
    config = tools.write_config(family.folder, "linear")
    plain, orbax = family.folder / "plain", family.folder / "orbax-out"
    assert tools.run(config, plain, "--quiet").code == 0
    env = {"JAX_PLATFORMS": "cpu"}
    done = tools.run(config, orbax, "--quiet", "--out-format", "orbax", env=env)
    assert done.code == 0, done.err
    assert not list(orbax.glob("*.safetensors")) and (orbax / "config.json").is_file()
    results = []
    for name in ("orbax-out", "plain"):  # the same numbers, read from both formats
        again = tools.write_config(family.folder, "linear", names=(name, "a"))
        out = family.folder / f"from-{name}"
        assert tools.run(again, out, "--quiet", env=env).code == 0
        results.append(tools.read_output(out))
    assert set(results[0]) == set(family.tensors["a"])
    for name, value in results[0].items():
        np.testing.assert_array_equal(value.view(np.uint16), results[1][name].view(np.uint16))


def test_the_module_is_a_command(family, tools):
    done = subprocess.run(
        [sys.executable, "-c", "from lm.cli.merge import main; main(['--help'])"],
        capture_output=True,
        text=True,
        cwd=tools.root,
    )
    assert done.returncode == 0
    for flag in ("--dry-run", "--resume", "--report", "--max-memory", "--out-shard-size", "--seed"):
        assert flag in done.stdout
    assert 'aniso-merge = "lm.cli.merge:main"' in (tools.root / "pyproject.toml").read_text()
