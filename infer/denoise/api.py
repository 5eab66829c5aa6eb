"""``denoise``: prompts in, text out, by filling masks in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ...model.handle import Model
from ..loop import FINISH_REASONS
from ..policy import Greedy, Policy
from ..programs import program_of
from ..request import Batch, Prompts, bucket, integer, make_batch
from ..rows import power_of_two
from .caches import NoCache
from .canvas import Canvas
from .draw import Numbers, check_policy
from .rules import Rule
from .settings import (
    block_and_steps,
    cache_of,
    check_guidance,
    check_sliding,
    default_stops,
    eos_of,
    id_rows,
    mask_of,
    prompt_rows,
    rule_of,
)
from .step import Denoiser, Layout


@dataclasses.dataclass(frozen=True)
class History:
    """How one canvas was filled in.

    Attributes:
        tokens: the canvas as it ended, prompt included ``[L]``.
        step: the call of the model in which each position was committed, from 1 on; 0 is given, or
            never committed.
        confidence: the probability that the model gave the token then; 0 where given.
        mask: id of the mask.
    """

    tokens: np.ndarray
    step: np.ndarray
    confidence: np.ndarray
    mask: int

    def canvas(self, call: int) -> np.ndarray:
        """The canvas after that many calls of the model; 0 is before the first."""
        return np.where(self.step <= call, self.tokens, self.mask)


@dataclasses.dataclass(frozen=True)
class Denoised:
    """What was filled in; with ``n`` samples a prompt, those of a prompt stand together.

    Attributes:
        tokens: the response of each row, up to its first stop token (included).
        text: the response decoded, without the stop token.
        finish_reasons: ``"stop"`` (a stop token) or ``"length"``.
        nfe: calls of the model that each row took part in. With guidance a call reads two canvases.
        history: of each row's whole canvas, prompt and its filled masks included.
        starved: whether a row's policy ever forbade every token.
        update_frequency: of ``cache="elastic"``: the part of all layers' passes that computed a
            row's whole canvas, as published; the first call counts one more than there are layers.
    """

    tokens: list[np.ndarray]
    text: list[str]
    finish_reasons: list[str]
    nfe: list[int]
    history: list[History]
    starved: list[bool]
    update_frequency: list[float] | None = None


def denoise(
    model: Model,
    prompts: Prompts,
    *,
    gen_length: int = 128,
    block_length: int | None = None,
    steps: int | None = None,
    rule: Rule | Sequence[Rule] | None = None,
    policy: Policy | Sequence[Policy] | None = None,
    cfg_scale: float | Sequence[float] = 0.0,
    cache: str | NoCache = "none",
    seed: int | Sequence[int] = 0,
    n: int = 1,
    stop_tokens: Sequence[int] | Sequence[Sequence[int]] | None = None,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
) -> Denoised:
    """Fill in what follows each prompt, and the masks that it holds.

    Blocks are filled in from left to right (semi-autoregressive); one block is pure diffusion.
    A row depends on its own prompt, seed and sample number only, not on its neighbours. It ends
    early where nothing before a stop token is masked: what would follow is cut off anyway.

    Args:
        model: a masked diffusion model.
        prompts: text, or token ids; of any lengths, also empty. Masks that they hold are filled in
            too, before the response.
        gen_length: tokens of the response; 0 fills in the prompts' masks alone.
        block_length: masks that a block has, a divisor of ``gen_length``; one block if None. A
            model of block diffusion has its own.
        steps: calls of the model for ``gen_length`` tokens, a multiple of the number of blocks; one
            a token if None. For rules with a schedule.
        rule: which positions a step commits, one for all or one (of the same kind) a prompt;
            LLaDA's low-confidence remasking, ``TopQuota()``, if None; with ``"elastic"`` a rule
            without steps, ``Threshold(0.9)`` if None.
        policy: that tokens are drawn by, one for all or one a prompt; ``Greedy()`` if None.
        cfg_scale: of classifier-free guidance, for all or each; 0 is none.
        cache: ``"none"``; ``"prefix"`` or ``"dual"`` (Fast-dLLM, approximations); ``"elastic"`` or
            :class:`ElasticCache` with its settings (an approximation, whose window slides over the
            masks instead of blocks); ``"block"`` for block diffusion (exact).
        seed: one a prompt, or an int: prompt ``i`` then has seed ``seed + i``.
        n: samples a prompt.
        stop_tokens: that end a response; the model's own if None, none if empty.
        logits_eos_inf: the end-of-sequence token is never drawn.
        confidence_eos_eot_inf: positions whose token is a stop token are committed last.

    Raises:
        InputError: a model that fills no masks in, numbers that do not divide, a policy's stage
            that has no meaning here, guidance without a prompt; names the field.
    """
    mask = mask_of(model)
    integer("n", n, 1)
    config = model.config
    block_size = getattr(config, "block_size", None)
    shift = getattr(config, "logit_shift", False)
    kind = cache_of(cache, block_size)
    rows = prompt_rows(model, prompts)
    masks = [int((row == mask).sum()) + max(gen_length, 0) for row in rows]
    rule = kind.default_rule() if rule is None else rule
    check_sliding(kind, rule, block_length, steps, cfg_scale)
    block_length, block_steps = block_and_steps(gen_length, block_length, steps, block_size, masks)
    rule = rule_of(rule, steps, len(rows))
    guidance = check_guidance(cfg_scale, rows, mask)
    stops = default_stops(model) if stop_tokens is None else stop_tokens
    batch = make_batch(
        model,
        [row if len(row) else [0] for row in rows],
        Greedy() if policy is None else policy,
        max(gen_length, 1),
        seed,
        stops,
        decoding="masked_diffusion",
    )
    check_policy(batch.policy)
    # Only blocks of the model itself stand at multiples of their length.
    multiple = 1 if block_size is None else block_length
    batch = _measured(batch, rows, gen_length, multiple, n, model.batch_ways())
    origin = np.minimum(np.arange(len(batch.lengths)) // n, len(rows) - 1)
    if block_size is None:
        # A prompt's masks come on top of the response's blocks; few numbers of them are compiled.
        blocks = -(-gen_length // block_length)
        extra = -(-max(masks) // block_length) - blocks
        blocks += power_of_two(extra) if extra > 0 else 0
    else:
        blocks = batch.capacity // block_length
    layout = Layout(
        mask=mask,
        block_length=block_length,
        blocks=blocks,
        width=batch.capacity,
        aligned=block_size is not None,
        shift=shift,
        # In blocks of the model, all positions of a block are read, not its masks alone.
        scattered=shift and block_size is None and any(np.any(row == mask) for row in rows),
        guided=bool(np.any(guidance != 0)),
    )
    count, (compiled, number) = len(batch.lengths), kind.traced()
    forbidden = [eos_of(model)] if logits_eos_inf and eos_of(model) is not None else [-1]
    last = batch.stop_tokens if confidence_eos_eot_inf else [-1]
    numbers = Numbers(
        policy=batch.policy,
        rule=jax.tree.map(lambda x: x[origin], rule),
        steps=np.full(count, block_steps, np.int32),
        guidance=guidance[origin].astype(np.float32),
        stop_tokens=id_rows(batch.stop_tokens, count),
        forbidden=id_rows(forbidden, count),
        last=id_rows(last, count),
        cache=np.full(count, number, np.float32),
    )
    decoder = program_of(model, Denoiser, compiled, layout)
    with model.context():
        state = decoder.begin(
            model.params, batch.prompts, batch.lengths, batch.limits, batch.seeds, batch.samples
        )
        state = decoder.decode(
            model.params, numbers, state, jnp.int32(layout.blocks * (2 * block_length + 2))
        )
    return _result(model, batch, state, mask, kind)


def _measured(
    batch: Batch, rows: list[np.ndarray], gen_length: int, block_length: int, n: int, ways: int
) -> Batch:
    """The batch with the prompts' true lengths, ``n`` samples of each, on a canvas that fits."""
    own = np.zeros(len(batch.lengths), np.int32)
    own[: len(rows)] = [len(row) for row in rows]
    limits = np.where(np.arange(len(own)) < len(rows), own + gen_length, 0).astype(np.int32)
    longest = -(-int(limits.max()) // block_length) * block_length
    width = max(bucket(longest), batch.prompts.shape[1])
    batch = dataclasses.replace(
        batch, lengths=own, limits=limits, capacity=-(-width // block_length) * block_length
    )
    return batch if n == 1 else batch.repeat(n, ways)[0]


def _result(model: Model, batch: Batch, state: Canvas, mask: int, kind: NoCache) -> Denoised:
    frequency = kind.update_frequency(state, len(model.config.kinds))
    state = jax.device_get(dataclasses.replace(state, cache=(), key=()))
    tokens, text, reasons, history = [], [], [], []
    for i in range(batch.count):
        length, stops = int(batch.limits[i]), batch.stop_tokens[i]
        canvas = state.tokens[i, :length]
        response = canvas[batch.lengths[i] :]
        ends = np.flatnonzero(np.isin(response, stops))
        response = response[: ends[0] + 1] if len(ends) else response
        spoken = response[~np.isin(response, stops)].tolist()
        tokens.append(response)
        text.append("" if model.tokenizer is None else model.tokenizer.decode(spoken))
        reasons.append(FINISH_REASONS[int(state.reason[i])])
        step, confidence = (state.records[k][i, :length] for k in ("step", "confidence"))
        history.append(History(canvas, step, confidence, mask))
    return Denoised(
        tokens=tokens,
        text=text,
        finish_reasons=reasons,
        nfe=state.calls[: batch.count].tolist(),
        history=history,
        starved=state.starved[: batch.count].tolist(),
        update_frequency=None if frequency is None else frequency[: batch.count].tolist(),
    )
