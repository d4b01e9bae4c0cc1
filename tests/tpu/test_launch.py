"""The launch scripts, run against stand-ins for gcloud and the rest that record their calls."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "tpu" / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh"))
SMI = "0, H200, 4, 0\n1, H200, 4, 0\n"


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """stub(name, body) puts a program on PATH that records its words, then runs `body` (bash)."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    for name in list(os.environ):
        if name.startswith(("SLURM_", "CUDA_VISIBLE", "XLA_PYTHON", "NCCL_", "MAX_REST", "RUN")):
            monkeypatch.delenv(name)

    def make(name, body="", folder=folder):
        log = tmp_path / f"{name}.calls"
        record = f"printf '%s\\037' \"$@\" '' >> {shlex.quote(str(log))}"  # unit separators
        program = folder / name
        program.write_text(f"#!/usr/bin/env bash\n{record}\n{body}\n")
        program.chmod(0o755)
        return program

    def calls(name):
        log = tmp_path / f"{name}.calls"
        text = log.read_text() if log.exists() else ""
        return [call.split("\037") for call in text.split("\037\037")[:-1]]

    make.calls = calls
    return make


def launch(name, *words, timeout=60, **env):
    return subprocess.run(
        ["bash", str(LAUNCH / name), *words],
        env={**os.environ, **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_and_shellcheck_accept_it(name):
    subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(
            ["shellcheck", "-x", str(LAUNCH / name)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "common.sh"])
def test_help_says_how(name):
    done = launch(name, "--help")
    assert done.returncode == 0 and f"tpu/launch/{name}" in done.stdout
    assert "Environment:" in done.stdout and "set -euo" not in done.stdout


@pytest.mark.parametrize(
    ("name", "words", "env", "message"),
    [
        ("gpus.sh", [], {}, "no recipe"),
        ("gpus.sh", ["--gpu", "1"], {}, "unknown option --gpu"),
        ("gpus.sh", ["--gpus", "all", "tiny"], {}, "--gpus takes numbers like 0,1,2, got 'all'"),
        ("slurm.sh", ["tiny"], {}, "RUN is not set"),
        ("slurm.sh", ["tiny"], {"RUN": "/r"}, "not in a Slurm job"),
        ("slurm.sh", [], {"RUN": "/r"}, "no recipe"),
        (
            "slurm.sh",
            ["--dry-run", "tiny"],
            {"RUN": "/r", "ANISO_HOME": "/nowhere"},
            "no scripts/train.py in /nowhere",
        ),
        ("tpu_vm.sh", ["train", "x", "tiny"], {"PROJECT": "", "ZONE": "z"}, "PROJECT is not set"),
        ("tpu_vm.sh", ["train", "x", "tiny"], {"PROJECT": "p", "ZONE": ""}, "ZONE is not set"),
        ("tpu_vm.sh", ["strat", "x"], {}, "unknown command 'strat'"),
        ("tpu_vm.sh", ["logs", "X!"], {}, "needs the TPU's name, got 'X!'"),
        ("tpu_vm.sh", ["--dry-run", "create", "x"], {"PROJECT": "p", "ZONE": "z"}, "needs --type"),
        (
            "tpu_vm.sh",
            ["--dry-run", "create", "x", "--type", "v9-8"],
            {"PROJECT": "p", "ZONE": "z"},
            "no image is known for --type 'v9-8'",
        ),
    ],
)
def test_what_cannot_work_is_refused(name, words, env, message, stub):
    stub("gcloud")
    done = launch(name, *words, **env)
    assert done.returncode == 2 and message in done.stderr
    assert stub.calls("gcloud") == []


# One machine with GPUs


@pytest.fixture
def python(stub, tmp_path):
    """A stand-in for the interpreter, that shows what it sees of the GPUs."""
    body = 'echo "devices=${CUDA_VISIBLE_DEVICES:-all} share=$XLA_PYTHON_CLIENT_MEM_FRACTION"'
    return str(stub("trainer", body))


def test_gpus_are_checked_then_training_takes_over(stub, python):
    stub("nvidia-smi", f"printf {shlex.quote(SMI)}")
    done = launch("gpus.sh", "--gpus", "1", "tiny", "--sample-prompt", "a b", PYTHON=python)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "devices=1 share=0.92\n"
    assert stub.calls("trainer") == [
        [str(ROOT / "scripts" / "train.py"), "tiny", "--sample-prompt", "a b"]
    ]


@pytest.mark.parametrize(
    ("smi", "code", "message"),
    [
        ("exit 9", 69, "nvidia-smi fails or hangs"),
        ("true", 69, "shows no GPU"),
        ("echo '0, H200, 4, 0'", 2, "there is no GPU 1; nvidia-smi shows: 0"),
        ("printf '0, H200, 4, 0\\n1, H200, 4, 7\\n'", 69, "GPU 1 ( H200) has 7 uncorrected"),
    ],
)
def test_unfit_gpus_stop_it(stub, python, smi, code, message):
    stub("nvidia-smi", smi)
    done = launch("gpus.sh", "--gpus", "0,1", "tiny", PYTHON=python)
    assert done.returncode == code and message in done.stderr
    assert stub.calls("trainer") == []


def test_gpus_without_error_counts_and_with_other_programs(stub, python):
    stub("nvidia-smi", "echo '0, RTX, 20000, [N/A]'")
    done = launch("gpus.sh", "tiny", PYTHON=python)
    assert done.returncode == 0 and "GPU 0 holds 20000 MiB of other programs" in done.stderr


# TPU VMs


needs_git = pytest.mark.skipif(
    not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs a git checkout"
)


@needs_git
def test_tpu_commands_reach_every_host(stub):
    stub("gcloud")
    env = {"PROJECT": "p", "ZONE": "z"}
    done = launch("tpu_vm.sh", "create", "my-tpu", "--type", "v5p-64", "--spot", **env)
    assert done.returncode == 0, done.stderr
    done = launch("tpu_vm.sh", "train", "my-tpu", "tiny", "--sample-prompt", "a 'b", **env)
    assert done.returncode == 0, done.stderr
    done = launch("tpu_vm.sh", "stop", "my-tpu", **env)
    create, copy, install, train, stop = stub.calls("gcloud")
    base = ["compute", "tpus", "tpu-vm"]
    assert create == [
        *(*base, "create", "my-tpu", "--project=p", "--zone=z"),
        *("--accelerator-type=v5p-64", "--version=v2-alpha-tpuv5", "--spot"),
    ]
    assert copy[:4] == [*base, "scp"] and copy[5] == "my-tpu:aniso.tgz"
    assert not Path(copy[4]).exists()  # gone again
    for call in (copy, install, train, stop):
        assert "--worker=all" in call and "--project=p" in call and "--zone=z" in call
    assert "[tpu,data,kernels]" in install[-1]
    assert "ANISO_CLUSTER=tpu" in train[-1] and train[-1].count("--resume") == 1
    assert stop[-1] == "--command=kill -TERM $(cat aniso/train.pid)"


@needs_git
def test_the_copy_holds_the_checkout_as_it_lies(stub, tmp_path):
    stub("gcloud", f'[ "$4" != scp ] || tar tzf "$5" > {tmp_path}/files')
    assert launch("tpu_vm.sh", "setup", "x", PROJECT="p", ZONE="z").returncode == 0
    files = set((tmp_path / "files").read_text().splitlines())
    assert {"scripts/train.py", "lm/distributed.py", "pyproject.toml"} <= files
    assert not any(name.startswith((".git/", ".venv")) for name in files)


@needs_git
def test_what_a_tpu_host_runs_starts_training_once(stub, tmp_path):
    """The host's part of `train`, in a shell of its own with a stand-in for the interpreter."""
    stub("gcloud", f'for w; do :; done; printf %s "${{w#--command=}}" > {tmp_path}/command')
    words = ["tiny", "--sample-prompt", "a 'b"]
    assert launch("tpu_vm.sh", "train", "x", *words, PROJECT="p", ZONE="z").returncode == 0
    (tmp_path / "aniso" / ".venv" / "bin").mkdir(parents=True)
    body = 'echo "$ANISO_CLUSTER"; trap "echo saved; exit 75" TERM; while :; do sleep 0.05; done'
    stub("python", body, folder=tmp_path / "aniso" / ".venv" / "bin")
    remote = ["bash", "-c", (tmp_path / "command").read_text()]
    first = subprocess.run(remote, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert first.returncode == 0, first.stderr
    again = subprocess.run(remote, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert again.returncode == 2 and "a run is going on here" in again.stderr
    pid, log = int((tmp_path / "aniso" / "train.pid").read_text()), tmp_path / "aniso" / "train.log"
    code = (
        "import os, signal, sys, time\n"
        "while 'tpu' not in open(sys.argv[2]).read(): time.sleep(0.02)\n"
        "os.kill(int(sys.argv[1]), signal.SIGTERM)\n"
        "while 'saved' not in open(sys.argv[2]).read(): time.sleep(0.02)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(pid), str(log)], check=True, timeout=30)
    assert stub.calls("python") == [["scripts/train.py", *words, "--resume"]]
