"""Softmax attention with grouped keys and values, causal by position or by block of positions.

``attention(q, k, v, ...)`` is what layers call; ``reference`` is the oracle.
"""

from __future__ import annotations

import math

import jax
from jaxtyping import Array, Bool, Float, Int

from ....errors import InputError
from .mask import Marks
from .reference import attention as _reference
from .tokamax import attention as _tokamax
from .xla import attention as _xla

_IMPLEMENTATIONS = {"reference": _reference, "xla": _xla, "tokamax": _tokamax}


def attention(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
    query_noisy: Bool[Array, "B T"] | None = None,
    key_noisy: Bool[Array, "B S"] | None = None,
    block: int | None = 1,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N V"]:
    """``softmax(scale * q kᵀ) v`` with float32 scores.

    Query ``i`` sees the keys ``j`` with ``j // block <= i // block`` by position, at most
    ``window - 1`` before it and, where segments are given, of its own segment. Query head ``n``
    reads key head ``n // (N // G)``. A query that sees no key returns a finite value.

    Block diffusion reads a text in two views at once, a noisy one and the clean one (arXiv
    2503.09573). There ``noisy`` marks the tokens of the noisy view: they see the noisy tokens of
    their own block and the clean ones of earlier blocks, while clean ones see clean ones only.

    Args:
        q: queries; ``N`` is a multiple of ``G``.
        k: keys.
        v: values; their width may differ from the keys'.
        query_positions: of each query, on the same axis as ``key_positions``.
        key_positions: of each key.
        query_segments: segment of each query; None is one segment.
        key_segments: segment of each key.
        query_noisy, key_noisy: which tokens are of a noisy view; both, or None where there is none.
        block: positions that see each other whole. 1 is causal attention, ``b`` block-causal one,
            None has everything in one block: it is bidirectional.
        scale: ``K ** -0.5`` if None.
        softcap: scaled scores become ``softcap * tanh(scores / softcap)``, before anything is
            hidden (Gemma-2, arXiv 2408.00118, section 2); None leaves them.
        window: how many of the newest keys a query sees, itself included; None is all.
        implementation: ``"xla"``, ``"reference"``, ``"tokamax"`` (where it is installed; a mask of
            ``B T S`` bytes is made), or None for the platform's best.

    Returns:
        One vector a query head, in the dtype of ``v``.

    Raises:
        InputError: an unknown implementation or one that is not installed, head counts that do not
            divide, a window, block or soft cap that is not positive, a window beside a block, or
            one noisy side alone.
    """
    if q.shape[2] % k.shape[2]:
        raise InputError(
            f"attention: num_heads={q.shape[2]} is not a multiple of num_kv_heads={k.shape[2]}"
        )
    for name, value in (("softcap", softcap), ("window", window), ("block", block)):
        if value is not None and value <= 0:
            raise InputError(f"attention: {name}={value} must be positive; None turns it off")
    if window is not None and block != 1:
        raise InputError(f"attention: {window=} is of causal attention (block=1), not {block=}")
    if (query_noisy is None) != (key_noisy is None):
        raise InputError("attention: give query_noisy and key_noisy both, or neither")
    if implementation not in (None, *_IMPLEMENTATIONS):
        raise InputError(
            f"attention: implementation={implementation!r} is not one of "
            f"{sorted(_IMPLEMENTATIONS)}; leave it None to pick by platform"
        )
    run = _IMPLEMENTATIONS[implementation or "xla"]
    with jax.named_scope("attention"):
        return run(
            q,
            k,
            v,
            Marks(query_positions, query_segments, query_noisy),
            Marks(key_positions, key_segments, key_noisy),
            scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
            softcap=softcap,
            window=window,
            block=block,
        )
