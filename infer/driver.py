"""A batch on its way: what the host knows of the rows that the device decodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import InputError
from ..model.handle import Model
from .drafts import Drafter
from .loop import FINISH_REASONS, STOPPED, DecodeState
from .next_token import NextToken
from .programs import program_of, read_prompts
from .records import LogProb, ProposalLogProb, Record, Top
from .request import Batch, integer
from .text import TextStream

_MOST_TOP_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated; with ``n`` samples a prompt, those of a prompt stand together.

    Attributes:
        tokens: the new token ids, a stop token included where one was drawn.
        text: the new tokens decoded, without the stop token and from the stop string on.
        logprobs: of each new token, float32, in nats; None of models without a likelihood.
        finish_reasons: ``"stop"`` (drew a stop token, or completed a stop string), ``"length"`` or
            ``"cancelled"``.
        starved: whether a row's policy ever forbade every token.
        top: ``(ids [N, n], logprobs [N, n])`` of each position's likeliest tokens, if asked for.
        drafted: tokens drafted for each row, in speculative decoding; drafts past its limit do not
            count.
        accepted: how many of them became the row's tokens.
        draws: chunks that the model drew for each row, where whole chunks are drawn.
        exhausted: whether a row ever used up its ``max_draws``, where whole chunks are drawn.
    """

    tokens: list[np.ndarray]
    text: list[str]
    logprobs: list[np.ndarray] | None
    finish_reasons: list[str]
    starved: list[bool]
    top: list[tuple[np.ndarray, np.ndarray]] | None = None
    drafted: list[int] | None = None
    accepted: list[int] | None = None
    draws: list[int] | None = None
    exhausted: list[bool] | None = None


class Run:
    """A batch being decoded, with what the host knows of it.

    Args:
        model: to decode with.
        decoder: its compiled functions.
        batch: the requests.
        n: samples of each.
        stop: strings that end a row.
        drafter: what a speculative decoder takes beside the model's parameters.
    """

    def __init__(
        self,
        model: Model,
        decoder: NextToken,
        batch: Batch,
        n: int,
        stop: Sequence[str],
        drafter: Drafter | None = None,
    ):
        self.model, self.decoder = model, decoder
        self.params, needs = model.params, batch.policy.needs
        if drafter is not None:
            self.params, needs = (model.params, drafter), needs | drafter.needs
        decode = (lambda _: "") if model.tokenizer is None else model.tokenizer.decode
        if stop and model.tokenizer is None:
            raise InputError(f"stop={list(stop)} needs a tokenizer; this model has none")
        if any(not s for s in stop):
            raise InputError(f"stop={list(stop)} holds an empty string, which would end every row")
        many, rows = (None, None) if n == 1 else batch.repeat(n, model.batch_ways())
        self.state = read_prompts(
            model, decoder, batch, many, rows, params=self.params, needs=needs
        )
        batch = self.batch = many or batch
        self.has_stop_strings = bool(stop)
        self.streams = [TextStream(decode, stop) for _ in range(batch.count)]
        self._stops = [set(row.tolist()) for row in batch.stop_tokens]
        self._seen = batch.lengths.copy()
        self._finished = np.zeros(batch.count, bool)
        self._new = [""] * batch.count

    @property
    def finished(self) -> bool:
        """Whether every row has ended."""
        return bool(self._finished.all())

    def advance(self, max_steps: int | None) -> None:
        """Decode on, up to ``max_steps`` (None: to the end), and read what was committed."""
        steps = self.batch.capacity if max_steps is None else max_steps
        with self.model.context():
            self.state = self.decode(self.state, steps)
        self._read()

    def decode(self, state: DecodeState, max_steps: int) -> DecodeState:
        """The device's part of :meth:`advance`."""
        batch = self.batch
        return self.decoder.decode(
            self.params, batch.policy, state, batch.stop_tokens, jnp.int32(max_steps)
        )

    def _read(self) -> None:
        tokens, lengths, reasons = jax.device_get(
            (self.state.tokens, self.state.length, self.state.reason)
        )
        ended = np.zeros(len(lengths), bool)
        for i, stream in enumerate(self.streams):
            if self._finished[i]:
                continue
            new = tokens[i, self._seen[i] : lengths[i]]
            self._seen[i] = lengths[i]
            spoken = [int(t) for t in new if int(t) not in self._stops[i]]
            self._new[i] += stream.push(spoken)
            done = FINISH_REASONS[reasons[i]] != "running"
            if done and not stream.stopped:
                self._new[i] += stream.finish()
            self._finished[i] = done or stream.stopped
            ended[i] = stream.stopped and not done
        if ended.any():
            reason = jnp.where(ended, STOPPED, self.state.reason).astype(jnp.int32)
            self.state = dataclasses.replace(self.state, reason=reason)

    def new_text(self) -> list[str]:
        """What every row's text gained since the last call."""
        new, self._new = self._new, [""] * self.batch.count
        return new

    def finish_reason(self, row: int) -> str | None:
        """Why a row ended; None while it runs."""
        if not self._finished[row]:
            return None
        if self.streams[row].stopped:
            return "stop"
        return FINISH_REASONS[int(self.state.reason[row])]

    def result(self) -> Generation:
        """Everything generated; rows that still run count as cancelled."""
        state = jax.device_get(dataclasses.replace(self.state, cache=(), key=()))
        rows = range(self.batch.count)
        spans = []
        for i, stream in enumerate(self.streams):
            if not self._finished[i]:
                stream.finish()
            start = int(self.batch.lengths[i])
            # A stop string ends the row with the token that completed it.
            end = start + stream.num_tokens if stream.stopped else int(state.length[i])
            spans.append(slice(start, end))
        reasons = [FINISH_REASONS[state.reason[i]] for i in rows]
        records = state.records
        top = logprobs = exhausted = None
        for kind in {"logprob", "proposal_logprob"} & set(records):
            logprobs = [records[kind][i, s] for i, s in _at(spans)]
        if "top_ids" in records:
            top = [(records["top_ids"][i, s], records["top_logprobs"][i, s]) for i, s in _at(spans)]
        if "exhausted" in records:
            exhausted = [bool(records["exhausted"][i, s].any()) for i, s in _at(spans)]
        drafted, accepted, draws = (
            [int(records[name][i, s].sum()) for i, s in _at(spans)] if name in records else None
            for name in ("drafted", "accepted", "draws")
        )
        return Generation(
            tokens=[state.tokens[i, s] for i, s in _at(spans)],
            text=[stream.text for stream in self.streams],
            logprobs=logprobs,
            finish_reasons=[
                "stop"
                if stream.stopped
                else ("cancelled" if reason == FINISH_REASONS[0] else reason)
                for stream, reason in zip(self.streams, reasons, strict=True)
            ],
            starved=[bool(state.starved[i]) for i in rows],
            top=top,
            drafted=drafted,
            accepted=accepted,
            draws=draws,
            exhausted=exhausted,
        )


def _at(spans: list[slice]):
    return list(enumerate(spans))


def records_for(model: Model, logprobs: str, top_logprobs: int) -> tuple[Record, ...]:
    """What :class:`Generation` reports, as the loop's records."""
    if logprobs not in ("raw", "processed"):
        raise InputError(f"logprobs={logprobs!r} is not 'raw' or 'processed'")
    most = min(_MOST_TOP_LOGPROBS, model.config.vocab_size)
    if not 0 <= integer("top_logprobs", top_logprobs) <= most:
        raise InputError(f"top_logprobs={top_logprobs} must lie in 0..{most}")
    processed = logprobs == "processed"
    records: tuple[Record, ...] = (ProposalLogProb() if processed else LogProb(),)
    if top_logprobs:
        records += tuple(Top(top_logprobs, processed, part) for part in ("ids", "logprobs"))
    return records


def decoder_of(model: Model, records: tuple[Record, ...] = (LogProb(),)) -> NextToken:
    """The compiled decoder of this model that writes these records."""
    return program_of(model, NextToken, records)
