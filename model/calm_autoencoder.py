"""CALM's autoencoder: a chunk of K tokens to one Gaussian latent and back, chunk by chunk.

No attention and no positions: what a token's place in its chunk is, follows from where it stands in
the concatenation. Source: "Continuous Autoregressive Language Models", arXiv 2510.27688, section 3,
and the released code.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ..errors import InputError
from ..layers.chunks import from_chunks, to_chunks
from ..layers.linear import Embedding, Linear
from ..layers.mlp import SwiGLU
from ..layers.norm import RMSNorm
from ..layers.ops.linear_cross_entropy import PlainHead
from .decoder import check_config

_POSITIVE = ("vocab_size", "hidden_size", "intermediate_size", "latent_size", "chunk_size")


@dataclasses.dataclass(frozen=True)
class CALMAutoencoderConfig:
    """The shape of a CALM autoencoder.

    Attributes:
        vocab_size: rows of the embedding, which is the output head too.
        chunk_size: tokens K of a chunk.
        latent_size: numbers of a chunk's latent.
        hidden_size: width.
        intermediate_size: hidden units of the feed-forward layers.
        num_encoder_layers, num_decoder_layers: half of each work on tokens, half on chunks.
        rms_norm_eps: of every norm.
        initializer_range: standard deviation of the initial weights.
        bos_token_id, eos_token_id, pad_token_id: special ids, None where there is none.
        dtype: of activations and products; parameters are float32.
    """

    vocab_size: int
    chunk_size: int = 4
    latent_size: int = 128
    hidden_size: int = 512
    intermediate_size: int = 1280
    num_encoder_layers: int = 2
    num_decoder_layers: int = 2
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    dtype: str = "float32"

    # What Model and train/ ask of every configuration, and an autoencoder has one answer to.
    remat = "none"
    scan_layers = False

    def __post_init__(self):
        check_config(self, _POSITIVE)
        for name in ("num_encoder_layers", "num_decoder_layers"):
            layers = getattr(self, name)
            if layers < 0 or layers % 2:
                raise InputError(
                    f"model.{name}={layers} must be even: half of the layers work on tokens, half "
                    "on chunks"
                )

    @property
    def decoding(self) -> str:
        """See :func:`.registry.decoding_of`: chunks are reconstructed, none is predicted."""
        return "reconstruction"

    # -- Presets ----------------------------------------------------------------------------------

    @classmethod
    def released(cls) -> CALMAutoencoderConfig:
        """Four tokens of Llama 3's vocabulary, 75.8M parameters, as released."""
        return cls(
            vocab_size=128257,
            bos_token_id=128000,
            eos_token_id=128001,
            pad_token_id=128256,
            dtype="bfloat16",
        )

    @classmethod
    def tiny(cls) -> CALMAutoencoderConfig:
        """For tests: byte-level ids."""
        return cls(
            vocab_size=320,
            latent_size=8,
            hidden_size=16,
            intermediate_size=24,
            eos_token_id=258,
            pad_token_id=256,
        )

    @classmethod
    def demo(cls) -> CALMAutoencoderConfig:
        """Byte-level: four bytes to 128 numbers, above 99.9% in minutes on two CPU cores."""
        return cls(
            vocab_size=320,
            latent_size=128,
            hidden_size=128,
            intermediate_size=320,
            eos_token_id=258,
            pad_token_id=256,
        )

    # -- Counts -----------------------------------------------------------------------------------

    def num_params(self, *, active: bool = False, embedding: bool = True, head: bool = True) -> int:
        """The number of parameters.

        Args:
            active: all are, for every token.
            embedding, head: include the table, which is both.
        """
        del active
        table = self.vocab_size * self.hidden_size if embedding or head else 0
        return table + sum(self._matrices()) + self._vectors()

    def flops_per_token(self, sequence_length: int) -> float:
        """Model FLOPs a trained token costs, forward and backward (3 times forward)."""
        del sequence_length
        return 3.0 * (self.encoder_flops() + self.decoder_flops()) / self.chunk_size

    def encoder_flops(self) -> float:
        """Forward FLOPs of encoding a chunk, two a multiply-add."""
        return self._flops(self.num_encoder_layers) + 4.0 * self.hidden_size * self.latent_size

    def decoder_flops(self) -> float:
        """Forward FLOPs of decoding a chunk, logits included."""
        d = self.hidden_size
        head = 2.0 * self.chunk_size * self.vocab_size * d
        return self._flops(self.num_decoder_layers) + 2.0 * d * self.latent_size + head

    def _flops(self, layers: int) -> float:
        """Of the layers and of what is between their halves."""
        d, k = self.hidden_size, self.chunk_size
        block = 6.0 * d * self.intermediate_size
        return layers // 2 * (k + 1) * block + 2.0 * k * d * d

    def _matrices(self) -> tuple[int, ...]:
        d, latent = self.hidden_size, self.latent_size
        layers = self.num_encoder_layers + self.num_decoder_layers
        return (
            layers * 3 * d * self.intermediate_size,
            2 * self.chunk_size * d * d,
            3 * latent * d,
        )

    def _vectors(self) -> int:
        d, latent = self.hidden_size, self.latent_size
        norms = self.num_encoder_layers + self.num_decoder_layers + 2
        return norms * d + d + self.chunk_size * d + 2 * latent + d


class AutoencoderBlock(nnx.Module):
    """``x + ffn(norm(x))``."""

    def __init__(self, config: CALMAutoencoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.norm = RMSNorm(c.hidden_size, epsilon=c.rms_norm_eps)
        self.ffn = SwiGLU(c.hidden_size, c.intermediate_size, rngs=rngs, stddev=c.initializer_range)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply to every place."""
        return x + self.ffn(self.norm(x))


class CALMAutoencoder(nnx.Module):
    """Chunks to the mean and the log standard deviation of a Gaussian, and its draws to logits."""

    def __init__(self, config: CALMAutoencoderConfig, *, rngs: nnx.Rngs):
        c, d, k = config, config.hidden_size, config.chunk_size
        init = {"rngs": rngs, "stddev": c.initializer_range}
        self.config = config

        def blocks(count):
            return nnx.List([AutoencoderBlock(c, rngs=rngs) for _ in range(count)])

        self.embed = Embedding(c.vocab_size, d, **init)
        self.encoder_layers = blocks(c.num_encoder_layers)
        self.squeeze = Linear({None: k, "embed": d}, {None: d}, use_bias=True, **init)
        self.encoder_norm = RMSNorm(d, epsilon=c.rms_norm_eps)
        self.to_latent = Linear({"embed": d}, {None: 2 * c.latent_size}, use_bias=True, **init)
        self.from_latent = Linear({None: c.latent_size}, {"embed": d}, use_bias=True, **init)
        self.decoder_layers = blocks(c.num_decoder_layers)
        self.expand = Linear({None: d}, {None: k, "embed": d}, use_bias=True, **init)
        self.decoder_norm = RMSNorm(d, epsilon=c.rms_norm_eps)

    def encode(
        self, tokens: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B L Z"], Float[Array, "B L Z"]]:
        """Mean and log standard deviation of every chunk's latent, float32; ``T = L K``."""
        c = self.config
        x = self.embed(tokens, jnp.dtype(c.dtype))
        half = c.num_encoder_layers // 2
        for layer in self.encoder_layers[:half]:
            x = layer(x)
        x = self.squeeze(to_chunks(x, c.chunk_size, "embed"))
        for layer in self.encoder_layers[half:]:
            x = layer(x)
        latent = self.to_latent(self.encoder_norm(x)).astype(jnp.float32)
        mean, log_std = jnp.split(latent, 2, axis=-1)
        return mean, log_std

    def decode(self, latents: Float[Array, "B L Z"]) -> Float[Array, "B T D"]:
        """Normalised activations of the chunks' tokens, before the output head."""
        c = self.config
        x = self.from_latent(latents.astype(jnp.dtype(c.dtype)))
        half = c.num_decoder_layers // 2
        for layer in self.decoder_layers[:half]:
            x = layer(x)
        x = from_chunks(self.expand(x), "embed")
        for layer in self.decoder_layers[half:]:
            x = layer(x)
        return self.decoder_norm(x)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T vocab"]:
        """Unnormalised log-probabilities of each token, float32; the head is the embedding."""
        return self.embed.logits(hidden)

    def plain_head(self) -> PlainHead:
        """What :meth:`logits` is: the embedding's table."""
        return PlainHead(self.embed.embedding[...], vocab_first=True)

    def tokens(self, latents: Float[Array, "B L Z"]) -> Int[Array, "B L K"]:
        """The likeliest token at every place of the chunks that these latents are of."""
        best = jnp.argmax(self.logits(self.decode(latents)), axis=-1).astype(jnp.int32)
        return to_chunks(best, self.config.chunk_size)

    def __call__(
        self, tokens: Int[Array, "B T"], key: jax.Array | None = None
    ) -> Float[Array, "B T vocab"]:
        """Logits of the same tokens, through the mean of their latents or, with a key, a draw."""
        mean, log_std = self.encode(tokens)
        if key is not None:
            mean = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape, jnp.float32)
        return self.logits(self.decode(mean))
