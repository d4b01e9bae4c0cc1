"""Two processes on this machine train one model."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time

import pytest

from lm import exit_codes
from lm.cli.args import run_flags
from lm.train.config import MeshConfig
from lm.train.loop import train
from lm.train.timeline import read_timeline

# Imports everything once, then forks two processes for each line of input, before any backend has
# started; answers with their process ids, and with their exit codes when both have ended.
FORKS = """
import json, os, sys
from lm.cli.train import main
import lm.train.loop, lm.train.plot, lm.data.loader, lm.data.store, orbax.checkpoint, grain

while line := sys.stdin.readline():
    job, pids = json.loads(line), []
    for index in range(2):
        pid = os.fork()
        if not pid:
            os.environ |= job["env"] | {"JAX_PROCESS_ID": str(index)}
            for number, name in ((1, "out"), (2, "err")):
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
                os.dup2(os.open(f"{job['logs']}/{index}.{name}", flags), number)
            main(job["words"])
        pids.append(pid)
    print(json.dumps(pids), flush=True)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print(json.dumps(codes), flush=True)
"""


class Two:
    """Starts train.py in two processes of two devices each, time and again."""

    def __init__(self, server, logs):
        self._server, self.logs, self.pids = server, logs, []

    def start(self, words):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        env = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
            "ANISO_HEARTBEAT_SECONDS": "4",
        }
        job = {"env": env, "logs": str(self.logs), "words": words}
        self._server.stdin.write(json.dumps(job).encode() + b"\n")
        self._server.stdin.flush()
        self.pids = self._read()

    def codes(self):
        """Exit codes, once both have ended."""
        codes, self.pids = self._read(), []
        return codes

    def _read(self):
        assert select.select([self._server.stdout], [], [], 120)[0], self.errors()
        return json.loads(self._server.stdout.readline())

    def errors(self):
        return [(self.logs / f"{i}.err").read_text() for i in range(2)]

    def wait_for_rows(self, metrics, count):
        deadline = time.monotonic() + 120
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < count:
            ended = select.select([self._server.stdout], [], [], 0.01)[0]
            assert time.monotonic() < deadline and not ended, self.errors()

    def close(self):
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._server.kill()
        self._server.communicate()


@pytest.fixture
def two(environment, tmp_path):
    server = subprocess.Popen(
        [sys.executable, "-c", FORKS],
        env=environment | {"JAX_NUM_CPU_DEVICES": "2"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    found = Two(server, tmp_path)
    yield found
    found.close()


@pytest.mark.slow
def test_two_survive_a_kill_stop_together_and_one_goes_on(two, tiny_run, tmp_path, losses_of):
    changes = {"steps": 80, "eval__every": 40, "checkpoint__every": 1000}
    disk = {"checkpoint__local_dir": str(tmp_path / "disk"), "checkpoint__local_every": 2}
    out = tmp_path / "run"
    metrics = out / "metrics.jsonl"
    words = run_flags(tiny_run(out, mesh=MeshConfig(data=2, fsdp=2), **changes, **disk))
    two.start(words)
    two.wait_for_rows(metrics, 7)
    os.kill(two.pids[1], signal.SIGKILL)
    begin = time.monotonic()
    assert two.codes() == [exit_codes.CLUSTER, -signal.SIGKILL]
    assert time.monotonic() - begin < 40
    assert "process 0 of 2 stops because process 1 (" in two.errors()[0]
    killed = losses_of(out)[0]

    two.start([*words, "--resume"])
    two.wait_for_rows(metrics, max(killed) + 2)
    os.kill(two.pids[1], signal.SIGTERM)  # told to one, obeyed by both
    assert two.codes() == [exit_codes.PREEMPTED] * 2, two.errors()
    assert "going on from the local checkpoint of step" in two.errors()[0]
    assert all("stopped by SIGTERM after step" in text for text in two.errors())
    resumed = losses_of(out)[0]
    assert {step: resumed[step] for step in killed} == killed  # to the last bit
    saved = [int(name) for name in os.listdir(out / "checkpoints")]
    assert len(saved) == 1 and max(killed) < saved[0] < 80
    assert not any((tmp_path / "disk").iterdir())
    steps = [line for line in metrics.read_text().splitlines() if '"loss"' in line]
    assert len(steps) == saved[0]  # written once, by process 0
    last = json.loads(steps[-1])
    assert last["hosts/slowest"] in (0, 1) and last["hosts/behind"] <= 2
    assert 0 < last["hosts/busy_seconds_median"] <= last["hosts/busy_seconds_max"]
    hosts = json.loads((out / "environment.json").read_text())["hosts"]
    assert [(host["process"], host["devices"]) for host in hosts] == [(0, 2), (1, 2)]
    events = read_timeline(out / "timeline.jsonl")
    starts = [event for event in events if event["kind"] == "start"]
    assert [start["hosts"] for start in starts] == [2, 2] and 4 <= starts[1]["step"] <= max(killed)
    assert "stopped by SIGTERM" in events[-1]["reason"]

    train(tiny_run(out, resume=True, **changes))
    train(tiny_run(tmp_path / "alone", **changes))
    for mine, theirs in zip(losses_of(out), losses_of(tmp_path / "alone"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
