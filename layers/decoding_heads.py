"""AutoDeco (arXiv 2510.26697): a temperature and a top-p for every token, predicted by two heads.

Everything is computed in float32 (float64 where the inputs are), whatever the model computes in.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from ..errors import InputError
from ..sharding import constrain
from .linear import Linear

# The published constants: heads and training differ in their smallest temperature.
_HEAD_EPSILON = 1e-8
_MIN_TEMPERATURE = 1e-8
_MASS_EPSILON = 1e-9
_TOP = 5

PerToken = Float[Array, "*shape"] | float | int
PerEntry = Float[Array, "*shape V"]


class _Affine(Linear):
    """A :class:`Linear` with a bias, both from N(0, stddev²)."""

    def __init__(self, in_axes, out_axes, *, rngs, stddev, bias=0.0):
        super().__init__(in_axes, out_axes, rngs=rngs, stddev=stddev)
        noise = stddev * jax.random.normal(rngs.params(), tuple(out_axes.values()), jnp.float32)
        self.bias = nnx.Param(bias + noise, axes=tuple(out_axes))


class TempHead(nnx.Module):
    """``2 sigmoid(w relu(W h + b) + c)``: the temperature of a token's distribution, in (0, 2).

    A fresh head says ``initial`` everywhere: its last layer has no weights yet. So a model with
    fresh heads decodes as it did, and all dependence on the context is learnt. The first layer has
    the variance of PyTorch's default, as the published heads.
    """

    def __init__(self, features: int, width: int, *, rngs: nnx.Rngs, initial: float = 1.0):
        if not 0 < initial < 2:
            raise InputError(f"initial_temperature={initial} must be between 0 and 2")
        stddev = 1 / math.sqrt(3 * features)
        self.hidden = _Affine({"embed": features}, {"mlp": width}, rngs=rngs, stddev=stddev)
        bias = _logit(initial / 2)
        self.out = _Affine({"mlp": width}, {None: 1}, rngs=rngs, stddev=0.0, bias=bias)

    def __call__(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        """Temperatures; ``hidden`` is what the output head reads."""
        return 2 * jax.nn.sigmoid(self.out(jax.nn.relu(self.hidden(hidden)))[..., 0])


class TopPHead(nnx.Module):
    """``sigmoid(w relu(W [h, T, stats] + b) + c)``: the mass to keep of a distribution, in (0, 1).

    The first layer's kernel is kept in two parts, for ``h`` and for the five numbers: their sum has
    ``features + 5`` rows, which no mesh axis would divide. A fresh head says ``initial``
    everywhere. Not 1: a mask of the mass beyond 1 is empty, and so would be its gradient.
    """

    def __init__(self, features: int, width: int, *, rngs: nnx.Rngs, initial: float = 0.95):
        if not 0 < initial < 1:
            raise InputError(
                f"initial_top_p={initial} must be above 0 and below 1 (at 1 nothing is learnt)"
            )
        stddev = 1 / math.sqrt(3 * (features + 5))
        self.hidden = _Affine({"embed": features}, {"mlp": width}, rngs=rngs, stddev=stddev)
        self.stats = Linear({None: 5}, {"mlp": width}, rngs=rngs, stddev=stddev)
        bias = _logit(initial)
        self.out = _Affine({"mlp": width}, {None: 1}, rngs=rngs, stddev=0.0, bias=bias)

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        temperature: Float[Array, "B T"],
        stats: Float[Array, "B T 4"],
    ) -> Float[Array, "B T"]:
        """Top-p; no gradient flows to ``temperature`` or ``stats``."""
        numbers = jnp.concatenate([temperature[..., None], stats], axis=-1)
        x = self.hidden(hidden) + self.stats(jax.lax.stop_gradient(numbers))
        return jax.nn.sigmoid(self.out(jax.nn.relu(x))[..., 0])


class DecodingHeads(nnx.Module):
    """Both heads, float32; ``(2 features + 9) width + 2`` parameters.

    Args:
        features: the model's width.
        width: of the hidden layers; 256 as published.
        temperature: that fresh heads say.
        top_p: that fresh heads say.
    """

    def __init__(
        self,
        features: int,
        width: int = 256,
        *,
        rngs: nnx.Rngs,
        temperature: float = 1.0,
        top_p: float = 0.95,
    ):
        self.temperature = TempHead(features, width, rngs=rngs, initial=temperature)
        self.top_p = TopPHead(features, width, rngs=rngs, initial=top_p)

    def __call__(
        self, hidden: Float[Array, "B T D"], logits: Float[Array, "B T V"]
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        """``(temperature, top_p)`` of every position; no gradient flows to the arguments.

        Args:
            hidden: what the output head reads, after the last norm.
            logits: what it made of them.
        """
        hidden, logits = (_precise(jax.lax.stop_gradient(x)) for x in (hidden, logits))
        temperature = self.temperature(hidden)
        stats = distribution_stats(logits, jax.lax.stop_gradient(temperature))
        return temperature, self.top_p(hidden, temperature, stats)


def distribution_stats(
    logits: Float[Array, "B T V"], temperature: Float[Array, "B T"]
) -> Float[Array, "B T 4"]:
    """Of ``r = softmax(logits / (temperature + 1e-8))``: maximum, entropy, variance, top-5 mass.

    Entropy in nats with 1e-8 inside the logarithm, variance over the vocabulary with ddof 1. After
    the softmax's own normaliser one pass makes them all.
    """
    size = logits.shape[-1]
    scaled = constrain(logits, "batch", "seq", None) / (temperature[..., None] + _HEAD_EPSILON)
    top = jax.lax.top_k(scaled, min(_TOP, size))[0]
    # Not a slice: XLA would merge it with top_k's own, and sort the whole vocabulary on a CPU.
    best = jnp.max(top, axis=-1, keepdims=True)
    normaliser = jnp.sum(jnp.exp(scaled - best), axis=-1, keepdims=True)
    r = jnp.exp(scaled - best) / normaliser
    entropy = -jnp.sum(r * jnp.log(r + _HEAD_EPSILON), axis=-1)
    variance = jnp.sum(jnp.square(r - 1 / size), axis=-1) / max(size - 1, 1)
    top_mass = jnp.exp(top - best) / normaliser
    return jnp.stack([top_mass[..., 0], entropy, variance, top_mass.sum(-1)], axis=-1)


# ------------------------------------------------------------------------------------ the policies


def soft_top_p_mask(probs: PerEntry, top_p: PerToken, sharpness: PerToken = 30.0) -> PerEntry:
    """``exp(-sharpness * max(c - top_p, 0))``, ``c`` the mass of all tokens as likely or likelier.

    Differentiable in both arguments. The token that crosses ``top_p`` is damped already, which the
    hard rule keeps. Equals are ranked by index.
    """
    _check(top_p, sharpness)
    order = jnp.argsort(-probs, axis=-1, stable=True)
    mass = jnp.cumsum(jnp.take_along_axis(probs, order, axis=-1), axis=-1)
    mask = soft_mask(mass, *(jnp.asarray(x)[..., None] for x in (top_p, sharpness)))
    return jnp.take_along_axis(mask, jnp.argsort(order, axis=-1), axis=-1)


def soft_mask(mass: Array, top_p: Array, sharpness: Array | float) -> Array:
    """The mask of tokens by the mass up to and including them."""
    return jnp.exp(log_soft_mask(mass, top_p, sharpness))


def log_soft_mask(mass: Array, top_p: Array, sharpness: Array | float) -> Array:
    """The logarithm of :func:`soft_mask`: finite where that is too small for a float32."""
    # A rounded sum may exceed 1, of which the sharpness would make a visible mask at top_p = 1.
    return -sharpness * jnp.maximum(jnp.minimum(mass, 1) - top_p, 0)


def soft_top_p(
    logits: PerEntry, temperature: PerToken, top_p: PerToken, sharpness: float = 30.0
) -> PerEntry:
    """Probabilities after the temperature and the soft mask: what training differentiates.

    As published, 1e-9 is added to the normaliser: where the mask leaves little of a very likely
    token, they sum to less than 1.

    Args:
        logits: of the model.
        temperature: at least 1e-8 is used.
        top_p: in (0, 1].
        sharpness: of the mask's edge; 30 as published. Towards infinity it becomes the hard rule,
            except that the crossing token goes too.

    Raises:
        InputError: a number ``top_p`` outside (0, 1], or a sharpness that is not positive.
    """
    probs = tempered(logits, temperature)
    kept = probs * soft_top_p_mask(probs, top_p, sharpness)
    return kept / (jnp.sum(kept, axis=-1, keepdims=True) + _MASS_EPSILON)


def hard_top_p(logits: PerEntry, temperature: PerToken, top_p: PerToken) -> Bool[Array, "*shape V"]:
    """The tokens that decoding keeps: those before which less than ``top_p`` of the mass lies.

    After the temperature; equals are ranked by index, and the first token always stays.

    Raises:
        InputError: a number ``top_p`` outside (0, 1].
    """
    _check(top_p)
    probs = tempered(logits, temperature)
    order = jnp.argsort(-probs, axis=-1, stable=True)
    ranked = jnp.take_along_axis(probs, order, axis=-1)
    keep = jnp.cumsum(ranked, axis=-1) - ranked < jnp.asarray(top_p)[..., None]
    keep = keep | (jnp.arange(keep.shape[-1]) == 0)
    return jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1)


def tempered(logits: PerEntry, temperature: PerToken) -> PerEntry:
    """``softmax(logits / max(temperature, 1e-8))``; in the limit 0 all mass is on the argmax."""
    temperature = jnp.maximum(jnp.asarray(temperature), _MIN_TEMPERATURE)[..., None]
    return jax.nn.softmax(_precise(logits) / temperature, axis=-1)


def _precise(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _logit(p: float) -> float:
    return math.log(p) - math.log1p(-p)


def _check(top_p, sharpness=1.0) -> None:
    if isinstance(top_p, int | float) and not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p} must be above 0 and at most 1 (1 keeps every token)")
    if isinstance(sharpness, int | float) and not sharpness > 0:
        raise InputError(f"sharpness={sharpness} must be positive; 30 is the published one")
