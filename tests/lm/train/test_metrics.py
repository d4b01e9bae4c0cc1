import errno
import io
import json
import math
import os
import signal
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from lm.train.metrics import (
    MetricsLog,
    Progress,
    ThroughputMeter,
    format_seconds,
    jsonable,
    read_metrics,
)
from lm.train.plot import loss_curve, smoothed


def write(path, *rows, **options):
    with MetricsLog(path, **options) as log:
        for row in rows:
            log.write(row)


def strict_json(line):
    def refuse(name):
        raise ValueError(name)

    return json.loads(line, parse_constant=refuse)


def test_rows_round_trip(tmp_path):
    path = tmp_path / "metrics.jsonl"
    row = {
        "step": np.int64(10),
        "loss": np.float32(2.5),
        "grad_norm/attention": jnp.asarray(0.25, jnp.bfloat16),
        "mfu_full": None,
        "skipped": 0,
    }
    write(path, row, {"step": 10, "eval_loss": 2.0})
    assert read_metrics(path) == [
        {"step": 10, "loss": 2.5, "grad_norm/attention": 0.25, "mfu_full": None, "skipped": 0},
        {"step": 10, "eval_loss": 2.0},
    ]


def test_non_finite_numbers_stay_valid_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = {"a": math.nan, "b": math.inf, "c": -np.float32(np.inf), "d": jnp.nan}
    write(path, {"step": 1, **values})
    assert strict_json(path.read_text())["b"] == "Infinity"
    (row,) = read_metrics(path)
    assert math.isnan(row["a"]) and math.isnan(row["d"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)


@pytest.mark.parametrize("key", ["Loss", "grad norm", "grad_norm/", "", "/x", 3, "a\n"])
def test_bad_keys_are_named(tmp_path, key):
    with pytest.raises(ValueError, match="metric name"):
        write(tmp_path / "m", {"step": 1, key: 1.0})
    assert (tmp_path / "m").read_bytes() == b""


@pytest.mark.parametrize("value", [[1.0], np.zeros(2), jnp.ones((1, 2)), {}, object()])
def test_bad_values_are_named(tmp_path, value):
    with pytest.raises(TypeError, match="metric loss"):
        write(tmp_path / "m", {"step": 1, "loss": value})


@pytest.mark.parametrize("row", [{}, {"step": 1.0}, {"step": True}, {"step": -1}, {"step": "1"}])
def test_a_row_needs_a_step(tmp_path, row):
    with pytest.raises(ValueError, match="step"):
        write(tmp_path / "m", row)


def test_steps_do_not_go_back(tmp_path):
    with pytest.raises(ValueError, match="at least 5"):
        write(tmp_path / "m", {"step": 5}, {"step": 4})


def test_an_old_run_is_not_overwritten(tmp_path):
    path = tmp_path / "m"
    write(path, {"step": 1})
    with pytest.raises(FileExistsError, match="already holds a run"):
        MetricsLog(path)
    assert read_metrics(path) == [{"step": 1}]


@pytest.mark.parametrize("tail", [b"", b'{"step": 31, "lo', b"\0\0\0"])
def test_resume_drops_later_rows_and_a_torn_line(tmp_path, tail):
    path = tmp_path / "m"
    write(path, *({"step": s, "loss": float(s)} for s in (10, 20, 20, 30)))
    with open(path, "ab") as file:
        file.write(tail)
    assert [r["step"] for r in read_metrics(path)] == [10, 20, 20, 30]
    write(path, {"step": 25}, resume_step=20)
    assert [r["step"] for r in read_metrics(path)] == [10, 20, 20, 25]
    assert os.listdir(tmp_path) == ["m"]


def test_resume_without_checkpoint_drops_everything(tmp_path):
    path = tmp_path / "m"
    write(path, {"step": 0, "eval_loss": 5.0}, {"step": 3})
    write(path, {"step": 0}, resume_step=-1)
    assert read_metrics(path) == [{"step": 0}]


def test_resume_of_a_missing_file_starts_one(tmp_path):
    write(tmp_path / "m", {"step": 8}, resume_step=7)
    assert read_metrics(tmp_path / "m") == [{"step": 8}]


@pytest.mark.parametrize("line", [b"nonsense", b"[1]", b'{"loss": 1}', b""])
def test_damage_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "m"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)
    with pytest.raises(ValueError, match="line 2"):
        MetricsLog(path, resume_step=1)
    assert path.read_bytes().count(b"\n") == 3


def test_rows_survive_sigkill(tmp_path):
    path = tmp_path / "m"
    code = (
        "import os, signal, sys\n"
        "from lm.train.metrics import MetricsLog\n"
        "log = MetricsLog(sys.argv[1])\n"
        "for step in range(50): log.write({'step': step, 'loss': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)])
    assert done.returncode == -signal.SIGKILL
    assert [r["step"] for r in read_metrics(path)] == list(range(50))


def test_a_full_disk_leaves_no_half_row(tmp_path):
    """A limit on file size stands for the full disk: it too cuts a write short."""
    path = tmp_path / "m"
    code = (
        "import resource, signal, sys\n"
        "from lm.train.metrics import MetricsLog\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "log = MetricsLog(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (110, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    for step in range(50): log.write({'step': step, 'loss': 1.0})\n"
        "except OSError as error: print(error.errno, step, log.last_step)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    code, step, last = map(int, done.stdout.split())
    assert code in (errno.ENOSPC, errno.EFBIG)
    rows = read_metrics(path)
    assert [r["step"] for r in rows] == list(range(step)) and last == step - 1
    assert path.read_bytes().endswith(b"}\n") and path.stat().st_size < 110


def test_tensorboard_gets_the_finite_numbers(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, folder, **options):
            calls.append((folder, options))

        def add_scalar(self, *args, **options):
            calls.append((args, options))

        def close(self):
            calls.append("closed")

    fake = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    row = {"step": 3, "loss": np.float32(1.5), "x": math.nan, "mfu_full": None}
    write(tmp_path / "m", row, resume_step=2, tensorboard=tmp_path / "tb")
    assert calls == [
        (str(tmp_path / "tb"), {"purge_step": 3}),
        (("loss", 1.5), {"global_step": 3}),
        "closed",
    ]


def test_missing_tensorboard_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ModuleNotFoundError, match=r"aniso\[tensorboard\]"):
        MetricsLog(tmp_path / "m", tensorboard=tmp_path)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_without_a_terminal_prints_short_lines_at_intervals():
    clock, file = Clock(), io.StringIO()
    progress = Progress(100, file=file, line_seconds=10, clock=clock)
    for step in range(1, 101):
        clock.now += 1
        row = {"loss": 2.0, "tokens_per_second": 1234.5} if step % 5 == 0 else None
        progress.update(step, row)
    progress.close()
    lines = file.getvalue().splitlines()
    assert "\r" not in file.getvalue() and len(lines) == 11  # steps 5, 15, ..., 95 and the last
    assert lines[1] == "step 15/100, loss 2.000, 1,234 tokens/s, 1:25 left"
    assert lines[-1].startswith("step 100/100") and all(len(line) < 80 for line in lines)


def test_progress_on_a_terminal_is_one_bar():
    clock, file = Clock(), Terminal()
    progress = Progress(20, initial=10, file=file, clock=clock)
    for step in range(11, 21):
        clock.now += 3
        progress.update(step, {"loss": 1.25, "tokens_per_second": 2000.0})
        if step == 15:
            progress.message("checkpoint saved")
    progress.close()
    text = file.getvalue()
    assert "\r" in text and "checkpoint saved\n" in text
    assert "100%" in text and "step 20/20, loss 1.250, 2,000 tokens/s, 0:00 left" in text


def test_a_terminal_without_width_gets_lines():
    reader, terminal = os.openpty()  # a new pseudo-terminal is 0 columns wide
    with open(reader, "rb", closefd=True) as read, open(terminal, "w") as file:
        progress = Progress(2, file=file)
        progress.update(1, {"loss": 1.5})
        progress.close()
        assert read.peek() == b"step 1/2, loss 1.500\r\n"


def test_progress_can_be_turned_off_but_messages_stay():
    file = io.StringIO()
    progress = Progress(3, enabled=False, file=file)
    progress.update(1, {"loss": 1.0})
    progress.message("stopped")
    progress.close()
    assert file.getvalue() == "stopped\n"


def test_throughput_leaves_pauses_and_compilation_out():
    clock = Clock()
    clock.now += 60  # compilation, before the meter is made
    meter = ThroughputMeter(clock)
    for _ in range(4):
        clock.now += 0.5
        meter.add(1000)
    with meter.pause():
        clock.now += 30
    assert meter.read() == {"tokens_per_second": 2000.0, "step_seconds": 0.5}
    with pytest.raises(KeyError), meter.pause():  # a pause ends on an error too
        clock.now += 7
        raise KeyError
    clock.now += 1
    meter.add(500)
    assert meter.read() == {"tokens_per_second": 500.0, "step_seconds": 1.0}
    clock.now += 50
    assert meter.read() == {}
    assert (meter.total_tokens, meter.total_seconds) == (4500, 3.0)
    assert meter.tokens_per_second == 1500.0


def test_throughput_before_the_first_step_is_unknown():
    assert ThroughputMeter(Clock()).tokens_per_second is None


@pytest.mark.parametrize("seconds,text", [(5, "0:05"), (75, "1:15"), (3675, "1:01:15")])
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_jsonable_refuses_what_is_no_scalar():
    with pytest.raises(TypeError, match="shape"):
        jsonable(np.zeros(3))


RUN = [
    {"step": s, "tokens": 4096 * s, "loss": 5.0 - s / 100, "skipped": int(s > 150)}
    for s in range(10, 301, 10)
]
PLOTS = {
    "full run": RUN + [{"step": 300, "tokens": 4096 * 300, "eval_loss": 2.1}],
    "one row": [{"step": 1, "tokens": 4096, "loss": 5.0}],
    "first row only": [{"step": 0, "tokens": 0, "eval_loss": 5.0}],
    "no evaluation": RUN,
    "nan": [{**r, "loss": math.nan if r["step"] > 200 else r["loss"]} for r in RUN],
    "all nan": [{**r, "loss": math.nan} for r in RUN],
    "empty": [],
}


@pytest.mark.parametrize("name", PLOTS)
def test_loss_curve_is_drawn(tmp_path, name):
    path, png = tmp_path / "m", tmp_path / "loss.png"
    write(path, *PLOTS[name])
    loss_curve(path, png)
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 5000
    assert sorted(os.listdir(tmp_path)) == ["loss.png", "m"]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """A function that draws rows and gives the axes and its lines by label, not the pixels."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (figures.append(f), save(f, *a, **k)))

    def draw(rows):
        write(tmp_path / "m", *rows)
        loss_curve(tmp_path / "m", tmp_path / "loss.png")
        (axes,) = figures[-1].axes
        return axes, {line.get_label().split(" (")[0]: line.get_xydata() for line in axes.lines}

    return draw


def test_loss_curve_leaves_out_what_is_not_finite(drawn):
    _, lines = drawn([{**r, "loss": math.inf if r["step"] == 100 else r["loss"]} for r in RUN])
    assert len(lines["training"]) == len(RUN) - 1
    assert np.isfinite(lines["training, smoothed"]).all()


def test_loss_curve_shows_what_it_should(drawn):
    axes, lines = drawn(PLOTS["full run"])
    np.testing.assert_allclose(lines["training"][:, 1], [r["loss"] for r in RUN])
    assert len(lines["training, smoothed"]) == len(RUN)
    np.testing.assert_allclose(lines["held out"], [[4096 * 300, 2.1]])
    np.testing.assert_allclose(lines["update skipped"][:, 0], [4096 * 160])
    (upper,) = axes.child_axes
    np.testing.assert_allclose(upper.get_xlim(), np.array(axes.get_xlim()) / 4096, rtol=1e-6)


def test_smoothing_is_a_centred_moving_average():
    line = tuple(range(200))
    assert smoothed(line)[:195] == pytest.approx(line[:195])  # a straight line has no lag
    assert smoothed((1.0, 2.0)) == [1.0, 2.0]
    noisy = tuple(1.0 + 0.5 * (-1) ** i for i in range(200))
    np.testing.assert_allclose(smoothed(noisy)[5:195], 1.0, atol=0.5 / 11 + 1e-9)
