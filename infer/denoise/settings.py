"""What a caller of ``denoise`` asks for, checked against the model before anything is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...errors import InputError
from ...model.handle import Model
from ...model.registry import decoding_of
from ..defaults import stop_ids
from ..request import Prompts, check_prompt, several, token_rows
from ..rows import NO_TOKEN
from .caches import BlockCache, DualCache, NoCache, PrefixCache
from .elastic import ElasticCache
from .rules import Rule, stack_rules

KINDS = {k.name: k for k in (NoCache, PrefixCache, DualCache, ElasticCache, BlockCache)}


def mask_of(model: Model) -> int:
    """The id of a masked diffusion model's mask.

    Raises:
        InputError: the model decodes token by token, or has no mask.
    """
    kind = decoding_of(model.config)
    name = type(model.config).__name__
    if kind != "masked_diffusion":
        raise InputError(
            f"model={name} decodes {kind.replace('_', ' ')}s and fills no masks in; call "
            "jaxalope.generate, or load a masked diffusion model such as LLaDA"
        )
    mask = getattr(model.config, "mask_token_id", None)
    if mask is None or not 0 <= mask < model.config.vocab_size:
        raise InputError(
            f"model.mask_token_id={mask} is not in the vocabulary of {model.config.vocab_size}; "
            "name the id that stands for a hidden token"
        )
    return mask


def prompt_rows(model: Model, prompts: Prompts) -> list[np.ndarray]:
    """Every prompt as token ids; unlike for next-token decoding, a prompt may be empty."""
    prompts = several(prompts)
    if not len(prompts):
        raise InputError("prompts is empty; give at least one (it may be an empty text)")
    rows = []
    for i, prompt in enumerate(prompts):
        check_prompt(i, prompt)
        begins = model.add_bos and isinstance(prompt, str)
        row = token_rows(model, [prompt])[0] if len(prompt) or begins else []
        rows.append(model.check_tokens(row) if len(row) else np.zeros(0, int))
    return rows


def cache_of(name: str | NoCache, block_size: int | None) -> NoCache:
    """The kind of cache.

    Raises:
        InputError: unknown, or one that this kind of model has no use for.
    """
    if isinstance(name, NoCache):
        kind, name = name, name.name
    elif name in KINDS:
        kind = KINDS[name]()
    else:
        raise InputError(f"cache={name!r} is not one of {', '.join(KINDS)}")
    if name == "block" and block_size is None:
        raise InputError(
            "cache='block' is for models that are causal by block (model.block_size); this one "
            "sees the whole canvas, so use 'prefix', 'dual' or 'elastic'"
        )
    if name not in ("none", "block") and block_size is not None:
        raise InputError(
            f"cache={name!r} is for models that see the whole canvas; this one is causal by block "
            f"(model.block_size={block_size}), so use cache='block', which is exact"
        )
    return kind


def check_guidance(
    cfg_scale: float | Sequence[float], rows: list[np.ndarray], mask: int
) -> np.ndarray:
    """The scale of each row's guidance; what it blanks is the prompt, so there must be one.

    Raises:
        InputError: a negative scale, too many or few, or a prompt without a token to blank.
    """
    scale = np.asarray(cfg_scale, np.float64)
    if scale.ndim and scale.shape != (len(rows),):
        raise InputError(
            f"cfg_scale has {scale.size} entries for {len(rows)} prompts; give one each, or one"
        )
    scale = np.broadcast_to(scale, (len(rows),))
    if not np.all(np.isfinite(scale)) or np.any(scale < 0):
        raise InputError(f"cfg_scale={cfg_scale} must be 0 (no guidance) or a positive number")
    for i, row in enumerate(rows):
        if scale[i] and not np.any(row != mask):
            raise InputError(
                f"cfg_scale={scale[i]} needs a prompt to be guided by, and prompts[{i}] has none; "
                "give one, or cfg_scale=0"
            )
    return scale


def check_sliding(
    kind: NoCache,
    rule: Rule | Sequence[Rule],
    block_length: int | None,
    steps: int | None,
    cfg_scale: float | Sequence[float],
) -> None:
    """Refuse what has no meaning where a window slides over the masks instead of blocks.

    Raises:
        InputError: names the field.
    """
    if not kind.slides:
        return
    name = f"cache={kind.name!r}"
    for field, value in (("block_length", block_length), ("steps", steps)):
        if value is not None:
            raise InputError(
                f"{field}={value} is of decoding by blocks, and {name} slides a window of "
                f"{kind.window} masks; leave it out, or give ElasticCache(window=...)"
            )
    for own in [rule] if isinstance(rule, Rule) else rule:
        if not own.has_steps:
            continue
        raise InputError(
            f"rule={type(own).__name__} goes by the steps of a block, which {name} has not; use "
            "Threshold(0.9), TopCount(1), Factor(1.0) or EntropyBounded(0.1)"
        )
    if np.any(np.asarray(cfg_scale) != 0):
        raise InputError(
            f"cfg_scale is not for {name}, which watches one canvas; use cache='dual' with it"
        )


def rule_of(rule: Rule | Sequence[Rule], steps: int | None, count: int) -> Rule:
    """The rule with a row for each of ``count`` prompts.

    Raises:
        InputError: too many or too few, different kinds, or steps for a rule that has none.
    """
    rules = [rule] * count if isinstance(rule, Rule) else list(rule)
    if len(rules) != count or not all(isinstance(r, Rule) for r in rules):
        raise InputError(f"rule={rule!r} must be one rule, or one for each of {count} prompts")
    if steps is not None and not rules[0].has_steps:
        raise InputError(
            f"steps={steps} is for rules with a schedule, and {type(rules[0]).__name__} has none; "
            "leave it out"
        )
    return stack_rules(rules)


def block_and_steps(
    gen_length: int,
    block_length: int | None,
    steps: int | None,
    block_size: int | None,
    masks: Sequence[int],
) -> tuple[int, int]:
    """Masks of a block, and steps of a block.

    Args:
        gen_length: of the response.
        block_length: as given.
        steps: of the response, as given.
        block_size: of the model, None where it has no blocks.
        masks: that each row has, those of its prompt included.

    Raises:
        InputError: names the number that does not fit or divide.
    """
    most = max(masks)
    if gen_length < 0 or (gen_length == 0 and min(masks) == 0):
        raise InputError(
            f"gen_length={gen_length} must be at least 1, or 0 where every prompt holds masks to "
            "fill in"
        )
    if block_size is not None:
        if block_length not in (None, block_size):
            raise InputError(
                f"block_length={block_length} differs from the model's own blocks "
                f"(model.block_size={block_size}); leave it out"
            )
        per_block = steps
        if per_block is not None and gen_length:
            blocks = -(-gen_length // block_size)
            per_block = _divided(steps, blocks, gen_length, block_size)
        return block_size, block_size if per_block is None else per_block
    if block_length is None:
        block_length = gen_length or most
    if block_length < 1 or (gen_length and gen_length % block_length):
        raise InputError(
            f"block_length={block_length} does not divide gen_length={gen_length}; give a divisor, "
            "or leave it out for one block"
        )
    if steps is None:
        return block_length, block_length
    blocks = gen_length // block_length or -(-most // block_length)
    return block_length, _divided(steps, blocks, gen_length, block_length)


def _divided(steps: int, blocks: int, gen_length: int, block_length: int) -> int:
    if steps < 1 or steps % blocks:
        raise InputError(
            f"steps={steps} does not divide among {blocks} blocks (gen_length={gen_length}, "
            f"block_length={block_length}); give a multiple of {blocks}"
        )
    return steps // blocks


def eos_of(model: Model) -> int | None:
    """The token that ends a text."""
    eos = getattr(model.config, "eos_token_id", None)
    return eos if eos is not None else getattr(model.tokenizer, "eos_id", None)


def default_stops(model: Model) -> tuple[int, ...]:
    """The tokens that end a text where a caller names none."""
    eos = eos_of(model)
    return stop_ids(model) or (() if eos is None else (eos,))


def id_rows(ids: Any, batch: int) -> np.ndarray:
    """``[batch, S]`` of ids for all rows (``[S]``) or each; -1 becomes an id that no token has."""
    ids = np.asarray(ids, np.int32)
    ids = np.broadcast_to(ids, (batch, ids.shape[-1]))
    return np.where(ids < 0, NO_TOKEN, ids)
