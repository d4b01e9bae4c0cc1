"""Flags for overlap: which are chosen, that the user's stand, that the installed XLA knows them."""

import importlib.util
import os
import subprocess
import sys

import pytest

from lm import distributed, xla_flags
from lm.cli import train as cli
from lm.train import loop
from lm.xla_flags import CHOICES, Target, choose, known, set_by_user

GPUS = Target("gpu", 8)
TPUS = Target("tpu", 0, slices=2, libtpu="0.0.48")


def words(backend):
    rows = [choice for choice in CHOICES if choice.backend == backend]
    return [f"--{name}={value}" for row in rows for name, value in row.flags.items()]


def names(target, env=None):
    return [choice.name for choice in choose(target, env or {})[0]]


def test_the_installed_xla_knows_the_gpu_flags():
    """jaxlib parses flags of all its backends, whichever it runs on."""
    assert len(words("gpu")) >= 4
    assert known(words("gpu"))


def test_an_unknown_flag_is_seen_before_it_aborts():
    assert not known(["--xla_gpu_enable_wishful_thinking=true"])


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu (extra tpu)")
def test_the_installed_libtpu_knows_the_tpu_flags():
    code = (
        "from jax.experimental import topologies\n"
        "topologies.get_topology_desc(platform='tpu', topology_name='v5p:2x2x1')\n"
    )
    env = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
    }
    for given, good in ((words("tpu"), True), (["--xla_tpu_wishful_thinking=true"], False)):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | env | {"LIBTPU_INIT_ARGS": " ".join(given)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode == 0) == good, done.stderr


def test_chosen_by_backend_and_number():
    assert names(GPUS) == ["latency_hiding", "pipelined_collectives"]
    assert names(TPUS) == ["pipelined_all_gather", "data_parallel_overlap"]
    assert names(Target("cpu", 8)) == []
    assert choose(Target("gpu", 1), {}) == (
        [],
        {
            "latency_hiding": "one of devices: nothing to overlap",
            "pipelined_collectives": "one of devices: nothing to overlap",
        },
    )
    assert names(Target("tpu", 0, slices=1, libtpu="0.0.48")) == ["pipelined_all_gather"]


@pytest.mark.parametrize("version", ["0.0.45", "0.0.53", "0.1.0", ""])
def test_a_libtpu_that_was_not_checked_gets_none(version):
    chosen, left_out = choose(Target("tpu", 0, slices=2, libtpu=version), {})
    assert chosen == [] and all("0.0.46 to 0.0.52" in reason for reason in left_out.values())


@pytest.mark.parametrize("text", ["--xla_gpu_enable_pipelined_all_reduce=false --a=1", None])
def test_what_the_user_sets_stands(text):
    env = {} if text is None else {"XLA_FLAGS": text}
    chosen, left_out = choose(GPUS, env)
    assert ("pipelined_collectives" in [c.name for c in chosen]) == (text is None)
    if text:
        assert left_out["pipelined_collectives"].endswith("xla_gpu_enable_pipelined_all_reduce")


def test_names_of_flags_in_a_variable():
    assert set_by_user("--xla_a=1  -xla_b=x-y --noxla_c") == {"xla_a", "xla_b", "xla_c", "noxla_c"}


def test_apply_adds_behind_what_is_there(monkeypatch):
    monkeypatch.setattr(xla_flags, "find_target", lambda env: GPUS)
    env = {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=false"}
    report = xla_flags.apply("auto", env)
    added = report["added"]["XLA_FLAGS"]
    assert env["XLA_FLAGS"].split() == [
        "--xla_gpu_enable_latency_hiding_scheduler=false",
        *added,
    ]
    assert len(added) == 3 and list(report["left_out"]) == ["latency_hiding"]
    assert xla_flags.applied is report


def test_off_adds_nothing(monkeypatch):
    monkeypatch.setattr(xla_flags, "find_target", lambda env: GPUS)
    env = {}
    assert xla_flags.apply("off", env)["added"] == {} and env == {}


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_the_command_applies_them(mode, monkeypatch, capsys):
    monkeypatch.setattr(xla_flags, "applied", {})
    monkeypatch.setattr(loop, "train", lambda config: {})
    monkeypatch.setattr(distributed, "initialize", lambda: False)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["tiny", f"--flags={mode}"])
    assert exit_.value.code == 0 and xla_flags.applied["mode"] == mode
    assert capsys.readouterr().err == ""  # nothing is added on a CPU


def test_what_is_added_is_told(monkeypatch, capsys):
    monkeypatch.setattr(xla_flags, "find_target", lambda env: GPUS)
    monkeypatch.setattr(xla_flags, "known", lambda words: True)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_pipelined_all_gather=false")
    monkeypatch.setattr(loop, "train", lambda config: {})
    monkeypatch.setattr(distributed, "initialize", lambda: False)
    with pytest.raises(SystemExit):
        cli.main(["tiny"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "XLA_FLAGS += --xla_gpu_enable_latency_hiding_scheduler=true (--flags off" in line


def test_flags_that_xla_does_not_know_are_left_out(monkeypatch):
    monkeypatch.setattr(xla_flags, "find_target", lambda env: GPUS)
    monkeypatch.setattr(xla_flags, "known", lambda words: False)
    env = {}
    report = xla_flags.apply("auto", env)
    assert env == {} and set(report["left_out"].values()) == {"unknown to the installed XLA"}


def test_flags_can_still_be_set_after_importing_jax():
    """The command imports JAX before it applies them: XLA must not have read its variable yet."""
    code = (
        "import os, jax\n"
        "os.environ['XLA_FLAGS'] = '--xla_gpu_enable_wishful_thinking=true'\n"
        "jax.devices('cpu')\n"
    )
    env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and "wishful_thinking" in done.stderr


def test_backend_without_starting_it():
    assert xla_flags.find_backend({"JAX_PLATFORMS": "cuda,cpu"}) == "gpu"
    assert xla_flags.find_backend({"JAX_PLATFORMS": "tpu"}) == "tpu"
    assert xla_flags.find_backend({"JAX_PLATFORMS": "cpu"}) == "cpu"


def test_every_row_is_sourced():
    for choice in CHOICES:
        assert choice.why and choice.source.startswith("https://") and choice.flags
        assert choice.backend == "gpu" or all(choice.versions)
