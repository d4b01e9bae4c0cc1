import functools
import json
import math
import shutil

import pytest

from lm.cli.evaluate import main
from lm.cli.tokenizer import train_tokenizer
from lm.train.loop import train


@pytest.fixture
def evaluate(run_command, environment, monkeypatch):
    """Runs the command in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("ANISO_CACHE", environment["ANISO_CACHE"])
    return functools.partial(run_command, main)


def test_whole_held_out_text_is_what_the_run_measured(evaluate, tiny_run, tmp_path, rows_of):
    out = tmp_path / "run"
    train(tiny_run(out, eval__batches=1000))
    measured = [row for row in rows_of(out) if "eval_loss" in row][-1]
    code, text, _ = evaluate(out, "--json", "--batch-size", 5)
    values = json.loads(text)
    assert code == 0 and values["step"] == 12 and values["split"] == "valid"
    assert values["loss"] == pytest.approx(measured["eval_loss"], rel=1e-6)
    assert values["bits_per_byte"] == pytest.approx(measured["eval_bits_per_byte"], rel=1e-6)
    assert values["perplexity"] == pytest.approx(math.exp(values["loss"]))


def test_same_batches_as_the_run(evaluate, finished, rows_of):
    measured = [row for row in rows_of(finished) if "eval_loss" in row][-1]
    _, text, _ = evaluate(finished, "--json", "--batch-size", 8, "--batches", 2)
    assert json.loads(text)["loss"] == pytest.approx(measured["eval_loss"], rel=1e-6)
    code, text, _ = evaluate(finished, "--batch-size", 8, "--batches", 2, "--step", 4)
    assert code == 0 and "step 4" in text and "bits per byte" in text
    assert f"{measured['eval_loss']:.4f}" not in text


def test_another_tokenizer_is_refused(evaluate, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "bpe.json").write_text(train_tokenizer(iter(["one text " * 9]), 300))
    config = json.loads((out / "config.json").read_text())
    config["data"]["tokenizer"] = str(tmp_path / "bpe.json")
    (out / "config.json").write_text(json.dumps(config))
    code, _, error = evaluate(out)
    assert code == 2 and "is not the tokenizer" in error and "bpe.json" in error


def test_other_text_is_read_whole(evaluate, finished, tmp_path):
    (tmp_path / "new.txt").write_text("a new text, " * 30)
    code, text, _ = evaluate(finished, "--json", "--data.path", tmp_path / "new.txt")
    values = json.loads(text)
    assert code == 0 and values["split"] == "all"
    assert values["bytes"] == 360 and values["tokens"] == 360
    again = evaluate(
        finished, "--json", f"--data.path={tmp_path / 'new.txt'}", "--data.source=text"
    )
    assert json.loads(again[1])["loss"] == values["loss"]
    _, text, _ = evaluate(finished, "--json", "--split", "train", "--batches", 1)
    assert json.loads(text)["split"] == "train"


def test_the_runs_own_text_named_again_is_what_the_run_held_out(evaluate, finished, corpus):
    own = json.loads(evaluate(finished, "--json")[1])
    named = json.loads(evaluate(finished, "--json", "--data.path", corpus)[1])
    assert (named["split"], named["bytes"], named["loss"]) == ("valid", own["bytes"], own["loss"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["--json", "RUN"], "the run comes first"),
        (["RUN", "--data.path", "/nowhere"], "'/nowhere': no such file"),
        (["RUN", "--data.source", "json"], "data.source json needs data.path"),
        (["RUN", "--sequence-length", "99"], "exceeds the model's max_context 64"),
        (["RUN", "--batch-size", "0"], "batch_size must be above 0"),
        (["RUN", "--splitt", "all"], "--split"),
        ([], "STR"),
    ],
)
def test_refused(evaluate, finished, words, message):
    code, out, err = evaluate(*(finished if word == "RUN" else word for word in words))
    assert code == 2 and out == "" and message in err


def test_missing_step(evaluate, finished):
    code, _, err = evaluate(finished, "--step", 5)
    assert code == 4 and "step 5" in err
