"""What several tests of models share."""

import collections
import io
import pickle
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest

_STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
}


class _View:
    """A tensor to be pickled: an array, or a view of one that others are views of."""

    def __init__(self, array: np.ndarray, torch: types.SimpleNamespace):
        self.array, self.torch = array, torch

    def __reduce__(self):
        base = self.array
        while isinstance(base.base, np.ndarray):
            base = base.base
        size = self.array.itemsize
        offset = self.array.ctypes.data - base.ctypes.data
        assert not offset % size
        strides = tuple(stride // size for stride in self.array.strides)
        hooks: dict = collections.OrderedDict()
        arguments = (_Storage(base), offset // size, self.array.shape, strides, False, hooks)
        return self.torch.rebuild, arguments


class _Storage:
    def __init__(self, base: np.ndarray):
        self.base = base


class _Torch:
    """Modules by the names of PyTorch's, so that a pickle says what PyTorch's says."""

    def __init__(self):
        self.torch = types.ModuleType("torch")
        self.utils = types.ModuleType("torch._utils")
        for name in _STORAGES.values():
            setattr(self.torch, name, type(name, (), {"__module__": "torch"}))

        def _rebuild_tensor_v2(*arguments):
            raise AssertionError("nothing is called")

        _rebuild_tensor_v2.__module__ = "torch._utils"
        _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
        self.utils._rebuild_tensor_v2 = self.rebuild = _rebuild_tensor_v2
        self.torch._utils = self.utils


class _Pickler(pickle.Pickler):
    def __init__(self, file, torch: _Torch):
        super().__init__(file, protocol=2)
        self.torch, self.storages = torch, {}

    def persistent_id(self, obj):
        if not isinstance(obj, _Storage):
            return None
        key = str(self.storages.setdefault(id(obj.base), (len(self.storages), obj.base))[0])
        kind = getattr(self.torch.torch, _STORAGES[obj.base.dtype])
        return ("storage", kind, key, "cpu", obj.base.size)


@pytest.fixture
def write_torch(monkeypatch):
    """``write_torch(path, contents)``: what ``torch.save`` writes, without PyTorch.

    Arrays in the dictionary become tensors; views of one array share a storage. ``members`` changes
    the archive: a value of None leaves a member out.
    """

    def write(path, contents, members=(), compression=zipfile.ZIP_STORED):
        torch = _Torch()
        buffer = io.BytesIO()
        pickler = _Pickler(buffer, torch)
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, "torch", torch.torch)
            patched.setitem(sys.modules, "torch._utils", torch.utils)
            pickler.dump(
                collections.OrderedDict(
                    (name, _View(x, torch) if isinstance(x, np.ndarray) else x)
                    for name, x in contents.items()
                )
            )
        files = {"data.pkl": buffer.getvalue(), "byteorder": b"little"}
        for key, base in pickler.storages.values():
            files[f"data/{key}"] = base.tobytes()
        files |= {"version": b"3\n"} | dict(members)
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in files.items():
                if content is not None:
                    archive.writestr(f"archive/{name}", content)

    return write
