"""CALM: the next chunk's latent vector, drawn; no logits, no likelihood.

A chunk of K tokens is read as one vector, by a causal transformer over chunks; a head draws the
next chunk's latent, which the autoencoder's decoder turns into K tokens. Those tokens, not the
latent, are what is read next. Source: "Continuous Autoregressive Language Models", arXiv
2510.27688, and the released code.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ..errors import InputError
from ..layers.chunks import chunk_segments, to_chunks
from ..layers.latent_heads import HEADS
from ..layers.linear import Linear
from ..layers.norm import LayerNorm, RMSNorm
from ..layers.segments import is_token
from .calm_autoencoder import CALMAutoencoder, CALMAutoencoderConfig
from .decoder import Decoder, DecoderCache, check_config
from .llama import LlamaBlock, check_heads

_POSITIVE = (
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "num_kv_heads",
    "intermediate_size",
    "head_layers",
    "noise_size",
)
_COMPRESSION_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class CALMConfig:
    """The shape of a CALM model; vocabulary and chunk size are its autoencoder's.

    Attributes:
        autoencoder: between chunks and latents; trained before, and then left as it is.
        hidden_size: model width D.
        num_layers: blocks.
        num_attention_heads: heads, each of ``hidden_size / num_attention_heads`` dimensions.
        num_kv_heads: heads of keys and values.
        intermediate_size: hidden units of the feed-forward layers.
        head: what draws a latent: ``"energy"``, ``"diffusion"`` or ``"flow"``.
        head_layers: blocks of the head.
        head_steps: of a diffusion (100 published) or flow head (10); None is the published number.
        noise_size: numbers that an energy head draws for a latent.
        rope_theta: base of the rotary frequencies; positions count chunks.
        rms_norm_eps: of every norm of the transformer.
        initializer_range: standard deviation of the initial weights.
        dtype: of activations and products; parameters are float32.
        scan_layers: run the blocks by one scan.
        remat: what the backward pass keeps, a name of ``REMAT_POLICIES``.
        attention_implementation: None picks by platform.
    """

    autoencoder: CALMAutoencoderConfig
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    intermediate_size: int
    head: str = "energy"
    head_layers: int = 4
    head_steps: int | None = None
    noise_size: int = 64
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"
    attention_implementation: str | None = None

    # Parts that are models of their own, trained before: see ``Experiment.parts``.
    PARTS: ClassVar[tuple[str, ...]] = ("autoencoder",)

    def __post_init__(self):
        check_config(self, _POSITIVE)
        check_heads(self)
        if self.head not in HEADS:
            raise InputError(f"model.head={self.head!r} is not one of {sorted(HEADS)}")
        if self.head_steps is not None:
            if self.head == "energy":
                raise InputError(
                    f"model.head_steps={self.head_steps} is of diffusion and flow heads; an energy "
                    "head draws in one"
                )
            if not (2 if self.head == "diffusion" else 1) <= self.head_steps <= 1000:
                raise InputError(
                    f"model.head_steps={self.head_steps} is not a number of steps that "
                    f"head={self.head!r} can take; 10 to 100 are usual"
                )
        if self.rope_theta <= 0:
            raise InputError(f"model.rope_theta={self.rope_theta} must be positive")

    @property
    def decoding(self) -> str:
        """See :func:`.registry.decoding_of`."""
        return "next_vector"

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.autoencoder.vocab_size

    @property
    def chunk_size(self) -> int:
        """Tokens K of a chunk."""
        return self.autoencoder.chunk_size

    @property
    def latent_size(self) -> int:
        """Numbers of a chunk's latent."""
        return self.autoencoder.latent_size

    @property
    def bos_token_id(self) -> int | None:
        """The autoencoder's, as the other special ids."""
        return self.autoencoder.bos_token_id

    @property
    def eos_token_id(self) -> int | None:
        """The autoencoder's."""
        return self.autoencoder.eos_token_id

    @property
    def pad_token_id(self) -> int | None:
        """The autoencoder's."""
        return self.autoencoder.pad_token_id

    @property
    def head_dim(self) -> int:
        """Width of a head of the attention."""
        return self.hidden_size // self.num_attention_heads

    @property
    def block_size(self) -> int:
        """Of the attention, over chunks: causal."""
        return 1

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every block: there is one."""
        return ("block",) * self.num_layers

    # -- Presets ----------------------------------------------------------------------------------

    @classmethod
    def small(cls) -> CALMConfig:
        """CALM-S, of the paper's ablations: 201M parameters beside the autoencoder."""
        return cls(
            autoencoder=CALMAutoencoderConfig.released(),
            hidden_size=768,
            num_layers=12,
            num_attention_heads=16,
            num_kv_heads=16,
            intermediate_size=2048,
            head_layers=3,
            dtype="bfloat16",
            remat="full",
        )

    @classmethod
    def medium(cls) -> CALMConfig:
        """CALM-M, 371M parameters beside the autoencoder."""
        return dataclasses.replace(
            cls.small(), hidden_size=1024, num_layers=16, intermediate_size=2752, head_layers=4
        )

    @classmethod
    def large(cls) -> CALMConfig:
        """CALM-L, 735M parameters beside the autoencoder; the number of heads is assumed."""
        return dataclasses.replace(cls.medium(), hidden_size=1536, intermediate_size=4096)

    @classmethod
    def xlarge(cls) -> CALMConfig:
        """CALM-XL, 1.82B parameters beside the autoencoder; the number of heads is assumed."""
        return dataclasses.replace(cls.medium(), hidden_size=2560, intermediate_size=6880)

    @classmethod
    def tiny(cls) -> CALMConfig:
        """For tests: byte-level ids, grouped heads."""
        return cls(
            autoencoder=CALMAutoencoderConfig.tiny(),
            hidden_size=32,
            num_layers=3,
            num_attention_heads=4,
            num_kv_heads=2,
            intermediate_size=48,
            head_layers=2,
            noise_size=8,
        )

    @classmethod
    def demo(cls) -> CALMConfig:
        """Byte-level: learns Python's look, four bytes a step, on two CPU cores."""
        return cls(
            autoencoder=CALMAutoencoderConfig.demo(),
            hidden_size=128,
            num_layers=4,
            num_attention_heads=4,
            num_kv_heads=4,
            intermediate_size=384,
            head_layers=2,
            noise_size=32,
        )

    # -- Counts -----------------------------------------------------------------------------------

    def num_params(self, *, active: bool = False, embedding: bool = True, head: bool = True) -> int:
        """The number of parameters, the autoencoder's among them.

        Args:
            active: all are, for every token.
            embedding: include both tables.
            head: include the table of the autoencoder, which is its head too.
        """
        del active
        tables = embedding * self.vocab_size * self.hidden_size
        autoencoder = self.autoencoder.num_params(embedding=embedding, head=head)
        d, norms = self.hidden_size, 2 * self.num_layers + 1
        counts = self._backbone() + self._compression() + self._head()
        # Biases and norms of the compression; those of the heads are in the count of each.
        return tables + autoencoder + counts + norms * d + 5 * d

    def flops_per_token(self, sequence_length: int) -> float:
        """Model FLOPs a trained token costs: the frozen encoder forward, the rest 3 times forward.

        Two a multiply-add; an energy head draws 8 latents for each activation, as published, and
        the other heads learn from 8.
        """
        forward = self.forward_flops(sequence_length) + 8 * 2.0 * self._head()
        return (3.0 * forward + self.autoencoder.encoder_flops()) / self.chunk_size

    def generation_flops_per_token(self, sequence_length: int) -> float:
        """FLOPs that a generated token costs: one draw, and the autoencoder's decoder."""
        passes = {"energy": 1, "diffusion": self.head_steps or 100}.get(
            self.head, 2 * (self.head_steps or 10)
        )
        draw = passes * 2.0 * self._head()
        decoder = self.autoencoder.decoder_flops()
        return (self.forward_flops(sequence_length) + draw + decoder) / self.chunk_size

    def forward_flops(self, sequence_length: int) -> float:
        """Forward FLOPs of a chunk up to its activation, attention at the average length."""
        chunks = sequence_length / self.chunk_size
        attention = self.num_layers * 4 * self.hidden_size * (chunks + 1) / 2
        return 2.0 * (self._backbone() + self._compression()) + attention

    def _backbone(self) -> int:
        d = self.hidden_size
        attention = 2 * d * self.head_dim * (self.num_attention_heads + self.num_kv_heads)
        return self.num_layers * (attention + 3 * d * self.intermediate_size)

    def _compression(self) -> int:
        d = self.hidden_size
        return 2 * self.chunk_size * d * d + 2 * d * d

    def _head(self) -> int:
        """Parameters of the head; nearly all are of matrices."""
        d, latent = self.hidden_size, self.latent_size
        if self.head == "energy":
            block = (2 + 1 + 2 + 1) * d * d + 7 * d
            ends = self.noise_size * d + 2 * d * d + d * latent + latent
            # Biases: noise, hidden, final hidden; norms: noise, hidden, final.
            return self.head_layers * block + ends + 9 * d
        out = latent * (2 if self.head == "diffusion" else 1)
        block = (2 + 3) * d * d + 7 * d
        ends = 256 * d + d * d + d * d + latent * d + 2 * d * d + d * out + out
        return self.head_layers * block + ends + 6 * d


class Compression(nnx.Module):
    """The embeddings of a chunk's tokens, side by side, to one vector."""

    def __init__(self, width: int, chunk_size: int, *, rngs: nnx.Rngs, stddev: float):
        init = {"rngs": rngs, "use_bias": True, "stddev": stddev}
        tokens, wide = {None: chunk_size, "embed": width}, {"mlp": 2 * width}
        self.up_proj = Linear(tokens, wide, **init)
        self.down_proj = Linear(wide, {"embed": width}, **init)
        self.norm = LayerNorm(width, epsilon=_COMPRESSION_EPSILON)

    def __call__(self, x: Float[Array, "B L K D"]) -> Float[Array, "B L D"]:
        """Apply to every chunk."""
        return self.norm(self.down_proj(jax.nn.silu(self.up_proj(x))))


class CALM(Decoder):
    """The language model: activations of chunks, and draws of the chunk after each.

    A cache holds chunks, and ``cache.length`` counts them.
    """

    def __init__(self, config: CALMConfig, *, rngs: nnx.Rngs):
        c = config
        norm = RMSNorm(c.hidden_size, epsilon=c.rms_norm_eps)
        super().__init__(config, LlamaBlock, norm, rngs=rngs, head="none")
        self.compression = Compression(
            c.hidden_size, c.chunk_size, rngs=rngs, stddev=c.initializer_range
        )
        own: dict[str, Any] = {"num_layers": c.head_layers, "rngs": rngs}
        if c.head == "energy":
            own |= {"noise_size": c.noise_size, "stddev": c.initializer_range}
        elif c.head_steps is not None:
            own["num_steps"] = c.head_steps
        self.latent_head = HEADS[c.head](c.hidden_size, c.latent_size, **own)
        self.autoencoder = CALMAutoencoder(c.autoencoder, rngs=rngs)

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> DecoderCache:
        """An empty cache for ``batch`` rows of up to ``max_length`` chunks each."""
        return super().init_cache(batch, max_length, dtype)

    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B L D"]:
        """One vector a chunk, in the compute dtype; ``T = L K``."""
        embedded = self.embed(tokens, jnp.dtype(self.config.dtype))
        return self.compression(to_chunks(embedded, self.config.chunk_size, "embed"))

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        cache: DecoderCache | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        **context: Any,
    ) -> tuple[Float[Array, "B L D"], DecoderCache | None, dict]:
        """The normalised activation of every chunk, from which the chunk after it is drawn.

        Args:
            tokens: whole chunks, ``T = L K``.
            cache: of the chunks before; None trains.
            segment_ids: of tokens, as for every decoder; a chunk belongs where its first token
                does.
            positions: of chunks; if None, how many of its own document stand before each.
            **context: given to every block.

        Returns:
            Activations ``[B, L, D]``, the cache and ``{}``.

        Raises:
            InputError: the tokens are no whole chunks.
        """
        x = self.embed_tokens(tokens)
        if segment_ids is not None:
            segment_ids = chunk_segments(segment_ids, self.config.chunk_size)
        length = None if cache is None else cache.length
        layers = None if cache is None else cache.layers
        x, layers, stats = self.stack(
            x, layers, length=length, segment_ids=segment_ids, positions=positions, **context
        )
        if cache is not None:
            new = x.shape[1] if segment_ids is None else is_token(segment_ids).sum(axis=1)
            cache = DecoderCache(layers=layers, length=(length + new).astype(jnp.int32))
        return self.final_norm(x), cache, {"stack": stats} if stats else {}

    def draw(
        self, hidden: Float[Array, "B L D"], noise: Float[Array, "B M ..."]
    ) -> Float[Array, "B M Z"]:
        """Latents of the chunk after each, float32, ``M / L`` for each activation.

        Args:
            hidden: of :meth:`hidden_states`.
            noise: of ``latent_head.noise``; draws of one activation stand next to each other.
        """
        return self.latent_head(hidden, noise)

    def tokens(self, latents: Float[Array, "B M Z"]) -> Int[Array, "B M K"]:
        """The chunks that these latents are of."""
        return self.autoencoder.tokens(latents)

    def logits(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L vocab"]:
        """There are none.

        Raises:
            InputError: always.
        """
        raise InputError(
            "a CALM model has no logits: it draws the next chunk's latent (draw, tokens); score "
            "it with jaxalope.evals.brier_lm"
        )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        cache: DecoderCache | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B L D"], DecoderCache | None]:
        """As :meth:`hidden_states`, without what is learnt without a gradient: nothing is."""
        hidden, cache, _ = self.hidden_states(
            tokens, cache, segment_ids=segment_ids, positions=positions
        )
        return hidden, cache
