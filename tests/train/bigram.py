"""A family that compiles in a second, and an experiment with it: what the loop's tests train.

An experiment file, as ``--config`` takes it. Tokens ``poison`` make the loss NaN, by which tests
place a bad batch in the data.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxalope.configs.experiment import CheckpointConfig, Experiment, TrainConfig
from jaxalope.configs.optimizers import WSD, AdamW
from jaxalope.data.config import DataConfig
from jaxalope.model import registry
from jaxalope.sharding import constrain, einsum, take


@dataclasses.dataclass(frozen=True)
class BigramConfig:
    vocab_size: int = 320
    hidden_size: int = 16
    poison: int | None = None

    def flops_per_token(self, sequence_length):
        return 6 * self.vocab_size * self.hidden_size


class Bigram(nnx.Module):
    def __init__(self, config, *, rngs):
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), shape), axes=("vocab", "embed"))
        self.kernel = nnx.Param(
            0.1 * jax.random.normal(rngs.params(), shape[::-1]), axes=("embed", "vocab")
        )

    def hidden_states(self, tokens, cache=None, *, segment_ids=None, positions=None):
        axes = ("batch", "seq", "embed")
        x = jnp.tanh(take(constrain(self.embedding[...], "vocab", "embed"), tokens, axes))
        if self.config.poison is not None:
            x = x * jnp.where((tokens == self.config.poison).any(), jnp.nan, 1.0)
        return x, None, {}

    def logits(self, hidden):
        return einsum("btd,dv->btv", hidden, self.kernel[...], ("batch", "seq", "vocab"))


registry.FAMILIES["bigram"] = registry.Family(BigramConfig, Bigram)


def experiment():
    return Experiment(
        name="bigram",
        model=BigramConfig(),
        data=DataConfig(sequence_length=32, batch_size=8),
        train=TrainConfig(steps=8, log_every=1, eval_every=4, eval_batches=2),
        optimizer=AdamW(),
        schedule=WSD(learning_rate=3e-2, warmup_steps=2),
        checkpoint=CheckpointConfig(every=3),
    )
