"""Meshes: how many devices lie on each mesh axis, and the context in which code is traced."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import textwrap
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from ..errors import InputError
from .axes import MESH_AXES, AxisRules, use_rules


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The size of each mesh axis. One of them may be -1: whatever devices are left.

    ``data`` replicates parameters and splits the batch; ``fsdp`` splits both; ``expert`` splits
    experts, ``tensor`` splits heads and hidden units, ``context`` splits the sequence.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    explicit: bool = True

    def __post_init__(self):
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        if sum(s == -1 for s in sizes) > 1 or any(s < -1 or s == 0 for s in sizes):
            raise InputError(
                f"mesh sizes {dict(zip(MESH_AXES, sizes, strict=True))}: each must be positive, "
                "and at most one may be -1 (the devices that are left)"
            )

    def shape(self, num_devices: int) -> tuple[int, ...]:
        """The axis sizes, in the order of ``MESH_AXES``, for this many devices."""
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        fixed = math.prod(s for s in sizes if s != -1)
        if num_devices % fixed or (-1 not in sizes and fixed != num_devices):
            raise InputError(
                f"mesh sizes {dict(zip(MESH_AXES, sizes, strict=True))} need "
                f"{'a multiple of ' if -1 in sizes else ''}{fixed} devices, {num_devices} are "
                "there; change a mesh.* field so that the product fits"
            )
        return tuple(num_devices // fixed if s == -1 else s for s in sizes)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with all of ``MESH_AXES``, unused ones of size 1, over ``devices`` (all if None).

    On a TPU slice neighbours on an axis are neighbours in the network, so the devices of a host are
    not always neighbours on one.

    Raises:
        InputError: the sizes do not fit the devices, or how these are connected.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = config.shape(len(devices))
    types = (AxisType.Explicit if config.explicit else AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
    except (NotImplementedError, AssertionError):
        # On most slices it gives an axis whole physical axes only, which not all sizes allow.
        return Mesh(_split_physical_axes(shape, devices), MESH_AXES, axis_types=types)


def _split_physical_axes(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """``devices`` in this shape, where several mesh axes may share a physical axis of the slice."""
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (NotImplementedError, AssertionError) as error:
        raise InputError(
            f"mesh sizes {dict(zip(MESH_AXES, shape, strict=True))} cannot be laid over these "
            f"{len(devices)} x {devices[0].device_kind}: change a mesh.* field, or the devices, "
            f"which have to be a whole box of a TPU slice ({textwrap.shorten(str(error), 200)})"
        ) from error


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: AxisRules | None = None) -> Iterator[Mesh]:
    """Run and trace the body on ``mesh`` under ``rules`` (the defaults if None)."""
    with jax.set_mesh(mesh), use_rules(rules or AxisRules()):
        yield mesh
