"""The reader of tensors that PyTorch pickled before 2020."""

import io
import pickle
import struct
import sys
import types
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

from benchmarks.pickled_tensors import read

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001


class Storage:
    """One that is pickled by its key."""

    def __init__(self, key, kind, values):
        self.key, self.kind, self.values = key, kind, values


class Pickled:
    """A tensor, in the words of PyTorch."""

    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.parts


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        return ("storage", obj.kind, obj.key, "cpu", len(obj.values), None)


@pytest.fixture
def torch(monkeypatch):
    """Modules that have the names of PyTorch, and nothing else."""
    found: Any = types.ModuleType("torch")
    utils: Any = types.ModuleType("torch._utils")

    def rebuild(*parts):
        raise AssertionError("it must not be called")

    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = rebuild
    for name in ("FloatStorage", "LongStorage", "HalfStorage"):
        setattr(found, name, type(name, (), {"__module__": "torch"}))
    for module in (found, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


def written(path, tensors, storages, version=VERSION):
    """A file as PyTorch wrote it."""
    file = io.BytesIO()
    for x in (MAGIC, version, {"little_endian": True}, tensors, [s.key for s in storages]):
        Pickler(file, 2).dump(x)
    for storage in storages:
        file.write(struct.pack("<q", len(storage.values)) + storage.values.tobytes())
    path.write_bytes(file.getvalue())
    return path


def float_storage(torch, count=12):
    return Storage("7", torch.FloatStorage, np.arange(count, dtype=np.float32))


def test_tensors_are_views_of_their_storages(torch, tmp_path):
    floats = float_storage(torch)
    count = Storage("8", torch.LongStorage, np.array([5]))
    # As the tensors of a module are: with the versions of its parts as an attribute.
    tensors: Any = OrderedDict(
        rows=Pickled(floats, 2, (2, 3), (3, 1), False, OrderedDict()),
        columns=Pickled(floats, 0, (3, 4), (1, 3), False, OrderedDict()),
        count=Pickled(count, 0, (), (), False, OrderedDict()),
    )
    tensors._metadata = OrderedDict([("", {"version": 1})])
    found = read(written(tmp_path / "x.pth", tensors, [count, floats]))
    assert list(found) == ["rows", "columns", "count"]
    np.testing.assert_array_equal(found["rows"], [[2, 3, 4], [5, 6, 7]])
    np.testing.assert_array_equal(found["columns"], np.arange(12).reshape(4, 3).T)
    assert found["columns"].dtype == np.float32
    assert found["count"].dtype == np.int64
    assert found["count"] == 5
    with pytest.raises(ValueError, match="read-only"):
        found["rows"][0] = 0


@pytest.mark.parametrize(
    "offset, shape, strides",
    [
        (1, (3, 4), (4, 1)),
        (0, (13,), (1,)),
        (0, (2, 2), (11, 1)),
        (-1, (2,), (1,)),
        (3, (2,), (-1,)),
    ],
)
def test_tensors_beyond_their_storage_raise(offset, shape, strides, torch, tmp_path):
    storage = float_storage(torch)
    tensors = OrderedDict(weight=Pickled(storage, offset, shape, strides))
    with pytest.raises(ValueError, match="weight must lie within the 12 elements of its storage"):
        read(written(tmp_path / "x.pth", tensors, [storage]))


class Runs:
    """Runs code when it is unpickled by `pickle.load`."""

    def __reduce__(self):
        return print, ("it ran",)


def test_a_file_cannot_run_code(torch, tmp_path, capsys):
    storage = float_storage(torch)
    tensors = OrderedDict(x=Pickled(storage, 0, (2,), (1,)), y=Runs())
    path = written(tmp_path / "x.pth", tensors, [storage])
    with pytest.raises(
        ValueError, match=r"float32 and int64 tensors by name; got .*builtin.*print"
    ):
        read(path)
    assert capsys.readouterr().out == ""


def test_other_files_raise(torch, tmp_path):
    halves = Storage("7", torch.HalfStorage, np.zeros(2, np.float16))
    tensors = OrderedDict(x=Pickled(halves, 0, (2,), (1,)))
    with pytest.raises(ValueError, match=r"got torch\.HalfStorage"):
        read(written(tmp_path / "half.pth", tensors, [halves]))
    storage = float_storage(torch)
    tensors = OrderedDict(x=Pickled(storage, 0, (2,), (1,)))
    path = written(tmp_path / "x.pth", tensors, [storage])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut short: a storage must have 12 elements of float32"):
        read(path)
    with pytest.raises(ValueError, match=r"must be a file of PyTorch before 2020; .* 1000\]"):
        read(written(tmp_path / "old.pth", tensors, [storage], version=1000))
    with pytest.raises(
        ValueError, match=r"must hold the storages \['7'\] of its tensors; got \[\]"
    ):
        read(written(tmp_path / "none.pth", tensors, []))
    for others in ([1], {"model": tensors}):
        with pytest.raises(ValueError, match=r"others.pth must hold tensors by name; got"):
            read(written(tmp_path / "others.pth", others, [storage]))


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04aaaa", pickle.dumps(MAGIC, 2)])
def test_files_that_are_not_pickles_raise(data, tmp_path):
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(ValueError, match="cut short, or not one of PyTorch before 2020"):
        read(tmp_path / "x.pth")


def test_tensors_without_elements_need_no_storage(torch, tmp_path):
    storage = float_storage(torch, 0)
    tensors = OrderedDict(x=Pickled(storage, 0, (3, 0), (1, 1)))
    assert read(written(tmp_path / "x.pth", tensors, [storage]))["x"].shape == (3, 0)
