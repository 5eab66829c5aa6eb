"""The sampler's chain of stages, its tokens found by sorts against by bisections.

    python bench/policy_chain.py --output=bench/results/policy_chain.jsonl

All sides run in turns on the same rows: logits that fall with the logarithm of the rank, as a
language model's do, in a random order. One chain has all stages of a request that sets everything;
the three stages that rank tokens are also timed alone, on several vocabularies. The third side is
what is picked where nothing is said. Before any timing all must keep the same tokens, exact ties at
the edge aside.
"""

import jax
import jax.numpy as jnp
import numpy as np
import report
from absl import app, flags

import jaxalope as jx
from jaxalope.infer.policy import Context, Counts, propose, stack_rows, stages

_OUTPUT = flags.DEFINE_string("output", None, "File to append the rows to, as JSON lines.")
_VOCAB = flags.DEFINE_integer("vocab", 151_936, "The chain's vocabulary.", lower_bound=32)
_BATCHES = flags.DEFINE_list("batches", ["1", "8", "64"], "Rows, each for the whole chain.")
_SMALLER = flags.DEFINE_list(
    "smaller", ["64", "256", "1024", "16384"], "Vocabularies to time the stages on, too."
)
_TURNS = flags.DEFINE_integer("turns", 5, "Runs of every side.", lower_bound=1)

SIDES = {"sort": "sort", "bisect": "bisect", "picked": None}
_CANVAS = 1024


def ranking(implementation):
    """The stages that rank, alone."""
    return {
        "top_k (50)": jx.TopK(50, implementation),
        "top_p": jx.TopP(0.95, implementation),
        "typical": jx.Typical(0.95, implementation),
    }


def chain(implementation, vocab):
    """A request that sets everything."""
    alone = ranking(implementation)
    return jx.Chain(
        jx.LogitBias({5: 2.0, 6: -1.0}),
        jx.BadWords([[7, 8], [9]]),
        jx.GrammarMask(np.full((-(-vocab // 32),), -1, np.int32)),
        jx.MinNewTokens(5, [0]),
        jx.RepetitionPenalty(1.1),
        jx.PresenceFrequencyPenalty(0.1, 0.1),
        jx.NoRepeatNgram(3),
        jx.Temperature(0.8),
        # Not 50: so few would leave the stages behind it nothing to do.
        jx.TopK(1000, implementation),
        alone["top_p"],
        jx.MinP(0.0001),
        alone["typical"],
    )


def rows(batch, vocab, rng):
    """Logits, and the context of rows that fill half a canvas."""
    ranks = np.log(1 + np.argsort(rng.random((batch, vocab)), axis=1))
    logits = jnp.asarray(-1.3 * ranks + 0.5 * rng.normal(size=(batch, vocab)), jnp.float32)
    tokens = rng.integers(0, vocab, (batch, _CANVAS)).astype(np.int32)
    counts = np.zeros((batch, vocab), np.int32)
    np.add.at(counts, (np.arange(batch)[:, None], tokens[:, : _CANVAS // 2]), 1)
    half = jnp.full((batch,), _CANVAS // 2, jnp.int32)
    seen = Counts(jnp.asarray(counts), jnp.zeros_like(counts))
    return logits, Context(jnp.asarray(tokens), half, half // 2, seen)


def check_agreement(policies, other, logits, context):
    """Stage by stage on the same input: all a sort keeps, and no more than ties with its edge."""
    run = jax.jit(lambda policy, logits: policy(logits, context))
    for pair in zip(stages(policies["sort"]), stages(policies[other]), strict=True):
        ranked, cut = (np.asarray(run(stage, logits)) for stage in pair)
        more = (cut > -np.inf) & (ranked == -np.inf)
        assert not np.any((ranked > -np.inf) & (cut == -np.inf)), pair
        before = np.asarray(logits, np.float64)
        for row in np.flatnonzero(more.any(axis=1)):
            keys = before[row]
            if isinstance(pair[0], jx.Typical):
                log_p = keys - np.log(np.sum(np.exp(keys)))
                finite = log_p > -np.inf
                entropy = -np.sum(np.exp(log_p[finite]) * log_p[finite])
                keys = -np.abs(-log_p - entropy)
            edge = keys[ranked[row] > -np.inf].min()
            # Distances tie in float32, which the stage ranks them in.
            assert np.allclose(keys[more[row]], edge, atol=1e-5), (pair, row)
        logits = jnp.asarray(cut)


def compare(name, policies, batch, vocab, facts):
    """Rows and a table line of one comparison."""
    logits, context = rows(batch, vocab, np.random.default_rng(0))
    policies = {side: stack_rows([policy] * batch) for side, policy in policies.items()}
    for other in ("bisect", "picked"):
        check_agreement(policies, other, logits, context)
    run = jax.jit(propose)
    times = report.alternate(
        {side: lambda p=p: run(p, logits, context) for side, p in policies.items()}, _TURNS.value
    )
    ratio = times["sort"] / times["bisect"]
    made = [
        {**facts, "what": name, "vocab": vocab, "batch": batch, "side": side,
         "seconds": seconds.tolist()}
        for side, seconds in times.items()
    ]  # fmt: skip
    cells = [report.spread(times[side] * 1e3, 2) for side in SIDES]
    return made, (name, vocab, batch, *cells, report.spread(ratio, 2))


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    facts, made, lines = report.facts(), [], []
    todo = [
        (name, {side: ranking(i)[name] for side, i in SIDES.items()}, 8, vocab)
        for vocab in [*map(int, _SMALLER.value), _VOCAB.value]
        for name in ranking(None)
    ]
    whole = {side: chain(i, _VOCAB.value) for side, i in SIDES.items()}
    todo += [("chain", whole, int(batch), _VOCAB.value) for batch in _BATCHES.value]
    for name, policies, batch, vocab in todo:
        new, line = compare(name, policies, batch, vocab, facts)
        made += new
        lines.append(line)
    print(" ".join(f"{k}={v}" for k, v in facts.items()))
    headers = ("what", "vocabulary", "rows", *(f"{side}, ms" for side in SIDES), "sort / bisect")
    print(report.table(headers, lines))
    report.write_rows(_OUTPUT.value, made)


if __name__ == "__main__":
    app.run(main)
