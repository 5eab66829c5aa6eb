"""KDA by tokamax's kernels for TPU (tokamax 0.0.17), of the bounded gate.

They keep heads first, take chunks of 64 tokens, and divide decays inside a quarter of a chunk: what
they cannot stand is a gate without a bound, which nothing in an array of decays shows. So the bound
is asked for. Nothing of tokamax is imported before it is used.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ....errors import InputError
from .. import optional
from ..platform import only_on

_CHUNK = 64
_REMEDY = 'use implementation="pallas_tpu" or "xla", or None'


def kda_tokamax(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "B T H K"],
    beta: Float[Array, "B T H"],
    initial_state: Float[Array, "B H K V"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    scale: float,
    chunk_size: int,
    gate_lower_bound: float | None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Arguments as in `kda`, one q/k head a value head; chunks have 64 tokens, whatever was said.

    For v6e and newer. ``interpret`` leaves out the check of the platform, for tests, which also set
    tokamax's own switch (the variable PALLAS_INTERPRET).

    Raises:
      InputError: tokamax is not installed, no bound of the gate was given, rows are packed or
        padded (their number of segments would have to be static), or the dtype or width is not
        supported; another platform than TPU, when traced or when lowered.
    """
    del chunk_size
    if gate_lower_bound is None:
        raise InputError(
            'kda: implementation="tokamax" is of the bounded gate; give gate_lower_bound=-5 or '
            f"what g was made with, or {_REMEDY}: they take any gate"
        )
    if not -5 <= gate_lower_bound < 0:
        raise InputError(
            f'kda: {gate_lower_bound=} is not in [-5, 0), the range of implementation="tokamax"; '
            f"{_REMEDY}"
        )
    if segment_ids is not None:
        raise InputError(
            'kda: segment_ids are not supported by implementation="tokamax", which asks for a '
            f"static number of segments; {_REMEDY}"
        )
    if q.dtype not in (jnp.float32, jnp.bfloat16) or q.shape[-1] > 256:
        raise InputError(
            f'kda: q {q.shape} {q.dtype} is not supported by implementation="tokamax", which takes '
            f"float32 and bfloat16 and keys up to 256 wide; {_REMEDY}"
        )
    run = optional.tokamax("kda", "tokamax.ops.tpu").KimiDeltaAttention(bypass_device_check=True)
    if not interpret:
        q = only_on("tpu", "tokamax", "kda")(q)
    length = q.shape[1]

    def heads_first(x):
        # Tokens of k = v = beta = g = 0 change nothing.
        x = jnp.pad(x, ((0, 0), (0, -length % _CHUNK)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x, 2, 0)

    try:
        o, state = run(
            *map(heads_first, (q, k, v, g, beta)),
            scale=scale,
            initial_state=initial_state[:, None],
            output_final_state=True,
        )
    except ValueError as error:
        if "TPU device kind" not in str(error):
            raise
        # It sizes its blocks while it is traced, by the device that is there then.
        raise InputError(
            'kda: implementation="tokamax" is being traced on another device than a TPU; enter a '
            f"mesh of the TPUs that you compile for, or {_REMEDY}"
        ) from error
    return jnp.moveaxis(o, 0, 2)[:, :length], state[:, 0]
