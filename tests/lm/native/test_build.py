"""How the C code is compiled, kept and done without."""

import concurrent.futures
import logging
import os
import subprocess
import sys
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import native


@pytest.fixture
def fresh(compiled, tmp_path, monkeypatch):
    """The folder of an empty cache, and a `library` that looks again, under names of its own: XLA
    keeps the first function of a name. Afterwards everything is as it was."""
    monkeypatch.setenv("ANISO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-O0"))  # compiles faster
    register, call = jax.ffi.register_ffi_target, jax.ffi.ffi_call
    own = lambda name: f"{name}_{tmp_path}"  # noqa: E731
    monkeypatch.setattr(
        jax.ffi, "register_ffi_target", lambda name, *a, **k: register(own(name), *a, **k)
    )
    monkeypatch.setattr(jax.ffi, "ffi_call", lambda name, *a, **k: call(own(name), *a, **k))
    native._library.cache_clear()
    yield tmp_path / "cache" / "native"
    monkeypatch.undo()
    native._library.cache_clear()
    assert native.library() is not None  # the same file, hence the same functions


def works():
    x, w = jnp.arange(6.0).reshape(2, 3), jnp.arange(12.0).reshape(3, 4)
    y = native.few_rows(x, w)
    np.testing.assert_array_equal(y, np.arange(6.0).reshape(2, 3) @ np.arange(12.0).reshape(3, 4))
    return True


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def counting(tmp_path):
    """A compiler that writes a line for each call, and the file of these lines."""
    real, calls = " ".join(native._compiler()), tmp_path / "calls"
    calls.write_text("")
    return script(tmp_path / "count", f'echo call >> "{calls}"\nexec {real} "$@"'), calls


def messages(caplog):
    return [r.getMessage() for r in caplog.records if r.name == native.__name__]


def test_without_a_compiler_there_is_none(fresh, monkeypatch, caplog):
    monkeypatch.setenv("CC", "")
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: None)
    monkeypatch.setenv("PATH", str(fresh.parent))
    with caplog.at_level(logging.DEBUG):
        assert native.library() is None and native.build() is None
    assert messages(caplog) == [], "nothing is wrong with a machine that has no compiler"
    assert not native.takes_few_rows(jnp.ones((1, 4)), jnp.ones((4, 8)))
    assert not native.transpose(np.ones((2, 2), np.float32), np.ones((2, 2), np.float32))
    assert not fresh.exists()


def test_a_compiler_that_is_not_there_is_passed_over(fresh, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler-of-ours")
    assert native.library() is not None and works()


def test_a_compiler_that_fails_is_told_once(fresh, tmp_path, monkeypatch, caplog):
    (tmp_path / "a folder").mkdir()
    failing = script(tmp_path / "a folder" / "cc", 'echo "the $1 has expired" >&2\nexit 1')
    monkeypatch.setenv("CC", f"'{failing}' licence")
    assert native.library() is None and native.library() is None
    (message,) = messages(caplog)
    assert "the licence has expired" in message and "ANISO_NATIVE=0" in message
    with pytest.raises(subprocess.CalledProcessError):
        native.build()
    assert not list(fresh.parent.rglob("*.so"))


def test_what_cannot_be_loaded_is_told(fresh, tmp_path, monkeypatch, caplog):
    text = 'while [ "$1" != -o ]; do shift; done\necho no library > "$2"'
    monkeypatch.setenv("CC", script(tmp_path / "wrong", text))
    assert native.library() is None
    assert len(messages(caplog)) == 1


def test_a_compiler_that_knows_no_tuning_is_enough(fresh, tmp_path, monkeypatch):
    """Of an older kind, or another processor: neither -march=native nor -mcpu=native."""
    real = " ".join(native._compiler())
    refuse = 'for word; do case "$word" in -m*=native) exit 1;; esac; done'
    monkeypatch.setenv("CC", script(tmp_path / "plain", f'{refuse}\nexec {real} "$@"'))
    assert native.library() is not None and works()


def test_the_second_build_compiles_nothing(fresh, tmp_path, monkeypatch):
    compiler, calls = counting(tmp_path)
    monkeypatch.setenv("CC", compiler)
    assert native.build() is not None
    first = calls.read_text()
    assert first.count("call") >= 1
    assert native.build() is not None and native.library() is not None and works()
    assert calls.read_text() == first
    (kept,) = fresh.iterdir()
    assert kept.suffix == ".so", "and no temporary file is left"
    # Other instructions are another library.
    assert native.build(("-DANISO_TEST",)) is not None
    assert calls.read_text() == first + "call\n" and len(list(fresh.iterdir())) == 2


def test_another_source_is_compiled_anew(fresh, tmp_path, monkeypatch):
    compiler, calls = counting(tmp_path)
    monkeypatch.setenv("CC", compiler)
    assert native.build(("-DANISO_TEST",)) is not None
    changed = tmp_path / "transpose.c"
    sources = {source.name: source for source in native._SOURCES}
    changed.write_text(sources["transpose.c"].read_text() + "/* changed */\n")
    monkeypatch.setattr(native, "_SOURCES", list((sources | {changed.name: changed}).values()))
    assert native.build(("-DANISO_TEST",)) is not None
    assert calls.read_text() == "call\n" * 2


@pytest.mark.parametrize("text", [b"", b"garbage", b"\x7fELF garbage"])
def test_a_damaged_file_is_made_anew(fresh, tmp_path, monkeypatch, text):
    assert native.build() is not None
    (first,) = fresh.iterdir()
    # In another folder: a path that this process has loaded once is not read again.
    damaged = tmp_path / "other" / "native" / first.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(text)
    monkeypatch.setenv("ANISO_CACHE", str(tmp_path / "other"))
    assert native.library() is not None and works()
    assert list(damaged.parent.iterdir()) == [damaged]
    assert damaged.stat().st_size == first.stat().st_size


@pytest.mark.parametrize("in_its_place", ["cache", "native"])
def test_a_cache_that_cannot_be_written_is_done_without(fresh, in_its_place, caplog):
    file = fresh if in_its_place == "native" else fresh.parent
    file.parent.mkdir(exist_ok=True)
    file.write_text("a file")
    assert native.library() is not None and works()
    assert file.read_text() == "a file" and messages(caplog) == []


def test_switched_off_and_on(compiled, monkeypatch):
    monkeypatch.setenv("ANISO_NATIVE", "0")
    assert native.library() is None
    monkeypatch.setenv("ANISO_NATIVE", "1")
    assert native.library() is compiled


def test_two_processes_build_at_once(fresh, tmp_path):
    child = "from lm import native; assert native.library()"
    real = " ".join(native._compiler())
    # The first to compile waits for the other: neither finds what the other has made.
    compiler = script(
        tmp_path / "waiting",
        f"""mkdir "{tmp_path}/one" 2>/dev/null || mkdir "{tmp_path}/two"
for i in $(seq 200); do [ -d "{tmp_path}/two" ] && break; sleep 0.1; done
exec {real} "$@" -O0""",
    )

    def run(_):
        return subprocess.run(
            [sys.executable, "-c", child], env=os.environ | {"CC": compiler}, timeout=200
        ).returncode

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == [0, 0]
    assert (tmp_path / "two").is_dir()
    (kept,) = fresh.iterdir()
    assert kept.suffix == ".so"


def test_threads_share_one_library(fresh, tmp_path, monkeypatch):
    compiler, calls = counting(tmp_path)
    monkeypatch.setenv("CC", compiler)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        libraries = list(pool.map(lambda _: native.library(), range(4)))
    assert libraries[0] is not None and len(set(map(id, libraries))) == 1
    assert calls.read_text().count("call") == 1
