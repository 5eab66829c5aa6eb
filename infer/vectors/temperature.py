"""Temperature without a likelihood: policies for models that can only be drawn from.

The target is ``P(x) ** (1 / T)``, normalised, where ``x`` is a whole chunk and the model draws from
``P`` but cannot say what ``P(x)`` is. One policy draws from exactly that law, with a number of
draws that chance decides; the other takes a fixed number of draws and is biased. Source: arXiv
2510.27688, section 5.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...errors import InputError
from ..policy import COLDEST, Policy, Temperature, stages
from ..request import integer
from .draws import BatchRows, ChunkPolicy, ExactRows

# Draws of a chunk after which a row takes what it has.
MAX_DRAWS = 10_000
# So near to a whole number, 1 / T is one: 1 / (1 / 3) need not be 3.
_WHOLE = 1e-9


@dataclasses.dataclass(frozen=True)
class ExactTemperature(ChunkPolicy):
    """Draws from ``P(x) ** (1 / value)`` itself, by agreement of draws and a Bernoulli factory.

    With ``n, a`` the whole and the fractional part of ``1 / value``: ``n`` draws must be equal, and
    a coin that shows heads with probability ``P(x) ** a`` must show heads; else it begins again.
    The expected number of draws is ``(n + [a > 0] sum(P ** (1 / value - 1))) / sum(P ** (1 /
    value))``, large where no chunk is likely; temperature 1 is one draw.

    Attributes:
        value: the temperature T, 0 < T <= 1.
        max_draws: of a chunk. A row that exhausts it takes the chunk that it tried last, which is
            flagged (``Generation.exhausted``) and warned of.
        stop_early: begin again at the first of the ``n`` draws that differs, instead of after all
            of them: the same law in fewer draws, from ``n = 3`` on.
        draws_per_call: of the model's head, for each row; what is drawn does not depend on it.

    Raises:
        InputError: a number out of range; names it.
    """

    value: float = 1.0
    max_draws: int = MAX_DRAWS
    stop_early: bool = False
    draws_per_call: int = 16

    def __post_init__(self):
        whole, part = exponent(self.value)
        _check_counts(self, whole + (part > 0))

    @classmethod
    def stack(cls, stages: Sequence[ExactTemperature]) -> ExactRows:
        """The numbers of every row."""
        exponents = [exponent(s.value) for s in stages]
        return ExactRows(
            whole=np.array([whole for whole, _ in exponents], np.int32),
            part=np.array([part for _, part in exponents], np.float32),
            max_draws=np.array([s.max_draws for s in stages], np.int32),
            stop_early=_common(stages, "stop_early"),
            draws_per_call=max(s.draws_per_call for s in stages),
        )


@dataclasses.dataclass(frozen=True)
class BatchTemperature(ChunkPolicy):
    """Draws ``num_draws`` chunks and chooses among them: an approximation, of a fixed cost.

    With ``n = 1 / value``, a chunk that occurs ``c`` times is chosen with probability proportional
    to the number of ways to pick ``n`` of these, ``C(c, n)``; where none occurs ``n`` times, one
    of the most frequent. It tends to ``P(x) ** n`` as ``num_draws`` grows.

    Attributes:
        value: the temperature T, of which ``1 / T`` is a whole number; 1 is one draw.
        num_draws: 100 and 200 roughly match a token model at temperatures 0.6 and 0.5 (published).
        max_draws: of a chunk, where the rest of a prompt must be met (``remainder="reject"``).
        draws_per_call: of the model's head, for each row; what is drawn does not depend on it.

    Raises:
        InputError: a number out of range, or ``1 / value`` is not whole; names it.
    """

    value: float = 0.5
    num_draws: int = 200
    max_draws: int = MAX_DRAWS
    draws_per_call: int = 64

    def __post_init__(self):
        whole, part = exponent(self.value)
        if part:
            raise InputError(
                f"temperature={self.value} has 1 / {self.value} = {1 / self.value:.6g}, "
                f"which is no whole number; give 1/{whole} or 1/{whole + 1}, or "
                f"ExactTemperature({self.value})"
            )
        integer("num_draws", self.num_draws, 1)
        _check_counts(self, 1 if whole == 1 else self.num_draws)

    @classmethod
    def stack(cls, stages: Sequence[BatchTemperature]) -> BatchRows:
        """The numbers of every row."""
        whole = [exponent(s.value)[0] for s in stages]
        needed = [1 if n == 1 else s.num_draws for n, s in zip(whole, stages, strict=True)]
        return BatchRows(
            whole=np.array(whole, np.int32),
            needed=np.array(needed, np.int32),
            max_draws=np.array([s.max_draws for s in stages], np.int32),
            size=max(needed),
            draws_per_call=max(s.draws_per_call for s in stages),
        )


def exponent(value: float) -> tuple[int, float]:
    """The whole and the fractional part of ``1 / value``; within 1e-9 of a whole number it is one.

    Raises:
        InputError: not in (0, 1]; says why.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise InputError(f"temperature={value!r} must be a number in (0, 1]")
    if value > 1:
        raise InputError(
            f"temperature={value} is above 1: a law that is only drawn from can be sharpened, not "
            "flattened; give a number in (0, 1]"
        )
    if not value > COLDEST:
        raise InputError(
            f"temperature={value} must lie in (0, 1]: draws do not tell which chunk is likeliest; "
            "BatchTemperature(1/200) takes the most frequent of 200"
        )
    inverse = 1 / float(value)
    whole = round(inverse) if abs(inverse - round(inverse)) <= _WHOLE else math.floor(inverse)
    part = inverse - whole
    return whole, 0.0 if abs(part) <= _WHOLE else part


def chunk_policies(policy: Any, count: int) -> list[ChunkPolicy]:
    """One chunk policy a prompt, all of one kind.

    ``Temperature(T)`` is ``ExactTemperature(T)``. Temperature 1 goes with either kind.

    Args:
        policy: one for all, or one a prompt.
        count: prompts.

    Raises:
        InputError: a stage that works on logits, both kinds in one batch, or too many or few.
    """
    policies = [policy] * count if isinstance(policy, Policy) else list(policy)
    if len(policies) != count:
        raise InputError(
            f"policy has {len(policies)} entries for {count} prompts; give one each, or one"
        )
    rows = [_chunk_policy(own) for own in policies]
    kinds = {type(row) for row in rows if row.value != 1}
    if len(kinds) > 1:
        raise InputError(
            "policy has ExactTemperature for some prompts and BatchTemperature for others; give "
            "one kind, or call generate twice"
        )
    kind = kinds.pop() if kinds else ExactTemperature
    return [row if isinstance(row, kind) else _at_one(kind, row.max_draws) for row in rows]


def _chunk_policy(policy: Policy) -> ChunkPolicy:
    own = stages(policy)
    for stage in own:
        if not isinstance(stage, ChunkPolicy | Temperature):
            raise InputError(
                f"policy has {type(stage).__name__}, which changes logits, and this model has none "
                "(it draws whole chunks); give ExactTemperature(T) or BatchTemperature(T)"
            )
    if len(own) != 1:
        raise InputError(f"policy has {len(own)} temperatures; give one")
    stage = own[0]
    return ExactTemperature(float(stage.value)) if isinstance(stage, Temperature) else stage


def _at_one(kind: type[ChunkPolicy], max_draws: int) -> ChunkPolicy:
    return kind(1.0, max_draws=max_draws)


def _check_counts(policy: Any, least: int) -> None:
    if integer("max_draws", policy.max_draws) < least:
        raise InputError(
            f"max_draws={policy.max_draws} must be at least {least}, which "
            f"{type(policy).__name__}({policy.value}) always draws"
        )
    integer("draws_per_call", policy.draws_per_call, 1)


def _common(stages: Sequence[Any], name: str) -> Any:
    values = {getattr(stage, name) for stage in stages}
    if len(values) > 1:
        raise InputError(f"the prompts' policies differ in {name}; give one for a whole batch")
    return values.pop()
