import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from lm import exit_codes
from lm.cli import train as cli
from lm.cli.args import run_flags
from lm.train import loop
from lm.train.report import Reporter

ROOT = Path(__file__).parents[3]


@pytest.fixture
def command(capsys):
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def call(words):
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return call


def test_from_text_to_summary_and_back(
    finished, environment, tiny_run, tmp_path, rows_of, state_of
):
    """The script as a user runs it: train, SIGTERM, resume; it ends as if never interrupted."""
    out, codes, texts = tmp_path / "run", [], []
    changes = {"data__cache": str(tmp_path / "cache"), "log__progress": True}
    words = [*run_flags(tiny_run(out, sample_prompt="the ", **changes)), "--resume"]
    for stopped in (True, False):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "train.py"), *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if stopped:
            metrics = out / "metrics.jsonl"
            while process.poll() is None and not (metrics.exists() and metrics.read_bytes()):
                time.sleep(0.005)
            process.send_signal(signal.SIGTERM)
        texts.append(process.communicate(timeout=120))
        codes.append(process.returncode)
    assert codes == [exit_codes.PREEMPTED, exit_codes.OK], texts
    assert "tokenizing " in texts[0][1] and "stopped by SIGTERM after step" in texts[0][1]
    # Nothing but progress on stderr, and the sample and the summary on stdout.
    for errors, told in ((texts[0][1], "stopped by "), (texts[1][1], "step ")):
        lines = [part.strip() for part in errors.replace("\r", "\n").splitlines() if part.strip()]
        strange = [p for p in lines if not p.startswith(("step ", "tokenizing ")) and told not in p]
        assert lines and not strange
    assert texts[0][0] == "" and texts[1][0].startswith("the ")
    for name in ("config.json", "metrics.jsonl", "summary.json", "loss.png", "sample.txt"):
        assert str(out / name) in texts[1][0]
    assert texts[1][0].rstrip().endswith("--resume")  # the last line: how to go on
    assert rows_of(out) == rows_of(finished)
    assert state_of(out) == state_of(finished)


def test_refused_in_one_line(command, tiny_run, tmp_path):
    words = run_flags(tiny_run(tmp_path / "run"))
    for flags, message in [
        (["--optim.scheduel", "wsd"], "unknown flag --optim.scheduel: did you mean"),
        (["--steps", "0"], "--steps must be"),
        (["--model.attention", "flsh"], "model.attention must be one of"),
        (["--data.path", "/nowhere"], "'/nowhere': no such file, folder or glob match"),
        (["--mesh.tensor", "3"], "does not divide"),
    ]:
        code, out, err = command([*words, *flags])
        assert (code, out) == (exit_codes.USAGE, ""), flags
        lines = [line for line in err.splitlines() if "tokenizing" not in line]
        assert len(lines) == 1 and message in lines[0] and "error: " in lines[0]
        assert not (tmp_path / "run").exists()


def test_existing_run_is_refused(command, finished, tiny_run):
    code, _, err = command(run_flags(tiny_run(finished)))
    assert code == exit_codes.USAGE and "add --resume" in err
    code, _, err = command([*run_flags(tiny_run(finished, seed=5)), "--resume"])
    assert code == exit_codes.USAGE and "seed: 0 != 5" in err


def test_stop_signals_have_codes(command, tiny_run, tmp_path, monkeypatch):
    for kind, expected in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):

        def stepped(self, done, *metrics, kind=kind):
            if done == 1:
                os.kill(os.getpid(), kind)
            return 0

        with monkeypatch.context() as patch:
            patch.setattr(Reporter, "step", stepped)
            code, _, err = command(run_flags(tiny_run(tmp_path / kind.name)))
        assert code == expected
        assert f"stopped by {kind.name} after step 2; the state is saved" in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (loop.Diverged("10 steps in a row"), 3, "error: 10 steps in a row"),
        (
            OSError(28, "No space left on device", "/x/metrics.jsonl"),
            4,
            "/x/metrics.jsonl: the disk",
        ),
    ],
)
def test_ends_have_codes(error, code, message, command, tiny_run, tmp_path, monkeypatch):
    def end(config):
        raise error

    monkeypatch.setattr(loop, "train", end)
    found, out, err = command(run_flags(tiny_run(tmp_path / "run")))
    assert (found, out) == (code, "")
    assert message in err and err.count("\n") == 1


def test_full_disk_is_told_in_one_line(command, finished, tmp_path, tiny_run):
    import resource

    out = shutil.copytree(finished, tmp_path / "run")
    for step in ("00000008", "00000012"):
        shutil.rmtree(out / "checkpoints" / step)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (out / "config.json").stat().st_size + 100
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        code, _, err = command([*run_flags(tiny_run(out)), "--resume"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == exit_codes.STORAGE
    assert "file would exceed the size limit" in err and "--resume continues" in err
    assert err.count("\n") == 1


def test_half_described_cluster_is_refused(command, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    code, _, err = command(run_flags(tiny_run(tmp_path / "run")))
    assert code == exit_codes.USAGE and "JAX_COORDINATOR_ADDRESS" in err


def test_console_commands_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"aniso-train", "aniso-generate", "aniso-evaluate"} <= project["scripts"].keys()
    for target in project["scripts"].values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_importing_warns_of_nothing(environment):
    modules = "lm.cli.train, lm.cli.generate, lm.cli.evaluate, lm.train.loop, lm.train.load"
    code = f"import {modules}"
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, check=True, timeout=60
    )
