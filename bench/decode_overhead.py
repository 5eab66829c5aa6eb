"""What the host adds to a decode step: a call of the compiled loop that takes no step at all.

    python bench/decode_overhead.py --output=bench/results/decode_overhead.jsonl

Flattening parameters and state, donating the state and dispatching is all that such a call does, so
its time is the overhead of driving the loop step by step (streaming); inside a call there is none.
Also printed: a call that takes one step, and the time of a step inside one call of 64.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import report
from absl import app, flags

from jaxalope import Temperature
from jaxalope.configs import get_experiment
from jaxalope.infer import NextToken
from jaxalope.model import build_model
from jaxalope.sharding import init_params

_OUTPUT = flags.DEFINE_string("output", None, "File to append the rows to, as JSON lines.")
_CALLS = flags.DEFINE_integer("calls", 300, "Calls timed of each kind.", lower_bound=1)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    config = get_experiment("demo").model
    graphdef, params = init_params(lambda key: build_model(config, key), jax.random.key(0))
    decoder, policy = NextToken(graphdef), Temperature(1.0)
    lengths = np.array([8], np.int32)
    limits = np.array([30_000], np.int32)
    prompt = np.ones((1, 64), np.int32)
    seeds, samples, stops = np.array([0], np.uint32), np.array([0]), jnp.array([[-1]])
    state = decoder.prefill(params, prompt, lengths, limits, seeds, samples, capacity=1024)
    facts = report.facts(
        model="demo", arrays=len(jax.tree.leaves((params, state))), parameters=config.num_params()
    )
    rows, lines = [], []
    for name, steps, calls in (
        ("no step: host overhead", 0, _CALLS.value),
        ("one step", 1, _CALLS.value),
        ("64 steps, each", 64, max(1, _CALLS.value // 32)),
    ):
        count = jnp.int32(steps)
        state = jax.block_until_ready(decoder.decode(params, policy, state, stops, count))
        seconds = []
        for _ in range(calls):
            start = time.perf_counter()
            state = jax.block_until_ready(decoder.decode(params, policy, state, stops, count))
            seconds.append((time.perf_counter() - start) / max(steps, 1))
        rows.append({**facts, "what": name, "seconds": seconds})
        low, middle, high = np.percentile(np.array(seconds) * 1e3, [10, 50, 90])
        lines.append((name, f"{middle:.3f} ({low:.3f} - {high:.3f})"))
    print(" ".join(f"{k}={v}" for k, v in facts.items()))
    print(report.table(["call", "ms, median (10% - 90%)"], lines))
    report.write_rows(_OUTPUT.value, rows)


if __name__ == "__main__":
    app.run(main)
