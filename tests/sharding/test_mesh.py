"""Meshes: sizes that fit the devices, and clear words for those that do not."""

import jax
import pytest
from jax.sharding import AxisType

from jaxalope import InputError
from jaxalope.sharding import MESH_AXES, MeshConfig, make_mesh
from jaxalope.sharding.distributed import start


def test_the_open_axis_takes_the_devices_that_are_left():
    mesh = make_mesh(MeshConfig(tensor=2))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "expert": 1, "context": 1, "tensor": 2}
    assert mesh.axis_names == MESH_AXES
    assert set(mesh.axis_types) == {AxisType.Explicit}


def test_auto_axes_and_fewer_devices():
    mesh = make_mesh(MeshConfig(explicit=False), jax.devices()[:3])
    assert mesh.shape["data"] == 3
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 3}, "need 3 devices, 8 are there"),
        ({"tensor": 3}, "a multiple of 3 devices, 8 are there"),
        ({"fsdp": -1}, "at most one may be -1"),
        ({"tensor": 0}, "each must be positive"),
    ],
)
def test_sizes_that_do_not_fit(sizes, words):
    with pytest.raises(InputError, match=words):
        MeshConfig(**sizes).shape(8)


@pytest.mark.parametrize(
    "sizes", [{"data": 1, "fsdp": -1, "tensor": 2}, {"data": 2, "fsdp": -1}, {"context": 8}]
)
@pytest.mark.parametrize("explicit", [True, False])
def test_mesh_axes_may_share_an_axis_of_the_slice(absent_slice, sizes, explicit):
    """Two and eight divide a slice of 4 x 4 chips, though neither is the size of its axes."""
    devices = absent_slice("v6e:4x4")
    config = MeshConfig(**sizes, explicit=explicit)
    mesh = make_mesh(config, devices)
    assert tuple(mesh.shape.values()) == config.shape(16) and mesh.axis_names == MESH_AXES
    assert set(mesh.devices.flat) == set(devices)
    assert set(mesh.axis_types) == {AxisType.Explicit if explicit else AxisType.Auto}


def test_devices_that_are_no_box_of_the_slice(absent_slice):
    with pytest.raises(InputError, match=r"'data': 3.* these 3 x TPU v6 lite: change a mesh\.\*"):
        make_mesh(MeshConfig(), absent_slice("v6e:4x4")[:3])


def test_half_an_address_is_refused():
    with pytest.raises(InputError, match="give all three"):
        start("localhost:1234")
