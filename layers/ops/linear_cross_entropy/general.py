"""The same loss of a head that is not a plain product: adapted, quantized, biased, or any other.

The head is a function; its gradients are its own pull-back of a chunk's dloss/dlogits, taken at
once while the chunk's logits exist, as in :mod:`.xla`. Its arrays are found by tracing it.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from .terms import Terms, accumulate, evaluate, loss_of, perturbed, scaled, ways


class _Plan(NamedTuple):
    """What is static of a call."""

    terms: Terms
    jaxpr: Any  # of the head, as a function of its arrays and of a chunk
    count: int


def head_cross_entropy_xla(logits_of, hidden, targets, weights, sharpen, *, terms, max_logits):
    """See :func:`..head_cross_entropy`."""
    vocab_size = jax.eval_shape(logits_of, hidden).shape[-1]
    count = _count(*targets.shape, vocab_size, max_logits)
    hidden, targets, weights = (_split(x, count) for x in (hidden, targets, weights))
    sharpen = None if sharpen is None else _split(sharpen, count)
    head = jax.make_jaxpr(logits_of)(hidden[0])
    return _loss(_Plan(terms, head.jaxpr, count), head.consts, hidden, targets, weights, sharpen)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(plan, head, *parts):
    return _run(plan, [False] * len(head), False, head, *parts)[0]


def _loss_fwd(plan, *primals):
    arrays, wanted = perturbed(primals)
    result, *gradients = _run(plan, *wanted[:2], *arrays)
    return result, gradients


def _loss_bwd(plan, gradients, cotangents):
    return (*scaled(gradients, cotangents), None, None, None)


_loss.defvjp(_loss_fwd, _loss_bwd, symbolic_zeros=True)


def _run(plan, learnt, wanted, head, hidden, targets, weights, sharpen):
    """The loss and its sums; gradients of the head's arrays (None if not learnt) and of hidden."""

    def step(total, part):
        x, *labels = part

        def logits_of(some, x=x):
            some = iter(some)
            arrays = [next(some) if w else a for a, w in zip(head, learnt, strict=True)]
            return jaxpr_as_fun(ClosedJaxpr(plan.jaxpr, arrays))(x)[0]

        some = [a for a, w in zip(head, learnt, strict=True) if w]
        if not some and not wanted:
            sums, _ = evaluate(plan.terms, logits_of([]).astype(jnp.float32), *labels)
            return (total[0] + sums, []), None
        logits, pull = jax.vjp(logits_of, some, *((x,) if wanted else ()))
        sums, dlogits = evaluate(plan.terms, logits.astype(jnp.float32), *labels, gradient=True)
        dhead, *dhidden = pull(dlogits.astype(logits.dtype))
        return jax.tree.map(jnp.add, total, (sums, dhead)), dhidden[0] if wanted else None

    start = (
        jnp.zeros(len(plan.terms.names), jnp.float32),
        [
            jnp.zeros_like(a, dtype=jnp.promote_types(a.dtype, jnp.float32))
            for a, w in zip(head, learnt, strict=True)
            if w
        ],
    )
    parts = (hidden, targets, weights, sharpen)
    (sums, dhead), dhidden = accumulate(step, start, parts, plan.count)
    found = iter(dhead)
    dhead = [next(found).astype(a.dtype) if w else None for a, w in zip(head, learnt, strict=True)]
    return loss_of(plan.terms, sums), dhead, dhidden


def _count(rows: int, length: int, vocab_size: int, max_logits: int) -> int:
    """Chunks that hold at most about ``max_logits`` logits of a device each."""
    logits = rows * length * vocab_size / ways("batch", "seq", "vocab")
    split = ways("seq")
    if split == 1:
        return min(length, math.ceil(logits / max_logits))
    # Padding would move tokens from device to device: chunks divide the share of each.
    local = max(length // split, 1)
    return next((n for n in range(1, local) if local % n == 0 and logits / n <= max_logits), local)


def _split(x, count: int):
    """``[B, T, ...]`` to ``[count, B, T / count, ...]``, zeros at the end if need be.

    Chunk ``i`` has the tokens ``i, i + count, ...``: every device keeps a share of each.
    """
    if x.shape[1] % count:
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % count)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(x.shape[0], -1, count, *x.shape[2:])
    return jnp.moveaxis(x, 2, 0)
