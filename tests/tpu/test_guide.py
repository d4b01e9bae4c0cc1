"""The commands of docs/clusters.md: launchers take them, and train.py takes what they pass on."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lm import distributed, exit_codes, xla_flags
from lm.cli.args import parse_run

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "clusters.md").read_text()


def commands():
    """Word lists of all commands in the sh blocks, comments and continued lines resolved."""
    blocks = re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def launched(program):
    return [words for words in commands() if any(word.endswith(program) for word in words)]


def dry_run(script, words):
    done = subprocess.run(
        ["bash", str(ROOT / "tpu" / "launch" / script), "--dry-run", *words],
        env=os.environ | {"PROJECT": "p", "ZONE": "z", "RUN": "/shared/run"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def after(words, name):
    return words[next(i for i, word in enumerate(words) if word.endswith(name)) + 1 :]


def test_gpus():
    (words,) = launched("gpus.sh")
    shown = shlex.split(dry_run("gpus.sh", after(words, "gpus.sh")).splitlines()[-1])
    assert parse_run(after(shown, "train.py")).out == "runs/first"


def test_tpu_vms():
    found = launched("tpu_vm.sh")
    assert {words[1] for words in found} == {"create", "train", "logs", "stop", "delete"}
    for words in found:
        shown = dry_run("tpu_vm.sh", words[1:])
        if words[1] == "train":
            remote = re.search(r"scripts/train\.py (.*?) > train\.log", shown)[1]
            config = parse_run(shlex.split(remote.replace("\\\\", "\\")))
            assert config.resume and config.recipe == words[3]


def test_slurm():
    (words,) = launched("slurm.sh")
    shown = dry_run("slurm.sh", after(words, "slurm.sh")).splitlines()[-1]
    config = parse_run(after(shlex.split(shown), "train.py"))
    assert config.out == "/shared/run" and config.resume and config.mesh.fsdp == 32


def test_gke(capsys):
    spec = importlib.util.spec_from_file_location("gke_guide", ROOT / "tpu" / "launch" / "gke.py")
    gke = importlib.util.module_from_spec(spec)
    sys.modules["gke_guide"] = gke
    spec.loader.exec_module(gke)
    (words,) = launched("gke.py")
    gke.main([word for word in after(words, "gke.py") if word != "--apply"])
    made = yaml.safe_load(capsys.readouterr().out)
    pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    config = parse_run(pod["containers"][0]["args"])
    assert config.mesh.fsdp == 64  # all chips of 4x4x4


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"(?<!/)(?:tpu|lm|scripts|tests)/[\w/.]+\.\w+", GUIDE)))
)
def test_files_that_it_names_are_there(name):
    assert (ROOT / name).exists()


def test_numbers_that_it_repeats():
    assert f"code {exit_codes.CLUSTER}" in GUIDE
    bounds = {choice.versions for choice in xla_flags.CHOICES if choice.backend == "tpu"}
    assert all(first in GUIDE and last in GUIDE for first, last in bounds)
    text = Path(distributed.__file__).read_text()
    for name in ("ANISO_JOIN_SECONDS", "ANISO_HEARTBEAT_SECONDS", "ANISO_CLUSTER"):
        assert name in GUIDE and name in text
