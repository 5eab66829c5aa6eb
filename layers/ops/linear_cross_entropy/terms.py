"""A chunk's logits to its sums and to the gradient of its loss: what every product shares.

With ``z`` the logits of a token, ``p = softmax(z)``, ``Z = logsumexp(z)``, ``y`` its target, ``w``
its weight, ``s`` its weight in the entropy ``H = Z - sum(p z)`` (0 where another
token is likelier than ``y``), and coefficients ``a`` and ``c`` of the z-loss and of the entropy::

    loss   = w (Z - z_y) + a w Z^2 + c s H
    dloss/dz = p (w + 2 a w Z - c s (log p + H)) - w onehot(y)

Everything of the second line is there once the first is known, so a pass that computes the loss can
compute its gradient, without the logits again.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from ....sharding import mesh_axes_of


class Terms(NamedTuple):
    """What is static of a loss."""

    z_loss: float = 0.0
    sharpening: float = 0.0
    entropy: bool = False  # is there an entropy's weight
    accuracy: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sums, in order."""
        more = (("accuracy", self.accuracy), ("entropy", self.entropy))
        return ("nll", "z_loss", *(name for name, there in more if there))


def evaluate(terms: Terms, logits, targets, weights, sharpen, vocab_axes=(), gradient=False):
    """The sums of these tokens ``[len(terms.names)]``, and dloss/dlogits where it is asked for.

    Args:
        terms: of the loss.
        logits: ``[..., V]`` float32.
        targets: ``[...]`` ids.
        weights: ``[...]`` float32.
        sharpen: likewise, of the entropy; or None.
        vocab_axes: mesh axes that split V, inside a ``shard_map``.
        gradient: is the second result wanted; otherwise it is None.
    """
    ids = jnp.arange(logits.shape[-1], dtype=targets.dtype)
    if vocab_axes:
        ids += jax.lax.axis_index(vocab_axes).astype(ids.dtype) * logits.shape[-1]

    def total(x):
        x = jnp.sum(x, axis=-1)
        return jax.lax.psum(x, vocab_axes) if vocab_axes else x

    top = jnp.max(logits, axis=-1)
    top = jax.lax.pmax(top, vocab_axes) if vocab_axes else top
    shift = jnp.where(jnp.isfinite(top), top, 0)
    log_z = jnp.log(total(jnp.exp(logits - shift[..., None]))) + shift
    # A masked sum instead of a gather: it stays local where the vocabulary is sharded.
    chosen = ids == targets[..., None]
    own = total(jnp.where(chosen, logits, 0))
    sums = [jnp.sum(weights * (log_z - own)), terms.z_loss * jnp.sum(weights * log_z**2)]
    # Not by argmax, which takes longer on CPU than all the rest of this function.
    right = own == top
    if terms.accuracy:
        sums.append(jnp.sum(weights * right))
    if terms.entropy:
        p = jnp.exp(logits - log_z[..., None])
        sharpen = sharpen * right
        entropy = log_z - total(p * logits)
        sums.append(jnp.sum(sharpen * entropy))
    if not gradient:
        return jnp.stack(sums), None
    slope = weights * (1 + 2 * terms.z_loss * log_z)
    log_p = logits - log_z[..., None]
    if terms.entropy and terms.sharpening:
        pull = (terms.sharpening * sharpen)[..., None]
        dlogits = jnp.exp(log_p) * (slope[..., None] - pull * (log_p + entropy[..., None]))
    else:
        dlogits = jnp.exp(log_p) * slope[..., None]
    return jnp.stack(sums), dlogits - jnp.where(chosen, weights[..., None], 0)


def loss_of(terms: Terms, sums):
    """``(loss, {name: sum})`` of the sums in order."""
    named = dict(zip(terms.names, sums, strict=True))
    loss = sums[0] + sums[1]
    if terms.entropy and terms.sharpening:
        loss = loss + terms.sharpening * named["entropy"]
    return loss, named


def accumulate(step, start, parts, count: int):
    """``step(total, part) -> (total, out)`` over ``count`` parts, in a scan if they are several."""
    if count > 1:
        return jax.lax.scan(step, start, parts)
    total, out = step(start, jax.tree.map(lambda x: x[0], parts))
    return total, jax.tree.map(lambda x: x[None], out)


def perturbed(primals):
    """The arguments of a forward rule with symbolic zeros, and which arrays have a tangent."""
    is_leaf = lambda x: isinstance(x, CustomVJPPrimal)  # noqa: E731
    arrays = jax.tree.map(lambda x: x.value, primals, is_leaf=is_leaf)
    return arrays, jax.tree.map(lambda x: x.perturbed, primals, is_leaf=is_leaf)


def scaled(gradients, cotangents):
    """Gradients of the loss times its cotangent; its sums have none. None stays None."""
    of_loss = cotangents[0]
    if isinstance(of_loss, SymbolicZero):
        return jax.tree.map(jnp.zeros_like, gradients)
    return jax.tree.map(lambda x: (x * of_loss).astype(x.dtype), gradients)


def ways(*axes: str) -> int:
    """Over how many devices of the mesh in force these logical axes are split together."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for axis in axes for name in mesh_axes_of(axis))
