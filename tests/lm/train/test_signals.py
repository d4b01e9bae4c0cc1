import os
import shutil
import signal

import pytest

from lm.train import loop
from lm.train.report import Reporter
from lm.train.signals import StopSignals


def test_first_signal_is_remembered_second_acts():
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as signals:
        assert not signals.stop_after(1)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.stop_after(2)
        assert signals.received is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def signal_at(monkeypatch):
    """Makes the coming run send itself a signal when the metrics of a step are read."""

    def arrange(step, kind):
        original = Reporter.step

        def patched(self, done, *metrics):
            if done == step:
                os.kill(os.getpid(), kind)
            return original(self, done, *metrics)

        monkeypatch.setattr(Reporter, "step", patched)

    return arrange


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_stopped_run_saves_and_continues_bitwise(
    kind, signal_at, tiny_run, tmp_path, finished, rows_of, state_of, monkeypatch
):
    with monkeypatch.context():
        signal_at(5, kind)
        with pytest.raises(
            loop.Stopped, match=f"{kind.name} after step 6; the state is saved"
        ) as e:
            loop.train(tiny_run(tmp_path / "run"))
    assert e.value.signal is kind
    # Step 6 evaluates, but who is told to stop has no time for it.
    stopped = rows_of(tmp_path / "run")
    assert [row["step"] for row in stopped] == [1, 2, 3, 4, 5, 6]
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "00000004",
        "00000006",
    ]
    monkeypatch.undo()
    loop.train(tiny_run(tmp_path / "run", resume=True))
    assert rows_of(tmp_path / "run") == rows_of(finished)
    assert state_of(tmp_path / "run") == state_of(finished)


def test_signal_at_the_last_step(signal_at, tiny_run, tmp_path, finished, rows_of, monkeypatch):
    """The run stops after its last step; the resumed one has only to evaluate and sum up."""
    out = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "00000012")
    signal_at(11, signal.SIGTERM)
    with pytest.raises(loop.Stopped, match="after step 12"):
        loop.train(tiny_run(out, resume=True))
    assert not any(row["step"] == 12 and "eval_loss" in row for row in rows_of(out))
    monkeypatch.undo()
    summary = loop.train(tiny_run(out, resume=True))
    assert rows_of(out) == rows_of(finished)
    assert summary["eval_loss"] == rows_of(finished)[-1]["eval_loss"]
