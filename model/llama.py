"""Llama's block, of which several families of the zoo are made."""

from __future__ import annotations

from typing import Any

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..errors import InputError
from ..layers.attention import Attention
from ..layers.mlp import SwiGLU
from ..layers.norm import RMSNorm
from ..sharding import constrain


def check_heads(config: Any) -> None:
    """Check that the sizes of a configuration's heads fit each other, and can be turned in pairs.

    Raises:
        InputError: names the field.
    """
    for name, multiple_of in (
        ("num_attention_heads", "num_kv_heads"),
        ("hidden_size", "num_attention_heads"),
    ):
        if getattr(config, name) % getattr(config, multiple_of):
            raise InputError(
                f"model.{name}={getattr(config, name)} is not a multiple of "
                f"model.{multiple_of}={getattr(config, multiple_of)}"
            )
    if config.head_dim % 2:
        raise InputError(
            f"model.hidden_size={config.hidden_size} / model.num_attention_heads="
            f"{config.num_attention_heads} = {config.head_dim} dimensions a head; they are turned "
            "in pairs, so the number must be even"
        )


class LlamaBlock(nnx.Module):
    """``x + mixer(norm(x))``, then ``x + ffn(norm(x))``, without biases.

    Args:
        config: has ``hidden_size``, ``num_attention_heads``, ``num_kv_heads``, ``head_dim``,
            ``intermediate_size``, ``rope_theta``, ``rms_norm_eps``, ``initializer_range``,
            ``attention_implementation`` and ``block_size``, the attention's ``block``.
        kind: there is one.
    """

    def __init__(self, config: Any, kind: str, *, rngs: nnx.Rngs):
        del kind
        c = config
        init = {"rngs": rngs, "stddev": c.initializer_range}
        self.input_norm = RMSNorm(c.hidden_size, epsilon=c.rms_norm_eps)
        self.mixer = Attention(
            c.hidden_size,
            c.num_attention_heads,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            rotary_dim=c.head_dim,
            rotary_theta=c.rope_theta,
            block=c.block_size,
            implementation=c.attention_implementation,
            **init,
        )
        self.post_norm = RMSNorm(c.hidden_size, epsilon=c.rms_norm_eps)
        self.ffn = SwiGLU(c.hidden_size, c.intermediate_size, **init)

    def init_cache(self, batch: int, max_length: int, dtype: DTypeLike):
        """The mixer's cache."""
        return self.mixer.init_cache(batch, max_length, dtype)

    def __call__(self, x, cache=None, **context):
        """``(x, cache, {})``; see :class:`~jaxalope.layers.stack.Stack`."""
        mixed, cache = self.mixer(self.input_norm(x), cache, **context)
        return self.finish(x, mixed), cache, {}

    def finish(self, x: Float[Array, "B T D"], mixed: Float[Array, "B T D"]):
        """The block's output, of its input and what the mixer made of it."""
        x = x + mixed
        x = x + self.ffn(self.post_norm(x))
        return constrain(x, "batch", "seq", "embed")
