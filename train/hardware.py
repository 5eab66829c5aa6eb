"""What the devices could do at best, which model-FLOP utilisation is a share of."""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Dense bfloat16 FLOP/s of one JAX device, from the makers' data sheets, by the start of
# `device_kind`; the longest that fits counts. A TPU v2, v3 or 7x chip is two devices.
_PEAK = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v4 lite": 137e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153e12,
    "TPU v7x": 1153e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
}


def peak_of_kind(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device of this kind; None for one that is not in the table."""
    fitting = [kind for kind in _PEAK if device_kind.lower().startswith(kind.lower())]
    return _PEAK[max(fitting, key=len)] if fitting else None


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """FLOP/s of all ``devices`` together; None where nothing is known about them.

    Accelerators: dense bfloat16 of the data sheet. CPU: float32, measured here and now, and once
    for all of them, because simulated CPU devices share the cores.
    """
    if devices[0].platform == "cpu":
        here = [d for d in devices if d.process_index == jax.process_index()]
        return measured_matmul_flops(here[0])
    peak = peak_of_kind(devices[0].device_kind)
    return None if peak is None else peak * len(devices)


def measured_matmul_flops(device: jax.Device, size: int = 768, repeats: int = 3) -> float:
    """Float32 FLOP/s of the best of a few square matrix products, in some tens of milliseconds."""
    x = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
