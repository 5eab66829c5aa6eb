"""PyTorch's files: views as they are, and nothing run, whatever a file says."""

import collections
import json
import os
import pickle
import re
import shutil
import zipfile

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from jaxalope import InputError
from jaxalope.model.exchange import hub
from jaxalope.model.exchange.directory import TORCH_INDEX, TORCH_SINGLE, read_directory
from jaxalope.model.exchange.files import Stored, encode_header, write_file
from jaxalope.model.exchange.torch_files import read_torch_header


def read(path):
    return read_torch_header(epath.Path(path))


def tensors():
    """Of every way to lie in a storage."""
    base = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    half = base.astype(ml_dtypes.bfloat16)
    return {
        "whole": base,
        "alias": base[:],
        "transposed": base.T,
        "part": base[1:5, 2::3],
        "stretched": np.broadcast_to(base[0], (3, 8)),
        "bfloat16": half,
        "row": half[2],
        "float16": base.astype(np.float16),
        "integers": np.arange(5),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        values = found[name].read()
        assert (values.dtype, values.shape) == (x.dtype, x.shape), name
        assert found[name].nbytes == x.nbytes
        assert values.tobytes() == x.tobytes(), name


def test_every_tensor_as_it_lies(tmp_path, write_torch):
    write_torch(tmp_path / "a.bin", tensors())
    found = read(tmp_path / "a.bin")
    same(found, tensors())
    assert found["whole"] == found["alias"], "one storage, one place"


class Opened:
    """A file somewhere that cannot be mapped."""

    def __init__(self, path):
        self.path, self.reads = path, []

    def __str__(self):
        return "gs://bucket/a.bin"

    def open(self, mode):
        return open(self.path, mode)


@pytest.mark.parametrize("name", ["whole", "transposed", "part", "stretched"])
def test_a_slice_is_the_same_mapped_or_opened(tmp_path, write_torch, name, unchecked_shapes):
    write_torch(tmp_path / "a.bin", tensors())
    x, local = tensors()[name], read(tmp_path / "a.bin")[name]
    remote = Stored(Opened(local.file), local.dtype, local.shape, local.start, local.strides)
    for index in np.ndindex(3, 3):
        slices = tuple(slice(i, n - j) for i, j, n in zip(index, (1, 0), x.shape, strict=True))
        for stored in (local, remote):
            np.testing.assert_array_equal(stored.read(slices), x[slices])


def test_directories(tmp_path, write_torch):
    folder = epath.Path(tmp_path)
    parts = {f"pytorch_model-0000{i}-of-00002.bin": i for i in (1, 2)}
    for name, i in parts.items():
        write_torch(tmp_path / name, {f"t{i}": np.full(3, i, np.float32)})
    (tmp_path / "training_args.bin").write_bytes(pickle.dumps(print))
    assert set(read_directory(folder)) == {"t1", "t2"}, "every part"
    index = {"weight_map": {f"t{i}": name for name, i in parts.items()}}
    (tmp_path / TORCH_INDEX).write_text(json.dumps(index))
    assert set(read_directory(folder)) == {"t1", "t2"}, "what the index names"
    next(tmp_path.glob("*-00002-*")).unlink()
    with pytest.raises(InputError, match=r"names pytorch_model-00002-of-00002\.bin, which is not"):
        read_directory(folder)
    write_torch(tmp_path / TORCH_SINGLE, {"one": np.ones(3, np.float32)})
    assert set(read_directory(folder)) == {"one"}, "one file"
    tensor = np.ones(2, np.float32)
    header = encode_header({"safe": (tensor.dtype, tensor.shape)})
    write_file(folder / "model.safetensors", header, [tensor])
    assert set(read_directory(folder)) == {"safe"}, "safetensors before all others"


def test_a_directory_with_a_file_of_another_name(tmp_path, write_torch):
    write_torch(tmp_path / "best.pt", {"t": np.ones(3, np.float32)})
    (tmp_path / "optimizer.pt").write_bytes(b"")
    assert set(read_directory(epath.Path(tmp_path))) == {"t"}
    shutil.copy(tmp_path / "best.pt", tmp_path / "last.pt")
    with pytest.raises(InputError, match=r"best\.pt, last\.pt, and nothing says which.*rename"):
        read_directory(epath.Path(tmp_path))


def test_pickles_are_fetched_where_there_is_nothing_else(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []

    def snapshot_download(repository, revision, allow_patterns):
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert str(hub.fetch("someone/model")) == str(tmp_path)
    assert asked[1:] == [["pytorch_model*.bin"]] and not any("bin" in p for p in asked[0])
    (tmp_path / "model.safetensors").write_bytes(b"")
    hub.fetch("someone/model")
    assert asked[2:] == asked[:1]


class Runs:
    """Makes a folder when a pickle of it is loaded as pickles are."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def refusals(tmp_path):
    run = {"t": Runs(tmp_path / "run")}
    counter = {"t": collections.Counter()}
    return {
        "a call": (run, rf"asks for {os.mkdir.__module__}\.mkdir; only weights are read"),
        "a class": (counter, r"asks for collections\.Counter; only weights"),
        "a number": ({"epoch": 3}, r"entry 'epoch' has the type int.*torch\.save\(model\.state"),
        "a dictionary": ({"model": {}}, r"entry 'model' has the type dict"),
        "a set": ({"t": {1, 2}}, r"asks for \S+\.set; only weights"),
    }


@pytest.mark.parametrize("case", ["a call", "a class", "a number", "a dictionary", "a set"])
def test_what_is_no_weight_is_refused(tmp_path, write_torch, case):
    contents, words = refusals(tmp_path)[case]
    write_torch(tmp_path / "a.bin", contents)
    with pytest.raises(InputError, match=words):
        read(tmp_path / "a.bin")
    assert not (tmp_path / "run").exists()


def test_instructions_that_make_objects_are_refused(tmp_path, write_torch):
    for program in (
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",  # NEWOBJ
        b"\x80\x02(icollections\nOrderedDict\n.",  # INST
        b"\x80\x02\x82\x01.",  # EXT1
    ):
        write_torch(tmp_path / "a.bin", {}, {"data.pkl": program})
        with pytest.raises(InputError, match=r"the instruction (NEWOBJ|INST|EXT1).*refused"):
            read(tmp_path / "a.bin")


def test_damage_is_named(tmp_path, write_torch):
    path = tmp_path / "a.bin"
    write_torch(path, tensors())
    content = path.read_bytes()
    for broken, words in {
        content[: len(content) // 2]: r"a\.bin was cut short, or is damaged",
        content[:-30]: r"a\.bin was cut short, or is damaged",
        b"": r"a\.bin is no PyTorch checkpoint",
        b"<!DOCTYPE html><html>" * 9: r"a\.bin is no PyTorch checkpoint",
        b"version https://git-lfs.github.com/spec/v1": r"is no PyTorch checkpoint; fetch",
        pickle.dumps({}, 2): r"a\.bin is a bare pickle, as PyTorch wrote before version 1\.6",
        content.replace(b"OrderedDict", b"OrderedDuck"): r"damaged \(Bad CRC-32",
    }.items():
        path.write_bytes(broken)
        with pytest.raises(InputError, match=words):
            read(path)
    for members, words in [
        ({"byteorder": b"big"}, r"byteorder='big'.*big-endian machine"),
        ({"data/0": None}, r"no member archive/data/0.*fetch it again"),
        ({"data/0": b"short"}, r"tensor whole of shape \(6, 8\).*ends at byte 192.*has 5"),
        ({"data.pkl": None}, r"a zip without one data\.pkl"),
        ({"constants.pkl": b""}, r"is a TorchScript program"),
    ]:
        write_torch(path, tensors(), members)
        with pytest.raises(InputError, match=words):
            read(path)
    write_torch(path, tensors(), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match=r"is compressed, which torch\.save never does"):
        read(path)


def test_a_file_without_a_byteorder_is_little_endian(tmp_path, write_torch):
    """PyTorch 1.6 to 2.0 wrote none."""
    write_torch(tmp_path / "a.bin", tensors(), {"byteorder": None})
    same(read(tmp_path / "a.bin"), tensors())


def test_no_pickle_does_anything_but_be_read_or_refused(tmp_path, write_torch):
    """Every byte of the program changed, at random: tensors inside the file, or an InputError."""
    path = tmp_path / "a.bin"
    write_torch(path, tensors())
    with zipfile.ZipFile(path) as archive:
        program = archive.read("archive/data.pkl")
    rng = np.random.default_rng(0)
    refused = 0
    for at in range(len(program)):
        changed = bytearray(program)
        changed[at] = rng.integers(256)
        write_torch(path, tensors(), {"data.pkl": bytes(changed)})
        try:
            for stored in read(path).values():
                stored.read()
        except InputError as error:
            refused += 1
            assert re.match(rf"{path}(: tensor|: entry| has| asks| holds)", str(error))
    assert refused > len(program) / 4


def test_a_pickle_that_grows_without_end_is_refused_at_once(tmp_path, write_torch):
    """Sixty pairs, each twice of the one before: 2**60 values, if anything walked over them."""
    doubled = b")" + b"q\x00h\x00\x86" * 60
    for program in (b"}" + doubled + b"Ns.", doubled + b"Q.", doubled + b"."):
        write_torch(tmp_path / "a.bin", {}, {"data.pkl": b"\x80\x02" + program})
        with pytest.raises(InputError, match=r"damaged|not tensors by name"):
            read(tmp_path / "a.bin")
