"""evaluate.py --tasks: flags, table and file; the harness itself is tested in test_harness.py."""

import json

import numpy as np
import pytest

from lm.cli.evaluate import main

RESULTS = {
    "results": {
        "sums": {"alias": "sums", "acc,none": np.float64(0.75), "acc_stderr,none": 0.125},
        "gsm": {"exact_match,strict": 0.5, "exact_match_stderr,strict": "N/A"},
    },
    "n-shot": {"sums": 2, "gsm": 0},
    "config": {"function": len},
}


@pytest.fixture
def harness(monkeypatch, environment):
    """Answers in the harness's place, and keeps what it was asked."""
    monkeypatch.setenv("ANISO_CACHE", environment["ANISO_CACHE"])
    asked = {}

    def run_tasks(answering, tasks, **options):
        asked.update(options, tasks=tasks, model=answering)
        return RESULTS

    monkeypatch.setattr("lm.harness.run_tasks", run_tasks)
    return asked


def test_results_are_shown_and_written_whole(harness, run_command, finished, tmp_path):
    file = tmp_path / "out.json"
    words = ["--tasks", "sums, my.yaml", "--num-fewshot", 2, "--limit", 5, "--batch-size", 3]
    code, out, error = run_command(main, finished, *words, "--output", file)
    assert code == 0, error
    assert harness["tasks"] == ["sums", "my.yaml"]
    assert (harness["num_fewshot"], harness["limit"], harness["chat"]) == (2, 5, False)
    assert harness["model"].scorer.batch_size == 3
    assert harness["model"].scorer.max_length == 64  # the model's context
    assert out.splitlines() == [
        "gsm                      0-shot  exact_match (strict) 0.5000",
        "sums                     2-shot  acc                  0.7500 +- 0.1250",
    ]
    written = json.loads(file.read_text())
    assert written["results"]["sums"]["acc,none"] == 0.75 and written["step"] == 12
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]  # nothing half-written
    code, _, error = run_command(main, finished, "--tasks", "sums", "--output", file)
    assert code == 2 and "is there already: choose another --output" in error
    code, out, _ = run_command(main, finished, "--tasks", "sums", "--json")
    assert json.loads(out)["checkpoint"] == str(finished)


@pytest.mark.parametrize(
    "words,message",
    [
        (["--limit", "5"], "limit is for tasks: name some with --tasks"),
        (["--apply-chat-template"], "apply_chat_template is for tasks"),
        (["--tasks", "x", "--limit", "0"], "limit must be above 0, got 0"),
        (["--tasks", "x", "--num-fewshot", "-1"], "num_fewshot must be 0 or more"),
        (["--tasks", "x", "--data.path", "y"], "--tasks bring their own texts"),
        (["--tasks", "x", "--apply-chat-template"], "the tokenizer byte has no chat template"),
        (["--tasks", "x", "--sequence-length", "65"], "max_length 65 must lie between 1 and"),
        (["--tasks", "x", "--output", "/nowhere/out.json"], "cannot write --output /nowhere"),
    ],
)
def test_what_cannot_work_is_told(harness, run_command, finished, words, message):
    code, out, error = run_command(main, finished, *words)
    assert code == 2 and not out and message in error and error.count("\n") == 1
