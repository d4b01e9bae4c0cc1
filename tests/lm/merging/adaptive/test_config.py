"""What cannot work is refused before any work, with the remedy; the text of tasks."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import lm
import lm.hf
from lm.data import load_tokenizer
from lm.merging.adaptive.config import adaptive_method, parse_adaptive
from lm.merging.adaptive.data import batch_of, read_rows
from lm.merging.adaptive.options import METHODS
from lm.merging.adaptive.work import Work
from lm.merging.config import parse_config
from lm.merging.methods import METHODS as STATIC


@pytest.fixture
def write(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("some text " * 20)

    def make(method="adamerging", **changes):
        entries = [{"model": f"m/{n}", "data": str(tmp_path / f"{n}.txt")} for n in ("a", "b")]
        value = {"merge_method": method, "base_model": "m/base", "models": entries}
        return {key: item for key, item in (value | changes).items() if item is not None}

    return make


def entry(tmp_path, **data):
    return [
        {"model": "m/a", "data": {"path": str(tmp_path / "a.txt")} | data},
        {"model": "m/b", "data": str(tmp_path / "b.txt")},
    ]


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"models": [{"model": "m/a"}]}, "m/a has no data: give data.*task_arithmetic or ties"),
        ({"method": "regmean", "base_model": None, "models": [{"model": "m/a"}] * 2}, "wudi"),
        ({"base_model": None}, "works on task vectors: give the base_model"),
        ({"method": "fisher"}, "takes no base_model"),
        ({"method": "wemoe", "models": []}, "needs 2 models or more, got 0"),
        ({"slices": [1]}, "slices is for static methods"),
        ({"parameters": {"stepps": 3}}, "unknown parameter 'stepps'.*did you mean 'steps'"),
        ({"parameters": {"steps": 1.5}}, "steps must be a whole number, got 1.5"),
        ({"parameters": {"steps": -1}}, "steps must be at least 0"),
        ({"parameters": {"weight": [0.1, 0.2]}}, "must be one value"),
        ({"parameters": {"rank": 4}}, "unknown parameter 'rank'"),
        ({"base_model": "m/a"}, "m/a is the base_model and a model to merge"),
        ({"coefficients": "gone.json"}, "there is no file gone.json"),
        (
            {"method": "fisher", "base_model": None, "parameters": {"weight": 0}},
            "all weights are 0",
        ),
        ({"merged": "x"}, "merged is for surgery and surgery_v2, not for adamerging"),
        ({"dtype": "int8"}, "unknown type 'int8'"),
        ({"model": "x"}, "unknown key 'model'.*did you mean 'models'"),
    ],
)
def test_bad_configurations_are_refused(write, changes, message):
    changes = dict(changes)
    value = write(changes.pop("method", "adamerging"), **changes)
    with pytest.raises(lm.ConfigError, match=message):
        parse_adaptive(value)


@pytest.mark.parametrize(
    "data,message",
    [
        ({"path": "gone.txt"}, "there is no file gone.txt"),
        ({"kind": "csv"}, "kind must be text, jsonl or prompts"),
        ({"answers": ["x"], "kind": "prompts"}, "two or more different"),
        ({"answers": ["x", "y"]}, "answers follow prompts"),
        ({"fields": "x"}, "unknown key 'fields'"),
    ],
)
def test_bad_data_is_refused(write, tmp_path, data, message):
    with pytest.raises(lm.ConfigError, match=message):
        parse_adaptive(write(models=entry(tmp_path, **data)))


def test_values_are_those_of_the_nearest_scope(write, tmp_path):
    models = entry(tmp_path)
    models[0]["parameters"] = {"weight": 0.7}
    found = parse_adaptive(write(models=models, parameters={"weight": 0.4, "steps": 7}))
    assert [task.parameters["weight"] for task in found.models] == [0.7, 0.4]
    assert found.parameters["steps"] == 7 and found.parameters["learning_rate"] == 1e-3
    assert [task.name for task in found.models] == ["a", "b"]
    models[0]["name"] = "b"
    with pytest.raises(lm.ConfigError, match="two tasks have the name 'b'"):
        parse_adaptive(write(models=models))


def test_only_files_of_one_learning_method_are_taken(write, tmp_path):
    path = tmp_path / "x.yml"
    for text, expected in (
        (json.dumps(write("regmean++")), "regmean++"),
        ("merge_method: ties\nmodels: []", None),
        ("- 1", None),
        ("{", None),
    ):
        path.write_text(text)
        assert adaptive_method(path) == expected
    assert adaptive_method(tmp_path / "gone.yml") is None
    assert not set(METHODS) & set(STATIC)
    with pytest.raises(lm.ConfigError, match="fisher learns from text.*no stage"):
        parse_config(write("fisher"))
    with pytest.raises(lm.ConfigError, match="'adamergin' .did you mean 'adamerging'"):
        parse_config(write("adamergin"))


def test_reading_a_configuration_does_not_load_jax():
    code = "import sys, lm.merging.adaptive; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_what_is_made_has_its_name_only_when_it_is_whole(tmp_path):
    work = Work(tmp_path / "out", {"seed": 0}, resume=False)
    made = []

    def arrays():
        made.append(1)
        if len(made) == 1:
            raise KeyboardInterrupt
        return {"a/b": np.arange(3), "c": np.ones((2, 2))}

    with pytest.raises(KeyboardInterrupt):
        work.arrays("x", arrays)
    assert not (work.folder / "x").exists()
    for _ in range(2):
        found = work.arrays("x", arrays)
        np.testing.assert_array_equal(found["a/b"], [0, 1, 2])
    assert len(made) == 2
    with pytest.raises(lm.ConfigError, match="another process is writing"):
        Work(tmp_path / "out", {"seed": 0}, resume=True)
    work.close()
    assert (tmp_path / ".out.adaptive" / "x").is_dir()
    with pytest.raises(lm.ConfigError, match="another configuration.*seed"):
        Work(tmp_path / "out", {"seed": 1}, resume=True)
    # A folder in which nothing was finished does not stay.
    empty = Work(tmp_path / "other", {"seed": 0}, resume=False)
    empty.close()
    assert not (tmp_path / ".other.adaptive").exists()


def rows(tmp_path, length=8, examples=100, prefix=(), **data):
    value = {
        "merge_method": "adamerging",
        "base_model": "m",
        "models": entry(tmp_path, **data),
    }
    task = parse_adaptive(value).models[0]
    return read_rows(
        task,
        load_tokenizer("byte"),
        list(prefix),
        length=length,
        examples=examples,
        vocab=260,
    )


def test_text_prompts_and_json_lines(tmp_path):
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("abcdefghijk\n\nxyz\n")
    text = rows(tmp_path, prefix=[256])
    assert text.tokens[0].tolist() == [256, *b"abcdefg"] and text.lengths.tolist() == [8, 8, 2]
    prompts = rows(tmp_path, kind="prompts", answers=["0", "1"], prefix=[256])
    assert prompts.tokens[0].tolist() == [256, *b"efghijk"] and prompts.lengths.tolist() == [8, 4]
    assert prompts.answers.tolist() == [48, 49] and prompts.last_only
    assert len(rows(tmp_path, examples=1).tokens) == 1
    (tmp_path / "a.txt").write_text('{"body": "abc"}\n{"body": "defg"}\n')
    lines = rows(tmp_path, kind="jsonl", field="body")
    assert [bytes(r[:n].tolist()) for r, n in zip(*lines[1:3], strict=True)] == [b"abc", b"defg"]
    with pytest.raises(lm.ConfigError, match="a.txt:1 has no text in the field 'text'"):
        rows(tmp_path, kind="jsonl")
    with pytest.raises(lm.ConfigError, match="'no' is 2 tokens, and must be one"):
        rows(tmp_path, kind="prompts", answers=["y", "no"])
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(lm.ConfigError, match="holds no text"):
        rows(tmp_path)


def test_batches_visit_every_row_and_positions_end_at_the_last(tmp_path):
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("\n".join("x" * n for n in range(1, 8)))
    found = rows(tmp_path, kind="prompts")
    plain = found._replace(last_only=False)
    order = [batch_of(plain, s, size=2, positions=3, seed=0, stream=0) for s in range(7)]
    lengths = np.concatenate([b.real.sum(1) for b in order]).astype(int).tolist()
    assert sorted(lengths[:7]) == sorted(lengths[7:]) == list(range(1, 8))
    assert lengths[:7] != lengths[7:]
    for batch in order:
        for index, counts, real in zip(batch.index, batch.counts, batch.real, strict=True):
            n = int(real.sum())
            assert index[-1] == n - 1 and counts[-1] == 1
            assert len(set(index[counts > 0].tolist())) == counts.sum() == min(n, 3)
    only = batch_of(found, 0, size=2, positions=3, seed=0, stream=0)
    assert only.index.shape == (2, 1)


def test_models_that_do_not_fit_are_refused(family, settings, merge, tmp_path):
    models = family(count=2)
    path = settings(models, "fisher", base=False, parameters={"sequence_length": 65})
    with pytest.raises(lm.ConfigError, match="sequence_length is 65, the models' context 64"):
        merge(path)
    other = lm.ModelConfig(**{**vars(models.config), "d_ff": 40})
    shutil.rmtree(tmp_path / "b")
    lm.hf.save(tmp_path / "b", other, lm.init(other, jax.random.key(0)), "byte")
    path = settings(models, "fisher", base=False)
    with pytest.raises(lm.ConfigError, match=r"differ in d_ff \(48 and 40\)"):
        merge(path)
    assert not list(tmp_path.glob(".out*")) and not (tmp_path / "out").exists()


def test_the_command_line(family, settings, tmp_path, capsys):
    from lm.cli.merge import main

    models = family(count=2, num_layers=1)
    path = settings(models, "adamerging", parameters={"steps": 0})

    def run(*words):
        with pytest.raises(SystemExit) as left:
            main([str(path), str(tmp_path / "o"), *words])
        return left.value.code, capsys.readouterr()

    code, said = run("--dry-run")
    assert code == 0 and "task        a:" in said.out and "8 rows" in said.out
    assert not (tmp_path / "o").exists()
    code, said = run("--report")
    assert code == 2 and "--report is for static methods" in said.err
    code, said = run()
    assert code == 0 and (tmp_path / "o" / "merge_manifest.json").is_file(), said.err
    code, said = run()
    assert code == 2 and "holds a finished merge" in said.err
