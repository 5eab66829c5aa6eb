"""Safetensors: the library reads what we write, we read what it writes, and damage is named."""

import json

import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from jaxalope import InputError
from jaxalope.model.exchange.directory import read_directory
from jaxalope.model.exchange.files import (
    DTYPES,
    INDEX,
    Stored,
    encode_header,
    read_header,
    write_file,
)


def tensors_of_every_dtype():
    rng = np.random.default_rng(0)
    names = sorted(DTYPES)
    return {f"t.{n}": rng.integers(0, 2, (3, 4)).astype(DTYPES[n]) for n in names} | {
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }


def write(path, tensors):
    header = encode_header({name: (x.dtype, x.shape) for name, x in tensors.items()})
    write_file(epath.Path(path), header, tensors.values())


def test_the_library_reads_what_we_write(tmp_path):
    tensors = {
        name: x for name, x in tensors_of_every_dtype().items() if "F8" not in name
    }  # The library's NumPy door has no float8.
    write(tmp_path / "a.safetensors", tensors)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name], x)


def test_we_read_what_the_library_writes_and_what_we_write(tmp_path):
    tensors = {
        "a": np.arange(12, dtype=np.float32).reshape(3, 4),
        "b": np.ones(5, ml_dtypes.bfloat16),
    }
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    write(tmp_path / "ours.safetensors", tensors_of_every_dtype())
    for file, expected in (("theirs", tensors), ("ours", tensors_of_every_dtype())):
        found = read_header(epath.Path(tmp_path / f"{file}.safetensors"))
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            read = found[name].read()
            assert (read.dtype, read.shape) == (x.dtype, x.shape)
            np.testing.assert_array_equal(read, x)


class Opened:
    """A file somewhere that cannot be mapped."""

    def __init__(self, path):
        self.path = path

    def __str__(self):
        return "gs://bucket/a.safetensors"

    def open(self, mode):
        return open(self.path, mode)


def test_a_slice_is_the_same_mapped_or_opened(tmp_path, unchecked_shapes):
    x = np.random.default_rng(1).normal(size=(6, 5, 4)).astype(np.float32)
    write(tmp_path / "a.safetensors", {"pad": np.ones(3, np.float32), "x": x})
    local = read_header(epath.Path(tmp_path / "a.safetensors"))["x"]
    remote = Stored(Opened(tmp_path / "a.safetensors"), local.dtype, local.shape, local.start)
    for index in [
        (slice(0, 6), slice(0, 5), slice(0, 4)),
        (slice(2, 4), slice(0, 5), slice(1, 2)),
        (slice(5, 6), slice(3, 5), slice(0, 4)),
    ]:
        for stored in (local, remote):
            np.testing.assert_array_equal(stored.read(index), x[index])
    np.testing.assert_array_equal(remote.read(), x)


@pytest.fixture
def sharded(tmp_path):
    write(tmp_path / "model-1.safetensors", {"a": np.ones((4, 4), np.float32)})
    write(tmp_path / "model-2.safetensors", {"b": np.ones(3, np.float32)})
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return epath.Path(tmp_path)


def test_an_index_and_its_files(sharded):
    assert set(read_directory(sharded)) == {"a", "b"}
    (sharded / INDEX).unlink()
    assert set(read_directory(sharded)) == {"a", "b"}


def test_damage_is_named(sharded):
    second = sharded / "model-2.safetensors"
    content = second.read_bytes()

    second.write_bytes(content[:-1])
    with pytest.raises(InputError, match=r"model-2\.safetensors has \d+ bytes.*cut short"):
        read_directory(sharded)
    second.write_bytes(content[:5])
    with pytest.raises(InputError, match=r"model-2\.safetensors is no safetensors file"):
        read_directory(sharded)
    second.write_bytes(b"<!DOCTYPE html><html>" * 9)
    with pytest.raises(InputError, match=r"model-2\.safetensors is no safetensors file"):
        read_directory(sharded)
    second.write_bytes(content[:8] + b"x" + content[9:])
    with pytest.raises(InputError, match=r"model-2\.safetensors has a damaged"):
        read_directory(sharded)
    second.write_bytes(content.replace(b'"F32"', b'"F4x"'))
    with pytest.raises(InputError, match=r"tensor b has dtype F4x"):
        read_directory(sharded)
    second.write_bytes(content.replace(b'"F32"', b'"F16"'))
    with pytest.raises(InputError, match=r"tensor b of shape \(3,\) and dtype F16 needs 6 bytes"):
        read_directory(sharded)
    second.unlink()
    with pytest.raises(InputError, match=r"names model-2\.safetensors, which is not there"):
        read_directory(sharded)


def test_an_index_that_is_wrong(sharded):
    weight_map = {"a": "model-1.safetensors", "c": "model-2.safetensors"}
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=r"model-2\.safetensors holds c, which it does not"):
        read_directory(sharded)
    (sharded / INDEX).write_text("{")
    with pytest.raises(InputError, match="is no index of weights"):
        read_directory(sharded)


def test_a_directory_without_weights(tmp_path):
    with pytest.raises(InputError, match=r"no \*\.safetensors and no pytorch_model\.bin"):
        read_directory(epath.Path(tmp_path))
