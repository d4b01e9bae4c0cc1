"""docs/merging.md does what it says: its blocks are run in order, its tables compared with code."""

import argparse
import json
import re
import shlex
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from lm.merging.chat_templates import TEMPLATES
from lm.merging.methods import METHODS

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "merging.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.M | re.S)


def rows(heading):
    """Cells of the first table behind a heading, without its head."""
    part = TEXT[TEXT.index(heading) :]
    table = re.search(r"(?:^\|.*\|\n)+", part, re.M)[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in table]


@pytest.fixture
def models(tmp_path, tools, monkeypatch):
    """The folder of the guide, with tiny models of its names."""
    rng = np.random.default_rng(0)
    base = tools.llama_tensors(rng, np.float32)
    words = [f"w{n}" for n in range(40)]
    for name in ("base", "math", "code"):
        tensors = {
            key: (value + (name != "base") * 0.1 * rng.standard_normal(value.shape)).astype(
                ml_dtypes.bfloat16
            )
            for key, value in base.items()
        }
        folder = tools.write_model(tmp_path / "models" / name, tensors)
        vocab = {word: n for n, word in enumerate(words)}
        if name == "code":
            vocab["own"] = vocab.pop("w39")
        content = {"added_tokens": [], "model": {"type": "WordLevel", "vocab": vocab}}
        (folder / "tokenizer.json").write_text(json.dumps(content))
        (folder / "tokenizer_config.json").write_text("{}")
    adapter = tmp_path / "models" / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 2, "r": 2}')
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    factors = {
        f"{module}.lora_A.weight": np.ones((2, 32), np.float32),
        f"{module}.lora_B.weight": np.ones((32, 2), np.float32),
    }
    data = tools.safetensors_bytes(factors)
    (adapter / "adapter_model.safetensors").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_of_the_guide_runs(models, tools, capsys):
    names, outputs, counts = {}, {}, dict.fromkeys(("yaml", "sh", "python"), 0)
    for kind, text in BLOCKS:
        counts[kind] += 1
        if kind == "yaml":
            (models / re.match(r"# (\S+\.yml)\n", text)[1]).write_text(text)
        elif kind == "sh":
            for line in text.splitlines():
                program, *words = shlex.split(line)
                assert program == "aniso-merge"
                done = tools.run(*words)
                assert done.code == 0, (line, done.err)
                assert "warning" not in done.err or "union" not in line, done.err
                outputs[line] = done.out
        else:
            exec(text, names)
    assert min(counts.values()) >= 3
    written = {line.split()[2] for line in outputs if "--dry-run" not in line}
    assert all((models / out / "merge_manifest.json").is_file() for out in written)

    # What the text around the blocks promises.
    dry = outputs["aniso-merge average.yml merged/average --dry-run"]
    assert "model.norm.weight [32] bfloat16 linear" in dry and '"normalize"' not in dry
    look = outputs["aniso-merge ties.yml merged/ties --dry-run --report"]
    assert "model.layers.0:  delta math" in look and "sign conflict" in look
    assert {"report.json", "report.html"} <= {p.name for p in (models / "merged/ties").iterdir()}
    config = json.loads((models / "merged/deeper/config.json").read_text())
    assert config["num_hidden_layers"] == 3
    union = json.loads((models / "merged/union/tokenizer.json").read_text())
    assert len(union["model"]["vocab"]) + len(union["added_tokens"]) == 41
    assert len(tools.read_output(models / "merged/union")["lm_head.weight"]) == 48
    assert (models / "merged/intermediate/average/merge_manifest.json").is_file()
    assert not [path for path in (models / "merged").iterdir() if path.name.startswith(".")]
    stages, again = (tools.read_output(models / f"merged/{name}") for name in ("stages", "again"))
    for name, value in stages.items():
        np.testing.assert_array_equal(value.view(np.uint16), again[name].view(np.uint16))
    files = [path.name for path in (models / "merged/stages").iterdir()]
    for name in ("README.md", "merge_config.yml", "merge_stages.json", "tokenizer.json"):
        assert name in files
    assert names["code"].shape == (32,) and np.isfinite(names["code"]).all()
    assert "memory" in capsys.readouterr().out


def test_the_table_of_methods_is_the_registry():
    table = {row[0].strip("`"): row[1:] for row in rows("## 3. Choosing a method")}
    assert set(table) == set(METHODS)
    words = {"required": "yes", "optional": "may", "none": "-", "one of the models": "end"}
    for name, (base, count, parameters, flavors, what, paper) in table.items():
        first = METHODS[name][0]
        assert base == words[first.base], name
        low, high = first.models
        assert count == (f"{low}+" if high is None else str(high)), name
        shown = [
            ", ".join(f"**{p.name}**" if p.required else p.name for p in group)
            for group in (first.per_model, first.params)
        ]
        assert parameters.replace("\\|", "|") == " | ".join(shown).strip(), name
        readings = [method.flavor for method in METHODS[name]]
        assert flavors == ("" if readings == [None] else ", ".join(readings)), name
        assert ("compressed" in what) == first.many, name
        if paper:
            assert re.fullmatch(r"\d{4}\.\d{5}", paper)
            sources = (path.read_text() for path in (ROOT / "lm/merging/methods").glob("*.py"))
            assert any(f"arXiv {paper}" in source for source in sources) or name == "magmax", name


def test_the_options_are_those_of_the_program(tools):
    from lm.cli import merge

    assert isinstance(merge._parser("x"), argparse.ArgumentParser)
    flags = {flag for action in merge._parser("x")._actions for flag in action.option_strings}
    flags -= {"-h", "--help"}
    listed = {re.match(r"`(--[\w-]+)", row[0])[1] for row in rows("### Options")}
    assert listed == flags
    ours = " ".join(row[1] for row in rows("## 2. Moving from mergekit"))
    assert set(re.findall(r"`(--[\w-]+)", ours)) <= flags
    prose = re.sub(r"^\|.*$", "", TEXT, flags=re.M)
    assert set(re.findall(r"--[a-z][\w-]+", prose)) <= flags


def test_exit_codes_and_templates():
    from lm import exit_codes

    codes = {int(row[0]) for row in rows("### Exit codes")}
    known = (exit_codes.OK, exit_codes.FAILED, exit_codes.USAGE, exit_codes.STORAGE)
    assert codes == {*known, exit_codes.INTERRUPTED}
    sentence = re.search(r"`auto`, or one of (.*?)\.\n", TEXT, re.S)[1]
    assert re.findall(r"`(\w+)`", sentence) == sorted(TEMPLATES)


def test_links_and_anchors():
    for target in re.findall(r"\]\((\.\./[^)#]+)", TEXT):
        assert (ROOT / "docs" / target).exists(), target
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", TEXT, flags=re.M | re.S), re.M)
    anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
    for target in re.findall(r"\]\(#([^)]+)\)", TEXT):
        assert target in anchors, target
