"""docs/adaptive_merging.md says what the code does; the benchmark's parts."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import lm
from lm.merging.adaptive.benchmark import (
    Domain,
    Sample,
    TaskSpec,
    corrupted,
    fit,
    read_domains,
    sample_of,
    score,
)
from lm.merging.adaptive.config import parse_adaptive
from lm.merging.adaptive.options import METHODS
from lm.merging.yaml_text import read_documents

ROOT = Path(__file__).parents[4]
TEXT = (ROOT / "docs" / "adaptive_merging.md").read_text()


def test_the_table_of_methods_is_the_registry():
    part = TEXT[TEXT.index("## 3. Methods") :]
    rows = re.search(r"(?:^\|.*\|\n)+", part, re.M)[0].splitlines()[2:]
    table = {}
    for row in rows:
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        table[cells[0].strip("`")] = cells[1:]
    assert set(table) == set(METHODS)
    for name, (base, parameters, _, paper) in table.items():
        method = METHODS[name]
        assert base == ("yes" if method.base else "-"), name
        groups = (method.per_model, method.params)
        shown = " | ".join(", ".join(p.name for p in group) for group in groups)
        assert parameters.replace("\\|", "|") == shown.strip(), name
        assert not paper or re.fullmatch(r"\d{4}\.\d{5}", paper)


def test_the_configurations_of_the_guide_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for name in ("math.txt", "code.txt", "questions.jsonl"):
        (tmp_path / "text" / name).write_text("x")
    blocks = re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.M | re.S)
    found = [parse_adaptive(read_documents(block, "guide")[0]) for block in blocks]
    methods = ["adamerging", "regmean", "surgery", "wemoe"]
    assert [config.merge_method for config in found] == methods
    assert found[2].merged == "merged/adamerging" and found[1].models[0].data.prompts
    commands = re.findall(r"^aniso-merge (\S+)", TEXT, re.M)
    assert {c for c in commands if "/" not in c} == {f"{m}.yml" for m in methods}


DOMAINS = {
    "low": Domain(b"abcdefgh" * 40, b"abcdefgh" * 40),
    "high": Domain(b"STUVWXYZ" * 40, b"STUVWXYZ" * 40),
}


def test_samples_count_the_next_byte_or_the_letter():
    text = sample_of(TaskSpec("low", ("low",)), DOMAINS, "tune", 4, 16, 0)
    np.testing.assert_array_equal(text.targets[:, :-1], text.tokens[:, 1:])
    assert text.weights.all()
    spec = TaskSpec("which", ("low", "high"))
    choice = sample_of(spec, DOMAINS, "test", 40, 64, 0)
    assert (choice.weights.sum(1) == 1).all() and spec.answers == ("A", "B")
    for tokens, targets, weights in zip(*choice, strict=True):
        last = int(weights.argmax())
        assert bytes(tokens[last - 2 : last + 1].tolist()) == b"\n# "
        assert chr(targets[last]) == ("A" if chr(tokens[0]).islower() else "B")
    broken = corrupted(choice, 1.0, 0)
    rows = np.arange(40)
    last = choice.weights.argmax(1)
    assert (broken.tokens[rows, last - 2] == ord("\n")).all()
    assert (broken.tokens[:, :40] != choice.tokens[:, :40]).mean() > 0.9
    np.testing.assert_array_equal(broken.targets, choice.targets)


def test_scores_compare_answers_alone():
    sample = Sample(*(np.asarray(a) for a in ([[5, 6]], [[0, 66]], [[0.0, 1.0]])))
    logits = np.zeros((1, 2, 100), np.float32)
    logits[0, 1, [65, 66, 70]] = [1.0, 2.0, 9.0]
    right, nats = score(lambda tokens: logits, sample, "AB")
    assert right == 100 and nats == pytest.approx(np.log(1 + np.exp(-1)), rel=1e-5)
    assert score(lambda tokens: logits, sample)[0] == 0


def test_fitting_learns_a_text():
    config = lm.ModelConfig(
        vocab_size=260, num_layers=1, d_model=16, num_heads=2, d_ff=32, dtype="float32"
    )
    spec = TaskSpec("low", ("low",))
    batch = lambda step: sample_of(spec, DOMAINS, "train", 4, 8, step)  # noqa: E731
    params = fit(config, lm.init(config, jax.random.key(0)), batch, steps=60, rate=2e-2)
    sample = sample_of(spec, DOMAINS, "test", 8, 8, 0)
    assert score(jax.jit(lambda t: lm.apply(config, params, t)), sample)[0] > 90


def test_domains_are_files_or_the_library(tmp_path):
    library = read_domains(None, 4000)
    assert len(library) == 11
    assert all(len(d.train) >= 3000 and len(d.valid) >= 500 for d in library.values())
    with pytest.raises(lm.ConfigError, match="holds no"):
        read_domains(str(tmp_path))
