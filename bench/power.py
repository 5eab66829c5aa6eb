"""Power sampling against one plain sample: tokens decoded, and wall time a chain.

    python bench/power.py --output=bench/results/power.jsonl

An 8.3M-parameter Kimi Linear (6 KDA, 2 MLA layers; nobody trained it), ``--tokens`` tokens a
response, no stop token, alpha 4. Tokens decoded, a chain: T + N sum (end + 1) / 2 over the blocks'
ends, in expectation over the cuts. (The published N T / (4 B), 8.84 at T = 679, is the leading term
of that over T.) Chains share their cuts, so what they decode is what the cuts drawn ask for: it is
given beside the expectation. ``--methods`` also times chains that keep no second cache (reread) and
cuts on the grid.
"""

import time

import jax
import jax.numpy as jnp
import models
import numpy as np
import report
from absl import app, flags

from jaxalope import Model, Temperature, generate
from jaxalope.infer.metropolis import Metropolis
from jaxalope.infer.power import expected_tokens, sample_mh
from jaxalope.infer.programs import program_of
from jaxalope.infer.request import make_batch
from jaxalope.model import build_model
from jaxalope.sharding import init_params

_OUTPUT = flags.DEFINE_string("output", None, "File to append the rows to, as JSON lines.")
_TOKENS = flags.DEFINE_integer("tokens", 679, "Of a response.", lower_bound=1)
_BLOCK = flags.DEFINE_integer("block", 192, "Tokens of a block.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 10, "Metropolis-Hastings steps a block.", lower_bound=1)
_CHAINS = flags.DEFINE_multi_integer("chains", [1, 16, 64], "Chains together; may be repeated.")
_TURNS = flags.DEFINE_integer("turns", 3, "Measurements of each.", lower_bound=1)
_METHODS = flags.DEFINE_multi_string(
    "methods", ["padded shadow"], "Cut rule and cache reuse; may be repeated."
)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    config = models.kimi_8m()
    graphdef, params = init_params(lambda key: build_model(config, key), jax.random.key(0))
    model = Model(config, graphdef, params).unrolled()
    prompt, total = [list(range(3, 35))], _TOKENS.value

    def plain():
        return generate(model, prompt, Temperature(0.25), total, stop_tokens=()).tokens

    batch = make_batch(model, prompt, None, total, 0, ())
    facts = report.facts(
        parameters=config.num_params(),
        tokens=total,
        block=_BLOCK.value,
        steps=_STEPS.value,
    )
    theory = expected_tokens(total, _BLOCK.value, _STEPS.value) / total
    rows, lines = [], []
    plain()
    for method in _METHODS.value:
        cut, reuse = method.split()
        settings = (total, _BLOCK.value, _STEPS.value, cut, True, reuse, _BLOCK.value)
        program = program_of(model, Metropolis, *settings)
        for chains in _CHAINS.value:
            _compile(model, program, batch, chains)
            one, many, multiples = [], [], []
            for turn in range(_TURNS.value):
                one.append(_seconds(plain))
                out = []

                def power(turn=turn, out=out, chains=chains, program=program):
                    numbers = {"alpha": 4.0, "tau": 0.25, "n": chains, "cut_seed": turn}
                    out.append(sample_mh(model, batch, program, **numbers))

                many.append(_seconds(power))
                multiples.append(out[0].tokens_decoded / chains / total)
            wall = np.array(many) / np.array(one)
            rows.append(
                {
                    **facts,
                    "method": method,
                    "chains": chains,
                    "plain_seconds": one,
                    "power_seconds": many,
                    "decoded_multiple": multiples,
                    "expected_multiple": theory,
                }
            )
            lines.append(
                (
                    method,
                    chains,
                    f"{report.spread(multiples)}; {theory:.1f}",
                    report.spread(wall),
                    report.spread(wall / chains, 2),
                )
            )
            report.write_rows(_OUTPUT.value, rows[-1:])
    print(" ".join(f"{k}={v}" for k, v in facts.items()))
    headers = ["cut, reuse", "chains", "decoded a chain; expected", "wall", "wall a chain"]
    print(report.table(headers, lines))


def _compile(model, program, batch, chains):
    many, rows = batch.repeat(chains, 1)
    state = program.start(
        model.params,
        batch.prompts,
        batch.lengths,
        rows,
        many.seeds,
        many.samples,
        capacity=batch.capacity,
    )
    numbers = jnp.float32(4), jnp.float32(0.25), many.stop_tokens, jnp.uint32(0)
    jax.block_until_ready(program.run_block(model.params, state, jnp.int32(0), *numbers))


def _seconds(run) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


if __name__ == "__main__":
    app.run(main)
