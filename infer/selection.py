"""Which tokens of a row are the largest: by rank (a sort), or by a threshold (a bisection).

Both give the same answer to the last token, whatever the batch: masses are summed as integers, and
such a sum does not depend on its order. They differ among exact ties at the edge only: a sort keeps
as few as are needed; a threshold keeps all.

A bisection reads the row once for each of the 32 bits of a float; a sort moves it. On large
vocabularies the first is many times faster (``bench/policy_chain.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..errors import InputError

IMPLEMENTATIONS = ("sort", "bisect")

# Up to this vocabulary a sort is not slower: bench/policy_chain.py.
_SORTED_VOCABULARY = 64
# A share that float32 rounding alone keeps from a target counts as reaching it.
_SLACK = 2.0**-22


def check_implementation(policy: str, implementation: str | None) -> None:
    """Raise InputError for a name that is neither of the two."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise InputError(
            f"{policy}: implementation={implementation!r} is not one of {list(IMPLEMENTATIONS)}; "
            "leave it None to pick by the vocabulary's size"
        )


def _sorts(implementation: str | None, vocab_size: int) -> bool:
    """Whether to sort: as told, or by the vocabulary's size."""
    return (implementation or ("sort" if vocab_size <= _SORTED_VOCABULARY else "bisect")) == "sort"


def kth_largest(
    keys: Float[Array, "B V"], k: Int[Array, "B"], implementation: str | None, bound: int | None
) -> Float[Array, "B"]:
    """The ``k``-th largest of each row, ``1 <= k <= V``.

    Args:
        keys: of any floats but NaN.
        k: of each row.
        implementation: ``"sort"``, ``"bisect"`` or None.
        bound: that no ``k`` exceeds, if one is known: a sort then ranks only so many.
    """
    size = keys.shape[-1]

    def rank(keys, k):
        ranked = jax.lax.top_k(keys, size if bound is None else min(bound, size))[0]
        return jnp.take_along_axis(ranked, k[:, None] - 1, axis=-1)[:, 0]

    def cut(keys, k):
        return _bisect(lambda x: jnp.sum(keys >= x[:, None], -1, dtype=jnp.int32) >= k, keys)

    if _sorts(implementation, size):
        return rank(keys, k)
    if implementation is None and bound is not None:
        # On CPU the few largest are found in one pass; elsewhere XLA may sort everything.
        return jax.lax.platform_dependent(keys, k, cpu=rank, default=cut)
    return cut(keys, k)


def smallest_set(
    keys: Float[Array, "B V"],
    weights: Float[Array, "B V"],
    share: Float[Array, "B"],
    implementation: str | None,
    *,
    spare: str = "low",
) -> Bool[Array, "B V"]:
    """The fewest tokens of the largest keys that have ``share`` of their row's weight.

    At least one token, and all of a row without weight.

    Args:
        keys: of any floats but NaN.
        weights: non-negative float32; they need not sum to one.
        share: below 1.
        implementation: ``"sort"``, ``"bisect"`` or None.
        spare: which ids a sort prefers among exact ties at the edge, ``"low"`` or ``"high"``.
    """
    same = keys is weights
    weights = weights * _scale(weights)
    # A power of two keeps the order, and one array is read instead of two.
    keys = weights if same else keys
    whole = _mass(weights)
    target = (whole.astype(jnp.float32) * share * (1 - _SLACK)).astype(jnp.int32)
    if not _sorts(implementation, keys.shape[-1]):
        edge = _bisect(lambda x: _mass(jnp.where(keys >= x[:, None], weights, 0)) >= target, keys)
        return keys >= edge[:, None]
    if spare == "high":
        keys, weights = keys[:, ::-1], weights[:, ::-1]
    ids = jax.lax.broadcasted_iota(jnp.int32, keys.shape, 1)
    ranked, ranked_ids = jax.lax.sort((-keys, ids), num_keys=1, is_stable=True)
    mass = _mass(jnp.take_along_axis(weights, ranked_ids, axis=-1), cumulative=True)
    last = jnp.minimum(jnp.sum(mass < target[:, None], axis=-1, dtype=jnp.int32), ids.shape[-1] - 1)
    edge, edge_id = (jnp.take_along_axis(x, last[:, None], -1) for x in (-ranked, ranked_ids))
    keep = (keys > edge) | ((keys == edge) & (ids <= edge_id)) | (whole == 0)[:, None]
    return keep[:, ::-1] if spare == "high" else keep


def total(weights: Float[Array, "B V"]) -> Float[Array, "B 1"]:
    """The sum of each row of non-negative float32, the same in any order."""
    scale = _scale(weights)
    return _mass(weights * scale)[:, None].astype(jnp.float32) / scale


def mass_reached(weights: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """The share of its row's weight that each token and all larger ones have, low ids first."""
    weights = weights * _scale(weights)
    ids = jax.lax.broadcasted_iota(jnp.int32, weights.shape, 1)
    ranked, ranked_ids = jax.lax.sort((-weights, ids), num_keys=1, is_stable=True)
    mass = _mass(-ranked, cumulative=True)
    shares = mass / jnp.maximum(mass[:, -1:], 1).astype(jnp.float32)
    return jax.lax.sort((ranked_ids, shares), num_keys=1)[1]


def _scale(weights: Array) -> Float[Array, "B 1"]:
    """A power of two times which a row's sum is between 2^29 and about 2^30."""
    _, exponent = jnp.frexp(jnp.sum(weights, axis=-1, keepdims=True))
    return jnp.ldexp(jnp.float32(1), 30 - exponent)


def _mass(weights: Array, cumulative: bool = False) -> Int[Array, "..."]:
    """The sum in whole units of weights that :func:`_scale` scaled, exact but for the last one.

    Each weight is two integers, its units and the fraction that is left in as many bits as no sum
    over the row overflows: no order of summation changes either sum.
    """
    bits = 31 - max(1, (weights.shape[-1] - 1).bit_length())
    units = jnp.floor(weights)
    parts = units.astype(jnp.int32), ((weights - units) * 2**bits).astype(jnp.int32)
    add: Any = jnp.cumsum if cumulative else jnp.sum
    units, fractions = (add(x, axis=-1, dtype=jnp.int32) for x in parts)
    return units + (fractions >> bits)


def _bisect(
    enough: Callable[[Float[Array, "B"]], Bool[Array, "B"]], keys: Float[Array, "B V"]
) -> Float[Array, "B"]:
    """The largest key that is ``enough``, which holds up to some key and not above.

    Bisects the bits of floats, whose order is that of unsigned integers once negatives are turned
    around: 32 steps end at neighbours, whatever the keys.
    """

    def step(_, ends):
        low, high = ends
        middle = low + ((high - low) >> 1) + ((high - low) & 1)
        up = enough(_float(middle))
        return jnp.where(up, middle, low), jnp.where(up, high, middle - 1)

    low = jnp.full_like(keys[:, 0], -jnp.inf)
    ends = _bits(low), _bits(jnp.max(keys, axis=-1))
    edge = _float(jax.lax.fori_loop(0, 32, step, ends)[0])
    # A subnormal edge may be 0 to one comparison and not to the next; a key is itself to all.
    return jnp.min(jnp.where(keys >= edge[:, None], keys, jnp.inf), axis=-1)


_SIGN = np.uint32(0x80000000)


def _bits(x: Float[Array, "B"]) -> Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >= _SIGN, ~bits, bits | _SIGN)


def _float(bits: Array) -> Float[Array, "B"]:
    bits = jnp.where(bits >= _SIGN, bits ^ _SIGN, ~bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
