import json
import math
import platform
import shlex

import jax
import numpy as np
import pytest

from lm.cli.args import parse_run, run_flags
from lm.train.summary import make_summary, render_summary, write_summary


def summary(**changes):
    config = parse_run(["tiny", "--steps", "100", "--out", "runs/a b"])
    values = dict(
        recipe="tiny",
        out=config.out,
        final_loss=np.float32(1.5),
        eval_loss=1.625,
        bits_per_byte=2.25,
        tokens_per_second=12_345.6,
        params=3_377_408,
        steps=100,
        tokens=409_600,
        seconds=75.2,
        skipped_steps=0,
        device_kind="cpu",
        devices=1,
        train_words=run_flags(config),
    )
    return make_summary(**values | changes)


def test_summary_json_holds_the_contract(tmp_path):
    write_summary(tmp_path / "summary.json", summary())
    read = json.loads((tmp_path / "summary.json").read_text())
    expected = dict(
        final_loss=1.5, eval_loss=1.625, bits_per_byte=2.25, params=3_377_408, steps=100
    )
    assert {k: read[k] for k in expected} == expected
    assert read["tokens_per_second"] == 12_345.6 and read["skipped_steps"] == 0
    assert read["versions"]["python"] == platform.python_version()
    assert read["versions"]["jax"].startswith(jax.__version__)
    assert {"flax", "optax"} <= set(read["versions"]) and read["device_kind"] == "cpu"
    assert read["paths"]["metrics"] == "runs/a b/metrics.jsonl"


def test_resume_command_is_the_same_run():
    python, script, *words = shlex.split(summary()["commands"]["resume"])
    config = parse_run(words)
    assert config.resume and config.out == "runs/a b" and config.steps == 100
    assert words.count("--out=runs/a b") == 1


def test_text_is_one_screen_with_numbers_paths_and_commands():
    text = render_summary(summary())
    lines = text.splitlines()
    assert len(lines) <= 20 and max(map(len, lines)) <= 100
    for part in (
        "3,377,408 parameters",
        "100 steps, 409,600 tokens in 1:15",
        "12,346 tokens/s",
        "1.5000 nats",
        "1.6250 nats",
        "2.2500 bits per byte",
        "runs/a b/loss.png",
        "scripts/generate.py 'runs/a b'",
        "scripts/evaluate.py 'runs/a b'",
        "--resume",
    ):
        assert part in text
    assert "skipped" not in text


@pytest.mark.parametrize("loss,shown", [(None, "not measured"), (math.nan, "NaN nats")])
def test_unknown_and_not_finite_numbers(tmp_path, loss, shown):
    made = summary(eval_loss=loss, skipped_steps=3)
    json.dumps(made, allow_nan=False)
    text = render_summary(made)
    assert shown in text and "3 updates skipped" in text
