"""What a run would need, without running it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ..configs.experiment import Experiment
from ..errors import InputError
from ..sharding import gpu_memory
from .feed import rows_by_process
from .hardware import peak_of_kind
from .step import abstract_state, batch_sharding, make_train_step


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Sizes of one run; bytes are those of one device.

    Attributes:
        parameters: numbers in the model, over all devices.
        params, optimizer, ema: bytes of the training state.
        step: bytes that the compiled train step needs at once: the state, a batch, gradients and
            activations, as the compiler of the devices' platform lays them out.
        seconds: of a step at the devices' peak FLOP/s, which no step reaches; None where the peak
            is unknown, as of a CPU.
    """

    parameters: int
    params: int
    optimizer: int
    ema: int
    step: int
    seconds: float | None

    def __str__(self) -> str:
        def row(name: str, size: int) -> str:
            return f"{name:<34}{_human(size):>12}"

        rows = [
            f"{'parameters':<34}{self.parameters:>12,}",
            row("parameters, a device", self.params),
        ]
        rows.append(row("optimizer state, a device", self.optimizer))
        if self.ema:
            rows.append(row("average of parameters, a device", self.ema))
        rows.append(row("a whole train step, a device", self.step))
        if self.seconds is not None:
            rows.append(f"{'a step at the peak FLOP/s, seconds':<34}{self.seconds:>12.3g}")
        return "\n".join(rows)


def estimate(experiment: Experiment, mesh: Mesh | None) -> Estimate:
    """Sizes of ``experiment`` on ``mesh`` (one device if None); compiles the step, runs nothing.

    Call it inside ``use_mesh(mesh, experiment.rules)`` where there is a mesh.

    Raises:
        InputError: the experiment does not fit the mesh, or the rows of one of its processes, or
            the step not a device's memory.
    """
    graphdef, state = abstract_state(experiment, mesh)
    if mesh is not None:
        rows_by_process(experiment, mesh)
    shape = (experiment.data.batch_size, experiment.data.sequence_length)
    place = None if mesh is None else batch_sharding(experiment, mesh)
    batch = {
        name: jax.ShapeDtypeStruct(shape, np.int32, sharding=place)
        for name in ("tokens", "segment_ids", "positions")
    }
    if experiment.data.has_prompts:
        batch["loss_weights"] = jax.ShapeDtypeStruct(shape, np.float32, sharding=place)
    lowered = make_train_step(experiment, graphdef).lower(state, batch)
    try:
        memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise _too_large(str(error).splitlines()[0]) from error
    step = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    devices = jax.devices()[:1] if mesh is None else mesh.devices.ravel()
    # The compiler for GPUs does its best, says nothing, and leaves it to the run to fail.
    there = gpu_memory(devices[0].device_kind)
    if there is not None and step > there:
        kind = devices[0].device_kind
        raise _too_large(f"it takes {_human(step)}, and an {kind} has {_human(there)}")
    peak = peak_of_kind(devices[0].device_kind)
    tokens = math.prod(shape)
    flops = experiment.model.flops_per_token(experiment.data.sequence_length) * tokens
    return Estimate(
        parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)),
        params=_bytes_a_device(state.params),
        optimizer=_bytes_a_device(state.opt_state),
        ema=_bytes_a_device(state.ema),
        step=step,
        seconds=peak and flops / (peak * len(devices)),
    )


def _too_large(why: str) -> InputError:
    return InputError(
        f"a train step does not fit a device ({why}): raise train.accumulation or mesh.fsdp, or "
        "lower data.batch_size or data.sequence_length"
    )


def _bytes_a_device(tree: Any) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _human(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
