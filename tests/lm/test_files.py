import errno
import json
import os
import stat

import pytest

from lm.files import atomic_write_bytes, atomic_write_json, atomic_write_text, explain_os_error


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "value.json"
    atomic_write_json(path, {"a": [1, "ü"]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1, "ü"]}
    atomic_write_text(path, "ü")
    assert path.read_bytes() == "ü".encode()
    assert os.listdir(tmp_path) == ["value.json"]


def test_mode_is_that_of_an_ordinary_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    atomic_write_bytes(tmp_path / "atomic", b"")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")}
    assert len(modes) == 1


def test_failure_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "value"
    path.write_bytes(b"old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["value"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), "disk is full"),
        (
            ValueError("INTERNAL: writing 'x' [OS error 28: No space left on device]"),
            "disk is full",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "permission is denied"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only"),
        (KeyError(), "KeyError"),
    ],
)
def test_explains_the_cause(error, words):
    text = explain_os_error(error)
    assert words in text and "\n" not in text


def test_explanation_names_the_path():
    assert "/x/y" in explain_os_error(PermissionError(errno.EACCES, "Permission denied", "/x/y"))
