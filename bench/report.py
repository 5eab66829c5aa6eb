"""What every benchmark shares: facts of the machine, alternating measurement, rows and tables."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import hlo
import jax
import numpy as np

# What a TPU's compiler reserves of on-chip memory (space 1 is VMEM) for each kernel.
_VMEM = re.compile(
    r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"'
)

# Bytes/s of one JAX device's memory, from the makers' data sheets, by the start of `device_kind`;
# the longest that fits counts. A TPU7x chip is two devices.
BANDWIDTH = {
    "TPU v5 lite": 819e9,
    "TPU v5": 2765e9,
    "TPU v6 lite": 1640e9,
    "TPU7x": 3690e9,
    "NVIDIA A100": 2039e9,
    "NVIDIA H100": 3350e9,
    "NVIDIA H200": 4800e9,
    "NVIDIA B200": 8000e9,
}


def facts(**more) -> dict:
    """Where and when: machine kind, versions, date. Goes into every row."""
    device = jax.devices()[0]
    kind = f"{device.device_kind}"
    if device.platform == "cpu":
        kind = f"{os.cpu_count()}-core {platform.machine()} CPU"
    return {
        "machine": kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **more,
    }


def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed, for the facts of a row."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def alternate(
    sides: Mapping[str, Callable[[], object]], turns: int, warm_up: int = 1, calls: int = 1
) -> dict[str, np.ndarray]:
    """Wall seconds ``[turns]`` of every side, run in turns so that drift hits all alike.

    A side's turn is so many calls that are waited for together; the seconds are those of one.
    """
    for run in sides.values():
        for _ in range(warm_up):
            jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, run in sides.items():
            start = time.perf_counter()
            for _ in range(calls):
                out = run()
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - start) / calls)
    return {name: np.asarray(seconds) for name, seconds in times.items()}


def refusal(run: Callable[[], object]) -> str | None:
    """Why a side cannot run here: a compiler's words, or memory that is short. None if it can."""
    try:
        jax.block_until_ready(run())
    except Exception as error:  # Its class is the compiler's, the runtime's or a library's.
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
    return None


def spread(values: Iterable[float], digits: int = 1) -> str:
    """``median (lowest - highest)``."""
    values = list(values)
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(headers) + " |", "|" + " --- |" * len(headers)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def bandwidth(device: jax.Device) -> float | None:
    """Bytes/s of the data sheet; None for what is not in the table."""
    fitting = [kind for kind in BANDWIDTH if device.device_kind.startswith(kind)]
    return BANDWIDTH[max(fitting, key=len)] if fitting else None


def compile_for(device: jax.Device, program: Callable, *arrays):
    """Compiles for one device that need not be here; of the arrays, only shapes and dtypes count.

    Kernels that size their blocks by the chip find it in the mesh in force.
    """
    place = jax.sharding.SingleDeviceSharding(device)
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arrays)
    auto = (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((1,), ("device",), auto, devices=[device])):
        return jax.jit(program).lower(*arrays).compile()


def billions(value: float | None, digits: int) -> str:
    """In units of 1e9, for a table; a dash where nothing is known."""
    return "-" if value is None else f"{value / 1e9:.{digits}f}"


def vmem_bytes(compiled) -> list[int]:
    """Bytes of VMEM that each Pallas kernel of a program compiled for TPU takes."""
    kernels = [x for x in hlo.lines(compiled.as_text()) if '"tpu_custom_call"' in x]
    return [int(found[1]) for found in map(_VMEM.search, kernels) if found]


def write_rows(path: str | None, rows: Iterable[Mapping]) -> None:
    """Append the raw rows to a JSON-lines file, if there is one."""
    if path is None:
        return
    target = pathlib.Path(path)
    with contextlib.suppress(FileExistsError):
        target.parent.mkdir(parents=True)
    with target.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(dict(row)) + "\n" for row in rows)
