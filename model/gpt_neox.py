"""GPT-NeoX, the architecture of Pythia: layer norms, biases, rotary part, parallel residual.

Sources: "GPT-NeoX-20B", arXiv 2204.06745; "Pythia", arXiv 2304.01373; the configurations of the
released Pythia checkpoints.
"""

from __future__ import annotations

import dataclasses

from flax import nnx
from jax.typing import DTypeLike

from ..errors import InputError
from ..layers.attention import Attention
from ..layers.mlp import MLP
from ..layers.norm import LayerNorm
from ..sharding import constrain
from .decoder import Decoder, check_config

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "intermediate_size",
)


@dataclasses.dataclass(frozen=True)
class GPTNeoXConfig:
    """The shape of a GPT-NeoX model. There is no longest text: positions are rotary.

    Attributes:
        vocab_size: rows of the embedding and of the (untied) output head.
        hidden_size: model width D.
        num_layers: blocks.
        num_attention_heads: heads, each of ``hidden_size / num_attention_heads`` dimensions.
        intermediate_size: hidden units of the feed-forward layers.
        rotary_pct: share of a head's dimensions that carry the position, rounded down.
        rope_theta: base of the rotary frequencies.
        use_parallel_residual: attention and feed-forward layer both read the block's input;
            otherwise the latter reads what the former wrote.
        layer_norm_eps: of every norm.
        initializer_range: standard deviation of the initial weights; biases are zero.
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
    intermediate_size: int
    rotary_pct: float = 0.25
    rope_theta: float = 10000.0
    use_parallel_residual: bool = True
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int | None = 0
    eos_token_id: int | None = 0
    pad_token_id: int | None = None
    dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"
    attention_implementation: str | None = None

    def __post_init__(self):
        check_config(self, _POSITIVE)
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"model.hidden_size={self.hidden_size} is not a multiple of "
                f"model.num_attention_heads={self.num_attention_heads}"
            )
        if not 0 <= self.rotary_pct <= 1 or self.rotary_dim % 2:
            raise InputError(
                f"model.rotary_pct={self.rotary_pct} must lie in 0..1 and choose an even number of "
                f"a head's {self.head_dim} dimensions, which are turned in pairs"
            )
        if self.rope_theta <= 0:
            raise InputError(f"model.rope_theta={self.rope_theta} must be positive")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that carry the position."""
        return int(self.head_dim * self.rotary_pct)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every block: there is one."""
        return ("block",) * self.num_layers

    # -- Presets ----------------------------------------------------------------------------------

    @classmethod
    def _pythia(
        cls, num_layers: int, hidden_size: int, heads: int, vocab_size: int = 50304
    ) -> GPTNeoXConfig:
        """A released Pythia model. Vocabularies are padded by how the model was parallel."""
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden_size,
            dtype="bfloat16",
            remat="full",
        )

    @classmethod
    def pythia_70m(cls) -> GPTNeoXConfig:
        """Pythia-70M: 18.9M parameters without embedding and head."""
        return cls._pythia(6, 512, 8)

    @classmethod
    def pythia_160m(cls) -> GPTNeoXConfig:
        """Pythia-160M: 85.1M parameters without embedding and head."""
        return cls._pythia(12, 768, 12)

    @classmethod
    def pythia_410m(cls) -> GPTNeoXConfig:
        """Pythia-410M: 302M parameters without embedding and head."""
        return cls._pythia(24, 1024, 16)

    @classmethod
    def pythia_1b(cls) -> GPTNeoXConfig:
        """Pythia-1B: 806M parameters without embedding and head."""
        return cls._pythia(16, 2048, 8)

    @classmethod
    def pythia_1_4b(cls) -> GPTNeoXConfig:
        """Pythia-1.4B: 1.21B parameters without embedding and head."""
        return cls._pythia(24, 2048, 16)

    @classmethod
    def pythia_2_8b(cls) -> GPTNeoXConfig:
        """Pythia-2.8B: 2.52B parameters without embedding and head."""
        return cls._pythia(32, 2560, 32)

    @classmethod
    def pythia_6_9b(cls) -> GPTNeoXConfig:
        """Pythia-6.9B: 6.44B parameters without embedding and head."""
        return cls._pythia(32, 4096, 32, vocab_size=50432)

    @classmethod
    def pythia_12b(cls) -> GPTNeoXConfig:
        """Pythia-12B: 11.3B parameters without embedding and head."""
        return cls._pythia(36, 5120, 40, vocab_size=50688)

    @classmethod
    def tiny(cls) -> GPTNeoXConfig:
        """For tests: seconds on a CPU."""
        return cls(
            vocab_size=320,
            hidden_size=32,
            num_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            bos_token_id=None,
            eos_token_id=None,
        )

    # -- Counts -----------------------------------------------------------------------------------

    def num_params(self, *, active: bool = False, embedding: bool = True, head: bool = True) -> int:
        """The number of parameters.

        Args:
            active: all are, for every token.
            embedding: include the input embedding.
            head: include the output head.
        """
        del active
        d, f = self.hidden_size, self.intermediate_size
        block = (4 * d * d + 4 * d) + (2 * d * f + f + d) + 4 * d  # attention, feed-forward, norms
        return self.num_layers * block + 2 * d + self.vocab_size * d * (embedding + head)

    def flops_per_token(self, sequence_length: int) -> float:
        """Model FLOPs a trained token costs, forward and backward (3 times forward).

        Two a multiply-add, dense products, causal attention at its average length.
        Rematerialisation is not counted.
        """
        attention = self.num_layers * 2 * self.hidden_size * sequence_length  # 4 FLOPs * length / 2
        return 3.0 * (2 * self.num_params(embedding=False) + attention)


class GPTNeoXBlock(nnx.Module):
    """``x + mixer(norm(x)) + ffn(norm(x))``, or one after the other."""

    def __init__(self, config: GPTNeoXConfig, kind: str, *, rngs: nnx.Rngs):
        del kind
        c = config
        init = {"rngs": rngs, "stddev": c.initializer_range}
        self.input_norm = LayerNorm(c.hidden_size, epsilon=c.layer_norm_eps)
        self.mixer = Attention(
            c.hidden_size,
            c.num_attention_heads,
            head_dim=c.head_dim,
            rotary_dim=c.rotary_dim or None,
            rotary_theta=c.rope_theta,
            use_bias=True,
            implementation=c.attention_implementation,
            **init,
        )
        self.post_norm = LayerNorm(c.hidden_size, epsilon=c.layer_norm_eps)
        self.ffn = MLP(c.hidden_size, c.intermediate_size, **init)
        self.parallel = c.use_parallel_residual

    def init_cache(self, batch: int, max_length: int, dtype: DTypeLike):
        """The mixer's cache."""
        return self.mixer.init_cache(batch, max_length, dtype)

    def __call__(self, x, cache=None, **context):
        """``(x, cache, {})``; see :class:`~jaxalope.layers.stack.Stack`."""
        mixed, cache = self.mixer(self.input_norm(x), cache, **context)
        if self.parallel:
            x = x + mixed + self.ffn(self.post_norm(x))
        else:
            x = x + mixed
            x = x + self.ffn(self.post_norm(x))
        return constrain(x, "batch", "seq", "embed"), cache, {}


class GPTNeoX(Decoder):
    """The language model."""

    def __init__(self, config: GPTNeoXConfig, *, rngs: nnx.Rngs):
        norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps)
        super().__init__(config, GPTNeoXBlock, norm, rngs=rngs)
