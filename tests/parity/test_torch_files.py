"""PyTorch's files, as PyTorch itself writes them: every dtype and view, every protocol."""

import collections

import numpy as np
import pytest
from etils import epath

from jaxalope import InputError
from jaxalope.model.exchange.torch_files import read_torch_header

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

DTYPES = """float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint64
uint32 uint16 uint8 bool""".split()  # noqa: SIM905 (a list of one name a line would fill the page)


def tensors():
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    half = base.to(torch.bfloat16)
    return collections.OrderedDict(
        {name: (3 * base).to(getattr(torch, name)) for name in DTYPES}
        | {
            "whole": base,
            "alias": base,
            "transposed": base.T,
            "part": base[1:5, 2::3],
            "stretched": base[0].expand(3, 8),
            "row of bfloat16": half[2],
            "transposed bfloat16": half.T,
            "parameter": torch.nn.Parameter(half[:, :3]),
            "scalar": torch.tensor(2.5),
            "empty": torch.zeros(0, 3),
        }
    )


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_tensor_is_theirs(tmp_path, protocol):
    torch.save(tensors(), tmp_path / "a.bin", pickle_protocol=protocol)
    found = read_torch_header(epath.Path(tmp_path / "a.bin"))
    theirs = tensors()
    assert found.keys() == theirs.keys()
    for name, x in theirs.items():
        assert found[name].shape == tuple(x.shape), name
        ours = found[name].read()
        assert str(ours.dtype).removesuffix("fn") == str(x.dtype)[6:].removesuffix("fn")
        flat = x.detach().contiguous().reshape(-1)
        assert ours.tobytes() == flat.view(torch.uint8).numpy().tobytes(), name
    assert found["whole"] == found["alias"]


def test_a_state_dict_of_modules(tmp_path):
    """With its ``_metadata``, and one parameter under two names."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5))
    model.again = model[0]
    torch.save(model.state_dict(), tmp_path / "a.bin")
    found = read_torch_header(epath.Path(tmp_path / "a.bin"))
    expected = model.state_dict()
    assert found.keys() == expected.keys() and "1.num_batches_tracked" in found
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name].read(), x.numpy())


def test_what_is_no_state_dict_is_refused(tmp_path):
    path = tmp_path / "a.bin"
    torch.save(torch.nn.Linear(2, 3), path)
    with pytest.raises(InputError, match=r"asks for torch\.nn\.modules\.linear\.Linear; only"):
        read_torch_header(epath.Path(path))
    torch.save(torch.zeros(3), path)
    with pytest.raises(InputError, match="holds a tensor, not tensors by name"):
        read_torch_header(epath.Path(path))
    torch.save({"t": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"bare pickle, as PyTorch wrote before version 1\.6"):
        read_torch_header(epath.Path(path))
    torch.save({"t": torch.zeros(3, dtype=torch.complex64)}, path)
    with pytest.raises(InputError, match=r"asks for torch\.ComplexFloatStorage"):
        read_torch_header(epath.Path(path))
