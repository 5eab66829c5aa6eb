"""Gemma-2: grouped heads, windows in every other layer, soft caps, norms on both sides.

Source: "Gemma 2: Improving Open Language Models at a Practical Size", arXiv 2408.00118, and the
configurations of the released checkpoints.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..errors import InputError
from ..layers.attention import Attention
from ..layers.mlp import GatedMLP, gelu_tanh
from ..layers.norm import RMSNorm
from ..layers.ops.linear_cross_entropy import PlainHead
from ..sharding import constrain
from .decoder import Decoder, check_config

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "sliding_window",
)
_POSITIVE_NUMBERS = (
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rope_theta",
)


@dataclasses.dataclass(frozen=True)
class Gemma2Config:
    """The shape of a Gemma-2 model.

    Attributes:
        vocab_size: rows of the embedding, which is the output head too.
        hidden_size: model width D.
        num_layers: blocks; every second one, from the first on, has a window.
        num_attention_heads, num_kv_heads, head_dim: of attention; ``head_dim`` is independent of D.
        intermediate_size: hidden units of the feed-forward layers.
        query_pre_attn_scalar: scores are divided by its root.
        sliding_window: tokens that a layer with a window sees, the query included.
        attn_logit_softcapping: soft cap of attention scores; None has none.
        final_logit_softcapping: soft cap of logits; None has none.
        rope_theta: base of the rotary frequencies.
        rms_norm_eps: of every norm.
        initializer_range: standard deviation of the initial weights.
        bos_token_id, eos_token_id, pad_token_id: special ids, None where there is none.
        dtype: of activations and products; parameters are float32.
        scan_layers: run the repeated pair of blocks by one scan.
        remat: what the backward pass keeps, a name of ``REMAT_POLICIES``.
        attention_implementation: None picks by platform.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    query_pre_attn_scalar: int
    sliding_window: int = 4096
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    bos_token_id: int | None = 2
    eos_token_id: int | None = 1
    pad_token_id: int | None = 0
    dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"
    attention_implementation: str | None = None

    def __post_init__(self):
        check_config(self, _POSITIVE)
        for name in _POSITIVE_NUMBERS:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"model.{name}={value} must be positive")
        if self.num_attention_heads % self.num_kv_heads:
            raise InputError(
                f"model.num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"model.num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise InputError(
                f"model.head_dim={self.head_dim} must be even: its dimensions are turned in pairs"
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """``"sliding"`` or ``"full"``, of every block."""
        return tuple("full" if i % 2 else "sliding" for i in range(self.num_layers))

    # -- Presets ----------------------------------------------------------------------------------

    @classmethod
    def gemma2_2b(cls) -> Gemma2Config:
        """The released 2B models."""
        return cls(
            vocab_size=256000,
            hidden_size=2304,
            num_layers=26,
            num_attention_heads=8,
            num_kv_heads=4,
            head_dim=256,
            intermediate_size=9216,
            query_pre_attn_scalar=256,
            dtype="bfloat16",
            remat="full",
        )

    @classmethod
    def gemma2_9b(cls) -> Gemma2Config:
        """The released 9B models."""
        return dataclasses.replace(
            cls.gemma2_2b(),
            hidden_size=3584,
            num_layers=42,
            num_attention_heads=16,
            num_kv_heads=8,
            intermediate_size=14336,
        )

    @classmethod
    def gemma2_27b(cls) -> Gemma2Config:
        """The released 27B models, whose scores are scaled by the width over the heads."""
        return dataclasses.replace(
            cls.gemma2_2b(),
            hidden_size=4608,
            num_layers=46,
            num_attention_heads=32,
            num_kv_heads=16,
            head_dim=128,
            intermediate_size=36864,
            query_pre_attn_scalar=144,
        )

    @classmethod
    def tiny(cls) -> Gemma2Config:
        """For tests: a repeated pair and an odd block, a window shorter than any text."""
        return cls(
            vocab_size=320,
            hidden_size=32,
            num_layers=5,
            num_attention_heads=4,
            num_kv_heads=2,
            head_dim=16,
            intermediate_size=48,
            query_pre_attn_scalar=8,
            sliding_window=8,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )

    # -- Counts -----------------------------------------------------------------------------------

    def num_params(self, *, active: bool = False, embedding: bool = True, head: bool = True) -> int:
        """The number of parameters.

        Args:
            active: all are, for every token.
            embedding, head: include the table, which is both; it counts once.
        """
        del active
        d, k = self.hidden_size, self.head_dim
        attention = 2 * d * k * (self.num_attention_heads + self.num_kv_heads)
        block = attention + 3 * d * self.intermediate_size + 4 * d
        table = self.vocab_size * d if embedding or head else 0
        return self.num_layers * block + d + table

    def flops_per_token(self, sequence_length: int) -> float:
        """Model FLOPs a trained token costs, forward and backward (3 times forward).

        Two a multiply-add, dense products, attention at the average number of tokens seen.
        Rematerialisation is not counted.
        """
        window = min(self.sliding_window, sequence_length)
        seen = {"full": sequence_length / 2}
        seen["sliding"] = window - window**2 / (2 * sequence_length) if window else 0.0
        scores = 4 * self.num_attention_heads * self.head_dim  # both products, for one key
        attention = sum(scores * seen[kind] for kind in self.kinds)
        return 3.0 * (2 * self.num_params(embedding=False) + attention)


class Gemma2Block(nnx.Module):
    """``x + norm(mixer(norm(x)))``, then ``x + norm(ffn(norm(x)))``."""

    def __init__(self, config: Gemma2Config, kind: str, *, rngs: nnx.Rngs):
        c = config
        init = {"rngs": rngs, "stddev": c.initializer_range}

        def norm():
            return RMSNorm(c.hidden_size, epsilon=c.rms_norm_eps, unit_offset=True)

        self.input_norm = norm()
        self.mixer = Attention(
            c.hidden_size,
            c.num_attention_heads,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            scale=c.query_pre_attn_scalar**-0.5,
            softcap=c.attn_logit_softcapping,
            window=c.sliding_window if kind == "sliding" else None,
            rotary_dim=c.head_dim,
            rotary_theta=c.rope_theta,
            implementation=c.attention_implementation,
            **init,
        )
        self.post_mixer_norm = norm()
        self.pre_ffn_norm = norm()
        self.ffn = GatedMLP(c.hidden_size, c.intermediate_size, activation=gelu_tanh, **init)
        self.post_ffn_norm = norm()

    def init_cache(self, batch: int, max_length: int, dtype: DTypeLike):
        """The mixer's cache."""
        return self.mixer.init_cache(batch, max_length, dtype)

    def __call__(self, x, cache=None, **context):
        """``(x, cache, {})``; see :class:`~jaxalope.layers.stack.Stack`."""
        mixed, cache = self.mixer(self.input_norm(x), cache, **context)
        x = x + self.post_mixer_norm(mixed)
        x = x + self.post_ffn_norm(self.ffn(self.pre_ffn_norm(x)))
        return constrain(x, "batch", "seq", "embed"), cache, {}


class Gemma2(Decoder):
    """The language model."""

    def __init__(self, config: Gemma2Config, *, rngs: nnx.Rngs):
        norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, unit_offset=True)
        super().__init__(config, Gemma2Block, norm, rngs=rngs, head="tied")

    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Rows of the table times the root of the width.

        The root is rounded to the compute dtype first, as where the bfloat16 models were trained.
        """
        x = super().embed_tokens(tokens)
        return x * jnp.asarray(math.sqrt(self.config.hidden_size), x.dtype)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T vocab"]:
        """Unnormalised log-probabilities of the next token, capped, float32."""
        logits, cap = super().logits(hidden), self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def plain_head(self) -> PlainHead:
        """The table, and the cap."""
        return super().plain_head()._replace(softcap=self.config.final_logit_softcapping)
