"""Two processes on this machine train one model."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm.cli.args import run_flags
from lm.train.config import MeshConfig
from lm.train.loop import train
from lm.train.timeline import read_timeline

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"


@pytest.fixture
def start_two(environment, tmp_path):
    """A function that starts train.py in two processes of two devices each."""
    processes = []

    def start(words):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for index in range(2):
            env = environment | {
                "JAX_NUM_CPU_DEVICES": "2",
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            }
            with (
                open(tmp_path / f"{index}.out", "w") as out,
                open(tmp_path / f"{index}.err", "w") as err,
            ):
                processes.append(
                    subprocess.Popen(
                        [sys.executable, str(SCRIPT), *words], env=env, stdout=out, stderr=err
                    )
                )
        return processes

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_two_train_stop_together_and_one_goes_on(start_two, tiny_run, tmp_path, losses_of):
    changes = {"steps": 60, "eval__every": 30, "checkpoint__every": 1000}
    out = tmp_path / "run"
    two = tiny_run(out, mesh=MeshConfig(data=2, fsdp=2), **changes)
    processes = start_two(run_flags(two))
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes), [
            (tmp_path / f"{i}.err").read_text() for i in range(2)
        ]
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)  # told to one, obeyed by both
    codes = [p.wait(timeout=120) for p in processes]
    errors = [(tmp_path / f"{i}.err").read_text() for i in range(2)]
    assert codes == [75, 75], errors
    assert all("stopped by SIGTERM after step" in text for text in errors)
    saved = [int(name) for name in os.listdir(out / "checkpoints")]
    assert len(saved) == 1 and 3 <= saved[0] < 60
    steps = [line for line in metrics.read_text().splitlines() if '"loss"' in line]
    assert len(steps) == saved[0]  # written once, by process 0
    last = json.loads(steps[-1])
    assert last["hosts/slowest"] in (0, 1) and last["hosts/behind"] <= 2
    assert 0 < last["hosts/busy_seconds_median"] <= last["hosts/busy_seconds_max"]
    hosts = json.loads((out / "environment.json").read_text())["hosts"]
    assert [(host["process"], host["devices"]) for host in hosts] == [(0, 2), (1, 2)]
    events = read_timeline(out / "timeline.jsonl")
    assert events[0]["hosts"] == 2 and "stopped by SIGTERM" in events[-1]["reason"]

    train(tiny_run(out, resume=True, **changes))
    train(tiny_run(tmp_path / "alone", **changes))
    for mine, theirs in zip(losses_of(out), losses_of(tmp_path / "alone"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
