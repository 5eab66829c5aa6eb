"""Elastic-Cache: what gamma does to calls and refreshes, and what a call with few of them costs.

    python bench/elastic_cache.py --output=bench/results/elastic_cache.jsonl

The counts are of the published tiny model of the tests (they are no figures of time, and the same
on every machine but for rounding). The seconds are of a model with random weights, which commits
sixteen tokens a call whatever they are: its text is worth nothing, its calls cost what they cost.
"""

import pathlib

import jax
import numpy as np
import report
from absl import app, flags

import jaxalope
from jaxalope import ElasticCache, Model, Threshold, TopCount
from jaxalope.model import build_model
from jaxalope.model.llada import LLaDAConfig
from jaxalope.sharding import init_params

_OUTPUT = flags.DEFINE_string("output", None, "File to append the rows to, as JSON lines.")
_TURNS = flags.DEFINE_integer("turns", 3, "Times that each side is measured.", lower_bound=1)
_LENGTHS = flags.DEFINE_multi_integer("length", [128, 256, 512], "Generation lengths.")

TINY = pathlib.Path(__file__).parent.parent / "tests" / "fixtures" / "llada_tiny"
CONFIG = LLaDAConfig(
    vocab_size=512,
    hidden_size=256,
    num_layers=8,
    num_attention_heads=8,
    num_kv_heads=8,
    intermediate_size=768,
    mask_token_id=511,
    scan_layers=False,
)
COUNTS = [
    *(("heads", gamma) for gamma in (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 2.0)),
    *(("keys", gamma) for gamma in (0.5, 0.8, 0.9, 0.95)),
]


def counts(rule):
    """Rows of calls and refreshes, a setting each."""
    model = jaxalope.load(TINY)
    ids = np.load(TINY / "io.npz")["input_ids"]
    ask = {"gen_length": 20, "rule": rule, "stop_tokens": []}

    def decode(**settings):
        cache = ElasticCache(window=6, **settings)
        out = jaxalope.denoise(model, ids[:, :9].tolist(), cache=cache, **ask)
        return out.nfe, out.update_frequency

    rows = [("exact", "", *decode(exact=True))]
    return rows + [(drift, gamma, *decode(drift=drift, gamma=gamma)) for drift, gamma in COUNTS]


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    facts, rows = report.facts(), []
    print(" ".join(f"{k}={v}" for k, v in facts.items()))
    lines = []
    for rule in (TopCount(1), Threshold(0.2)):
        for drift, gamma, calls, frequency in counts(rule):
            case = {"rule": type(rule).__name__, "drift": drift, "gamma": gamma}
            rows.append({**facts, **case, "calls": calls, "update_frequency": frequency})
            lines.append((*case.values(), f"{np.mean(calls):.1f}", f"{np.mean(frequency):.2f}"))
    headers = ["rule", "drift", "gamma", "calls", "layers in full"]
    print(report.table(headers, lines) + "\n")

    graphdef, params = init_params(lambda key: build_model(CONFIG, key), jax.random.key(0))
    model, prompt, lines = Model(CONFIG, graphdef, params), list(range(64)), []
    caches = {
        "none": "none",
        "elastic, exact": ElasticCache(exact=True),
        "elastic, gamma 2 (always)": ElasticCache(gamma=2.0),
        "elastic, gamma 0 (never)": ElasticCache(gamma=0.0),
    }
    for length in _LENGTHS.value:
        sides = {
            name: lambda cache=cache, length=length: (
                jaxalope.denoise(
                    model,
                    [prompt],
                    gen_length=length,
                    cache=cache,
                    rule=TopCount(16),
                    stop_tokens=[],
                ).nfe
            )
            for name, cache in caches.items()
        }
        seconds = report.alternate(sides, _TURNS.value)
        for name, times in seconds.items():
            each = times / (length / 16)
            rows.append({**facts, "length": length, "side": name, "seconds_a_call": each.tolist()})
            ratio = report.spread(seconds["none"] / times, 2)
            lines.append((length, name, report.spread(each * 1e3), ratio))
    print(report.table(["length", "cache", "ms a call", "times no cache"], lines))
    report.write_rows(_OUTPUT.value, rows)


if __name__ == "__main__":
    app.run(main)
