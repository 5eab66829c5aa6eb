"""What every decoder of the zoo shares: embedding, a stack of blocks, a norm, an output head.

A family brings its configuration and its block, and overrides what it does differently
(:meth:`Decoder.embed_tokens`, :meth:`Decoder.logits`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ..errors import InputError
from ..layers.linear import Embedding, Linear
from ..layers.ops.linear_cross_entropy import PlainHead
from ..layers.segments import is_token
from ..layers.stack import REMAT_POLICIES, Stack
from ..sharding import constrain


@runtime_checkable
class DecoderConfig(Protocol):
    """What :class:`Decoder` and its users read of a family's configuration.

    One whose models are not decoded token by token says so: see :func:`.registry.decoding_of`.

    Attributes:
        vocab_size: rows of the embedding and of the output head.
        hidden_size: model width D.
        initializer_range: standard deviation of the initial weights.
        dtype: of activations and products; parameters are float32.
        scan_layers: run the repeated group of blocks by one scan.
        remat: what the backward pass keeps, a name of ``REMAT_POLICIES``.
        kinds: of every block, in order; equal kinds have equal shapes.
    """

    vocab_size: int
    hidden_size: int
    initializer_range: float
    dtype: str
    scan_layers: bool
    remat: str

    @property
    def kinds(self) -> Sequence[Hashable]:
        """See the class."""


def check_config(config: Any, positive: Sequence[str]) -> None:
    """Check the fields that every decoder has, and that the ``positive`` ones are.

    Raises:
        InputError: names the field.
    """
    for name in positive:
        if getattr(config, name) < 1:
            raise InputError(f"model.{name}={getattr(config, name)} must be at least 1")
    if config.dtype not in ("float32", "bfloat16"):
        raise InputError(f"model.dtype={config.dtype!r} is not 'float32' or 'bfloat16'")
    if config.remat not in REMAT_POLICIES:
        raise InputError(f"model.remat={config.remat!r} is not one of {sorted(REMAT_POLICIES)}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderCache:
    """What decoding remembers.

    Attributes:
        layers: the cache of every block's mixer, laid out as the stack's parameters.
        length: tokens read so far in each row, ``[B]`` int32.
    """

    layers: dict[str, list[Any]]
    length: Any


class Decoder(nnx.Module):
    """A language model.

    Args:
        config: of its family.
        make_block: ``make_block(config, kind, rngs=rngs)`` builds one block of the stack, called as
            ``block(x, cache, length=, segment_ids=, positions=)``, with
            ``init_cache(batch, max_length, dtype)``.
        final_norm: before the output head.
        head: ``"own"`` is ``lm_head``, ``"tied"`` the embedding's table; ``"none"`` is of models
            that name no token.
    """

    def __init__(
        self,
        config: DecoderConfig,
        make_block: Callable[..., nnx.Module],
        final_norm: nnx.Module,
        *,
        rngs: nnx.Rngs,
        head: Literal["own", "tied", "none"] = "own",
    ):
        self.config = config
        width, vocab, stddev = config.hidden_size, config.vocab_size, config.initializer_range
        self.embed = Embedding(vocab, width, rngs=rngs, stddev=stddev)
        self.stack = Stack(
            lambda kind, rngs: make_block(config, kind, rngs=rngs),
            config.kinds,
            rngs=rngs,
            scan=config.scan_layers,
            remat=config.remat,
        )
        self.final_norm = final_norm
        if head == "own":
            self.lm_head = Linear({"embed": width}, {"vocab": vocab}, rngs=rngs, stddev=stddev)

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> DecoderCache:
        """An empty cache for ``batch`` rows of up to ``max_length`` tokens each.

        ``dtype`` of what is cached is the model's if None; recurrent states are float32.
        """
        dtype = jnp.dtype(dtype or self.config.dtype)
        layers = self.stack.init_cache(lambda block: block.init_cache(batch, max_length, dtype))
        length = constrain(jnp.zeros((batch,), jnp.int32), "batch")
        return DecoderCache(layers=layers, length=length)

    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The first block's input, in the compute dtype."""
        return self.embed(tokens, jnp.dtype(self.config.dtype))

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        cache: DecoderCache | None = None,
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        **context: Any,
    ) -> tuple[Float[Array, "B T D"], DecoderCache | None, dict]:
        """The final normalised activations, before the output head.

        Args:
            tokens: ids below ``vocab_size``.
            cache: of the tokens before; None trains.
            segment_ids: 0 is padding; documents packed in one row carry different ids. With a cache
                a row is one document, its tokens first and padding after them.
            positions: of rotary embeddings, where the family has them; if None, how many tokens of
                its own document stand before each token.
            **context: given to every block, by families whose blocks take more; with
                ``two_views``, ``L`` is half of ``T``.

        Returns:
            Activations in the compute dtype, the cache, and what blocks report for learning without
            a gradient (the load of a router's experts), at the path of the parameter it is about.
        """
        x = self.embed_tokens(tokens)
        length = None if cache is None else cache.length
        layers = None if cache is None else cache.layers
        x, layers, stats = self.stack(
            x, layers, length=length, segment_ids=segment_ids, positions=positions, **context
        )
        if cache is not None:
            new = tokens.shape[1] if segment_ids is None else is_token(segment_ids).sum(axis=1)
            cache = DecoderCache(layers=layers, length=(length + new).astype(jnp.int32))
        return self.final_norm(x), cache, {"stack": stats} if stats else {}

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T vocab"]:
        """Unnormalised log-probabilities of the next token, float32."""
        if hasattr(self, "lm_head"):
            return self.lm_head(hidden, preferred_element_type=jnp.float32)
        return self.embed.logits(hidden)

    def plain_head(self) -> PlainHead | None:
        """What :meth:`logits` is where it is one product; None of an adapted or int8 head."""
        if not hasattr(self, "lm_head"):
            return PlainHead(self.embed.embedding[...], vocab_first=True)
        kernel = self.lm_head.plain_kernel()
        return None if kernel is None else PlainHead(kernel)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        cache: DecoderCache | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T vocab"], DecoderCache | None]:
        """Next-token logits and the cache; arguments as for :meth:`hidden_states`."""
        hidden, cache, _ = self.hidden_states(
            tokens, cache, segment_ids=segment_ids, positions=positions
        )
        return self.logits(hidden), cache
