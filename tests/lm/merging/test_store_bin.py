"""PyTorch files: made here with stand-ins for PyTorch's classes, and hostile ones."""

import collections
import io
import os
import pickle
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest

from lm.merging.store import open_store
from lm.merging.store.unpickle import UnsafePickle, load
from lm.merging.types import StorageError

STORAGES = {
    "float32": "FloatStorage",
    "bfloat16": "BFloat16Storage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
}


@pytest.fixture
def save(monkeypatch):
    """torch.save's format: `save(path, {name: Tensor(...)})`; written by the real pickler."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2(*arguments): ...

    def _rebuild_parameter(*arguments): ...

    for function in (_rebuild_tensor_v2, _rebuild_parameter):
        function.__module__, function.__qualname__ = "torch._utils", function.__name__
        setattr(utils, function.__name__, function)
    torch._utils = utils
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)

    class Storage:
        def __init__(self, key, dtype, count):
            self.id = ("storage", getattr(torch, STORAGES[dtype]), key, "cpu", count)

    class Tensor:
        def __init__(self, key, dtype, count, shape, strides, offset=0, parameter=False):
            self.arguments = (Storage(key, dtype, count), offset, shape, strides, False)
            self.arguments += (collections.OrderedDict(),)
            self.parameter = parameter

        def __reduce__(self):
            if self.parameter:
                plain = Tensor.__new__(Tensor)
                plain.__dict__.update(self.__dict__, parameter=False)
                return _rebuild_parameter, (plain, True, collections.OrderedDict())
            return _rebuild_tensor_v2, self.arguments

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return value.id if isinstance(value, Storage) else None

    def save(path, content, storages, compression=zipfile.ZIP_STORED):
        stream = io.BytesIO()
        Pickler(stream, 2).dump(content)
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("archive/data.pkl", stream.getvalue())
            archive.writestr("archive/byteorder", "little")
            for key, values in storages.items():
                archive.writestr(f"archive/data/{key}", np.asarray(values).tobytes())

    save.Tensor = Tensor
    return save


def test_views_ties_and_parameters(tmp_path, save, rng):
    w = rng.standard_normal(24).astype(np.float32)
    h = rng.standard_normal(6).astype(ml_dtypes.bfloat16)
    T = save.Tensor
    content = collections.OrderedDict(
        whole=T("0", "float32", 24, (6, 4), (4, 1)),
        tied=T("0", "float32", 24, (6, 4), (4, 1)),
        turned=T("0", "float32", 24, (4, 6), (1, 4)),
        rows=T("0", "float32", 24, (2, 4), (4, 1), 8, parameter=True),
        columns=T("0", "float32", 24, (6, 2), (4, 1), 1),
        half=T("1", "bfloat16", 6, (6,), (1,)),
        scalar=T("0", "float32", 24, (), (), 5),
        none=T("0", "float32", 24, (0, 4), (4, 1)),
    )
    content._metadata = collections.OrderedDict(version=1)  # as state_dict() has it
    save(tmp_path / "pytorch_model.bin", content, {"0": w, "1": h})
    store = open_store(str(tmp_path))
    assert store.aliases == {"tied": "whole"}
    m = w.reshape(6, 4)
    expected = {
        "whole": m,
        "tied": m,
        "turned": m.T,
        "rows": m[2:4],
        "columns": m[:, 1:3],
        "half": h,
        "scalar": w[5],
        "none": m[:0],
    }
    for name, value in expected.items():
        if name != "tied":
            assert store.tensors[name].shape == value.shape
        flat = np.asarray(value).reshape(-1)
        np.testing.assert_array_equal(store.read(name), flat)
        np.testing.assert_array_equal(store.read(name, 1, 5), flat[1:5]) if flat.size > 5 else None


def test_a_checkpoint_with_the_weights_one_level_down(tmp_path, save):
    tensor = save.Tensor("0", "int64", 3, (3,), (1,))
    content = {"epoch": 3, "lr": 0.1, "state_dict": {"a": tensor}, "names": ["x", None, (1, 2)]}
    save(tmp_path / "last.pt", content, {"0": np.arange(3)})
    np.testing.assert_array_equal(open_store(str(tmp_path / "last.pt")).read("a"), [0, 1, 2])


def test_several_files_with_an_index(tmp_path, save):
    for n in (1, 2):
        tensor = save.Tensor("0", "float32", 2, (2,), (1,))
        save(tmp_path / f"pytorch_model-{n}.bin", {f"t{n}": tensor}, {"0": np.ones(2, "f") * n})
    (tmp_path / "pytorch_model.bin.index.json").write_text(
        '{"weight_map": {"t1": "pytorch_model-1.bin", "t2": "pytorch_model-2.bin"}}'
    )
    store = open_store(str(tmp_path))
    assert store.read("t1").tolist() == [1, 1] and store.read("t2").tolist() == [2, 2]
    tensor = save.Tensor("0", "float32", 2, (2,), (1,))
    save(tmp_path / "pytorch_model-2.bin", {"other": tensor}, {"0": np.ones(2, "f")})
    with pytest.raises(StorageError, match=r"pytorch_model-2\.bin lacks t2"):
        open_store(str(tmp_path))


class _Bomb:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _bombs(target):
    yield "os.system", _Bomb(os.system, f"touch {target}")
    yield "eval", _Bomb(eval, f"open({str(target)!r}, 'w')")
    yield "open", _Bomb(open, str(target), "w")
    yield "nested", {"a": [_Bomb(os.mkdir, str(target))]}
    yield "getattr", _Bomb(getattr, "text", "upper")
    yield "class", collections.Counter("aab")


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickles_that_want_to_run_something_are_refused_and_run_nothing(tmp_path, protocol):
    target = tmp_path / "touched"
    for name, bomb in _bombs(target):
        path = tmp_path / "pytorch_model.bin"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", pickle.dumps({"w": bomb}, protocol))
        with pytest.raises(StorageError, match=r"pytorch_model\.bin: its pickle") as error:
            open_store(str(tmp_path))
        assert "\n" not in str(error.value), name
        assert not target.exists(), name


def test_the_functions_of_tensors_get_no_way_out():
    # _rebuild_parameter of a function name, a state for a name, items of a name
    for data in (
        b"ctorch._utils\n_rebuild_parameter\n(cos\nsystem\ntR.",
        b"cos\nsystem\n}b.",
        b"cos\nsystem\n(X\x01\x00\x00\x00aK\x01u.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nN(S'ls'\ntNtR.",
        b".",
        b"",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff.",
        b"r\xff\xff\xff\xff.",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
    ):
        with pytest.raises(UnsafePickle):
            load(data)


def test_random_damage_never_ends_otherwise(save, tmp_path, rng):
    save(tmp_path / "m.bin", {"a": save.Tensor("0", "float32", 2, (2,), (1,))}, {"0": np.ones(2)})
    data = zipfile.ZipFile(tmp_path / "m.bin").read("archive/data.pkl")
    for _ in range(2000):
        broken = bytearray(data)
        broken[rng.integers(len(data))] = rng.integers(256)
        try:
            load(bytes(broken))
        except UnsafePickle:
            pass


def test_cut_old_compressed_and_lying_files(tmp_path, save):
    tensor = save.Tensor("0", "float32", 8, (8,), (1,))
    path = tmp_path / "m.bin"
    save(path, {"a": tensor}, {"0": np.ones(8, np.float32)})
    good = path.read_bytes()
    for length in range(0, len(good) - 1, 41):
        path.write_bytes(good[:length])
        with pytest.raises(StorageError, match=r"m\.bin"):
            open_store(str(path))
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"rest")
    with pytest.raises(StorageError, match="save it again"):
        open_store(str(path))
    save(path, {"a": tensor}, {"0": np.ones(8, np.float32)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(StorageError, match="compressed"):
        open_store(str(path))
    save(path, {"a": tensor}, {"0": np.ones(3, np.float32)})
    with pytest.raises(StorageError, match="reaches beyond"):
        open_store(str(path))
    save(path, {"a": tensor}, {})
    with pytest.raises(StorageError, match="lacks the data of a"):
        open_store(str(path))
    save(path, {"a": 3}, {})
    with pytest.raises(StorageError, match="holds no tensors"):
        open_store(str(path))
