"""Devices of TPU slices that are not there, to compile programs for."""

from __future__ import annotations

import os

import jax

from ..errors import InputError


def absent_devices(topology: str) -> list[jax.Device]:
    """The devices of a TPU slice that this machine need not have.

    A mesh over them (:func:`make_mesh`) lowers and compiles programs as the slice would,
    shardings, kernels and memory included; nothing can be put on them or run. Needs libtpu, which
    ``pip install jaxalope[tpu]`` brings, on any Linux host.

    Args:
        topology: generation and chips: ``"v5e:2x2"``, ``"v6e:4x4"``, ``"v5p:2x2x4"``,
            ``"tpu7x:2x2x1"``.

    Raises:
        InputError: libtpu is not installed, or knows no such slice.
    """
    from jax.experimental import topologies

    # libtpu reads both when it is loaded: nothing here holds a TPU, so that any number of
    # processes may compile at once, and there is no metadata server to wait for.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # Its class differs between versions of JAX.
        raise InputError(
            f"{topology=} cannot be compiled for ({str(error).splitlines()[0]}): name a TPU slice "
            "like v5e:2x2, v6e:4x4, v5p:2x2x1 or tpu7x:2x2x1, and install libtpu "
            "(pip install jaxalope[tpu], Linux)"
        ) from error
    return list(found.devices)
