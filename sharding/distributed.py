"""Multi-host start-up."""

from __future__ import annotations

import jax

from ..errors import InputError


def start(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join this process to a multi-host run; call once, before any other JAX call.

    With no arguments on a Cloud TPU slice, under SLURM or Open MPI, JAX finds the others itself.

    Raises:
        InputError: some but not all of the three are given.
    """
    given = [coordinator is not None, num_processes is not None, process_id is not None]
    if any(given) and not all(given):
        raise InputError(
            f"coordinator={coordinator!r}, num_processes={num_processes}, process_id={process_id}: "
            "give all three, or none of them where the cluster is detected"
        )
    jax.distributed.initialize(coordinator, num_processes, process_id)
