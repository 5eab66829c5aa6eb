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
from jaxtyping import Array, Float, Int

from ...errors import InputError
from ...layers.attention import Attention
from ...layers.ops.attention import Marks
from ...layers.stack import unstack
from ...model.decoder import Decoder
from ...sharding import constrain, kernel_map
from ..cache import along

DRIFTS = ("heads", "keys")
# No norm of an attention row is taken for smaller: a row that sees nothing has none.
_SMALLEST = 1e-8

_ROW = ("batch", None)
_WIDE = ("batch", None, "embed")
_QUERY = ("batch", None, "heads", None)
_KEY = ("batch", "kv_heads", None, None)
_AXES = {"hidden": _WIDE, "k": _KEY, "v": _KEY}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerMemory:
    """What one layer remembers of a canvas of ``T`` positions.

    Attributes:
        hidden: its inputs ``[B, T, D]``, each as of the last call that computed it. Queries are
            made of them again where they are asked for, at a few places.
        k, v: rotated keys, and values, ``[B, G, T, K]``: as products take them.
        watched: ``[B, track_num]``, the decoded positions that the window looks at most; ``T`` is
            none.
        similarity: ``[B]`` float32, of the last call that measured it; NaN in one that did not.
    """

    hidden: Any
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
        window: ``[B, W]``, where logits are asked for.
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
        """All that is asked for; a place that stands here twice is computed twice, alike."""
        return jnp.concatenate([self.tracked, self.new, self.window], axis=1)


def init_memory(model: Decoder, batch: int, width: int, track_num: int) -> dict[str, list]:
    """Every layer's memory of ``batch`` canvases of ``width`` positions, laid out as the stack."""
    dtype = jnp.dtype(model.config.dtype)

    def one(block):
        mixer = getattr(block, "mixer", None)
        if not isinstance(mixer, Attention) or not hasattr(block, "finish"):
            raise InputError(
                "cache='elastic' watches the attention of every layer, and this model has a "
                f"{type(mixer or block).__name__}; use cache='none'"
            )
        keys = jnp.zeros((batch, width, mixer.num_kv_heads, mixer.head_dim), dtype)
        hidden = jnp.zeros((batch, width, model.config.hidden_size), dtype)
        watched = jnp.full((batch, track_num), width, jnp.int32)
        return LayerMemory(
            **_laid_out(hidden, keys, keys),
            watched=constrain(watched, "batch", None),
            similarity=constrain(jnp.full((batch,), jnp.nan, jnp.float32), "batch"),
        )

    return model.stack.init_cache(one)


def elastic_pass(
    model: Decoder, memory: dict[str, list], ask: Ask, *, track_num: int, drift: str
) -> tuple[Float[Array, "B W D"], dict[str, list], Int[Array, "B"]]:
    """Compute what is asked.

    Args:
        model: a decoder whose blocks have an ``input_norm``, an
            :class:`~jaxalope.layers.attention.Attention` as ``mixer``, and ``finish``; see
            :class:`~jaxalope.model.llama.LlamaBlock`.
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
    columns = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), ask.tokens.shape)
    columns = constrain(columns, "batch", None)
    # What does not exist is a segment of its own; a place that is none sees what exists too.
    whole = Marks(columns, jnp.zeros_like(columns))
    rows = Marks(jnp.minimum(places, width - 1), jnp.zeros_like(places))
    keys = Marks(columns, jnp.where(ask.exists, 0, -1))
    tracked = jax.tree.map(lambda mark: mark[:, : ask.tracked.shape[1]], rows)

    def measure(mixer, q, k, earlier):
        """Attention of the few rows, the tracked ones' likeness to before, and each key's score."""
        weights = mixer.probabilities(q, _tokens_first(k), rows, keys)
        now = weights[:, :, : ask.tracked.shape[1]]
        likeness = _similarity(earlier, now, ask.tracked < width, ask.exists, drift)
        asked = weights[:, :, -ask.window.shape[1] :]
        asked = jnp.where((ask.window < width)[:, None, :, None], asked, 0.0)
        return weights, likeness, constrain(asked.sum(axis=(1, 2)), "batch", None)

    def reuse(block, layer, start, earlier, memory, q, full, few):
        weights, likeness, score = measure(block.mixer, q, memory["k"], earlier)
        mixed = block.mixer.average(weights, _tokens_first(memory["v"]))
        few = block.finish(few, block.mixer.o_proj(mixed))
        return memory, full, few, likeness, score

    def refresh(block, layer, start, earlier, memory, q, full, few):
        hidden = jnp.where((layer > start)[:, None, None], full, memory["hidden"])
        all_q, *new = block.mixer.heads(block.input_norm(hidden), columns)
        new = _laid_out(hidden, *new)
        # Rows that refresh nothing keep all but the few places, which are written already.
        memory = {
            name: jnp.where(along(layer >= start, x, 0), new[name].astype(x.dtype), x)
            for name, x in memory.items()
        }
        few_q = _gather(all_q, places, _QUERY)
        _, likeness, score = measure(block.mixer, few_q, memory["k"], earlier)
        k, v = (_tokens_first(memory[name]) for name in "kv")
        mixed = block.mixer.attend(all_q, k, v, whole, keys)
        full = block.finish(hidden, block.mixer.o_proj(mixed))
        return memory, full, _gather(full, places, _WIDE), likeness, score

    def call(block, carry, old):
        layer, start, full, few = carry
        memory = {name: getattr(old, name) for name in _AXES}
        before = block.input_norm(_gather(old.hidden, ask.tracked, _WIDE))
        tracked_q = block.mixer.queries(before, tracked.positions)
        earlier = block.mixer.probabilities(tracked_q, _tokens_first(old.k), tracked, keys)
        where = _once_read(earlier, places)
        q, k, v = block.mixer.heads(block.input_norm(few), rows.positions)
        memory = {
            "hidden": _scatter(memory["hidden"], where, few, _WIDE),
            "k": _scatter(memory["k"], where, k, _KEY, at=2),
            "v": _scatter(memory["v"], where, v, _KEY, at=2),
        }
        memory, full, few, likeness, score = jax.lax.cond(
            jnp.any(start <= layer),
            lambda *args: refresh(block, *args),
            lambda *args: reuse(block, *args),
            *(layer, start, earlier, memory, q, full, few),
        )
        measured = (layer < start) & jnp.any(ask.tracked < width, axis=1)
        start = jnp.where(measured & (likeness < ask.gamma), layer + 1, start)
        new = LayerMemory(
            **memory,
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
    width = hidden.shape[1]
    score, best = jax.lax.top_k(jnp.where(hidden, -1.0, score), min(track_num, width))
    found = jnp.where(score >= 0, best, width).astype(jnp.int32)
    return jnp.pad(found, ((0, 0), (0, track_num - found.shape[1])), constant_values=width)


def _gather(x, places, axes):
    """``x [B, T, ...]`` at each row's places; anything where there is none."""

    def pick(x, places):
        rows = jnp.arange(x.shape[0])[:, None]
        return x.at[rows, places].get(mode="clip")

    return kernel_map(pick, (axes, _ROW), axes)(x, places)


def _scatter(x, places, new, axes, at=1):
    """``x`` with ``new [B, Q, ...]`` at each row's places of axis ``at``, 1 or 2."""

    def put(x, places, new):
        rows = jnp.arange(x.shape[0])[:, None]
        index = (rows, places) if at == 1 else (rows, slice(None), places)
        return x.at[index].set(new.astype(x.dtype), mode="drop")

    given = axes if at == 1 else (axes[0], axes[2], axes[1], *axes[3:])
    return kernel_map(put, (axes, _ROW, given), axes)(x, places, new)


def _once_read(weights, places):
    """The places, known only once the attention ``weights`` are.

    What is remembered is read before it is written over in place. XLA takes a barrier away before
    it decides what to copy, and copies what is read and written in no order; a place that depends
    on what was read is an order. No weight is above one.
    """
    late = constrain(weights[..., 0].max(axis=(1, 2)) > 2, "batch")
    return places + late[:, None].astype(places.dtype)


def _tokens_first(x):
    """Keys or values as attention takes them, ``[B, T, G, K]``; nothing is moved."""
    return jnp.swapaxes(x, 1, 2)


def _laid_out(hidden, k, v) -> dict[str, Array]:
    """What a layer computes of a canvas, as it remembers it."""
    k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    values = {"hidden": hidden, "k": k, "v": v}
    return {name: constrain(x, *_AXES[name]) for name, x in values.items()}
