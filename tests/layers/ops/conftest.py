"""What tests of operators share; this folder is on the path, for the cases of one operator."""

import pathlib
import sys

import jax
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What every implementation has to fulfil, it has to fulfil on its chip too."""
    for item in items:
        here = item.path.is_relative_to(pathlib.Path(__file__).parent)
        if here and "implementation" in getattr(item, "fixturenames", ()):
            item.add_marker("device")


@pytest.fixture(autouse=True)
def exact_products():
    """Oracles in float32 are that on accelerators too; kernels say themselves what they want."""
    with jax.default_matmul_precision(None if jax.default_backend() == "cpu" else "highest"):
        yield


@pytest.fixture
def absent_tpu(absent_slice):
    """``absent_tpu(topology)``: a chip of a slice that is not there. Needs libtpu, and no TPU."""
    return lambda topology: jax.sharding.SingleDeviceSharding(absent_slice(topology)[0])
