"""The loss by tokamax's kernels for TPU, or its chunked XLA form elsewhere: cross-entropy alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ....errors import InputError
from ....sharding import constrain, kernel_map, mesh_axes_of
from .. import optional
from .terms import Terms, ways


def linear_cross_entropy_tokamax(
    hidden, kernel, targets, weights, sharpen, *, terms: Terms, softcap, vocab_first, chunk_size
):
    """See :func:`..linear_cross_entropy`; chunks are tokamax's own."""
    del sharpen, chunk_size
    unable = {
        "softcap": softcap is not None,
        "z_loss": terms.z_loss,
        "sharpen": terms.entropy,
        "accuracy": terms.accuracy,
        f"a vocabulary split over {mesh_axes_of('vocab')}": ways("vocab") > 1,
    }
    if any(unable.values()):
        names = ", ".join(name for name, asked in unable.items() if asked)
        raise InputError(
            f'linear_cross_entropy: implementation="tokamax" cannot take {names}; turn it off, or '
            'use implementation="xla", or None'
        )
    run = optional.tokamax("linear_cross_entropy").linear_softmax_cross_entropy_loss
    narrow = constrain(kernel.astype(hidden.dtype), None, None)

    def local(x, kernel, targets):
        rows = x.reshape(-1, x.shape[-1])
        kernel = kernel.T if vocab_first else kernel
        each = run(rows, targets.reshape(-1), kernel, reduction="none")
        return each.reshape(targets.shape).astype(jnp.float32)

    tokens = ("batch", "seq")
    each = kernel_map(local, ((*tokens, "embed"), (None, None), tokens), tokens)
    nll = jnp.sum(jax.lax.stop_gradient(weights) * each(hidden, narrow, targets))
    return nll, {"nll": jax.lax.stop_gradient(nll), "z_loss": jnp.zeros_like(nll)}
