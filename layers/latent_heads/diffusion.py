"""A denoising-diffusion head with learnt variances.

Sources: arXiv 2102.09672 (the loss, the cosine schedule, fewer steps when sampling); as a CALM
head, arXiv 2510.27688, and the released code, whose bound is of images and in bits.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...sharding import take
from .adaln import AdaLNNetwork

NUM_TIMES = 1000
# Half of a step between two of 256 levels in [-1, 1]: the bound's last term is of pixels.
_HALF_BIN = 1 / 255
_EDGE = 0.999
_LEAST = 1e-12


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Numbers of every time, float64 ``[times]``, in the notation of arXiv 2102.09672.

    Attributes:
        times: the network's names of these times.
        alpha_bar: the share of a latent's variance that is left.
        log_beta, log_posterior: logarithms of the largest and the smallest variance of a step back.
        latent, noisy: what the mean of a step back takes of the latent and of the noisy one.
    """

    times: np.ndarray
    alpha_bar: np.ndarray
    log_beta: np.ndarray
    log_posterior: np.ndarray
    latent: np.ndarray
    noisy: np.ndarray

    @classmethod
    def cosine(cls, num_steps: int = NUM_TIMES) -> Schedule:
        """All of :data:`NUM_TIMES` times, or so many of them at nearly equal distances."""

        def alpha_bar_at(u):
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [
            min(1 - alpha_bar_at((i + 1) / NUM_TIMES) / alpha_bar_at(i / NUM_TIMES), 0.999)
            for i in range(NUM_TIMES)
        ]
        alpha_bar = np.cumprod(1 - np.array(betas))
        # The sum is accumulated, as published: it decides a few roundings.
        stride, place, times = (NUM_TIMES - 1) / max(num_steps - 1, 1), 0.0, []
        for _ in range(num_steps):
            times.append(round(place))
            place += stride
        alpha_bar = alpha_bar[times]
        before = np.append(1.0, alpha_bar[:-1])
        beta = 1 - alpha_bar / before
        posterior = beta * (1 - before) / (1 - alpha_bar)
        return cls(
            times=np.array(times, np.int32),
            alpha_bar=alpha_bar,
            log_beta=np.log(beta),
            # The first one is 0, and has no logarithm.
            log_posterior=np.log(np.append(posterior[1:2], posterior[1:])),
            latent=beta * np.sqrt(before) / (1 - alpha_bar),
            noisy=(1 - before) * np.sqrt(1 - beta) / (1 - alpha_bar),
        )


class DiffusionHead(nnx.Module):
    """Denoises a latent, step by step.

    Args:
        width: of the activation, and of the network.
        latent_size: numbers Z of a latent.
        num_layers: of the network.
        num_steps: of sampling, 2 to 1000.
    """

    def __init__(
        self,
        width: int,
        latent_size: int,
        *,
        num_layers: int,
        num_steps: int = 100,
        rngs: nnx.Rngs,
    ):
        self.noise_shape = (num_steps, latent_size)
        self.num_steps = num_steps
        self.network = AdaLNNetwork(
            width, latent_size, 2 * latent_size, num_layers=num_layers, rngs=rngs
        )

    def noise(self, key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Where ``shape`` draws begin, and what each step but the last adds: standard normal."""
        return jax.random.normal(key, (*shape, *self.noise_shape), jnp.float32)

    def __call__(
        self, hidden: Float[Array, "B L D"], noise: Float[Array, "B M S Z"]
    ) -> Float[Array, "B M Z"]:
        """Draws, ``M / L`` of each activation next to each other; float32."""
        schedule = Schedule.cosine(self.num_steps)
        noise = jnp.moveaxis(noise, 2, 0)

        def step(x, now):
            index, added = now
            mean, log_variance, _ = self._step_back(schedule, x, index, hidden)
            return mean + jnp.exp(log_variance / 2) * added, None

        # From the last time on; the first one adds nothing.
        added = jnp.concatenate([noise[1:], jnp.zeros_like(noise[:1])])
        indices = jnp.arange(self.num_steps - 1, -1, -1)
        return jax.lax.scan(step, noise[0], (indices, added))[0]

    def loss_noise(
        self, key: jax.Array, shape: tuple[int, ...]
    ) -> tuple[Int[Array, "..."], Float[Array, "..."]]:
        """What :meth:`loss` draws for ``shape`` latents: times below 1000, and noise."""
        time_key, noise_key = jax.random.split(key)
        time = jax.random.randint(time_key, shape, 0, NUM_TIMES, jnp.int32)
        noise = jax.random.normal(noise_key, (*shape, self.noise_shape[-1]), jnp.float32)
        return time, noise

    def loss(
        self,
        hidden: Float[Array, "B L D"],
        latents: Float[Array, "B M Z"],
        time: Int[Array, "B M"],
        noise: Float[Array, "B M Z"],
    ) -> Float[Array, "B M"]:
        """Mean squared error of the noise at these times, plus the bound on the likelihood.

        The bound trains the variances alone.
        """
        schedule = Schedule.cosine()
        alpha_bar = schedule.alpha_bar
        noisy = _at(np.sqrt(alpha_bar), time) * latents + _at(np.sqrt(1 - alpha_bar), time) * noise
        mean, log_variance, predicted = self._step_back(
            schedule, noisy, time, hidden, freeze_mean=True
        )
        error = jnp.mean(jnp.square(noise - predicted), axis=-1)
        true_mean = _at(schedule.latent, time) * latents + _at(schedule.noisy, time) * noisy
        true_log_variance = _at(schedule.log_posterior, time)
        divergence = 0.5 * (
            log_variance
            - true_log_variance
            - 1
            + jnp.exp(true_log_variance - log_variance)
            + jnp.square(true_mean - mean) * jnp.exp(-log_variance)
        )
        bound = jnp.where(
            (time == 0)[..., None], _binned_nll(latents, mean, log_variance / 2), divergence
        )
        return error + jnp.mean(bound, axis=-1) / math.log(2)

    def _step_back(self, schedule, x, index, hidden, freeze_mean=False):
        """Mean and log variance of a step back from ``x``, and the noise predicted in it."""
        index = jnp.broadcast_to(index, x.shape[:2])
        out = self.network(x, take(jnp.asarray(schedule.times), index, ("batch", "seq")), hidden)
        predicted, between = jnp.split(out, 2, axis=-1)
        share = (between + 1) / 2
        log_variance = share * _at(schedule.log_beta, index)
        log_variance += (1 - share) * _at(schedule.log_posterior, index)
        inverse = 1 / schedule.alpha_bar
        noise = jax.lax.stop_gradient(predicted) if freeze_mean else predicted
        latent = _at(np.sqrt(inverse), index) * x - _at(np.sqrt(inverse - 1), index) * noise
        mean = _at(schedule.latent, index) * latent + _at(schedule.noisy, index) * x
        return mean, log_variance, predicted


def _at(table: np.ndarray, time: Int[Array, "B M"]) -> Float[Array, "B M 1"]:
    """A table's entries. It is made in float64, which tells the first times' variances from 0."""
    return take(jnp.asarray(table, jnp.float32), time, ("batch", "seq"))[..., None]


def _binned_nll(x, mean, log_std):
    """Nats of the bin that ``x`` is in, by a tanh for the normal distribution function."""

    def below(z):
        return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    centred, inverse = x - mean, jnp.exp(-log_std)
    upper, lower = below(inverse * (centred + _HALF_BIN)), below(inverse * (centred - _HALF_BIN))
    share = jnp.where(x < -_EDGE, upper, jnp.where(x > _EDGE, 1 - lower, upper - lower))
    return -jnp.log(jnp.maximum(share, _LEAST))
