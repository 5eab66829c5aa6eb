"""Chips that tests of kernels run on, or lower for, or have interpreted on this host."""

import contextlib

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

_BACKENDS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}


def runs(implementation: str) -> bool:
    """Whether this host runs it: a CPU interprets kernels, an accelerator has its own."""
    return jax.default_backend() in ("cpu", _BACKENDS.get(implementation, jax.default_backend()))


def interpreted(implementation: str) -> bool:
    """Whether it is interpreted here; skips the test where it does not run."""
    if not runs(implementation):
        pytest.skip(f"{implementation} is not for this machine's {jax.default_backend()}")
    return jax.default_backend() == "cpu"


def lowered(function, *args, platform: str = "cpu") -> str:
    """StableHLO for a platform that this host need not have."""
    which = contextlib.nullcontext()
    if platform == "cuda":  # Newer versions of jax ask which GPU.
        gpu = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
        auto = (jax.sharding.AxisType.Auto,)
        which = use_abstract_mesh(AbstractMesh((1,), ("x",), auto, abstract_device=gpu))
    with which:
        # Anew: a change of what is global is no part of JAX's cache of traces.
        traced = jax.jit(lambda *a: function(*a)).trace(*args)
        return traced.lower(lowering_platforms=(platform,)).as_text()
