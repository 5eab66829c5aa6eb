"""The loss of a plain head and its gradients in one pass over chunks of tokens.

Three products a chunk: logits, their gradient by the head, hidden by their gradient. Where a
gradient is asked for, all three are taken on the way forward, while a chunk's logits exist, and the
backward pass multiplies two finished arrays by a number. Differentiating a checkpointed scan takes
a fourth, the logits again; what is kept between the passes here, the gradients themselves, is what
it would hold right after.

Under a mesh every device takes its own tokens with its own columns of the head, and adds the head's
gradient over chunks before it is summed over devices, once.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from ....sharding import constrain, kernel_map, mesh_axes_of
from .terms import Terms, accumulate, evaluate, loss_of, perturbed, scaled

_TOKENS = ("batch", "seq")


class _Plan(NamedTuple):
    """What is static of a call."""

    terms: Terms
    softcap: float | None
    vocab_first: bool
    chunk_size: int

    @property
    def head_axes(self) -> tuple[str, str]:
        return ("vocab", "embed") if self.vocab_first else ("embed", "vocab")


def linear_cross_entropy_xla(
    hidden, kernel, targets, weights, sharpen, *, terms: Terms, softcap, vocab_first, chunk_size
):
    """See :func:`..linear_cross_entropy`; ``chunk_size`` is of a device's tokens."""
    plan = _Plan(terms, softcap, vocab_first, chunk_size)
    hidden = constrain(hidden, *_TOKENS, "embed")
    return _loss(plan, hidden, kernel, targets, weights, sharpen)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(plan, hidden, kernel, targets, weights, sharpen):
    return _run(plan, (False, False), hidden, kernel, targets, weights, sharpen)[0]


def _loss_fwd(plan, *primals):
    # A frozen head, as under LoRA, has no gradient to compute or to keep.
    arrays, wanted = perturbed(primals)
    result, *gradients = _run(plan, wanted[:2], *arrays)
    return result, gradients


def _loss_bwd(plan, gradients, cotangents):
    return (*scaled(gradients, cotangents), None, None, None)


_loss.defvjp(_loss_fwd, _loss_bwd, symbolic_zeros=True)


def _run(plan, wanted, hidden, kernel, targets, weights, sharpen):
    """The loss and its sums, and what of the gradients of hidden and of the head is wanted."""
    narrow = constrain(kernel.astype(hidden.dtype), *plan.head_axes)
    arrays = {
        "hidden": (hidden, (*_TOKENS, "embed")),
        "kernel": (narrow, plan.head_axes),
        "targets": (targets, _TOKENS),
        "weights": (weights, _TOKENS),
        "sharpen": (sharpen, _TOKENS),
    }
    arrays = {name: pair for name, pair in arrays.items() if pair[0] is not None}
    out_axes = [(None,), (*_TOKENS, "embed"), plan.head_axes]
    out_axes = [axes for axes, there in zip(out_axes, (True, *wanted), strict=True) if there]

    def local(*blocks):
        return _local(plan, wanted, **dict(zip(arrays, blocks, strict=True)))

    found = kernel_map(local, [axes for _, axes in arrays.values()], tuple(out_axes))(
        *(x for x, _ in arrays.values())
    )
    sums, *rest = found
    dhidden = rest.pop(0) if wanted[0] else None
    dkernel = _laid_out_as(rest.pop(0).astype(kernel.dtype), kernel) if wanted[1] else None
    return loss_of(plan.terms, sums), dhidden, dkernel


def _laid_out_as(x, like):
    sharding = jax.typeof(like).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return x
    return jax.sharding.reshard(x, sharding.spec)


def _local(plan, wanted, hidden, kernel, targets, weights, sharpen=None):
    """One device's tokens and columns."""
    tokens, vocab = mesh_axes_of("batch") + mesh_axes_of("seq"), mesh_axes_of("vocab")
    shape, size = hidden.shape, targets.size
    count = -(-size // plan.chunk_size)
    chunk = -(-size // count)
    per_token = {"hidden": hidden, "targets": targets, "weights": weights, "sharpen": sharpen}

    def chunks(x):
        x = x.reshape(size, *x.shape[2:])
        # Tokens of weight 0 fill the last chunk.
        x = jnp.pad(x, ((0, count * chunk - size),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(count, chunk, *x.shape[1:])

    parts = {name: chunks(x) for name, x in per_token.items() if x is not None}
    axes = "vd" if plan.vocab_first else "dv"
    wide = {"preferred_element_type": jnp.float32}

    def step(total, part):
        x = part["hidden"]
        logits = jnp.einsum(f"cd,{axes}->cv", x, kernel, **wide)
        if plan.softcap is not None:
            logits = plan.softcap * jnp.tanh(logits / plan.softcap)
        labels = (part["targets"], part["weights"], part.get("sharpen"))
        sums, dlogits = evaluate(plan.terms, logits, *labels, vocab, gradient=any(wanted))
        dhidden = None
        if any(wanted):
            if plan.softcap is not None:
                dlogits *= 1 - jnp.square(logits / plan.softcap)
            dlogits = dlogits.astype(x.dtype)
        if wanted[0]:
            dhidden = _psum(jnp.einsum(f"cv,{axes}->cd", dlogits, kernel, **wide), vocab)
            dhidden = dhidden.astype(x.dtype)
        more = [sums]
        if wanted[1]:
            more.append(jnp.einsum(f"cd,cv->{axes}", x, dlogits, **wide))
        return jax.tree.map(jnp.add, total, more), dhidden

    start = [jnp.zeros(len(plan.terms.names), jnp.float32)]
    if wanted[1]:
        start.append(jnp.zeros(kernel.shape, jnp.float32))
    total, dhidden = accumulate(step, start, parts, count)
    sums, *dkernel = (_psum(x, tokens) for x in total)
    if wanted[0]:
        dhidden = dhidden.reshape(count * chunk, shape[-1])[:size].reshape(shape)
    return (sums, *((dhidden,) if wanted[0] else ()), *dkernel)


def _psum(x, axes):
    return jax.lax.psum(x, axes) if axes else x
