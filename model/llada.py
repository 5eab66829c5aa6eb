"""LLaDA: a plain transformer without a causal mask, that fills in masked tokens.

Sources: "Large Language Diffusion Models", arXiv 2502.09992, and the released configurations. With
a block size it is the model of block diffusion (arXiv 2503.09573): blocks one after another, each
filled in as a whole. With a logit shift it holds the weights of next-token models that went on as
diffusion models (Dream, arXiv 2508.15487).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ..errors import InputError
from ..layers.attention import filled
from ..layers.norm import RMSNorm
from ..layers.segments import is_token, token_positions
from ..sharding import constrain
from .decoder import Decoder, DecoderCache, check_config
from .llama import LlamaBlock, check_heads

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "num_kv_heads",
    "intermediate_size",
)


@dataclasses.dataclass(frozen=True)
class LLaDAConfig:
    """The shape of a LLaDA model.

    With ``block_size=1`` and ``logit_shift`` it is a next-token model of the same shape: what a
    diffusion model is compared with, or begins with.

    Attributes:
        vocab_size: rows of the embedding and of the output head.
        hidden_size: model width D.
        num_layers: blocks.
        num_attention_heads: heads, each of ``hidden_size / num_attention_heads`` dimensions.
        num_kv_heads: heads of keys and values.
        intermediate_size: hidden units of the feed-forward layers.
        mask_token_id: what stands where a token is hidden.
        block_size: tokens of a document that see each other whole, beside all of earlier blocks;
            None is one block, attention without a mask.
        logit_shift: logits at a position are of the next one's token, as in next-token models;
            otherwise of its own.
        tie_word_embeddings: the head is the embedding's table.
        rope_theta: base of the rotary frequencies.
        rms_norm_eps: of every norm.
        initializer_range: standard deviation of the initial weights.
        initialization: ``"normal"``, or ``"mitchell"``, as published: normal, cut at three standard
            deviations, which are ``1 / sqrt(inputs)``, and for the last map of a layer's two halves
            a ``sqrt(2 (layer + 1))``-th of it, layers counted from 0.
        bos_token_id, eos_token_id, pad_token_id: special ids, None where there is none.
        dtype: of activations and products; parameters are float32.
        scan_layers: run the blocks by one scan.
        remat: what the backward pass keeps, a name of ``REMAT_POLICIES``.
        attention_implementation: None picks by platform.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    intermediate_size: int
    mask_token_id: int
    block_size: int | None = None
    logit_shift: bool = False
    tie_word_embeddings: bool = False
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    initialization: str = "normal"
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"
    attention_implementation: str | None = None

    def __post_init__(self):
        check_config(self, _POSITIVE)
        check_heads(self)
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise InputError(
                f"model.mask_token_id={self.mask_token_id} is outside the vocabulary of "
                f"{self.vocab_size}; name a row of the embedding that no text uses"
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name) == self.mask_token_id:
                raise InputError(
                    f"model.{name}={self.mask_token_id} is model.mask_token_id too; a mask is no "
                    "token of a text"
                )
        if self.block_size is not None and self.block_size < 1:
            raise InputError(
                f"model.block_size={self.block_size} must be at least 1; None is one block"
            )
        if self.initialization not in ("normal", "mitchell"):
            raise InputError(
                f"model.initialization={self.initialization!r} is not one of normal, mitchell"
            )
        if self.rope_theta <= 0:
            raise InputError(f"model.rope_theta={self.rope_theta} must be positive")

    @property
    def decoding(self) -> str:
        """See :func:`.registry.decoding_of`: blocks of one with shifted logits need no masks."""
        one_by_one = self.block_size == 1 and self.logit_shift
        return "next_token" if one_by_one else "masked_diffusion"

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every block: there is one."""
        return ("block",) * self.num_layers

    # -- Presets ----------------------------------------------------------------------------------

    @classmethod
    def llada_8b(cls) -> LLaDAConfig:
        """LLaDA-8B, base and instruct, and LLaDA-1.5."""
        return cls(
            vocab_size=126464,
            hidden_size=4096,
            num_layers=32,
            num_attention_heads=32,
            num_kv_heads=32,
            intermediate_size=12288,
            mask_token_id=126336,
            bos_token_id=126080,
            eos_token_id=126081,
            pad_token_id=126081,
            initialization="mitchell",
            dtype="bfloat16",
            remat="full",
        )

    @classmethod
    def llada_1b(cls) -> LLaDAConfig:
        """LLaDA-1B, 1.49B parameters, which was not released; sizes are recalled ones."""
        return dataclasses.replace(
            cls.llada_8b(),
            hidden_size=2048,
            num_layers=22,
            num_kv_heads=4,
            intermediate_size=5634,
        )

    @classmethod
    def tiny(cls) -> LLaDAConfig:
        """For tests: grouped heads, byte-level ids."""
        return cls(
            vocab_size=320,
            hidden_size=32,
            num_layers=3,
            num_attention_heads=4,
            num_kv_heads=2,
            intermediate_size=48,
            mask_token_id=259,
            eos_token_id=258,
            pad_token_id=256,
        )

    @classmethod
    def demo(cls) -> LLaDAConfig:
        """Byte-level, one million parameters: learns Python's look in minutes on two CPU cores."""
        return cls(
            vocab_size=320,
            hidden_size=128,
            num_layers=4,
            num_attention_heads=4,
            num_kv_heads=4,
            intermediate_size=384,
            mask_token_id=259,
            eos_token_id=258,
            pad_token_id=256,
            rope_theta=10000.0,
        )

    # -- Counts -----------------------------------------------------------------------------------

    def num_params(self, *, active: bool = False, embedding: bool = True, head: bool = True) -> int:
        """The number of parameters.

        Args:
            active: all are, for every token.
            embedding, head: include them; a table that is both counts once.
        """
        del active
        d = self.hidden_size
        attention = 2 * d * self.head_dim * (self.num_attention_heads + self.num_kv_heads)
        block = attention + 3 * d * self.intermediate_size + 2 * d
        tables = max(embedding, head) if self.tie_word_embeddings else embedding + head
        return self.num_layers * block + d + tables * self.vocab_size * d

    def flops_per_token(self, sequence_length: int) -> float:
        """Model FLOPs a trained token costs, forward and backward (3 times forward).

        Two a multiply-add, dense products, attention at the average number of tokens seen: all, or
        with blocks half and half a block more. The clean view that block diffusion reads beside a
        text is not counted, nor is rematerialisation.
        """
        seen = sequence_length
        if self.block_size is not None:
            seen = min(seen, (sequence_length + self.block_size) / 2)
        attention = self.num_layers * 4 * self.hidden_size * seen
        return 3.0 * (2 * self.num_params(embedding=self.tie_word_embeddings) + attention)


class LLaDA(Decoder):
    """The language model.

    Logits at a position are of its own token, or with ``config.logit_shift`` of the next one's.

    A cache holds the keys and values of a canvas. ``cache.length`` is how many of its positions are
    filled, and seen; :func:`dataclasses.replace` it to go back to fewer. A call with ``positions``
    reads the tokens there (all different within a row, where they are no padding), overwrites their
    keys and values and leaves the others as they are; the length only grows, to the last position
    written, and no gap may be left. A call without ``positions`` reads what comes next.
    """

    def __init__(self, config: LLaDAConfig, *, rngs: nnx.Rngs):
        norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)
        head = "tied" if config.tie_word_embeddings else "own"
        super().__init__(config, LlamaBlock, norm, rngs=rngs, head=head)
        if config.initialization == "mitchell":
            _mitchell(self, rngs)

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        cache: DecoderCache | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        clean: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], DecoderCache | None, dict]:
        """As :meth:`Decoder.hidden_states`, with a cache as the class says.

        Args:
            tokens: ids, with ``mask_token_id`` where they are hidden.
            cache: of a canvas.
            segment_ids: 0 is padding, which with ``positions`` may stand anywhere.
            positions: without a cache, of rotary embeddings; with one, where tokens are.
            clean: the text without masks, without a cache: each block of ``tokens`` sees itself and
                the blocks of ``clean`` before it, as when it is filled in (arXiv 2503.09573). What
                is returned is of ``tokens``, but with shifted logits of ``clean`` at the end of a
                block, from where the next one's first token is predicted.
        """
        context: dict[str, Any] = {"segment_ids": segment_ids, "positions": positions}
        if clean is not None:
            if cache is not None:
                raise InputError("clean= is read without a cache")
            both = [constrain(x, "batch", None) for x in (tokens, clean)]
            both = constrain(jnp.concatenate(both, axis=1), "batch", "seq")
            hidden, _, stats = super().hidden_states(both, **context, two_views=True)
            hidden = constrain(hidden, "batch", None, "embed")
            hidden, past = jnp.split(hidden, 2, axis=1)
            if self.config.logit_shift and self.config.block_size is not None:
                places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
                if segment_ids is not None:
                    places = token_positions(segment_ids)
                ends = constrain((places + 1) % self.config.block_size == 0, "batch", None)
                hidden = jnp.where(ends[..., None], past, hidden)
            return constrain(hidden, "batch", "seq", "embed"), None, stats
        if cache is None or positions is None:
            return super().hidden_states(tokens, cache, **context)
        written = jnp.ones_like(tokens, bool) if segment_ids is None else is_token(segment_ids)
        length = filled(cache.length, positions, written)
        hidden, cache, stats = super().hidden_states(tokens, cache, **context, slots=positions)
        return hidden, dataclasses.replace(cache, length=length), stats


def _mitchell(model: LLaDA, rngs: nnx.Rngs) -> None:
    """Draw all matrices again, as ``config.initialization`` says."""

    def draw(param: nnx.Param, inputs: int, depth: Any = 0.5):
        stddev = 1 / jnp.sqrt(2 * jnp.asarray(depth, jnp.float32) * inputs)
        shape = param[...].shape
        noise = jax.random.truncated_normal(rngs.params(), -3, 3, shape, jnp.float32)
        param[...] = noise * stddev.reshape(stddev.shape + (1,) * (len(shape) - stddev.ndim))

    def draw_block(block: LlamaBlock, layer: Any):
        width, hidden = model.config.hidden_size, model.config.intermediate_size
        mixer, ffn = block.mixer, block.ffn
        for linear in (mixer.q_proj, mixer.k_proj, mixer.v_proj, ffn.gate_proj, ffn.up_proj):
            draw(linear.kernel, width)
        draw(mixer.o_proj.kernel, width, layer + 1)
        draw(ffn.down_proj.kernel, hidden, layer + 1)

    stack = model.stack
    draw(model.embed.embedding, model.config.hidden_size)
    for i, block in enumerate(stack.head):
        draw_block(block, i)
    for i, block in enumerate(stack.body):
        draw_block(block, stack.plan.start + i + stack.plan.period * jnp.arange(stack.plan.repeats))
    for i, block in enumerate(stack.tail):
        draw_block(block, stack.plan.stop + i)
    if hasattr(model, "lm_head"):
        draw(model.lm_head.kernel, model.config.hidden_size)
