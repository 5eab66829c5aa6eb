"""Denoising with and without caches: tokens/s, calls of the model, and what the text is worth.

    python bench/denoise.py --output=bench/results/denoise.jsonl

A small model is trained here on rows that count up modulo 10 by a step that their first token says
(`d3 0 3 6 9 2 ...`); prompts of starts and steps that training left out are then continued to each
length. Accuracy is the part of tokens that are right. Every side has the same weights; all but the
first commit by a threshold. A window of Elastic-Cache has as many candidates a call as a block of
that length.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
from absl import app, flags
from flax import nnx

import jaxalope
from jaxalope import Model, Threshold, TopQuota
from jaxalope.infer.denoise import parse_cache
from jaxalope.model import build_model
from jaxalope.model.llada import LLaDAConfig
from jaxalope.sharding import init_params

_OUTPUT = flags.DEFINE_string("output", None, "File to append the rows to, as JSON lines.")
_TURNS = flags.DEFINE_integer("turns", 3, "Times that each side is measured.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 4, "Prompts.", lower_bound=1)
_STEPS = flags.DEFINE_integer("train_steps", 300, "Steps of training.", lower_bound=100)
_LENGTHS = flags.DEFINE_multi_integer("length", [128, 256, 512], "Generation lengths.")
_BLOCK = flags.DEFINE_integer("block", 32, "Tokens of a block.", lower_bound=1)
_THRESHOLD = flags.DEFINE_multi_float("threshold", [0.9], "Of all sides but the first.")
_CACHES = flags.DEFINE_multi_string(
    "cache", ["none", "prefix", "dual"], "Caches by blocks to compare."
)
_ELASTIC = flags.DEFINE_multi_string(
    "elastic",
    ["gamma=0.9,window=16", "gamma=0.9,window=32", "gamma=0.5,window=32", "gamma=0,window=32"],
    "Settings of Elastic-Cache to compare, each a side.",
)

MASK = 31
CONFIG = LLaDAConfig(
    vocab_size=32,
    hidden_size=96,
    num_layers=3,
    num_attention_heads=6,
    num_kv_heads=6,
    intermediate_size=256,
    mask_token_id=MASK,
    rope_theta=10000.0,
    scan_layers=False,
)
PAIRS = [(start, step) for start in range(10) for step in range(1, 10)]
# Starts that are kept from training, of steps that meet every number: then one that was left out is
# a known count seen from another place. (That 5 follows 0 by steps of 5 nobody could know.)
HELD_OUT = [
    (start, step) for start, step in PAIRS if (start + step) % 5 == 0 and step in (1, 3, 7, 9)
]
FIRST = "none, one a call"


def text(start, step, length):
    """Token ``10 + step``, then the count."""
    return [10 + step, *((start + step * np.arange(length - 1)) % 10)]


def train(steps: int) -> Model:
    """A model that knows the rule, from rows of 64 to 512 tokens."""
    graphdef, params = init_params(lambda key: build_model(CONFIG, key), jax.random.key(0))
    schedule = optax.warmup_cosine_decay_schedule(0, 3e-3, 50, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    state, rng = optimizer.init(params), np.random.default_rng(0)
    known = [pair for pair in PAIRS if pair not in HELD_OUT]

    @jax.jit
    def step(params, state, rows, hidden, ratio):
        def loss(params):
            logits, _ = nnx.merge(graphdef, params)(jnp.where(hidden, MASK, rows))
            nats = optax.softmax_cross_entropy_with_integer_labels(logits, rows)
            return jnp.mean(nats * hidden / ratio)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    for i in range(steps):
        length = int(rng.choice([64, 64, 64, 128, 256, 512]))
        chosen = [known[j] for j in rng.integers(0, len(known), 4096 // length)]
        # Rows end anywhere in the count, so that starts say nothing of places.
        rows = np.array([text(a, d, length) for a, d in chosen], np.int32)
        ratio = ((np.arange(len(rows)) + rng.random()) / len(rows))[:, None] * 0.999 + 0.001
        hidden = rng.random(rows.shape) < ratio
        hidden[:, :2] = False
        params, state, value = step(params, state, rows, hidden, jnp.asarray(ratio, jnp.float32))
        if i % 100 == 99:
            print(f"step {i + 1}: loss {float(value):.3f}", flush=True)
    return Model(CONFIG, graphdef, params)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    model = train(_STEPS.value)
    pairs = [HELD_OUT[i % len(HELD_OUT)] for i in range(_BATCH.value)]
    prompts = [text(start, step, 8) for start, step in pairs]
    facts = report.facts(
        train_steps=_STEPS.value, batch=_BATCH.value, block=_BLOCK.value, **_shape(CONFIG)
    )
    caches = [*_CACHES.value, *(f"elastic:{settings}" for settings in _ELASTIC.value)]
    rows, lines = [], []
    for length in _LENGTHS.value:
        truth = np.array([text(start, step, 8 + length)[8:] for start, step in pairs])
        made = {}

        def side(name, cache, rule, length=length, made=made, **more):
            blocks = {} if cache.startswith("elastic") else {"block_length": _BLOCK.value}
            made[name] = jaxalope.denoise(
                model,
                prompts,
                gen_length=length,
                rule=rule,
                cache=parse_cache(cache),
                **blocks,
                **more,
            )

        sides = {FIRST: lambda side=side: side(FIRST, "none", TopQuota())}
        for threshold in _THRESHOLD.value:
            for cache in caches:
                name = f"{cache}, {threshold}"
                settings = (name, cache, Threshold(threshold))
                sides[name] = lambda settings=settings, side=side: side(*settings)
        # The number of steps is traced: what one a call needs is compiled by a call a block.
        side(FIRST, "none", TopQuota(), steps=length // _BLOCK.value)
        for name in list(sides)[1:]:
            sides[name]()
        seconds = report.alternate(sides, _TURNS.value, warm_up=0)
        for name, times in seconds.items():
            accuracy = float(np.mean(np.array(made[name].tokens) == truth))
            calls = float(np.mean(made[name].nfe))
            speed, ratio = _BATCH.value * length / times, seconds[FIRST] / times
            case = {"length": length, "side": name}
            full = made[name].update_frequency
            full = None if full is None else float(np.mean(full))
            counts = {"calls": calls, "accuracy": accuracy, "in_full": full}
            rows.append({**facts, **case, **counts, "seconds": times.tolist()})
            cells = (report.spread(speed, 0), report.spread(ratio, 2), f"{calls:.1f}")
            cells += (f"{accuracy:.3f}", "" if full is None else f"{full:.2f}")
            lines.append((*case.values(), *cells))
    print(" ".join(f"{k}={v}" for k, v in facts.items()))
    headers = [
        "length",
        "side",
        "tokens/s",
        "times the first",
        "calls",
        "accuracy",
        "layers in full",
    ]
    print(report.table(headers, lines))
    report.write_rows(_OUTPUT.value, rows)


def _shape(config):
    names = ("num_layers", "hidden_size", "vocab_size")
    return {name: value for name, value in dataclasses.asdict(config).items() if name in names}


if __name__ == "__main__":
    app.run(main)
