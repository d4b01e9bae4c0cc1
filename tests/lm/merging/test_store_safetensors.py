"""safetensors files: reading pieces, and every kind of damage."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest

from lm.merging.store import open_store
from lm.merging.store.writer import ShardFiles, make_layout
from lm.merging.types import MergeError, StorageError, TensorInfo

DTYPES = ["float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "int64", "uint8", "bool"]


@pytest.fixture
def tensors(rng):
    values = {f"t.{d}": (rng.random((3, 5)) * 7).astype(np.dtype(d)) for d in DTYPES if ml_dtypes}
    return values | {"scalar": np.float32(2.5), "empty": np.zeros((0, 4), np.float32)}


@pytest.mark.parametrize("shards", [1, 3])
def test_every_dtype_and_every_piece(tmp_path, tools, tensors, shards):
    folder = tools.write_model(tmp_path / "m", tensors, shards)
    store = open_store(str(folder))
    assert store.config["model_type"] == "llama"
    assert set(store.tensors) == set(tensors)
    for name, value in tensors.items():
        value = np.asarray(value)
        info = store.tensors[name]
        assert (info.shape, info.dtype, info.nbytes) == (
            value.shape,
            value.dtype.name,
            value.nbytes,
        )
        flat = value.reshape(-1)
        for start, stop in [(0, flat.size), (0, flat.size // 2), (flat.size // 2, flat.size)]:
            buffer = np.full(200, 255, np.uint8)
            for given in (None, buffer):
                got = store.read(name, start, stop, given)
                assert got.dtype == value.dtype
                np.testing.assert_array_equal(got, flat[start:stop])
        if flat.size:
            assert np.shares_memory(store.read(name, 0, 1, buffer), buffer)


def test_a_file_of_the_library_is_read(tmp_path, rng):
    numpy = pytest.importorskip("safetensors.numpy")
    tensors = {"a": rng.random((4, 3)).astype(np.float32), "b": np.arange(5)}
    numpy.save_file(tensors, tmp_path / "x.safetensors", {"format": "np"})
    store = open_store(str(tmp_path / "x.safetensors"))
    for name, value in tensors.items():
        np.testing.assert_array_equal(store.read(name), value.reshape(-1))


def test_the_identity_follows_the_file(tmp_path, tools, tensors):
    folder = tools.write_model(tmp_path / "m", tensors)
    before = open_store(str(folder)).identity()
    assert open_store(str(folder)).identity() == before
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data)  # the same bytes, another time
    assert open_store(str(folder)).identity() != before


def _header(content):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text


def _entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


DAMAGED = {
    "empty file": b"",
    "short": b"\0\0\0",
    "header longer than the file": struct.pack("<Q", 5000) + b"{}",
    "absurd header": struct.pack("<Q", 1 << 60) + b"{}",
    "no JSON": _header(b"{nonsense"),
    "no object": _header([1]),
    "not text": _header(b"\xff\xfe{}"),
    "deep": _header(b"[" * 100_000),
    "entry of a wrong kind": _header({"a": 3}),
    "missing field": _header({"a": {"dtype": "F32", "shape": [2]}}) + bytes(8),
    "unknown dtype": _header({"a": _entry(0, 8, dtype="F33")}) + bytes(8),
    "negative": _header({"a": _entry(0, 8, (-2,))}) + bytes(8),
    "fractional": _header({"a": _entry(0, 8, (2.0,))}) + bytes(8),
    "shape and bytes differ": _header({"a": _entry(0, 8, (3,))}) + bytes(8),
    "overlap": _header({"a": _entry(0, 8), "b": _entry(4, 12)}) + bytes(12),
    "gap": _header({"a": _entry(0, 8), "b": _entry(12, 20)}) + bytes(20),
    "cut": _header({"a": _entry(0, 8)}) + bytes(7),
    "trailing": _header({"a": _entry(0, 8)}) + bytes(9),
    "twice": _header(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}'),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_told_with_the_files_name(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    path.write_bytes(DAMAGED[kind])
    with pytest.raises(StorageError, match=r"model\.safetensors") as error:
        open_store(str(tmp_path))
    assert "\n" not in str(error.value)


def test_any_truncation_is_noticed_at_opening(tmp_path, tools, tensors):
    data = tools.safetensors_bytes(tensors)
    path = tmp_path / "model.safetensors"
    for length in [*range(0, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(StorageError, match=r"model\.safetensors"):
            open_store(str(path))


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path, tools):
    folder = tools.write_model(tmp_path / "m", {"a": np.ones(1000, np.float32)})
    store = open_store(str(folder))
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(500)
    with pytest.raises(StorageError, match=r"model\.safetensors ends within a"):
        store.read("a")


def test_missing_pieces_of_a_folder(tmp_path, tools, tensors):
    with pytest.raises(MergeError, match="there is no model at"):
        open_store(str(tmp_path / "nowhere"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(StorageError, match="holds no checkpoint"):
        open_store(str(tmp_path / "bare"))
    folder = tools.write_model(tmp_path / "m", tensors, 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(StorageError, match="lacks model-00002-of-00003"):
        open_store(str(folder))
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(StorageError, match="2 of 3 files"):
        open_store(str(folder))


def test_an_index_that_names_what_is_not_there(tmp_path, tools, tensors):
    folder = tools.write_model(tmp_path / "m", tensors, 2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(StorageError, match=r"00001-of-00002\.safetensors lacks ghost"):
        open_store(str(folder))
    for bad in ("{", "[]", '{"weight_map": {"a": "../x"}}', "{}"):
        index.write_text(bad)
        with pytest.raises(StorageError, match=r"index\.json"):
            open_store(str(folder))


def _outputs(tensors):
    return [
        TensorInfo(name, np.asarray(value).shape, np.asarray(value).dtype.name)
        for name, value in tensors.items()
    ]


@pytest.mark.parametrize("limit", [10**9, 100, 1])
def test_what_is_written_is_read_back(tmp_path, tools, tensors, limit):
    outputs = _outputs(tensors)
    layout = make_layout(outputs, limit, {"format": "pt", "note": "ü"})
    (tmp_path / "work").mkdir()
    files = ShardFiles(tmp_path / "work", layout, outputs)
    for number, value in reversed(list(enumerate(tensors.values()))):
        flat = np.asarray(value).reshape(-1)
        for start in range(flat.size - 1, -1, -1):  # one by one, backwards
            files.write(number, start, flat[start : start + 1])
    files.sync()
    (tmp_path / "out").mkdir()
    files.publish(tmp_path / "out")
    files.close()
    if layout.index:
        (tmp_path / "out" / "model.safetensors.index.json").write_bytes(layout.index)
    for file in (tmp_path / "out").glob("*.safetensors"):
        data = sum(value.nbytes for value in tools.read_output(tmp_path / "out").values())
        assert limit > 100 or file.stat().st_size < data
    store = open_store(str(tmp_path / "out"))
    for name, value in tensors.items():
        np.testing.assert_array_equal(store.read(name), np.asarray(value).reshape(-1))
    library = pytest.importorskip("safetensors")
    for shard in layout.shards:  # the library checks headers strictly
        with library.safe_open(tmp_path / "out" / shard.name, "np") as file:
            assert file.metadata() == {"format": "pt", "note": "ü"}
    if limit == 10**9:
        assert [shard.name for shard in layout.shards] == ["model.safetensors"]
    else:
        assert len(layout.shards) > 3 and layout.index


def test_tensors_lie_at_multiples_of_their_width(tensors):
    outputs = _outputs({"a": np.zeros(3, np.uint8), "b": np.zeros(2), "c": np.zeros(1, np.float32)})
    layout = make_layout(outputs, 10**9, {})
    assert [place % width for (_, place), width in zip(layout.places, (1, 8, 4), strict=True)] == [
        0,
        0,
        0,
    ]
