"""A flow-matching head: a straight path from noise to latents, whose velocity is learnt.

Sources: arXiv 2210.02747; as a CALM head, arXiv 2510.27688, and the released code.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ...errors import InputError
from .adaln import AdaLNNetwork

SOLVERS = ("midpoint", "euler")
_TIMES = 1000


class FlowHead(nnx.Module):
    """Integrates a velocity from noise at time 0 to a latent at time 1.

    Args:
        width: of the activation, and of the network.
        latent_size: numbers Z of a latent.
        num_layers: of the network.
        num_steps: of the solver; each calls the network twice (``"midpoint"``) or once.
        solver: ``"midpoint"`` or ``"euler"``.
    """

    def __init__(
        self,
        width: int,
        latent_size: int,
        *,
        num_layers: int,
        num_steps: int = 10,
        solver: str = "midpoint",
        rngs: nnx.Rngs,
    ):
        if solver not in SOLVERS:
            raise InputError(f"{solver=} is not one of {SOLVERS}")
        self.noise_shape = (latent_size,)
        self.num_steps, self.solver = num_steps, solver
        self.network = AdaLNNetwork(
            width, latent_size, latent_size, num_layers=num_layers, rngs=rngs
        )

    def noise(self, key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Where ``shape`` draws begin: standard normal, ``[*shape, Z]`` float32."""
        return jax.random.normal(key, (*shape, *self.noise_shape), jnp.float32)

    def __call__(
        self, hidden: Float[Array, "B L D"], noise: Float[Array, "B M Z"]
    ) -> Float[Array, "B M Z"]:
        """Draws, ``M / L`` of each activation next to each other; float32."""
        size = 1 / self.num_steps

        def step(x, i):
            time = i * size
            velocity = self._velocity(x, time, hidden)
            if self.solver == "midpoint":
                middle = x + size / 2 * velocity
                velocity = self._velocity(middle, time + size / 2, hidden)
            return x + size * velocity, None

        return jax.lax.scan(step, noise, jnp.arange(self.num_steps, dtype=jnp.float32))[0]

    def loss_noise(
        self, key: jax.Array, shape: tuple[int, ...]
    ) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """What :meth:`loss` draws for ``shape`` latents: times in [0, 1), and noise."""
        time_key, noise_key = jax.random.split(key)
        return jax.random.uniform(time_key, shape, jnp.float32), self.noise(noise_key, shape)

    def loss(
        self,
        hidden: Float[Array, "B L D"],
        latents: Float[Array, "B M Z"],
        time: Float[Array, "B M"],
        noise: Float[Array, "B M Z"],
    ) -> Float[Array, "B M"]:
        """Mean squared error of the velocity at these times, from this noise."""
        t = time[..., None]
        velocity = self._velocity((1 - t) * noise + t * latents, time, hidden)
        return jnp.mean(jnp.square(velocity - (latents - noise)), axis=-1)

    def _velocity(self, x, time, hidden):
        # The network reads whole thousandths.
        whole = jnp.broadcast_to(jnp.floor(_TIMES * time), x.shape[:2]).astype(jnp.int32)
        return self.network(x, whole, hidden)
