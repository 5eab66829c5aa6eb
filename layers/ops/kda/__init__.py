"""Kimi Delta Attention: the gated delta rule with one decay per key channel.

The state S [K, V] of a head follows, per token (Kimi Linear report, section 3),

    S <- diag(exp g) S;   S <- S + k (beta (v - S^T k))^T;   o = scale S^T q.

`kda` is the public function; `reference` is the oracle that every other implementation is judged
against. A new backend is a file of this folder, a line in `_IMPLEMENTATIONS` and, where it is the
best choice for a platform, a line in `_BY_PLATFORM`; callers do not change. An implementation is
given Hv / H value heads a q/k head, or, wrapped in `_ungrouped`, one.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ....errors import InputError
from ...segments import is_token
from .. import tuning
from ..platform import by_platform
from .gates import bounded_gate, l2norm, softplus_gate
from .pallas_gpu import kda_pallas_gpu
from .pallas_tpu import kda_pallas_tpu
from .reference import kda_reference
from .shapes import shape_class
from .step import kda_step, repeat_heads
from .tokamax_tpu import kda_tokamax
from .xla import kda_xla

__all__ = ["bounded_gate", "kda", "kda_step", "l2norm", "softplus_gate"]


def _ungrouped(run):
    """Repeats q/k heads for an implementation that takes one a value head."""

    @functools.wraps(run)
    def repeated(q, k, v, *rest, **static):
        q, k = (repeat_heads(x, v.shape[2], axis=2) for x in (q, k))
        return run(q, k, v, *rest, **static)

    return repeated


_IMPLEMENTATIONS = {
    "reference": _ungrouped(kda_reference),
    "xla": _ungrouped(kda_xla),
    "pallas_gpu": kda_pallas_gpu,
    "pallas_tpu": kda_pallas_tpu,
    "tokamax": _ungrouped(kda_tokamax),
}
# What `implementation=None` runs, by the platform that the code is lowered for, where the table of
# `..tuning` has nothing. No kernel is here yet: no TPU and no GPU has timed one.
_BY_PLATFORM = {"default": "xla"}
# The kernels: a kind of device has one of them.
_PALLAS = ("pallas_gpu", "pallas_tpu")
# Implementations that have a kernel for one token.
_STEP_KERNELS = ("pallas_gpu",)
_CHUNK_SIZES = (16, 32, 64, 128)


def kda(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T Hv V"],
    g: Float[Array, "B T Hv K"],
    beta: Float[Array, "B T Hv"],
    *,
    initial_state: Float[Array, "B Hv K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    gate_lower_bound: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T Hv V"], Float[Array, "B Hv K V"]]:
    """Runs the gated delta rule over T tokens; differentiable in every array but segment_ids.

    Args:
      q: queries, l2-normalised by the caller (`l2norm`), any float dtype.
      k: keys, l2-normalised by the caller.
      v: values. Hv is a multiple of H; value head j reads q/k head j // (Hv // H).
      g: log-decay in nats, <= 0, unbounded below (`softplus_gate`, `bounded_gate`); float32.
      beta: write strength, in (0, 1) for the published models.
      initial_state: key-major state that the row's first segment continues from; None is zero.
      segment_ids: 0 is padding, anywhere in the row: it leaves the state untouched and its output
        is zero. A change of non-zero id between successive tokens restarts the state from zero.
      scale: factor of the queries; None is K ** -0.5.
      chunk_size: tokens a chunk, 16, 32, 64 or 128; every size gives the same result. None is 64,
        or what `..tuning` knows to be faster for this implementation.
      gate_lower_bound: what no g is below, as the caller knows; None is unbounded. Only "tokamax"
        asks for it, for -5 or more.
      implementation: "reference", "xla", "pallas_tpu" or "pallas_gpu" (float32 or bfloat16, heads
        up to 256 wide, lowered for TPU or for CUDA), "tokamax" (where it is installed, for TPU;
        bounded gate, no segments), or None for the best one where the code is lowered.

    Returns:
      o in v's dtype, and the float32 state after each row's last token.

    Raises:
      InputError: shapes that do not fit together, an implementation or chunk size not on offer, or
        an implementation that was named and cannot run here; None falls back instead.
    """
    _check(q, k, v, g, beta, initial_state, segment_ids, chunk_size, implementation)
    length = v.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    g = g.astype(jnp.promote_types(g.dtype, jnp.float32))
    if segment_ids is not None:
        token = is_token(segment_ids)[..., None]
        q, k, v, g = (jnp.where(token[..., None], x, 0) for x in (q, k, v, g))
        beta = jnp.where(token, beta, 0)
    if initial_state is None:
        # Made from the inputs, so that it has their sharding.
        initial_state = jnp.zeros_like(g[:, 0, :, :, None] * v[:, 0, :, None, :])
    initial_state = initial_state.astype(g.dtype)
    if length == 1 and (implementation is None or implementation in _STEP_KERNELS):
        one = (x[:, 0] for x in (q, k, v, g, beta))
        o, state = kda_step(*one, initial_state, scale=scale, implementation=implementation)
        return o[:, None], state
    shapes = shape_class(q.shape[-1], v.shape[-1])
    if chunk_size is None:
        chunk_size = _tuned_chunk_size(implementation, shapes)
    chunk = min(chunk_size, max(_CHUNK_SIZES[0], 1 << (length - 1).bit_length()))
    q, k, v, g, beta, segment_ids = (
        _pad_tokens(x, -length % chunk) for x in (q, k, v, g, beta, segment_ids)
    )
    run = _select(implementation, shapes, gate_lower_bound)
    o, state = run(q, k, v, g, beta, initial_state, segment_ids, scale=scale, chunk_size=chunk)
    return o[:, :length], state


def _pad_tokens(x: Array | None, count: int) -> Array | None:
    if x is None or count == 0:
        return x
    return jnp.pad(x, ((0, 0), (0, count)) + ((0, 0),) * (x.ndim - 2))


def _tuned_chunk_size(implementation: str | None, shapes: str) -> int:
    """What the table has for this implementation: a size that suits one need not suit another."""
    tuned = tuning.chosen("kda", shapes)
    size = 64
    if implementation in (None, tuned.get("implementation", _BY_PLATFORM["default"])):
        size = tuned.get("chunk_size", size)
    if implementation in _PALLAS:
        size = tuned.get("pallas_chunk_size", size)
    return size


def _select(implementation: str | None, shapes: str, gate_lower_bound: float | None):
    def pick(name):
        run = _IMPLEMENTATIONS[name]
        if name != "tokamax":
            return run
        return functools.partial(run, gate_lower_bound=gate_lower_bound)

    if implementation is not None:
        return pick(implementation)
    names = _BY_PLATFORM | tuning.chosen_implementation("kda", shapes)
    return by_platform({platform: pick(name) for platform, name in names.items()})


def _check(q, k, v, g, beta, initial_state, segment_ids, chunk_size, implementation):
    """Raises InputError for the first argument that does not fit, by name."""
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        supported = ", ".join(sorted(_IMPLEMENTATIONS))
        raise InputError(f"implementation={implementation!r} is not one of: {supported}, or None")
    if chunk_size is not None and chunk_size not in _CHUNK_SIZES:
        raise InputError(f"chunk_size={chunk_size} must be one of {_CHUNK_SIZES}")
    if q.ndim != 4 or v.ndim != 4:
        raise InputError(f"q {q.shape} and v {v.shape} must be [B, T, heads, dim]")
    batch, length, heads, key_dim = q.shape
    value_heads, value_dim = v.shape[2:]
    if length == 0:
        raise InputError(f"q {q.shape} has no tokens; T must be at least 1")
    if value_heads % heads:
        raise InputError(
            f"v has {value_heads} heads, not a multiple of q's {heads}: each q/k head must serve "
            "the same number of value heads"
        )
    wanted = {
        "k": (k, (batch, length, heads, key_dim)),
        "v": (v, (batch, length, value_heads, value_dim)),
        "g": (g, (batch, length, value_heads, key_dim)),
        "beta": (beta, (batch, length, value_heads)),
        "initial_state": (initial_state, (batch, value_heads, key_dim, value_dim)),
        "segment_ids": (segment_ids, (batch, length)),
    }
    for name, (x, shape) in wanted.items():
        if x is not None and x.shape != shape:
            raise InputError(f"{name} has shape {x.shape}; q {q.shape} and v {v.shape} ask {shape}")
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise InputError(f"segment_ids has dtype {segment_ids.dtype}; use integers, 0 for padding")
