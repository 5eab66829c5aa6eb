"""AutoDeco (arXiv 2510.26697): decoding heads learn on a frozen model, at every token.

With ``q`` the law of the label, ``p_T = softmax(l / T)`` the law that the heads propose (T the
temperature, P the top-p) and ``p~`` the same behind the soft top-p mask, the published loss is the
sum of two means::

    mean over kept positions  of  -b log p_T(y)             T >= 1e-2
    mean over valid positions of  -b log(p~(y) + 1e-9)      T >= 1e-8

``b = p_1(y)`` is the label's probability under the model itself. A label that the model ranks first
is kept with probability ``1 - easy_drop``, any other always: ``k(y)``. Each mean has a denominator
of its own, over the whole global batch, so this objective returns two terms (see ``sums``).

It is biased. A temperature term picks labels at the rates ``s(y) = k(y) b(y)``, so its minimiser
has ``p_T`` near ``q s / sum(q s)`` and not ``q``: for ``q = p_T*`` without dropping exactly ``T =
T* / (1 + T*)``, while dropping pushes the other way. Without both (``easy_drop=0``,
``dft_weight=False``) it is plain cross-entropy, which finds T*; inverse-probability weights ``1 /
s(y)`` would give the same in expectation, with more variance. But where labels come of a truncated
law, ``q = p~``, no ``p_T`` is ``q``: T then takes the truncation for a low temperature, and P has
nothing left to find. The paper's text has a single cross-entropy of ``p~`` instead of two terms.
The other estimators are of this form, means over valid positions, and minimal where ``p~`` is
``q``:

- ``likelihood``: ``-log(p~(y) + 1e-9)``; no dropping, no weight.
- ``conditional``: keeps dropping and weights, and with them the emphasis on labels that the model
  believes in, which is a robust one where some labels are no draws of any ``p~``. What it scores is
  the law of a *picked* label, ``p~(v) s(v) / sum_u p~(u) s(u)``, which is ``q s / sum(q s)`` where
  ``p~`` is ``q``.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ..configs.objectives import AutoDeco
from ..layers.decoding_heads import soft_mask
from ..sharding import constrain
from .layout import split_rows
from .sums import Batch, Sums, num_chunks, row_uniform, shift

# Arrays of a chunk's logits that are alive together, by the compiler's own count on CPU.
_ARRAYS = 18


def autodeco(config: AutoDeco, model: nnx.Module, batch: Batch, key: jax.Array) -> Sums:
    """Both terms of the loss over every next token within its document.

    Args:
        config: its settings.
        model: has ``hidden_states``, ``logits`` and ``decoding_heads``; only those get a gradient.
        batch: as for ``next_token``; ``loss_weights`` weigh a token in both terms
            and in both denominators (0 leaves a prompt out).
        key: of the draw that drops easy tokens, where ``batch`` has no ``row_keys``.

    Returns:
        Sums: the term of ``p~`` over the valid positions, and, if published,
        ``terms["temperature_loss"]`` over the kept ones. Metrics are ``top_p_loss``, ``nll`` (of
        the label under ``p_T``, unweighted), ``base_nll`` (at temperature 1), ``accuracy`` (of the
        model itself), ``kept``, and the means of ``temperature`` and ``top_p``.
    """
    targets, weights = shift(batch)
    hidden, _, stats = model.hidden_states(
        batch["tokens"], segment_ids=batch.get("segment_ids"), positions=batch.get("positions")
    )
    parts = (jax.lax.stop_gradient(hidden), targets, weights, row_uniform(batch, key))
    vocab_size = jax.eval_shape(model.logits, hidden).shape[-1]
    chunks = num_chunks(*targets.shape, _ARRAYS * vocab_size, config.max_logits, ("batch", "seq"))
    sums = functools.partial(_chunk_sums, config, model)
    if chunks == 1:
        total = sums(*parts)
    else:

        def body(total, part):
            return jax.tree.map(jnp.add, total, sums(*part)), None

        parts = [split_rows(x, chunks, axis=1) for x in parts]
        shapes = jax.eval_shape(sums, *(x[0] for x in parts))
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total = jax.lax.scan(body, zero, parts)[0]
    term = (total.pop("temperature_loss"), total.pop("temperature_weight"))
    if config.estimator == "published":
        total["terms"] = {"temperature_loss": term}
    return total["top_p_loss"], jnp.sum(weights), total | {"stats": stats}


def _chunk_sums(config, model, hidden, targets, weights, u) -> dict[str, Float[Array, ""]]:
    # Whole rows: ranks and cumulative masses go over all of a vocabulary.
    logits = constrain(jax.lax.stop_gradient(model.logits(hidden)), "batch", "seq", None)
    logits = logits.astype(jnp.float32)
    temperature, top_p = model.decoding_heads(hidden, logits)
    losses = _first_order(
        lambda t, p: token_losses(config, logits, targets, t, p, u), temperature, top_p
    )
    numbers = losses | {"temperature": temperature, "top_p": top_p}
    return {name: jnp.sum(weights * x) for name, x in numbers.items()}


def _first_order(losses, *scalars):
    """``losses(*scalars)``, with the derivatives taken on the way forward.

    A position's losses depend on two numbers of its own only. So their derivatives are two numbers
    more, and nothing of a vocabulary's size has to be kept, or made again, for the backward pass.
    """
    still = tuple(map(jax.lax.stop_gradient, scalars))
    total = losses(*still)
    for i, x in enumerate(scalars):

        def one(x, i=i):
            return losses(*still[:i], x, *still[i + 1 :])

        slopes = jax.jvp(one, (still[i],), (jnp.ones_like(still[i]),))[1]
        total = {n: v + slopes[n] * (x - still[i]) for n, v in total.items()}
    return total


def token_losses(
    config: AutoDeco,
    logits: Float[Array, "*shape V"],
    targets: Int[Array, "*shape"],
    temperature: Float[Array, "*shape"],
    top_p: Float[Array, "*shape"],
    u: Float[Array, "*shape"],
) -> dict[str, Float[Array, "*shape"]]:
    """Both losses of every position, to be summed over valid ones.

    The published loss of a batch is ``sum(temperature_loss) / sum(temperature_weight) +
    mean(top_p_loss)``, that of the other estimators ``mean(top_p_loss)``. Differentiable in
    ``temperature`` and ``top_p``.

    Args:
        config: easy_drop, dft_weight, estimator and sharpness are used.
        logits: of the model; no gradient flows there.
        targets: ids.
        temperature, top_p: of the heads.
        u: uniform in [0, 1); an easy token is kept where ``u >= easy_drop``.

    Returns:
        ``temperature_loss``, ``temperature_weight``, ``top_p_loss``; and ``nll``, ``base_nll``,
        ``accuracy``, ``kept`` of every position.
    """
    # One sort. In order of rank everything else is a sum; only the label's place is looked up.
    size = logits.shape[-1]
    ids = jnp.zeros_like(logits, jnp.int32) + jnp.arange(size)
    negated, ids = jax.lax.sort((-jax.lax.stop_gradient(logits), ids), is_stable=True, num_keys=1)
    ranked, label = -negated, ids == targets[..., None]

    def at_label(x):
        return jnp.sum(jnp.where(label, x, 0), axis=-1)

    def cross_entropy(x):
        return jax.nn.logsumexp(x, axis=-1) - at_label(x)

    log_base = jax.nn.log_softmax(ranked, axis=-1)
    easy = label[..., 0]
    kept = (~easy | (u >= config.easy_drop)).astype(ranked.dtype)
    b = at_label(jnp.exp(log_base)) if config.dft_weight else jnp.ones_like(u)
    warm = ranked / jnp.maximum(temperature, 1e-2)[..., None]
    nll = cross_entropy(warm)

    cool = ranked / jnp.maximum(temperature, 1e-8)[..., None]
    probs = jax.nn.softmax(cool, axis=-1)
    mask = soft_mask(jnp.cumsum(probs, axis=-1), top_p[..., None], config.sharpness)
    masked = probs * mask
    masked = masked / (jnp.sum(masked, axis=-1, keepdims=True) + 1e-9)
    top_p_loss = -jnp.log(at_label(masked) + 1e-9)

    if config.estimator == "published":
        top_p_loss = b * top_p_loss
    elif config.estimator == "conditional":
        log_rate = log_base if config.dft_weight else jnp.zeros_like(log_base)
        log_rate += jnp.where(jnp.arange(size) == 0, jnp.log1p(-config.easy_drop), 0)
        picked = jnp.sum(masked * jnp.exp(log_rate), axis=-1)
        top_p_loss = kept * b * (top_p_loss - at_label(log_rate) + jnp.log(picked + 1e-9))
    return {
        "temperature_loss": kept * b * nll,
        "temperature_weight": kept,
        "top_p_loss": top_p_loss,
        "nll": nll,
        "base_nll": -at_label(log_base),
        "accuracy": easy.astype(ranked.dtype),
        "kept": kept,
    }
