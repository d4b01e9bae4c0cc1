"""tpu/launch/slurm.sh as Slurm runs it, with stand-ins for srun, scontrol and nvidia-smi."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tpu" / "launch" / "slurm.sh"
SMI = "printf '0, 0\\n1, 0\\n'"
# srun: the health check runs here, as on one node; the training step is another stand-in.
SRUN = 'if [ "$3" = bash ]; then shift 2; exec "$@"; else exec trainer "$@"; fi'


@pytest.fixture
def job(tmp_path, monkeypatch):
    """job(trainer, ...) runs the script in a made-up job; what was called is in `job.calls`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    log = tmp_path / "calls"
    for name in list(os.environ):
        if name.startswith(("SLURM_", "NCCL_", "MAX_REST", "ANISO_", "JAX_")):
            monkeypatch.delenv(name)

    def stub(name, body):
        # The health check is a word of many lines; its first will do.
        record = f'{{ printf "{name}"; printf " %s" "${{@%%$\'\\n\'*}}"; echo; }}'
        program = folder / name
        program.write_text(f"#!/usr/bin/env bash\n{record} >> {shlex.quote(str(log))}\n{body}\n")
        program.chmod(0o755)

    def start(trainer="exit 0", smi=SMI, python="true", words=("tiny", "--steps", "3"), **env):
        for name, body in (
            ("srun", SRUN),
            ("scontrol", "true"),
            ("nvidia-smi", smi),
            ("python", python),
            ("trainer", trainer),
        ):
            stub(name, body)
        return subprocess.Popen(
            ["bash", str(SCRIPT), *words],
            env={
                **os.environ,
                "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
                "PYTHON": str(folder / "python"),
                "RUN": str(tmp_path / "run"),
                "SLURM_JOB_ID": "77",
                "SLURM_JOB_NUM_NODES": "1",
                "SLURM_GPUS_ON_NODE": "2",
                "SLURM_SUBMIT_DIR": str(ROOT),
                **env,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(*arguments, **changes):
        process = start(*arguments, **changes)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def calls(name):
        lines = log.read_text().splitlines() if log.exists() else []
        return [line for line in lines if line.split()[0] == name]

    run.start, run.calls = start, calls
    return run


def test_nodes_are_checked_then_every_task_trains(job, tmp_path):
    code, out, err = job(NCCL_SOCKET_IFNAME="ib0")
    assert code == 0, err
    health, train = job.calls("srun")
    assert health.startswith("srun --ntasks-per-node=1 --ntasks=1 bash -c")
    assert train.startswith("srun --kill-on-bad-exit=0 --wait=300 --label ")
    assert train.endswith(f"scripts/train.py tiny --steps 3 --out {tmp_path}/run --resume")
    assert "NCCL_SOCKET_IFNAME=ib0" in out and "NCCL_DEBUG=WARN" in out
    assert job.calls("scontrol") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"smi": "exit 1"}, "nvidia-smi fails or hangs"),
        ({"smi": "echo 0, 0"}, "nvidia-smi shows 1 GPUs, the job has 2 here"),
        ({"smi": "printf '0, 0\\n1, 12\\n'"}, "uncorrected memory errors on GPU 1"),
        ({"python": "exit 1"}, "cannot import jax"),
        ({"RUN": "/proc/run"}, "cannot write to RUN=/proc/run"),
    ],
)
def test_a_bad_node_ends_the_job_by_name(job, changes, message):
    code, _, err = job(**changes)
    assert code == 69 and f"unhealthy node {os.uname().nodename}: " in err and message in err
    assert "--exclude=NODE" in err
    assert job.calls("trainer") == [] and job.calls("scontrol") == []


@pytest.mark.parametrize(("ended", "again"), [(75, 1), (1, 1), (134, 1), (69, 1), (2, 0), (3, 0)])
def test_what_may_work_again_is_queued_again(job, ended, again):
    code, _, err = job(f"exit {ended}")
    assert job.calls("scontrol") == ["scontrol requeue 77"] * again
    assert code == (0 if again else ended), err
    assert ("would end the same way" in err) == (not again)


def test_restarts_end(job):
    code, _, err = job("exit 75", SLURM_RESTART_COUNT="5", MAX_RESTARTS="5")
    assert code == 75 and "restarted 5 times, not again" in err
    assert job.calls("scontrol") == []


def test_the_warning_of_the_time_limit_reaches_training(job, tmp_path):
    """Slurm signals the batch shell alone; training saves, ends with 75, and is queued again."""
    mark = tmp_path / "running"
    trainer = f"trap 'sleep 0.3; exit 75' TERM; touch {mark}; while :; do sleep 0.05; done"
    process = job.start(trainer)
    deadline = time.monotonic() + 30
    while not mark.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "train.py ended with code 75; requeueing, restart 1" in err
    assert job.calls("scontrol") == ["scontrol requeue 77"]


def test_dry_run_shows_and_runs_nothing(job, tmp_path):
    code, out, err = job(words=["--dry-run", "tiny", "--sample-prompt", "a b"], SLURM_JOB_ID="")
    assert code == 0, err
    assert "nvidia-smi" in out and shlex.split(out.splitlines()[-1])[-5:] == [
        *("--sample-prompt", "a b", "--out", f"{tmp_path}/run", "--resume"),
    ]
    assert job.calls("srun") == []


def test_the_header_asks_slurm_for_what_the_script_needs():
    lines = SCRIPT.read_text().splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if i and not line.startswith("#"))]
    options = {line.split()[1] for line in head if line.startswith("#SBATCH")}
    assert {"--signal=B:TERM@300", "--requeue", "--open-mode=append"} <= options
    tasks = next(o for o in options if o.startswith("--ntasks-per-node")).partition("=")[2]
    assert f"--gpus-per-node={tasks}" in options  # one task for each GPU
