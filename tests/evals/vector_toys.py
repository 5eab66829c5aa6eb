"""A next-vector model whose law can be written down, behind the doors of CALM.

The next token depends on the sum of all tokens before it, whatever the chunks are: so models of
all chunk sizes have the same law. Its cache is that sum, which is not addressed by position.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxalope.model import Model


@dataclasses.dataclass(frozen=True)
class SumConfig:
    chunk_size: int
    vocab_size: int = 3
    independent: bool = False
    decoding = "next_vector"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SumCache:
    total: Any
    length: Any


class _Noise:
    def __init__(self, size):
        self.noise_shape = (size,)

    def noise(self, key, shape):
        return jax.random.uniform(key, (*shape, *self.noise_shape))


class SumLM(nnx.Module):
    """``law[total % V]`` is that of the next token."""

    def __init__(self, config, law):
        self.config = config
        self.law = nnx.Param(jnp.asarray(law, jnp.float32), axes=(None, "vocab"))

    @property
    def latent_head(self):
        return _Noise(self.config.chunk_size)

    def init_cache(self, batch, max_length, dtype=None):
        # A leaf that grows, as a cache of chunks has; nothing is in it.
        zero = jnp.zeros((batch,), jnp.int32)
        return SumCache(zero, zero)

    def __call__(self, tokens, cache=None, *, segment_ids=None, positions=None):
        size = self.config.chunk_size
        real = jnp.ones_like(tokens) if segment_ids is None else segment_ids
        # Independent chunks forget what stands before them.
        sums = jnp.cumsum(tokens * real, axis=1) * (not self.config.independent)
        ends = sums[:, size - 1 :: size]
        start = self.init_cache(tokens.shape[0], 0) if cache is None else cache
        hidden = (start.total[:, None] + ends) % self.config.vocab_size
        if cache is not None:
            new = real[:, ::size].sum(axis=1)
            cache = SumCache(start.total + sums[:, -1], start.length + new)
        return hidden[:, :, None].astype(jnp.float32), cache

    def draw(self, hidden, noise):
        """Tokens by inverting the distribution function; a latent is them."""
        edges = jnp.cumsum(self.law[...], axis=1)
        total = jnp.repeat(hidden[:, :, 0], noise.shape[1] // hidden.shape[1], axis=1)
        total, drawn = total.astype(jnp.int32), []
        for place in range(self.config.chunk_size):
            below = edges[total % self.config.vocab_size]
            token = jnp.sum(noise[:, :, place, None] >= below[:, :, :-1], axis=-1)
            drawn.append(token)
            total = total + token
        return jnp.stack(drawn, axis=-1).astype(jnp.float32)

    def tokens(self, latents):
        return latents.astype(jnp.int32)


LAW = np.array([[0.7, 0.2, 0.1], [0.25, 0.5, 0.25], [0.05, 0.15, 0.8]])


def sum_model(chunk_size: int, independent: bool = False) -> Model:
    config = SumConfig(chunk_size, independent=independent)
    graphdef, state = nnx.split(SumLM(config, LAW))
    return Model(config, graphdef, nnx.to_pure_dict(state))


def sum_law(text, law=LAW):
    """The joint law ``[V, V, V, V]`` of what follows ``text``."""
    size = len(law)
    joint = np.zeros((size,) * 4)
    for gram in itertools.product(range(size), repeat=4):
        total, p = sum(text), 1.0
        for token in gram:
            p *= law[total % size][token]
            total += token
        joint[gram] = p
    return joint
