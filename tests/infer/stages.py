"""Every stage of a policy with a slow, obviously right float64 version, and rows to try them on."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxalope import (
    BadWords,
    Chain,
    GrammarMask,
    LogitBias,
    MinNewTokens,
    MinP,
    NoRepeatNgram,
    Predicted,
    PresenceFrequencyPenalty,
    RepetitionPenalty,
    SoftTopP,
    Temperature,
    TopK,
    TopP,
    Typical,
)
from jaxalope.infer.policy import Context, Counts

GOLDENS = pathlib.Path(__file__).parent.parent / "fixtures" / "sampling" / "sampler_processors.npz"


@dataclasses.dataclass
class Row:
    """What a stage sees of one row, as an oracle reads it."""

    prompt: list[int]
    output: list[int]
    temperature: float
    top_p: float

    @property
    def text(self):
        return [*self.prompt, *self.output]


def rows(rng, batch, vocab_size, longest=24):
    """Rows of a few different tokens, so that n-grams repeat."""
    made = []
    for _ in range(batch):
        few = rng.choice(vocab_size, min(4, vocab_size), replace=False)
        prompt, output = (rng.choice(few, rng.integers(1, longest // 2)).tolist() for _ in "ab")
        temperature, top_p = float(rng.uniform(0.3, 1.8)), float(rng.uniform(0.1, 0.95))
        made.append(Row(prompt, output, temperature, top_p))
    return made


def context(rows, vocab_size, capacity=32):
    """The rows as a batch's context; what lies beyond a row's length is noise."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, (len(rows), capacity))
    prompt, output = np.zeros((2, len(rows), vocab_size), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row.text)] = row.text
        np.add.at(prompt[i], row.prompt, 1)
        np.add.at(output[i], row.output, 1)
    return Context(
        tokens=jnp.asarray(tokens, jnp.int32),
        length=jnp.array([len(row.text) for row in rows], jnp.int32),
        prompt_length=jnp.array([len(row.prompt) for row in rows], jnp.int32),
        counts=Counts(jnp.asarray(prompt), jnp.asarray(output)),
        predicted=(
            jnp.array([row.temperature for row in rows], jnp.float32),
            jnp.array([row.top_p for row in rows], jnp.float32),
        ),
    )


def take(context, i):
    """The context of row ``i`` alone."""
    return jax.tree.map(lambda x: x[i : i + 1], context)


def words_of(allowed):
    """int32 words of a boolean mask."""
    padded = np.zeros(-(-len(allowed) // 32) * 32, bool)
    padded[: len(allowed)] = allowed
    bits = padded.reshape(-1, 32).astype(np.uint32) << np.arange(32, dtype=np.uint32)
    return bits.sum(1, dtype=np.uint32).view(np.int32)


def probabilities(logits):
    p = np.exp(logits - np.max(logits))
    return p / p.sum()


def smallest(order, weight, share):
    """A mask of the first tokens of ``order`` that together have ``share`` of the weight."""
    mass = np.cumsum(weight[order])
    mask = np.zeros(len(order), bool)
    mask[order[: np.searchsorted(mass, share) + 1]] = True
    return mask


def oracle(stage, logits, row):
    """One row of ``stage`` in float64, by the definition."""
    logits = np.array(logits, np.float64)
    kind, size = type(stage), len(logits)
    if kind is Chain:
        for part in stage.policies:
            logits = oracle(part, logits, row)
    elif kind is Temperature:
        logits = logits / stage.value
    elif kind is TopK:
        if 0 < stage.k < size:
            logits[logits < np.sort(logits)[-stage.k]] = -np.inf
    elif kind is TopP:
        if stage.p < 1:
            p = probabilities(logits)
            logits[~smallest(np.argsort(-p, kind="stable"), p, stage.p)] = -np.inf
    elif kind is SoftTopP:
        logits = softened(logits, stage.p, stage.sharpness)
    elif kind is MinP:
        p = probabilities(logits)
        logits[p < stage.p * p.max()] = -np.inf
    elif kind is Typical:
        p = probabilities(logits)
        surprise = np.array([-np.log(x) if x > 0 else np.inf for x in p])
        entropy = sum(x * s for x, s in zip(p, surprise, strict=True) if x > 0)
        if stage.mass < 1:
            order = np.argsort(np.abs(surprise - entropy), kind="stable")
            logits[~smallest(order, p, stage.mass)] = -np.inf
    elif kind is Predicted:
        logits = logits / row.temperature
        if stage.soft:
            return softened(logits, row.top_p, 30.0)
        p = probabilities(logits)
        logits[~smallest(np.argsort(-p, kind="stable"), p, row.top_p)] = -np.inf
    elif kind is RepetitionPenalty:
        for v in set(row.text):
            logits[v] = logits[v] / stage.value if logits[v] > 0 else logits[v] * stage.value
    elif kind is PresenceFrequencyPenalty:
        text = row.text if stage.include_prompt else row.output
        for v in set(text):
            logits[v] -= stage.presence + stage.frequency * text.count(v)
    elif kind is NoRepeatNgram:
        n, text = stage.size, row.text
        if len(text) >= n:
            for v in range(size):
                gram = [*text[len(text) - n + 1 :], v]
                if any(text[i : i + n] == gram for i in range(len(text) - n + 1)):
                    logits[v] = -np.inf
    elif kind is LogitBias:
        for v, value in zip(stage.ids, stage.values, strict=True):
            if v < size:
                logits[v] += value
    elif kind is BadWords:
        for word in stage.sequences:
            *begun, last = [v for v in word if v >= 0] or [None]
            if last is not None and row.text[len(row.text) - len(begun) :] == begun:
                logits[last] = -np.inf
    elif kind is MinNewTokens:
        if len(row.output) < stage.count:
            for v in stage.stop_tokens:
                if v < size:
                    logits[v] = -np.inf
    elif kind is GrammarMask:
        for v in range(size):
            word = int(stage.words[v // 32]) if v // 32 < len(stage.words) else 0
            if not (word >> (v % 32)) & 1:
                logits[v] = -np.inf
    else:
        raise AssertionError(f"no oracle for {kind}")
    return logits


def softened(logits, p, sharpness):
    if p == 1:
        return logits
    probs = probabilities(logits)
    order = np.argsort(-probs, kind="stable")
    mask = np.zeros(len(logits))
    mask[order] = np.exp(-sharpness * np.maximum(np.cumsum(probs[order]) - p, 0))
    with np.errstate(divide="ignore"):
        return np.log(probs * mask)


def examples(vocab_size, rng):
    """Two forms of every stage, with different numbers and the same static settings."""
    v = vocab_size
    some = [int(i) for i in rng.choice(v, 5, replace=False)]
    allowed = rng.random((2, v)) < 0.6
    return [
        (
            LogitBias({some[0]: 2.0, some[1]: -1.5, some[2]: -np.inf}),
            LogitBias({some[3]: 3.0, 0: 1, 1: 2}),
        ),
        (BadWords([[some[0]], some[1:3]]), BadWords([[some[3]], some[3:5]])),
        (GrammarMask(words_of(allowed[0])), GrammarMask(words_of(allowed[1]))),
        (MinNewTokens(9, some[:2]), MinNewTokens(3, some[2:4])),
        (RepetitionPenalty(1.3), RepetitionPenalty(0.8)),
        (PresenceFrequencyPenalty(0.4, 0.2), PresenceFrequencyPenalty(-0.5, 0.7, True)),
        (NoRepeatNgram(2), NoRepeatNgram(3)),
        (Temperature(0.7), Temperature(1.4)),
        (Predicted(), Predicted()),
        (Predicted(soft=True), Predicted(soft=True)),
        *((TopK(5, i), TopK(11, i)) for i in (None, "sort", "bisect")),
        *((TopP(0.9, i), TopP(0.4, i)) for i in (None, "sort", "bisect")),
        (SoftTopP(0.8), SoftTopP(0.5, 12.0)),
        (MinP(0.1), MinP(0.02)),
        *((Typical(0.8, i), Typical(0.3, i)) for i in (None, "sort", "bisect")),
    ]


def every_stage(vocab_size, rng, last=False):
    """A chain that has all of them in the usual order, in their first form (or their last)."""
    pairs = examples(vocab_size, rng)
    one = {type(stage): stage for stage, _ in (pairs if last else reversed(pairs))}
    return Chain(*sorted(one.values(), key=lambda stage: stage.rank))
