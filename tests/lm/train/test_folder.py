import json
import os

import pytest

from lm.config import ConfigError
from lm.train.folder import RunFolder, load_run_config, strict_fields


@pytest.fixture
def claim(tiny_run, tmp_path):
    """Claims of one folder; whatever is left open is closed at the end."""
    opened = []

    def make(out=tmp_path / "run", **changes):
        folder = RunFolder(tiny_run(out, **changes))
        opened.append(folder)
        return folder

    yield make
    for folder in opened:
        folder.close()


def started(folder):
    folder.write_config()
    folder.close()


def test_new_run_then_resumed(claim, tiny_run, tmp_path):
    folder = claim()
    assert not folder.resuming
    assert not (tmp_path / "run" / "config.json").exists()  # nothing is promised yet
    started(folder)
    assert load_run_config(tmp_path / "run") == tiny_run(tmp_path / "run")
    again = claim(resume=True, steps=20, mesh__fsdp=2, log__every=5, model__attention="dense")
    assert again.resuming
    again.write_config()
    assert load_run_config(tmp_path / "run").steps == 20


def test_resume_starts_what_is_not_there(claim):
    assert not claim(resume=True).resuming


def test_out_is_named_after_recipe_and_time(claim, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = claim("")
    assert folder.path.parent.name == "runs" and folder.path.name.startswith("tiny-2")
    assert folder.config.out == str(folder.path)


def test_existing_run_needs_resume(claim):
    started(claim())
    with pytest.raises(ConfigError, match="already holds a run: add --resume"):
        claim()


def test_every_differing_field_is_listed(claim):
    started(claim())
    with pytest.raises(ConfigError) as error:
        claim(resume=True, seed=3, optim__learning_rate=0.5, model__d_ff=128)
    message = str(error.value)
    assert "seed: 0 != 3" in message
    assert "optim.learning_rate: 0.01 != 0.5" in message
    assert "model.d_ff: 64 != 128" in message
    claim(resume=True)  # the refused one does not hold the lock


def test_fields_without_effect_on_the_numbers_are_not_compared(tiny_run):
    a = strict_fields(tiny_run("a"))
    b = strict_fields(tiny_run("b", data__workers=3, checkpoint__keep=9, eval__every=3))
    assert a == b
    assert a != strict_fields(tiny_run("a", data__valid_fraction=0.3))


def test_other_contents_are_refused_and_left_alone(claim, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"holds no run \(it has thesis.tex\)"):
            claim(resume=resume)
    assert os.listdir(tmp_path / "run") == ["thesis.tex"]


def test_what_a_killed_claim_leaves_is_no_obstacle(claim, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / ".config.json-0123456789ab.tmp").touch()
    assert not claim().resuming


def test_one_writer_at_a_time(claim):
    first = claim()
    with pytest.raises(ConfigError, match="another process is training in"):
        claim()
    first.write_config()
    with pytest.raises(ConfigError, match="another process is training in"):
        claim(resume=True)
    first.close()
    assert claim(resume=True).resuming


def test_abandoned_new_folder_is_gone(claim, tmp_path):
    claim().abandon()
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()  # made by the user: it stays
    claim().abandon()
    assert (tmp_path / "run").is_dir()


def test_abandoned_resumed_folder_stays(claim, tmp_path):
    started(claim())
    claim(resume=True).abandon()
    assert (tmp_path / "run" / "config.json").exists()
    claim(resume=True)


def test_lock_file_of_an_abandoned_run_is_no_lock(claim, tmp_path, monkeypatch):
    """Process B opened the lock file that A removes, and C has locked a new one since."""
    import fcntl

    flock = fcntl.flock

    def slow(file, operation):
        flock(file, operation)
        lock = tmp_path / "run" / ".lock"
        lock.rename(tmp_path / "gone")
        lock.touch()

    monkeypatch.setattr(fcntl, "flock", slow)
    with pytest.raises(ConfigError, match="another process is training in"):
        claim()


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/nothing/here"])
def test_place_that_cannot_hold_a_run(claim, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=f"cannot write to --out {out}: .*choose another"):
        claim(out)
    assert (tmp_path / "file").read_text() == "mine"


def test_broken_configuration_is_named(claim, tmp_path):
    started(claim())
    file = tmp_path / "run" / "config.json"
    file.write_text(json.dumps({"steps": 3, "stepps": 4}))
    with pytest.raises(ConfigError, match="config.json cannot be read.*stepps"):
        claim(resume=True)
    with pytest.raises(ConfigError, match="config.json cannot be read.*stepps"):
        load_run_config(tmp_path / "run")
    with pytest.raises(ConfigError, match="holds no run"):
        load_run_config(tmp_path)
