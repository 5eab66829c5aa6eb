"""Cross-entropy of a linear head over a large vocabulary: weighted sums, without ``[T, V]`` logits.

`linear_cross_entropy` takes the head's kernel, `head_cross_entropy` any head as a function. Both
take tokens in chunks, and compute their gradients in the same pass as the loss. `reference` is the
oracle; a new backend is a file of this folder and a line in `_IMPLEMENTATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ....errors import InputError
from .. import tuning
from .general import head_cross_entropy_xla
from .reference import linear_cross_entropy_reference
from .terms import Terms, ways
from .tokamax import linear_cross_entropy_tokamax
from .xla import linear_cross_entropy_xla

__all__ = ["PlainHead", "head_cross_entropy", "linear_cross_entropy"]

Result = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]

_IMPLEMENTATIONS = {
    "reference": linear_cross_entropy_reference,
    "xla": linear_cross_entropy_xla,
    "tokamax": linear_cross_entropy_tokamax,
}
MAX_LOGITS = 2**27


class PlainHead(NamedTuple):
    """An output head that is one product: what a model's ``plain_head()`` returns.

    Attributes:
        kernel: ``[D, V]``, or ``[V, D]`` with ``vocab_first``.
        vocab_first: as an embedding's table is.
        softcap: logits are ``softcap * tanh(product / softcap)``; None leaves them.
    """

    kernel: Array
    vocab_first: bool = False
    softcap: float | None = None


def linear_cross_entropy(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "D V"] | Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    vocab_first: bool = False,
    softcap: float | None = None,
    z_loss: float = 0.0,
    sharpen: Float[Array, "B T"] | None = None,
    sharpening: float = 0.0,
    accuracy: bool = True,
    max_logits: int = MAX_LOGITS,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Result:
    """The loss of all positions, ``nll + z_loss + sharpening * entropy``, and these sums (nats).

    Logits are the float32 product of ``hidden`` and of ``kernel`` in the dtype of ``hidden``. The
    loss is differentiable (in reverse) in these two; a gradient by the logits takes their dtype
    between the two products that it enters. Targets and weights are constants, and the sums beside
    the loss have no gradient. The kernel's gradient is added up in float32.

    Args:
        hidden: activations before the head, float32 or bfloat16.
        kernel: of the head, any float dtype.
        vocab_first: the kernel is ``[V, D]``: a tied embedding's table.
        targets: ids below ``V``.
        weights: of each position; 0 leaves it out.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        z_loss: weight of ``logsumexp(logits)²``.
        sharpen: weights of the entropy, of the positions where no token is likelier than the
            target.
        sharpening: the entropy's factor in the loss.
        accuracy: add up the weights of the positions where no token is likelier than the target.
        max_logits: most float32 logits of a device alive at once, about; in both passes.
        chunk_size: tokens of a device that are taken at once; None is as many as ``max_logits``
            allows, or fewer where :mod:`..tuning` knows that to be faster.
        implementation: ``"xla"``, ``"reference"``, ``"tokamax"`` (where it is installed; neither
            cap, z-loss, entropy nor accuracy, nor a vocabulary that is split over devices), or None
            for the platform's best.

    Returns:
        The loss and the sums over positions of ``nll``, ``z_loss``, ``accuracy`` (unless it
        is turned off) and with ``sharpen`` ``entropy``: float32 scalars.

    Raises:
        InputError: shapes that do not fit, a soft cap or a limit that is not positive, or an
            implementation that is unknown, not installed, or cannot take what was asked for.
    """
    given = (hidden, targets, weights, sharpen)
    _check(given, max_logits)
    vocab, width = kernel.shape if vocab_first else kernel.shape[::-1]
    if width != hidden.shape[-1]:
        raise InputError(
            f"linear_cross_entropy: kernel {kernel.shape} does not fit hidden {hidden.shape} with "
            f"{vocab_first=}; give [D, V], or [V, D] with vocab_first=True"
        )
    for name, value in (("softcap", softcap), ("chunk_size", chunk_size)):
        if value is not None and value <= 0:
            raise InputError(f"linear_cross_entropy: {name}={value} must be positive, or None")
    if implementation not in (None, *_IMPLEMENTATIONS):
        raise InputError(
            f"linear_cross_entropy: implementation={implementation!r} is not one of "
            f"{sorted(_IMPLEMENTATIONS)}; leave it None to pick by platform"
        )
    local = targets.size // ways("batch", "seq")
    most = max(1, max_logits // (vocab // ways("vocab")))
    if chunk_size is None:
        shape_class = f"v{tuning.up_to_power_of_2(vocab // ways('vocab'))}"
        tuned = tuning.chosen("linear_cross_entropy", shape_class).get("chunk_size", most)
        chunk_size = min(tuned, most)
    chunk = min(local, chunk_size)
    return _IMPLEMENTATIONS[implementation or "xla"](
        hidden,
        kernel,
        targets,
        weights.astype(jnp.float32),
        sharpen,
        terms=Terms(z_loss, sharpening, sharpen is not None, accuracy),
        softcap=softcap,
        vocab_first=vocab_first,
        chunk_size=chunk,
    )


def head_cross_entropy(
    logits_of: Callable[[Float[Array, "B T D"]], Float[Array, "B T V"]],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    z_loss: float = 0.0,
    sharpen: Float[Array, "B T"] | None = None,
    sharpening: float = 0.0,
    accuracy: bool = True,
    max_logits: int = MAX_LOGITS,
) -> Result:
    """:func:`linear_cross_entropy` of any head ``logits_of``, position by position.

    Differentiable in every array that ``logits_of`` holds. It is traced once, for a chunk; it must
    not depend on which positions a chunk has. Other arguments and results are as there.
    """
    _check((hidden, targets, weights, sharpen), max_logits)
    terms = Terms(z_loss, sharpening, sharpen is not None, accuracy)
    weights = weights.astype(jnp.float32)
    return head_cross_entropy_xla(
        logits_of, hidden, targets, weights, sharpen, terms=terms, max_logits=max_logits
    )


def _check(given, max_logits) -> None:
    hidden, targets, weights, sharpen = given
    for name, x in (("targets", targets), ("weights", weights), ("sharpen", sharpen)):
        if hidden.ndim != 3 or (x is not None and x.shape != hidden.shape[:2]):
            raise InputError(
                f"cross-entropy: {name} {x.shape} does not fit hidden {hidden.shape}; give "
                "[B, T] and [B, T, D]"
            )
    if max_logits <= 0:
        raise InputError(f"cross-entropy: {max_logits=} must be positive")
