"""Speculative decoding with prompt lookup against plain decoding: tokens/s, and tokens a call.

    python bench/speculative.py --output=bench/results/speculative.jsonl

The model of --model, or one of the demo's size that nobody trained, with an embedding so large that
the next token hangs on the last one alone: its greedy text falls into a cycle, and nearly every
draft is accepted. Text drawn at temperature 1 has nothing to look up: what speculation costs where
it does not pay. Prompts are bytes of this file. Both sides run in turns.
"""

import pathlib

import jax
import report
from absl import app, flags

import jaxalope
from jaxalope import Greedy, Model, PromptLookup, Temperature
from jaxalope.configs import get_experiment
from jaxalope.data.tokenizers import load_tokenizer
from jaxalope.model import build_model
from jaxalope.sharding import init_params

_OUTPUT = flags.DEFINE_string("output", None, "File to append the rows to, as JSON lines.")
_MODEL = flags.DEFINE_string("model", None, "A training workdir; a fresh demo model if not given.")
_TURNS = flags.DEFINE_integer("turns", 7, "Times that each side is measured.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 384, "New tokens a row.", lower_bound=1)
_DRAFTS = flags.DEFINE_multi_integer("draft_tokens", [4, 8], "Drafts a step; repeat for several.")
_BATCH = flags.DEFINE_multi_integer("batch", [1, 8], "Rows; repeat for several.")

TEXTS = {"repetitive (greedy)": Greedy(), "without repetition (temperature 1)": Temperature(1.0)}


def load_model():
    if _MODEL.value is not None:
        return jaxalope.load(_MODEL.value)
    config = get_experiment("demo").model
    graphdef, params = init_params(lambda key: build_model(config, key), jax.random.key(0))
    params["embed"] = jax.tree.map(lambda x: 100 * x, params["embed"])
    return Model(config, graphdef, params, load_tokenizer("bytes"))


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    model, text = load_model(), pathlib.Path(__file__).read_text(encoding="utf-8")
    facts = report.facts(model=_MODEL.value or "demo, untrained", tokens=_TOKENS.value)
    rows, lines = [], []
    for name, policy in TEXTS.items():
        for batch in _BATCH.value:
            prompts = [text[100 * i : 100 * i + 60] for i in range(batch)]
            drafts = {"plain": None} | {f"{n} drafts": PromptLookup(n) for n in _DRAFTS.value}
            made = {}

            def side(side_name, draft, prompts=prompts, policy=policy, made=made):
                made[side_name] = jaxalope.generate(
                    model, prompts, policy, _TOKENS.value, stop_tokens=(), draft=draft
                )

            sides = {k: lambda k=k, d=d, side=side: side(k, d) for k, d in drafts.items()}
            seconds = report.alternate(sides, _TURNS.value)
            for side_name, times in seconds.items():
                accepted = sum(made[side_name].accepted or [0])
                drafted = sum(made[side_name].drafted or [0])
                speed = batch * _TOKENS.value / times
                ratio = seconds["plain"] / times
                # A step's last token is drawn, so calls are the tokens that were not accepted.
                length = batch * _TOKENS.value / (batch * _TOKENS.value - accepted)
                case = {"text": name, "batch": batch, "side": side_name}
                counts = {"accepted": accepted, "drafted": drafted, "tokens_a_call": length}
                rows.append({**facts, **case, **counts, "seconds": times.tolist()})
                rate = f"{accepted / drafted:.2f}" if drafted else ""
                cells = (report.spread(speed, 0), report.spread(ratio, 2), rate, f"{length:.2f}")
                lines.append((*case.values(), *cells))
    print(" ".join(f"{k}={v}" for k, v in facts.items()))
    headers = ["text", "rows", "side", "tokens/s", "times plain", "accepted", "tokens a call"]
    print(report.table(headers, lines))
    report.write_rows(_OUTPUT.value, rows)


if __name__ == "__main__":
    app.run(main)
