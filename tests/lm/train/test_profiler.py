"""Which steps are traced: those of the configuration, and on SIGUSR1 the next ones."""

import os
import signal
from pathlib import Path

import jax
import pytest

from lm.train.config import ProfileConfig, RunConfig
from lm.train.profiler import Profiler


@pytest.fixture
def traced(monkeypatch, tmp_path):
    """traced(profile, signals) runs 20 steps, with a signal before some; the steps traced."""

    def run(profile, signals=()):
        running, steps = [], []
        monkeypatch.setattr(jax.profiler, "start_trace", running.append)
        monkeypatch.setattr(jax.profiler, "stop_trace", running.pop)
        with Profiler(RunConfig(profile=profile), tmp_path) as profiler:
            for step in range(20):
                if step in signals:
                    os.kill(os.getpid(), signal.SIGUSR1)
                profiler.before(step)
                assert running in ([], [str(tmp_path / "profile")])
                steps += [step] if running else []
        assert running == []
        return steps

    return run


def test_window_of_the_configuration(traced):
    assert traced(ProfileConfig(start=3, steps=2)) == [3, 4]
    assert traced(ProfileConfig()) == []
    assert traced(ProfileConfig(start=18, steps=9)) == [18, 19]  # stopped with the run


def test_a_signal_traces_the_next_steps(traced, capsys, tmp_path):
    assert traced(ProfileConfig(on_signal=3), signals=(5, 12)) == [5, 6, 7, 12, 13, 14]
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"process 0 traces steps 6 to 8 into {tmp_path / 'profile'}"


def test_a_signal_during_a_trace_is_ignored(traced):
    assert traced(ProfileConfig(on_signal=4), signals=(5, 7)) == [5, 6, 7, 8]


def test_a_signal_does_not_take_the_window_away(traced):
    profile = ProfileConfig(start=10, steps=2, on_signal=2)
    assert traced(profile, signals=(5,)) == [5, 6, 10, 11]


def test_the_handler_is_put_back_or_never_set(traced):
    before = signal.getsignal(signal.SIGUSR1)
    traced(ProfileConfig(on_signal=3), signals=(5,))
    assert signal.getsignal(signal.SIGUSR1) is before
    with Profiler(RunConfig(profile=ProfileConfig(on_signal=0)), Path()):
        assert signal.getsignal(signal.SIGUSR1) is before
