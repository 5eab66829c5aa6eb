"""Requests: prompts and settings as users give them, checked, then as the arrays of one batch."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ..errors import InputError
from ..model.handle import Model
from ..model.registry import decoding_of
from .defaults import listed, stop_ids
from .policy import Policy, Temperature, stack_rows, stages
from .rows import is_single

Prompts = str | Sequence[str] | Sequence[Sequence[int]]

# What models do whose decoding is not the caller's.
_OTHERWISE = {
    "next_token": "continues a text token by token; call jaxalope.generate",
    "masked_diffusion": (
        "fills masks in, in any order, and does not continue a text token by token; call "
        "jaxalope.denoise"
    ),
    "next_vector": (
        "draws whole chunks and has no logits, which this needs; call jaxalope.generate"
    ),
    "reconstruction": (
        "gives back what it reads and continues nothing; load the model that it is a part of"
    ),
}


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows for a decoder, padded so that few shapes are ever compiled.

    The first ``count`` rows are requests; the others fill a mesh's shares up and are done from the
    start. Arrays are NumPy's.

    Attributes:
        prompts: ``[B, P]`` int32.
        lengths, limits: ``[B]`` int32.
        seeds: ``[B]`` uint32.
        samples: ``[B]`` int32, which of its prompt's samples a row is.
        stop_tokens: ``[B, S]`` int32, padded by an id that no token has.
        policy: of all rows, numbers ``[B]``.
        capacity: width of the canvas.
        count: requests.
    """

    prompts: np.ndarray
    lengths: np.ndarray
    limits: np.ndarray
    seeds: np.ndarray
    samples: np.ndarray
    stop_tokens: np.ndarray
    policy: Policy
    capacity: int
    count: int

    def take(self, rows: np.ndarray) -> Batch:
        """These rows, in this order; ``count`` is left as it is."""
        names = ("prompts", "lengths", "limits", "seeds", "samples", "stop_tokens")
        picked = {name: getattr(self, name)[rows] for name in names}
        return dataclasses.replace(self, **picked, policy=take_rows_of(self.policy, rows))

    def repeat(self, n: int, multiple: int) -> tuple[Batch, np.ndarray]:
        """``n`` samples of every request, and the row that each is forked from."""
        rows = np.repeat(np.arange(self.count), n)
        padded = np.concatenate([rows, np.full(-len(rows) % multiple, rows[-1])])
        samples = np.concatenate(
            [np.tile(np.arange(n), self.count), np.zeros(len(padded) - len(rows))]
        ).astype(np.int32)
        limits = np.where(np.arange(len(padded)) < len(rows), self.limits[padded], 0)
        batch = dataclasses.replace(
            self.take(padded), limits=limits.astype(np.int32), samples=samples, count=len(rows)
        )
        return batch, padded.astype(np.int32)


def make_batch(
    model: Model,
    prompts: Prompts,
    policy: Policy | Sequence[Policy] | None,
    max_new_tokens: int | Sequence[int],
    seed: int | Sequence[int],
    stop_tokens: int | Sequence[int] | Sequence[Sequence[int]] | None,
    *,
    max_length: int | None = None,
    headroom: int = 0,
    decoding: str = "next_token",
) -> Batch:
    """Check what users gave and lay it out.

    Args:
        model: that the prompts are for.
        prompts: text, or token ids; of any lengths.
        policy: one for all prompts, or one each; ``Temperature(1.0)`` if None.
        max_new_tokens: one for all, or one each.
        seed: one each, or an int: prompt ``i`` then has seed ``seed + i``; modulo 2**32.
        stop_tokens: an id or ids for all prompts, or a sequence of ids each; if None the model's
            own, or the tokenizer's end-of-sequence.
        max_length: of prompt and response together; None is no bound.
        headroom: positions of the canvas beyond the longest limit.
        decoding: how the caller decodes; see :func:`~..model.registry.decoding_of`.

    Raises:
        InputError: names the field that does not fit, or the function that fits the model.
    """
    kind = decoding_of(model.config)
    if kind != decoding:
        raise InputError(f"model={type(model.config).__name__} {_OTHERWISE[kind]}")
    rows = [model.check_tokens(row) for row in token_rows(model, prompts)]
    count = len(rows)
    new = _each("max_new_tokens", max_new_tokens, count)
    for value in new:
        if value < 1:
            raise InputError(f"max_new_tokens={value} must be at least 1")
    if max_length is not None:
        max_length = integer("max_length", max_length)
        for i, row in enumerate(rows):
            if len(row) >= max_length:
                raise InputError(
                    f"prompts[{i}] has {len(row)} tokens, and max_length={max_length} leaves none "
                    "to generate; shorten it or raise max_length"
                )
        new = [min(value, max_length - len(row)) for value, row in zip(new, rows, strict=True)]
    seeds = _each("seed", seed, count)
    if is_single(seed):
        seeds = [own + i for i, own in enumerate(seeds)]
    # Before the policies, which may have been made one for each row of these.
    stops = _stops(model, stop_tokens, count)
    policies = [policy or Temperature(1.0)] * count
    if not (policy is None or isinstance(policy, Policy)):
        policies = list(policy)
        if len(policies) != count:
            raise InputError(
                f"policy has {len(policies)} entries for {count} prompts; give one each, or one"
            )
    for own in policies:
        check_policy(model, own)

    # A mesh takes whole shares of the batch: copies of the last prompt, done from the start, fill
    # the last one up.
    extra = -count % model.batch_ways()
    index = np.concatenate([np.arange(count), np.full(extra, count - 1)]).astype(np.int32)
    lengths = np.array([len(row) for row in rows], np.int32)[index]
    width = bucket(int(lengths.max()))
    canvas = np.zeros((len(index), width), np.int32)
    for place, i in enumerate(index):
        canvas[place, : len(rows[i])] = rows[i]
    own = np.arange(len(index)) < count
    limits = np.where(own, lengths + np.array(new)[index], lengths).astype(np.int32)
    return Batch(
        prompts=canvas,
        lengths=lengths,
        limits=limits,
        seeds=np.array([s % 2**32 for s in seeds], np.uint32)[index],
        samples=np.zeros(len(index), np.int32),
        stop_tokens=stops[index],
        policy=take_rows_of(stack_rows(policies), index),
        capacity=bucket(max(int(limits.max()) + headroom, width)),
        count=count,
    )


def bucket(length: int) -> int:
    """The next of few lengths: multiples of 64, and from 1024 on of an eighth of their power."""
    size = max(64, 1 << max(length.bit_length() - 4, 0))
    return -(-length // size) * size


def take_rows_of(policy: Policy, rows: np.ndarray) -> Policy:
    """A stacked policy's rows."""
    return jax.tree.map(lambda x: x[rows], policy)


def integer(name: str, value: Any, least: int | None = None) -> int:
    """``value`` as an int.

    Raises:
        InputError: it is no integer of Python or NumPy, or below ``least``; ``name`` is named.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{name}={value!r} must be a whole number, an int") from None
    if least is not None and number < least:
        raise InputError(f"{name}={value} must be at least {least}")
    return number


def is_finite(value: Any) -> bool:
    """Whether this is a number, and neither infinite nor NaN."""
    return isinstance(value, int | float | np.number) and math.isfinite(value)


def several(prompts: Prompts) -> Prompts:
    """Prompts, of which a text may be the only one.

    Raises:
        InputError: it is no sequence.
    """
    if isinstance(prompts, str):
        return [prompts]
    if is_single(prompts):
        raise InputError(f"prompts={prompts!r} must be a text, or a sequence of texts or token ids")
    return prompts


def check_prompt(i: int, prompt: Any) -> None:
    """Raise InputError where prompt ``i`` is neither a text nor token ids."""
    if isinstance(prompt, str) or not is_single(prompt):
        return
    if isinstance(prompt, int | np.integer):
        raise InputError(
            f"prompts[{i}]={int(prompt)} is a token id and no prompt; a prompt is a list of them, "
            "so give [[...]] for one"
        )
    raise InputError(f"prompts[{i}]={prompt!r} must be a text, or a list of token ids")


def token_rows(model: Model, prompts: Prompts) -> list[Sequence[int]]:
    """Every prompt as token ids, with the begin token that the model was trained with.

    Raises:
        InputError: there is none, or an empty one has nothing to begin with.
    """
    prompts = several(prompts)
    if not len(prompts):
        raise InputError("prompts is empty; give at least one")
    tokenizer, rows = model.tokenizer, []
    for i, prompt in enumerate(prompts):
        check_prompt(i, prompt)
        if isinstance(prompt, str):
            if tokenizer is None:
                raise InputError("this model has no tokenizer; give prompts as token ids")
            prompt = tokenizer.encode(prompt)
            begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
            # A model that never saw a begin token still needs something to begin an empty text.
            if begin is not None and (model.add_bos or not prompt):
                prompt = [begin, *prompt]
        if not len(prompt):
            raise InputError(
                f"prompts[{i}] is empty and the model has no token to begin with; give it text"
            )
        rows.append(prompt)
    return rows


def check_policy(model: Model, policy: Policy) -> None:
    """Raise InputError where this model cannot be sampled by it: before anything is compiled."""
    policy.check_vocabulary(model.config.vocab_size)
    for stage in stages(policy):
        if "predicted" in stage.needs and "decoding_heads" not in model.params:
            raise InputError(
                f"policy has {type(stage).__name__}, which reads decoding heads, and this model "
                "has none; train them with objective=autodeco, or give Temperature and TopP"
            )
        if "chunks" in stage.needs and decoding_of(model.config) != "next_vector":
            raise InputError(
                f"policy has {type(stage).__name__}, which is for models that draw whole chunks "
                "(CALM); this one has logits, so give Temperature"
            )


def _each(name: str, value: int | Sequence[int], count: int) -> list[int]:
    if is_single(value):
        return [integer(name, value)] * count
    if len(value) != count:
        raise InputError(f"{name} has {len(value)} entries for {count} prompts; give one each")
    return [integer(f"{name}[{i}]", v) for i, v in enumerate(value)]


def _stops(model: Model, stop_tokens, count: int) -> np.ndarray:
    """``[count, S]``; -1 is no token, so that no row is ever empty."""
    if stop_tokens is None:
        stop_tokens = stop_ids(model)
    rows = listed(stop_tokens)
    if not rows or np.isscalar(rows[0]):
        rows = [rows] * count
    if len(rows) != count:
        raise InputError(
            f"stop_tokens has {len(rows)} rows for {count} prompts; give ids, or ids for each"
        )
    for row in rows:
        if len(row):
            model.check_tokens(np.asarray(list(row)))
    # A power of two, so that few widths are ever compiled.
    width = 1 << max(0, max(len(row) for row in rows) - 1).bit_length()
    stops = np.full((count, width), -1, np.int32)
    for i, row in enumerate(rows):
        stops[i, : len(row)] = list(row)
    return stops
