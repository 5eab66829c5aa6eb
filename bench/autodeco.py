"""AutoDeco: which estimator finds the truth, and what the heads add to a decode step.

    python bench/autodeco.py --output=bench/results/autodeco.jsonl            # both synthetic tasks
    python bench/autodeco.py --task=step --output=bench/results/autodeco.jsonl

The synthetic tasks know the truth. Contexts are h ~ N(0, I) of width 16, logits ``h W`` over 32
tokens with W ~ 0.6 N, and u ~ 0.5 N.

- ``temperature``: labels from ``softmax(l / T*)`` with ``T* = 0.4 + 1.2 sigmoid(h u)``.
- ``top_p``: labels from what the soft mask leaves of ``softmax(l)`` at ``P* = 0.3 + 0.6
  sigmoid(h u)``; the true temperature is 1.

Each is also run with ``--noise`` (0.1) of the labels replaced by uniform ones. Both heads train on
the objective as on a model, with fresh draws of 512 contexts: Adam at 2e-3, 600 steps for the first
task, 1500 with a cosine to 0 for the second. ``step`` times a decode step of the model of
``vs_transformers.py`` with and without the heads, and the heads by themselves, in turns.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import report
from absl import app, flags
from flax import nnx

from jaxalope.configs.objectives import AutoDeco
from jaxalope.layers.decoding_heads import DecodingHeads, soft_top_p
from jaxalope.model import KimiLinearConfig, Model, add_decoding_heads, build_model
from jaxalope.sharding import init_params, split
from jaxalope.train.autodeco import token_losses

_TASK = flags.DEFINE_list("task", ["temperature", "top_p"], "Which: temperature, top_p, step.")
_NOISE = flags.DEFINE_list("noise", ["0", "0.1"], "Shares of uniform labels.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Worlds (W, u, heads, draws) of each row.", lower_bound=1)
_BATCHES = flags.DEFINE_list("batch", ["1", "64"], "Rows of a decode step.")
_HIDDEN_SIZE = flags.DEFINE_integer("hidden_size", 256, "Of the model whose step is timed.")
_TURNS = flags.DEFINE_integer("turns", 15, "Measurements of each side.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "File to append the rows to, as JSON lines.")

WIDTH, VOCAB, ROWS = 16, 32, 512
PLAIN = AutoDeco(easy_drop=0.0, dft_weight=False)
RECIPES = {
    "plain cross-entropy": PLAIN,
    "easy tokens dropped": dataclasses.replace(PLAIN, easy_drop=0.6),
    "weighted by b": dataclasses.replace(PLAIN, dft_weight=True),
    "published (both)": AutoDeco(),
    "likelihood": AutoDeco(estimator="likelihood"),
    "conditional": AutoDeco(estimator="conditional"),
}
COLUMNS = ("corr", "mean_abs_error", "mean_found", "mean_truth", "mean_other")
STEPS = {"temperature": 600, "top_p": 1500}


def world(task: str, noise: float, key: jax.Array):
    """``draw(key, count) -> (h, logits, labels, truth)`` of one world."""
    of_w, of_u = jax.random.split(key)
    w = 0.6 * jax.random.normal(of_w, (WIDTH, VOCAB))
    u = 2 / WIDTH**0.5 * jax.random.normal(of_u, (WIDTH,))

    def draw(key, count):
        of_h, of_label, of_noise, of_place = jax.random.split(key, 4)
        h = jax.random.normal(of_h, (count, WIDTH))
        logits, s = h @ w, jax.nn.sigmoid(h @ u)
        if task == "temperature":
            truth = 0.4 + 1.2 * s
            proposal = logits / truth[:, None]
        else:
            truth = 0.3 + 0.6 * s
            proposal = jnp.log(soft_top_p(logits, 1.0, truth))
        labels = jax.random.categorical(of_label, proposal)
        wrong = jax.random.uniform(of_place, (count,)) < noise
        labels = jnp.where(wrong, jax.random.randint(of_noise, (count,), 0, VOCAB), labels)
        return h, logits, labels, truth

    return draw


def recover(task: str, noise: float, config: AutoDeco, key: jax.Array) -> dict[str, jax.Array]:
    """Train heads in one world; how near they come to its truth on fresh contexts."""
    of_world, of_heads, of_steps, of_test = jax.random.split(key, 4)
    draw = world(task, noise, of_world)
    graphdef, params = split(DecodingHeads(WIDTH, rngs=nnx.Rngs(of_heads)))
    steps = STEPS[task]
    rate = 2e-3 if task == "temperature" else optax.cosine_decay_schedule(2e-3, steps)
    adam = optax.adam(rate)

    def loss(params, key):
        of_batch, of_u = jax.random.split(key)
        h, logits, labels, _ = draw(of_batch, ROWS)
        temperature, top_p = nnx.merge(graphdef, params)(h[None], logits[None])
        u = jax.random.uniform(of_u, (ROWS,))
        x = token_losses(config, logits, labels, temperature[0], top_p[0], u)
        if config.estimator != "published":
            return x["top_p_loss"].mean()
        first = x["temperature_loss"].sum() / x["temperature_weight"].sum()
        return first + x["top_p_loss"].mean()

    def step(carry, key):
        params, state = carry
        updates, state = adam.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    start = (params, adam.init(params))
    params = jax.lax.scan(step, start, jax.random.split(of_steps, steps))[0][0]
    h, logits, _, truth = draw(of_test, 8192)
    temperature, top_p = (x[0] for x in nnx.merge(graphdef, params)(h[None], logits[None]))
    found, other = (temperature, top_p) if task == "temperature" else (top_p, temperature)
    return {
        "corr": jnp.corrcoef(found, truth)[0, 1],
        "mean_abs_error": jnp.abs(found - truth).mean(),
        "mean_found": found.mean(),
        "mean_truth": truth.mean(),
        "mean_other": other.mean(),
    }


def recovery(task: str, noise: float, facts: dict) -> list[dict]:
    rows, lines = [], []
    keys = jax.vmap(jax.random.key)(jnp.arange(_SEEDS.value))
    for name, config in RECIPES.items():
        run = jax.jit(jax.vmap(lambda key, c=config: recover(task, noise, c, key)))
        found = jax.device_get(run(keys))
        results = {n: found[n].tolist() for n in COLUMNS}
        rows.append({**facts, "what": task, "noise": noise, "recipe": name, **results})
        lines.append((name, *(report.spread(values, 3) for values in results.values())))
        print(lines[-1], flush=True)
    symbol, other = ("T", "P") if task == "temperature" else ("P", "T")
    means = (f"mean {symbol}", f"true mean {symbol}", f"mean {other}")
    print(report.table([f"{task}, {noise:.0%} noise", "corr", "mean error", *means], lines))
    return rows


def config() -> KimiLinearConfig:
    """The 8.3M-parameter model of ``vs_transformers.py``, or a wider one like it."""
    width = _HIDDEN_SIZE.value
    return dataclasses.replace(
        KimiLinearConfig.demo(),
        vocab_size=259,
        hidden_size=width,
        num_layers=8,
        kda_layers=(1, 2, 3, 5, 6, 7),
        full_attn_layers=(4, 8),
        kda_num_heads=width // 64,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        moe_intermediate_size=width // 2,
    )


def decode_steps(model: Model, batch: int, count: int = 32):
    """A callable that takes ``count`` decode steps of ``batch`` rows in one jitted loop."""
    heads = hasattr(model.module(), "decoding_heads")

    @jax.jit
    def run(params, cache, token):
        module = nnx.merge(model.graphdef, params)

        def step(_, carry):
            cache, token, total = carry
            hidden, cache, _ = module.hidden_states(token, cache)
            logits = module.logits(hidden)
            if heads:
                temperature, top_p = module.decoding_heads(hidden, logits)
                total += temperature[:, 0] + top_p[:, 0]
            return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32), total

        return jax.lax.fori_loop(0, count, step, (cache, token, jnp.zeros(batch)))[1:]

    cache = model.init_cache(batch, 256)
    token = jnp.ones((batch, 1), jnp.int32)
    return lambda: run(model.params, cache, token)


def heads_alone(model: Model, batch: int, count: int = 32):
    """A callable that evaluates the heads ``count`` times on ``batch`` rows, and nothing else."""

    @jax.jit
    def run(params, hidden, logits):
        heads = nnx.merge(model.graphdef, params).decoding_heads

        def step(_, total):
            # What they said before goes in, so that no turn can be left out.
            temperature, top_p = heads(hidden + 1e-6 * total, logits + 1e-6 * total)
            return (temperature + top_p)[..., None]

        return jax.lax.fori_loop(0, count, step, jnp.zeros((batch, 1, 1)))

    hidden = jax.random.normal(jax.random.key(2), (batch, 1, model.config.hidden_size))
    logits = 3 * jax.random.normal(jax.random.key(3), (batch, 1, model.config.vocab_size))
    return lambda: run(model.params, hidden, logits)


def step_share(facts: dict) -> list[dict]:
    """What predicting (T, P) adds to a decode step."""
    graphdef, params = init_params(lambda key: build_model(config(), key), jax.random.key(0))
    plain = Model(config(), graphdef, params)
    sides = {"plain": plain, "heads": add_decoding_heads(plain, jax.random.key(1))}
    rows, lines = [], []
    for batch in map(int, _BATCHES.value):
        runs = {name: decode_steps(model, batch) for name, model in sides.items()}
        runs["alone"] = heads_alone(sides["heads"], batch)
        seconds = {n: s / 32 for n, s in report.alternate(runs, _TURNS.value).items()}
        for name, values in seconds.items():
            row = {"what": "step", "side": name, "batch": batch, "seconds": values.tolist()}
            rows.append({**facts, "parameters": config().num_params(), **row})
        added = (seconds["heads"] / seconds["plain"] - 1) * 100
        alone = seconds["alone"] / seconds["plain"] * 100
        milliseconds = (report.spread(s * 1e3, 3) for s in seconds.values())
        lines.append((batch, *milliseconds, report.spread(added), report.spread(alone), "2"))
    times = ("plain, ms a step", "with heads, ms", "heads alone, ms")
    print(report.table(["rows", *times, "added, %", "alone, % of plain", "aim, %"], lines))
    return rows


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    unknown = set(_TASK.value) - {*STEPS, "step"}
    if unknown:
        raise app.UsageError(f"--task={min(unknown)}: use temperature, top_p or step")
    facts = report.facts()
    print(" ".join(f"{k}={v}" for k, v in facts.items()))
    for task in _TASK.value:
        for noise in map(float, _NOISE.value) if task != "step" else (None,):
            rows = step_share(facts) if noise is None else recovery(task, noise, facts)
            report.write_rows(_OUTPUT.value, rows)


if __name__ == "__main__":
    app.run(main)
