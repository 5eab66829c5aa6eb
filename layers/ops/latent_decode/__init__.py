"""Latent attention for a few new tokens: queries in the latent space, over the cache itself.

The absorbed form of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): every
head reads the same cached vectors, all C columns as keys and the first V as values. A new token
reads each of them once and does little with it, so that its time is the cache's bytes over the
memory's bandwidth. `latent_decode` is the public function; `reference` is the oracle.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int

from ....errors import InputError
from .. import tuning
from ..platform import by_platform
from .pallas_gpu import latent_decode_pallas_gpu
from .pallas_tpu import latent_decode_pallas_tpu
from .reference import latent_decode_reference
from .shapes import shape_class
from .xla import latent_decode_xla

__all__ = ["IMPLEMENTATIONS", "latent_decode"]

_IMPLEMENTATIONS = {
    "reference": latent_decode_reference,
    "xla": latent_decode_xla,
    "pallas_tpu": latent_decode_pallas_tpu,
    "pallas_gpu": latent_decode_pallas_gpu,
}
# What `implementation=None` runs where the table of `..tuning` has nothing: no TPU and no GPU has
# timed the kernels yet.
_DEFAULT = "xla"
IMPLEMENTATIONS = tuple(sorted(_IMPLEMENTATIONS))


def latent_decode(
    q: Float[Array, "B T N C"],
    latent: Float[Array, "B S C"],
    *,
    positions: Int[Array, "B T"],
    value_dim: int,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B T N V"]:
    """`softmax(scale * q latentᵀ) latent[..., :V]`, each query over the slots up to its position.

    Scores and softmax are float32. What a row holds past its last position may be anything, NaN
    included, and is not read but for the rest of a block. `vmap` adds rows to the batch. Gradients
    are those of the dense float32 form, by whatever implementation: right, and not fast. Under a
    mesh, call it inside `jaxalope.sharding.kernel_map`, as the layer does.

    Args:
        q: queries, carried into the latent space; few tokens T, as a whole score matrix of a block
            is held.
        latent: what is cached by slot, any float dtype; products run in the dtype of ``q``.
        positions: the last slot that a query sees. Below 0 it sees none and returns zeros, from
            S - 1 on it sees all.
        value_dim: V, the columns that are values; at most C.
        scale: of the scores.
        implementation: "xla", "pallas_tpu" (float32 or bfloat16, T * N up to 1024, lowered for
            TPU), "pallas_gpu" (float32 or bfloat16, V up to 512, lowered for CUDA), "reference", or
            None for the best one where the code is lowered.

    Returns:
        One vector a query, in the dtype of ``q``.

    Raises:
        InputError: shapes that do not fit together, an implementation not on offer, or one that was
            named and cannot run here.
    """
    _check(q, latent, positions, value_dim, implementation)
    if implementation is None:
        tuned = tuning.chosen_implementation("latent_decode", shape_class(q.shape[-1], value_dim))
        names = {"default": _DEFAULT} | tuned
        run = by_platform({p: _IMPLEMENTATIONS[name] for p, name in names.items()})
    else:
        run = _IMPLEMENTATIONS[implementation]
    run = functools.partial(run, value_dim=value_dim, scale=scale)
    counts = jnp.clip(positions.astype(jnp.int32), -1, latent.shape[1] - 1) + 1
    with jax.named_scope("latent_decode"):
        return _decode(run, functools.partial(_dense, value_dim, scale), q, latent, counts)


def _dense(value_dim, scale, q, latent, counts):
    return latent_decode_reference(q, latent, counts, value_dim=value_dim, scale=scale)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _decode(run, dense, q, latent, counts):
    call = custom_vmap(run)
    call.def_vmap(functools.partial(_fold, run, dense))
    return call(q, latent, counts)


@_decode.defjvp
def _decode_jvp(run, dense, primals, tangents):
    q, latent, counts = primals
    out = _decode(run, dense, q, latent, counts)
    _, tangent = jax.jvp(lambda q, latent: dense(q, latent, counts), (q, latent), tangents[:2])
    return out, tangent


def _fold(run, dense, size, batched, q, latent, counts):
    """A mapped axis becomes rows of the batch, or more queries of rows that share their cache."""

    def mapped(x, is_mapped):
        return x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))

    q, counts = mapped(q, batched[0]), mapped(counts, batched[2])
    rows, length = q.shape[1:3]
    if batched[1]:
        flat = (x.reshape(size * rows, *x.shape[2:]) for x in (q, latent, counts))
        out = _decode(run, dense, *flat)
        return out.reshape(size, rows, *out.shape[1:]), True
    q, counts = (jnp.moveaxis(x, 0, 1).reshape(rows, -1, *x.shape[3:]) for x in (q, counts))
    out = _decode(run, dense, q, latent, counts)
    return jnp.moveaxis(out.reshape(rows, size, length, *out.shape[2:]), 1, 0), True


def _check(q, latent, positions, value_dim, implementation):
    """Raises InputError for the first argument that does not fit, by name."""
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        raise InputError(
            f"latent_decode: implementation={implementation!r} is not one of "
            f"{', '.join(IMPLEMENTATIONS)}; leave it None to pick by platform"
        )
    if q.ndim != 4 or 0 in q.shape:
        raise InputError(f"latent_decode: q {q.shape} must be [B, T, N, C], none of them 0")
    wanted = (q.shape[0], q.shape[3])
    if latent.ndim != 3 or (latent.shape[0], latent.shape[2]) != wanted or not latent.shape[1]:
        raise InputError(
            f"latent_decode: latent {latent.shape} must be [B, S, C] with q's {q.shape} B and C, "
            "and at least one slot"
        )
    if positions.shape != q.shape[:2] or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise InputError(
            f"latent_decode: positions {positions.dtype}{list(positions.shape)} must be integers "
            f"of q's [B, T], {list(q.shape[:2])}"
        )
    if not 1 <= value_dim <= q.shape[3]:
        raise InputError(
            f"latent_decode: value_dim={value_dim} must be in 1..{q.shape[3]}, the width C of "
            "latent"
        )
