import dataclasses
import itertools
import json
import os
import resource
import shutil

import jax
import numpy as np
import pytest

from lm.config import ConfigError
from lm.train import loop
from lm.train.checkpoint import CheckpointError
from lm.train.config import MeshConfig
from lm.train.goodput import Account
from lm.train.metrics import read_metrics
from lm.train.report import Reporter
from lm.train.timeline import read_timeline


def test_what_a_run_leaves(finished, tiny_run):
    """The contract of a run folder."""
    names = {path.name for path in finished.iterdir()} - {".lock"}
    files = {"config.json", "data.json", "metrics.jsonl", "loss.png", "summary.json"}
    files |= {"environment.json", "timeline.jsonl", "report.html"}
    assert names == files | {"checkpoints"}
    assert (finished / "loss.png").read_bytes()[:4] == b"\x89PNG"
    rows = read_metrics(finished / "metrics.jsonl")
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, 13))
    for row in trained:
        assert row["tokens"] == row["step"] * 8 * 32
        assert {"learning_rate", "grad_norm", "param_norm", "update_norm"} <= row.keys()
        assert {"tokens_per_second", "data_wait_seconds", "memory_bytes"} <= row.keys()
        assert {"grad_norm/attention", "param_norm/mlp", "update_norm/embedding"} <= row.keys()
        assert row["mfu_full"] is None and row["skipped"] == 0  # nobody knows a CPU's peak
        # A byte tokenizer: one token per byte, and one in front of each document.
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / np.log(2), rel=2e-3)
        assert row["bits_per_byte"] > row["loss"] / np.log(2)
        assert row["memory_headroom"] is None  # nor its memory's limit
        spent = {k.partition("/")[2]: v for k, v in row.items() if k.startswith("seconds/")}
        assert row["goodput"] == pytest.approx(spent["step"] / sum(spent.values()), abs=0.01)
    assert trained[-1]["loss"] < trained[0]["loss"] - 0.5
    assert spent["step"] > 0 and spent["compile"] > 0 and spent["init"] > 0
    assert [a["time"] <= b["time"] for a, b in itertools.pairwise(rows)] == [True] * 13
    account = Account(read_timeline(finished / "timeline.jsonl"))
    assert account.seconds()["step"] >= spent["step"] - 1e-3
    assert account.seconds()["evaluation"] > 0 and account.seconds()["checkpoint"] > 0
    assert account.seconds()["other"] < 0.1 * account.total()
    evaluated = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [6, 12]
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == [
        "00000004",
        "00000008",
        "00000012",
    ]
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["final_loss"] == trained[-1]["loss"]
    assert summary["eval_loss"] == evaluated[-1]["eval_loss"]
    assert summary["bits_per_byte"] == evaluated[-1]["eval_bits_per_byte"]
    assert summary["steps"] == 12 and summary["tokens"] == 12 * 8 * 32
    assert summary["tokens_per_second"] > 0
    d, f, v = 32, 64, 264
    assert summary["params"] == 2 * v * d + 2 * (4 * d * d + 3 * d * f + 2 * d) + d


def test_runs_are_functions_of_the_configuration(tiny_run, tmp_path, finished, rows_of, state_of):
    config = tiny_run(tmp_path / "again", log__every=5, data__prefetch=1)
    loop.train(config)
    assert state_of(config.out) == state_of(finished)
    steps = {1, 5, 6, 10, 12}  # the first, every fifth, evaluations, the last
    assert rows_of(config.out) == [
        row
        for row in rows_of(finished)
        if row["step"] in steps and ("eval_loss" in row or row["step"] != 6)
    ]


def test_steps_are_dispatched_ahead(tiny_run, tmp_path, monkeypatch):
    """The device gets step n + 1 before the host waits for the metrics of step n."""
    events = []
    prepare, read = loop.Trainer.__init__, Reporter.step

    def prepared(self, config):
        prepare(self, config)
        step = self.train_step

        def dispatch(state, batch):
            events.append("dispatch")
            return step(state, batch)

        self.train_step = dispatch

    def reading(self, done, *metrics):
        events.append(done)
        return read(self, done, *metrics)

    monkeypatch.setattr(loop.Trainer, "__init__", prepared)
    monkeypatch.setattr(Reporter, "step", reading)
    loop.train(tiny_run(tmp_path / "run", checkpoint__every=8, eval__every=100))
    ahead = {done: events[: events.index(done)].count("dispatch") - done for done in range(1, 13)}
    # What is saved or evaluated has to be known first.
    assert ahead == {done: 0 if done in (8, 12) else 1 for done in range(1, 13)}


def test_step_compiles_once(tiny_run, tmp_path, monkeypatch):
    trainers = []
    opened = loop.Trainer._open
    monkeypatch.setattr(loop.Trainer, "_open", lambda self: (trainers.append(self), opened(self)))
    loop.train(tiny_run(tmp_path / "run"))
    assert trainers[0].train_step._cache_size() == 1
    assert trainers[0].eval_step._cache_size() == 1


@pytest.fixture
def poison(monkeypatch):
    """Makes the batches of some steps give a loss that is not finite."""
    original = loop.Trainer.batch

    def arrange(steps):
        def batch(self, step):
            made = original(self, step)
            if step in steps:
                bad = np.full(made["weights"].shape, np.nan, np.float32)
                made["weights"] = jax.device_put(bad, made["weights"].sharding)
            return made

        monkeypatch.setattr(loop.Trainer, "batch", batch)

    return arrange


def test_bad_steps_are_skipped_and_named(poison, tiny_run, tmp_path, capsys):
    poison({4, 7})
    config = tiny_run(tmp_path / "run", log__every=6)
    summary = loop.train(config)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert {row["step"]: row["skipped_batch"] for row in rows if "skipped_batch" in row} == {
        5: 4,
        8: 7,
    }
    assert [row["step"] for row in rows if "loss" in row] == [1, 5, 6, 8, 12]
    skipped = next(row for row in rows if row["step"] == 5)
    assert np.isnan(skipped["loss"])
    assert summary["skipped_steps"] == 2 and np.isfinite(summary["final_loss"])
    assert (
        "step 5: update skipped (loss nan, gradient norm nan), batch 4" in capsys.readouterr().err
    )


def test_too_many_bad_steps_stop_the_run(poison, tiny_run, tmp_path, monkeypatch, losses_of):
    poison(range(3, 100))
    changes = {"guard__max_consecutive": 3, "checkpoint__every": 100, "eval__every": 100}
    config = tiny_run(tmp_path / "run", **changes)
    with pytest.raises(loop.Diverged, match="4 steps in a row up to step 7 .* step 7 is saved"):
        loop.train(config)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    # Step 7 was on its way when the metrics of step 6 told.
    assert [row["skipped_batch"] for row in rows if "skipped_batch" in row] == [3, 4, 5, 6]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["00000007"]
    monkeypatch.undo()
    loop.train(tiny_run(tmp_path / "run", resume=True, **changes))
    losses, _ = losses_of(config.out)
    assert sorted(losses) == list(range(1, 13)) and np.isfinite(losses[12])


def test_recovery_in_the_step_under_way_is_no_divergence(poison, tiny_run, tmp_path):
    poison({4, 5, 6})  # 7 is accepted before the metrics of 6 are read
    changes = {"guard__max_consecutive": 3, "checkpoint__every": 100, "eval__every": 100}
    summary = loop.train(tiny_run(tmp_path / "run", **changes))
    assert summary["skipped_steps"] == 3


@pytest.fixture
def file_limit():
    """Sets how large a file may grow, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size or soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_the_last_good_checkpoint(
    finished, tmp_path, tiny_run, file_limit, rows_of, state_of
):
    out = shutil.copytree(finished, tmp_path / "run")
    for step in ("00000008", "00000012"):
        shutil.rmtree(out / "checkpoints" / step)
    file_limit(100_000)
    with pytest.raises(CheckpointError, match="step 8.*failed.*step 4 is the last good one"):
        loop.train(tiny_run(out, resume=True))
    file_limit(None)
    # What could not be written may leave a hidden folder, which the next start clears away.
    names = {p.name for p in (out / "checkpoints").iterdir()}
    assert {name for name in names if not name.startswith(".")} == {"00000004"}
    loop.train(tiny_run(out, resume=True))
    assert rows_of(out) == rows_of(finished)
    assert state_of(out) == state_of(finished)


BAD = [
    ({"optim__name": "adamm"}, "optim.name must be one of adamw, muon, .*got 'adamm'"),
    ({"quant__recipe": "fp9"}, "quant.recipe must be one of none.*'fp9'"),
    ({"model__mlp": "swigluu"}, "model.mlp must be one of swiglu, gelu.*'swigluu'"),
    ({"model__attention": "flsh"}, "model.attention must be one of .*dense.* got 'flsh'"),
    ({"model__loss": "chunkt"}, "model.loss must be one of .*chunked.* got 'chunkt'"),
    ({"model__attention": "cudnn"}, "cudnn.*segment ids.*use 'xla'"),
    ({"model__loss": "tokamax"}, "tokamax.*needs a TPU"),
    ({"model__vocab_size": 256}, "the tokenizer has 257 ids but model.vocab_size is 256"),
    ({"data__tokenizer": "/nowhere/tokenizer.json"}, "no file /nowhere/tokenizer.json"),
    ({"mesh": MeshConfig(data=3)}, "each micro-batch has 8 sequences.*3 devices do not divide"),
    ({"mesh": MeshConfig(data=16)}, "the mesh .* needs 16 devices and there are 8"),
    ({"mesh": MeshConfig(data=1, tensor=4)}, "mesh.tensor = 4 does not divide model.num_heads = 2"),
    ({"micro_batches": 8, "mesh": MeshConfig(data=2)}, "each micro-batch has 1 sequences"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda value: str(value)[:40])
def test_what_cannot_work_is_refused_first(changes, message, tiny_run, tmp_path, monkeypatch):
    def expensive(*args, **kwargs):
        raise AssertionError("tokenized before all was checked")

    monkeypatch.setattr(loop, "open_stores", expensive)
    with pytest.raises(ConfigError, match=message):
        loop.train(tiny_run(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_optional_packages_are_asked_for_first(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'aniso\[tensorboard\]'"):
        loop.train(tiny_run(tmp_path / "run", log__tensorboard=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__path": "/nowhere"}, "'/nowhere': no such file, folder or glob match"),
        ({"data__valid_path": "/elsewhere"}, "'/elsewhere': no such file, folder or glob match"),
        ({"data__path": "small"}, "small holds .* tokens, too few for one row"),
    ],
)
def test_unusable_text_leaves_no_folder(changes, message, tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    for name in "abcdefgh":
        (tmp_path / "small" / name).write_text(name)
    with pytest.raises(ConfigError, match=message):
        loop.train(tiny_run(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_sample_fits_into_the_context(finished, tiny_run):
    trainer = loop.Trainer(tiny_run(finished, resume=True, sample_prompt="e" * 62))
    with trainer.checkpoints:
        assert 62 <= len(trainer.sample()) <= 63
        trainer.config = dataclasses.replace(trainer.config, sample_prompt="e" * 63)
        assert trainer.sample() == ""
    trainer.folder.close()


def test_sample_that_does_not_fit_costs_no_summary(tiny_run, tmp_path, monkeypatch, capsys):
    def sample(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\ndetails")

    monkeypatch.setattr(loop.Trainer, "sample", sample)
    summary = loop.train(tiny_run(tmp_path / "run", sample_prompt="the "))
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert "sample" not in summary["paths"]
    assert capsys.readouterr().err.strip() == "no sample: RESOURCE_EXHAUSTED: out of memory"


def test_profile_window(tiny_run, tmp_path):
    loop.train(tiny_run(tmp_path / "run", profile__start=2, profile__steps=2))
    traces = [p for p in (tmp_path / "run" / "profile").rglob("*") if p.is_file()]
    assert any(os.path.getsize(p) > 0 for p in traces)
