"""Cross-entropy of a model's head: see :mod:`jaxalope.layers.ops.linear_cross_entropy`."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float, Int

from ..layers.ops.linear_cross_entropy import head_cross_entropy, linear_cross_entropy


def cross_entropy(
    model: nnx.Module,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    **settings,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of all positions and its sums, by ``model.logits`` of ``hidden``.

    Where ``model.plain_head()`` says that these logits are a plain product, its kernel is used.
    Settings and results are those of the operator (``z_loss``, ``sharpen``, ``sharpening``,
    ``max_logits``).
    """
    head = model.plain_head() if hasattr(model, "plain_head") else None
    if head is None:
        return head_cross_entropy(model.logits, hidden, targets, weights, **settings)
    return linear_cross_entropy(
        hidden,
        head.kernel,
        targets,
        weights,
        vocab_first=head.vocab_first,
        softcap=head.softcap,
        **settings,
    )
