"""One call of a model for Elastic-Cache: a few rows of the canvas, or all of them from a layer on.

Every layer remembers what it computed last at every position. A call brings new values for a few
places (tracked tokens, tokens committed since, the window that is asked), and each layer looks
whether the attention of the tracked tokens has moved. Where it has, the layers above compute every
place anew, from the inputs that they remember. Rows of a batch decide for themselves; a layer that
no row refreshes costs a few places, and one that any row refreshes the whole canvas of all.

Source: arXiv 2510.14973; the batched form, with fixed shapes, is this library's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ...layers.ops.attention import Marks
from ...layers.stack import unstack
from ...model.decoder import Decoder
from ...sharding import constrain, kernel_map

DRIFTS = ("heads", "keys")
# No norm of an attention row is taken for smaller: a row that sees nothing has none.
_SMALLEST = 1e-8

_WIDE, _QUERY, _KEY = (
    ("batch", None, "embed"),
    ("batch", None, "heads", None),
    ("batch", None, "kv_heads", None),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerMemory:
    """What one layer remembers of a canvas of ``T`` positions.

    Attributes:
        hidden: its inputs ``[B, T, D]``, each as of the last call that computed it.
        q, k, v: rotated queries and keys, and values, ``[B, T, heads, head_dim]``, of them.
        watched: ``[B, track_num]``, the decoded positions that the window looks at most; ``T`` is
            none.
        similarity: ``[B]`` float32, of the last call that measured it; NaN in one that did not.
    """

    hidden: Any
    q: Any
    k: Any
    v: Any
    watched: Any
    similarity: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ask:
    """What a call is to compute. Places are positions of the canvas; its width ``T`` is none.

    Attributes:
        tokens: the canvas ``[B, T]``.
        exists: ``[B, T]``, positions that belong to the row.
        masked: ``[B, T]``, positions still to be decoded.
        tracked: ``[B, R]``, the tokens whose attention is watched, each once.
        new: ``[B, C]``, what the call before committed.
        window: ``[B, W]``, whose tokens are asked for.
        start: ``[B]`` int32, the first layer that computes every row: -1 with the embedding, the
            number of layers for none yet.
        gamma: similarity below which the layers above are refreshed.
    """

    tokens: Any
    exists: Any
    masked: Any
    tracked: Any
    new: Any
    window: Any
    start: Any
    gamma: Any

    @property
    def places(self) -> Int[Array, "B Q"]:
        """All that is asked for, each place once."""
        return jnp.concatenate([self.tracked, self.new, self.window], axis=1)


def init_memory(model: Decoder, batch: int, width: int, track_num: int) -> dict[str, list]:
    """Every layer's memory of ``batch`` canvases of ``width`` positions, laid out as the stack."""
    dtype = jnp.dtype(model.config.dtype)

    def one(block):
        mixer = block.mixer
        queries = (batch, width, mixer.num_heads, mixer.head_dim)
        keys = (batch, width, mixer.num_kv_heads, mixer.head_dim)
        return _laid_out(
            LayerMemory(
                hidden=jnp.zeros((batch, width, model.config.hidden_size), dtype),
                q=jnp.zeros(queries, dtype),
                k=jnp.zeros(keys, dtype),
                v=jnp.zeros(keys, dtype),
                watched=jnp.full((batch, track_num), width, jnp.int32),
                similarity=jnp.full((batch,), jnp.nan, jnp.float32),
            )
        )

    return model.stack.init_cache(one)


def elastic_pass(
    model: Decoder, memory: dict[str, list], ask: Ask, *, track_num: int, drift: str
) -> tuple[Float[Array, "B W D"], dict[str, list], Int[Array, "B"]]:
    """Compute what is asked.

    Args:
        model: a decoder whose blocks have ``read`` and ``finish``; see
            :class:`~jaxalope.model.llada.LLaDABlock`.
        memory: of the calls before.
        ask: what to compute.
        track_num: tokens that each layer proposes to track.
        drift: what is compared of a tracked token's attention before and now: ``"heads"``, the
            weights that all heads give one key, averaged over keys (the released code);
            ``"keys"``, the weights that one head gives all keys, averaged over heads (the paper).

    Returns:
        The normalised activations of the window, the new memory, and the layer from which every row
        was computed in the end.
    """
    width, places = ask.tokens.shape[1], ask.places
    columns = _columns(ask.tokens)
    # What does not exist is a segment of its own; a place that is none sees what exists too.
    whole = Marks(columns, jnp.zeros_like(columns))
    rows = Marks(jnp.minimum(places, width - 1), jnp.zeros_like(places))
    keys = Marks(columns, jnp.where(ask.exists, 0, -1))

    def measure(mixer, old, few, k):
        """Attention of the few rows, the tracked ones' likeness to before, and each key's score."""
        weights = mixer.probabilities(few, k, rows, keys)
        tracked = ask.tracked.shape[1]
        before = jax.tree.map(lambda mark: mark[:, :tracked], rows)
        earlier = mixer.probabilities(_gather(old.q, ask.tracked, _QUERY), old.k, before, keys)
        likeness = _similarity(
            earlier, weights[:, :, :tracked], ask.tracked < width, ask.exists, drift
        )
        asked = weights[:, :, -ask.window.shape[1] :]
        asked = jnp.where((ask.window < width)[:, None, :, None], asked, 0.0)
        return weights, likeness, constrain(asked.sum(axis=(1, 2)), "batch", None)

    def reuse(block, layer, start, old, full, few):
        q, k, v = block.mixer.heads(block.input_norm(few), rows.positions)
        new = _laid_out(
            dataclasses.replace(
                old,
                hidden=_scatter(old.hidden, places, few, _WIDE),
                q=_scatter(old.q, places, q, _QUERY),
                k=_scatter(old.k, places, k, _KEY),
                v=_scatter(old.v, places, v, _KEY),
            )
        )
        weights, likeness, score = measure(block.mixer, old, q, new.k)
        mixed = block.mixer.average(weights, new.v)
        few = block.finish(few, block.mixer.o_proj(mixed))
        return new, full, few, likeness, score

    def refresh(block, layer, start, old, full, few):
        above = layer > start
        hidden = _scatter(old.hidden, places, few, _WIDE)
        hidden = jnp.where(above[:, None, None], full, hidden)
        q, k, v = block.mixer.heads(block.input_norm(hidden), keys.positions)
        written = (layer >= start)[:, None] | _touched(places, width)
        written = written[:, :, None, None]
        new = _laid_out(
            dataclasses.replace(
                old,
                hidden=hidden,
                q=jnp.where(written, q.astype(old.q.dtype), old.q),
                k=jnp.where(written, k.astype(old.k.dtype), old.k),
                v=jnp.where(written, v.astype(old.v.dtype), old.v),
            )
        )
        _, likeness, score = measure(block.mixer, old, _gather(q, places, _QUERY), new.k)
        mixed = block.mixer.attend(q, new.k, new.v, whole, keys)
        full = block.finish(hidden, block.mixer.o_proj(mixed))
        return new, full, _gather(full, places, _WIDE), likeness, score

    def call(block, carry, old):
        layer, start, full, few = carry
        new, full, few, likeness, score = jax.lax.cond(
            jnp.any(start <= layer),
            lambda *args: refresh(block, *args),
            lambda *args: reuse(block, *args),
            *(layer, start, old, full, few),
        )
        measured = (layer < start) & jnp.any(ask.tracked < width, axis=1)
        start = jnp.where(measured & (likeness < ask.gamma), layer + 1, start)
        new = dataclasses.replace(
            new,
            watched=_most_watched(score, ask.masked | ~ask.exists, track_num),
            similarity=jnp.where(measured, likeness, jnp.nan),
        )
        return (layer + 1, start, full, few), new, {}

    few = model.embed_tokens(_gather(ask.tokens, places, ("batch", None)))
    full = jax.lax.cond(
        jnp.any(ask.start < 0),
        lambda: constrain(model.embed_tokens(ask.tokens), *_WIDE),
        lambda: constrain(jnp.zeros((*ask.tokens.shape, few.shape[-1]), few.dtype), *_WIDE),
    )
    few = constrain(few, *_WIDE)
    (_, start, _, few), memory, _ = model.stack.each(
        call, (jnp.int32(0), ask.start, full, few), memory
    )
    return model.final_norm(few[:, -ask.window.shape[1] :]), memory, start


def each_layer(memory: dict[str, list], model: Decoder, name: str) -> list[Array]:
    """One field of every layer's memory, in order."""
    tree = {part: [getattr(m, name) for m in layers] for part, layers in memory.items()}
    return unstack(tree, model.stack.plan)


def _similarity(old, new, tracked, exists, drift) -> Float[Array, "B"]:
    """Mean cosine of attention rows ``[B, N, R, T]`` before and now, over what exists of them."""
    axis = {"heads": 1, "keys": 3}[drift]

    def norm(x):
        return jnp.maximum(jnp.sqrt(jnp.square(x).sum(axis=axis)), _SMALLEST)

    cosine = (old * new).sum(axis=axis) / (norm(old) * norm(new))
    counted = tracked[:, :, None] & exists[:, None, :] if drift == "heads" else tracked[:, None, :]
    counted = jnp.broadcast_to(counted, cosine.shape)
    total = jnp.where(counted, cosine, 0.0).sum(axis=(1, 2))
    return constrain(total / jnp.maximum(counted.sum(axis=(1, 2)), 1), "batch")


def _most_watched(score, hidden, track_num) -> Int[Array, "B track_num"]:
    """The places of the largest scores among those that are not ``hidden``; the width is none."""
    score, best = jax.lax.top_k(jnp.where(hidden, -1.0, score), track_num)
    return jnp.where(score >= 0, best, hidden.shape[1]).astype(jnp.int32)


def _columns(tokens) -> Int[Array, "B T"]:
    columns = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return constrain(columns, "batch", None)


def _touched(places, width) -> Bool[Array, "B T"]:
    """Which positions are among the places."""
    return _scatter(
        jnp.zeros((places.shape[0], width), bool), places, jnp.ones_like(places, bool), _ROW
    )


_ROW = ("batch", None)


def _gather(x, places, axes):
    """``x [B, T, ...]`` at each row's places; anything where there is none."""

    def pick(x, places):
        rows = jnp.arange(x.shape[0])[:, None]
        return x.at[rows, places].get(mode="clip")

    return kernel_map(pick, (axes, _ROW), axes)(x, places)


def _scatter(x, places, new, axes):
    """``x [B, T, ...]`` with ``new`` at each row's places."""

    def put(x, places, new):
        rows = jnp.arange(x.shape[0])[:, None]
        return x.at[rows, places].set(new.astype(x.dtype), mode="drop")

    return kernel_map(put, (axes, _ROW, axes), axes)(x, places, new)


def _laid_out(memory: LayerMemory) -> LayerMemory:
    """The same memory on its devices; both ways through a layer must end alike."""
    axes = LayerMemory(_WIDE, _QUERY, _KEY, _KEY, _ROW, ("batch",))
    return LayerMemory(
        **{
            field.name: constrain(getattr(memory, field.name), *getattr(axes, field.name))
            for field in dataclasses.fields(memory)
        }
    )
