"""From a model's logits to a token and a score at every asked position.

Everything here belongs to single rows, so that on a mesh each device works on its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ...errors import InputError
from ...sharding import kernel_map
from ..constraints import BadWords, GrammarMask
from ..next_token import draw
from ..penalties import NoRepeatNgram
from ..policy import Context, Counts, Policy, stages
from ..truncation import Predicted
from .rules import Progress, Rule

# Stands for a position in the keys that choose among positions; no canvas is so long.
_CHOICE = 2**31 - 1
_REFUSED = {
    NoRepeatNgram: "what stands before a position may not be known yet; leave it out",
    BadWords: "tokens come in any order; forbid single tokens by LogitBias({id: -inf})",
    GrammarMask: "a grammar follows a text from left to right; leave it out",
    Predicted: "masked diffusion has no decoding heads; give Temperature and TopP",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Numbers:
    """What a run goes by, a row each; traced, so that one compilation serves all.

    Attributes:
        policy: that tokens are drawn by.
        rule: that positions are chosen by.
        steps: of a block, ``[B]``.
        guidance: of classifier-free guidance, ``[B]``; 0 is none.
        stop_tokens: ``[B, S]``.
        forbidden: tokens that are never drawn, ``[B, F]``.
        last: tokens whose positions are committed last, ``[B, L]``.
        cache: what the kind of cache goes by, ``[B]``.
    """

    policy: Policy
    rule: Rule
    steps: Any
    guidance: Any
    stop_tokens: Any
    forbidden: Any
    last: Any
    cache: Any


def check_policy(policy: Policy) -> None:
    """Refuse stages that have no meaning where tokens come in any order.

    ``MinNewTokens`` holds stop tokens back at the first positions of the response, and penalties
    count what the canvas holds at the step's beginning.

    Raises:
        InputError: names the stage.
    """
    for stage in stages(policy):
        for kind, why in _REFUSED.items():
            if isinstance(stage, kind):
                raise InputError(f"policy has {kind.__name__}, which denoising cannot obey: {why}")


def decide(
    numbers: Numbers,
    logits: Float[Array, "B W V"],
    tokens: Int[Array, "B T"],
    prompt_length: Int[Array, "B"],
    places: Int[Array, "B W"],
    masked: Bool[Array, "B W"],
    keys: PRNGKeyArray,
    progress: Progress,
    *,
    mask: int,
) -> tuple[
    Int[Array, "B W"], Float[Array, "B W"], Bool[Array, "B W"], Int[Array, "B"], Bool[Array, "B"]
]:
    """Draw a token at every place and choose among the masked ones.

    Args:
        numbers: of the run.
        logits: float32, of each place's token.
        tokens: the canvas, masks where nothing is known.
        prompt_length: of each row.
        places: where the logits are for.
        masked: which of them may be committed.
        keys: one a row, new in every step.
        progress: of each row; draws are filled in here.
        mask: id of the mask, which is never drawn.

    Returns:
        The tokens, their probabilities under the model, the places to commit, the schedule's step
        that was taken, and which rows' policies forbade every token of a place.
    """

    def local(numbers, logits, tokens, prompt_length, places, masked, keys, progress):
        batch, width, size = logits.shape
        hide = jax.vmap(lambda row, ids: row.at[:, ids].set(-jnp.inf, mode="drop"))
        said = hide(logits, numbers.forbidden)
        logits = said.at[:, :, mask].set(-jnp.inf)

        def spread(x):
            return jnp.repeat(x, width, axis=0)

        counts = None
        if "counts" in numbers.policy.needs:
            counts = jax.tree.map(spread, _counts(tokens, prompt_length, size, mask))
        flat = logits.reshape(batch * width, size)
        context = Context(None, places.reshape(-1), spread(prompt_length), counts)
        policy = jax.tree.map(spread, numbers.policy)
        token, proposal, starved = draw(policy, flat, context, spread(keys))
        # The mask is never drawn, but what the model gives it is no confidence in another token.
        sure = log_confidence(said.reshape(flat.shape), token).reshape(batch, width)
        rule = numbers.rule
        if rule.draws:
            uniform = _uniform(keys, places)
            progress = dataclasses.replace(progress, uniform=uniform)
        if rule.score == "confidence" and not rule.processed:
            score = sure
        elif rule.score == "random":
            score = progress.uniform
        elif rule.score == "leftmost":
            score = -places.astype(jnp.float32)
        else:
            score = _SCORES[rule.score](proposal if rule.processed else flat, token)
            score = score.reshape(batch, width)
        token = token.reshape(batch, width)
        late = jnp.any(token[:, :, None] == numbers.last[:, None, :], axis=-1)
        score = jnp.where(late, -jnp.inf, score)
        progress = rule.settle(masked, progress)
        chosen = rule.select(score, masked, progress)
        starved = jnp.any(starved.reshape(batch, width) & chosen, axis=1)
        return token, jnp.exp(sure), chosen, progress.step, starved

    row, rows = ("batch",), ("batch", None)
    args = (numbers, logits, tokens, prompt_length, places, masked, keys, progress)
    leaves, treedef = jax.tree.flatten(args)
    axes = [("batch", *(None,) * (x.ndim - 1)) for x in leaves]

    def run(*leaves):
        return local(*jax.tree.unflatten(treedef, leaves))

    return kernel_map(run, axes, (rows, rows, rows, row, row))(*leaves)


def log_confidence(logits: Float[Array, "R V"], token: Int[Array, "R"]) -> Float[Array, "R"]:
    """Log-probability of each row's token, exact also where it is next to one."""
    best, rest = _rest(logits)
    own = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    return (own - best) - jnp.log1p(rest)


def _rest(logits):
    """The largest logit, and the sum of all others' weights relative to it."""
    top = jnp.argmax(logits, axis=-1)[:, None]
    best = jnp.take_along_axis(logits, top, axis=1)
    others = jnp.where(jnp.arange(logits.shape[1]) == top, 0.0, jnp.exp(logits - best))
    return best[:, 0], jnp.sum(others, axis=-1)


def _margin(logits, token):
    del token
    two = jax.lax.top_k(logits, 2)[0]
    return (1 - jnp.exp(two[:, 1] - two[:, 0])) / (1 + _rest(logits)[1])


def _entropy(logits, token):
    """The negative entropy."""
    del token
    log_p = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0.0), axis=-1)


_SCORES = {"confidence": log_confidence, "margin": _margin, "entropy": _entropy}


def _uniform(keys: PRNGKeyArray, places: Int[Array, "B W"]) -> Float[Array, "B W"]:
    """A draw for every place, apart from those of the tokens."""

    def one(key, place):
        key = jax.random.fold_in(jax.random.fold_in(key, _CHOICE), place)
        return jax.random.uniform(key, (), jnp.float32)

    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(keys, places)


def _counts(tokens, prompt_length, vocab_size, mask) -> Counts:
    """How often the canvas holds each token, masks aside."""
    rows, place = jnp.arange(len(tokens))[:, None], jnp.arange(tokens.shape[1])
    known = jnp.where(tokens == mask, vocab_size, tokens)
    none = jnp.zeros((len(tokens), vocab_size), jnp.int32)
    own = (place < prompt_length[:, None]).astype(jnp.int32)
    prompt = none.at[rows, known].add(own, mode="drop")
    return Counts(prompt=prompt, output=none.at[rows, known].add(1 - own, mode="drop"))
