import functools
import shutil
import subprocess
import sys

import pytest

from lm.cli.generate import main


@pytest.fixture
def generate(run_command):
    """Runs the command in this process: (exit code, stdout, stderr)."""
    return functools.partial(run_command, main)


def test_equal_seeds_draw_equal_text(generate, finished):
    first = generate(finished, "the ", "--max-tokens", 20, "--seed", 1)
    assert first[0] == 0 and first[2] == ""
    assert first[1].startswith("the ") and len(first[1]) > len("the \n")
    assert generate(finished, "the ", "--max-tokens", 20, "--seed", 1) == first
    assert generate(finished, "the ", "--max-tokens", 20, "--seed", 2) != first


def test_temperature_zero_ignores_the_seed(generate, finished):
    flags = ["--max-tokens", 12, "--temperature", 0]
    assert generate(finished, "e", *flags) == generate(finished, "e", *flags, "--seed", 9)
    # One candidate leaves nothing to chance either.
    greedy = generate(finished, "e", *flags)
    assert generate(finished, "e", "--max-tokens", 12, "--top-k", 1, "--seed", 4) == greedy


def test_every_name_of_a_checkpoint(generate, finished):
    flags = ["t", "--max-tokens", 8]
    newest = generate(finished, *flags)
    assert generate(finished / "checkpoints", *flags) == newest
    assert generate(finished / "checkpoints" / "00000012", *flags) == newest
    assert generate(finished, *flags, "--step", 12) == newest
    early = generate(finished / "checkpoints" / "00000004", *flags)
    assert early[0] == 0 and early == generate(finished, *flags, "--step", 4)


def test_empty_prompt_begins_a_document(generate, finished):
    code, out, _ = generate(finished, "--max-tokens", 8)
    assert code == 0 and out.strip()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "x"], "nowhere does not exist: give a run folder"),
        (["RUN", "x" * 70, "--max-tokens", 5], "exceed the model's max_context 64"),
        (["RUN", "x", "--max-tokens", 0], "max_tokens must be above 0"),
        (["RUN", "x", "--temperature", -1], "temperature must be 0 or more"),
        (["RUN", "x", "--top-p", 0], "top_p must lie in"),
        (["RUN", "x", "--seed", -1], "seed must lie in"),
        (["RUN", "x", "--topk", 3], "--top-k"),
        (["RUN", "a\udcff"], "the prompt is not valid UTF-8"),
        ([], "STR"),
    ],
)
def test_refused(generate, finished, words, message):
    code, out, err = generate(*(finished if word == "RUN" else word for word in words))
    assert code == 2 and out == "" and message in err


def test_a_reader_that_leaves_is_no_error():
    code = (
        "import os, lm.cli.generate as command\n"
        "def run(args):\n"
        "    while True:\n"
        "        print('text', end='', flush=True)\n"
        "command._run = run\n"
        "command.main(['RUN', 'x'])\n"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with command:
        command.stdout.read(4)
        command.stdout.close()
        assert command.stderr.read() == b""
    assert command.returncode == 0


def test_folder_without_a_run(generate, tmp_path):
    code, _, err = generate(tmp_path, "x")
    assert code == 2 and "holds no run" in err


def test_damaged_checkpoint(generate, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "checkpoints" / "00000012" / "checkpoint.json").write_text("{")
    code, _, err = generate(out, "x", "--step", 12)
    assert code == 4 and "step 12" in err
    before = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert generate(out, "x", "--max-tokens", 5)[0] == 0  # the one before it is good
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == before  # reading only
