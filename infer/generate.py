"""``generate`` and ``stream``: prompts in, text out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from ..errors import InputError
from ..model.handle import Model
from ..model.registry import decoding_of
from .defaults import settle
from .drafts import Draft
from .driver import Generation, Run, decoder_of, records_for
from .policy import Policy
from .programs import program_of
from .request import Prompts, integer, make_batch
from .speculative import Accepted, Drafted, Speculative
from .structured import Grammars, Guided, GuidedRun, compiled_grammars
from .vectors.api import start as start_vectors

# Steps between two looks of the host at what was drawn, where it looks at all.
_STRIDE = 16


@dataclasses.dataclass(frozen=True)
class Piece:
    """Something new of one row of a stream.

    Attributes:
        row: which prompt's (or sample's).
        text: what is new: complete code points, never part of a stop string.
        finish_reason: given with the row's last piece.
    """

    row: int
    text: str
    finish_reason: str | None = None


def generate(
    model: Model,
    prompts: Prompts,
    policy: Policy | Sequence[Policy] | None = None,
    max_new_tokens: int | Sequence[int] | None = None,
    seed: int | Sequence[int] = 0,
    *,
    n: int = 1,
    max_length: int | None = None,
    stop_tokens: int | Sequence[int] | Sequence[Sequence[int]] | None = None,
    stop: str | Sequence[str] | None = None,
    top_logprobs: int = 0,
    logprobs: str = "raw",
    grammar: Grammars | None = None,
    draft: Draft | None = None,
    remainder: str | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Generation:
    """Continue each prompt, by the next token or, with a model that draws vectors, chunk.

    What is None is as the model's own settings say (``model.defaults``: what its publisher wrote
    into ``generation_config.json``; see :func:`~.defaults.default_policy`). Where they say nothing,
    tokens are drawn by ``Temperature(1.0)``, 128 at most, up to the tokenizer's end-of-sequence.

    Args:
        model: as :func:`jaxalope.load` returns it.
        prompts: text, or token ids; of any lengths.
        policy: that tokens are drawn by, one for all or one a prompt. Whole chunks are drawn by
            :class:`ExactTemperature` (which ``Temperature`` stands for) or
            :class:`BatchTemperature`.
        max_new_tokens: that a row may get; one for all or one a prompt.
        seed: one a prompt, or an int: prompt ``i`` then has seed ``seed + i``. A row's tokens
            depend on its own seed and sample number only, not on its neighbours.
        n: samples a prompt; it is read once and its cache forked.
        max_length: of prompt and response together, which bounds the cache.
        stop_tokens: an id or ids that end a row, for all prompts, or a sequence of them each.
        stop: strings that end a row.
        top_logprobs: likeliest tokens to report of each position, at most 20.
        logprobs: ``"raw"`` under the model itself, ``"processed"`` under the policy's proposal.
        grammar: that texts must follow, such as ``grammar.Json()``, ``grammar.Regex(...)``: one for
            all prompts, or one each (None for none).
        draft: decode speculatively, with drafts of a smaller model (:class:`DraftModel`) or of the
            text itself (:class:`PromptLookup`): the same law in fewer calls of the model.
        remainder: of models that draw whole chunks (CALM): what becomes of prompts that are no
            whole chunks. ``"error"`` (if None); ``"left"`` and ``"right"`` put pad tokens before or
            after the prompt; ``"reject"`` is exact: draws until one begins with the rest.
        cancel: asked now and then; once it says True the rows end as they are.

    Raises:
        InputError: no prompt, an empty prompt of a model without a begin- or end-of-sequence token,
            an id outside the vocabulary, or a setting out of range; names it.
    """
    run = _start(
        model,
        prompts,
        policy,
        max_new_tokens,
        seed,
        n,
        max_length,
        stop_tokens,
        stop,
        top_logprobs,
        logprobs,
        grammar,
        draft,
        remainder,
    )
    watched = run.has_stop_strings or cancel is not None
    while not run.finished:
        if cancel is not None and cancel():
            break
        run.advance(_STRIDE if watched else None)
    return run.result()


def stream(
    model: Model,
    prompts: Prompts,
    policy: Policy | Sequence[Policy] | None = None,
    max_new_tokens: int | Sequence[int] | None = None,
    seed: int | Sequence[int] = 0,
    *,
    n: int = 1,
    max_length: int | None = None,
    stop_tokens: int | Sequence[int] | Sequence[Sequence[int]] | None = None,
    stop: str | Sequence[str] | None = None,
    grammar: Grammars | None = None,
    draft: Draft | None = None,
    remainder: str | None = None,
    stride: int = 4,
) -> Iterator[Piece]:
    """Continue each prompt, yielding text while it grows; arguments as for :func:`generate`.

    Closing the iterator cancels what is left. ``stride`` is the number of steps between two looks
    at the device. Joined, a row's pieces are the text that ``generate`` returns.
    """
    integer("stride", stride, 1)
    run = _start(
        model,
        prompts,
        policy,
        max_new_tokens,
        seed,
        n,
        max_length,
        stop_tokens,
        stop,
        grammar=grammar,
        draft=draft,
        remainder=remainder,
    )
    return _pieces(run, stride)


def _pieces(run: Run, stride: int) -> Iterator[Piece]:
    told: set[int] = set()
    while True:
        if not run.finished:
            run.advance(stride)
        for row, new in enumerate(run.new_text()):
            reason = run.finish_reason(row)
            if new or (reason is not None and row not in told):
                yield Piece(row, new, reason)
            if reason is not None:
                told.add(row)
        if run.finished:
            return


def _start(
    model,
    prompts,
    policy,
    max_new_tokens,
    seed,
    n,
    max_length,
    stop_tokens,
    stop,
    top_logprobs=0,
    logprobs="raw",
    grammar=None,
    draft=None,
    remainder=None,
) -> Run:
    integer("n", n, 1)
    own = settle(model, policy, max_new_tokens, max_length, stop_tokens, stop)
    if decoding_of(model.config) == "next_vector":
        return start_vectors(
            model,
            prompts,
            own,
            seed,
            n,
            stop_tokens,
            policy=policy,
            remainder=remainder,
            top_logprobs=top_logprobs,
            logprobs=logprobs,
            grammar=grammar,
            draft=draft,
        )
    if remainder is not None:
        raise InputError(
            f"remainder={remainder!r} is for models that draw whole chunks; this one reads prompts "
            "of any length, leave it out"
        )
    request = (model, prompts, own.policy, own.max_new_tokens, seed, stop_tokens)
    records = records_for(model, logprobs, top_logprobs)
    if draft is not None:
        if grammar is not None:
            raise InputError(
                "draft and grammar exclude each other: the host's masks come one by one"
            )
        if not hasattr(draft, "start"):
            raise InputError(f"draft={draft!r} is no draft; give DraftModel(...) or PromptLookup()")
        drafter = draft.start(model)
        batch = make_batch(*request, max_length=own.max_length, headroom=draft.num_tokens)
        decoder = program_of(model, Speculative, (*records, Drafted(), Accepted()))
        return Run(model, decoder, batch, n, own.stop, drafter)
    batch = make_batch(*request, max_length=own.max_length)
    if grammar is None:
        return Run(model, decoder_of(model, records), batch, n, own.stop)
    grammars = compiled_grammars(model, grammar, batch.count)
    decoder = program_of(model, Guided, records)
    return GuidedRun(model, decoder, batch, n=n, stop=own.stop, grammars=grammars)
