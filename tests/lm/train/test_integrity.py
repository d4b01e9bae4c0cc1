import json
import zlib

import pytest

from lm.train.integrity import MANIFEST, find_damage, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "big").write_bytes(bytes(range(256)) * 40_000)  # more than one block
    (tmp_path / "small").write_bytes(b"123456789")
    (tmp_path / "empty").write_bytes(b"")
    write_manifest(tmp_path)
    return tmp_path


def test_manifest_holds_sizes_and_crc32(folder):
    files = json.loads((folder / MANIFEST).read_text())["files"]
    # 0xCBF43926 is the published check value of CRC-32 for the digits 1 to 9.
    assert files["small"] == {"size": 9, "crc32": 0xCBF43926}
    assert files["empty"] == {"size": 0, "crc32": 0}
    assert files["sub/big"]["crc32"] == zlib.crc32((folder / "sub" / "big").read_bytes())
    assert find_damage(folder) is None


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "name", "word"),
    [
        (lambda path: path.unlink(), "small", "missing"),
        (lambda path: path.write_bytes(b"12345678"), "small", "8 bytes instead of 9"),
        (lambda path: path.write_bytes(b""), "sub/big", "0 bytes"),
        (flip, "sub/big", "checksum"),
        (lambda path: path.write_bytes(b"x"), "empty", "1 bytes instead of 0"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), MANIFEST, "cannot be read"),
        (lambda path: path.write_text("[]"), MANIFEST, "cannot be read"),
    ],
)
def test_names_the_damaged_file(folder, harm, name, word):
    harm(folder / name)
    damage = find_damage(folder)
    assert damage is not None and name in damage and word in damage


def test_contents_limits_what_is_read(folder):
    flip(folder / "sub" / "big")
    assert find_damage(folder, contents=()) is None
    assert find_damage(folder, contents=("small",)) is None
    assert "sub/big" in (find_damage(folder, contents=("sub/big",)) or "")


def test_without_manifest_nothing_is_claimed(folder):
    (folder / MANIFEST).unlink()
    (folder / "small").unlink()
    assert find_damage(folder) is None
