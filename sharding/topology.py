"""Devices that are not there, to compile programs for: slices of TPUs, hosts of NVIDIA GPUs."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

import jax

from ..errors import InputError


class _Gpu(NamedTuple):
    """What XLA's compiler asks of a GPU: makers' figures, of the form with NVLink."""

    kind: str  # as JAX's `device_kind` of the real one
    capability: int  # major
    cores: int  # streaming multiprocessors
    fpus: int  # float32 units of one
    clock_ghz: float
    memory: int  # bytes
    bandwidth: int  # bytes/s
    l2: int  # bytes
    shared: int  # bytes of shared memory of one multiprocessor


_GPUS = {
    "a100": _Gpu(
        "NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 80 << 30, 2_039 * 10**9, 40 << 20, 164 << 10
    ),
    "h100": _Gpu(
        "NVIDIA H100 80GB HBM3", 9, 132, 128, 1.98, 80 << 30, 3_350 * 10**9, 50 << 20, 228 << 10
    ),
    "h200": _Gpu("NVIDIA H200", 9, 132, 128, 1.98, 141 << 30, 4_800 * 10**9, 50 << 20, 228 << 10),
    "b200": _Gpu("NVIDIA B200", 10, 148, 128, 1.96, 180 << 30, 7_700 * 10**9, 126 << 20, 228 << 10),
}


def absent_devices(topology: str) -> list[jax.Device]:
    """The devices of a TPU slice, or of hosts of NVIDIA GPUs, that this machine need not have.

    A mesh over them (:func:`make_mesh`) lowers and compiles programs as the real ones would,
    shardings, kernels and memory included; nothing can be put on them or run. Needs, on any Linux
    host, libtpu, which ``pip install jaxalope[tpu]`` brings, or JAX's CUDA plugin and ``ptxas``,
    which ``jaxalope[cuda-compile]`` brings without the gigabytes of libraries that run programs.

    Args:
        topology: generation and chips of TPUs: ``"v5e:2x2"``, ``"v6e:4x4"``, ``"v5p:2x2x4"``,
            ``"tpu7x:2x2x1"``; or a GPU, and how many: ``"h200"``, ``"a100:8"``, or four hosts of
            eight, ``"h100:4x8"``; also ``"b200"``.

    Raises:
        InputError: the compiler is not installed, or knows no such slice or GPU.
    """
    if topology.split(":")[0] in _GPUS:
        return _gpus(topology)
    # libtpu reads both when it is loaded: nothing here holds a TPU, so that any number of
    # processes may compile at once, and there is no metadata server to wait for.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    return _described(
        topology,
        f"name a TPU slice like v5e:2x2, v6e:4x4, v5p:2x2x1 or tpu7x:2x2x1, or a GPU, one of "
        f"{', '.join(_GPUS)}, with a count (h200:8) or hosts and a count (h200:4x8); for TPUs "
        "install libtpu (pip install jaxalope[tpu], Linux)",
        platform="tpu",
        topology_name=topology,
    )


def gpu_memory(device_kind: str) -> int | None:
    """Bytes of memory of a GPU that :func:`absent_devices` knows; None of any other device."""
    return next((gpu.memory for gpu in _GPUS.values() if gpu.kind == device_kind), None)


def _gpus(topology: str) -> list[jax.Device]:
    found = re.fullmatch(r"(\w+?)(?::(?:([1-9]\d*)x)?([1-9]\d*))?", topology)
    if found is None:
        raise InputError(
            f"{topology=} is not a GPU with a count, like h200:8, or with hosts and a count, like "
            "h200:4x8"
        )
    name, hosts, count = found.groups(default="1")
    # JAX's plugin otherwise asks the driver, which need not be here, for its version.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    return _described(
        topology,
        "install JAX's CUDA plugin and ptxas (pip install jaxalope[cuda-compile], Linux); where "
        "there is no GPU, set JAX_PLATFORMS=cpu",
        platform="cuda",
        target_config=_target(_GPUS[name]),
        topology=f"1x{hosts}x{count}",  # NVLink domains, hosts of one, GPUs of a host
    )


def _target(gpu: _Gpu) -> str:
    """XLA's GpuTargetConfigProto, as text."""
    # Instructions of this generation alone (wgmma, ...) have a name of their own: sm_90a.
    features = "ACCELERATED_FEATURES" if gpu.capability >= 9 else "NONE"
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {gpu.capability} feature_extension: {features} }}
          core_count: {gpu.cores}
          fpus_per_core: {gpu.fpus}
          clock_rate_ghz: {gpu.clock_ghz}
          device_memory_size: {gpu.memory}
          memory_bandwidth: {gpu.bandwidth}
          l2_cache_size: {gpu.l2}
          shared_memory_per_core: {gpu.shared}
          shared_memory_per_block: {48 << 10}
          shared_memory_per_block_optin: {gpu.shared - (1 << 10)}
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          threads_per_warp: 32
          threads_per_core_limit: 2048
          threads_per_block_limit: 1024
          thread_dim_limit_x: 1024
          thread_dim_limit_y: 1024
          thread_dim_limit_z: 64
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 12 minor: 9 }}
        device_description_str: "{gpu.kind}"
    """


def _described(asked: str, remedy: str, **description: str) -> list[jax.Device]:
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(**description).devices)
    except Exception as error:  # Its class differs between versions of JAX.
        raise InputError(
            f"topology={asked!r} cannot be compiled for ({str(error).splitlines()[0]}): {remedy}"
        ) from error
