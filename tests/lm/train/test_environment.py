"""environment.json: what a run ran on, written anew only when it changed."""

import itertools
import json
import os
import subprocess
import types

import jax
import pytest
from jax.sharding import AxisType

from lm import xla_flags
from lm.train import environment


@pytest.fixture
def mesh():
    return jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_recorded(mesh, tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("JAX_API_TOKEN", "hush")
    monkeypatch.setenv("UNRELATED", "1")
    monkeypatch.setattr(xla_flags, "applied", {"mode": "auto", "added": {"XLA_FLAGS": ["--a=1"]}})
    environment.record(tmp_path, mesh)
    text = (tmp_path / "environment.json").read_text()
    found = json.loads(text)
    assert found["devices"]["count"] == 8 and found["devices"]["kind"] == "cpu"
    assert found["mesh"] == {"data": 4, "fsdp": 2}
    assert found["versions"]["jax"].startswith(jax.__version__)
    assert found["flags"]["added"] == {"XLA_FLAGS": ["--a=1"]}
    assert found["flags"]["XLA_FLAGS"] == os.environ.get("XLA_FLAGS", "")
    assert found["variables"]["NCCL_DEBUG"] == "WARN"
    assert "hush" not in text and "UNRELATED" not in text
    assert found["hosts"] == [{"process": 0, "host": os.uname().nodename, "devices": 8}]


def test_how_chips_are_wired():
    chip = types.SimpleNamespace
    places = itertools.product(range(2), range(2), range(4), range(2))
    found = [chip(coords=(x, y, z), slice_index=s) for x, y, z, s in places]
    assert environment.topology(found) == {"topology": "2x2x4", "slices": 2}
    assert environment.topology([chip(coords=None), chip()]) == {}


def test_once_more_only_if_it_changed(mesh, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    environment.record(tmp_path, mesh)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    environment.record(tmp_path, mesh)
    assert names(tmp_path) == ["environment.json"]
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    environment.record(tmp_path, mesh)
    environment.record(tmp_path, mesh)
    assert names(tmp_path) == ["environment-2.json", "environment.json"]
    (tmp_path / "environment-2.json").write_text("{")  # a damaged one is kept
    environment.record(tmp_path, mesh)
    assert names(tmp_path) == ["environment-2.json", "environment-3.json", "environment.json"]
    assert environment.newest(tmp_path)[1]["variables"]["NCCL_DEBUG"] == "INFO"


@pytest.fixture
def checkout(tmp_path):
    def git(*words):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b@c", *words],
            check=True,
            capture_output=True,
        )

    git("init", "--quiet")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "--quiet", "--message", "a")
    return tmp_path


def test_state_of_the_code(checkout):
    clean = environment.git_state(checkout)
    assert len(clean["commit"]) == 40 and not clean["dirty"] and clean["changed"] == []
    (checkout / "a.py").write_text("2")
    dirty = environment.git_state(checkout)
    assert dirty["commit"] == clean["commit"] and dirty["changed"] == ["a.py"] and dirty["dirty"]


def test_code_without_a_checkout(checkout, monkeypatch):
    installed = checkout / "site-packages"  # inside of a checkout that is not ours
    installed.mkdir()
    monkeypatch.delenv("ANISO_COMMIT", raising=False)
    assert environment.git_state(installed) == {"commit": None, "dirty": False}
    monkeypatch.setenv("ANISO_COMMIT", "abc123-dirty")
    assert environment.git_state(installed) == {"commit": "abc123", "dirty": True}
